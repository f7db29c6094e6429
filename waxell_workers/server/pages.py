"""The three pages: all runs, one run, and what they cost. Rendered here, readable without JavaScript.

Everything that a client sent is data: Jinja escapes it, and addresses are built from quoted parts. A page
that changes marks the part that does (`#live`); a small script fetches the page again and swaps that part.
"""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
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
from .model import RUNNING, Group, RunDetail, RunSummary, Tree
from .queries import RELATED, Extent
from .store import Store
from .tree import run_rows, span_rows
from .views import FILTERS, is_texts

PAGE_SIZE = 50
SHOWN = 500
"""How many calls, steps, spans and scores of one run a page shows; the JSON API has all of them."""

_EXTENT = Extent(SHOWN, 20_000)

_STATUSES = (
    "running",
    "success",
    "error",
    "retry",
    "killed",
    "interrupted",
    "revoked",
    "rejected",
    "ignored",
)
"""The order in which statuses stand above the list; any other follows by name."""

_FOLDED = 40
"""A trace with more runs than that is folded on the page of one of them, and refreshed less often."""

_NAMED = 20
"""Of so many tasks that a job depends on is looked up whether they are stored."""

_BY = ("task", "model", "queue", "framework", "agent", "session", "user", "attempt", "run")
_SINCE = (("1h", "last hour"), ("24h", "last 24 hours"), ("7d", "last 7 days"), ("", "all"))


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
            Route("/spend", self.spend, methods=["GET"]),
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

    async def spend(self, request: Request) -> HTMLResponse:
        """Show what costs, what failed for nothing, and where runs wait."""
        by = request.query_params.get("by", "") or _BY[0]
        since = request.query_params.get("since", "")
        async with self._turns:
            return await run_in_threadpool(self._spend, by, "" if since == "all" else since)

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
        tree = self._store.tree(run_id)
        rows = [] if tree is None else run_rows(tree, run_id, SHOWN, _since_ms(tree["started_at"]))
        group = self._store.task(run["task_id"]) if run["task_id"] else None
        linked = self._store.linked(run_id, RELATED + 1)
        here = any(row.run["run_id"] == run_id for row in rows)
        return self._page(
            "run.html",
            run=run,
            live=_goes_on(run, group, tree),
            every_s="" if len(rows) <= _FOLDED else 10,
            totals=totals,
            span_rows=span_rows(run["spans"]),
            wait=self._store.wait_of(run_id),
            group=group if group is not None and len(group["runs"]) > 1 else None,
            tree=tree if len(rows) > 1 else None,
            tree_rows=rows,
            folded=len(rows) > _FOLDED,
            subtotal=self._store.subtotal(run_id),
            children=[] if here else self._store.related(run)[1],
            parent=self._known(run["parent_run_id"]),
            previous=self._known(run["previous_run_id"]),
            linked_from=self._known(run["linked_run_id"]),
            linked=linked[:RELATED],
            more_linked=len(linked) > RELATED,
            parent_task=self._tasks([run["parent_task_id"]]),
            depends_on=self._tasks(run["metadata"].get("depends_on")),
        )

    def _known(self, run_id: str) -> RunSummary | None:
        return self._store.summary(run_id) if run_id else None

    def _tasks(self, named: object) -> list[tuple[str, RunSummary | None]]:
        """Return for each task id its last run, if it is stored."""
        if not is_texts(named):
            return []
        assert isinstance(named, list)
        found: list[tuple[str, RunSummary | None]] = []
        for task_id in dict.fromkeys(filter(None, named)):  # once each: so are the ids on the page
            group = self._store.task(task_id) if len(found) < _NAMED else None
            found.append((task_id, group["runs"][-1] if group and group["runs"] else None))
        return found

    def _spend(self, by: str, since: str) -> HTMLResponse:
        try:
            rows = self._store.spend(by, since, PAGE_SIZE + 1)
            total = self._store.spent(since)
            queues = self._store.queues(since, PAGE_SIZE + 1)
            waste = self._store.waste(since, PAGE_SIZE + 1)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

        def link(**changes: str) -> str:
            chosen = {"by": "" if by == _BY[0] else by, "since": since} | changes
            query = {name: value for name, value in chosen.items() if value}
            return f"/spend?{urlencode(query)}" if query else "/spend"

        known = [value for value, _ in _SINCE]
        return self._page(
            "spend.html",
            by=by,
            since=since,
            dimensions=[(name, link(by="" if name == _BY[0] else name)) for name in _BY],
            spans=[(value or "all", words, link(since=value)) for value, words in _SINCE],
            other_since="" if since in known else since,
            total=total,
            rows=rows[:PAGE_SIZE],
            more=len(rows) > PAGE_SIZE,
            most_usd=max((row["cost_usd"] or 0.0 for row in rows), default=0.0),
            queues=queues[:PAGE_SIZE],
            more_queues=len(queues) > PAGE_SIZE,
            longest_s=max((queue["wait_s"]["p95"] or 0.0 for queue in queues), default=0.0),
            waste=waste["total"],
            wasted=waste["by_error"][:PAGE_SIZE],
            more_wasted=len(waste["by_error"]) > PAGE_SIZE,
            most_wasted_usd=max((row["cost_usd"] or 0.0 for row in waste["by_error"]), default=0.0),
        )

    def _page(self, template: str, status_code: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self._templates.get_template(template).render(values), status_code)


def _address(request: Request) -> str:
    """Return the address that this request was sent to, as far as its Host header says one."""
    try:
        return str(request.base_url).rstrip("/")
    except ValueError:  # beyond loopback any Host comes through, half an IPv6 address too
        return "http://…"


def _since_ms(moment: str) -> float:
    return (time.time() - datetime.fromisoformat(moment).timestamp()) * 1000


def _goes_on(run: RunDetail, group: Group | None, tree: Tree | None) -> bool:
    """Tell whether anything that the page of a run shows may change."""
    final = group["final_state"] if group else ""
    return RUNNING in (run["status"], final) or (tree is not None and tree["duration_ms"] is None)
