"""FastAPI: the middleware of `waxell_workers.starlette`, by the name under which a FastAPI user looks for it.

app.add_middleware(waxell_workers.fastapi.WaxellMiddleware)
"""

from __future__ import annotations

from .starlette import WaxellMiddleware

__all__ = ["WaxellMiddleware"]
