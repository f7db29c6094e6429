"""The journal, proven: writers, their children, shippers and the server are killed at random instants.

An oracle outside all of them compares what the writers noted before and after each record with what passed
the wire, what stood on the disk, and what the server has. `make test` fires some dozens of faults,
`make torture` more than a thousand; `WAXELL_TORTURE_SEED` repeats a plan.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from tests.crash.killing import DELAYS, FAULTS, Arena, arena, plan
from tests.crash.oracle import Database, Notes, Verdict, is_settled, judge
from tests.harness import await_
from tests.torture import LONG, effort, found
from waxell_workers.core.segments import FIRST_LINE

STRIKES = effort(70, 1050)
SETTLED_S = effort(120, 600)
SHIPPERS = ("process", "thread", "external")
REMEMBERED = 100
KNOWN_LINES = (
    "everything is kept",
    "delivering again",
    "torn or damaged lines",
    "delivered ",
    "another shipper works in",
    "the last shipper died with",
)
"""What shippers may say in this test."""


@pytest.mark.timeout(effort(300, 3600))
def test_no_kill_breaks_a_promise(tmp_path: Path) -> None:
    """Given kills at random instants of all that records, ships and receives, when the dust has settled, then
    what the journal took has arrived, once, unaltered, in its run; nothing else has; a flush said yes only
    when the server had it all; every run has the end that it was given, or was killed; a fresh record flows;
    and nothing is left behind."""
    seed = int(os.environ.get("WAXELL_TORTURE_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"seed {seed}")
    counts: Counter[str] = Counter()
    try:
        with arena(tmp_path, seed) as place:
            _strike(place, seed, counts)
            place.stop_writers()
            _settle(place)
            counts["fresh_record_after_ms"] = round(1000 * _a_fresh_record_flows(place))
            await_(
                lambda: not place.shippers(), "end of the shippers, who have nothing left to do", SETTLED_S
            )
            notes, database = Notes.read(place.notes), Database.read(place.server.db)
        verdict = judge(notes, database, place.wire, place.disk, place.ended)
        _judge_leftovers(place, verdict)
        counts.update(_counts(place, notes, database))
        counts["complaints"] = sum(map(len, verdict.complaints.values()))
    finally:  # also what was fired before something went wrong
        found("kill loop", seed=str(seed), **counts)
    assert not verdict.complaints, str(verdict)
    assert place.fired == _planned(seed)
    assert counts["processes killed"] >= STRIKES
    for what in (
        "answers lost",
        "repeats dropped at ingest",
        "rewritten after a seal",
        "runs killed",
        "flushes true",
    ):
        assert counts[what] > 0, what
    assert all(place.events[event] > 0 for event in (DELAYS if LONG else ("write", "request", "any")))
    assert sum(place.shipped_by[kind] > 0 for kind in SHIPPERS) >= effort(2, 3)
    assert counts["rotations"] > STRIKES // 4
    assert counts["records taken"] > 10 * STRIKES


def _strike(place: Arena, seed: int, counts: Counter[str]) -> None:
    """Fire all faults, and count them."""
    began = time.monotonic()
    try:
        for fault in plan(seed, STRIKES):
            place.strike(fault)
    finally:
        counts.update({f"{kind} killed": place.fired[kind] for kind in FAULTS})
        counts.update({f"after an event: {event}": place.events[event] for event in DELAYS})
        counts["fired_in_s"] = round(time.monotonic() - began)


def _a_fresh_record_flows(place: Arena) -> float:
    """Return the seconds in which a new process, that starts its shipper by itself, has one run delivered."""
    place.kill_shippers()
    began = time.monotonic()
    writer = place.start_writer("process", "--once")

    def arrived() -> bool:
        runs = Notes.read(place.notes, writer.id).runs
        return bool(runs) and all(f"run_ended {run_id}" in place.wire.arrived for run_id in runs)

    await_(arrived, "a fresh record at the server")
    took = time.monotonic() - began
    await_(lambda: not writer.group(), "end of the fresh writer")
    return took


def _settle(place: Arena) -> None:
    """Wait until all that was promised has arrived."""
    place.keep_up_server()
    notes = Notes.read(place.notes)
    deadline = time.monotonic() + SETTLED_S
    while time.monotonic() < deadline and not is_settled(notes, place.server.db):
        if not place.shippers():  # one whose writers are gone gives up after 30 s, and leaves the rest
            place.start_ship()
        time.sleep(0.2)  # what is missing in the end is for the oracle to say


def _judge_leftovers(place: Arena, verdict: Verdict) -> None:
    """Nothing is left on the disk but an empty journal, and nobody has complained."""
    directory = place.disk.directory()
    assert directory is not None
    for path in directory.iterdir():
        if path.suffix == ".ndjson" and path.read_bytes() != FIRST_LINE:
            verdict.complain("left behind", f"{path.name}: {path.stat().st_size} bytes")
    with closing(sqlite3.connect(directory / "shipper.db")) as ledger:
        [[remembered]] = ledger.execute("SELECT count(*) FROM acknowledged")
        if remembered > REMEMBERED:
            verdict.complain("left behind", f"{remembered} ids above the cursor, when nothing is above it")
    for process, code in place.ended.items():
        if code not in (0, -signal.SIGKILL):
            verdict.complain("exit code", f"{process}: {code}")
    for path in (place.errors, directory / "shipper.log", place.directory / "ship.txt"):
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            if not any(known in line for known in KNOWN_LINES):
                verdict.complain("said", f"{path.name}: {line}")


def _planned(seed: int) -> Counter[str]:
    return Counter(fault.kind for fault in plan(seed, STRIKES))


def _counts(place: Arena, notes: Notes, database: Database) -> dict[str, int]:
    statuses = Counter(run["status"] for run in database.runs.values())
    return {
        "processes killed": place.killed,
        **{f"killed while shipping, {kind}": place.shipped_by[kind] for kind in SHIPPERS},
        "answers lost": place.wire.lost_answers,
        "writers": notes.processes,
        "records issued": len(notes.issued),
        "records taken": len(notes.taken),
        "flushes true": len(notes.flushes),
        "flushes false": notes.unanswered,
        "runs": len(database.runs),
        "runs killed": statuses["killed"],
        "rotations": place.disk.highest - 1,
        "segments read by the tap": len(place.disk.seen),
        "torn lines": place.disk.torn,
        "rewritten after a seal": sum(count > 1 for count in place.disk.lines.values()),
        "sent more than once": sum(count > 1 for count in place.wire.sent.values()),
        "repeats dropped at ingest": database.counters["duplicates"],
    }
