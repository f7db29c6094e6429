"""A database of an older version: brought up to the present one, step by step, or read as if it were.

Version 1 had no messages, no tool calls, and 0 for what nobody had told. No prompt has no tokens, so that
where a call's are 0 they are unknown here. Version 2 had what a task tells about itself in the metadata of
its run only, and an error's type in its error. Nothing is lost on the way, and a file in which anything goes
wrong stays as it was: who calls this commits, or takes everything back.
"""

from __future__ import annotations

import re
import sqlite3
from functools import lru_cache
from typing import Any

import msgspec

from .facts import FACTS, facts
from .tables import CALLS, LINEAGE, SUMS
from .values import loads, mapping

_BEFORE = """seq, run_id, call_id, span, model, response_model, provider, operation, status, error,
    started_at, duration_ms, ttft_ms"""
_TOKENS = "tokens_in, tokens_out, tokens_cached, tokens_cache_written, tokens_reasoning"
_TOLD = """nullif(tokens_in, 0) AS tokens_in,
    CASE WHEN tokens_in = 0 THEN nullif(tokens_out, 0) ELSE tokens_out END AS tokens_out,
    nullif(tokens_cached, 0) AS tokens_cached, NULL AS tokens_cache_written,
    nullif(tokens_reasoning, 0) AS tokens_reasoning"""
_AFTER = "cost_usd, prompt, response, metadata"
_UNKNOWN = {"tokens_in_unknown": "tokens_in", "tokens_out_unknown": "tokens_out", "cost_unknown": "cost_usd"}
"""A count of a run to the column of its calls in which NULL is counted."""

_TO_2 = f"""
ALTER TABLE runs ADD COLUMN tokens_in_unknown INTEGER NOT NULL DEFAULT 0;
ALTER TABLE runs ADD COLUMN tokens_out_unknown INTEGER NOT NULL DEFAULT 0;
ALTER TABLE runs ADD COLUMN cost_unknown INTEGER NOT NULL DEFAULT 0;
DROP INDEX runs_sums;
{SUMS}
DROP INDEX calls_run;
DROP INDEX calls_without_span;
ALTER TABLE calls RENAME TO calls_1;
{CALLS}
INSERT INTO calls ({_BEFORE}, {_TOKENS}, {_AFTER}) SELECT {_BEFORE}, {_TOLD}, {_AFTER} FROM calls_1;
DROP TABLE calls_1;
UPDATE runs SET ({", ".join(_UNKNOWN)}) =
    (SELECT {", ".join(f"count(*) - count({column})" for column in _UNKNOWN.values())}
        FROM calls WHERE calls.run_id = runs.run_id);
"""

_INTEGERS, _REALS = ("attempt", "repeat", "replaced"), ("enqueued_at", "eta", "wait_s")


def _column(name: str) -> str:
    kind = "INTEGER" if name in _INTEGERS else "REAL" if name in _REALS else "TEXT NOT NULL DEFAULT ''"
    return f"ALTER TABLE runs ADD COLUMN {name} {kind};\n"


_TO_3 = f"""
ALTER TABLE runs ADD COLUMN reason TEXT NOT NULL DEFAULT '';
ALTER TABLE runs ADD COLUMN error_type TEXT NOT NULL DEFAULT '';
{"".join(map(_column, FACTS))}DROP INDEX runs_task;
UPDATE runs SET {", ".join(f"{name} = waxell_fact(metadata, '{name}')" for name in FACTS)}
    WHERE metadata <> '{{}}';
UPDATE runs SET error_type = waxell_error_type(status, error) WHERE error <> '';
{LINEAGE}"""

_STEPS = {1: _TO_2, 2: _TO_3}
"""A version to the statements that lead to the next one."""

_COUNTED = ",\n".join(
    f"(SELECT count(*) - count({column}) FROM temp.calls AS c WHERE c.run_id = r.run_id) AS {name}"
    for name, column in _UNKNOWN.items()
)
_HIDE_CALLS = f"""
CREATE TEMP VIEW calls AS
    SELECT {_BEFORE}, {_TOLD}, {_AFTER}, '[]' AS messages, '[]' AS tool_calls FROM main.calls;
"""
_HIDE_RUNS = f"""
CREATE TEMP VIEW runs AS
    SELECT run_id, agent_name, workflow_name, status, started_at, ended_at, duration_ms, error, traceback,
        inputs, metadata, tags, result, session_id, user_id, trace_id, task_id, parent_run_id, root_run_id,
        source, calls, tokens_in, tokens_out, cost_usd, %s,
        '' AS reason, waxell_error_type(status, error) AS error_type,
        {", ".join(f"waxell_fact(metadata, '{name}') AS {name}" for name in FACTS)}
    FROM main.runs AS r;
"""
_HIDE = {1: _HIDE_CALLS + _HIDE_RUNS % _COUNTED, 2: _HIDE_RUNS % ", ".join(_UNKNOWN)}

_ERROR_TYPE = re.compile(r"([A-Za-z_][\w.]{0,199})(?:: |$)")
"""What stands before the message in `values.error_line`; a message without a type rarely looks so."""


def upgrade(connection: sqlite3.Connection, version: int) -> None:
    """Bring tables of an older version up to the present one, inside the caller's transaction.

    Raises:
        sqlite3.Error: it cannot be done: the disk is full, or the file damaged.
    """
    _teach(connection)
    for step in range(version, max(_STEPS) + 1):
        execute(connection, _STEPS[step])


def hide(connection: sqlite3.Connection, version: int) -> None:
    """Put views of the present version before older tables, for this connection: the file stays."""
    _teach(connection)
    execute(connection, _HIDE[version])


def _teach(connection: sqlite3.Connection) -> None:
    """Let SQL read metadata as the writer does: not every SQLite of Python 3.10 has functions for JSON."""
    connection.create_function("waxell_fact", 2, _fact, deterministic=True)
    connection.create_function("waxell_error_type", 2, _error_type, deterministic=True)


def _fact(metadata: object, name: str) -> str | int | float | None:
    told = _told(metadata) if isinstance(metadata, (str, bytes)) else {}
    return told.get(name, _ABSENT[name])


_ABSENT = {name: read(None) for name, read in FACTS.items()}


@lru_cache(maxsize=1)  # a row is asked for all its columns, one after the other
def _told(metadata: str) -> dict[str, Any]:
    try:
        return facts(mapping(loads(metadata)))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):  # damaged, or not written by us
        return {}


def _error_type(status: object, error: object) -> str:
    found = _ERROR_TYPE.match(error) if isinstance(error, str) else None
    # where there was no exception, REST had the state instead
    return found.group(1) if found and found.group(1) != status else ""


def execute(connection: sqlite3.Connection, statements: str) -> None:
    """Execute statements, each of which ends a line, without a commit in between."""
    for statement in statements.split(";\n"):  # `executescript` would commit first
        connection.execute(statement)
