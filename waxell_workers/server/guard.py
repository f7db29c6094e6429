"""Who may talk to this server, and what a browser may do with its answers. Pure ASGI, around everything else.

Bound to loopback, three kinds of web page must be kept out: one that resolves its own name to 127.0.0.1
(the Host header tells), one that posts here from elsewhere (the Origin header tells, or Sec-Fetch-Site; and
what a form can send is not taken at all), and one that frames us or brings a script into a page of ours (the
Content-Security-Policy says no). Beyond loopback, everything needs the key.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..core.config import is_loopback

KEY_HEADER = "x-wax-key"

_HOST = re.compile(r"[A-Za-z0-9.-]+(:\d{1,5})?|\[[0-9A-Fa-f:]+\](:\d{1,5})?")
_STATIC = "/static/"
_SAFE = ("GET", "HEAD")
_FORMS = frozenset({"application/x-www-form-urlencoded", "multipart/form-data", "text/plain"})
"""What a page of any site may send to us without asking first."""
_OURS = ("same-origin", "none")
"""Values of Sec-Fetch-Site that no other site's page can have."""
_SECURITY = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """Checks Host, Origin and key of every request, and puts the security headers on every answer.

    Args:
        app: what is guarded.
        api_key: the key that clients must send; empty for none.
        loopback: only requests to a name of this machine's loopback are answered.
    """

    def __init__(self, app: ASGIApp, *, api_key: str, loopback: bool) -> None:
        self._app = app
        self._key = api_key.encode()
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        static = scope["path"].startswith(_STATIC)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-cache" if static else "no-store")
            await send(message)

        refusal = self._refuse(scope)
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refuse(self, scope: Scope) -> Response | None:
        headers, path, method = Headers(scope=scope), scope["path"], scope["method"]
        host = headers.get("host", "")
        if self._loopback and not (_HOST.fullmatch(host) and is_loopback(f"http://{host}")):
            return JSONResponse({"error": "Host: expected localhost, 127.0.0.1 or [::1]"}, 421)
        if "transfer-encoding" in headers and "content-length" in headers:
            # a proxy before us may believe the other one, and take a body for the next request
            close = {"connection": "close"}
            return JSONResponse({"error": "Content-Length beside Transfer-Encoding"}, 400, close)
        if method not in _SAFE:
            if not all(_is_origin(origin, host) for origin in headers.getlist("origin")) or not all(
                site in _OURS for site in headers.getlist("sec-fetch-site")
            ):
                return JSONResponse({"error": "Origin: requests from other sites are not taken"}, 403)
            if any(_bare(kind) in _FORMS for kind in headers.getlist("content-type")):
                return JSONResponse({"error": "Content-Type: expected JSON, and no form's"}, 415)
        if not self._key or self._matches(headers.getlist(KEY_HEADER)):
            return None
        if method in _SAFE and self._matches([_password(headers.get("authorization", ""))]):
            return None
        if path.startswith("/api/"):
            return JSONResponse({"error": "X-Wax-Key: a key is needed, and this is not it"}, 401)
        # a browser asks for name and password; a key in an address would end up in histories
        challenge = {"www-authenticate": 'Basic realm="waxell-workers: any name, the API key as password"'}
        return PlainTextResponse("This page needs the API key, as the password.\n", 401, challenge)

    def _matches(self, given: list[str]) -> bool:
        """Tell whether this is the key, once, in a time that says nothing about it."""
        return len(given) == 1 and hmac.compare_digest(given[0].encode("utf-8", "replace"), self._key)


def _is_origin(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc == host
    except ValueError:  # half an IPv6 address
        return False


def _bare(content_type: str) -> str:
    return content_type.split(";", 1)[0].strip().lower()


def _password(authorization: str) -> str:
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        _, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return password
