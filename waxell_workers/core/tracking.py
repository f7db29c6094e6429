"""From what the journal says to what the server should hear: runs, their ends, and calls outside any run.

Decides which run a record belongs to, drops repeats and second ends, finds the runs of dead processes and
ends them as `killed` with the reason that the supervising process gave, and groups calls outside any run.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import cast

import msgspec

from .exporting import RunState
from .ids import new_id
from .ledger import Ledger, TrackedRun
from .liveness import Procs
from .parking import Parking
from .reader import Entry, Reader
from .records import LLMCall, Record, RunEnded, RunStarted, TaskLost
from .segments import Position
from .window import Window

_RECENT = 50_000
_LOOK_FOR_DEAD_S = 0.5
_LOST_KEPT = 1_000
_REASON_GRACE_S = 8.0
"""How long a supervising process, while any lives, has to say why another died: Celery looks every 5 s."""


class Tracker:
    """Everything that is known about the runs of one destination."""

    def __init__(
        self,
        ledger: Ledger,
        window: Window,
        reader: Reader,
        procs: Procs,
        parking: Parking,
        *,
        adopted: bool = False,
    ) -> None:
        """Take up where the ledger says.

        Args:
            ledger: what earlier shippers have written down.
            window: where records go.
            reader: where they come from.
            procs: who lives.
            parking: the runs that were moved aside.
            adopted: True if the records go elsewhere than they were meant to: there, no run has begun.
        """
        self._ledger = ledger
        self._parking = parking
        self._adopted = adopted
        self._begun: set[str] = set()
        """Of an adopted journal: the runs whose beginning was read, or made again."""
        self._begun_there: list[str] = []
        """… and the ids of beginnings that need not be made again, to be written down."""
        self._window = window
        self._reader = reader
        self._procs = procs
        self._runs: dict[str, TrackedRun] = {}
        self._changed: dict[str, TrackedRun] = {}
        self._acknowledged = ledger.acknowledged()
        self._grouped = ledger.grouped()
        self._loose: dict[str, list[Entry]] = {}
        self._recent: OrderedDict[str, None] = OrderedDict.fromkeys(ledger.recent())
        self._dead: dict[int, tuple[Position, float, float]] = {}
        """Token of a dead process to the journal's end then, and when that was: monotonic, Unix time."""
        self._losses: dict[str, TaskLost] = {}
        """By task. Who supervises may write to an older segment than the task's own process does."""
        self._looked_at = 0.0
        self._cursor = reader.position
        self.repeats = 0
        """Records that were read twice and dropped once."""
        for run in ledger.open_runs():
            self._runs[run.run_id] = run
            if run.run_id in parking:
                run.ended = run.automatic or run.run_id in parking.ended
            elif run.automatic:
                self._add_automatic(run)

    # -- what is read --------------------------------------------------------------------------

    def admit(self, entry: Entry) -> None:
        """Take a record that was read: into the window, or nowhere if it is a repeat."""
        record = entry.record
        entry.record = None
        self._window.follow(entry)
        if record is None or self._is_repeat(entry.id):
            return
        if isinstance(record, TaskLost):
            self._lose(record)
        elif isinstance(record, LLMCall) and not record.run_id:
            self._admit_loose(entry, record)
        elif isinstance(record, RunStarted):
            self._begin(record)
            self._window.add(record.run_id, entry, record, first=True)
        elif isinstance(record, RunEnded):
            self._admit_end(entry, record)
        else:
            self._run_of(record.run_id, record)
            self._window.add(record.run_id, entry, record)

    def _is_repeat(self, record_id: str) -> bool:
        if record_id in self._acknowledged:
            self._recent[record_id] = None  # the cursor will pass it, and it may stand once more behind that
            return True
        if record_id in self._recent:
            self.repeats += 1
            return True
        self._recent[record_id] = None
        if len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        return False

    def _begin(self, record: RunStarted) -> None:
        if self._adopted:
            self._begun.add(record.run_id)
        run = self._runs.get(record.run_id)
        if run is None:
            lost = self._losses.get(record.task_id)
            if lost is not None and lost.at < record.at:  # of another attempt
                lost = None
            run = self._runs[record.run_id] = TrackedRun(RunState(record), lost=lost)
        else:
            run.state.started = record  # a call was read before it: writers race
        self._changed[record.run_id] = run

    def _admit_end(self, entry: Entry, record: RunEnded) -> None:
        run = self._run_of(record.run_id, record)
        if run.ended:
            return
        run.ended = True
        if record.state == "interrupted" and run.lost is not None:
            record = _killed(record.id, record.at, run.lost, record.run_id, record.duration_ms)
        self._window.add(record.run_id, entry, record)

    def _run_of(self, run_id: str, record: Record) -> TrackedRun:
        run = self._runs.get(run_id) or self._ledger.run(run_id)
        if run is None:
            # Its beginning was torn or refused. What is known is worth more than nothing.
            started = unknown(run_id, record)
            run = TrackedRun(RunState(started))
            self._window.add(run_id, Entry(started, started.id, 0, None, 0), started, first=True)
            if self._adopted:
                self._begun.add(run_id)
        elif self._adopted:
            self._begin_again(run)
        if run_id not in self._runs:
            self._runs[run_id] = run
            self._changed[run_id] = run
        return run

    def _begin_again(self, run: TrackedRun) -> None:
        """Have a run begin here that has begun, so far, where the journal was meant to go."""
        for entry in self._beginning(run):
            self._window.add(run.run_id, entry, cast(Record, entry.record), first=True)

    def _beginning(self, run: TrackedRun) -> list[Entry]:
        if run.run_id in self._begun:
            return []
        self._begun.add(run.run_id)
        started = msgspec.structs.replace(run.state.started, id=f"{run.run_id}-start")
        return [] if started.id in self._acknowledged else [Entry(started, started.id, 0, None, 0)]

    def resume(self, run_id: str, entries: list[Entry]) -> list[Entry]:
        """Know a parked run again; return what is to be sent of it."""
        first = cast(Record, entries[0].record)
        if isinstance(first, RunStarted):
            self._begin(first)
            return entries
        run = self._runs.get(run_id) or self._run_of(run_id, first)
        return [*self._beginning(run), *entries] if self._adopted else entries

    def has_ended(self, run_id: str) -> bool:
        """True if a run's end was read or made."""
        return run_id in self._runs and self._runs[run_id].ended

    # -- the dead ------------------------------------------------------------------------------

    def _lose(self, lost: TaskLost) -> None:
        for run in self._runs.values():
            if run.state.started.task_id != lost.task_id or run.lost is not None:
                continue
            if not run.ended:
                run.lost = lost
                self._changed[run.run_id] = run
            else:
                self._explain_end(run.run_id, lost)
        self._losses[lost.task_id] = lost
        if len(self._losses) > _LOST_KEPT:
            del self._losses[next(iter(self._losses))]

    def _explain_end(self, run_id: str, lost: TaskLost) -> None:
        """Give an end by interruption that has not been sent yet the reason that was told after it."""
        entry = self._window.last(run_id)
        end = entry.record if entry is not None else None
        if entry is None or not isinstance(end, RunEnded) or end.state != "interrupted":
            return
        if abs(lost.at - end.at) <= _REASON_GRACE_S:  # else it is about another attempt
            entry.record = _killed(end.id, end.at, lost, run_id, end.duration_ms)

    def end_dead_runs(self, *, leaving: bool) -> None:
        """End the open runs whose process is dead, once everything that it wrote has been read.

        Args:
            leaving: True if this process was told to stop: it is none that could still give a reason.
        """
        now = time.monotonic()
        if now - self._looked_at < _LOOK_FOR_DEAD_S and not leaving:
            return
        self._looked_at = now
        open_runs = [run for run in self._runs.values() if not run.ended and not run.automatic]
        tokens = {run.state.started.proc for run in open_runs}
        # One that had all its descriptors closed has lost its lock as well, and takes it again.
        dead = {token: seen for token, seen in self._dead.items() if token in tokens}
        self._dead = {token: seen for token, seen in dead.items() if not self._procs.is_alive(token)}
        for token in tokens:
            if token not in self._dead and not self._procs.is_alive(token):
                # First it is known to be dead, then where the journal ends: so nothing of it comes later.
                self._dead[token] = (self._reader.end(), now, time.time())
        if not self._dead:
            return
        anyone_alive = self._procs.anyone_else_alive if leaving else self._procs.anyone_alive
        end = self._reader.end()
        for run in open_runs:
            seen = self._dead.get(run.state.started.proc)
            if seen is None or self._reader.position < min(seen[0], end):
                continue  # the end is lower than it was if the spool was wiped
            _, since, at = seen
            if run.lost is not None or now - since > _REASON_GRACE_S or not anyone_alive():
                self._kill(run, at)

    def any_open(self) -> bool:
        """True if a run is still to be ended."""
        return any(not run.ended and not run.automatic for run in self._runs.values())

    def _kill(self, run: TrackedRun, at: float) -> None:
        run.ended = True
        if self._adopted:
            self._begin_again(run)
        at = min(at, run.lost.at) if run.lost is not None else at
        end = _killed(f"{run.run_id}-killed", at, run.lost, run.run_id, (at - run.state.started.at) * 1000)
        self._window.add(run.run_id, Entry(end, end.id, 0, None, 0), end)

    # -- calls outside any run -----------------------------------------------------------------

    def _admit_loose(self, entry: Entry, call: LLMCall) -> None:
        run_id = self._grouped.get(call.id)
        entry.record = call  # pending: the cursor must not pass it
        # Its end may have arrived already: after a restart it is there before the calls have all been read.
        if run_id is not None and (run_id in self._runs or self._ledger.run(run_id)):
            self._run_of(run_id, call)
            self._window.add(run_id, entry, msgspec.structs.replace(call, run_id=run_id))
            return
        self._loose.setdefault(call.model, []).append(entry)

    @property
    def loose(self) -> int:
        """Calls outside any run that wait to be grouped."""
        return sum(len(entries) for entries in self._loose.values())

    @property
    def loose_bytes(self) -> int:
        """The length of their lines."""
        return sum(entry.size for entries in self._loose.values() for entry in entries)

    def group_loose(self) -> None:
        """Put the calls outside any run into one run a model, named `auto:{model}`."""
        loose, self._loose = self._loose, {}
        for model, entries in loose.items():
            calls = [entry.record for entry in entries if isinstance(entry.record, LLMCall)]
            run_id = new_id()
            started = RunStarted(
                id=f"{run_id}-start",
                at=min(call.at for call in calls),
                run_id=run_id,
                agent_name=f"auto:{model}",
                workflow_name="auto",
                metadata={"auto_collected": True, "call_count": len(calls)},
                root_run_id=run_id,
                trace_id=run_id,
            )
            run = TrackedRun(RunState(started), automatic=True)
            self._ledger.group(run, [call.id for call in calls])
            self._runs[run_id] = run
            for entry, call in zip(entries, calls, strict=True):
                self._window.add(run_id, entry, msgspec.structs.replace(call, run_id=run_id))
            self._add_automatic(run)

    def _add_automatic(self, run: TrackedRun) -> None:
        started = run.state.started
        run.ended = True
        end = RunEnded(id=f"{run.run_id}-end", at=time.time(), run_id=run.run_id)
        if f"{run.run_id}-start" not in self._acknowledged:
            self._window.add(run.run_id, Entry(started, started.id, 0, None, 0), started, first=True)
        self._window.add(run.run_id, Entry(end, end.id, 0, None, 0), end)

    # -- what has arrived ----------------------------------------------------------------------

    def state(self, run_id: str) -> RunState:
        """Return what an exporter needs to know about a run."""
        return self._runs[run_id].state

    def delivered(self, run_id: str, record: Record) -> None:
        """Note that a record has arrived."""
        run = self._runs[run_id]
        self._changed[run_id] = run
        if isinstance(record, RunEnded):
            run.delivered = True
        elif isinstance(record, RunStarted) and self._adopted:
            self._begun_there.append(f"{run_id}-start")

    def changed(self, run_id: str) -> None:
        """Note that an exporter may have changed what it needs to know about a run."""
        self._changed[run_id] = self._runs[run_id]

    def commit(self, done: Iterable[str]) -> None:
        """Move the cursor over what has arrived and write the state down, in one transaction.

        Args:
            done: ids that have arrived, were given up, or were moved aside, since the last commit.
        """
        passed = self._window.pass_arrived()
        if passed and passed[-1].end is not None:
            self._cursor = passed[-1].end
        if self._window.nothing_followed:
            self._cursor = self._reader.position
        parked, noted, no_longer = self._parking.to_commit()
        gone = [*(entry.id for entry in passed), *no_longer]
        done, self._begun_there = [*done, *noted, *self._begun_there], []
        self._acknowledged.update(done)
        finished = [
            run
            for run in self._changed.values()
            if run.delivered and not self._window.has(run.run_id) and run.run_id not in self._parking
        ]
        # These have no place in the journal that the cursor could pass.
        gone += [f"{run.run_id}-{made}" for run in finished for made in run.made_here]
        above = self._acknowledged.difference(gone)
        self._ledger.commit(
            self._cursor,
            self._reader.inode_of(self._cursor.segment),
            done_above=above.intersection(done),
            passed=gone,
            runs=self._changed.values(),
            parked=parked,
            failing=self._window.newly,
        )
        self._window.newly = {}
        for run in finished:
            self._runs.pop(run.run_id, None)
            self._begun.discard(run.run_id)
        self._changed.clear()
        self._acknowledged = above
        for record_id in gone:
            self._grouped.pop(record_id, None)

    @property
    def cursor(self) -> Position:
        """Everything before this place has arrived or was given up."""
        return self._cursor

    def delete_finished_segments(self) -> None:
        """Delete the segments before the cursor's."""
        # Reading starts again at a lower number where the spool was wiped; the cursor follows later.
        number = min(self._cursor.segment, self._reader.position.segment)
        if self._reader.lowest() < number:
            self._reader.delete_before(number)


def unknown(run_id: str, record: Record) -> RunStarted:
    """Return a beginning for a run that has none; with the time and the process of a record of it."""
    return RunStarted(
        id=f"{run_id}-start",
        at=record.at,
        proc=record.proc,
        run_id=run_id,
        agent_name="unknown",
        metadata={"recovered": True},
    )


def _killed(record_id: str, at: float, lost: TaskLost | None, run_id: str, ms: float | None) -> RunEnded:
    state, kind, why = "killed", "ProcessDied", "the process died without a word"
    if lost is not None:
        state, kind, why = lost.state, lost.error_type, lost.reason
    return RunEnded(
        id=record_id,
        at=at,
        run_id=run_id,
        state=state,
        reason=f"{state}: {why}",
        duration_ms=ms,
        error_type=kind,
        error_message=why,
    )
