"""One HTTP client: sends a request, reads a bounded reply, returns an `Answer`; never raises for a network.

httpx's timeouts hold for single reads, so a reply that trickles is limited here by a deadline for the whole
request. Headers that trickle, or a name server that hangs, cannot be interrupted from the thread that
waits for them: for those `abort()` is called from outside. Redirects are not followed, so the key goes
nowhere else. A reply is unpacked here and not by httpx, which would do it without a limit. Requests are
invisible to the user's OpenTelemetry and not logged by httpx's and httpcore's own loggers.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec

from .._version import __version__
from .answers import LATE, Answer, Verdict, is_overload, retry_after_s, verdict_of

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 10.0
REPLY_LIMIT = 1 << 20
"""Bytes of a reply that are read at most: everything that we need of one is far smaller."""
KEEPALIVE_S = 4.0
"""Idle connections are dropped before common servers drop them (uvicorn does after 5 s, which is also our
flush interval): a request into a connection that is just being closed has an unknown outcome."""

_LOGGERS = ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy", "httpcore.socks")
_WRAPPED = zlib.MAX_WBITS | 32
"""For zlib: gzip or deflate, whichever it is."""

_encoder = msgspec.json.Encoder(enc_hook=str)
_local = threading.local()


def encode(value: object) -> bytes:
    """Encode as JSON; leaves that JSON does not know become `str(x)`, as with the platform's own client.

    Raises:
        EncodingError: the value cannot be encoded.
    """
    try:
        return _encoder.encode(value)
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise EncodingError(type(error).__name__) from None


class EncodingError(Exception):
    """A record that no JSON can be made of; carries the class of the error, not the value."""


class Transport:
    """Requests to one server over one connection pool. Safe to use from several threads.

    Args:
        base_url: The configured `api_url`, without a trailing slash.
        api_key: Sent as `X-Wax-Key`; no such header if empty.
        connections: How many connections may be open at the same time.

    Raises:
        OSError, ValueError, ImportError, httpx.InvalidURL: the environment's proxies are unusable.
    """

    def __init__(self, base_url: str, api_key: str, connections: int) -> None:
        headers = {"User-Agent": f"waxell-workers/{__version__}", "Accept": "application/json"}
        headers["Accept-Encoding"] = "identity"  # replies are short, and a short body may be a bomb
        if api_key:
            headers["X-Wax-Key"] = api_key
        self._base_url = base_url
        self._api_key = api_key
        self.aborted = False
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._client = httpx.Client(
            headers=headers,
            follow_redirects=False,
            trust_env=True,
            limits=httpx.Limits(
                max_connections=connections,
                max_keepalive_connections=connections,
                keepalive_expiry=KEEPALIVE_S,
            ),
        )
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_not_ours)

    def get(self, name: str, path: str, deadline: float) -> Answer:
        """GET `path` (below the base URL, or an absolute URL); `name` stands for the endpoint in reasons."""
        return self._send(name, "GET", path, None, {}, deadline)

    def post(self, name: str, path: str, payload: object, deadline: float) -> Answer:
        """POST `payload` as JSON."""
        try:
            content = encode(payload)
        except EncodingError as error:
            return Answer(Verdict.REFUSED, f"{name}: cannot be encoded ({error})")
        return self._send(name, "POST", path, content, {"Content-Type": "application/json"}, deadline)

    def post_bytes(
        self, name: str, path: str, content: bytes, headers: Mapping[str, str], deadline: float
    ) -> Answer:
        """POST bytes with their own content headers."""
        return self._send(name, "POST", path, content, headers, deadline)

    def abort(self) -> None:
        """End what other threads are waiting for by shutting their sockets; only `close()` is left then."""
        self.aborted = True
        for sock in list(self._sockets):
            try:
                # Not SSLSocket's own shutdown: it would take the TLS object away from the thread that reads.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                pass  # closed meanwhile, or wrapped by TLS: then the wrapper is in the set too

    def without_key(self, text: str) -> str:
        """Return a server's text without the key, should it echo that."""
        return text.replace(self._api_key, "…") if self._api_key else text

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _send(
        self,
        name: str,
        method: str,
        path: str,
        content: bytes | None,
        headers: Mapping[str, str],
        deadline: float,
    ) -> Answer:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return LATE
        timeout = httpx.Timeout(
            connect=min(CONNECT_TIMEOUT_S, remaining),
            read=min(READ_TIMEOUT_S, remaining),
            write=min(READ_TIMEOUT_S, remaining),
            pool=min(CONNECT_TIMEOUT_S, remaining),
        )
        total = min(deadline, time.monotonic() + CONNECT_TIMEOUT_S + READ_TIMEOUT_S)
        try:
            with (
                _invisible(),
                self._client.stream(
                    method,
                    self._base_url + path if path.startswith("/") else path,
                    content=content,
                    headers=dict(headers),
                    timeout=timeout,
                    extensions={"trace": self._trace},
                ) as response,
            ):
                return _read(name, response, total)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            return Answer(Verdict.PAUSE, f"{name}: {type(error).__name__}")
        except (httpx.HTTPError, httpx.StreamError) as error:
            if isinstance(error, httpx.ProxyError) and str(error).startswith("407"):
                return Answer(Verdict.PAUSE, f"{name}: 407 of the proxy", 407)
            return Answer(Verdict.RETRY, f"{name}: {_cause(error)}", down=True)
        except (OSError, ValueError) as error:
            # What httpx lets through: a host name that cannot be encoded, a socket shut by `abort()`.
            return Answer(Verdict.RETRY, f"{name}: {type(error).__name__}", down=True)

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            sock = info["return_value"].get_extra_info("socket")
            if isinstance(sock, socket.socket):
                self._sockets.add(sock)


def _read(name: str, response: httpx.Response, total: float) -> Answer:
    status = response.status_code
    verdict = verdict_of(status)
    if verdict is not Verdict.OK:
        return Answer(
            verdict,
            f"{name}: {status}",
            status,
            retry_after_s=retry_after_s(response.headers.get("retry-after")),
            down=is_overload(status),
        )
    content = bytearray()
    trouble = _read_content(response, content, total)
    if _is_page(response, content):
        return Answer(Verdict.RETRY, f"{name}: {status} with a web page", status, down=True)
    if trouble:
        # The status line has said that the server took it; whether the text is missed is the caller's matter.
        return Answer(verdict, f"{name}: {status}, {trouble}", status)
    return Answer(verdict, f"{name}: {status}", status, _object(bytes(content)))


def _read_content(response: httpx.Response, content: bytearray, total: float) -> str:
    """Append what a reply says, as far as it is wanted; return why it is not whole, or an empty string."""
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    unpack = zlib.decompressobj(_WRAPPED) if coding in ("gzip", "x-gzip", "deflate") else None
    if unpack is None and coding != "identity":
        return "in a coding that was not asked for"
    try:
        for chunk in response.iter_raw():
            content += unpack.decompress(chunk, REPLY_LIMIT + 1) if unpack else chunk
            if len(content) > REPLY_LIMIT or time.monotonic() > total:
                return "reply cut"
    except (httpx.HTTPError, httpx.StreamError) as error:
        return _cause(error)
    except zlib.error:
        return "damaged"
    return ""


def _is_page(response: httpx.Response, content: bytearray) -> bool:
    """True for HTML: then no API has answered, but a login page or a proxy, and nobody took anything."""
    return "html" in response.headers.get("content-type", "").lower() or content.lstrip()[:1] == b"<"


def _object(content: bytes) -> dict[str, Any] | None:
    if not content.strip():
        return {}
    try:
        value = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _cause(error: BaseException) -> str:
    """Name the class of an error, and of the operating system's or TLS's error behind it."""
    inner: BaseException | None = error
    for _ in range(8):
        inner = inner.__cause__ or inner.__context__ if inner is not None else None
        if isinstance(inner, OSError):
            return f"{type(error).__name__} ({type(inner).__name__})"
    return type(error).__name__


def _not_ours(record: logging.LogRecord) -> bool:
    """Filter of httpx's loggers: the user's requests are logged as ever, ours are nobody's business."""
    return not getattr(_local, "sending", False)


@contextmanager
def _invisible() -> Iterator[None]:
    """Hide a request from the user's OpenTelemetry instrumentation and from httpx's loggers."""
    _local.sending = True
    otel = sys.modules.get("opentelemetry.context")
    token: Any = None
    if otel is not None:
        context = otel.get_current()
        for name in ("_SUPPRESS_INSTRUMENTATION_KEY", "_SUPPRESS_HTTP_INSTRUMENTATION_KEY"):
            if key := getattr(otel, name, None):
                context = otel.set_value(key, True, context)
        # The plain name is what older instrumentations look for.
        token = otel.attach(otel.set_value("suppress_instrumentation", True, context))
    try:
        yield
    finally:
        _local.sending = False
        if otel is not None:
            otel.detach(token)
