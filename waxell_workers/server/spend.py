"""Where the money goes: by task, queue, model, …, and what failed attempts cost. Sums are the database's."""

from __future__ import annotations

import sqlite3
from typing import Any

from .model import Spend, Total, Waste, WastedOn, iso
from .queries import FAILED, OWN, TOTAL, total_of

TASKS = 3
"""How many names of tasks stand beside an error."""

# a name that is empty is not known
_FRAMEWORK = "nullif(framework, '') AS framework"
_GROUPS = {
    "task": f"nullif(task, '') AS task, {_FRAMEWORK}",
    "queue": f"nullif(queue, '') AS queue, {_FRAMEWORK}",
    "framework": _FRAMEWORK,
    "agent": "nullif(agent_name, '') AS agent",
    "session": "nullif(session_id, '') AS session",
    "user": "nullif(user_id, '') AS user",
    "attempt": "attempt",
}
DIMENSIONS = ("task", "queue", "framework", "agent", "model", "session", "user", "attempt", "run")
"""What `spend` can be asked for."""

_RUN = (
    f"run_id AS run, nullif(task, '') AS task, nullif(agent_name, '') AS agent, {_FRAMEWORK}, status,"
    " started_at"
)
_MODEL = "nullif(model, '') AS model, nullif(provider, '') AS provider"
_OF_CALLS = ", ".join(
    (
        "count(DISTINCT run_id) AS runs",
        "count(*) AS calls",
        *(
            f"CASE WHEN count({name}) THEN cast(total({name}) AS INTEGER) END AS {name}"
            for name in ("tokens_in", "tokens_out")
        ),
        "sum(cost_usd) AS cost_usd",
        *(
            f"count(*) - count({name}) AS {unknown}"
            for name, unknown in (
                ("tokens_in", "tokens_in_unknown"),
                ("tokens_out", "tokens_out_unknown"),
                ("cost_usd", "cost_unknown"),
            )
        ),
    )
)
_DEAREST = "cost_usd IS NULL, cost_usd DESC, coalesce(tokens_in, 0) + coalesce(tokens_out, 0) DESC, runs DESC"

# `+`: by the index that has all columns, rather than the one that is in the order of the status
_NAMES = f"""SELECT status, error_type, name FROM (
    SELECT status, error_type, name, row_number() OVER
        (PARTITION BY status, error_type ORDER BY cost IS NULL, cost DESC, runs DESC, name) AS place
    FROM (
        SELECT +status AS status, error_type, coalesce(nullif(task, ''), agent_name) AS name,
            sum(cost_usd) AS cost, count(*) AS runs
        FROM runs WHERE {FAILED} AND started_at >= ? GROUP BY 1, 2, 3
    )
) WHERE place <= {TASKS} AND name <> '' ORDER BY place"""


def spend(db: sqlite3.Connection, *, by: str, since: float, limit: int) -> list[Spend]:
    """Return what each task, queue, … of `DIMENSIONS` has cost, the dearest first; see `Store.spend`."""
    if by == "run":
        select = f"SELECT {_RUN}, 1 AS runs, {OWN} FROM runs WHERE started_at >= ?"
    elif by == "model":
        select = f"SELECT {_MODEL}, {_OF_CALLS} FROM calls WHERE started_at >= ? GROUP BY 1, 2"
    else:
        groups = _GROUPS[by]
        numbers = ", ".join(str(number) for number in range(1, groups.count(" AS ") + 1)) or "1"
        select = f"SELECT {groups}, {TOTAL} FROM runs WHERE started_at >= ? GROUP BY {numbers}"
    found: list[Spend] = []
    for row in db.execute(f"SELECT * FROM ({select}) ORDER BY {_DEAREST}, 1 LIMIT ?", (since, limit)):
        item: Any = dict(row)
        if by == "run":
            item["started_at"] = iso(item["started_at"])
        found.append(item)
    return found


def total(db: sqlite3.Connection, *, since: float) -> Total:
    """Return what all runs have cost that began then or later."""
    return total_of(db.execute(f"SELECT {TOTAL} FROM runs WHERE started_at >= ?", (since,)).fetchone())


def waste(db: sqlite3.Connection, *, since: float, limit: int) -> Waste:
    """Return what failed attempts have cost, in all and by the error, the dearest first."""
    failed = f"FROM runs WHERE {FAILED} AND started_at >= ?"
    rows = db.execute(
        f"SELECT * FROM (SELECT +status AS status, error_type, {TOTAL} {failed} GROUP BY 1, 2)"
        f" ORDER BY {_DEAREST}, status, error_type LIMIT ?",
        (since, limit),
    ).fetchall()
    tasks: dict[tuple[str, str], list[str]] = {(row["status"], row["error_type"]): [] for row in rows}
    for status, error_type, name in db.execute(_NAMES, (since,)):
        if (status, error_type) in tasks:
            tasks[status, error_type].append(name)
    return Waste(
        total=total_of(db.execute(f"SELECT {TOTAL} {failed}", (since,)).fetchone()),
        by_error=[
            WastedOn(
                **total_of(row),
                status=row["status"],
                error_type=row["error_type"],
                tasks=tasks[row["status"], row["error_type"]],
            )
            for row in rows
        ],
    )
