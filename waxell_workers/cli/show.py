"""Runs as tables for people. A terminal's width decides what is cut; `--json` cuts nothing.

Whatever a run tells is data here: never rich's markup, never a terminal's commands (`plain`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .plain import plain, plain_line

if TYPE_CHECKING:
    from ..server.model import Call, RunDetail, RunSummary

UNKNOWN = "-"
WIDTH = 160
COLOURS = {
    "success": "green",
    "ok": "green",
    "running": "cyan",
    "retry": "yellow",
    "error": "red",
    "killed": "bold red",
    "interrupted": "magenta",
}


def runs_table(runs: Sequence[RunSummary]) -> None:
    """Print a list of runs on stdout; an error stands below the task that raised it."""
    digits = unique_digits([run["run_id"] for run in runs])
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("started", no_wrap=True)
    table.add_column("task", overflow="fold", min_width=16)
    table.add_column("status", no_wrap=True)
    for name in ("time", "calls", "tokens", "cost"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            Text(plain_line(run["run_id"][:digits])),
            Text(plain_line(clock(run["started_at"]))),
            _task(run),
            coloured(run["status"]),
            milliseconds(run["duration_ms"]),
            str(run["calls"]),
            _both(run),
            least(dollars(run["cost_usd"]), run["cost_unknown"]),
        )
    console().print(table)


def _both(run: RunSummary) -> str:
    """Return all tokens of a run that are known, as far as they are."""
    known = [tokens for tokens in (run["tokens_in"], run["tokens_out"]) if tokens is not None]
    return least(number(sum(known) if known else None), run["tokens_in_unknown"] + run["tokens_out_unknown"])


def _task(run: RunSummary) -> Text:
    """Return the task's name; below it, its error or else why it ended, in lines that begin with a bar.

    None of them passes for a row.
    """
    lines = plain(run["error"] or run.get("reason", "")).splitlines()
    return Text("\n").join(
        [Text(plain_line(run["agent_name"])), *(Text(f"| {line}", "red") for line in lines)]
    )


def unique_digits(run_ids: Sequence[str]) -> int:
    """Return how many digits tell these ids apart, at least 8: `runs show` takes them."""
    longest = max(map(len, run_ids), default=8)
    return next(
        (n for n in range(8, longest) if len({run_id[:n] for run_id in run_ids}) == len(run_ids)), longest
    )


def run_panel(run: RunDetail) -> None:
    """Print one run with its calls on stdout."""
    out = console()
    name, run_id = plain_line(run["agent_name"]), plain_line(run["run_id"])
    out.print(Text.assemble((name, "bold"), "  ", coloured(run["status"]), f"  {run_id}"))
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("workflow", Text(plain_line(run["workflow_name"])))
    facts.add_row("started", Text(plain_line(run["started_at"])))
    facts.add_row("time", milliseconds(run["duration_ms"]))
    tokens_in = _whole(number(run["tokens_in"]), run["tokens_in_unknown"], run)
    tokens_out = _whole(number(run["tokens_out"]), run["tokens_out_unknown"], run)
    facts.add_row("tokens", f"in {tokens_in}, out {tokens_out}")
    facts.add_row("cost", _whole(dollars(run["cost_usd"]), run["cost_unknown"], run))
    for name, value in _whereabouts(run).items():
        facts.add_row(name, Text(plain_line(value)))
    for name, value in sorted(run["metadata"].items()):
        facts.add_row(Text(plain_line(name)), Text(plain_line(value)))
    if run.get("reason"):
        facts.add_row("reason", Text(plain(run["reason"])))
    if run["error"]:
        facts.add_row("error", Text(plain(run["error"])))
    out.print(facts)
    out.print(calls_table(run["calls"]) if run["calls"] else "no calls")
    if run["traceback"]:
        out.print(Text(plain(run["traceback"])), highlight=False)


def _whereabouts(run: RunDetail) -> dict[str, str]:
    """Return what a run is part of and whom it was for, as far as that is known."""
    tags = ", ".join(f"{name}={value}" for name, value in sorted(run["tags"].items()))
    told = {
        "trace": run["trace_id"],
        "parent": run["parent_run_id"],
        "session": run["session_id"],
        "user": run["user_id"],
        "tags": tags,
    }
    return {name: value for name, value in told.items() if value}


def _whole(written: str, unknown: int, run: RunDetail) -> str:
    """Return a sum, and of how many calls it is without."""
    return f"{least(written, unknown)} ({unknown} of {run['call_count']} unknown)" if unknown else written


def calls_table(calls: Sequence[Call]) -> Table:
    """Return the calls of a run as a table."""
    table = Table(
        title=f"{len(calls)} calls" if len(calls) != 1 else "1 call", title_justify="left", box=None
    )
    for name in ("model", "operation", "status"):
        table.add_column(name)
    for name in ("time", "in", "out", "cost"):
        table.add_column(name, justify="right")
    table.add_column("tools")
    table.add_column("error")
    for call in calls:
        table.add_row(
            Text(plain_line(call["model"])),
            Text(plain_line(call["operation"])),
            coloured(call["status"]),
            milliseconds(call["duration_ms"]),
            number(call["tokens_in"]),
            number(call["tokens_out"]),
            dollars(call["cost_usd"]),
            Text(plain_line(", ".join(_tool_names(call)))),
            Text(plain(call["error"])),
        )
    return table


def _tool_names(call: Call) -> list[str]:
    return [str(each.get("name")) if isinstance(each, dict) else str(each) for each in call["tool_calls"]]


def console() -> Console:
    """Return stdout: as wide as the terminal, and wide enough for every column where there is none."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else WIDTH)


def coloured(status: str) -> Text:
    """Return a status in its colour."""
    return Text(plain_line(status), COLOURS.get(status, ""))


def clock(started_at: str) -> str:
    """Return the time of day of an ISO 8601 time, in UTC; the date before it unless it is today's."""
    date, _, time = started_at[:19].partition("T")
    return time if date == datetime.now(timezone.utc).date().isoformat() else f"{date} {time}"


def milliseconds(duration_ms: float | None) -> str:
    """Write a duration as people read it."""
    if duration_ms is None:
        return UNKNOWN
    return f"{duration_ms:.0f} ms" if duration_ms < 1000 else f"{duration_ms / 1000:.1f} s"


def number(value: int | None) -> str:
    """Write a count; a dash if nobody knows it."""
    return UNKNOWN if value is None else f"{value:,}"


def least(written: str, unknown: int) -> str:
    """Write before a sum that some calls are not in that it is at least that."""
    return f"≥ {written}" if unknown and written != UNKNOWN else written


def dollars(cost_usd: float | None) -> str:
    """Write an amount of money; a dash if nobody knows it."""
    if cost_usd is None:
        return UNKNOWN
    return f"${cost_usd:.4f}" if cost_usd >= 0.01 else f"${cost_usd:.6f}"
