"""A real HTTP server on a port that stays the same, and that misbehaves on request.

What it answers while it is healthy is a subclass's business: `FaultyProxy` here hands requests on to another
server. `mode()` switches at run time what happens to requests; every attribute may be read from any thread.

    with FaultyProxy(server.url) as faulty:
        faulty.mode("503", times=2, retry_after="1")
        ...
        faulty.mode("healthy")
"""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any, TypeVar
from urllib.parse import urlsplit

SPECIAL = frozenset(
    {"healthy", "refuse", "hang", "reset", "trickle", "redirect", "invalid_json", "reject", "raw"}
)
_UPSTREAM_S = 30.0
_S = TypeVar("_S", bound="FaultyHTTP")


@dataclass
class Request:
    """A request as it came, with the status that it was answered with (0: none)."""

    method: str
    endpoint: str
    path: str
    headers: dict[str, str]
    body: bytes
    """Uncompressed."""
    raw: bytes = b""
    """The body as it came."""
    status: int = 0


@dataclass
class _Fault:
    name: str = "healthy"
    endpoint: str | None = None
    """Only requests to this endpoint: config, start, llm-calls, steps, spans, complete, ingest …"""
    marker: str = ""
    """Only requests whose (uncompressed) body contains this text."""
    times: int | None = None
    """After so many times it is healthy again."""
    processed: bool = False
    """Do what was asked and only then misbehave: the outcome is unknown to the client."""
    status: int = 500
    retry_after: str | None = None
    location: str = "/elsewhere/"
    where: str = "body"
    """`reset` and `trickle`: at the `request` (reset), in the `headers` (trickle) or in the `body`."""
    interval: float = 0.1
    """`trickle`: seconds between two bytes."""
    play: Callable[[socket.socket, Callable[[], bool]], None] | None = None
    """`raw`: what is done with the connection in place of an answer; it is handed a function that says
    whether the mode is still the same, and the connection is closed after it."""


class FaultyHTTP:
    """The server, on a port of 127.0.0.1 that stays the same through every mode; a context manager."""

    def __init__(self) -> None:
        self.fired: Counter[str] = Counter()
        """How often each mode's fault has hit a request (`refuse`: not counted, there is no request)."""
        self.requests: list[Request] = []
        self._fault = _Fault()
        self._generation = 0
        self._changed = threading.Condition(threading.RLock())
        self._connections: set[socket.socket] = set()
        self._closed = False
        self._socket: socket.socket | None = _bound(0)
        self._port = self._socket.getsockname()[1]
        self._listening = False

    def answer(self, request: Request) -> tuple[int, Any]:
        """Return the status and the body (JSON data, or bytes as they are) of a healthy answer."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        """The base URL, for `WAXELL_API_URL`."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self: _S) -> _S:
        self._listen()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def mode(self: _S, name: str, **options: Any) -> _S:
        """Switch what happens to requests from now on.

        Args:
            name: `healthy`; a status code (`"503"`); `refuse` (nobody listens); `hang` (the request is
                read, an answer never comes); `reset` (the connection is torn down); `trickle` (an answer,
                byte by byte); `redirect`; `invalid_json` (200 and HTML); `reject` (`status`, for bodies
                with `marker`); `raw` (whatever `play` does).
            options: Fields of `_Fault`: `endpoint`, `marker`, `times`, `processed`, `retry_after`,
                `location`, `where`, `interval`, `status`, `play`.
        """
        if name.isdecimal():
            options["status"] = int(name)
        elif name not in SPECIAL:
            raise ValueError(f"no such mode: {name}")
        if name == "reject":
            options.setdefault("status", 422)
        with self._changed:
            self._fault = _Fault(name=name, **options)
            self._generation += 1
            self._changed.notify_all()
            if name == "refuse":
                self._unlisten()
            else:
                self._listen()
        return self

    def wait_until(self, predicate: Callable[[], bool], timeout_s: float = 10.0) -> bool:
        """Wait until something is true, looked at after every request; return whether it is."""
        with self._changed:
            return self._changed.wait_for(predicate, timeout_s)

    def count(self, endpoint: str) -> int:
        """Count the requests to an endpoint that have come."""
        with self._changed:
            return sum(request.endpoint == endpoint for request in self.requests)

    def close(self) -> None:
        """Close every connection and the port."""
        with self._changed:
            self._closed = True
            self._generation += 1
            self._changed.notify_all()
            self._unlisten()
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    # --- connections ------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._listening or self._closed or self._socket is None:
            return
        self._socket.listen(512)
        self._listening = True
        threading.Thread(target=self._accept, args=(self._socket,), daemon=True).start()

    def _unlisten(self) -> None:
        """Refuse connections; the port stays ours: a socket that is bound and does not listen."""
        for connection in list(self._connections):
            _shut(connection)
        if not self._listening or self._socket is None:
            return
        self._listening = False
        _shut(self._socket)  # wakes accept()
        self._socket.close()
        self._socket = _bound(self._port)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:
                return
            with self._changed:
                if listener is not self._socket:
                    connection.close()
                    return
                self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection, address), daemon=True).start()

    def _serve(self, connection: socket.socket, address: Any) -> None:
        try:
            _Handler(connection, address, self)  # type: ignore[arg-type]  # it is handed on as `self.server`
        except OSError:
            pass  # the client has gone, or we have
        finally:
            with self._changed:
                self._connections.discard(connection)
            connection.close()

    # --- requests ---------------------------------------------------------------------------------

    def _take_fault(self, request: Request) -> tuple[_Fault, int]:
        with self._changed:
            self.requests.append(request)
            fault = self._fault
            wanted = (
                fault.name not in ("healthy", "refuse")
                and fault.endpoint in (None, request.endpoint)
                and fault.marker.encode() in request.body
                and fault.times != 0
            )
            if not wanted:
                return _Fault(), self._generation
            if fault.times is not None:
                fault.times -= 1
            self.fired[fault.name] += 1
            return fault, self._generation

    def _still(self, generation: int) -> bool:
        return generation == self._generation

    def _wait_for_change(self, generation: int, timeout: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._still(generation), timeout)

    def _process(self, request: Request) -> tuple[int, Any]:
        status, reply = self.answer(request)
        with self._changed:
            request.status = status
            self._changed.notify_all()
        return status, reply


class FaultyProxy(FaultyHTTP):
    """A server that, as long as it is healthy, hands requests on to another one.

    Args:
        upstream: base URL of the other server; `http` alone.
    """

    def __init__(self, upstream: str) -> None:
        super().__init__()
        self._upstream = urlsplit(upstream).netloc

    def answer(self, request: Request) -> tuple[int, Any]:
        """Ask the other server."""
        connection = http.client.HTTPConnection(self._upstream, timeout=_UPSTREAM_S)
        try:
            headers = request.headers | {"connection": "close"}
            connection.request(request.method, request.path, request.raw or None, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        pass

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        server: FaultyHTTP = self.server  # type: ignore[assignment]
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = int(headers.get("content-length", 0))
        body = self.rfile.read(length)
        if len(body) < length:  # cut off, by the client or by our own `refuse`: no request at all
            self.close_connection = True
            return
        raw = body
        if headers.get("content-encoding") == "gzip":
            try:
                body = gzip.decompress(body)
            except (OSError, EOFError, zlib.error):
                body = b""
        request = Request(self.command or "", _endpoint(self.path), self.path, headers, body, raw)
        fault, generation = server._take_fault(request)
        reply: tuple[int, Any] = (200, {})
        if fault.name == "healthy" or fault.name == "trickle" or fault.processed:
            reply = server._process(request)
        if fault.name == "healthy":
            self._send(*reply)
        elif fault.name == "hang":
            server._wait_for_change(generation)
            self.close_connection = True
        elif fault.name == "reset":
            self._reset(fault)
        elif fault.name == "trickle":
            self._trickle(server, fault, generation, reply)
        elif fault.name == "raw" and fault.play is not None:
            self.close_connection = True
            fault.play(self.connection, lambda: server._still(generation))
        elif fault.name == "redirect":
            self._send(307, {}, {"Location": fault.location})
        elif fault.name == "invalid_json":
            self._send(200, b"<html>Welcome to this hotel's network</html>")
        else:
            extra = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            self._send(fault.status, {"detail": "as you wish"}, extra)

    def _send(self, status: int, reply: Any, headers: dict[str, str] | None = None) -> None:
        self.wfile.write(self._response(status, reply, headers))

    def _response(self, status: int, reply: Any, headers: dict[str, str] | None = None) -> bytes:
        body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        head = {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in head.items()), "", ""]
        return "\r\n".join(lines).encode() + body

    def _reset(self, fault: _Fault) -> None:
        self.close_connection = True
        if fault.where == "body":
            self.wfile.write(b'HTTP/1.1 200 X\r\nContent-Length: 1000\r\n\r\n{"run_id"')
            time.sleep(0.05)  # or the RST may overtake what was sent
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _trickle(self, server: FaultyHTTP, fault: _Fault, generation: int, reply: tuple[int, Any]) -> None:
        response = self._response(*reply)
        head = 0 if fault.where == "headers" else response.index(b"\r\n\r\n") + 4
        self.wfile.write(response[:head])
        for index in range(head, len(response)):
            if server._wait_for_change(generation, fault.interval):
                self.close_connection = True
                return
            self.wfile.write(response[index : index + 1])


def _endpoint(path: str) -> str:
    """Name the endpoint: the last part of the address (`llm-calls`, `config`, …)."""
    return path.split("?")[0].rstrip("/").rpartition("/")[2]


def _bound(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # gone already
