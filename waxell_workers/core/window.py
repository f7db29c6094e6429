"""The records between the journal and the server: read, not yet all acknowledged.

A queue per run, so that a run that fails holds up no other; and the order of the journal, so that the cursor
moves over what has arrived and stops at what has not. Bounded by `MOST_ENTRIES` and `_MOST_BYTES`, not by
the backlog.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from .reader import Entry
from .records import Record
from .segments import Position

MOST_ENTRIES = 4_096
_MOST_BYTES = 16 << 20
_MOST_TAKEN_BYTES = 4 << 20
_MOST_PASSED = 100_000
_BACKOFF_FIRST_S = 0.5
_FAILING = 2
"""After so many attempts that came to nothing, a run may be moved aside."""
_BACKOFF_MOST_S = 15.0


@dataclass(slots=True)
class Backoff:
    """How long to leave something alone that has failed: exponential, with full jitter."""

    failures: int = 0
    until: float = 0.0
    most_s: float = 0.0
    """The longest wait, if it is not the usual one."""

    def fail(self, retry_after_s: float | None = None) -> None:
        """Count a failure and choose the next attempt's time."""
        self.failures += 1
        longest = min(self.most_s or _BACKOFF_MOST_S, _BACKOFF_FIRST_S * 2 ** min(self.failures - 1, 10))
        wait = max(random.uniform(0, longest), retry_after_s or 0.0)
        self.until = time.monotonic() + wait

    def is_over(self) -> bool:
        """True if it may be tried again."""
        return self.until <= time.monotonic()

    def clear(self) -> None:
        """Forget the failures."""
        self.failures = 0
        self.until = 0.0


@dataclass(slots=True)
class _Queue:
    entries: deque[Entry] = field(default_factory=deque)
    backoff: Backoff = field(default_factory=Backoff)


class Window:
    """What is read and on its way."""

    def __init__(self, failing: Iterable[str] = ()) -> None:
        """Begin with nothing.

        Args:
            failing: runs that have failed before, while the server took others.
        """
        self._queues: dict[str, _Queue] = {}
        self._failing = set(failing)
        self.newly: dict[str, bool] = {}
        """Runs that have begun to fail since this was emptied, or (False) no longer do."""
        self._order: deque[Entry] = deque()
        self.pending = 0
        """Records that have not arrived."""
        self.pending_bytes = 0

    def is_full(self, waiting: int, waiting_bytes: int) -> bool:
        """True if nothing more should be read for now.

        Args:
            waiting: records that are read, and stand in no run's queue yet.
            waiting_bytes: the length of their lines.
        """
        return (
            self.pending + waiting >= MOST_ENTRIES
            or self.pending_bytes + waiting_bytes >= _MOST_BYTES
            or len(self._order) >= _MOST_PASSED
        )

    def add(self, run_id: str, entry: Entry, record: Record, *, first: bool = False) -> None:
        """Put a record into its run's queue.

        Args:
            run_id: the run's id.
            entry: the record's entry; in the journal's order if it has a place there.
            record: what is to be sent, which may differ from what was read.
            first: put it before what is already there.
        """
        entry.record = record
        queue = self._queues.get(run_id)
        if queue is None:
            queue = self._queues[run_id] = _Queue(backoff=Backoff(failures=int(run_id in self._failing)))
        if first:
            queue.entries.appendleft(entry)
        else:
            queue.entries.append(entry)
        self.pending += 1
        self.pending_bytes += entry.size

    def follow(self, entry: Entry) -> None:
        """Keep an entry's place in the journal's order, whatever becomes of it."""
        self._order.append(entry)

    @property
    def nothing_followed(self) -> bool:
        """True if the cursor has passed everything that was read."""
        return not self._order

    def take(self, most: int, held: Container[object] = ()) -> dict[str, list[Entry]]:
        """Return up to `most` records that may be sent now, by run and in order; fewer if they are large.

        Args:
            most: how many.
            held: runs of which older records wait elsewhere.
        """
        taken: dict[str, list[Entry]] = {}
        room = _MOST_TAKEN_BYTES
        for run_id, queue in self._queues.items():
            if not queue.backoff.is_over() or run_id in held:
                continue
            for entry in queue.entries:
                if most <= 0 or room <= 0:
                    return taken
                taken.setdefault(run_id, []).append(entry)
                most -= 1
                room -= entry.size
        return taken

    def arrived(self, run_id: str, ids: set[str]) -> list[Entry]:
        """Take records out of a run's queue; return their entries."""
        queue = self._queues[run_id]
        gone = [entry for entry in queue.entries if entry.id in ids]
        if not gone:
            return []
        queue.entries = deque(entry for entry in queue.entries if entry.id not in ids)
        queue.backoff.clear()
        if run_id in self._failing:
            self._failing.discard(run_id)
            self.newly[run_id] = False
        if not queue.entries:
            del self._queues[run_id]
        self._forget(gone)
        return gone

    def _forget(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            entry.record = None
            self.pending -= 1
            self.pending_bytes -= entry.size

    def failing(self, held: Container[object]) -> list[str]:
        """Return the runs that have failed again and again, and those whose older records wait elsewhere."""
        return [
            run_id
            for run_id, queue in self._queues.items()
            if queue.backoff.failures >= _FAILING or run_id in held
        ]

    def entries(self, run_id: str) -> list[Entry]:
        """Return what is pending of a run."""
        return list(self._queues[run_id].entries)

    def withdraw(self, run_id: str) -> None:
        """Let go of a run that is kept elsewhere: the cursor may pass it."""
        self._forget(self._queues.pop(run_id).entries)

    def has_failed(self, run_id: str) -> bool:
        """True if this run's last attempt came to nothing."""
        return run_id in self._queues and self._queues[run_id].backoff.failures > 0

    def failed(self, run_id: str, retry_after_s: float | None) -> None:
        """Leave a run alone for a while."""
        if run_id in self._queues:
            self._queues[run_id].backoff.fail(retry_after_s)
            if run_id not in self._failing:
                self._failing.add(run_id)
                self.newly[run_id] = True

    def ignore_backoff(self) -> None:
        """Let every run be tried again at once: somebody waits for it."""
        for queue in self._queues.values():
            queue.backoff.until = 0.0

    def pass_arrived(self) -> list[Entry]:
        """Return the entries that the cursor may pass, in order, and forget them."""
        passed = []
        while self._order and self._order[0].record is None:
            passed.append(self._order.popleft())
        return passed

    def count(self, token: int, upto: Position) -> int:
        """Return how many records of a process (0: of all), up to a place in the journal, are pending."""
        return sum(
            1
            for entry in self._order
            if entry.record is not None
            and (not token or entry.token == token)
            and (entry.end is None or entry.end <= upto)
        )

    def last(self, run_id: str) -> Entry | None:
        """Return the newest pending entry of a run."""
        queue = self._queues.get(run_id)
        return queue.entries[-1] if queue is not None and queue.entries else None

    def has(self, run_id: str) -> bool:
        """True if records of this run are pending."""
        return run_id in self._queues
