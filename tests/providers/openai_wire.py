"""Answers in the shape of OpenAI's: chat completions, legacy completions, responses, embeddings.

As in https://platform.openai.com/docs/api-reference. A behaviour is the name of the model that was asked for:

| behaviour | answer |
| --- | --- |
| `tools` | asks for the tool, until it has its result |
| `json` | a JSON object, as a structured output |
| `refusal` | refuses, as a structured output may |
| `length` | stops for its length (responses: is incomplete) |
| `failed` | responses: a response that failed, with what it had cost |
| `no-usage` | says nothing about tokens |
| `cache-write` | chat: says how many tokens were written to the cache |
| `no-details` | says nothing about cached and reasoning tokens |
| `error-event` | streams an error after the first piece |
| any other | the text |
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .answers import (
    ARGUMENT_PIECES,
    ARGUMENTS,
    PIECES,
    REFUSAL,
    TEXT,
    TOOL,
    asks_for_a_tool,
    dated,
    pieces_for,
)

Json = dict[str, Any]

CHAT_USAGE: Json = {
    "prompt_tokens": 11,
    "completion_tokens": 7,
    "total_tokens": 18,
    "prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 2, "audio_tokens": 0},
}
RESPONSES_USAGE: Json = {
    "input_tokens": 13,
    "input_tokens_details": {"cached_tokens": 5},
    "output_tokens": 8,
    "output_tokens_details": {"reasoning_tokens": 4},
    "total_tokens": 21,
}
COMPLETIONS_USAGE: Json = {"prompt_tokens": 19, "completion_tokens": 6, "total_tokens": 25}
EMBEDDINGS_USAGE: Json = {"prompt_tokens": 17, "total_tokens": 17}

VECTOR = [0.25, -0.5, 1.0]
_ERRORS = {
    400: ("invalid_request_error", "invalid_value"),
    401: ("invalid_request_error", "invalid_api_key"),
    429: ("requests", "rate_limit_exceeded"),
    500: ("server_error", "server_error"),
}


def error(status: int) -> Json:
    """Return the body of an error."""
    kind, code = _ERRORS.get(status, ("server_error", "server_error"))
    return {"error": {"message": f"asked for: {status}", "type": kind, "param": None, "code": code}}


def _usage(behaviour: str, usage: Json) -> Json | None:
    if behaviour == "no-usage":
        return None
    if behaviour == "no-details":
        return {name: value for name, value in usage.items() if not isinstance(value, dict)}
    if behaviour == "cache-write":
        return {**usage, "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 1}}
    return usage


def _data(item: Json) -> str:
    return f"data: {json.dumps(item)}\n\n"


def _error_event() -> str:
    return _data({"error": {"message": "asked for", "type": "server_error", "param": None, "code": None}})


# --- chat completions -------------------------------------------------------------------------------------


def _tool_call(arguments: str) -> Json:
    return {"id": "call_1", "type": "function", "function": {"name": TOOL, "arguments": arguments}}


def chat(behaviour: str, body: Json) -> Json:
    """Return a chat completion."""
    message: Json = {"role": "assistant", "content": "".join(pieces_for(behaviour)), "refusal": None}
    finish = "length" if behaviour == "length" else "stop"
    if asks_for_a_tool(behaviour, body, "'tool'"):
        message |= {"content": None, "tool_calls": [_tool_call(json.dumps(ARGUMENTS))]}
        finish = "tool_calls"
    elif behaviour == "refusal":
        message |= {"content": None, "refusal": REFUSAL}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    completion = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": dated(behaviour),
        "choices": [choice],
        "system_fingerprint": "fp_1",
    }
    usage = _usage(behaviour, CHAT_USAGE)
    return completion if usage is None else {**completion, "usage": usage}


def chat_events(behaviour: str, body: Json) -> Iterator[str]:
    """Yield the events of a streamed chat completion; the last has the tokens only if they are asked for."""
    usage = _usage(behaviour, CHAT_USAGE) if (body.get("stream_options") or {}).get("include_usage") else None
    chunk: Json = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1}
    chunk |= {"model": dated(behaviour), "system_fingerprint": "fp_1"}
    if usage:
        chunk["usage"] = None

    def choice(delta: Json, finish: str | None = None) -> str:
        item = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _data({**chunk, "choices": [item]})

    yield choice({"role": "assistant", "content": None if behaviour == "tools" else ""})
    finish = "length" if behaviour == "length" else "stop"
    if asks_for_a_tool(behaviour, body, "'tool'"):
        yield choice({"tool_calls": [{"index": 0, **_tool_call("")}]})
        for piece in ARGUMENT_PIECES:
            yield choice({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
        finish = "tool_calls"
    elif behaviour == "refusal":
        yield choice({"refusal": REFUSAL})
    else:
        for number, piece in enumerate(pieces_for(behaviour)):
            if number and behaviour == "error-event":
                yield _error_event()
                return
            yield choice({"content": piece})
    yield choice({}, finish)
    if usage:
        yield _data({**chunk, "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


# --- legacy completions -----------------------------------------------------------------------------------


def completions(behaviour: str, body: Json) -> Json:
    """Return a completion of the legacy endpoint."""
    choice = {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
    completion = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": dated(behaviour)}
    usage = _usage(behaviour, COMPLETIONS_USAGE)
    return {**completion, "choices": [choice]} | ({} if usage is None else {"usage": usage})


def completions_events(behaviour: str, body: Json) -> Iterator[str]:
    """Yield the events of a streamed completion of the legacy endpoint."""
    chunk: Json = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": dated(behaviour)}
    for number, piece in enumerate(PIECES):
        finish = "stop" if number == len(PIECES) - 1 else None
        choice = {"index": 0, "text": piece, "logprobs": None, "finish_reason": finish}
        yield _data({**chunk, "choices": [choice]})
    if (body.get("stream_options") or {}).get("include_usage"):
        yield _data({**chunk, "choices": [], "usage": COMPLETIONS_USAGE})
    yield "data: [DONE]\n\n"


# --- embeddings -------------------------------------------------------------------------------------------


def embeddings(behaviour: str, body: Json) -> Json:
    """Return one embedding a text."""
    texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
    data = [{"object": "embedding", "index": number, "embedding": VECTOR} for number in range(len(texts))]
    answer: Json = {"object": "list", "model": dated(behaviour), "data": data}
    usage = _usage(behaviour, EMBEDDINGS_USAGE)
    return answer if usage is None else {**answer, "usage": usage}


# --- responses --------------------------------------------------------------------------------------------


def _response(behaviour: str, output: list[Json]) -> Json:
    status = {"length": "incomplete", "failed": "failed"}.get(behaviour, "completed")
    failure = {"code": "server_error", "message": "asked for"}
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "status": status,
        "error": failure if behaviour == "failed" else None,
        "incomplete_details": {"reason": "max_output_tokens"} if behaviour == "length" else None,
        "instructions": None,
        "metadata": {},
        "model": dated(behaviour),
        "output": output,
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": _usage(behaviour, RESPONSES_USAGE),
    }


def _items(behaviour: str, body: Json) -> list[Json]:
    if behaviour == "failed":
        return []
    if asks_for_a_tool(behaviour, body, "function_call_output"):
        call = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": TOOL}
        return [{**call, "arguments": json.dumps(ARGUMENTS), "status": "completed"}]
    text = {"type": "output_text", "text": "".join(pieces_for(behaviour)), "annotations": [], "logprobs": []}
    part = {"type": "refusal", "refusal": REFUSAL} if behaviour == "refusal" else text
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed"}
    return [{**message, "content": [part]}]


def responses(behaviour: str, body: Json) -> Json:
    """Return a response."""
    return _response(behaviour, _items(behaviour, body))


def responses_events(behaviour: str, body: Json) -> Iterator[str]:
    """Yield the events of a streamed response."""
    for number, event in enumerate(_response_events(behaviour, body)):
        yield f"event: {event['type']}\ndata: {json.dumps({**event, 'sequence_number': number})}\n\n"


def _response_events(behaviour: str, body: Json) -> Iterator[Json]:
    response = responses(behaviour, body)
    begun = {**response, "status": "in_progress", "output": [], "usage": None, "error": None}
    begun["incomplete_details"] = None
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for number, item in enumerate(response["output"]):
        events = _tool_events if item["type"] == "function_call" else _message_events
        yield from events(behaviour, number, item)
    if behaviour == "error-event":
        yield {"type": "error", "code": "server_error", "message": "asked for", "param": None}
        return
    yield {"type": f"response.{response['status']}", "response": response}


def _tool_events(behaviour: str, number: int, item: Json) -> Iterator[Json]:
    begun = {**item, "arguments": "", "status": "in_progress"}
    yield {"type": "response.output_item.added", "output_index": number, "item": begun}
    where = {"item_id": item["id"], "output_index": number}
    for piece in ARGUMENT_PIECES:
        yield {"type": "response.function_call_arguments.delta", **where, "delta": piece}
    whole = {"arguments": item["arguments"], "name": item["name"]}
    yield {"type": "response.function_call_arguments.done", **where, **whole}
    yield {"type": "response.output_item.done", "output_index": number, "item": item}


def _message_events(behaviour: str, number: int, item: Json) -> Iterator[Json]:
    begun = {**item, "status": "in_progress", "content": []}
    yield {"type": "response.output_item.added", "output_index": number, "item": begun}
    where = {"item_id": item["id"], "output_index": number, "content_index": 0}
    part = item["content"][0]
    kind = part["type"]
    text = "refusal" if kind == "refusal" else "text"
    pieces = (REFUSAL,) if kind == "refusal" else pieces_for(behaviour)
    more: Json = {} if kind == "refusal" else {"logprobs": []}
    yield {"type": "response.content_part.added", **where, "part": {**part, text: ""}}
    for piece in pieces:
        yield {"type": f"response.{kind}.delta", **where, "delta": piece, **more}
    yield {"type": f"response.{kind}.done", **where, text: part[text], **more}
    yield {"type": "response.content_part.done", **where, "part": part}
    yield {"type": "response.output_item.done", "output_index": number, "item": item}
