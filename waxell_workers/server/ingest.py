"""The ingest endpoint's work: whole batches of journal records, in one transaction, idempotent by record id.

A record is a line of JSON as in `core.records`. They may come in any order and over several requests. What
cannot be taken is reported with its reason, and the rest is stored: a newer client is not held up by a kind
of record that this server does not know.
"""

from __future__ import annotations

import io
from typing import Any

import msgspec
from starlette.exceptions import HTTPException

from ..core.records import LLMCall, Record, RunEnded, RunStarted, RunUpdated, Step, TaskLost
from .body import MAX_VALUES, is_bounded, is_nested
from .model import LATEST
from .store import Store
from .values import MAX_DEPTH, error_line, is_end_state, is_run_id, moment, too_deep
from .writes import CallMade, End, Start, Writer

MAX_RECORDS = 50_000
"""How many records one request may carry; a shipper sends some hundreds."""

_KINDS = frozenset({"run_started", "llm_call", "step", "run_updated", "run_ended", "task_lost"})
_MAX_ID = 200
_MAX_REASON = 500
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


class Refused(Exception):
    """A record that this server will never take; the message is the reason."""


def ingest(store: Store, body: bytes) -> dict[str, Any]:
    """Store a batch.

    Args:
        store: where to.
        body: NDJSON, one record a line; empty lines are skipped.

    Returns:
        The reply: `accepted` and `duplicates` as counts, `rejected` as a list of `id` and `reason`.

    Raises:
        HTTPException: 413, more than `MAX_RECORDS` lines; nothing is stored.
        sqlite3.Error: nothing is stored.
    """
    accepted = duplicates = 0
    rejected: list[dict[str, str]] = []
    with store.write() as writer:
        for number, line in enumerate(io.BytesIO(body)):
            if number >= MAX_RECORDS:
                raise HTTPException(413, f"more than {MAX_RECORDS} records")
            if line.isspace():
                continue
            try:
                record = _decode(line)
                if writer.seen(record.id):
                    duplicates += 1
                    continue
                _apply(writer, record)
                accepted += 1
            except Refused as refused:
                rejected.append({"id": _id_of(line)[:_MAX_ID], "reason": str(refused)[:_MAX_REASON]})
        writer.count(accepted=accepted, duplicates=duplicates)
    return {"accepted": accepted, "duplicates": duplicates, "rejected": rejected}


def _decode(line: bytes) -> Record:
    if not is_bounded(line):
        raise Refused(f"more than {MAX_VALUES:,} values")
    try:
        record = _decoder.decode(line)
    except msgspec.ValidationError as error:
        found = _raw(line)
        kind = found.get("kind")
        if found and not (isinstance(kind, str) and kind in _KINDS):
            raise Refused(f"unknown kind {kind!r}"[:_MAX_ID]) from None
        raise Refused(str(error)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused(f"no valid JSON: {error}") from None
    if is_nested(line) and too_deep(_raw(line)):
        raise Refused(f"nested deeper than {MAX_DEPTH}")
    if not 0 < len(record.id) <= _MAX_ID:
        raise Refused(f"id: expected 1 to {_MAX_ID} characters")
    if moment(record.at, LATEST) is None:
        raise Refused("at: expected Unix time in seconds")
    if not isinstance(record, TaskLost) and not is_run_id(record.run_id):
        raise Refused("run_id: expected 1 to 200 letters, digits and any of _.:- (a letter or digit first)")
    if isinstance(record, RunEnded) and not is_end_state(record.state):
        raise Refused("state: expected a word in lower case that is not 'running'")
    return record


def _apply(writer: Writer, record: Record) -> None:
    if isinstance(record, TaskLost):  # the client's shipper has made a `run_ended` of it
        writer.remember(record.id, None, record.at)
        return
    run_id = record.run_id
    writer.place(run_id, record.at, "ingest")
    writer.remember(record.id, run_id, record.at)
    if isinstance(record, RunStarted):
        writer.start(run_id, _start(record))
    elif isinstance(record, LLMCall):
        writer.call(run_id, _call(record))
    elif isinstance(record, Step):
        writer.step(run_id, name=record.name, output=record.output, position=record.position, at=record.at)
    elif isinstance(record, RunUpdated):
        writer.update(run_id, tags=record.tags, metadata=record.metadata)
    else:
        writer.end(run_id, _end(record))


def _start(record: RunStarted) -> Start:
    return Start(
        agent_name=record.agent_name,
        workflow_name=record.workflow_name,
        started_at=record.at,
        source="ingest",
        inputs=record.inputs,
        metadata=record.ambient
        | record.metadata
        | ({"user_group": record.user_group} if record.user_group else {}),
        tags=record.tags,
        session_id=record.session_id,
        user_id=record.user_id,
        trace_id=record.trace_id,
        task_id=record.task_id,
        parent_run_id=record.parent_run_id,
        root_run_id=record.root_run_id,
    )


def _call(record: LLMCall) -> CallMade:
    extra = {
        name: getattr(record, name)
        for name in ("streamed", "response_id", "finish_reason")
        if getattr(record, name)
    }
    return CallMade(
        call_id=record.id,
        model=record.model,
        response_model=record.response_model,
        provider=record.provider,
        operation=record.operation,
        started_at=record.at,
        status=record.status,
        error=error_line(record.error_type, record.error_message),
        duration_ms=record.duration_ms,
        ttft_ms=record.ttft_ms,
        tokens_in=record.tokens_in,
        tokens_out=record.tokens_out,
        tokens_cached=record.tokens_cached,
        tokens_cache_written=record.tokens_cache_written,
        tokens_reasoning=record.tokens_reasoning,
        cost_usd=record.cost_usd,
        prompt=record.prompt,
        response=record.response,
        messages=record.messages,
        tool_calls=record.tool_calls,
        metadata=record.metadata | extra,
    )


def _end(record: RunEnded) -> End:
    return End(
        status=record.state,
        ended_at=record.at,
        duration_ms=record.duration_ms,
        error=error_line(record.error_type, record.error_message),
        error_type=record.error_type,
        reason=record.reason,
        traceback=record.traceback,
        result=record.result,
    )


def _raw(line: bytes) -> dict[str, Any]:
    if not is_bounded(line):
        return {}
    try:
        found = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _id_of(line: bytes) -> str:
    found = _raw(line).get("id")
    return found if isinstance(found, str) else ""
