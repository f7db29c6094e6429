"""The records that a worker writes and the shipper reads: one line of JSON each.

A record is small, frozen and complete in itself; its `id` is made by the client, so that a repeat is
recognised wherever it turns up. `kind` is the tag of the line. The definitions are the on-disk format of
the journal and the body of the `ingest` endpoint: a field may be added with a default, never renamed or
given another meaning.
"""

from __future__ import annotations

from typing import Any

import msgspec

FORMAT_VERSION = 1
"""Version of the journal's lines; a segment opens with `{"kind":"segment","version":1}`."""

STATES = ("success", "error", "retry", "ignored", "rejected", "revoked", "killed", "interrupted")
"""The states in which a run can end."""


class _Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    id: str
    """Unique over all records of all processes; made by the writer."""
    at: float
    """Unix time in seconds at which the event happened (for a call: began)."""
    proc: int = 0
    """The writer's byte in the `procs` file: whoever can lock it knows that the writer is dead."""


class RunStarted(_Record, frozen=True, kw_only=True, tag="run_started"):
    """A run, that is one attempt of a task or one `WaxellContext`, has begun."""

    run_id: str
    agent_name: str
    workflow_name: str = "default"
    inputs: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    session_id: str = ""
    user_id: str = ""
    user_group: str = ""
    parent_run_id: str = ""
    root_run_id: str = ""
    trace_id: str = ""
    """32 hexadecimal digits, as in W3C Trace Context."""
    task_id: str = ""
    """The framework's task id; a `TaskLost` finds its run by it."""
    tags: dict[str, Any] = {}
    """What the run has from the one that enqueued it, or is around it."""
    ambient: dict[str, Any] = {}
    """Metadata, likewise; `metadata` counts above it."""


class LLMCall(_Record, frozen=True, kw_only=True, tag="llm_call"):
    """One call of a model: completed, failed, or a stream that has ended."""

    run_id: str = ""
    """Empty outside any run: the shipper then groups the call into a run named `auto:{model}`."""
    model: str
    """The model that was asked for."""
    response_model: str = ""
    provider: str = ""
    """As `gen_ai.provider.name` of the OpenTelemetry GenAI conventions: `openai`, `anthropic`, …"""
    operation: str = "chat"
    """As `gen_ai.operation.name`: `chat`, `embeddings`, …"""
    tokens_in: int | None = None
    """Of the prompt, with the cached ones. None, here and below: the provider did not say, which is not 0."""
    tokens_out: int | None = None
    """Of the response, with those of reasoning."""
    tokens_cached: int | None = None
    tokens_cache_written: int | None = None
    """Of the prompt, the ones that were written to the provider's cache."""
    tokens_reasoning: int | None = None
    cost_usd: float | None = None
    """None until somebody knows it; the shipper prices known models."""
    duration_ms: float | None = None
    ttft_ms: float | None = None
    streamed: bool = False
    status: str = "ok"
    """`ok` or `error`."""
    error_type: str = ""
    error_message: str = ""
    prompt: str = ""
    response: str = ""
    messages: list[dict[str, Any]] = []
    """What was sent: `role` and `text` of each message. Like prompt and response, empty unless
    `capture_content` is on."""
    tool_calls: list[dict[str, Any]] = []
    """The tools that the model asked for: `name`, `id`; `arguments` only with `capture_content`."""
    response_id: str = ""
    finish_reason: str = ""
    metadata: dict[str, Any] = {}


class Step(_Record, frozen=True, kw_only=True, tag="step"):
    """A named step of a run, with its output."""

    run_id: str
    name: str
    output: Any = None
    position: int = 0


class RunUpdated(_Record, frozen=True, kw_only=True, tag="run_updated"):
    """Tags or metadata were set on a run while it ran: written at once, so that a killed run has them."""

    run_id: str
    tags: dict[str, Any] = {}
    metadata: dict[str, Any] = {}


class RunEnded(_Record, frozen=True, kw_only=True, tag="run_ended"):
    """A run has ended; the first one counts."""

    run_id: str
    state: str = "success"
    """One of `STATES`."""
    reason: str = ""
    """Why, in words for people: `killed: hard time limit of 30 s`. Empty where an error says it."""
    duration_ms: float | None = None
    error_type: str = ""
    error_message: str = ""
    traceback: str = ""
    result: Any = None


class TaskLost(_Record, frozen=True, kw_only=True, tag="task_lost"):
    """A supervising process says that the process which ran a task is gone, and why."""

    task_id: str
    reason: str
    """For people, after the state: `hard time limit of 30 s`, `stopped by user`."""
    error_type: str = ""
    """The framework's exception: `WorkerLostError`, `TimeLimitExceeded`, …"""
    state: str = "killed"
    """What became of the run: `killed`, or `revoked` if somebody asked for it."""


Record = RunStarted | LLMCall | Step | RunUpdated | RunEnded | TaskLost
