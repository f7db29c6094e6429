"""Runs that fail while the server takes everything else: moved aside, out of the journal and out of memory.

    <spool>/<destination>/parked/   000001.ndjson 000002.ndjson …   one file a run, its records in order

A run is parked when reading has to stop for the runs that fail. Its records are written to a file, and in
one transaction the cursor passes them and the ledger notes the file; what is read of it later is appended. It
is tried again, without end, at a slow pace; the ledger notes how much has gone; with the last, the file goes.

Killed in between: what a file has beyond what the ledger noted is still in the journal, and is not read. A
file that is gone has been delivered. If the ledger was lost, every file is delivered from its beginning. The
names begin with a digit, so that the files count against `spool_limit` as segments do.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from .encoding import decode, to_json
from .ledger import Ledger, ParkedRun
from .reader import Entry
from .room import with_room
from .window import Backoff

MOST_PARKED = 1_000
_PACE_S = 60.0
"""The longest that a parked run waits for its next attempt."""
_MOST_TAKEN_BYTES = 4 << 20
_FOLDER = "parked"


class _Sender(msgspec.Struct):
    """As much of a record as is needed to know whose it is."""

    id: str
    proc: int = 0


@dataclass(slots=True)
class _Parked:
    row: ParkedRun
    tokens: Counter[int] = field(default_factory=Counter)
    """Records that have not arrived, by the process that made them."""
    backoff: Backoff = field(default_factory=lambda: Backoff(most_s=_PACE_S))
    in_hand: list[tuple[Entry, int]] = field(default_factory=list)
    """What was taken last, with the place in the file behind each."""
    arrived: set[str] = field(default_factory=set)
    tried_at: float = float("-inf")


class Parking:
    """The parked runs of one destination."""

    def __init__(self, directory: str, ledger: Ledger) -> None:
        """Take up what the ledger says, and what it does not know any more.

        Raises:
            OSError: a file cannot be read.
        """
        self._directory = f"{directory}/{_FOLDER}"
        self._ledger_directory = directory
        self._changed: dict[str, ParkedRun | None] = {}
        self._passed: list[str] = []
        self._noted: list[str] = []
        self._runs = {row.run_id: _Parked(row) for row in ledger.parked() if self._is_there(row)}
        self._take_stock(ledger_is_new=ledger.cursor()[0] is None)
        self._acknowledged = ledger.acknowledged() if self._runs else set()
        """Those of `arrived` among them; a plain id is one that the journal still has, parked or not."""

    def _is_there(self, row: ParkedRun) -> bool:
        if os.path.exists(self._path(row.number)):
            return True
        self._changed[row.run_id] = None  # its file goes first, when all has arrived
        return False

    def _take_stock(self, *, ledger_is_new: bool) -> None:
        known = {run.row.number: run for run in self._runs.values()}
        for number in _numbers(self._directory):
            path = self._path(number)
            if number in known:
                run = known[number]
            elif ledger_is_new and (run_id := self._whose(path)) and run_id not in self._runs:
                row = ParkedRun(run_id, number, 0, os.path.getsize(path), ended=False)
                run = self._runs[run_id] = _Parked(row)
                self._changed[run_id] = row
            else:
                os.unlink(path)
                continue
            run.tokens.update(_token(line) for line, _ in self._lines(run.row))

    def _whose(self, path: str) -> str:
        with open(path, "rb") as file:
            return str(msgspec.json.decode(file.readline()).get("run_id", ""))

    # -- what is known -------------------------------------------------------------------------

    def __contains__(self, run_id: object) -> bool:
        return run_id in self._runs

    @property
    def is_full(self) -> bool:
        """True if no more runs should be parked."""
        return len(self._runs) >= MOST_PARKED

    @property
    def ended(self) -> set[str]:
        """The runs whose end is parked."""
        return {run_id for run_id, run in self._runs.items() if run.row.ended}

    def count(self, token: int = 0) -> int:
        """Return how many records of a process (0: of all) are parked."""
        if token:
            return sum(run.tokens[token] for run in self._runs.values())
        return sum(run.tokens.total() for run in self._runs.values())

    def is_due(self) -> bool:
        """True if a run should be tried again."""
        return any(run.backoff.is_over() for run in self._runs.values())

    # -- in and out ----------------------------------------------------------------------------

    def park(self, run_id: str, entries: Iterable[Entry], *, ended: bool) -> None:
        """Write records down, behind those of their run that are there; they count once it is committed.

        Raises:
            OSError: there is no room.
        """
        entries = list(entries)
        lines = b"".join(to_json(entry.record) + b"\n" for entry in entries if entry.record is not None)
        known = self._runs.get(run_id)
        number = known.row.number if known else max(_numbers(self._directory), default=0) + 1
        size = known.row.size if known else 0
        with_room(self._ledger_directory, lambda: _write(self._directory, self._path(number), lines, size))
        row = ParkedRun(
            run_id,
            number,
            known.row.offset if known else 0,
            size + len(lines),
            ended=ended or (known is not None and known.row.ended),
        )
        run = self._runs.setdefault(run_id, _Parked(row))
        run.row = self._changed[run_id] = row
        run.tokens.update(entry.token for entry in entries)
        if known is None:
            run.backoff.fail()

    def take(self, most: int) -> dict[str, list[Entry]]:
        """Return up to `most` records that should be tried now, by run, each run's in order."""
        taken: dict[str, list[Entry]] = {}
        room = _MOST_TAKEN_BYTES
        for run_id, run in self._runs.items():
            if most <= 0 or room <= 0:
                break
            if not run.backoff.is_over():
                continue
            run.in_hand = []
            run.tried_at = time.monotonic()
            for line, end in self._lines(run.row):
                entry = _entry(line)
                if entry.record is None or arrived(entry.id) in self._acknowledged:
                    run.arrived.add(entry.id)
                run.in_hand.append((entry, end))
                most -= 1
                room -= len(line)
                if most <= 0 or room <= 0:
                    break
            # By id: a journal that was read again, without a ledger, has brought some a second time.
            left = {entry.id: entry for entry, _ in run.in_hand if entry.id not in run.arrived}
            if left:
                taken[run_id] = list(left.values())
        return taken

    def arrived(self, run_id: str, ids: set[str]) -> None:
        """Note what has gone of a run; the file goes when all of it has."""
        run = self._runs[run_id]
        if ids:
            run.backoff.clear()
        for entry, _ in run.in_hand:
            if entry.id in ids:
                run.tokens[entry.token] -= 1
        run.arrived |= ids
        offset = run.row.offset
        while run.in_hand and run.in_hand[0][0].id in run.arrived:
            entry, offset = run.in_hand.pop(0)
            self._passed.append(arrived(entry.id))
        run.arrived &= {entry.id for entry, _ in run.in_hand}
        self._noted += map(arrived, run.arrived)
        run.in_hand = []
        if offset < run.row.size:
            run.row = self._changed[run_id] = msgspec.structs.replace(run.row, offset=offset)
            return
        os.unlink(self._path(run.row.number))
        del self._runs[run_id]
        self._changed[run_id] = None

    def failed(self, run_id: str, retry_after_s: float | None) -> None:
        """Leave a run alone for a while."""
        if run_id in self._runs:
            self._runs[run_id].backoff.fail(retry_after_s)

    def ignore_backoff(self, after_s: float) -> None:
        """Let every run be tried again that was not tried for so long: there will be no later."""
        for run in self._runs.values():
            if time.monotonic() - run.tried_at >= after_s:
                run.backoff.until = 0.0

    def to_commit(self) -> tuple[dict[str, ParkedRun | None], list[str], list[str]]:
        """Return the rows that have changed (None: gone), what to note as arrived, and what no longer."""
        changed, noted, passed = self._changed, self._noted, self._passed
        self._changed, self._noted, self._passed = {}, [], []
        return changed, noted, passed

    def _lines(self, row: ParkedRun) -> Iterator[tuple[bytes, int]]:
        return parked_lines(self._path(row.number), row.offset, row.size)

    def _path(self, number: int) -> str:
        return parked_path(self._ledger_directory, number)


def arrived(record_id: str) -> str:
    """Return how the ledger notes that a record has arrived from the middle of a file."""
    return f"{record_id}+"


def parked_path(directory: str, number: int) -> str:
    """Return the path of a parked run's file."""
    return f"{directory}/{_FOLDER}/{number:06d}.ndjson"


def remove_parked(directory: str) -> None:
    """Delete the files of all parked runs.

    Raises:
        OSError: they cannot be deleted.
    """
    for number in _numbers(f"{directory}/{_FOLDER}"):
        os.unlink(parked_path(directory, number))


def parked_lines(path: str, offset: int, size: int) -> Iterator[tuple[bytes, int]]:
    """Yield the records of a file, each with the place behind it.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        while offset < size:
            line = file.readline()
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield line[:-1], offset


def _token(line: bytes) -> int:
    try:
        return msgspec.json.decode(line, type=_Sender).proc
    except msgspec.MsgspecError:
        return 0


def _entry(line: bytes) -> Entry:
    """Return a record on its way; without it, if the file was damaged there."""
    try:
        record = decode(line)
    except msgspec.MsgspecError:
        return Entry(None, f"damaged-{hash(line)}", 0, None, len(line))
    return Entry(record, record.id, record.proc, None, len(line))


def _numbers(directory: str) -> list[int]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(int(name[:-7]) for name in names if name.endswith(".ndjson") and name[:-7].isdecimal())


def _write(directory: str, path: str, lines: bytes, at: int) -> None:
    os.makedirs(directory, 0o700, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.ftruncate(descriptor, at)
        view, offset = memoryview(lines), 0
        while offset < len(lines):
            written = os.pwrite(descriptor, view[offset:], at + offset)
            if not written:
                raise OSError(errno.ENOSPC, "a parked run was written in part", path)
            offset += written
    finally:
        os.close(descriptor)
