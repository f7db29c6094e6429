"""The database: its tables, and how a connection to it is opened.

One row per run, with the sums of its calls kept beside it, so that the list of runs reads one table. Runs own
everything else by foreign key: deleting a run deletes its calls, steps, spans, scores and record ids. Values
without a fixed shape (metadata, inputs, attributes) are JSON text.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from ..core.errors import ConfigError

VERSION = 1
"""`PRAGMA user_version` of a database of ours."""

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
        timeout=10,
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

    Raises:
        ConfigError: the path cannot be used, or holds something else.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = connect(path, query_only=False)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError("db", str(path), f"expected a file that can be written ({error})") from None
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        if _version(connection) == 0 and not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            for statement in _TABLES.split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
        check(connection, path)
    except sqlite3.Error as error:
        connection.close()
        raise ConfigError("db", str(path), f"expected a database of this server ({error})") from None
    except BaseException:
        connection.close()
        raise
    return connection


def check(connection: sqlite3.Connection, path: Path) -> None:
    """Make sure that this is a database of ours, in the version that this code reads.

    Raises:
        ConfigError: it is not.
    """
    found = _version(connection)
    if found != VERSION:
        raise ConfigError(
            "db", str(path), f"expected a database of this server (version {VERSION}, not {found})"
        )


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
