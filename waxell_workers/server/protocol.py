"""The platform's HTTP protocol, as far as runs go, and our ingest beside it; the rest of it is `governance`.

Paths, fields and replies are those that the public client waxell-observe 0.1.10 sends and reads. It sends no
times and no ids: arrival counts. Our own client adds both, in `metadata.waxell`, `result.waxell` and
`waxell.*` attributes of spans, and is believed. Fields that are unknown are ignored.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from . import rest
from .body import Bodies, parse_object, unpack
from .daily import daily
from .ingest import ingest
from .store import Store

PREFIX = "/api/v1/observe"
INGEST_PATH = f"{PREFIX}/ingest/"

Reply = dict[str, Any]


class Protocol:
    """The endpoints that clients send to."""

    def __init__(self, store: Store, bodies: Bodies, *, ingest: bool) -> None:
        self._store = store
        self._bodies = bodies
        self._ingest = ingest

    def routes(self) -> list[Route]:
        """Return the routes; the one for ingest only if it is offered."""
        run = PREFIX + "/runs/{run_id}"
        routes = [
            Route(f"{PREFIX}/config/", self.config, methods=["GET"]),
            Route(f"{PREFIX}/runs/start/", self.start, methods=["POST"]),
            Route(f"{PREFIX}/runs/daily/", self.daily, methods=["POST"]),
            Route(f"{run}/llm-calls/", self._of_run(rest.add_calls), methods=["POST"]),
            Route(f"{run}/steps/", self._of_run(rest.add_steps), methods=["POST"]),
            Route(f"{run}/spans/", self._of_run(rest.add_spans), methods=["POST"]),
            Route(f"{run}/scores/", self._of_run(rest.add_scores), methods=["POST"]),
            Route(f"{run}/complete/", self._of_run(rest.complete), methods=["POST"]),
        ]
        if self._ingest:
            routes.append(Route(INGEST_PATH, self.ingest, methods=["POST"]))
        return routes

    async def config(self, _: Request) -> JSONResponse:
        """Answer what a client asks once: no OTLP here, and where ingest is, relative to the API's URL."""
        reply = {"otel_endpoint": "", "tenant_id": "local", "tenant_slug": "local"}
        return JSONResponse(reply | ({"ingest_endpoint": INGEST_PATH} if self._ingest else {}))

    async def start(self, request: Request) -> JSONResponse:
        """Start a run, and give it an id: the client's own, if it sent one."""

        def work(body: bytes) -> Reply:
            return rest.start(self._store, parse_object(body), time.time(), uuid.uuid4().hex)

        return JSONResponse(await self._bodies.process(request, work))

    async def daily(self, request: Request) -> JSONResponse:
        """Give the run of an agent's day."""

        def work(body: bytes) -> Reply:
            return daily(self._store, parse_object(body), time.time())

        return JSONResponse(await self._bodies.process(request, work))

    async def ingest(self, request: Request) -> JSONResponse:
        """Take a batch of journal records."""
        encoding = ",".join(request.headers.getlist("content-encoding"))

        def work(body: bytes) -> Reply:
            return ingest(self._store, unpack(body, encoding))

        return JSONResponse(await self._bodies.process(request, work))

    def _of_run(self, action: Callable[[rest.RunRequest], Reply]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> JSONResponse:
            run_id: str = request.path_params["run_id"]

            def work(body: bytes) -> Reply:
                sent = parse_object(body)
                with self._store.write() as writer:
                    if not writer.exists(run_id):
                        raise HTTPException(404, "no such run")
                    return action(rest.RunRequest(writer, run_id, sent, time.time()))

            return JSONResponse(await self._bodies.process(request, work))

        return endpoint
