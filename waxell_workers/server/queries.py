"""The reads: each takes a connection and returns plain dictionaries (`model`)."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .model import RUNNING, Call, RunDetail, RunSummary, Score, Span, Stats, Step, Total, iso
from .values import instant, loads

_DURATION = "coalesce(duration_ms, round((ended_at - started_at) * 1000, 1)) AS duration_ms"
_UNKNOWN = "tokens_in_unknown, tokens_out_unknown, cost_unknown"
_SUMS = ", ".join(
    # a sum of nothing but unknowns is none; that of no calls at all is 0
    f"CASE WHEN calls > 0 AND {name}_unknown >= calls THEN NULL ELSE {name} END AS {name}"
    for name in ("tokens_in", "tokens_out")
)
_TASK = "framework, task, queue, attempt, enqueued_at, eta, wait_s, error_type, reason"
_FACTS = f"{_TASK}, task_id, trace_id, parent_run_id, previous_run_id, linked_run_id"
TOO_LONG = "too long for a page; the JSON of this run has it"
_OBJECT = f'{{"…": "{TOO_LONG}"}}'
_LIST = f'["{TOO_LONG}"]'

TOTAL = ", ".join(
    (
        "count(*) AS runs",
        "coalesce(sum(calls), 0) AS calls",
        *(
            # `sum` of whole numbers fails where the result is beyond 64 bits
            f"CASE WHEN sum(calls) > 0 AND sum({name}_unknown) >= sum(calls) THEN NULL"
            f" ELSE cast(total({name}) AS INTEGER) END AS {name}"
            for name in ("tokens_in", "tokens_out")
        ),
        "sum(cost_usd) AS cost_usd",
        *(f"coalesce(sum({name}), 0) AS {name}" for name in _UNKNOWN.split(", ")),
    )
)
"""The columns of a `model.Total`, over rows of `runs`."""
OWN = f"calls, {_SUMS}, cost_usd, {_UNKNOWN}"
"""The same of one run, but for the number of runs."""
FAILED = f"status NOT IN ('success', 'ignored', '{RUNNING}')"
"""True for an attempt whose cost was in vain."""

_LARGEST = 2**63 - 1
RELATED = 200
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
        f"SELECT {SUMMARY} FROM runs WHERE {' AND '.join(where)}"
        " ORDER BY started_at DESC, run_id DESC LIMIT ?",
        (*values, limit),
    )
    return [summarized(row) for row in rows]


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of what belongs to a run is read: all, unless said otherwise."""

    items: int = -1
    """At most so many calls, steps, spans and scores each."""
    size: int = 0
    """Of a text with more bytes, the first so many characters; JSON that is longer becomes a remark."""

    def text(self, column: str) -> str:
        """Return the SQL that reads a text."""
        if not self.size:
            return column
        first = f"substr({column}, 1, {self.size}) || '… (cut here, not in the JSON)'"
        return f"CASE WHEN {_size(column)} > {self.size} THEN {first} ELSE {column} END AS {column}"

    def json(self, column: str, remark: str = f'"{TOO_LONG}"') -> str:
        """Return the SQL that reads JSON text."""
        if not self.size:
            return column
        return f"CASE WHEN {_size(column)} > {self.size} THEN '{remark}' ELSE {column} END AS {column}"


ALL = Extent()


def columns(extent: Extent = ALL) -> str:
    """Return the columns of a run's summary, for `summarized`."""
    return (
        f"run_id, agent_name, workflow_name, status, started_at, {_DURATION}, calls, {_SUMS}, cost_usd,"
        f" error, {extent.json('metadata', _OBJECT)}, {_UNKNOWN}, {_FACTS}"
    )


def _size(column: str) -> str:
    return f"length(CAST({column} AS BLOB))"  # that of a text ends at its first NUL


SUMMARY = columns()


def run(db: sqlite3.Connection, run_id: str, extent: Extent = ALL) -> RunDetail | None:
    """Return one run with everything that belongs to it, or None."""
    found: Any = head(db, run_id, extent)
    if found is None:
        return None
    detail: RunDetail = found | {name: list(items) for name, items in belongings(db, run_id, extent)}
    return detail


def head(db: sqlite3.Connection, run_id: str, extent: Extent = ALL) -> dict[str, Any] | None:
    """Return one run without its lists, or None."""
    row = db.execute(
        f"SELECT run_id, agent_name, workflow_name, status, started_at, {_DURATION}, calls AS call_count,"
        f" {_SUMS}, cost_usd, error, metadata, {_UNKNOWN}, {extent.text('traceback')},"
        f" {extent.json('inputs', _OBJECT)}, {extent.json('result')}, tags, session_id,"
        " user_id, trace_id, task_id, parent_run_id, root_run_id, source,"
        f" {_TASK}, previous_run_id, linked_run_id, parent_task_id, user_group FROM runs WHERE run_id = ?",
        (run_id,),
    ).fetchone()
    if row is None:
        return None
    found = dict(row)
    for column in ("metadata", "inputs", "result", "tags"):
        found[column] = loads(found[column])
    return dated(found)


def belongings(
    db: sqlite3.Connection, run_id: str, extent: Extent = ALL
) -> Iterator[tuple[str, Iterator[Any]]]:
    """Yield each list of a run: its name, and its items as they are read."""
    yield "calls", _calls(db, run_id, extent)
    yield "steps", _steps(db, run_id, extent)
    yield "spans", _spans(db, run_id, extent)
    yield "scores", _scores(db, run_id, extent)


def lengths(db: sqlite3.Connection, run_id: str) -> dict[str, int]:
    """Return how many items each list of a run has."""
    return {
        name: db.execute(f"SELECT count(*) FROM {name} WHERE run_id = ?", (run_id,)).fetchone()[0]
        for name in ("calls", "steps", "spans", "scores")
    }


def summary(db: sqlite3.Connection, run_id: str) -> RunSummary | None:
    """Return one run as a list shows it, or None."""
    row = db.execute(f"SELECT {SUMMARY} FROM runs WHERE run_id = ?", (run_id,)).fetchone()
    return None if row is None else summarized(row)


def has_run(db: sqlite3.Connection, run_id: str) -> bool:
    """Tell whether anything of this run is stored."""
    return db.execute("SELECT 1 FROM runs WHERE run_id = ?", (run_id,)).fetchone() is not None


def attempts(db: sqlite3.Connection, task_id: str) -> list[RunSummary]:
    """Return the runs of one task, oldest first."""
    if not task_id:
        return []
    rows = db.execute(
        f"SELECT {SUMMARY} FROM runs WHERE task_id = ? ORDER BY started_at, run_id LIMIT {RELATED}",
        (task_id,),
    )
    return [summarized(row) for row in rows]


def children(db: sqlite3.Connection, run_id: str) -> list[RunSummary]:
    """Return the runs that this one started, oldest first."""
    rows = db.execute(
        f"SELECT {SUMMARY} FROM runs WHERE parent_run_id = ? ORDER BY started_at, run_id LIMIT {RELATED}",
        (run_id,),
    )
    return [summarized(row) for row in rows]


def linked(db: sqlite3.Connection, run_id: str, limit: int = RELATED) -> list[RunSummary]:
    """Return the runs that this one enqueued without being their parent, oldest first."""
    rows = db.execute(
        f"SELECT {SUMMARY} FROM runs WHERE linked_run_id = ? AND linked_run_id <> ''"
        " ORDER BY started_at, run_id LIMIT ?",
        (run_id, limit),
    )
    return [summarized(row) for row in rows]


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
        # `sum` of whole numbers fails where the result is beyond 64 bits
        "SELECT status, count(*) AS runs, sum(calls) AS calls,"
        " cast(total(tokens_in) AS INTEGER) AS tokens_in, cast(total(tokens_out) AS INTEGER) AS tokens_out,"
        " sum(cost_usd) AS cost_usd, sum(tokens_in_unknown) AS tokens_in_unknown,"
        " sum(tokens_out_unknown) AS tokens_out_unknown, sum(cost_unknown) AS cost_unknown"
        f" FROM runs {where} GROUP BY status ORDER BY status",
        values,
    ).fetchall()
    costs = [row["cost_usd"] for row in rows if row["cost_usd"] is not None]
    counters = dict(tuple(row) for row in db.execute("SELECT name, value FROM counters"))
    calls = sum(row["calls"] for row in rows)
    unknown = {name: sum(row[name] for row in rows) for name in _UNKNOWN.split(", ")}

    def total(name: str) -> int | None:
        if calls and unknown[f"{name}_unknown"] >= calls:
            return None
        found: int = sum(row[name] for row in rows)
        return min(found, _LARGEST)

    return Stats(
        runs={row["status"]: row["runs"] for row in rows},
        calls=calls,
        tokens_in=total("tokens_in"),
        tokens_out=total("tokens_out"),
        cost_usd=sum(costs) if costs else None,
        tokens_in_unknown=unknown["tokens_in_unknown"],
        tokens_out_unknown=unknown["tokens_out_unknown"],
        cost_unknown=unknown["cost_unknown"],
        accepted=counters["accepted"],
        duplicates=counters["duplicates"],
    )


def _position(db: sqlite3.Connection, before: str) -> tuple[float, str]:
    row = db.execute("SELECT started_at, run_id FROM runs WHERE run_id = ?", (before,)).fetchone()
    if row is not None:
        return row["started_at"], row["run_id"]
    moment = instant(before)
    if moment is None:
        raise ValueError("before: expected the id of a stored run, or an ISO 8601 time")
    return moment, ""


def summarized(row: sqlite3.Row) -> RunSummary:
    """Make a summary of a row with `columns` (and perhaps more, which stay as they are)."""
    found: Any = dated(dict(row))
    found["metadata"] = loads(found["metadata"])
    summary: RunSummary = found
    return summary


def total_of(row: sqlite3.Row) -> Total:
    """Return the sums of a row with `TOTAL`."""
    found: Any = {name: row[name] for name in Total.__annotations__}
    total: Total = found
    return total


def dated(found: dict[str, Any]) -> dict[str, Any]:
    """Write the times of a run as ISO 8601."""
    for name in ("started_at", "enqueued_at", "eta"):
        found[name] = None if found[name] is None else iso(found[name])
    return found


def _calls(db: sqlite3.Connection, run_id: str, extent: Extent) -> Iterator[Call]:
    rows = db.execute(
        "SELECT call_id AS id, model, response_model, provider, operation, status, error, started_at,"
        " duration_ms, ttft_ms, tokens_in, tokens_out, tokens_cached, tokens_cache_written,"
        f" tokens_reasoning, cost_usd, {extent.text('prompt')}, {extent.text('response')},"
        f" {extent.json('messages', _LIST)}, {extent.json('tool_calls', _LIST)},"
        f" {extent.json('metadata', _OBJECT)}"
        " FROM calls WHERE run_id = ? ORDER BY started_at, seq LIMIT ?",
        (run_id, extent.items),
    )
    for position, row in enumerate(rows, 1):
        found: Any = dict(row)
        found["position"] = position
        found["started_at"] = iso(found["started_at"])
        for column in ("messages", "tool_calls", "metadata"):
            found[column] = loads(found[column])
        call: Call = found  # the columns of the statement above
        yield call


def _steps(db: sqlite3.Connection, run_id: str, extent: Extent) -> Iterator[Step]:
    rows = db.execute(
        f"SELECT position, name, {extent.json('output')}, at FROM steps WHERE run_id = ?"
        " ORDER BY position, at, seq LIMIT ?",
        (run_id, extent.items),
    )
    for row in rows:
        yield Step(position=row["position"], name=row["name"], output=loads(row["output"]), at=iso(row["at"]))


def _spans(db: sqlite3.Connection, run_id: str, extent: Extent) -> Iterator[Span]:
    rows = db.execute(
        "SELECT position, parent_position, name, kind, status, start_offset_ms, duration_ms,"
        f" {extent.json('attributes', _OBJECT)}, {extent.json('input_data')}, {extent.json('output_data')},"
        f" {extent.json('events', _LIST)} FROM spans WHERE run_id = ? ORDER BY position, seq LIMIT ?",
        (run_id, extent.items),
    )
    for row in rows:
        found: Any = dict(row)
        for column in ("attributes", "input_data", "output_data", "events"):
            found[column] = loads(found[column])
        span: Span = found  # the columns of the statement above
        yield span


def _scores(db: sqlite3.Connection, run_id: str, extent: Extent) -> Iterator[Score]:
    rows = db.execute(
        "SELECT name, data_type, value, comment FROM scores WHERE run_id = ? ORDER BY seq LIMIT ?",
        (run_id, extent.items),
    )
    for row in rows:
        yield Score(
            name=row["name"], data_type=row["data_type"], value=loads(row["value"]), comment=row["comment"]
        )
