"""`waxell-workers runs`: look at runs in a terminal, or hand them to `jq`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .sources import Source

DEFAULT_URL = "http://127.0.0.1:4319"
FIELDS = (
    "run_id",
    "agent_name",
    "workflow_name",
    "status",
    "started_at",
    "duration_ms",
    "calls",
    "tokens_in",
    "tokens_out",
    "cost_usd",
    "error",
    "metadata",
    "tokens_in_unknown",
    "tokens_out_unknown",
    "cost_unknown",
)
"""The fields of a run in `--json`: they stay."""
MORE_FIELDS = (
    "task_id",
    "trace_id",
    "root_run_id",
    "parent_run_id",
    "session_id",
    "user_id",
    "tags",
    "traceback",
)
"""The fields that `runs show --json` has besides."""
CALL_FIELDS = (
    "model",
    "provider",
    "operation",
    "status",
    "error",
    "started_at",
    "duration_ms",
    "ttft_ms",
    "tokens_in",
    "tokens_out",
    "tokens_cached",
    "tokens_cache_written",
    "tokens_reasoning",
    "cost_usd",
    "tool_calls",
    "metadata",
)

Command = TypeVar("Command", bound=Callable[..., Any])


def _source_options(command: Command) -> Command:
    """Add `--url` and `--db`: where a command reads."""
    from_url = click.option(
        "--url", metavar="URL", help=f"The server; WAXELL_API_URL, else {DEFAULT_URL}, unless given."
    )
    from_file = click.option(
        "--db",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A server's database file; no server is needed.",
    )
    as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
    return from_url(from_file(as_json(command)))


@click.group()
def runs() -> None:
    """Look at the runs that a local server has."""


@runs.command("ls")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1000), help="At most so many.")
@click.option("--agent", default="", help="Only runs of this agent or task.")
@click.option("--status", default="", help="Only runs with this status: success, error, killed, …")
@_source_options
def list_runs(limit: int, agent: str, status: str, url: str | None, db: Path | None, as_json: bool) -> None:
    """List runs, newest first."""
    with _source(url, db) as source:
        found = source.runs(limit=limit, agent=agent, status=status)
    if as_json:
        for run in found:
            click.echo(json.dumps(stable(run)))
        return
    from .show import runs_table

    runs_table(found)


@runs.command("show")
@click.argument("run_id")
@_source_options
def show_run(run_id: str, url: str | None, db: Path | None, as_json: bool) -> None:
    """Show one run with its calls. RUN_ID may be the beginning of an id, if only one run begins so.

    With --json, the calls are in `llm_calls`; where the run belongs is there, too.
    """
    from .sources import find

    with _source(url, db) as source:
        run = find(source, run_id)
    if as_json:
        calls = [{name: call[name] for name in CALL_FIELDS} for call in run["calls"]]  # type: ignore[literal-required]
        summary = stable({**run, "calls": run["call_count"]})
        more = {name: run[name] for name in MORE_FIELDS}  # type: ignore[literal-required]
        click.echo(json.dumps(summary | more | {"reason": run.get("reason", ""), "llm_calls": calls}))
        return
    from .show import run_panel

    run_panel(run)


def stable(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a run that `--json` promises."""
    return {name: run[name] for name in FIELDS}


def _source(url: str | None, db: Path | None) -> AbstractContextManager[Source]:
    from .sources import database, server

    if db is not None:
        if url is not None:
            raise click.UsageError("give --url or --db, not both")
        return database(db)
    address = (url or os.environ.get("WAXELL_API_URL") or DEFAULT_URL).rstrip("/")
    return server(address, os.environ.get("WAXELL_API_KEY", ""))
