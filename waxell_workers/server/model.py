"""What the store hands out: plain dictionaries that are JSON as they are.

The fields of a run's summary are the stable ones of `waxell-workers runs ls --json`. Times are ISO 8601 in
UTC, durations milliseconds, money US dollars. None means: not known. A sum is of what is known; how many
calls it leaves out is in the field of its name with `_unknown`; a sum of nothing but unknowns is None.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, TypedDict

RUNNING = "running"
"""The status of a run that has not ended; the others are `core.records.STATES`, or what the client said."""


class RunSummary(TypedDict):
    """One line of the list of runs."""

    run_id: str
    agent_name: str
    workflow_name: str
    status: str
    started_at: str
    duration_ms: float | None
    calls: int
    tokens_in: int | None
    tokens_out: int | None
    cost_usd: float | None
    error: str
    metadata: dict[str, Any]
    tokens_in_unknown: int
    tokens_out_unknown: int
    cost_unknown: int


class Call(TypedDict):
    """One call of a model. `id` is the client's, or empty if it sent none."""

    id: str
    position: int
    model: str
    response_model: str
    provider: str
    operation: str
    status: str
    error: str
    started_at: str
    duration_ms: float | None
    ttft_ms: float | None
    tokens_in: int | None
    tokens_out: int | None
    tokens_cached: int | None
    tokens_cache_written: int | None
    tokens_reasoning: int | None
    cost_usd: float | None
    prompt: str
    response: str
    messages: list[Any]
    """What was sent: `role` and `text` of each."""
    tool_calls: list[Any]
    """What the model asked for: `name`, `id`, and `arguments` if they were recorded."""
    metadata: dict[str, Any]


class Step(TypedDict):
    """A named step of a run."""

    position: int
    name: str
    output: Any
    at: str


class Span(TypedDict):
    """A span as the REST client sent it: WIRE section 5 of the platform's protocol."""

    position: int
    parent_position: int | None
    name: str
    kind: str
    status: str
    start_offset_ms: float | None
    duration_ms: float | None
    attributes: dict[str, Any]
    input_data: Any
    output_data: Any
    events: list[Any]


class Score(TypedDict):
    """A score that somebody gave a run."""

    name: str
    data_type: str
    value: float | str | None
    comment: str


class RunDetail(TypedDict):
    """A run with everything that belongs to it; `calls` is the list here, `call_count` its length."""

    run_id: str
    agent_name: str
    workflow_name: str
    status: str
    started_at: str
    duration_ms: float | None
    call_count: int
    tokens_in: int | None
    tokens_out: int | None
    cost_usd: float | None
    error: str
    metadata: dict[str, Any]
    tokens_in_unknown: int
    tokens_out_unknown: int
    cost_unknown: int
    traceback: str
    inputs: dict[str, Any]
    result: Any
    tags: dict[str, Any]
    session_id: str
    user_id: str
    trace_id: str
    task_id: str
    parent_run_id: str
    root_run_id: str
    source: str
    calls: list[Call]
    steps: list[Step]
    spans: list[Span]
    scores: list[Score]


class Stats(TypedDict):
    """Counts of everything that is stored, and of the ingest records that came."""

    runs: dict[str, int]
    calls: int
    tokens_in: int | None
    tokens_out: int | None
    cost_usd: float | None
    tokens_in_unknown: int
    tokens_out_unknown: int
    cost_unknown: int
    accepted: int
    duplicates: int


LATEST = 253402300799.0
"""Unix seconds of the last second of the year 9999: what `datetime` can say."""


def iso(at_s: float) -> str:
    """Write Unix seconds as ISO 8601 in UTC, with milliseconds."""
    bounded = min(max(at_s, 0.0), LATEST)
    return datetime.fromtimestamp(bounded, timezone.utc).isoformat(timespec="milliseconds")
