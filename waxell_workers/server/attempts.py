"""All runs of one task: its attempts, the deliveries of each, and what became of it in the end.

A task has one id over all its attempts. A run that fails to be acknowledged is delivered again, with the same
attempt number. Everything about the group is counted by the database.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from .model import Attempt, Group
from .queries import FAILED, RELATED, SUMMARY, TOTAL, summarized, total_of

ROUND = "coalesce(replaced, 0), coalesce(repeat, 0)"
"""A task that is repeated, or replaced by another of its id, begins with attempt 1 again."""
_ORDER = f"{ROUND}, attempt, started_at, run_id"
_LAST = "coalesce(replaced, 0) DESC, coalesce(repeat, 0) DESC, attempt DESC, started_at DESC, run_id DESC"
_ATTEMPTS = "count(DISTINCT coalesce(replaced, 0) || '.' || coalesce(repeat, 0) || '.' || attempt)"
_DURATION = "coalesce(duration_ms, (ended_at - started_at) * 1000)"
_RUNS = f"""SELECT {SUMMARY}, delivery, before FROM runs JOIN (
    SELECT run_id AS id,
        row_number() OVER (ORDER BY {_ORDER}) AS place,
        lag(run_id) OVER (ORDER BY {_ORDER}) AS before,
        -- of runs whose attempt nobody knows, nobody knows which are the same
        CASE WHEN attempt IS NOT NULL THEN row_number() OVER
            (PARTITION BY {ROUND}, attempt ORDER BY started_at, run_id) END AS delivery
    FROM runs WHERE task_id = ? AND task_id <> ''
    ORDER BY place DESC LIMIT ?
) ON run_id = id ORDER BY place"""


def group(db: sqlite3.Connection, task_id: str) -> Group | None:
    """Return all about the runs of a task, or None if none is stored."""
    of_task = "FROM runs WHERE task_id = ? AND task_id <> ''"
    found = db.execute(
        f"SELECT {TOTAL}, nullif({_ATTEMPTS}, 0) AS attempts,"
        " sum(wait_s) AS wait_s, sum(wait_s IS NULL) AS wait_unknown,"
        f" round(sum({_DURATION}), 1) AS duration_ms, sum({_DURATION} IS NULL) AS duration_unknown {of_task}",
        (task_id,),
    ).fetchone()
    if not found["runs"]:
        return None
    last = db.execute(
        "SELECT coalesce(nullif(task, ''), agent_name) AS task, framework, queue, status,"
        f" coalesce(nullif(reason, ''), error) AS reason {of_task} ORDER BY {_LAST} LIMIT 1",
        (task_id,),
    ).fetchone()
    failed = db.execute(f"SELECT {TOTAL} {of_task} AND {FAILED}", (task_id,)).fetchone()
    runs = [_attempt(row) for row in db.execute(_RUNS, (task_id, RELATED))]
    return Group(
        task_id=task_id,
        task=last["task"],
        framework=last["framework"],
        queue=last["queue"],
        final_state=last["status"],
        reason=last["reason"],
        attempts=found["attempts"],
        deliveries=found["runs"],
        wait_s=found["wait_s"],
        wait_unknown=found["wait_unknown"],
        duration_ms=found["duration_ms"],
        duration_unknown=found["duration_unknown"],
        calls=found["calls"],
        tokens_in=found["tokens_in"],
        tokens_out=found["tokens_out"],
        cost_usd=found["cost_usd"],
        tokens_in_unknown=found["tokens_in_unknown"],
        tokens_out_unknown=found["tokens_out_unknown"],
        cost_unknown=found["cost_unknown"],
        failed=total_of(failed),
        truncated=len(runs) < found["runs"],
        runs=runs,
    )


def _attempt(row: sqlite3.Row) -> Attempt:
    found: Any = summarized(row)
    before = found.pop("before")
    found["previous_run_id"] = found["previous_run_id"] or before or ""
    attempt: Attempt = found
    return attempt
