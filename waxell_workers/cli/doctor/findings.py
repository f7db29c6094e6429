"""What a check has to say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "info", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report."""

    area: str
    """What it is about: `settings`, `spool`, `server`, …"""
    status: Status
    """`fail`: records do not arrive. `warn`: not all of them may, or not all that you expect."""
    text: str
    advice: str = ""
    """What to do; never empty for `warn` and `fail`."""


Findings = Iterator[Finding]
