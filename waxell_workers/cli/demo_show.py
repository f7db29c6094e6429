"""What the demo shows: bars on stderr while it runs, a table on stdout in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .show import dollars, least, number

if TYPE_CHECKING:
    from types import TracebackType

    from ..server.model import Stats

ROWS = {
    "tasks": "tasks",
    "attempts": "attempts that began",
    "runs": "runs at the server",
    "calls": "LLM calls at the server",
    "tokens": "tokens",
    "cost_usd": "cost (list price)",
    "killed": "killed in mid-task",
    "lost": "lost",
    "duplicated": "duplicated",
    "misattributed_calls": "calls in a wrong run",
}
"""A figure to what a person reads."""
BAD = ("lost", "duplicated", "misattributed_calls")


class Board:
    """Live bars: tasks that ended, and how much of what happened is at the server."""

    def __init__(self, tasks: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<15}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._tasks = self._progress.add_task("tasks ended", total=tasks, note="")
        self._runs = self._progress.add_task("runs delivered", total=tasks, note="")

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, *, ended: int, attempts: int, stats: Stats) -> None:
        """Show the figures of this moment."""
        self._progress.update(self._tasks, completed=ended, note=f"{attempts} attempts")
        runs = stats["runs"]
        killed = f"[red]{runs['killed']} killed[/]" if runs.get("killed") else ""
        note = f"{stats['calls']} calls  {killed}"
        self._progress.update(self._runs, completed=sum(runs.values()), total=attempts, note=note)


def table(figures: dict[str, dict[str, Any]]) -> None:
    """Print the result on stdout: a column for each framework, and one for all."""
    console = Console()
    console.print("What the server has, against what the tasks noted themselves:")
    result = Table()
    result.add_column()
    for framework in figures:
        result.add_column(framework, justify="right")
    for name, label in ROWS.items():
        cells = [_cell(name, column) for column in figures.values()]
        style = (
            ("red" if any(column[name] for column in figures.values()) else "green") if name in BAD else ""
        )
        result.add_row(label, *cells, style=style)
    console.print(result)


def _cell(name: str, figures: dict[str, Any]) -> str:
    if name == "tokens":
        return least(number(figures["tokens_in"] + figures["tokens_out"]), figures["tokens_unknown"])
    if name == "cost_usd":
        return least(dollars(figures["cost_usd"]), figures["cost_unknown"])
    return str(figures[name])
