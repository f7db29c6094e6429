"""A server that remembers every id that it was sent, behind a real exporter: what a shipper is judged by.

It drops repeats as `ingest` does, and counts them; it can refuse a record for good, fail, answer in part,
lose its answer, or have the shipper die under it. It relies on nothing of the core but the records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import msgspec

from waxell_workers.core.config import Settings
from waxell_workers.core.exporting import Outcome, RunBatch
from waxell_workers.core.records import LLMCall, Record, RunEnded, RunStarted


class Crash(BaseException):
    """The process that meets this is dead: nothing of it is to run any more."""


MOODS = (
    "healthy",
    "fails",
    "part of each run",
    "loses its answer",
    "refuses everybody",
    "shipper dies before",
    "shipper dies midway",
    "shipper dies after",
)


@dataclass
class ModelServer:
    """One destination's server."""

    mood: str = "healthy"
    part: int = 1
    """How many records of each run are taken where not all are."""
    poison: set[str] = field(default_factory=set)
    """Ids that will never be taken."""
    records: dict[str, Record] = field(default_factory=dict)
    """What has arrived, by id, in the order of arrival."""
    run_of: dict[str, str] = field(default_factory=dict)
    """Id to the run that it arrived in."""
    refused: set[str] = field(default_factory=set)
    repeats: Counter[str] = field(default_factory=Counter)
    """Ids that came again, and how often."""
    changed: list[Record] = field(default_factory=list)
    """Repeats that were not the same record."""
    in_flight: Counter[str] = field(default_factory=Counter)
    """Ids that were taken, or refused, and not committed yet as far as anybody knows."""
    uncertain: Counter[str] = field(default_factory=Counter)
    """Ids whose answer or whose commit was lost: each may be sent once more."""
    acknowledged: int = 0
    rejected: int = 0
    """What the shipper was told of since the test looked last."""
    exports: int = 0
    url: str = ""

    here: ClassVar[dict[str, ModelServer]] = {}
    """URL to server: where an exporter finds its own."""

    def take(self, run_id: str, record: Record) -> bool:
        """Take a record, or not for good; false if it is refused."""
        self.in_flight[record.id] += 1
        self.run_of.setdefault(record.id, run_id)
        if record.id in self.poison:
            self.refused.add(record.id)
            return False
        known = self.records.get(record.id)
        if known is None:
            self.records[record.id] = record
            return True
        self.repeats[record.id] += 1
        if not _same(known, record):
            self.changed.append(record)
        return True

    def forget_flight(self) -> None:
        """Nobody will ever commit what is in flight: the answer, or the shipper, is gone."""
        self.uncertain += self.in_flight
        self.in_flight.clear()

    # -- what a test asks ----------------------------------------------------------------------

    def made_here(self) -> Iterator[Record]:
        """Return the records that no writer wrote: the shipper made them."""
        for record in self.records.values():
            if is_made_by_shipper(record):
                yield record

    def ends(self) -> dict[str, list[RunEnded]]:
        """Return the ends of each run."""
        found: dict[str, list[RunEnded]] = {}
        for record in self.records.values():
            if isinstance(record, RunEnded):
                found.setdefault(record.run_id, []).append(record)
        return found


def is_made_by_shipper(record: Record) -> bool:
    """True for the frame of a run that has none of its own: of loose calls, of the dead, of a torn start."""
    if isinstance(record, RunStarted):
        return bool(record.metadata.get("auto_collected") or record.metadata.get("recovered"))
    if isinstance(record, RunEnded):  # what writers end has a result here
        return record.id.endswith("-killed") or (record.proc == 0 and record.result is None)
    return False


def _same(one: Record, other: Record) -> bool:
    if isinstance(one, LLMCall) and isinstance(other, LLMCall):  # grouped anew, it is in another run
        return msgspec.structs.replace(one, run_id="") == msgspec.structs.replace(other, run_id="")
    if is_made_by_shipper(one):  # at another time
        return type(one) is type(other)
    return one == other


class ModelExporter:
    """The exporter to the model server that has the URL of the settings."""

    def __init__(self, settings: Settings) -> None:
        self._server = ModelServer.here[settings.api_url]

    def export(self, batch: Sequence[RunBatch], deadline: float) -> Outcome:
        """Do what the server's mood says."""
        server = self._server
        server.exports += 1
        if server.mood == "shipper dies before":
            raise Crash(server.mood)
        if server.mood == "fails":
            return Outcome(error="503")
        if server.mood == "refuses everybody":
            return Outcome(paused="401")
        outcome = self._take(batch, server.part if server.mood in _IN_PART else None)
        if server.mood in ("shipper dies midway", "shipper dies after"):
            raise Crash(server.mood)
        if server.mood == "loses its answer":
            server.forget_flight()
            return Outcome(error="timeout")
        if server.mood == "part of each run":
            outcome.error = "503"
        server.acknowledged += len(outcome.acknowledged)
        server.rejected += len(outcome.rejected)
        return outcome

    def _take(self, batch: Sequence[RunBatch], part: int | None) -> Outcome:
        outcome = Outcome()
        for run in batch:
            for record in run.records[:part]:
                if self._server.take(run.run.started.run_id, record):
                    outcome.acknowledged.add(record.id)
                else:
                    outcome.rejected[record.id] = "poison"
        return outcome

    def close(self) -> None:
        """Nothing is open."""


_IN_PART = ("part of each run", "shipper dies midway")
