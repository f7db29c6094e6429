"""The JSON API that the command line reads: runs, one run, counts, just as `Store` returns them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import chain
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from .store import Store

MAX_LIMIT = 1000
"""The largest `limit`."""

AT_ONCE = 4
"""How many lists or pages are made at a time: each may take much memory, and Python one thread."""


class Api:
    """The endpoints under `/api/`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._turns = asyncio.Semaphore(AT_ONCE)

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/api/runs", self.runs, methods=["GET"]),
            Route("/api/runs/{run_id}", self.run, methods=["GET"]),
            Route("/api/stats", self.stats, methods=["GET"]),
        ]

    async def runs(self, request: Request) -> Response:
        """List runs, newest first."""
        limit = parse_limit(request.query_params.get("limit", ""), default=50)
        wanted = {name: request.query_params.get(name, "") for name in ("agent", "status", "before")}

        try:
            return await self._answer(lambda: {"runs": self._store.runs(limit, **wanted)})
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    async def run(self, request: Request) -> Response:
        """Return one run with its calls, piece by piece: it may be larger than memory should be."""
        pieces = self._store.stream(request.path_params["run_id"])
        first = await run_in_threadpool(next, pieces, None)
        if first is None:
            raise HTTPException(404, "no such run")
        return StreamingResponse(chain([first], pieces), media_type="application/json")

    async def stats(self, request: Request) -> Response:
        """Count what is stored."""
        return await self._answer(lambda: self._store.stats(request.query_params.get("agent", "")))

    async def _answer(self, work: Callable[[], Any]) -> Response:
        async with self._turns:
            body = await run_in_threadpool(lambda: msgspec.json.encode(work()))
        return Response(body, media_type="application/json")


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
