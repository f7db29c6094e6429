"""What the journal machine is made of: its clock, the places where it kills a shipper, and what it knows.

The model knows what was written, what `append` said of it, and which files a rule deleted. It knows nothing
of cursors, seals or acknowledgements.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tests.property.modelserver import Crash
from tests.property.shipping import TEXT
from waxell_workers.core.records import Record

EPOCH = 1763000000.0
LOOK_S = 1.0
"""How long a writer may go on writing into a segment that was deleted: what the documentation promises."""


class Clock:
    """Time that passes when the machine says so, or when a shipper sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return EPOCH + self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    # what the shipper's event does
    def wait(self, seconds: float) -> None:
        self.now += max(seconds, 0.01)

    def set(self) -> None: ...

    def clear(self) -> None: ...


class Seams:
    """Kills the shipper before or after it does one thing, once."""

    def __init__(self) -> None:
        self.armed = ""
        self.skip = 0
        self.fired: dict[str, int] = {}

    def arm(self, seam: str, when: str, skip: int) -> None:
        self.armed, self.skip = f"{when} {seam}", skip

    def disarm(self) -> None:
        self.armed = ""

    def meet(self, what: str) -> None:
        if self.armed != what:
            return
        if self.skip:
            self.skip -= 1
            return
        self.disarm()
        self.fired[what] = self.fired.get(what, 0) + 1
        raise Crash(what)

    def around(self, seam: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.meet(f"before {seam}")
            result = function(*args, **kwargs)
            self.meet(f"after {seam}")
            return result

        return wrapped


@dataclass
class Run:
    """What the model knows of a run."""

    run_id: str
    task_id: str
    order: list[str] = field(default_factory=list)
    """Ids in the order in which they were written."""
    ended: bool = False
    dead: bool = False
    """Its process died with it open."""
    lost: bool = False
    """A supervisor said so, safely, when its start was safe."""
    token_gone: bool = False
    """The lock file in which its process had its token was deleted."""


@dataclass
class Model:
    """What was written, and what may be missing."""

    records: dict[str, Record] = field(default_factory=dict)
    promised: set[str] = field(default_factory=set)
    unpromised: set[str] = field(default_factory=set)
    """Written whole, or nearly, though `append` did not say so: may arrive."""
    twice: set[str] = field(default_factory=set)
    """Stands twice in the journal: the first met a seal."""
    deleted: set[str] = field(default_factory=set)
    """Was in a file, or may have been, that a rule deleted."""
    runs: dict[str, Run] = field(default_factory=dict)
    refused: int = 0
    torn: int = 0
    torn_deleted: bool = False
    wiped: bool = False
    """The directory, or a segment, was deleted: the ledger's word may be gone."""
    deleted_at: float = -LOOK_S
    kills: int = 0
    forks: int = 0
    deletions: int = 0


@dataclass(frozen=True)
class Text:
    """A text of so many times 16 characters, in more bytes than that."""

    length: int

    def __str__(self) -> str:
        return TEXT * self.length


def fake_os(**replaced: Any) -> SimpleNamespace:
    return SimpleNamespace(**({name: getattr(os, name) for name in dir(os)} | replaced))
