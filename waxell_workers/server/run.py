"""Run the server with uvicorn, on a socket of our own: its address is known before anything is said."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator
from pathlib import Path

import uvicorn

from ..core.config import is_loopback
from ..core.errors import ConfigError
from .app import create_app
from .connections import PatientProtocol
from .store import Store

DEFAULT_PORT = 4319

_SAID_BY = " (on the command line: WAXELL_SERVER_API_KEY)"
"""How a key is given where it is no argument."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_GRACE_S = 1
"""How long a stop waits for requests under way; idle connections are closed at once."""


def serve(
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    db: str | os.PathLike[str] | None = None,
    api_key: str = "",
    ingest: bool = True,
    on_ready: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT; both end it quietly.

    Args:
        host: the address to bind; any but loopback needs an `api_key`.
        port: 0 takes a free one.
        db: the database file; None keeps the data in a temporary one, removed at the end.
        api_key: the key that clients must send; empty for none.
        ingest: offer the ingest endpoint, and name it in the reply to `GET …/config/`.
        on_ready: called once, with the address (`http://127.0.0.1:4319`), when requests are answered; it
            should return soon, since a stop waits for it.

    Raises:
        ConfigError: no key for an open address, or address, port or file cannot be used.
    """
    if not (api_key.isascii() and api_key.isprintable()) or api_key != api_key.strip():
        # not its value: it is a secret
        raise ConfigError(
            "api_key", "…", f"expected printable ASCII without spaces at its ends: it is a header{_SAID_BY}"
        )
    loopback = is_loopback(_address(host, port))
    if not loopback and not api_key:
        raise ConfigError("host", host, f"expected a loopback address, or an api_key beside it{_SAID_BY}")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_bind(host, port))
        store = stack.enter_context(Store(None if db is None else Path(db)))
        app = create_app(store, api_key=api_key, ingest=ingest, loopback=loopback)
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
        server = _Server(config, lambda: on_ready(_address(host, listener.getsockname()[1])))
        server.run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        # off the loop: whoever is told may ask us something before it returns
        await asyncio.get_running_loop().run_in_executor(None, self._on_started)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        # uvicorn's own raises a caught signal once more when it has stopped: the process would end before the
        # store is closed
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ConfigError("port", port, "expected a number from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # with the protocol named: only then does asyncio set TCP_NODELAY, without which an answer takes 40 ms
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError("host", host, f"expected an address of this machine ({error})") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            "port", port, f"expected one that is free on {host}; 0 takes any ({error})"
        ) from None
    return listener


def _address(host: str, port: int) -> str:
    try:
        host = f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        pass  # a name
    return f"http://{host}:{port}"
