"""The judge of the kill loop: compares what the writers noted with what the taps saw and the server has.

It shares no state with any process that is killed, and relies on nothing of the library but its documented
limits. A verdict is a list of complaints by kind; an empty one means that every promise was kept.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.crash import payloads
from tests.crash.taps import Disk, Wire

END_STATES = {"success", "error"}


@dataclass(frozen=True)
class Issued:
    """A record that a writer was about to write."""

    kind: str
    marker: str
    run_id: str


@dataclass
class Begun:
    """A run that a writer was about to begin."""

    process: str
    began: bool = False
    end: str = ""
    """The state with which it was about to end."""
    ended: bool = False


@dataclass
class Notes:
    """Everything that all writers have noted; a line that a death has torn does not count."""

    issued: dict[str, Issued] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    """Markers of which the journal said yes."""
    refused: set[str] = field(default_factory=set)
    runs: dict[str, Begun] = field(default_factory=dict)
    flushes: list[tuple[str, float, set[str]]] = field(default_factory=list)
    """Answered with yes: by whom, when, and what the process had been promised before it asked."""
    unanswered: int = 0
    """Flushes that were answered with no."""
    quit: set[str] = field(default_factory=set)
    """Processes that were about to end by themselves."""
    processes: int = 0

    @classmethod
    def read(cls, directory: Path, process: str = "*") -> Notes:
        notes = cls()
        for path in sorted(directory.glob(f"{process}.log")):
            notes.processes += 1
            notes._add(path.stem, path.read_text().split("\n")[:-1])
        return notes

    def _add(self, process: str, lines: Iterable[str]) -> None:
        promised: set[str] = set()
        asked: dict[str, set[str]] = {}
        for line in lines:
            sign, *words = line.split(" ")
            if sign == "I":
                kind, marker, run_id = words
                self.issued[marker] = Issued(kind, marker, run_id)
            elif sign == "A":
                self.taken.add(words[0])
                promised.add(words[0])
            elif sign == "D":
                self.refused.add(words[0])
            elif sign == "R":
                self.runs[words[0]] = Begun(process)
            elif sign == "S":
                self.runs[words[0]].began = True
                promised.add(f"run_started {words[0]}")
            elif sign == "E":
                self.runs[words[0]].end = words[1]
            elif sign == "X":
                self.runs[words[0]].ended = True
                promised.add(f"run_ended {words[0]}")
            elif sign == "f":
                asked[words[0]] = set(promised)
            elif sign == "F":
                self.flushes.append((process, float(words[1]), asked[words[0]]))
            elif sign == "N":
                self.unanswered += 1
            elif sign == "Q":
                self.quit.add(process)


@dataclass
class Database:
    """What the server has."""

    calls: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    runs: dict[str, dict[str, Any]]
    counters: dict[str, int]
    records: int

    @classmethod
    def read(cls, path: Path) -> Database:
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            db.row_factory = sqlite3.Row

            def rows(table: str) -> list[dict[str, Any]]:
                return [dict(row) for row in db.execute(f"SELECT * FROM {table}")]

            return cls(
                calls=rows("calls"),
                steps=rows("steps"),
                runs={row["run_id"]: row for row in rows("runs")},
                counters={row["name"]: row["value"] for row in rows("counters")},
                records=db.execute("SELECT count(*) FROM records").fetchone()[0],
            )
        finally:
            db.close()


class Verdict:
    """Complaints by kind, each with what it is about."""

    def __init__(self) -> None:
        self.complaints: dict[str, list[str]] = defaultdict(list)

    def complain(self, kind: str, what: str) -> None:
        self.complaints[kind].append(what)

    def __str__(self) -> str:
        shown = [
            f"{kind} ({len(found)}):\n  " + "\n  ".join(found[:8]) for kind, found in self.complaints.items()
        ]
        return "\n".join(shown) or "every promise was kept"


def is_settled(notes: Notes, path: Path) -> bool:
    """True if everything that was promised is at the server, and no run is open there."""
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        if db.execute("SELECT 1 FROM runs WHERE status = 'running' LIMIT 1").fetchone():
            return False
        calls = {json.loads(row[0])["marker"] for row in db.execute("SELECT metadata FROM calls")}
        steps = {row[0] for row in db.execute("SELECT name FROM steps")}
        tags = {tag for row in db.execute("SELECT tags FROM runs") for tag in json.loads(row[0])}
    finally:
        db.close()
    return notes.taken <= calls | steps | tags


def judge(notes: Notes, database: Database, wire: Wire, disk: Disk, ended: dict[str, int]) -> Verdict:
    """Return every way in which a promise was broken.

    Args:
        notes: what the writers were told.
        database: what the server has.
        wire: what the server has said.
        disk: what was written.
        ended: exit codes of the writers, by process.
    """
    verdict = Verdict()
    arrivals = _arrivals(verdict, notes, database)
    for marker in sorted(notes.taken - arrivals.keys()):
        verdict.complain("lost", f"{marker} (segments {disk.places.get(marker, 'none')})")
    for marker in sorted(arrivals.keys() - notes.issued.keys()):
        verdict.complain("invented", marker)
    for marker, count in arrivals.items():
        if count != 1:
            verdict.complain("doubled", f"{marker}: {count}")
    for marker in sorted(notes.refused):
        verdict.complain("refused", marker)
    _judge_runs(verdict, notes, database, ended)
    _judge_made_up(verdict, notes, database, wire)
    _judge_order(verdict, database)
    _judge_sums(verdict, database)
    for process, at, promised in notes.flushes:
        missing = {about: wire.arrived.get(about, float("inf")) - at for about in promised}
        late = {about: late_s for about, late_s in missing.items() if late_s > 0}
        if late:
            verdict.complain("untrue flush", f"{process} at {at}: seconds by which it was early: {late}")
    for record_id, reason in wire.rejected.items():
        verdict.complain("rejected", f"{record_id}: {reason}")
    for path in sorted(wire.other_paths):
        verdict.complain("not by ingest", path)
    if database.counters["accepted"] != database.records:
        verdict.complain("counters", f"{database.counters} for {database.records} records")
    return verdict


def _arrivals(verdict: Verdict, notes: Notes, database: Database) -> Counter[str]:
    """Return how often each marker arrived, and complain of what is not as it was issued."""
    arrivals: Counter[str] = Counter()
    for call in database.calls:
        marker = json.loads(call["metadata"]).get("marker", f"call without a marker: {call['call_id']}")
        arrivals[marker] += 1
        issued = notes.issued.get(marker)
        if issued is not None:
            _judge_place(verdict, issued, call["run_id"], database)
            if difference := payloads.difference(marker, call, loose=issued.kind == "l"):
                verdict.complain("altered", f"{marker}: {difference}")
    for step in database.steps:
        marker = step["name"]
        arrivals[marker] += 1
        if marker in notes.issued:
            _judge_place(verdict, notes.issued[marker], step["run_id"], database)
        if json.loads(step["output"]) != payloads.output(marker):
            verdict.complain("altered", f"{marker}: {step['output'][:200]}")
    for run in database.runs.values():
        above = _above(run, database)
        for marker, value in json.loads(run["tags"]).items():
            if marker in notes.issued and notes.issued[marker].run_id in above:
                continue  # it has the tags of the runs above it, too
            arrivals[marker] += 1
            if marker in notes.issued:
                _judge_place(verdict, notes.issued[marker], run["run_id"], database)
            if value != payloads.tag(marker):
                verdict.complain("altered", f"{marker}: {value[:200]}")
    return arrivals


def _above(run: dict[str, Any], database: Database) -> set[str]:
    """Return the ids of the runs above this one."""
    found: set[str] = set()
    while (parent := run["parent_run_id"]) and parent not in found:
        found.add(parent)
        run = database.runs.get(parent, {"parent_run_id": ""})
    return found


def _judge_place(verdict: Verdict, issued: Issued, run_id: str, database: Database) -> None:
    if issued.run_id == run_id:
        return
    if issued.run_id != "-" or database.runs[run_id]["workflow_name"] != "auto":
        verdict.complain("misplaced", f"{issued} in {run_id}")


def _judge_runs(verdict: Verdict, notes: Notes, database: Database, ended: dict[str, int]) -> None:
    for run_id, run in database.runs.items():
        if run_id not in notes.runs and run["workflow_name"] != "auto":
            verdict.complain("invented", f"run {run_id} ({run['agent_name']}, {run['status']})")
    for run_id, begun in notes.runs.items():
        run = database.runs.get(run_id)
        if run is None:
            if begun.began:
                verdict.complain("lost", f"run {run_id}")
            continue
        if run["status"] not in _allowed(begun, notes, ended):
            verdict.complain("wrong end", f"{run_id} is {run['status']}: {begun}")
        if run["agent_name"] != "torture" or json.loads(run["metadata"]) != {"writer": begun.process}:
            verdict.complain("altered", f"run {run_id}: {run['agent_name']} {run['metadata']}")
    for run_id, run in database.runs.items():
        if run["workflow_name"] == "auto" and run["status"] != "success":
            verdict.complain("wrong end", f"automatic run {run_id} is {run['status']}")


def _allowed(begun: Begun, notes: Notes, ended: dict[str, int]) -> set[str]:
    if begun.ended:
        return {begun.end}
    if begun.end:
        return {begun.end, "killed"}
    if begun.process not in notes.quit:
        return {"killed"}
    # It was left open on purpose, and the exit has to end it. A forked child's exit code is not known here.
    return {"interrupted"} if ended.get(begun.process) == 0 else {"interrupted", "killed"}


def _judge_made_up(verdict: Verdict, notes: Notes, database: Database, wire: Wire) -> None:
    """A shipper makes an end only for a run without one, and a beginning only for one that has none."""
    for record_id in wire.sent:
        run_id, _, made = record_id.partition("-")
        begun = notes.runs.get(run_id)
        if begun is None:
            continue
        if made == "killed" and database.runs[run_id]["status"] != "killed":
            verdict.complain("second end", f"{record_id} for {begun}")
        if made == "start" and begun.began:
            verdict.complain("second start", f"{record_id} for {begun}")


def _judge_order(verdict: Verdict, database: Database) -> None:
    """What one thread records in one run arrives in that order."""
    last: dict[tuple[str, str], int] = {}
    for call in sorted(database.calls, key=lambda call: call["seq"]):
        thread, _, number = json.loads(call["metadata"])["marker"].rpartition(".")
        if int(number) < last.get((call["run_id"], thread), 0):
            verdict.complain("out of order", f"{thread}.{number} in {call['run_id']}")
        last[call["run_id"], thread] = int(number)


def _judge_sums(verdict: Verdict, database: Database) -> None:
    """What is kept beside a run agrees with the rows: nothing was counted twice, or not at all."""
    calls: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for call in database.calls:
        calls[call["run_id"]] += 1
        tokens[call["run_id"]] += call["tokens_in"]
    for run_id, run in database.runs.items():
        if (run["calls"], run["tokens_in"]) != (calls[run_id], tokens[run_id]):
            verdict.complain("sums", f"{run_id}: {run['calls']} calls for {calls[run_id]} rows")
        if run["workflow_name"] == "auto" and json.loads(run["metadata"])["call_count"] != calls[run_id]:
            verdict.complain("sums", f"automatic run {run_id}: {run['metadata']} for {calls[run_id]} calls")
