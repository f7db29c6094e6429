"""Answers in the shape of Anthropic's messages, as in https://docs.anthropic.com/en/api/messages-streaming.

The tokens of a request are told in three parts there: those read from the cache and those written to it are
not among `input_tokens`. Behaviours are those of `openai_wire`, as far as they make sense.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .answers import ARGUMENT_PIECES, ARGUMENTS, TOOL, asks_for_a_tool, dated, pieces_for

Json = dict[str, Any]

USAGE: Json = {
    "input_tokens": 21,
    "cache_read_input_tokens": 5,
    "cache_creation_input_tokens": 9,
    "output_tokens": 10,
    "service_tier": "standard",
}
FIRST_OUTPUT_TOKENS = 1
"""What `message_start` says: the tokens so far."""
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


def error(status: int) -> Json:
    """Return the body of an error."""
    kind = _ERRORS.get(status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": f"asked for: {status}"}}


def _usage(behaviour: str) -> Json:
    if behaviour == "no-details":
        return {"input_tokens": USAGE["input_tokens"], "output_tokens": USAGE["output_tokens"]}
    return USAGE


def messages(behaviour: str, body: Json) -> Json:
    """Return a message."""
    text: Json = {"type": "text", "text": "".join(pieces_for(behaviour)), "citations": None}
    content, reason = [text], "max_tokens" if behaviour == "length" else "end_turn"
    if asks_for_a_tool(behaviour, body, "tool_result"):
        content = [{"type": "tool_use", "id": "toolu_1", "name": TOOL, "input": ARGUMENTS}]
        reason = "tool_use"
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": dated(behaviour),
        "content": content,
        "stop_reason": reason,
        "stop_sequence": None,
        "usage": _usage(behaviour),
    }


def messages_events(behaviour: str, body: Json) -> Iterator[str]:
    """Yield the events of a streamed message."""
    for event in _events(behaviour, body):
        yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"


def _events(behaviour: str, body: Json) -> Iterator[Json]:
    message = messages(behaviour, body)
    usage = {**message["usage"], "output_tokens": FIRST_OUTPUT_TOKENS}
    yield {
        "type": "message_start",
        "message": {**message, "content": [], "stop_reason": None, "usage": usage},
    }
    block = message["content"][0]
    if block["type"] == "tool_use":
        begun, kind, member, pieces = (
            {**block, "input": {}},
            "input_json_delta",
            "partial_json",
            ARGUMENT_PIECES,
        )
    else:
        begun, kind, member, pieces = {**block, "text": ""}, "text_delta", "text", pieces_for(behaviour)
    yield {"type": "content_block_start", "index": 0, "content_block": begun}
    yield {"type": "ping"}
    for number, piece in enumerate(pieces):
        if number and behaviour == "error-event":
            yield {"type": "error", "error": {"type": "overloaded_error", "message": "asked for"}}
            return
        yield {"type": "content_block_delta", "index": 0, "delta": {"type": kind, member: piece}}
    yield {"type": "content_block_stop", "index": 0}
    delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    # Cumulative, and seldom more than this: what went in was told at the start.
    yield {
        "type": "message_delta",
        "delta": delta,
        "usage": {"output_tokens": message["usage"]["output_tokens"]},
    }
    yield {"type": "message_stop"}
