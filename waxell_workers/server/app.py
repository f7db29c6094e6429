"""The application: protocol, JSON API and pages over one store, behind the guard."""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from .api import Api
from .body import Bodies
from .governance import Governance
from .guard import Guard
from .pages import Pages
from .protocol import Protocol
from .store import Store

logger = logging.getLogger("waxell_workers.server")

HERE = Path(__file__).parent

_CLIENTS = "/api/v1/"
"""Where clients send to. They log a refusal, or nothing; whoever runs the server should see it too."""


_AGAIN_S = 60.0


class _Complaints:
    """What the database complains of, said once a minute: clients come again and again."""

    def __init__(self) -> None:
        self._last = ""
        self._said_at = 0.0

    def hear(self, complaint: str) -> None:
        """Log a complaint, unless it was the last one, and not long ago."""
        now = time.monotonic()
        if complaint != self._last or now - self._said_at > _AGAIN_S:
            self._last, self._said_at = complaint, now
            logger.error("the database refuses: %s", complaint)


def create_app(store: Store, *, api_key: str = "", ingest: bool = True, loopback: bool = True) -> Starlette:
    """Make the ASGI application.

    Args:
        store: where runs are kept; the caller closes it.
        api_key: the key that clients must send as `X-Wax-Key`; empty for none.
        ingest: offer the ingest endpoint; without it clients use the platform's REST protocol.
        loopback: answer only requests addressed to this machine's loopback (against DNS rebinding).
    """
    bodies = Bodies()
    complaints = _Complaints()
    pages = Pages(store, api_key_needed=bool(api_key))

    async def failed(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        detail = error.detail if isinstance(error, HTTPException) else "internal error"
        headers = error.headers if isinstance(error, HTTPException) else None
        if isinstance(error, sqlite3.Error):  # a full disk, a locked file: worth another try later
            complaints.hear(str(error))
            status, detail, headers = 503, f"the database refuses: {error}", {"retry-after": "2"}
        if request.url.path.startswith(_CLIENTS) and status < 500:
            logger.warning("refused %s %.200r: %d, %.200r", request.method, request.url.path, status, detail)
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": detail}, status, headers)
        return pages.error(request, status, detail)

    return Starlette(
        routes=[
            *Protocol(store, bodies, ingest=ingest).routes(),
            *Governance(store, bodies).routes(),
            *Api(store).routes(),
            *pages.routes(),
            Mount("/static", StaticFiles(directory=HERE / "static"), name="static"),
        ],
        middleware=[Middleware(Guard, api_key=api_key, loopback=loopback)],
        exception_handlers={HTTPException: failed, sqlite3.Error: failed, Exception: failed},
    )
