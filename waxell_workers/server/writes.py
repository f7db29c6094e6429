"""The writes of one transaction: runs, their calls, steps, spans and scores, in whatever order they come.

A run that is not known yet gets a placeholder, which its start fills in later. The first end of a run counts.
Nothing here commits: `Store.write` does, or takes everything back.

What lists show is cut to a size that a list can bear, and sums stay numbers that a database holds, so that no
record, however large, spoils the page of all runs. What only the run itself shows is kept whole.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from typing import Any

from ..export.counts import WITHOUT_OUTPUT
from .facts import facts
from .model import LATEST, RUNNING
from .values import (
    LONGEST_LINE,
    MAX_INT,
    amount,
    cut,
    dumps,
    integer,
    items,
    loads,
    mapping,
    moment,
    small,
    text,
    tokens,
    words,
)


@dataclass(frozen=True, slots=True)
class Start:
    """What the start of a run tells."""

    agent_name: str
    workflow_name: str
    started_at: float
    source: str
    inputs: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)
    session_id: str = ""
    user_id: str = ""
    trace_id: str = ""
    task_id: str = ""
    parent_run_id: str = ""
    root_run_id: str = ""


@dataclass(frozen=True, slots=True)
class End:
    """What the end of a run tells."""

    status: str
    ended_at: float
    duration_ms: float | None = None
    error: str = ""
    error_type: str = ""
    reason: str = ""
    traceback: str = ""
    result: Any = None
    trace_id: str = ""


@dataclass(frozen=True, slots=True)
class CallMade:
    """One call of a model."""

    model: str
    started_at: float
    call_id: str = ""
    response_model: str = ""
    provider: str = ""
    operation: str = ""
    status: str = "ok"
    error: str = ""
    duration_ms: float | None = None
    ttft_ms: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_cached: int | None = None
    tokens_cache_written: int | None = None
    tokens_reasoning: int | None = None
    cost_usd: float | None = None
    prompt: str = ""
    response: str = ""
    messages: list[Any] = field(default_factory=list)
    tool_calls: list[Any] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


class Writer:
    """Writes to one connection, inside a transaction that somebody else ends."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        self.runs_added = 0

    def exists(self, run_id: str) -> bool:
        """Tell whether anything of this run has been stored."""
        return self._db.execute("SELECT 1 FROM runs WHERE run_id = ?", (run_id,)).fetchone() is not None

    def place(self, run_id: str, at: float, source: str) -> None:
        """Make sure that there is a row for this run; one without a start is a placeholder."""
        added = self._db.execute(
            "INSERT OR IGNORE INTO runs (run_id, started_at, source) VALUES (?, ?, ?)", (run_id, at, source)
        )
        self.runs_added += added.rowcount

    def start(self, run_id: str, start: Start) -> bool:
        """Store the start of a run; return False, and change nothing, if it is known already."""
        self.place(run_id, start.started_at, start.source)
        row = self._db.execute(
            "SELECT known, metadata, tags, trace_id FROM runs WHERE run_id = ?", (run_id,)
        ).fetchone()
        if row["known"]:
            return False
        metadata = start.metadata | loads(row["metadata"])  # an update that came before its start is newer
        if start.task_id:
            metadata.setdefault("task_id", start.task_id)
        told = {
            "known": 1,
            "agent_name": cut(start.agent_name),
            "workflow_name": cut(start.workflow_name),
            "started_at": start.started_at,
            "source": start.source,
            "inputs": dumps(start.inputs),
            "metadata": small(metadata),
            "tags": small(start.tags | loads(row["tags"])),
            "session_id": cut(start.session_id),
            "user_id": cut(start.user_id),
            "task_id": cut(start.task_id) or _task_id(metadata),
            "parent_run_id": cut(start.parent_run_id),
            "root_run_id": cut(start.root_run_id),
            "trace_id": row["trace_id"] or cut(start.trace_id),
        }
        self._change(run_id, told | facts(metadata))
        return True

    def end(self, run_id: str, end: End) -> bool:
        """Store the end of a run; return False, and change nothing, if it has ended already."""
        changed = self._db.execute(
            "UPDATE runs SET status = ?, ended_at = ?, duration_ms = ?, error = ?, error_type = ?,"
            " reason = ?, traceback = ?, result = ?, trace_id = coalesce(nullif(?, ''), trace_id)"
            " WHERE run_id = ? AND status = ?",
            (
                end.status,
                end.ended_at,
                amount(end.duration_ms),
                cut(end.error, LONGEST_LINE),
                # where there was no exception, REST repeats the state
                "" if end.error_type == end.status else cut(end.error_type),
                cut(end.reason),
                end.traceback,
                dumps(end.result),
                cut(end.trace_id),
                run_id,
                RUNNING,
            ),
        )
        return changed.rowcount > 0

    def started_at(self, run_id: str) -> float:
        """Return when a run that is stored began, in Unix seconds."""
        row = self._db.execute("SELECT started_at FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        return float(row[0])

    def duration_s(self, run_id: str) -> float:
        """Return how long a run took, in seconds; 0 while it runs."""
        row = self._db.execute(
            "SELECT coalesce(duration_ms / 1000, ended_at - started_at, 0) FROM runs WHERE run_id = ?",
            (run_id,),
        ).fetchone()
        return round(max(float(row[0]), 0.0), 6)

    def update(self, run_id: str, *, tags: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Add tags and metadata to a run; a key that is there gets the new value."""
        if not tags and not metadata:
            return
        row = self._db.execute(
            "SELECT tags, metadata, task_id FROM runs WHERE run_id = ?", (run_id,)
        ).fetchone()
        merged = loads(row["metadata"]) | metadata
        told = {
            "tags": small(loads(row["tags"]) | tags),
            "metadata": small(merged),
            "task_id": row["task_id"] or _task_id(merged),  # what the run was said to belong to stays
        }
        self._change(run_id, told | facts(metadata))

    def call(self, run_id: str, call: CallMade) -> None:
        """Store a call, and add it to the sums of its run."""
        tokens_in, tokens_out, cost = tokens(call.tokens_in), tokens(call.tokens_out), amount(call.cost_usd)
        if tokens_out is None and call.operation in WITHOUT_OUTPUT:
            tokens_out = 0
        row = {
            "run_id": run_id,
            "call_id": cut(call.call_id),
            "model": cut(call.model),
            "response_model": cut(call.response_model),
            "provider": cut(call.provider),
            "operation": cut(call.operation),
            "status": cut(call.status),
            "error": cut(call.error, LONGEST_LINE),
            "started_at": call.started_at,
            "duration_ms": amount(call.duration_ms),
            "ttft_ms": amount(call.ttft_ms),
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
            "tokens_cached": tokens(call.tokens_cached),
            "tokens_cache_written": tokens(call.tokens_cache_written),
            "tokens_reasoning": tokens(call.tokens_reasoning),
            "cost_usd": cost,
            "prompt": call.prompt,
            "response": call.response,
            "messages": dumps(call.messages),
            "tool_calls": dumps(call.tool_calls),
            "metadata": dumps(call.metadata),
        }
        self._insert("calls", row)
        self._db.execute(
            "UPDATE runs SET calls = calls + 1, tokens_in = min(tokens_in + ?, ?),"
            " tokens_out = min(tokens_out + ?, ?), cost_usd = coalesce(cost_usd + ?, cost_usd, ?)"
            " WHERE run_id = ?",
            (tokens_in or 0, MAX_INT, tokens_out or 0, MAX_INT, cost, cost, run_id),
        )
        self._leave_out(run_id, tokens_in=tokens_in is None, tokens_out=tokens_out is None, cost=cost is None)

    def step(self, run_id: str, *, name: str, output: object, position: int, at: float) -> None:
        """Store a step."""
        row = {"name": cut(name), "output": dumps(output), "position": integer(position), "at": at}
        self._insert("steps", {"run_id": run_id} | row)

    def span(self, run_id: str, row: dict[str, Any]) -> None:
        """Store a span; `row` has the columns of the table `spans`."""
        self._insert("spans", {"run_id": run_id} | row)

    def score(
        self, run_id: str, *, name: str, data_type: str, value: float | str | None, comment: str
    ) -> None:
        """Store a score."""
        kept = cut(value, LONGEST_LINE) if isinstance(value, str) else value
        row = {
            "name": cut(name),
            "data_type": cut(data_type),
            "value": dumps(kept),
            "comment": cut(comment, LONGEST_LINE),
        }
        self._insert("scores", {"run_id": run_id} | row)

    def match_spans(self, run_id: str) -> None:
        """Give REST calls the duration, times and provider that only their spans have.

        The protocol links the two by nothing, and they come in separate requests, in either order: the n-th
        span of a model with these token counts is taken for the n-th call of that model with these counts. A
        call's record has 0 for a count that is not known; the span of our own client has none.
        """
        spans = self._db.execute(
            "SELECT seq, duration_ms, attributes, input_data, output_data FROM spans"
            " WHERE run_id = ? AND NOT matched ORDER BY position, seq",
            (run_id,),
        ).fetchall()
        for span in spans:
            facts = loads(span["attributes"])
            call = self._db.execute(
                "SELECT seq, tokens_in, tokens_out, cost_usd, metadata FROM calls"
                " WHERE run_id = ? AND NOT span AND model = ?"
                " AND coalesce(tokens_in, 0) = ? AND coalesce(tokens_out, 0) = ? ORDER BY seq LIMIT 1",
                (
                    run_id,
                    words(facts.get("model")),
                    integer(facts.get("tokens_in")),
                    integer(facts.get("tokens_out")),
                ),
            ).fetchone()
            if call is not None:
                self._enrich(run_id, call, facts, span)
                self._db.execute("UPDATE spans SET matched = 1 WHERE seq = ?", (span["seq"],))

    def seen(self, record_id: str) -> bool:
        """Tell whether this ingest record was taken before."""
        return self._db.execute("SELECT 1 FROM records WHERE id = ?", (record_id,)).fetchone() is not None

    def remember(self, record_id: str, run_id: str | None, at: float) -> None:
        """Note that this ingest record was taken; it is forgotten with its run."""
        self._db.execute("INSERT INTO records VALUES (?, ?, ?)", (record_id, run_id, at))

    def count(self, **counts: int) -> None:
        """Add to the counters `accepted` and `duplicates`."""
        for name, value in counts.items():
            self._db.execute("UPDATE counters SET value = value + ? WHERE name = ?", (value, name))

    def _change(self, run_id: str, row: dict[str, Any]) -> None:
        names = ", ".join(f"{name} = ?" for name in row)
        self._db.execute(f"UPDATE runs SET {names} WHERE run_id = ?", (*row.values(), run_id))

    def _insert(self, table: str, row: dict[str, Any]) -> None:
        names, marks = ", ".join(row), ", ".join("?" * len(row))
        self._db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(row.values()))

    def _leave_out(self, run_id: str, *, tokens_in: int = 0, tokens_out: int = 0, cost: int = 0) -> None:
        """Count calls (or, negative, count them no more) that the sums of their run do not have."""
        if tokens_in or tokens_out or cost:
            self._db.execute(
                "UPDATE runs SET tokens_in_unknown = tokens_in_unknown + ?,"
                " tokens_out_unknown = tokens_out_unknown + ?, cost_unknown = cost_unknown + ?"
                " WHERE run_id = ?",
                (tokens_in, tokens_out, cost, run_id),
            )

    def _enrich(self, run_id: str, call: sqlite3.Row, facts: dict[str, Any], span: sqlite3.Row) -> None:
        given, answered = mapping(loads(span["input_data"])), mapping(loads(span["output_data"]))
        metadata = loads(call["metadata"]) | mapping(facts.get("waxell.metadata"))
        if facts.get("gen_ai.is_streaming") is True:
            metadata["streamed"] = True
        for name, value in (
            ("response_id", facts.get("gen_ai.response.id")),
            ("finish_reason", next(iter(items(facts.get("gen_ai.response.finish_reasons"))), None)),
        ):
            if word := words(value):
                metadata[name] = word
        told = {
            "call_id": words(facts.get("waxell.call_id")),
            "started_at": moment(facts.get("waxell.started_at"), LATEST),
            "duration_ms": amount(facts.get("waxell.duration_ms")) or span["duration_ms"],
            "ttft_ms": amount(facts.get("gen_ai.server.time_to_first_token_ms")),
            "provider": words(facts.get("gen_ai.provider.name")),
            "operation": words(facts.get("gen_ai.operation.name")),
            "response_model": words(facts.get("gen_ai.response.model")),
            "tokens_cached": tokens(facts.get("waxell.tokens_cached")),
            "tokens_cache_written": tokens(facts.get("waxell.tokens_cache_written")),
            "tokens_reasoning": tokens(facts.get("waxell.tokens_reasoning")),
            "tool_calls": dumps(items(facts.get("waxell.tool_calls"))),
            "messages": dumps(_messages(given)),
            "response": text(answered.get("full_response")),
            "metadata": dumps(metadata),
        }
        known: dict[str, Any] = {
            name: value for name, value in told.items() if value is not None and value not in ("", "[]")
        }
        known["span"] = 1
        cost = amount(facts.get("cost"))
        # 0.0 is a price not known, in a call; in a span too, but for our own client's, which leaves it out
        if call["cost_usd"] is None and (cost or (cost == 0 and "waxell.call_id" in facts)):
            known["cost_usd"] = cost
            self._db.execute(
                "UPDATE runs SET cost_usd = coalesce(cost_usd, 0) + ? WHERE run_id = ?", (cost, run_id)
            )
            self._leave_out(run_id, cost=-1)
        if "waxell.call_id" in facts:
            untold = [name for name in ("tokens_in", "tokens_out") if name not in facts and call[name] == 0]
            known.update(dict.fromkeys(untold))
            self._leave_out(run_id, tokens_in="tokens_in" in untold, tokens_out="tokens_out" in untold)
        names = ", ".join(f"{name} = ?" for name in known)
        self._db.execute(f"UPDATE calls SET {names} WHERE seq = ?", (*known.values(), call["seq"]))


def _messages(given: dict[str, Any]) -> list[Any]:
    """Return the messages of a span as the records have them."""
    found = [mapping(message) for message in items(given.get("full_messages"))]
    return [{"role": message.get("role"), "text": message.get("content")} for message in found]


def _task_id(metadata: dict[str, Any]) -> str:
    found = metadata.get("task_id")
    return cut(found) if isinstance(found, str) else ""
