"""The doctor's report as people read it: area by area, as the checks go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import show as tables
from ..plain import plain
from .findings import Finding

_MARKS = {"ok": "✓", "info": "·", "warn": "!", "fail": "✗"}
_PLAIN_MARKS = {"ok": "+", "info": "-", "warn": "!", "fail": "x"}
_COLOURS = {"ok": "green", "info": "dim", "warn": "yellow", "fail": "bold red"}


def show(findings: Iterable[Finding]) -> None:
    """Print findings as they come, and a line that sums them up."""
    out = tables.console()
    count: Counter[str] = Counter()
    area = ""
    for finding in findings:
        if finding.area != area:
            area = finding.area
            out.print(Text(area, style="bold"))
        out.print(_row(out, finding))
        count[finding.status] += 1
    out.print()
    out.print(_sum(count))


def _row(out: Console, finding: Finding) -> Table:
    marks = _PLAIN_MARKS if out.options.ascii_only else _MARKS
    row = Table.grid(padding=(0, 1))
    row.add_column(width=3, justify="right")
    row.add_column(overflow="fold")
    colour = _COLOURS[finding.status]
    row.add_row(Text(marks[finding.status], style=colour), Text(_encodable(out, finding.text)))
    if finding.advice:
        arrow = "->" if out.options.ascii_only else "→"
        row.add_row("", Text(f"{arrow} {_encodable(out, finding.advice)}", style="cyan"))
    return row


def _encodable(out: Console, text: str) -> str:
    return plain(text).encode(out.encoding, "replace").decode(out.encoding)


def _sum(count: Counter[str]) -> Text:
    if not count["fail"] and not count["warn"]:
        return Text("everything is as it should be", style="green")
    warnings = f"{count['warn']} warning" + ("s" if count["warn"] != 1 else "")
    return Text(f"{count['fail']} failed, {warnings}", style="red" if count["fail"] else "yellow")
