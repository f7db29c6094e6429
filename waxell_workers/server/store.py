"""The store: one SQLite file (WAL), one writer at a time, any number of readers beside it.

A write is one transaction, committed when `write()` is left; after that the death of the process does not
undo it. The file is capped by a number of runs: the oldest that have ended go first. A `Store` may be used by
several threads, and a file by several processes, so that the command line reads it while a server writes.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import ConfigError
from . import queries, schema
from .model import RUNNING, RunDetail, RunSummary, Stats
from .writes import Writer

MAX_RUNS = 100_000
"""How many runs are kept unless said otherwise."""


class Store:
    """Runs in a database file.

    Args:
        path: the file, made if there is none; None keeps the data in a temporary file that `close` removes.
        max_runs: how many runs are kept; beyond, the oldest ended ones are deleted, down to this number.
        read_only: open a file that exists, and never write.

    Raises:
        ConfigError: the file cannot be used, or is no database of this server.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, max_runs: int = MAX_RUNS, read_only: bool = False
    ) -> None:
        if max_runs < 1:
            raise ConfigError("max_runs", max_runs, "expected a whole number above 0")
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if path is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="waxell-workers-")
            path = Path(self._temporary.name) / "runs.db"
        self.path = Path(path)
        self.max_runs = max_runs
        self._slack = max_runs // 1000  # counting the rows costs: not after every single run of a large file
        self._added = 0
        self._lock = threading.Lock()
        self._readers: list[sqlite3.Connection] = []
        self._closed = False
        self._writer: sqlite3.Connection | None = None
        if read_only:
            self._check_readable()
        else:
            self._writer = schema.create(self.path)

    def close(self) -> None:
        """Close all connections; a temporary file is removed. A second call does nothing."""
        with self._lock:
            self._closed = True
            connections = [*self._readers, *([self._writer] if self._writer else [])]
            self._readers.clear()
            self._writer = None
        for connection in connections:
            connection.close()
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
            sqlite3.Error: nothing was stored: the disk is full, or the file is locked for more than 10 s.
        """
        with self._lock:
            if self._writer is None:
                raise sqlite3.ProgrammingError("the store is closed, or was opened to read")
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                writer = Writer(self._writer)
                yield writer
                self._retain(self._writer, writer.runs_added)
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection that sees one state of the database for as long as the block lasts."""
        with self._lock:
            pooled = self._readers.pop() if self._readers else None
        connection = pooled or schema.connect(self.path, query_only=True)
        try:
            connection.execute("BEGIN")
            yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            with self._lock:
                keep = not self._closed
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

    def has_run(self, run_id: str) -> bool:
        """Tell whether anything of this run is stored."""
        with self.read() as connection:
            return queries.has_run(connection, run_id)

    def related(self, run: RunDetail) -> tuple[list[RunSummary], list[RunSummary]]:
        """Return the attempts of the run's task (itself included, oldest first) and the runs it started."""
        with self.read() as connection:
            return queries.attempts(connection, run["task_id"]), queries.children(connection, run["run_id"])

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
                schema.check(connection, self.path)
        except ConfigError:
            self.close()
            raise
        except sqlite3.Error as error:
            self.close()
            raise ConfigError("db", str(self.path), f"expected a database of this server ({error})") from None

    def _retain(self, connection: sqlite3.Connection, added: int) -> None:
        self._added += added
        if not added or self._added <= self._slack:
            return
        self._added = 0
        excess = connection.execute("SELECT count(*) FROM runs").fetchone()[0] - self.max_runs
        if excess <= 0:
            return
        connection.execute(
            "DELETE FROM runs WHERE run_id IN (SELECT run_id FROM runs"
            " ORDER BY status = ?, started_at, run_id LIMIT ?)",
            (RUNNING, excess),
        )
        connection.execute(
            "DELETE FROM records WHERE run_id IS NULL AND at < (SELECT min(started_at) FROM runs)"
        )
