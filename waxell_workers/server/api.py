"""The JSON API that the command line reads: runs, trees, tasks, waits, money, as `Store` returns them."""

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
            Route("/api/runs/{run_id}/tree", self.tree, methods=["GET"]),
            Route("/api/traces/{trace_id}", self.trace, methods=["GET"]),
            Route("/api/tasks/{task_id:path}", self.task, methods=["GET"]),
            Route("/api/queues", self.queues, methods=["GET"]),
            Route("/api/spend", self.spend, methods=["GET"]),
            Route("/api/waste", self.waste, methods=["GET"]),
            Route("/api/stats", self.stats, methods=["GET"]),
        ]

    async def runs(self, request: Request) -> Response:
        """List runs, newest first."""
        limit = parse_limit(request.query_params.get("limit", ""), default=50)
        wanted = {name: request.query_params.get(name, "") for name in ("agent", "status", "before")}
        return await self._answer(lambda: {"runs": self._store.runs(limit, **wanted)})

    async def run(self, request: Request) -> Response:
        """Return one run with its calls, piece by piece: it may be larger than memory should be."""
        subtotal = _parse_choice("subtotal", request.query_params.get("subtotal", ""))
        pieces = self._store.stream(request.path_params["run_id"], subtotal=subtotal)
        first = await run_in_threadpool(next, pieces, None)
        if first is None:
            raise HTTPException(404, "no such run")
        return StreamingResponse(chain([first], pieces), media_type="application/json")

    async def tree(self, request: Request) -> Response:
        """Return the tree that a run is in."""
        return await self._found("run", lambda: self._store.tree(request.path_params["run_id"]))

    async def trace(self, request: Request) -> Response:
        """Return the tree of a trace."""
        return await self._found("trace", lambda: self._store.trace(request.path_params["trace_id"]))

    async def task(self, request: Request) -> Response:
        """Return the attempts of a task."""
        return await self._found("task", lambda: self._store.task(request.path_params["task_id"]))

    async def queues(self, request: Request) -> Response:
        """Return how long runs waited in each queue."""
        since, limit = _period(request)
        return await self._answer(lambda: self._store.queues(since, limit))

    async def spend(self, request: Request) -> Response:
        """Return what each task, model, … has cost."""
        by = request.query_params.get("by", "") or "task"
        since, limit = _period(request)
        return await self._answer(lambda: self._store.spend(by, since, limit))

    async def waste(self, request: Request) -> Response:
        """Return what failed attempts have cost."""
        since, limit = _period(request)
        return await self._answer(lambda: self._store.waste(since, limit))

    async def stats(self, request: Request) -> Response:
        """Count what is stored."""
        return await self._answer(lambda: self._store.stats(request.query_params.get("agent", "")))

    async def _answer(self, work: Callable[[], Any]) -> Response:
        try:
            async with self._turns:
                body = await run_in_threadpool(lambda: msgspec.json.encode(work()))
        except ValueError as error:  # a parameter that the store does not understand
            raise HTTPException(400, str(error)) from None
        return Response(body, media_type="application/json")

    async def _found(self, what: str, work: Callable[[], Any]) -> Response:
        def found() -> Any:
            answer = work()
            if answer is None:
                raise HTTPException(404, f"no such {what}")
            return answer

        return await self._answer(found)


def _period(request: Request) -> tuple[str, int]:
    """Read what all sums over many runs are asked for with."""
    since, limit = (request.query_params.get(name, "") for name in ("since", "limit"))
    return since, parse_limit(limit, default=50)


def _parse_choice(name: str, text: str) -> bool:
    if text not in ("", "true", "false"):
        raise HTTPException(400, f"{name}: expected true or false")
    return text == "true"


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
