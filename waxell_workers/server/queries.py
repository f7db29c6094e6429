"""The reads: each takes a connection and returns plain dictionaries (`model`)."""

from __future__ import annotations

import sqlite3
from datetime import datetime, timezone
from typing import Any

from .model import Call, RunDetail, RunSummary, Score, Span, Stats, Step, iso
from .values import loads

_DURATION = "coalesce(duration_ms, round((ended_at - started_at) * 1000, 1)) AS duration_ms"
_SUMMARY = (
    f"SELECT run_id, agent_name, workflow_name, status, started_at, {_DURATION}, calls, tokens_in,"
    " tokens_out, cost_usd, error, metadata FROM runs"
)
_RELATED = 200
"""How many attempts or children of a run are listed."""


def runs(
    db: sqlite3.Connection, *, limit: int, agent: str = "", status: str = "", before: str = ""
) -> list[RunSummary]:
    """List runs, newest first; see `Store.runs`."""
    where, values = ["1"], list[object]()
    if agent:
        where.append("agent_name = ?")
        values.append(agent)
    if status:
        where.append("status = ?")
        values.append(status)
    if before:
        where.append("(started_at, run_id) < (?, ?)")
        values.extend(_position(db, before))
    rows = db.execute(
        f"{_SUMMARY} WHERE {' AND '.join(where)} ORDER BY started_at DESC, run_id DESC LIMIT ?",
        (*values, limit),
    )
    return [_summary(row) for row in rows]


def run(db: sqlite3.Connection, run_id: str) -> RunDetail | None:
    """Return one run with everything that belongs to it, or None."""
    row = db.execute(
        f"SELECT run_id, agent_name, workflow_name, status, started_at, {_DURATION}, calls AS call_count,"
        " tokens_in, tokens_out, cost_usd, error, metadata, traceback, inputs, result, tags, session_id,"
        " user_id, trace_id, task_id, parent_run_id, root_run_id, source FROM runs WHERE run_id = ?",
        (run_id,),
    ).fetchone()
    if row is None:
        return None
    found: Any = dict(row)
    for column in ("metadata", "inputs", "result", "tags"):
        found[column] = loads(found[column])
    found["started_at"] = iso(found["started_at"])
    found["calls"] = _calls(db, run_id)
    found["steps"] = _steps(db, run_id)
    found["spans"] = _spans(db, run_id)
    found["scores"] = _scores(db, run_id)
    detail: RunDetail = found  # the columns of the statement above, and the lists beside them
    return detail


def has_run(db: sqlite3.Connection, run_id: str) -> bool:
    """Tell whether anything of this run is stored."""
    return db.execute("SELECT 1 FROM runs WHERE run_id = ?", (run_id,)).fetchone() is not None


def attempts(db: sqlite3.Connection, task_id: str) -> list[RunSummary]:
    """Return the runs of one task, oldest first."""
    if not task_id:
        return []
    rows = db.execute(
        f"{_SUMMARY} WHERE task_id = ? ORDER BY started_at, run_id LIMIT {_RELATED}", (task_id,)
    )
    return [_summary(row) for row in rows]


def children(db: sqlite3.Connection, run_id: str) -> list[RunSummary]:
    """Return the runs that this one started, oldest first."""
    rows = db.execute(
        f"{_SUMMARY} WHERE parent_run_id = ? ORDER BY started_at, run_id LIMIT {_RELATED}", (run_id,)
    )
    return [_summary(row) for row in rows]


def agents(db: sqlite3.Connection) -> list[str]:
    """Return the names of the agents, sorted."""
    rows = db.execute(
        "SELECT DISTINCT agent_name FROM runs WHERE agent_name <> '' ORDER BY agent_name LIMIT 500"
    )
    return [row[0] for row in rows]


def stats(db: sqlite3.Connection, agent: str = "") -> Stats:
    """Sum up runs by status, calls, tokens and cost; the counters are those of all agents."""
    where, values = ("WHERE agent_name = ?", (agent,)) if agent else ("", ())
    rows = db.execute(
        "SELECT status, count(*) AS runs, sum(calls) AS calls, sum(tokens_in) AS tokens_in,"
        " sum(tokens_out) AS tokens_out, sum(cost_usd) AS cost_usd"
        f" FROM runs {where} GROUP BY status ORDER BY status",
        values,
    ).fetchall()
    costs = [row["cost_usd"] for row in rows if row["cost_usd"] is not None]
    counters = dict(tuple(row) for row in db.execute("SELECT name, value FROM counters"))
    return Stats(
        runs={row["status"]: row["runs"] for row in rows},
        calls=sum(row["calls"] for row in rows),
        tokens_in=sum(row["tokens_in"] for row in rows),
        tokens_out=sum(row["tokens_out"] for row in rows),
        cost_usd=sum(costs) if costs else None,
        accepted=counters["accepted"],
        duplicates=counters["duplicates"],
    )


def _position(db: sqlite3.Connection, before: str) -> tuple[float, str]:
    row = db.execute("SELECT started_at, run_id FROM runs WHERE run_id = ?", (before,)).fetchone()
    if row is not None:
        return row["started_at"], row["run_id"]
    try:
        # Python 3.10 reads no `Z`
        moment = datetime.fromisoformat(before[:-1] + "+00:00" if before.endswith("Z") else before)
    except ValueError:
        raise ValueError("before: expected the id of a stored run, or an ISO 8601 time") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return moment.timestamp(), ""


def _summary(row: sqlite3.Row) -> RunSummary:
    found: Any = dict(row)
    found["started_at"] = iso(found["started_at"])
    found["metadata"] = loads(found["metadata"])
    summary: RunSummary = found  # the columns of _SUMMARY
    return summary


def _calls(db: sqlite3.Connection, run_id: str) -> list[Call]:
    rows = db.execute(
        "SELECT call_id AS id, model, response_model, provider, operation, status, error, started_at,"
        " duration_ms, ttft_ms, tokens_in, tokens_out, tokens_cached, tokens_reasoning, cost_usd, prompt,"
        " response, metadata"
        " FROM calls WHERE run_id = ? ORDER BY started_at, seq",
        (run_id,),
    )
    found: list[Any] = [dict(row) for row in rows]
    for position, call in enumerate(found, 1):
        call["position"] = position
        call["started_at"] = iso(call["started_at"])
        call["metadata"] = loads(call["metadata"])
    calls: list[Call] = found  # the columns of the statement above
    return calls


def _steps(db: sqlite3.Connection, run_id: str) -> list[Step]:
    rows = db.execute("SELECT * FROM steps WHERE run_id = ? ORDER BY position, at, seq", (run_id,))
    return [
        Step(position=row["position"], name=row["name"], output=loads(row["output"]), at=iso(row["at"]))
        for row in rows
    ]


def _spans(db: sqlite3.Connection, run_id: str) -> list[Span]:
    rows = db.execute("SELECT * FROM spans WHERE run_id = ? ORDER BY position, seq", (run_id,))
    return [
        Span(
            position=row["position"],
            parent_position=row["parent_position"],
            name=row["name"],
            kind=row["kind"],
            status=row["status"],
            start_offset_ms=row["start_offset_ms"],
            duration_ms=row["duration_ms"],
            attributes=loads(row["attributes"]),
            input_data=loads(row["input_data"]),
            output_data=loads(row["output_data"]),
            events=loads(row["events"]),
        )
        for row in rows
    ]


def _scores(db: sqlite3.Connection, run_id: str) -> list[Score]:
    rows = db.execute("SELECT * FROM scores WHERE run_id = ? ORDER BY seq", (run_id,))
    return [
        Score(name=row["name"], data_type=row["data_type"], value=loads(row["value"]), comment=row["comment"])
        for row in rows
    ]
