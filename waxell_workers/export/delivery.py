"""The ledger of one `export()` call, shared by the threads that deliver its runs.

It collects the `Outcome`, decides when the rest is not worth trying, and tells a poisonous record from a
server that refuses everything. Once closed nothing changes it, nor any `RunState`: a thread that comes back
after the deadline finds `Closed`, and what it did counts as an unknown outcome.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

from ..core.exporting import OUT_OF_TIME, Outcome
from .answers import LATE, Answer, Verdict
from .prices import Pricing
from .transport import Transport

REFUSALS_LIMIT = 5
"""So many records refused one after another, and none taken: it is not the records."""
DOWN_LIMIT = 2
TROUBLE_LIMIT = 8
"""Consecutive requests that found no server or an overloaded one, or any 5xx: the rest is not tried."""

T = TypeVar("T")


class Closed(Exception):
    """The export call is over; whoever comes back late must leave everything as it is."""


@dataclass(slots=True)
class Refusals:
    """Records refused since the last success, by endpoint: kept from one export to the next."""

    streaks: dict[str, list[Sequence[str]]] = field(default_factory=dict)
    """Endpoint to what was refused, each time: a record's id, with the ids of those that depend on it."""


class Delivery:
    """One export call.

    Args:
        transport: Where requests go.
        deadline: `time.monotonic()` seconds.
        refusals: What earlier calls remember.
        governance: Counts of the server's governance answers, by action.
        priced: What prices calls.
    """

    def __init__(
        self,
        transport: Transport,
        deadline: float,
        refusals: Refusals,
        governance: dict[str, int],
        priced: Pricing,
    ) -> None:
        self.transport = transport
        self.deadline = deadline
        self.priced = priced
        self.troubled: set[str] = set()
        """Runs with a request that failed; those that were not even tried are not among them."""
        self._refusals = refusals
        self._governance = governance
        self._lock = threading.Lock()
        self._outcome = Outcome()
        self._taken: set[str] = set()
        self._down = 0
        self._trouble = 0
        self._stopped = False
        self._closed = False

    @contextmanager
    def writing(self) -> Iterator[Outcome]:
        """Change the outcome, and what belongs to it, at once and alone.

        Raises:
            Closed: the call is over.
        """
        with self._lock:
            if self._closed:
                raise Closed
            yield self._outcome

    def close(self) -> Outcome:
        """End the call: the outcome is final."""
        with self._lock:
            self._closed = self._stopped = True
            return self._outcome

    @property
    def stopped(self) -> bool:
        """True if there is no point in further requests."""
        return self._stopped

    def request(self, name: str, send: Callable[[], Answer]) -> Answer:
        """Send one request, unless it is pointless by now, and note what its answer says about the server."""
        if self._stopped:
            return LATE
        answer = send()
        with self.writing() as outcome:
            if answer.verdict is Verdict.RETRY:
                self._trouble += 1
                self._down = self._down + 1 if answer.down else 0
                if self._down >= DOWN_LIMIT or self._trouble >= TROUBLE_LIMIT:
                    self._stopped = True
                if answer.retry_after_s is not None:
                    outcome.retry_after_s = max(outcome.retry_after_s or 0.0, answer.retry_after_s)
            elif answer.verdict is Verdict.PAUSE:
                self._pause(outcome, answer.reason)
            elif answer.verdict is not Verdict.LATE:
                self._down = self._trouble = 0
            if answer.verdict is Verdict.OK:
                self._taken.add(name)
                self._refusals.streaks.pop(name, None)
                self._count_governance(answer.body)
        return answer

    def post(self, name: str, path: str, payload: object) -> Answer:
        """POST JSON to the endpoint called `name`."""
        return self.request(name, lambda: self.transport.post(name, path, payload, self.deadline))

    def acknowledge(self, ids: Iterable[str]) -> None:
        """Note that the server has these records."""
        with self.writing() as outcome:
            outcome.acknowledged.update(ids)

    def reject(self, ids: Iterable[str], reason: str) -> None:
        """Note that the server will never take these records."""
        with self.writing() as outcome:
            outcome.rejected.update(dict.fromkeys(ids, reason))

    def settled(self, record_id: str) -> bool:
        """Tell whether a record's fate is known."""
        return record_id in self._outcome.acknowledged or record_id in self._outcome.rejected

    def fail(self, reason: str, run_id: str = "") -> None:
        """Note why something, of this run or of all, must be tried again; the first reason stands."""
        with self.writing() as outcome:
            outcome.error = outcome.error or reason or OUT_OF_TIME
            if run_id:
                self.troubled.add(run_id)

    def pause(self, reason: str) -> None:
        """Note that the destination as a whole refuses us, and stop."""
        with self.writing() as outcome:
            self._pause(outcome, reason)

    def refused(self, name: str, ids: Sequence[str], reason: str) -> bool:
        """Reject records that were refused alone, unless the server refuses everything.

        Args:
            name: The endpoint's; each has its own row of refusals.
            ids: The record, or the records that cannot go without it.
            reason: For the quarantine.

        Returns:
            False if this was the fifth refusal in a row without a success: it is not the records.
        """
        with self.writing() as outcome:
            if outcome.paused:
                return False
            outcome.rejected.update(dict.fromkeys(ids, reason))
            streak = self._refusals.streaks.setdefault(name, [])
            streak.append(ids)
            return len(streak) < REFUSALS_LIMIT or name in self._taken

    def refuses_all(self, name: str, reason: str) -> Answer:
        """Pause the destination, and keep what it has refused in a row."""
        self._take_back(name)
        self.pause(f"{reason}, {REFUSALS_LIMIT} times in a row")
        return Answer(Verdict.PAUSE, reason)

    def bisect(
        self,
        name: str,
        items: Sequence[T],
        id_of: Callable[[T], str],
        send: Callable[[Sequence[T]], Answer],
        taken: Callable[[Sequence[T], Answer], None],
    ) -> Answer:
        """Send items in order; where a batch is refused, halve it until the poisonous record is found.

        Args:
            name: The endpoint's.
            items: Not empty.
            id_of: Gives an item's record id.
            send: Sends items through `request()`.
            taken: Called for items that the server has taken.

        Returns:
            The answer that ended it, or a good one if every item is delivered or rejected.
        """
        parts = [list(items)]
        while parts:
            part = parts.pop()
            answer = send(part)
            if answer.verdict is Verdict.OK:
                taken(part, answer)
            elif answer.verdict is not Verdict.REFUSED:
                return answer
            elif len(part) > 1:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
            elif not self.refused(name, [id_of(part[0])], answer.reason):
                # Five poisonous neighbours, or a server that refuses everything? The far end will tell.
                probe = send(parts[0][-1:]) if parts else answer
                if probe.verdict is Verdict.REFUSED:
                    return self.refuses_all(name, answer.reason)
                if probe.verdict is not Verdict.OK:
                    self._take_back(name)
                    return probe
                taken([parts[0].pop()], probe)
                parts = [part for part in parts if part]
        return Answer(Verdict.OK)

    def _take_back(self, name: str) -> None:
        with self.writing() as outcome:
            for record_id in chain.from_iterable(self._refusals.streaks.pop(name, [])):
                outcome.rejected.pop(record_id, None)

    def _pause(self, outcome: Outcome, reason: str) -> None:
        outcome.paused = outcome.paused or reason
        self._stopped = True

    def _count_governance(self, body: dict[str, Any] | None) -> None:
        found = (body or {}).get("governance")
        action = found.get("action") if isinstance(found, dict) else None
        if isinstance(action, str) and (action in self._governance or len(self._governance) < 16):
            self._governance[action[:32]] = self._governance.get(action[:32], 0) + 1
