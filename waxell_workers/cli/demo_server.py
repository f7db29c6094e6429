"""What the demo asks the local server in the end: every run, with its calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .demo_tally import Attempt, Call
from .demo_verdict import SeenRun
from .sources import Source

if TYPE_CHECKING:
    from ..server.model import RunDetail

PAGE = 500


def seen_runs(source: Source) -> list[SeenRun]:
    """Return every run that the server has, with its calls."""
    found = [source.run(run_id) for run_id in _run_ids(source)]
    return [_seen(run) for run in found if run is not None]


def _run_ids(source: Source) -> Iterator[str]:
    before = ""
    while True:
        page = source.runs(PAGE, before=before)
        yield from (run["run_id"] for run in page)
        if len(page) < PAGE:
            return
        before = page[-1]["run_id"]


def _seen(run: RunDetail) -> SeenRun:
    attempt = Attempt(run["task_id"], run["metadata"].get("attempt", 0), run["workflow_name"])
    answered = [call for call in run["calls"] if call["status"] == "ok"]
    return SeenRun(
        run_id=run["run_id"],
        attempt=attempt,
        status=run["status"],
        calls=[Call(attempt, call["model"], call["metadata"].get("response_id", "")) for call in answered],
        tokens_in=run["tokens_in"] or 0,
        tokens_out=run["tokens_out"] or 0,
        tokens_unknown=sum(None in (call["tokens_in"], call["tokens_out"]) for call in run["calls"]),
        cost_usd=run["cost_usd"],
        cost_unknown=run["cost_unknown"],
    )
