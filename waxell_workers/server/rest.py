"""What the REST requests of a run mean for the store: WIRE sections 2 to 7 of the platform's protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from .model import LATEST, iso
from .store import Store
from .values import (
    amount,
    dumps,
    error_line,
    integer,
    is_end_state,
    is_run_id,
    items,
    mapping,
    moment,
    number,
    text,
    tokens,
    words,
)
from .writes import CallMade, End, Start, Writer

OURS = "waxell"
"""The key in `metadata` and `result` under which our own client sends what the protocol has no field for."""

_ALLOW: dict[str, Any] = {"action": "allow", "reason": "", "evaluations": []}


@dataclass(frozen=True, slots=True)
class RunRequest:
    """A request about one run that exists, inside its transaction."""

    writer: Writer
    run_id: str
    body: dict[str, Any]
    at: float
    """When it arrived, in Unix seconds."""


def start(store: Store, body: dict[str, Any], at: float, fresh_id: str) -> dict[str, Any]:
    """Start a run. A repeat with the same id of the client's changes nothing and gets the same answer.

    Raises:
        HTTPException: 400, there is no `agent_name`.
    """
    name = text(body.get("agent_name"))
    if not name:
        raise HTTPException(400, "agent_name: expected a string that is not empty")
    metadata = dict(mapping(body.get("metadata")))
    ours = dict(mapping(metadata.pop(OURS, None)))
    run_id = ours.pop("run_id", "")
    if not is_run_id(run_id):
        run_id = fresh_id
    started_at = moment(ours.pop("started_at", None), LATEST) or at
    tags, updated = mapping(ours.pop("tags", None)), mapping(ours.pop("metadata", None))
    ours.pop("client", None)
    if group := text(body.get("user_group")):
        metadata["user_group"] = group
    start = Start(
        agent_name=name,
        workflow_name=text(body.get("workflow_name")) or "default",
        started_at=started_at,
        source="rest",
        inputs=mapping(body.get("inputs")),
        session_id=text(body.get("session_id")),
        user_id=text(body.get("user_id")),
        trace_id=text(ours.pop("trace_id", "")) or text(body.get("trace_id")),
        task_id=text(ours.pop("task_id", "")),
        parent_run_id=text(ours.pop("parent_run_id", "")) or text(body.get("parent_workflow_id")),
        root_run_id=text(ours.pop("root_run_id", "")) or text(body.get("root_workflow_id")),
        metadata=metadata | ({OURS: ours} if ours else {}) | updated,
        tags=tags,
    )
    with store.write() as writer:
        if not writer.start(run_id, start):
            writer.count(duplicates=1)
    return {"run_id": run_id, "workflow_id": run_id, "started_at": iso(started_at)}


def add_calls(request: RunRequest) -> dict[str, Any]:
    """Store `calls`; cost is the client's estimate in US dollars, and 0.0 where it knows no price."""
    for call in _objects(request.body, "calls"):
        error = error_line(call.get("error_type"), call.get("error_message"))
        made = CallMade(
            model=text(call.get("model")),
            operation=text(call.get("task")),
            started_at=request.at,
            status=text(call.get("status")) or ("error" if error else "ok"),
            error=error,
            ttft_ms=number(call.get("ttft_ms")),
            tokens_in=tokens(call.get("tokens_in")),
            tokens_out=tokens(call.get("tokens_out")),
            cost_usd=amount(call.get("cost")) or None,
            prompt=text(call.get("prompt_preview")),
            response=text(call.get("response_preview")),
            metadata={"streamed": True} if call.get("is_streaming") is True else {},
        )
        request.writer.call(request.run_id, made)
    request.writer.match_spans(request.run_id)
    return {"governance": _ALLOW}


def add_steps(request: RunRequest) -> dict[str, Any]:
    """Store `steps`."""
    for step in _objects(request.body, "steps"):
        request.writer.step(
            request.run_id,
            name=text(step.get("step_name")),
            output=step.get("output"),
            position=integer(step.get("position")),
            at=request.at,
        )
    return {"governance": _ALLOW}


def add_spans(request: RunRequest) -> dict[str, Any]:
    """Store `spans`, and let those of kind `llm` tell what the calls do not."""
    for span in _objects(request.body, "spans"):
        kind, parent = words(span.get("kind")), span.get("parent_position")
        row = {
            "matched": kind != "llm",
            "position": integer(span.get("position")),
            "parent_position": None if parent is None else integer(parent),
            "name": words(span.get("name")),
            "kind": kind,
            "status": words(span.get("status")),
            "start_offset_ms": number(span.get("start_offset_ms")),
            "duration_ms": amount(span.get("duration_ms")),
            "attributes": dumps(mapping(span.get("attributes"))),
            "input_data": dumps(span.get("input_data")),
            "output_data": dumps(span.get("output_data")),
            "events": dumps(items(span.get("events"))),
        }
        request.writer.span(request.run_id, row)
    request.writer.match_spans(request.run_id)
    return {}


def add_scores(request: RunRequest) -> dict[str, Any]:
    """Store `scores`."""
    for score in _objects(request.body, "scores"):
        string = score.get("string_value")
        request.writer.score(
            request.run_id,
            name=text(score.get("name")),
            data_type=text(score.get("data_type")),
            value=text(string) if string is not None else number(score.get("numeric_value")),
            comment=text(score.get("comment")),
        )
    return {}


def complete(request: RunRequest) -> dict[str, Any]:
    """End a run; the first end counts. `duration` in the reply is in seconds."""
    body, writer = request.body, request.writer
    result = body.get("result")
    ours: dict[str, Any] = {}
    if isinstance(result, dict):
        result = dict(result)
        ours = mapping(result.pop(OURS, None))
        if ours and list(result) == ["output"]:  # the protocol wants an object; the task's result is inside
            result = result["output"]
    kind, message = body.get("error_type"), body.get("error")
    # the protocol wants an error; where there was none, our client has put the state there
    if ours and kind == ours.get("state"):
        kind, message = "", "" if message == kind else message
    error = error_line(kind, message)
    stated: list[Any] = [ours.get("state"), body.get("status"), "error" if error else "success"]
    end = End(
        status=next(state for state in stated if is_end_state(state)),
        ended_at=moment(ours.get("ended_at"), LATEST) or request.at,
        duration_ms=amount(ours.get("duration_ms")),
        error=error,
        error_type=words(kind),
        reason=words(ours.get("reason")),
        traceback=text(body.get("traceback")),
        result=None if result == {} else result,
        trace_id=text(body.get("trace_id")),
    )
    if writer.end(request.run_id, end):
        writer.update(request.run_id, tags=mapping(ours.get("tags")), metadata=mapping(ours.get("metadata")))
    else:
        writer.count(duplicates=1)
    for step in _objects(body, "steps"):  # the platform's client always sends an empty list
        add_steps(RunRequest(writer, request.run_id, {"steps": [step]}, request.at))
    governance = {"action": "allow", "reason": "", "retry_feedback": "", "max_retries": 0}
    return {
        "run_id": request.run_id,
        "duration": writer.duration_s(request.run_id),
        "governance": governance,
    }


def _objects(body: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = body.get(name, [])
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise HTTPException(400, f"{name}: expected a list of objects")
    return found
