"""Looking into a spool from outside: what waits there, what is torn, who works there.

For `waxell-workers spool` and `doctor`. It reads while workers write and a shipper ships, and leaves no
trace: it creates, seals, rotates and deletes nothing and takes no lock of ours. What it says is true of the
moment at which it looked; a segment that is delivered and deleted meanwhile is left out.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from .encoding import decode
from .liveness import Holder, holder
from .parking import arrived, parked_lines, parked_path
from .records import FORMAT_VERSION, Record, TaskLost
from .segments import (
    FIRST_LINE,
    Position,
    is_first_line,
    is_sealed,
    segment_numbers,
    segment_path,
    version_of,
)

_CHUNK = 1 << 20
_RECENT = 50_000
_HASH_DIGITS = 16
_LEDGER_TRIES = 5
_LEDGER_PAUSE_S = 0.05
_EVERYTHING = 1 << 62

TORN = "torn"
DAMAGED = "damaged"
UNKNOWN = "unknown"
NO_FIRST_LINE = "no first line"


# -- destinations ------------------------------------------------------------------------------


def destinations(root: str) -> list[str]:
    """Return the names of the destinations' directories in a spool.

    Raises:
        OSError: the spool cannot be read.
    """
    return sorted(
        name for name in os.listdir(root) if _is_hash(name) and os.path.isdir(os.path.join(root, name))
    )


def _is_hash(name: str) -> bool:
    return len(name) == _HASH_DIGITS and not name.strip("0123456789abcdef")


# -- segments ----------------------------------------------------------------------------------


class BadLine(NamedTuple):
    """A line that is no record: passed over by the shipper."""

    offset: int
    """Bytes from the segment's beginning."""
    size: int
    why: str
    """`torn` (cut off: its writer died in the middle of it, or the disk was full), `damaged` (no JSON at
    all), `unknown` (JSON, but no record that this version knows), or `no first line`."""


class Line(NamedTuple):
    """A record as it stands in a segment."""

    record: Record
    text: bytes
    """The line, without its newlines."""
    end: Position


class SegmentScan:
    """One segment, read from its beginning to the end that it had when it was opened.

    `bad`, `records` and `unfinished` are complete once `lines` is exhausted.
    """

    def __init__(self, directory: str, number: int) -> None:
        """Open the segment.

        Raises:
            OSError: it is gone, or cannot be read.
        """
        self._descriptor = os.open(
            segment_path(directory, number), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        )
        status = os.fstat(self._descriptor)
        self.number = number
        self.inode = status.st_ino
        self.size = status.st_size
        self.written_at = status.st_mtime
        """Unix time of the last write."""
        self.sealed = is_sealed(self._descriptor)
        self.version = _version(os.pread(self._descriptor, 4 * len(FIRST_LINE), 0))
        """Version of the format; 0 if the first line does not say."""
        self.records = 0
        self.bad: list[BadLine] = []
        self.unfinished = 0
        """Bytes at the end without a newline: being written, or torn."""

    @property
    def is_newer(self) -> bool:
        """True if a newer version wrote it: what it says cannot be judged here."""
        return self.version > FORMAT_VERSION

    def __enter__(self) -> SegmentScan:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._descriptor)

    def lines(self) -> Iterator[Line]:
        """Yield the records in order; once."""
        if not self.version:
            self.bad.append(BadLine(0, 0, NO_FIRST_LINE))
        for offset, text in self._texts():
            if not text or is_first_line(text):
                continue
            try:
                record = decode(text)
            except msgspec.MsgspecError as error:
                if not self.is_newer:
                    self.bad.append(BadLine(offset, len(text), _why(error)))
                continue
            self.records += 1
            yield Line(record, text, Position(self.number, offset + len(text) + 1))

    def _texts(self) -> Iterator[tuple[int, bytes]]:
        offset, rest = 0, b""
        while (at := offset + len(rest)) < self.size:
            chunk = os.pread(self._descriptor, min(_CHUNK, self.size - at), at)
            if not chunk:
                break
            rest += chunk
            complete = rest.rfind(b"\n") + 1
            for text in rest[:complete].split(b"\n")[:-1]:
                yield offset, text
                offset += len(text) + 1
            rest = rest[complete:]
            if len(rest) >= _CHUNK:  # no record is that long
                self.bad.append(BadLine(offset, len(rest), DAMAGED))
                offset, rest = offset + len(rest), b""
        self.unfinished = len(rest)


def _version(beginning: bytes) -> int:
    first, newline, _ = beginning.partition(b"\n")
    return version_of(first) if newline and is_first_line(first) else 0


def _why(error: msgspec.MsgspecError) -> str:
    if isinstance(error, msgspec.ValidationError):
        return UNKNOWN
    return TORN if "truncated" in str(error) else DAMAGED


# -- the ledger --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LedgerState:
    """What the shipper has written down."""

    cursor: Position | None = None
    inode: int = 0
    acknowledged: frozenset[str] = frozenset()
    """Ids above the cursor that have arrived."""
    recent: frozenset[str] = frozenset()
    """The last ids that the cursor has passed: what repeats are known by."""
    parked: tuple[tuple[int, int, int], ...] = ()
    """The runs that were moved aside: file, the place up to which it has arrived, and its end."""
    problem: str = ""
    """Why it cannot be read; the shipper then begins a new one and delivers the journal again."""
    exists: bool = True

    def start(self, directory: str) -> Position:
        """Return where a shipper would take up reading.

        Raises:
            OSError: the directory cannot be read.
        """
        numbers = segment_numbers(directory)
        lowest = Position(numbers[0] if numbers else 1, 0)
        return lowest if self.cursor is None or self.misplaced(directory) else self.cursor

    def misplaced(self, directory: str) -> str:
        """Return why the cursor does not fit the segments, or an empty string.

        Raises:
            OSError: the directory cannot be read.
        """
        if self.cursor is None:
            return ""
        number, offset = self.cursor
        try:
            status = os.stat(segment_path(directory, number))
        except FileNotFoundError:
            return f"its segment {number:06d} is gone"
        if status.st_ino != self.inode:
            return f"segment {number:06d} is another file than it was"
        if status.st_size < offset:
            return f"segment {number:06d} is shorter than it was"
        return ""


def read_ledger(directory: str, *, thoroughly: bool = False) -> LedgerState:
    """Read `shipper.db`, also while a shipper writes to it.

    Args:
        directory: the destination's directory.
        thoroughly: True to check every page and index for damage.
    """
    if not os.path.exists(f"{directory}/shipper.db"):
        return LedgerState(exists=False)
    for tries_left in reversed(range(_LEDGER_TRIES)):
        try:
            with _database(directory) as db:
                return _state(db, thoroughly=thoroughly)
        except sqlite3.OperationalError as error:  # a shipper is just opening, or closing, it
            if not tries_left:
                return LedgerState(problem=str(error))
            time.sleep(_LEDGER_PAUSE_S)
        except (sqlite3.DatabaseError, OSError) as error:
            return LedgerState(problem=str(error))
    raise AssertionError


def _state(db: sqlite3.Connection, *, thoroughly: bool) -> LedgerState:
    if thoroughly:
        [verdict] = db.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            return LedgerState(problem=" ".join(str(verdict).split()))
    db.execute("BEGIN")  # one moment for all that follows
    row = db.execute("SELECT segment, offset, inode FROM cursor").fetchone()
    return LedgerState(
        cursor=Position(row[0], row[1]) if row else None,
        inode=row[2] if row else 0,
        acknowledged=frozenset(row[0] for row in db.execute("SELECT id FROM acknowledged")),
        recent=frozenset(row[0] for row in db.execute("SELECT id FROM recent")),
        parked=tuple(db.execute("SELECT number, offset, size FROM parked") if _has_parking(db) else ()),
    )


def _has_parking(db: sqlite3.Connection) -> bool:
    """False if an older version made the ledger, and no newer one has opened it yet."""
    return bool(db.execute("SELECT 1 FROM sqlite_master WHERE name = 'parked'").fetchone())


@contextmanager
def _database(directory: str) -> Iterator[sqlite3.Connection]:
    """Open the ledger so that nothing beside it is created.

    SQLite would make `-wal` and `-shm` for a reader too. Where a shipper is at work, or was killed, both are
    there, and are only read. Where it has left properly there is no `-wal`, and nobody writes. `-wal` alone
    is found in a copy of a spool.
    """
    path = f"{directory}/shipper.db"
    has_log = os.path.exists(f"{path}-wal")
    if has_log and not os.path.exists(f"{path}-shm"):
        with tempfile.TemporaryDirectory(prefix="waxell-ledger-") as copy:
            for suffix in ("", "-wal"):
                shutil.copyfile(path + suffix, f"{copy}/shipper.db{suffix}")
            with _connected(f"{copy}/shipper.db", "mode=ro") as db:
                yield db
        return
    with _connected(path, "mode=ro&readonly_shm=1" if has_log else "mode=ro&immutable=1") as db:
        yield db


@contextmanager
def _connected(path: str, options: str) -> Iterator[sqlite3.Connection]:
    quoted = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    db = sqlite3.connect(f"file:{quoted}?{options}", uri=True, timeout=1.0, isolation_level=None)
    try:
        yield db
    finally:
        db.close()


# -- who works there ---------------------------------------------------------------------------


_opened: dict[tuple[int, int], int] = {}
"""(device, inode) to descriptor; never closed, since a process's own locks on a file go with any of them."""


def holders(path: str) -> list[Holder]:
    """Return who holds locks on `procs` or `ship.lock`, this process excepted; asks, never takes."""
    try:
        status = os.stat(path)
        file = (status.st_dev, status.st_ino)
        if file not in _opened:
            _opened[file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # nobody has been here, or it is not ours to read
        return []
    return sorted(_holders(_opened[file], 0, _EVERYTHING))


def _holders(descriptor: int, start: int, end: int) -> Iterator[Holder]:
    """Find the locks between two offsets: the kernel names one at a time, and not the lowest first."""
    if start >= end:
        return
    found = holder(descriptor, start, end - start)
    if found is None:
        return
    yield found
    yield from _holders(descriptor, start, found.token)
    yield from _holders(descriptor, found.token + 1, end)


# -- a whole destination -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """What one segment holds."""

    number: int
    size: int
    written_at: float
    version: int
    sealed: bool
    records: int
    bad: tuple[BadLine, ...]
    unfinished: int

    @property
    def torn(self) -> int:
        """Lines that are no records."""
        return len(self.bad)

    @property
    def is_newer(self) -> bool:
        """True if a newer version wrote it: what it says cannot be judged here."""
        return self.version > FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class Survey:
    """What one destination's directory holds."""

    directory: str
    segments: tuple[SegmentReport, ...]
    pending: int
    """Records that have not arrived."""
    oldest_at: float | None
    """When the oldest of them was made, Unix time."""
    ledger: LedgerState
    shipper: Holder | None
    writers: tuple[Holder, ...]
    quarantined: int
    """Records that the server refused for good."""

    @property
    def destination(self) -> str:
        """The destination's hash."""
        return os.path.basename(self.directory)

    @property
    def size(self) -> int:
        """Bytes of all segments."""
        return sum(segment.size for segment in self.segments)

    @property
    def records(self) -> int:
        """Records in all segments, delivered or not."""
        return sum(segment.records for segment in self.segments)

    @property
    def torn(self) -> int:
        """Lines that are no records."""
        return sum(segment.torn for segment in self.segments)


@dataclass(slots=True)
class Walk:
    """A destination's journal, read once, in order; `segments` fills up on the way."""

    directory: str
    ledger: LedgerState
    everything: bool = False
    """True for every record that is still there, False for those that have not arrived."""
    segments: list[SegmentReport] = field(default_factory=list)

    def lines(self) -> Iterator[Line]:
        """Yield each record once: a writer that was overtaken by a seal has written it twice.

        Raises:
            OSError: the directory cannot be read.
        """
        start = self.ledger.start(self.directory)
        known = () if self.everything else self.ledger.recent
        seen: OrderedDict[str, None] = OrderedDict.fromkeys(known)
        yield from self._parked()
        for number in segment_numbers(self.directory):
            try:
                scan = SegmentScan(self.directory, number)
            except FileNotFoundError:  # delivered since the listing
                continue
            with scan:
                for line in scan.lines():
                    if not self.everything and not self._is_pending(line, start):
                        continue
                    if line.record.id in seen:
                        continue
                    seen[line.record.id] = None
                    if len(seen) > _RECENT:
                        seen.popitem(last=False)
                    yield line
            self.segments.append(_report(scan))

    def _parked(self) -> Iterator[Line]:
        for number, offset, size in self.ledger.parked:
            try:
                for text, _ in parked_lines(parked_path(self.directory, number), offset, size):
                    record = decode(text)
                    if arrived(record.id) not in self.ledger.acknowledged:
                        yield Line(record, text, Position(0, 0))
            except (FileNotFoundError, msgspec.MsgspecError):  # delivered meanwhile, or damaged
                continue

    def _is_pending(self, line: Line, start: Position) -> bool:
        return (
            line.end > start
            and line.record.id not in self.ledger.acknowledged
            and not isinstance(line.record, TaskLost)  # never sent: it explains a run's end
        )


def _report(scan: SegmentScan) -> SegmentReport:
    return SegmentReport(
        number=scan.number,
        size=scan.size,
        written_at=scan.written_at,
        version=scan.version,
        sealed=scan.sealed,
        records=scan.records,
        bad=tuple(scan.bad),
        unfinished=scan.unfinished,
    )


def survey(directory: str) -> Survey:
    """Look at a destination's directory as a whole.

    Raises:
        OSError: it cannot be read.
    """
    # The ledger first: what is delivered while we read counts as pending, and nothing the other way round.
    walk = Walk(directory, read_ledger(directory))
    pending, oldest_at = 0, None
    for line in walk.lines():
        pending += 1
        oldest_at = line.record.at if oldest_at is None else min(oldest_at, line.record.at)
    return Survey(
        directory=directory,
        segments=tuple(walk.segments),
        pending=pending,
        oldest_at=oldest_at,
        ledger=walk.ledger,
        shipper=next(iter(holders(f"{directory}/ship.lock")), None),
        writers=tuple(holders(f"{directory}/procs")),
        quarantined=_quarantined(directory),
    )


def _quarantined(directory: str) -> int:
    count = 0
    for name in ("quarantine.ndjson", "quarantine.ndjson.1"):
        try:
            with open(f"{directory}/{name}", "rb") as file:
                count += sum(1 for _ in file)
        except FileNotFoundError:
            continue
    return count
