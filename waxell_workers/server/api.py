"""The JSON API that the command line reads: runs, one run, counts, just as `Store` returns them."""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from .store import Store

MAX_LIMIT = 1000
"""The largest `limit`."""


class Api:
    """The endpoints under `/api/`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/api/runs", self.runs, methods=["GET"]),
            Route("/api/runs/{run_id}", self.run, methods=["GET"]),
            Route("/api/stats", self.stats, methods=["GET"]),
        ]

    async def runs(self, request: Request) -> JSONResponse:
        """List runs, newest first."""
        limit = parse_limit(request.query_params.get("limit", ""), default=50)
        wanted = {name: request.query_params.get(name, "") for name in ("agent", "status", "before")}

        def work() -> list[Any]:
            return list(self._store.runs(limit, **wanted))

        try:
            return JSONResponse({"runs": await run_in_threadpool(work)})
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    async def run(self, request: Request) -> JSONResponse:
        """Return one run with its calls."""
        found = await run_in_threadpool(self._store.run, request.path_params["run_id"])
        if found is None:
            raise HTTPException(404, "no such run")
        return JSONResponse(found)

    async def stats(self, request: Request) -> JSONResponse:
        """Count what is stored."""
        return JSONResponse(await run_in_threadpool(self._store.stats, request.query_params.get("agent", "")))


def parse_limit(text: str, *, default: int) -> int:
    """Read a page size.

    Raises:
        HTTPException: 400, it is no number from 1 to `MAX_LIMIT`.
    """
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and 1 <= int(text) <= MAX_LIMIT):
        raise HTTPException(400, f"limit: expected a whole number from 1 to {MAX_LIMIT}")
    return int(text)
