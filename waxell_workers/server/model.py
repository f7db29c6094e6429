"""What the store hands out: plain dictionaries that are JSON as they are.

The first fields of a run's summary are the stable ones of `waxell-workers runs ls --json`. Times are ISO 8601
in UTC, durations milliseconds, money US dollars. None means: not known. A sum is of what is known; how many
calls it leaves out is in the field of its name with `_unknown`; a sum of nothing but unknowns is None.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, TypedDict

RUNNING = "running"
"""The status of a run that has not ended; the others are `core.records.STATES`, or what the client said."""


class _Stable(TypedDict):
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


class _Facts(TypedDict, total=False):
    """What a run says about its task; an older server's answers are without. Empty or None: not known."""

    framework: str
    task: str
    """The task's name in its framework; empty where a run is none (a `WaxellContext`)."""
    task_id: str
    queue: str
    attempt: int | None
    """From 1; a redelivery has the number of the delivery before."""
    enqueued_at: str | None
    eta: str | None
    wait_s: float | None
    """From being enqueued (or due, if that is later) to the start, in seconds."""
    error_type: str
    reason: str
    """How it ended, for people, where no error says it: `killed: hard time limit of 30 s`."""
    trace_id: str
    parent_run_id: str
    previous_run_id: str
    """The attempt before this one."""
    linked_run_id: str
    """The run that has enqueued it without being its parent (`propagate="link"`)."""


class RunSummary(_Stable, _Facts):
    """One line of the list of runs."""


class Sums(TypedDict):
    """Calls, tokens and money of several runs."""

    calls: int
    tokens_in: int | None
    tokens_out: int | None
    cost_usd: float | None
    tokens_in_unknown: int
    tokens_out_unknown: int
    cost_unknown: int


class Total(Sums):
    """The same, and of how many runs."""

    runs: int


class Node(RunSummary):
    """A run in a tree, with the runs below it."""

    delivery: int | None
    """The how-manieth run of this attempt: above 1, a message that was delivered again."""
    offset_ms: float
    """How long after the first run of the tree it began."""
    subtotal: Total
    """Of itself and all below it, as far as they are in the tree."""
    moved: bool
    """True if it hangs elsewhere than under its parent: nested too deep, or one of a circle of parents."""
    children: list[Node]


class Tree(Total):
    """The runs of a trace, and all that are below them; `runs` and the sums are of all."""

    trace_id: str
    """Empty if the runs have none, and are held together by their root."""
    started_at: str
    duration_ms: float | None
    """From the first start to the last end; None while a run goes on."""
    shown: int
    """How many of the runs are in `tree`."""
    truncated: bool
    tree: list[Node]


class Attempt(RunSummary):
    """One run of a task."""

    delivery: int | None


class Group(Sums):
    """All runs of one task id: its attempts and their deliveries."""

    task_id: str
    task: str
    framework: str
    queue: str
    final_state: str
    """The status of the last run."""
    reason: str
    """Of the last run; its error, if it says no reason."""
    attempts: int | None
    """How many different attempt numbers; None if no run says one."""
    deliveries: int
    """How many runs."""
    wait_s: float | None
    wait_unknown: int
    duration_ms: float | None
    duration_unknown: int
    failed: Total
    """Of those that ended neither in success nor ignored."""
    truncated: bool
    """True if `runs` are not all of them."""
    runs: list[Attempt]
    """In the order of their attempts, then of their starts."""


class Wait(TypedDict):
    """How long runs waited, in seconds; all None where no run says so."""

    mean: float | None
    p50: float | None
    p95: float | None
    max: float | None


class QueueWait(TypedDict):
    """How long runs waited in one queue."""

    framework: str
    queue: str
    runs: int
    waited: int
    """How many of the runs say how long they waited."""
    wait_s: Wait


class WaitOf(TypedDict):
    """How long one run waited, and what is usual in its queue."""

    run_id: str
    enqueued_at: str | None
    eta: str | None
    wait_s: float | None
    clock_skew_s: float | None
    """By how much at least the enqueuer's clock was ahead of the worker's."""
    usual: QueueWait | None
    """Of the newest runs of the queue; None if its queue is not known."""
    longer_than: float | None
    """The part of these waits, from 0 to 1, that were shorter."""


class Spend(Total, total=False):
    """What one task, queue, model, … has cost; a key is there if it belongs to the dimension."""

    task: str | None
    queue: str | None
    framework: str | None
    agent: str | None
    model: str | None
    provider: str | None
    session: str | None
    user: str | None
    attempt: int | None
    run: str
    status: str
    started_at: str


class WastedOn(Total):
    """What attempts have cost that failed in the same way."""

    status: str
    error_type: str
    tasks: list[str]
    """The names of the tasks that cost most, at most three."""


class Waste(TypedDict):
    """What failed attempts have cost."""

    total: Total
    by_error: list[WastedOn]


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


class _Detail(TypedDict):
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


class RunDetail(_Detail, total=False):
    """A run with everything that belongs to it; `calls` is the list here, `call_count` its length.

    What follows is missing in an older server's answer. Empty or None: not known.
    """

    framework: str
    task: str
    queue: str
    attempt: int | None
    enqueued_at: str | None
    eta: str | None
    wait_s: float | None
    error_type: str
    reason: str
    previous_run_id: str
    linked_run_id: str
    parent_task_id: str
    user_group: str


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
