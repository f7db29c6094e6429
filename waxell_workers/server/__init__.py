"""The local server: takes the platform's HTTP protocol and our ingest, keeps runs in SQLite, shows them.

A developer's tool on 127.0.0.1, offline, with nothing to build. `serve` runs it, `create_app` is the ASGI
application, `Store` reads and writes its database file with or without a server. Needs the extra `server`;
`Store` alone does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .store import Store

if TYPE_CHECKING:
    from .app import create_app
    from .run import serve

__all__ = ["Store", "create_app", "serve"]


def __getattr__(name: str) -> Any:
    # `runs ls --db FILE` needs the store only; Starlette and uvicorn are imported when asked for.
    if name == "create_app":
        from .app import create_app

        return create_app
    if name == "serve":
        from .run import serve

        return serve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
