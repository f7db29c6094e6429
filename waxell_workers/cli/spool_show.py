"""The spool as tables for people."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from ..core.abandoned import last_use
from .show import UNKNOWN, console, unique_digits
from .spool import is_current, is_unused
from .spool_places import limit, used

if TYPE_CHECKING:
    from ..core.config import Settings
    from ..core.inspection import Survey
    from .spool_check import Checked

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_AGES = ((86_400, "d"), (3600, "h"), (60, "m"))


def status_table(settings: Settings, root: str, surveys: Sequence[Survey]) -> None:
    """Print how much waits in a spool."""
    out = console()
    most, filled = limit(settings, root), used(root)
    colour = "red" if filled >= most else "yellow" if filled > 0.9 * most else "default"
    out.print(f"{escape(root)}: [{colour}]{size(filled)} of {size(most)}[/]", highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("destination", no_wrap=True)
    for name in ("segments", "size", "pending", "torn", "oldest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("shipper", no_wrap=True)
    for name in ("writers", "refused"):
        table.add_column(name, justify="right", no_wrap=True)
    digits = unique_digits([survey.destination for survey in surveys])
    for survey in surveys:
        table.add_row(
            survey.destination[:digits] + (" *" if is_current(settings, survey) else ""),
            str(len(survey.segments)),
            size(survey.size),
            f"{survey.pending:,}",
            _red(survey.torn),
            age(survey.oldest_at),
            "[green]alive[/]" if survey.shipper else "[yellow]none[/]" if survey.pending else UNKNOWN,
            str(len(survey.writers)),
            _red(survey.quarantined),
        )
    out.print(table)
    for survey in surveys:
        if survey.ledger.problem:
            out.print(
                f"[red]{survey.destination[:digits]}: shipper.db cannot be read[/] "
                f"({escape(survey.ledger.problem)}): all of it counts as pending"
            )
    for survey in surveys:
        if is_unused(settings, survey):
            out.print(_unused(settings, survey, survey.destination[:digits]), highlight=False)
    if any(is_current(settings, survey) for survey in surveys):
        out.print("* the destination of these settings", style="dim")
    else:
        out.print("none of them is the destination of these settings", style="dim")


def _unused(settings: Settings, survey: Survey, name: str) -> str:
    most = settings.spool_max_age
    kept = f" (spool_max_age: removed after {age(time.time() - most)})" if most else ""
    return (
        f"[yellow]{name}: unused for {age(last_use(survey.directory))}[/]{kept}. Where these settings have "
        f"taken its place: waxell-workers ship --adopt {name}"
    )


def verify_tables(checked: Sequence[Checked]) -> None:
    """Print what is in each segment, and everything that is wrong."""
    out = console()
    for destination in checked:
        out.print(f"[bold]{escape(destination.directory)}[/]", highlight=False, soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        table.add_column("segment", no_wrap=True)
        for name in ("records", "size", "version", "torn"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("sealed", no_wrap=True)
        for segment in destination.segments:
            table.add_row(
                f"{segment.number:06d}",
                f"{segment.records:,}",
                size(segment.size),
                str(segment.version) if segment.version else "[red]?[/]",
                _red(segment.torn),
                "yes" if segment.sealed else "no",
            )
        out.print(table)
        out.print(_ledger_line(destination))
        for problem in destination.problems:
            where = problem.where if problem.offset is None else f"{problem.where}, byte {problem.offset}"
            colour = "red" if problem.damage else "yellow"
            out.print(f"[{colour}]{escape(where)}[/]: {escape(problem.text)}", highlight=False)
        out.print()
    damaged = sum(problem.damage for destination in checked for problem in destination.problems)
    out.print(f"[red]{damaged} damaged[/]" if damaged else "[green]nothing is damaged[/]")


def _ledger_line(checked: Checked) -> str:
    ledger = checked.ledger
    if ledger.problem:
        return "ledger: [red]damaged[/]"
    if not ledger.exists:
        return "ledger: none, nothing was delivered yet"
    if ledger.cursor is None:
        return "ledger: whole, nothing was delivered yet"
    number, offset = ledger.cursor
    above = len(ledger.acknowledged)
    return f"ledger: whole, delivered up to {number:06d}, byte {offset}" + (
        f", and {above:,} records beyond" if above else ""
    )


def _red(count: int) -> str:
    return f"[red]{count:,}[/]" if count else "0"


def size(count: float) -> str:
    """Write a number of bytes as people read it."""
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def age(at: float | None) -> str:
    """Write how long ago a moment was, as people read it."""
    if at is None:
        return UNKNOWN
    passed = max(0.0, time.time() - at)
    for seconds, unit in _AGES:
        if passed >= seconds:
            count = passed / seconds
            return f"{count:.0f}{unit}" if count >= 10 else f"{count:.1f}{unit}"
    return f"{passed:.0f}s"
