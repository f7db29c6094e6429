"""A database of version 1: brought up to the present one, or read as if it were.

Version 1 had no messages, no tool calls, and 0 for what nobody had told. No prompt has no tokens, so that
where a call's are 0 they are unknown here. Nothing is lost on the way, and a file in which anything goes
wrong stays as it was: who calls this commits, or takes everything back.
"""

from __future__ import annotations

import sqlite3

from .tables import CALLS, SUMS

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

_UPGRADE = f"""
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

_COUNTED = ",\n".join(
    f"(SELECT count(*) - count({column}) FROM temp.calls AS c WHERE c.run_id = r.run_id) AS {name}"
    for name, column in _UNKNOWN.items()
)
_HIDE = f"""
CREATE TEMP VIEW calls AS
    SELECT {_BEFORE}, {_TOLD}, {_AFTER}, '[]' AS messages, '[]' AS tool_calls FROM main.calls;
CREATE TEMP VIEW runs AS
    SELECT run_id, agent_name, workflow_name, status, started_at, ended_at, duration_ms, error, traceback,
        inputs, metadata, tags, result, session_id, user_id, trace_id, task_id, parent_run_id, root_run_id,
        source, calls, tokens_in, tokens_out, cost_usd, {_COUNTED} FROM main.runs AS r;
"""


def upgrade(connection: sqlite3.Connection) -> None:
    """Bring tables of version 1 up to the present version, inside the caller's transaction.

    Raises:
        sqlite3.Error: it cannot be done: the disk is full, or the file damaged.
    """
    execute(connection, _UPGRADE)


def hide(connection: sqlite3.Connection) -> None:
    """Put views of the present version before tables of version 1, for this connection: the file stays."""
    execute(connection, _HIDE)


def execute(connection: sqlite3.Connection, statements: str) -> None:
    """Execute statements, each of which ends a line, without a commit in between."""
    for statement in statements.split(";\n"):  # `executescript` would commit first
        connection.execute(statement)
