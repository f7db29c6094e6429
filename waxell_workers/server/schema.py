"""The database: its tables, and how a connection to it is opened.

One row per run, with the sums of its calls kept beside it, so that the list of runs reads one table. Runs own
everything else by foreign key: deleting a run deletes its calls, steps, spans, scores and record ids. Values
without a fixed shape (metadata, inputs, attributes) are JSON text.

A file of ours that is damaged is moved aside, whole, and a new one begun: clients then have somewhere to send
to again. Any other file is left alone.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from pathlib import Path

from ..core.errors import ConfigError

logger = logging.getLogger("waxell_workers.server")

VERSION = 1
"""`PRAGMA user_version` of a database of ours."""

APPLICATION = 0x57615857
"""`PRAGMA application_id` of a database of ours: many programs count their versions from 1, too."""

SIDE_FILES = ("-wal", "-shm", "-journal")
"""What SQLite keeps beside a database."""

BUSY_S = 5.0
"""How long a write waits for another process that holds the file locked."""

_DAMAGE = ("malformed", "not a database")
_HEADER = b"SQLite format 3\0"

_TABLES = """
CREATE TABLE runs (
    run_id TEXT NOT NULL PRIMARY KEY,
    agent_name TEXT NOT NULL DEFAULT '',
    workflow_name TEXT NOT NULL DEFAULT '',
    status TEXT NOT NULL DEFAULT 'running',
    known INTEGER NOT NULL DEFAULT 0,            -- 0: only other records of it have come so far
    started_at REAL NOT NULL,                    -- Unix seconds
    ended_at REAL,
    duration_ms REAL,                            -- NULL: ended_at - started_at
    error TEXT NOT NULL DEFAULT '',
    traceback TEXT NOT NULL DEFAULT '',
    inputs TEXT NOT NULL DEFAULT '{}',
    metadata TEXT NOT NULL DEFAULT '{}',
    tags TEXT NOT NULL DEFAULT '{}',
    result TEXT NOT NULL DEFAULT 'null',
    session_id TEXT NOT NULL DEFAULT '',
    user_id TEXT NOT NULL DEFAULT '',
    trace_id TEXT NOT NULL DEFAULT '',
    task_id TEXT NOT NULL DEFAULT '',
    parent_run_id TEXT NOT NULL DEFAULT '',
    root_run_id TEXT NOT NULL DEFAULT '',
    source TEXT NOT NULL,                        -- rest | ingest
    calls INTEGER NOT NULL DEFAULT 0,
    tokens_in INTEGER NOT NULL DEFAULT 0,
    tokens_out INTEGER NOT NULL DEFAULT 0,
    cost_usd REAL
);
CREATE INDEX runs_newest ON runs (started_at, run_id);
CREATE INDEX runs_agent ON runs (agent_name, started_at, run_id);
CREATE INDEX runs_status ON runs (status, started_at, run_id);
CREATE INDEX runs_sums ON runs (agent_name, status, calls, tokens_in, tokens_out, cost_usd);
CREATE INDEX runs_task ON runs (task_id) WHERE task_id <> '';
CREATE INDEX runs_parent ON runs (parent_run_id) WHERE parent_run_id <> '';

CREATE TABLE calls (
    seq INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL REFERENCES runs ON DELETE CASCADE,
    call_id TEXT NOT NULL DEFAULT '',
    span INTEGER NOT NULL DEFAULT 0,             -- 1: a REST span has told its duration and times
    model TEXT NOT NULL,
    response_model TEXT NOT NULL DEFAULT '',
    provider TEXT NOT NULL DEFAULT '',
    operation TEXT NOT NULL DEFAULT '',
    status TEXT NOT NULL DEFAULT 'ok',
    error TEXT NOT NULL DEFAULT '',
    started_at REAL NOT NULL,
    duration_ms REAL,
    ttft_ms REAL,
    tokens_in INTEGER NOT NULL DEFAULT 0,
    tokens_out INTEGER NOT NULL DEFAULT 0,
    tokens_cached INTEGER NOT NULL DEFAULT 0,
    tokens_reasoning INTEGER NOT NULL DEFAULT 0,
    cost_usd REAL,
    prompt TEXT NOT NULL DEFAULT '',
    response TEXT NOT NULL DEFAULT '',
    metadata TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX calls_run ON calls (run_id, started_at);
CREATE INDEX calls_without_span ON calls (run_id, seq) WHERE NOT span;

CREATE TABLE steps (
    seq INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL REFERENCES runs ON DELETE CASCADE,
    position INTEGER NOT NULL DEFAULT 0,
    name TEXT NOT NULL,
    output TEXT NOT NULL DEFAULT 'null',
    at REAL NOT NULL
);
CREATE INDEX steps_run ON steps (run_id);

CREATE TABLE spans (
    seq INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL REFERENCES runs ON DELETE CASCADE,
    matched INTEGER NOT NULL DEFAULT 0,          -- 1: its call has been found, or it is no call's
    position INTEGER NOT NULL DEFAULT 0,
    parent_position INTEGER,
    name TEXT NOT NULL DEFAULT '',
    kind TEXT NOT NULL DEFAULT '',
    status TEXT NOT NULL DEFAULT 'ok',
    start_offset_ms REAL,
    duration_ms REAL,
    attributes TEXT NOT NULL DEFAULT '{}',
    input_data TEXT NOT NULL DEFAULT 'null',
    output_data TEXT NOT NULL DEFAULT 'null',
    events TEXT NOT NULL DEFAULT '[]'
);
CREATE INDEX spans_run ON spans (run_id, position);
CREATE INDEX spans_without_call ON spans (run_id, position) WHERE NOT matched;

CREATE TABLE scores (
    seq INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL REFERENCES runs ON DELETE CASCADE,
    name TEXT NOT NULL,
    data_type TEXT NOT NULL DEFAULT '',
    value TEXT NOT NULL DEFAULT 'null',
    comment TEXT NOT NULL DEFAULT ''
);
CREATE INDEX scores_run ON scores (run_id);

CREATE TABLE records (                           -- every ingest record that was taken: a repeat is recognised
    id TEXT PRIMARY KEY,
    run_id TEXT REFERENCES runs ON DELETE CASCADE,
    at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX records_run ON records (run_id);

CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO counters VALUES ('accepted', 0), ('duplicates', 0);
"""


def connect(path: Path, *, query_only: bool) -> sqlite3.Connection:
    """Open one connection in autocommit mode; the caller begins and ends transactions.

    Raises:
        sqlite3.Error: the file cannot be opened, or is no database.
    """
    # any thread may use it, one at a time: the store sees to that
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=BUSY_S,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = NORMAL")  # a commit survives the death of the process
        if query_only:
            connection.execute("PRAGMA query_only = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def create(path: Path) -> sqlite3.Connection:
    """Open the database for writing, and make the file (0600) and its tables if there are none.

    A file of ours that is damaged is moved aside first; see `move_aside`.

    Raises:
        ConfigError: the path cannot be used, or holds something else.
    """
    try:
        return _open(path)
    except sqlite3.Error as error:
        if not (is_damage(error) and _is_ours(path)):
            raise _unusable(path, error) from None
        move_aside(path, str(error))
    try:
        return _open(path)
    except sqlite3.Error as error:
        raise _unusable(path, error) from None


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise _unusable(path, error) from None
    connection = connect(path, query_only=False)
    try:
        if _number(connection, "user_version") or _tables(connection):
            check(connection, path)  # before anything is changed: it may be another program's
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        if _number(connection, "user_version") == 0 and not _tables(connection):
            for statement in _TABLES.split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute("COMMIT")
        check(connection, path)
        _examine(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def check(connection: sqlite3.Connection, path: Path) -> None:
    """Make sure that this is a database of ours, in the version that this code reads.

    Raises:
        ConfigError: it is not.
        sqlite3.Error: it cannot be read.
    """
    found = _number(connection, "user_version")
    if found != VERSION:
        raise ConfigError(
            "db", str(path), f"expected a database of this server (version {VERSION}, not {found})"
        )
    # the first databases had no application id
    if _number(connection, "application_id") != APPLICATION and "records" not in _tables(connection):
        raise ConfigError("db", str(path), "expected a database of this server, not another program's")


def examine(path: Path) -> None:
    """Read the whole file anew, past what other connections remember, and see whether it is damaged.

    Raises:
        sqlite3.Error: it is, or it cannot be read.
    """
    connection = connect(path, query_only=True)
    try:
        _examine(connection)
    finally:
        connection.close()


def _examine(connection: sqlite3.Connection) -> None:
    complaint = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if complaint != "ok":
        raise sqlite3.DatabaseError(f"malformed: {complaint}".replace("\n", " "))


def is_damage(error: sqlite3.Error) -> bool:
    """Tell whether this error says that the file is damaged; others pass (a full disk, a lock)."""
    return any(word in str(error) for word in _DAMAGE)


def move_aside(path: Path, reason: str) -> None:
    """Rename a damaged database, with what belongs to it, and say so. Nothing is deleted.

    Raises:
        ConfigError: the directory cannot be written.
    """
    aside = Path(f"{path}.damaged-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}")
    try:
        os.rename(path, aside)
        for suffix in SIDE_FILES:
            if os.path.exists(f"{path}{suffix}"):
                os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    except OSError as error:
        raise _unusable(path, error) from None
    logger.error("%s is damaged (%s): it is now %s, and a new one is begun", path, reason, aside.name)


def _is_ours(path: Path) -> bool:
    """Tell by the file's header, which is all that can be trusted, whether it was made by this server."""
    try:
        with path.open("rb") as file:
            header = file.read(100)
    except OSError:
        return False
    version, application = header[60:64], header[68:72]
    return (
        header.startswith(_HEADER)
        and int.from_bytes(version, "big") == VERSION
        and int.from_bytes(application, "big") in (0, APPLICATION)
    )


def _unusable(path: Path, error: Exception) -> ConfigError:
    if isinstance(error, sqlite3.Error) and is_damage(error):
        return ConfigError("db", str(path), f"expected a database of this server; move this away ({error})")
    return ConfigError("db", str(path), f"expected a file that can be written ({error})")


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
