"""The store: one SQLite file (WAL), one writer at a time, any number of readers beside it.

A write is one transaction, committed when `write()` is left; after that the death of the process does not
undo it. The file is capped by a number of runs and by its size: the oldest that have ended go first. A
`Store` may be used by several threads, and a file by several processes, so that the command line reads it
while a server writes.

What was written is acknowledged only if it stands in the file at the store's path: one that was deleted or
replaced meanwhile is begun anew, and so is one that turns out to be damaged (`schema.move_aside`).
"""

from __future__ import annotations

import logging
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.errors import ConfigError
from . import attempts, lineage, queries, schema, spend, values, waits
from .model import RUNNING, Group, QueueWait, RunDetail, RunSummary, Spend, Stats, Total, Tree, WaitOf, Waste
from .values import dumps
from .writes import Writer

logger = logging.getLogger("waxell_workers.server")

_Identity = tuple[tuple[int, int], ...]

MAX_RUNS = 100_000
"""How many runs are kept unless said otherwise."""

MAX_SIZE = 1 << 30
"""How many bytes of the file may be in use unless said otherwise."""


_PIECE = 256 * 1024


class Store:
    """Runs in a database file.

    Args:
        path: the file, made if there is none; None keeps the data in a temporary file that `close` removes.
        max_runs: how many runs are kept; beyond, the oldest ended ones are deleted, down to this number.
        max_size: how many bytes of the file may be in use; beyond, the same.
        read_only: open a file that exists, and never write.

    Raises:
        ConfigError: the file cannot be used, or is no database of this server.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        max_runs: int = MAX_RUNS,
        max_size: int = MAX_SIZE,
        read_only: bool = False,
    ) -> None:
        if max_runs < 1:
            raise ConfigError("max_runs", max_runs, "expected a whole number above 0")
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if path is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="waxell-workers-")
            path = Path(self._temporary.name) / "runs.db"
        self.path = Path(path)
        self.max_runs = max_runs
        self.max_size = max_size
        self._slack = max_runs // 1000  # counting the rows costs: not after every single run of a large file
        self._added = 0
        self._lock = threading.Lock()
        """For the fields; held for a moment, so that nobody who reads waits for somebody who writes."""
        self._turn = threading.Lock()
        """For the writer: one at a time."""
        self._readers: list[sqlite3.Connection] = []
        self._closed = False
        self._read_only = read_only
        self._writer: sqlite3.Connection | None = None
        self._file: _Identity = ()
        self._version = schema.VERSION
        self._suspect = False
        """Somebody who read met damage: the next write looks at the whole file."""
        if read_only:
            self._check_readable()
        else:
            self._begin()

    def close(self) -> None:
        """Close all connections; a temporary file is removed. A second call does nothing."""
        with self._turn:
            with self._lock:
                self._closed = True
            self._let_go()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def write(self) -> Iterator[Writer]:
        """Open a transaction: committed when the block is left, taken back when it raises.

        Raises:
            sqlite3.Error: nothing was stored: the disk is full, the file was taken away, or is locked for
                longer than `schema.BUSY_S`. It is worth another try.
        """
        if not self._turn.acquire(timeout=2 * schema.BUSY_S):
            raise sqlite3.OperationalError("others write: this one had to wait for too long")
        try:
            connection = self._writing()
            try:
                connection.execute("BEGIN IMMEDIATE")
                writer = Writer(connection)
                yield writer
                self._retain(connection, writer.runs_added)
                connection.execute("COMMIT")
            except BaseException as error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error) and schema.is_damage(error):
                    self._replace(error)
                raise
            if _identity(self.path) != self._file:  # committed to a file that nobody will find again
                raise sqlite3.OperationalError("the file was taken away")
        finally:
            self._turn.release()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection that sees one state of the database for as long as the block lasts."""
        with self._lock:
            file, pooled = self._file, self._readers.pop() if self._readers else None
        connection = pooled or schema.connect(self.path, query_only=True, version=self._version)
        try:
            connection.execute("BEGIN")
            yield connection
        except sqlite3.Error as error:
            self._suspect = self._suspect or schema.is_damage(error)
            raise
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            with self._lock:
                keep = not self._closed and file == self._file
                if keep:
                    self._readers.append(connection)
            if not keep:
                connection.close()

    def runs(self, limit: int = 50, agent: str = "", status: str = "", before: str = "") -> list[RunSummary]:
        """List runs, newest first.

        Args:
            limit: at most so many.
            agent: only runs with exactly this agent name, if not empty.
            status: only runs with this status, if not empty.
            before: only runs older than this one (a run id) or that began before this time (ISO 8601).

        Raises:
            ValueError: `before` is neither a stored run nor a time.
        """
        with self.read() as connection:
            return queries.runs(connection, limit=limit, agent=agent, status=status, before=before)

    def run(self, run_id: str) -> RunDetail | None:
        """Return a run with its calls, steps, spans and scores; None if it is not stored."""
        with self.read() as connection:
            return queries.run(connection, run_id)

    def page(self, run_id: str, extent: queries.Extent) -> tuple[RunDetail, dict[str, int]] | None:
        """Return as much of a run as a page shows, and how long its lists are; None if it is not stored."""
        with self.read() as connection:
            found = queries.run(connection, run_id, extent)
            return None if found is None else (found, queries.lengths(connection, run_id))

    def summary(self, run_id: str) -> RunSummary | None:
        """Return a run as a list shows it; None if it is not stored."""
        with self.read() as connection:
            return queries.summary(connection, run_id)

    def stream(self, run_id: str, *, subtotal: bool = False) -> Iterator[bytes]:
        """Yield a run as JSON, as `run` returns it, in pieces; nothing if it is not stored.

        Args:
            run_id: the run.
            subtotal: add what `subtotal` returns, under that name.
        """
        with self.read() as connection:
            head = queries.head(connection, run_id)
            if head is None:
                return
            if subtotal:
                head["subtotal"] = lineage.subtotal(connection, run_id)
            piece = bytearray(dumps(head).encode()[:-1])
            for name, items in queries.belongings(connection, run_id):
                piece += f',"{name}":['.encode()
                for number, item in enumerate(items):
                    piece += b"," * (number > 0) + dumps(item).encode()
                    if len(piece) >= _PIECE:
                        yield bytes(piece)
                        piece.clear()
                piece += b"]"
            yield bytes(piece + b"}")

    def has_run(self, run_id: str) -> bool:
        """Tell whether anything of this run is stored."""
        with self.read() as connection:
            return queries.has_run(connection, run_id)

    def related(self, run: RunDetail) -> tuple[list[RunSummary], list[RunSummary]]:
        """Return the attempts of the run's task (itself included, oldest first) and the runs it started."""
        with self.read() as connection:
            return queries.attempts(connection, run["task_id"]), queries.children(connection, run["run_id"])

    def linked(self, run_id: str, limit: int = queries.RELATED) -> list[RunSummary]:
        """Return the first runs that this one enqueued without being their parent (`propagate="link"`)."""
        with self.read() as connection:
            return queries.linked(connection, run_id, limit)

    def tree(self, run_id: str) -> Tree | None:
        """Return the tree that a run is in: its trace, from its topmost ancestor down.

        Returns:
            The tree; None if the run is not stored.
        """
        with self.read() as connection:
            return lineage.tree(connection, run_id)

    def trace(self, trace_id: str) -> Tree | None:
        """Return the tree of a trace; None if no run of it is stored.

        Args:
            trace_id: 32 hexadecimal digits; or the id of the root run, where runs have no trace id.
        """
        with self.read() as connection:
            return lineage.trace(connection, trace_id)

    def subtotal(self, run_id: str) -> Total | None:
        """Sum up a run and all below it; None if it is not stored."""
        with self.read() as connection:
            return lineage.subtotal(connection, run_id)

    def task(self, task_id: str) -> Group | None:
        """Return the attempts of a task, and their sums; None if no run of it is stored."""
        with self.read() as connection:
            return attempts.group(connection, task_id)

    def wait_of(self, run_id: str) -> WaitOf | None:
        """Return how long a run waited, and what is usual in its queue; None if it is not stored."""
        with self.read() as connection:
            return waits.wait_of(connection, run_id)

    def queues(self, since: str = "", limit: int = 50) -> list[QueueWait]:
        """Return how long runs waited in each queue, the slowest first: by the wait that 95 % did not exceed.

        Args:
            since: only runs that began then or later: an ISO 8601 time, or a span such as `24h`; empty for
                all.
            limit: at most so many.

        Raises:
            ValueError: `since` is neither.
        """
        from_s = values.since(since, time.time())
        with self.read() as connection:
            return waits.queues(connection, since=from_s, limit=limit)

    def spend(self, by: str = "task", since: str = "", limit: int = 50) -> list[Spend]:
        """Return what each task, queue, model, … has cost, the dearest first.

        Args:
            by: one of `spend.DIMENSIONS`. Money is the runs' own, but by `model`, which is of single calls.
            since: only runs (by `model`, calls) that began then or later; as in `queues`.
            limit: at most so many.

        Raises:
            ValueError: `by` or `since` is not one of these.
        """
        if by not in spend.DIMENSIONS:
            raise ValueError(f"by: expected {', '.join(spend.DIMENSIONS[:-1])} or {spend.DIMENSIONS[-1]}")
        from_s = values.since(since, time.time())
        with self.read() as connection:
            return spend.spend(connection, by=by, since=from_s, limit=limit)

    def spent(self, since: str = "") -> Total:
        """Return what all runs have cost.

        Args:
            since: only runs that began then or later; as in `queues`.

        Raises:
            ValueError: `since` is no time.
        """
        from_s = values.since(since, time.time())
        with self.read() as connection:
            return spend.total(connection, since=from_s)

    def waste(self, since: str = "", limit: int = 50) -> Waste:
        """Sum up what attempts have cost that ended neither in success nor ignored, in all and by the error.

        Args:
            since: only runs that began then or later; as in `queues`.
            limit: at most so many errors.

        Raises:
            ValueError: `since` is no time.
        """
        from_s = values.since(since, time.time())
        with self.read() as connection:
            return spend.waste(connection, since=from_s, limit=limit)

    def agents(self) -> list[str]:
        """Return the names of the agents, sorted, at most 500."""
        with self.read() as connection:
            return queries.agents(connection)

    def stats(self, agent: str = "") -> Stats:
        """Count what is stored: for one agent if it is named, else for all."""
        with self.read() as connection:
            return queries.stats(connection, agent)

    def _check_readable(self) -> None:
        if not self.path.is_file():
            raise ConfigError(
                "db", str(self.path), "expected the database of a server; there is no such file"
            )
        try:
            with self.read() as connection:
                version = schema.check(connection, self.path)
            if version < schema.VERSION:
                self._let_go()  # connections from now on hide how old it is
                self._version = version
        except ConfigError:
            self.close()
            raise
        except sqlite3.Error as error:
            self.close()
            raise ConfigError("db", str(self.path), f"expected a database of this server ({error})") from None

    def _begin(self) -> None:
        """Open the file that is at the path, or a new one."""
        writer = schema.create(self.path)
        with self._lock:
            self._writer = writer
            self._file = _identity(self.path)

    def _let_go(self) -> None:
        """Close all connections but those in use by a reader, which closes its own."""
        with self._lock:
            connections = [*self._readers, *([self._writer] if self._writer else [])]
            self._readers.clear()
            self._writer = None
            self._file = ()
        for connection in connections:
            connection.close()

    def _writing(self) -> sqlite3.Connection:
        """Return the connection that writes, to the file that is at the path now."""
        if self._closed or self._read_only:
            raise sqlite3.ProgrammingError("the store is closed, or was opened to read")
        if self._writer is None or _identity(self.path) != self._file:
            if self._writer is not None:
                logger.error("%s was taken away while it was in use: a new one is begun", self.path)
            self._let_go()
            self._try_again()
        if self._suspect:
            self._suspect = False
            try:
                schema.examine(self.path)
            except sqlite3.Error as error:
                if schema.is_damage(error):
                    self._replace(error)
        return self._not_none()

    def _not_none(self) -> sqlite3.Connection:
        assert self._writer is not None
        return self._writer

    def _replace(self, error: sqlite3.Error) -> None:
        """Put a damaged file aside and begin a new one; what was being written is not stored."""
        self._let_go()
        try:
            schema.move_aside(self.path, str(error))
        except ConfigError as problem:
            raise sqlite3.OperationalError(str(problem)) from None
        self._try_again()

    def _try_again(self) -> None:
        try:
            self._begin()
        except ConfigError as error:  # the next write tries once more
            raise sqlite3.OperationalError(str(error)) from None

    def _retain(self, connection: sqlite3.Connection, added: int) -> None:
        self._added += added
        if added and self._added > self._slack:
            self._added = 0
            self._delete(connection, _count(connection) - self.max_runs)
        while _size(connection) > self.max_size and (runs := _count(connection)):
            self._delete(connection, max(runs // 100, 1))

    def _delete(self, connection: sqlite3.Connection, count: int) -> None:
        if count <= 0:
            return
        connection.execute(
            "DELETE FROM runs WHERE run_id IN (SELECT run_id FROM runs"
            " ORDER BY status = ?, started_at, run_id LIMIT ?)",
            (RUNNING, count),
        )
        connection.execute(
            "DELETE FROM records WHERE run_id IS NULL AND at < (SELECT min(started_at) FROM runs)"
        )


def _count(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM runs").fetchone()[0])


def _size(connection: sqlite3.Connection) -> int:
    pages, free, size = (
        int(connection.execute(f"PRAGMA {name}").fetchone()[0])
        for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def _identity(path: Path) -> _Identity:
    """Tell which files stand at the path: the database, and the log of writes beside it."""
    found = []
    for name in (path, f"{path}-wal"):  # no second one where the file system has no shared memory
        with suppress(OSError):
            found.append(os.stat(name))
    return tuple((each.st_dev, each.st_ino) for each in found)
