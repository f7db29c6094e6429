"""The seam between the shipper and an exporter.

The shipper hands an exporter whole batches, grouped by run, and believes what the `Outcome` says: what is
acknowledged is forgotten, what is rejected goes to quarantine, everything else is tried again. An exporter
never raises for what a server or a network does, and never outlasts the deadline by more than a moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .records import Record, RunStarted

OUT_OF_TIME = "no time left"
"""The `Outcome.error` of a batch that was not sent whole: it says nothing of the server."""


@dataclass(slots=True)
class RunState:
    """What the shipper remembers about a run between batches; it survives the shipper."""

    started: RunStarted
    remote_id: str = ""
    """The server's id of the run, set by an exporter that needs one (REST)."""
    spans: int = 0
    """Span positions given out so far (REST)."""


@dataclass(frozen=True, slots=True)
class RunBatch:
    """Records of one run, in the order of the journal."""

    run: RunState
    records: Sequence[Record]


@dataclass(slots=True)
class Outcome:
    """What became of a batch: ids in neither set are tried again."""

    acknowledged: set[str] = field(default_factory=set)
    rejected: dict[str, str] = field(default_factory=dict)
    """Record id to reason: the server will never take these."""
    error: str = ""
    """Why something must be tried again; for the log, without keys or content."""
    retry_after_s: float | None = None
    """The server's `Retry-After`, in seconds."""
    paused: str = ""
    """Not empty: the destination as a whole refuses us (wrong key, wrong address); the reason."""


class Exporter(Protocol):
    """Delivers batches to one destination. Used by one thread at a time."""

    def export(self, batch: Sequence[RunBatch], deadline: float) -> Outcome:
        """Deliver what can be delivered until `deadline` (`time.monotonic()` seconds)."""
        ...

    def close(self) -> None:
        """Close connections."""
        ...
