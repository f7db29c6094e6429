"""What the shipper knows, in SQLite beside the journal: survives the shipper, is written by it alone.

One transaction per batch holds the cursor, the ids that were acknowledged above it, the open runs with the
server's ids for them, and the calls that were put into automatic runs. A ledger that cannot be read is moved
aside: then the journal is delivered again from its beginning, and `ingest` drops the repeats. Where the disk
is full the reserve is given up for it, and until there is one again, it remembers no run that has ended.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType

import msgspec

from . import reserve
from .encoding import to_json
from .exporting import RunState
from .reader import NewerJournal
from .records import RunStarted, TaskLost
from .room import with_room
from .segments import Position

_SCHEMA = """
CREATE TABLE IF NOT EXISTS cursor (one INTEGER PRIMARY KEY CHECK (one = 1), segment INTEGER, inode INTEGER, offset INTEGER);
CREATE TABLE IF NOT EXISTS acknowledged (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS recent (number INTEGER PRIMARY KEY, id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS grouped (call_id TEXT PRIMARY KEY, run_id TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS runs (
    run_id TEXT PRIMARY KEY, started BLOB NOT NULL, remote_id TEXT NOT NULL, spans INTEGER NOT NULL,
    automatic INTEGER NOT NULL, lost BLOB, ended_at REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owner (one INTEGER PRIMARY KEY CHECK (one = 1), destination TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS failing (run_id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS parked (
    run_id TEXT PRIMARY KEY, number INTEGER NOT NULL, offset INTEGER NOT NULL, size INTEGER NOT NULL,
    ended INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS runs_ended ON runs (ended_at);
CREATE TABLE IF NOT EXISTS deaths (id TEXT PRIMARY KEY, times INTEGER NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
PRAGMA user_version = 1;
"""  # noqa: E501
_VERSION = 1
_REMEMBERED = 2_000
"""How many ids before the cursor are kept: a writer that met a seal writes its last record again."""
_ENDED_RUNS_KEPT = 20_000
_ENDED_RUNS_KEPT_S = 3600.0


@dataclass(slots=True)
class TrackedRun:
    """A run, from the record that began it to the acknowledgement of the one that ended it."""

    state: RunState
    automatic: bool = False
    """True for a run that the shipper made for calls outside any run."""
    lost: TaskLost | None = None
    """What the supervising process said about the task's end."""
    ended: bool = False
    """True once an end was read or made."""
    delivered: bool = False
    """True once the end was acknowledged."""

    @property
    def run_id(self) -> str:
        """The client's id of the run."""
        return self.state.started.run_id

    @property
    def made_here(self) -> tuple[str, ...]:
        """The suffixes of the ids of records that a shipper may have made for this run."""
        return ("start", "killed", "end") if self.automatic else ("start", "killed")


class ParkedRun(msgspec.Struct, frozen=True):
    """A run that was moved aside (`parking`), and how much of its file is what."""

    run_id: str
    number: int
    """The file's."""
    offset: int
    """Everything before it has arrived."""
    size: int
    """What is behind it was never committed."""
    ended: bool
    """True if its end is in the file."""


class Ledger:
    """One destination's `shipper.db`. Used by one thread."""

    def __init__(self, directory: str) -> None:
        """Open or make the file.

        Raises:
            NewerJournal: a newer version has made it.
            sqlite3.Error: it can neither be read nor replaced.
        """
        path = f"{directory}/shipper.db"
        self._directory = directory
        try:
            self._db = with_room(directory, lambda: _open(path))
        except sqlite3.OperationalError:  # locked, read-only, disk full: not damage
            raise
        except sqlite3.DatabaseError:
            os.replace(path, f"{path}.damaged")
            for suffix in ("-wal", "-shm"):
                if os.path.exists(path + suffix):
                    os.unlink(path + suffix)
            self._db = with_room(directory, lambda: _open(path))

    def belongs_to(self, destination: str) -> bool:
        """Say where the records go from now on; true if that is what the directory was made for.

        A server's ids of runs mean nothing to another account, or a stranger's run: they are forgotten.
        """
        original = os.path.basename(self._directory)
        row = self._db.execute("SELECT destination FROM owner").fetchone()
        if destination != (row[0] if row else original):
            with_room(self._directory, lambda: self._change_owner(destination))
        return destination == original

    def _change_owner(self, destination: str) -> None:
        with self._db:
            self._db.execute("UPDATE runs SET remote_id = '', spans = 0")
            self._db.execute("DELETE FROM acknowledged WHERE id LIKE '%-start'")  # made here, for the other
            self._db.execute("INSERT OR REPLACE INTO owner VALUES (1, ?)", (destination,))

    def cursor(self) -> tuple[Position | None, int]:
        """Return where reading goes on, and the inode of the segment there."""
        row = self._db.execute("SELECT segment, offset, inode FROM cursor").fetchone()
        return (Position(row[0], row[1]), row[2]) if row else (None, 0)

    def acknowledged(self) -> set[str]:
        """Return the ids above the cursor that were acknowledged."""
        return {row[0] for row in self._db.execute("SELECT id FROM acknowledged")}

    def recent(self) -> list[str]:
        """Return the last ids that the cursor has passed, to know repeats by."""
        return [row[0] for row in self._db.execute("SELECT id FROM recent ORDER BY number")]

    def open_runs(self) -> list[TrackedRun]:
        """Return the runs whose end was not delivered."""
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM runs WHERE ended_at IS NULL")
        return [_run(row) for row in rows]

    def run(self, run_id: str) -> TrackedRun | None:
        """Return a run that is known here, ended or not."""
        row = self._db.execute(f"SELECT {_COLUMNS} FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        return _run(row) if row else None

    def failing(self) -> set[str]:
        """Return the runs that have failed while the server took others."""
        return {row[0] for row in self._db.execute("SELECT run_id FROM failing")}

    def parked(self) -> list[ParkedRun]:
        """Return the runs that were moved aside."""
        rows = self._db.execute("SELECT run_id, number, offset, size, ended FROM parked")
        return [ParkedRun(row[0], row[1], row[2], row[3], bool(row[4])) for row in rows]

    def grouped(self) -> dict[str, str]:
        """Return the calls that were put into automatic runs and are not delivered: call id to run id."""
        return dict(self._db.execute("SELECT call_id, run_id FROM grouped").fetchall())

    def group(self, run: TrackedRun, call_ids: Sequence[str]) -> None:
        """Remember an automatic run and its calls before they are exported: a repeat groups them alike."""
        with_room(self._directory, lambda: self._group(run, call_ids))

    def _group(self, run: TrackedRun, call_ids: Sequence[str]) -> None:
        with self._db:
            self._save_run(run)
            self._db.executemany(
                "INSERT OR IGNORE INTO grouped VALUES (?, ?)", [(call_id, run.run_id) for call_id in call_ids]
            )

    def commit(
        self,
        cursor: Position,
        inode: int,
        *,
        done_above: Iterable[str],
        passed: Iterable[str],
        runs: Iterable[TrackedRun],
        parked: Mapping[str, ParkedRun | None] = MappingProxyType({}),
        failing: Mapping[str, bool] = MappingProxyType({}),
    ) -> None:
        """Write down what a batch has achieved, all or nothing.

        Args:
            cursor: everything before it has arrived, or was given up and counted.
            inode: the inode of the segment at the cursor.
            done_above: ids above the cursor that have arrived since the last commit.
            passed: ids that the cursor has passed since then.
            runs: runs that have changed.
            parked: parked runs that have changed; None for those that are no longer parked.
            failing: runs that have begun to fail while the server took others; False if they no longer do.
        """
        place = (cursor.segment, inode, cursor.offset)
        above, gone = [(i,) for i in done_above], [(i,) for i in passed]
        changed = list(runs)
        with_room(self._directory, lambda: self._commit(place, above, gone, changed, parked, failing))

    def _commit(
        self,
        place: tuple[int, int, int],
        above: list[tuple[str]],
        gone: list[tuple[str]],
        runs: list[TrackedRun],
        parked: Mapping[str, ParkedRun | None],
        failing: Mapping[str, bool],
    ) -> None:
        scarce = not reserve.is_kept(self._directory)
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO cursor VALUES (1, ?, ?, ?)", place)
            self._db.executemany("INSERT OR IGNORE INTO acknowledged VALUES (?)", above)
            self._db.executemany("DELETE FROM acknowledged WHERE id = ?", gone)
            self._db.executemany("DELETE FROM grouped WHERE call_id = ?", gone)
            self.remember(gone)
            for run_id, fails in failing.items():
                how = (
                    "INSERT OR IGNORE INTO failing VALUES (?)"
                    if fails
                    else "DELETE FROM failing WHERE run_id = ?"
                )
                self._db.execute(how, (run_id,))
            self._db.executemany("DELETE FROM parked WHERE run_id = ?", [(run_id,) for run_id in parked])
            self._db.executemany(
                "INSERT INTO parked VALUES (?, ?, ?, ?, ?)",
                [msgspec.structs.astuple(row) for row in parked.values() if row is not None],
            )
            for run in runs:
                if scarce and run.delivered:
                    self._db.execute("DELETE FROM runs WHERE run_id = ?", (run.run_id,))
                else:
                    self._save_run(run)
        if scarce:
            with suppress(sqlite3.OperationalError):  # so that the next commit uses the same room in the WAL
                self._db.execute("PRAGMA wal_checkpoint").fetchall()

    def remember(self, gone: Iterable[tuple[str]]) -> None:
        """Keep these ids, and the last ones before them; a part of `commit`'s transaction."""
        self._db.executemany("INSERT INTO recent (id) VALUES (?)", gone)
        oldest = "SELECT max(number) - ? FROM recent"
        self._db.execute(f"DELETE FROM recent WHERE number <= ({oldest})", (_REMEMBERED,))

    def count_death(self, record_id: str) -> None:
        """Count that a shipper died with this record, and no other, in hand."""
        with_room(self._directory, lambda: self._count_death(record_id))

    def _count_death(self, record_id: str) -> None:
        count = "INSERT INTO deaths VALUES (?, 1, ?) ON CONFLICT (id) DO UPDATE SET times = times + 1, at = ?"
        now = time.time()
        with self._db:
            self._db.execute(count, (record_id, now, now))

    def deaths(self) -> dict[str, tuple[int, float]]:
        """Return at how many deaths a record was alone in hand, and when the last one was found."""
        return {row[0]: (row[1], row[2]) for row in self._db.execute("SELECT id, times, at FROM deaths")}

    def forget_deaths(self, ids: Iterable[str]) -> None:
        """Hold nothing against these records any more: they have gone."""
        gone = [(record_id,) for record_id in ids]
        with_room(self._directory, lambda: self._forget_deaths(gone))

    def _forget_deaths(self, gone: list[tuple[str]]) -> None:
        with self._db:
            self._db.executemany("DELETE FROM deaths WHERE id = ?", gone)

    def forget_ended_runs(self) -> None:
        """Delete runs that ended long ago, or too many others ago, for late calls to be expected."""
        with_room(self._directory, self._forget_ended_runs)

    def _forget_ended_runs(self) -> None:
        with self._db:
            self._db.execute("DELETE FROM runs WHERE ended_at < ?", (time.time() - _ENDED_RUNS_KEPT_S,))
            self._db.execute(
                "DELETE FROM runs WHERE ended_at <= (SELECT ended_at FROM runs "
                "WHERE ended_at IS NOT NULL ORDER BY ended_at DESC LIMIT 1 OFFSET ?)",
                (_ENDED_RUNS_KEPT,),
            )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _save_run(self, run: TrackedRun) -> None:
        self._db.execute(
            f"INSERT OR REPLACE INTO runs ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                run.run_id,
                to_json(run.state.started),
                run.state.remote_id,
                run.state.spans,
                run.automatic,
                to_json(run.lost) if run.lost else None,
                time.time() if run.delivered else None,
            ),
        )


_COLUMNS = "run_id, started, remote_id, spans, automatic, lost, ended_at"


def _open(path: str) -> sqlite3.Connection:
    # One thread at a time uses it: the shipper's own, or at exit the one that drains.
    db = sqlite3.connect(path, timeout=5.0, check_same_thread=False)
    try:
        os.chmod(path, 0o600)
        [[version]] = db.execute("PRAGMA user_version")
        if version > _VERSION:
            raise NewerJournal(f"the ledger has version {version}, this is {_VERSION}")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.executescript(_SCHEMA)
        [[verdict]] = db.execute("PRAGMA quick_check(1)")
    except BaseException:
        db.close()
        raise
    if verdict != "ok":
        db.close()
        raise sqlite3.DatabaseError(f"{path}: {verdict}")
    return db


def _run(row: tuple[str, bytes, str, int, int, bytes | None, float | None]) -> TrackedRun:
    _, started, remote_id, spans, automatic, lost, ended_at = row
    return TrackedRun(
        RunState(msgspec.json.decode(started, type=RunStarted), remote_id, spans),
        automatic=bool(automatic),
        lost=msgspec.json.decode(lost, type=TaskLost) if lost else None,
        ended=ended_at is not None,
        delivered=ended_at is not None,
    )
