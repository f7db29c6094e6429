"""The tree of a trace: which run has started which, with what each has cost together with all below it.

A run hangs under its parent. One that names none, but a task it comes from, hangs under that task's latest
run that began before it: a process that was killed could not tell the id of its run. Parents are what clients
say, so they may be missing, or each other's: no run is lost here, no loop is endless, and nothing recurses.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from .attempts import ROUND
from .model import RUNNING, Node, Sums, Total, Tree, iso
from .queries import TOTAL, Extent, columns, summarized, total_of

LARGEST = 2000
"""How many runs of a tree are shown: the first ones, level by level."""
DEEPEST = 100
"""How many levels are nested; what is deeper hangs on the last one. JSON is read by recursion."""

_EXTENT = Extent(size=4096)
_AT_ONCE = 500
"""How many values one statement is given: old SQLite takes 999."""
_STEP = "run_id, parent_run_id, parent_task_id, task_id, trace_id, root_run_id, started_at"

_BELOW = """WITH RECURSIVE below (run_id, task_id, started_at) AS (
    SELECT * FROM ({seeds})
    UNION
    SELECT r.run_id, r.task_id, r.started_at FROM below AS b JOIN runs AS r
        ON (r.parent_run_id = b.run_id AND r.parent_run_id <> '')
        OR (r.parent_task_id = b.task_id AND r.parent_task_id <> '' AND r.parent_run_id = ''
            AND r.started_at >= b.started_at
            -- and before the next run of that task, whose own it would be; which may be this one
            AND r.started_at < coalesce(
                -- in two, since SQLite would pass over all that began at once to find the next
                (SELECT n.started_at FROM runs AS n WHERE n.task_id = b.task_id AND n.task_id <> ''
                    AND n.started_at = b.started_at AND n.run_id > b.run_id LIMIT 1),
                (SELECT n.started_at FROM runs AS n WHERE n.task_id = b.task_id AND n.task_id <> ''
                    AND n.started_at > b.started_at ORDER BY n.started_at LIMIT 1), 9e99))
)"""
"""The runs of `seeds`, and all that are below them; `UNION` takes each once, whatever circles there are."""
_SEED = "SELECT run_id, task_id, started_at FROM runs WHERE "
_OLDEST = " ORDER BY started_at, run_id LIMIT -1"  # the limit keeps the order


def subtotal(db: sqlite3.Connection, run_id: str) -> Total | None:
    """Return the sums of a run and all below it, or None if it is not stored."""
    below = _BELOW.format(seeds=f"{_SEED}run_id = ?")
    row = db.execute(
        f"{below} SELECT {TOTAL} FROM runs WHERE run_id IN (SELECT run_id FROM below)", (run_id,)
    ).fetchone()
    return total_of(row) if row["runs"] else None


def tree(db: sqlite3.Connection, run_id: str) -> Tree | None:
    """Return the tree that a run is in, from its topmost ancestor's trace down, or None."""
    path = _ancestry(db, run_id)
    if not path:
        return None
    top = path[-1]
    if top["trace_id"]:
        where, values = "trace_id = ? AND trace_id <> ''", [top["trace_id"]]
    else:
        where, values = _without_trace(top["root_run_id"] or top["run_id"])
    # those above come first: they are in the tree, and so is the run, however large it is
    known = [row["run_id"] for row in path[-1:]] + [row["run_id"] for row in path[:DEEPEST]]
    first = f"SELECT * FROM ({_SEED}run_id IN ({', '.join('?' * len(known))}){_OLDEST})"
    seeds = f"{first} UNION ALL SELECT * FROM ({_SEED}{where}{_OLDEST})"
    return _tree(db, top["trace_id"], seeds, [*known, *values])


def trace(db: sqlite3.Connection, trace_id: str) -> Tree | None:
    """Return the tree of a trace, or of what has no trace id but this root; None if there is nothing."""
    where, values = "trace_id = ? AND trace_id <> ''", [trace_id]
    known = trace_id
    if db.execute(f"SELECT 1 FROM runs WHERE {where}", values).fetchone() is None:
        where, values = _without_trace(trace_id)
        known = ""
    return _tree(db, known, f"{_SEED}{where}{_OLDEST}", values)


def _without_trace(root: str) -> tuple[str, list[str]]:
    of_root = "trace_id = '' AND root_run_id = ? AND root_run_id <> ''"
    return f"(({of_root}) OR (trace_id = '' AND run_id = ?))", [root, root]


def _ancestry(db: sqlite3.Connection, run_id: str) -> list[sqlite3.Row]:
    """Return a run, its parent, and so on, as far as they are stored."""
    path: dict[str, sqlite3.Row] = {}
    while run_id and run_id not in path and len(path) < LARGEST:
        row = db.execute(f"SELECT {_STEP} FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        if row is None:
            break
        path[run_id] = row
        run_id = _parent(db, row)
    return list(path.values())


def _parent(db: sqlite3.Connection, row: sqlite3.Row) -> str:
    """Return the id of a run's parent, which need not be stored; empty if there is none."""
    if row["parent_run_id"] or not row["parent_task_id"] or row["parent_task_id"] == row["task_id"]:
        return str(row["parent_run_id"])
    found = db.execute(
        "SELECT run_id FROM runs WHERE task_id = ? AND task_id <> '' AND started_at <= ?"
        " ORDER BY started_at DESC, run_id DESC LIMIT 1",
        (row["parent_task_id"], row["started_at"]),
    ).fetchone()
    return "" if found is None else str(found[0])


def _tree(db: sqlite3.Connection, trace_id: str, seeds: str, values: list[str]) -> Tree | None:
    below = _BELOW.format(seeds=seeds)
    head = db.execute(
        f"{below} SELECT {TOTAL}, min(started_at) AS began, sum(status = '{RUNNING}') AS running,"
        " max(coalesce(ended_at, started_at + duration_ms / 1000)) AS ended"
        " FROM runs WHERE run_id IN (SELECT run_id FROM below)",
        values,
    ).fetchone()
    if not head["runs"]:
        return None
    rows = db.execute(
        f"{below} SELECT {columns(_EXTENT)}, parent_task_id, root_run_id, started_at AS began FROM runs"
        " WHERE run_id IN (SELECT run_id FROM below LIMIT ?) ORDER BY began, run_id",
        (*values, LARGEST),
    ).fetchall()
    over = head["ended"] is None or head["running"]
    return Tree(
        **total_of(head),
        trace_id=trace_id,
        started_at=iso(head["began"]),
        duration_ms=None if over else round(max(head["ended"] - head["began"], 0.0) * 1000, 1),
        shown=len(rows),
        truncated=len(rows) < head["runs"],
        tree=_grown(rows, _parents(db, rows), _deliveries(db, rows), head["began"]),
    )


def _parents(db: sqlite3.Connection, rows: list[sqlite3.Row]) -> dict[str, str]:
    """Return for each run the one under which it hangs; not in it are those at the top."""
    here = {row["run_id"] for row in rows}
    told = {row["run_id"]: _parent(db, row) for row in rows}
    return {run_id: parent for run_id, parent in told.items() if parent in here and parent != run_id}


def _deliveries(db: sqlite3.Connection, rows: list[sqlite3.Row]) -> dict[str, int]:
    """Return the number of each delivery that is not the first of its attempt."""
    tasks = sorted({row["task_id"] for row in rows if row["task_id"] and row["attempt"] is not None})
    found: dict[str, int] = {}
    for begin in range(0, len(tasks), _AT_ONCE):
        some = tasks[begin : begin + _AT_ONCE]
        found.update(
            tuple(row)
            for row in db.execute(
                "SELECT run_id, delivery FROM (SELECT run_id, row_number() OVER"
                f" (PARTITION BY task_id, {ROUND}, attempt ORDER BY started_at, run_id) AS delivery"
                " FROM runs"
                f" WHERE attempt IS NOT NULL AND task_id <> '' AND task_id IN ({', '.join('?' * len(some))}))"
                " WHERE delivery > 1",
                some,
            )
        )
    return found


def _grown(
    rows: list[sqlite3.Row], parents: dict[str, str], deliveries: dict[str, int], began: float
) -> list[Node]:
    """Put each run under its parent, in the order of the rows, and add up from the leaves."""
    moved = _cut_circles([row["run_id"] for row in rows], parents)
    nodes = {row["run_id"]: _node(row, deliveries, began) for row in rows}
    children: dict[str, list[str]] = {run_id: [] for run_id in nodes}
    top = [run_id for run_id in nodes if run_id not in parents]
    for run_id, parent in parents.items():
        children[parent].append(run_id)
    order: list[tuple[str, str]] = []
    """Each run and the one that it hangs on, parents first."""
    waiting = [(run_id, "", 1) for run_id in reversed(top)]
    while waiting:
        run_id, holder, depth = waiting.pop()
        order.append((run_id, holder))
        holds, below = (run_id, depth + 1) if depth < DEEPEST else (holder, depth)
        waiting.extend((child, holds, below) for child in reversed(children[run_id]))
    for run_id, holder in reversed(order):
        if run_id in parents:
            _add(nodes[parents[run_id]]["subtotal"], nodes[run_id]["subtotal"])
        nodes[run_id]["moved"] = run_id in moved or holder != parents.get(run_id, "")
    for run_id, holder in order:
        if holder:
            nodes[holder]["children"].append(nodes[run_id])
    return [nodes[run_id] for run_id in top]


def _cut_circles(run_ids: list[str], parents: dict[str, str]) -> set[str]:
    """Take the first run of each circle out of its parent's hands, and return these runs."""
    place = {run_id: number for number, run_id in enumerate(run_ids)}
    done: set[str] = set()
    cut: set[str] = set()
    for run_id in run_ids:
        path: dict[str, None] = {}
        while run_id and run_id not in done and run_id not in path:
            path[run_id] = None
            run_id = parents.get(run_id, "")
        if run_id in path:
            met = list(path)
            first = min(met[met.index(run_id) :], key=place.__getitem__)
            del parents[first]
            cut.add(first)
        done.update(path)
    return cut


def _node(row: sqlite3.Row, deliveries: dict[str, int], began: float) -> Node:
    found: Any = summarized(row)
    for name in ("began", "root_run_id", "parent_task_id"):
        del found[name]
    counted = row["task_id"] and row["attempt"] is not None
    found["delivery"] = deliveries.get(row["run_id"], 1) if counted else None
    found["offset_ms"] = round((row["began"] - began) * 1000, 1)
    found["subtotal"] = {"runs": 1} | {name: row[name] for name in Sums.__annotations__}
    found["moved"] = False
    found["children"] = []
    node: Node = found
    return node


def _add(total: Total, more: Total) -> None:
    """Add sums to sums: a sum of nothing but unknowns is none, and that of no calls is 0."""
    total["runs"] += more["runs"]
    total["calls"] += more["calls"]
    total["cost_unknown"] += more["cost_unknown"]
    total["tokens_in_unknown"] += more["tokens_in_unknown"]
    total["tokens_out_unknown"] += more["tokens_out_unknown"]
    tokens_in = (total["tokens_in"] or 0) + (more["tokens_in"] or 0)
    tokens_out = (total["tokens_out"] or 0) + (more["tokens_out"] or 0)
    calls = total["calls"]
    total["tokens_in"] = None if calls and total["tokens_in_unknown"] >= calls else tokens_in
    total["tokens_out"] = None if calls and total["tokens_out_unknown"] >= calls else tokens_out
    costs = [cost for cost in (total["cost_usd"], more["cost_usd"]) if cost is not None]
    total["cost_usd"] = sum(costs) if costs else None
