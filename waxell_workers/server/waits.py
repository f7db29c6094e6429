"""How long tasks wait in their queues. Percentiles are the database's: the nearest rank, no interpolation."""

from __future__ import annotations

import sqlite3
from typing import Any

from .model import QueueWait, Wait, WaitOf
from .queries import dated
from .values import amount, loads

NEWEST = 1000
"""How many runs of a queue say what is usual there."""

_WAITS = """WITH
seen AS ({runs}),
ranked AS (
    SELECT framework, queue, wait_s,
        row_number() OVER (PARTITION BY framework, queue ORDER BY wait_s) AS rank,
        count(*) OVER (PARTITION BY framework, queue) AS waited
    FROM seen WHERE wait_s IS NOT NULL
),
waits AS (
    SELECT framework, queue, avg(wait_s) AS mean, max(wait_s) AS max,
        min(CASE WHEN rank * 100 >= waited * 50 THEN wait_s END) AS p50,
        min(CASE WHEN rank * 100 >= waited * 95 THEN wait_s END) AS p95
    FROM ranked GROUP BY framework, queue
)
SELECT framework, queue, runs, waited, mean, p50, p95, max
FROM (SELECT framework, queue, count(*) AS runs, count(wait_s) AS waited FROM seen GROUP BY framework, queue)
    LEFT JOIN waits USING (framework, queue)
ORDER BY p95 IS NULL, p95 DESC, mean DESC, framework, queue LIMIT ?"""
_QUEUED = "SELECT framework, queue, wait_s FROM runs WHERE queue <> '' AND started_at >= ?"
_USUAL = """SELECT framework, queue, wait_s FROM runs WHERE framework = ? AND queue = ? AND queue <> ''
    ORDER BY started_at DESC LIMIT ?"""


def queues(db: sqlite3.Connection, *, since: float, limit: int) -> list[QueueWait]:
    """Return the queues in which runs waited longest: by the wait that 19 of 20 did not exceed."""
    return [_wait(row) for row in db.execute(_WAITS.format(runs=_QUEUED), (since, limit))]


def wait_of(db: sqlite3.Connection, run_id: str) -> WaitOf | None:
    """Return how long a run waited, and what is usual in its queue; None if it is not stored."""
    row = db.execute(
        "SELECT run_id, framework, queue, started_at, enqueued_at, eta, wait_s, metadata FROM runs"
        " WHERE run_id = ?",
        (run_id,),
    ).fetchone()
    if row is None:
        return None
    run: Any = dated(dict(row))
    place = (row["framework"], row["queue"])
    usual = db.execute(_WAITS.format(runs=_USUAL), (*place, NEWEST, 1)).fetchone()
    shorter = None
    if usual is not None and usual["waited"] and row["wait_s"] is not None:
        shorter = db.execute(
            f"SELECT avg(wait_s < ?) FROM ({_USUAL}) WHERE wait_s IS NOT NULL",
            (row["wait_s"], *place, NEWEST),
        ).fetchone()[0]
    return WaitOf(
        run_id=run_id,
        enqueued_at=run["enqueued_at"],
        eta=run["eta"],
        wait_s=row["wait_s"],
        clock_skew_s=amount(loads(row["metadata"]).get("clock_skew_s")),
        usual=None if usual is None else _wait(usual),
        longer_than=shorter,
    )


def _wait(row: sqlite3.Row) -> QueueWait:
    return QueueWait(
        framework=row["framework"],
        queue=row["queue"],
        runs=row["runs"],
        waited=row["waited"],
        wait_s=Wait(mean=row["mean"], p50=row["p50"], p95=row["p95"], max=row["max"]),
    )
