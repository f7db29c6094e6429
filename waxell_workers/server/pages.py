"""The two pages: all runs, and one run. Rendered here, readable without JavaScript.

Everything that a client sent is data: Jinja escapes it, and addresses are built from quoted parts. A page
that changes marks the part that does (`#live`); a small script fetches the page again and swaps that part.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

from .api import AT_ONCE
from .model import RUNNING
from .queries import Extent
from .store import Store
from .tree import span_rows
from .views import FILTERS

PAGE_SIZE = 50
SHOWN = 500
"""How many calls, steps, spans and scores of one run a page shows; the JSON API has all of them."""

_EXTENT = Extent(SHOWN, 20_000)

_STATUSES = ("running", "success", "error", "retry", "killed", "interrupted")
"""The order in which statuses stand above the list; any other follows by name."""


class Pages:
    """The HTML side of the server."""

    def __init__(self, store: Store, *, api_key_needed: bool) -> None:
        self._store = store
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._templates.filters.update(FILTERS)
        self._templates.globals.update(api_key_needed=api_key_needed, shown=SHOWN)

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/", self.runs, methods=["GET"]),
            Route("/runs/{run_id}", self.run, methods=["GET"]),
        ]

    async def runs(self, request: Request) -> HTMLResponse:
        """Show the runs, newest first, a page at a time."""
        chosen = {name: request.query_params.get(name, "") for name in ("agent", "status", "before")}
        async with self._turns:
            return await run_in_threadpool(self._runs, _address(request), chosen)

    async def run(self, request: Request) -> HTMLResponse:
        """Show one run."""
        async with self._turns:
            return await run_in_threadpool(self._run, request.path_params["run_id"])

    def error(self, request: Request, status: int, detail: str) -> HTMLResponse:
        """Show what went wrong, and the way back."""
        return self._page("error.html", status, detail=detail, status=status)

    def _runs(self, address: str, chosen: dict[str, str]) -> HTMLResponse:
        try:
            runs = self._store.runs(PAGE_SIZE + 1, **chosen)
        except ValueError:  # the run that the page began after is gone
            runs = []
        stats = self._store.stats(chosen["agent"])
        counts = stats["runs"]
        known = [status for status in _STATUSES if status in counts or status == chosen["status"]]
        others = sorted(set(counts) - set(known))

        def link(**changes: str) -> str:
            query = {name: value for name, value in (chosen | changes).items() if value}
            return f"/?{urlencode(query)}" if query else "/"

        return self._page(
            "runs.html",
            runs=runs[:PAGE_SIZE],
            older=link(before=runs[PAGE_SIZE - 1]["run_id"]) if len(runs) > PAGE_SIZE else "",
            newest=link(before="") if chosen["before"] else "",
            stats=stats,
            total=sum(counts.values()),
            statuses=[(name, counts.get(name, 0), link(status=name, before="")) for name in known + others],
            any_status=link(status="", before=""),
            chosen=chosen,
            agents=self._store.agents(),
            address=address,
        )

    def _run(self, run_id: str) -> HTMLResponse:
        found = self._store.page(run_id, _EXTENT)
        if found is None:
            raise HTTPException(
                404, "There is no such run here. Beyond a number of runs, the oldest are removed."
            )
        run, totals = found
        attempts, children = self._store.related(run)
        parent = self._store.summary(run["parent_run_id"]) if run["parent_run_id"] else None
        return self._page(
            "run.html",
            run=run,
            live=run["status"] == RUNNING,
            totals=totals,
            span_rows=span_rows(run["spans"]),
            attempts=attempts if len(attempts) > 1 else [],
            children=children,
            parent=parent,
        )

    def _page(self, template: str, status_code: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self._templates.get_template(template).render(values), status_code)


def _address(request: Request) -> str:
    """Return the address that this request was sent to, as far as its Host header says one."""
    try:
        return str(request.base_url).rstrip("/")
    except ValueError:  # beyond loopback any Host comes through, half an IPv6 address too
        return "http://…"
