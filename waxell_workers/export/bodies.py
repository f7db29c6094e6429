"""Records as bodies of the platform's REST endpoints: pure functions, one per body.

The source of every field is WIRE: the platform's HTTP protocol as waxell-observe 0.1.10 speaks it. It has no
place for our ids, for times (the server stamps arrival) and for most states, so these travel in its open
objects: `metadata.waxell` of the start, `attributes` of spans, `result.waxell` of the end. Times there are
Unix seconds, as in the records.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from .._version import __version__
from ..core.records import LLMCall, RunEnded, RunStarted, RunUpdated, Step
from .counts import tokens_out

PREVIEW = 500
"""Characters of a prompt or response that WIRE section 3 has room for."""
_OURS = "waxell"
_TRACE_ID = re.compile(r"[0-9a-f]{32}")

STATUS = {
    "success": "success",
    "ignored": "success",
    "error": "error",
    "retry": "error",
    "rejected": "error",
    "killed": "error",
    "revoked": "interrupted",
    "interrupted": "interrupted",
}
"""Our states to the three that WIRE section 7 knows: it ended as it meant to, it failed, it was cut short."""

_TASKS = {
    "chat": "chat.completions",
    "text_completion": "completions",
    "embeddings": "embeddings",
    "responses": "responses.create",
}
"""`gen_ai.operation.name` to `task` of WIRE section 3, which names SDK methods; others go as they are."""


def start(started: RunStarted, *, bare: bool = False) -> dict[str, Any]:
    """Make the body of `runs/start/` (WIRE section 2).

    Args:
        started: The run, with updates folded in.
        bare: Leave out what the user has put in: for a server that refuses it.
    """
    ours = {
        "run_id": started.run_id,
        "started_at": started.at,
        "trace_id": started.trace_id,
        "parent_run_id": started.parent_run_id,
        "root_run_id": started.root_run_id,
        "task_id": started.task_id,
        "client": f"waxell-workers/{__version__}",
    }
    body: dict[str, Any] = {
        "agent_name": started.agent_name,
        "workflow_name": started.workflow_name,
        "inputs": {} if bare else started.inputs,
        "metadata": {_OURS: ours} if bare else {**_metadata(started), _OURS: {**_folded(started), **ours}},
        "trace_id": "",  # always empty here; `complete` has it
        "interaction_mode": "interactive" if started.session_id else "autonomous",
    }
    for name in ("user_id", "user_group", "session_id"):
        if value := getattr(started, name):
            body[name] = value
    return body


def fold(started: RunStarted, update: RunUpdated) -> RunStarted:
    """Merge tags and metadata into the start: REST has no endpoint for them, start or end take them along.

    Doing it twice changes nothing.
    """
    folded = _folded(started)
    ours = {
        "tags": {**folded.get("tags", {}), **update.tags},
        "metadata": {**folded.get("metadata", {}), **update.metadata},
    }
    metadata = {**started.metadata, **update.metadata, _OURS: ours}
    return msgspec.structs.replace(started, metadata=metadata)


def _metadata(started: RunStarted) -> dict[str, Any]:
    return {**started.ambient, **started.metadata}


def _folded(started: RunStarted) -> dict[str, Any]:
    """Return the tags and the metadata that have been folded in, and the tags that the run began with."""
    ours = started.metadata.get(_OURS)
    if not isinstance(ours, dict):  # a user's own key of this name gives way
        return {"tags": started.tags} if started.tags else {}
    found = {name: ours[name] for name in ("tags", "metadata") if isinstance(ours.get(name), dict)}
    return {**found, "tags": {**started.tags, **found.get("tags", {})}}


def call(call: LLMCall) -> dict[str, Any]:
    """Make a record of `llm-calls/` (WIRE section 3); unknown tokens are 0 there, an unknown cost 0.0."""
    record: dict[str, Any] = {
        "model": call.model,
        "tokens_in": call.tokens_in or 0,
        "tokens_out": call.tokens_out or 0,
        "cost": _cost(call),
        "task": task(call),
        "prompt_preview": call.prompt[:PREVIEW],
        "response_preview": call.response[:PREVIEW],
        "status": "error" if call.status == "error" else "ok",  # a user may say anything
        "error_type": call.error_type,
        "error_message": call.error_message,
    }
    if call.streamed:
        record["is_streaming"] = True
        if call.ttft_ms is not None:
            record["ttft_ms"] = round(call.ttft_ms)
    return record


def task(call: LLMCall) -> str:
    """Name the SDK method of a call, as WIRE section 3 does."""
    if call.operation == "chat" and call.response_id.startswith("resp_"):
        return "responses.create"  # both interfaces of OpenAI are the operation "chat"; the id tells
    return _TASKS.get(call.operation, call.operation)


def step(step: Step) -> dict[str, Any]:
    """Make a record of `steps/` (WIRE section 4), whose output is an object."""
    output = step.output
    if not isinstance(output, dict):
        output = {} if output is None else {"output": output}
    return {"step_name": step.name, "output": output, "position": step.position}


def llm_span(call: LLMCall, started: RunStarted, position: int) -> dict[str, Any]:
    """Make the span of a call (WIRE section 5): what its record in `llm-calls/` has no field for.

    What is not known is not among the attributes: that is how an unknown count or cost differs from 0.
    """
    attributes: dict[str, Any] = {
        "waxell.call_id": call.id,
        "waxell.started_at": call.at,
        "model": call.model,
        "gen_ai.provider.name": call.provider,
        "gen_ai.operation.name": call.operation,
        "task": task(call),
    }
    optional = {
        "tokens_in": call.tokens_in,
        "tokens_out": tokens_out(call),
        "total_tokens": _total(call),
        "cost": call.cost_usd,
        "waxell.duration_ms": call.duration_ms,
        "gen_ai.response.model": call.response_model,
        "gen_ai.response.id": call.response_id,
        "gen_ai.response.finish_reasons": [call.finish_reason] if call.finish_reason else None,
        "gen_ai.is_streaming": call.streamed,
        "gen_ai.server.time_to_first_token_ms": call.ttft_ms,
        "waxell.tokens_cached": call.tokens_cached,
        "waxell.tokens_cache_written": call.tokens_cache_written,
        "waxell.tokens_reasoning": call.tokens_reasoning,
        "waxell.tool_calls": call.tool_calls,
        "error.type": call.error_type,
        "exception.message": call.error_message,
        "waxell.metadata": call.metadata,
    }
    attributes.update({name: value for name, value in optional.items() if _says_something(value)})
    return {
        "name": f"{call.operation} {call.model}",
        "kind": "llm",
        "status": "error" if call.status == "error" else "ok",
        "duration_ms": _whole(call.duration_ms),
        "position": position,
        "start_offset_ms": _offset(call.at, started),
        "parent_position": 0,
        "attributes": attributes,
        "input_data": _input(call),
        "output_data": _output(call),
    }


def content_size(span: dict[str, Any]) -> int:
    """Return about how many characters `without_content` would take away."""
    given, answered = span["input_data"] or {}, span["output_data"] or {}
    messages = given.get("full_messages", [])
    return sum(len(str(each["content"])) for each in messages) + len(answered.get("full_response", ""))


def without_content(span: dict[str, Any]) -> dict[str, Any]:
    """Return a span of a call without messages and the whole answer: previews remain."""
    short = dict(span)
    for name in ("input_data", "output_data"):
        if short[name] is not None:
            short[name] = {key: value for key, value in short[name].items() if not key.startswith("full_")}
    return short


def _input(call: LLMCall) -> dict[str, Any] | None:
    told: dict[str, Any] = {"prompt_preview": call.prompt[:PREVIEW]} if call.prompt else {}
    if call.messages:
        told["full_messages"] = [
            {"role": message.get("role", ""), "content": message.get("text", "")} for message in call.messages
        ]
    elif len(call.prompt) > PREVIEW:
        told["full_messages"] = [{"role": "user", "content": call.prompt}]
    return told or None


def _output(call: LLMCall) -> dict[str, Any] | None:
    if not call.response:
        return None
    told: dict[str, Any] = {"response_preview": call.response[:PREVIEW]}
    if len(call.response) > PREVIEW:
        told["full_response"] = call.response
    return told


def _total(call: LLMCall) -> int | None:
    output = tokens_out(call)
    return None if call.tokens_in is None or output is None else call.tokens_in + output


def _says_something(value: Any) -> bool:
    """False for what is not known, empty or False; 0 is a number like any other."""
    return value is not None and value is not False and value not in ("", [], {})


def root_span(started: RunStarted, ended: RunEnded) -> dict[str, Any]:
    """Make the span of the run itself (WIRE section 5): kind `agent`, position 0."""
    attributes: dict[str, Any] = {
        "waxell.run_id": started.run_id,
        "waxell.state": ended.state,
        "waxell.started_at": started.at,
        "waxell.ended_at": ended.at,
    }
    span: dict[str, Any] = {
        "name": f"{started.agent_name}.{started.workflow_name}",
        "kind": "agent",
        "status": "ok" if _status(ended) == "success" else "error",
        "duration_ms": _whole(ended.duration_ms),
        "position": 0,
        "start_offset_ms": 0,
        "parent_position": None,
        "attributes": attributes,
        "input_data": None,
        "output_data": None,
    }
    if _status(ended) != "success":
        attributes["error.type"] = error_type(ended)
        attributes["error.message"] = ended.error_message
        span["events"] = [
            {
                "name": "exception",
                "attributes": {
                    "exception.type": error_type(ended),
                    "exception.message": ended.error_message,
                    "exception.stacktrace": ended.traceback,
                },
            }
        ]
    return span


def complete(started: RunStarted, ended: RunEnded, *, bare: bool = False) -> dict[str, Any]:
    """Make the body of `complete/` (WIRE section 7).

    Args:
        started: The run, with updates folded in.
        ended: Its end.
        bare: Leave out what the user has put in: for a server that refuses it.
    """
    ours: dict[str, Any] = {
        "run_id": started.run_id,
        "state": ended.state,
        "reason": ended.reason,
        "duration_ms": ended.duration_ms,
        "started_at": started.at,
        "ended_at": ended.at,
    }
    result: dict[str, Any] = {_OURS: ours}
    if not bare:
        ours.update({"tags": {}, "metadata": {}, **_folded(started)})
        if ended.result is not None:
            result["output"] = ended.result
    status = _status(ended)
    kind = error_type(ended)
    body: dict[str, Any] = {
        "result": result,
        "status": status,
        "error": "" if status == "success" else (not bare and ended.error_message) or kind,
        "steps": [],
    }
    if status != "success":
        body["error_type"] = kind
    if ended.traceback and not bare:
        body["traceback"] = ended.traceback
    if _TRACE_ID.fullmatch(started.trace_id):
        body["trace_id"] = started.trace_id
    return body


def error_type(ended: RunEnded) -> str:
    """Name the exception that ended a run, or the state where there was none (`killed`)."""
    return ended.error_type or ended.state


def _status(ended: RunEnded) -> str:
    return STATUS.get(ended.state, "error")


def _cost(call: LLMCall) -> float:
    return 0.0 if call.cost_usd is None else float(call.cost_usd)


def _whole(duration_ms: float | None) -> int | None:
    return None if duration_ms is None else round(duration_ms)


def _offset(at: float, started: RunStarted) -> int:
    return max(0, round((at - started.at) * 1000))
