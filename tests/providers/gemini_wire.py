"""Answers in the shape of Gemini's API, as in https://ai.google.dev/api/generate-content.

`promptTokenCount` has the cached tokens in it; `candidatesTokenCount` has not those of thoughts. Each chunk
of a stream repeats what is known of the tokens by then. Behaviours are those of `openai_wire`, as far as they
make sense, and `blocked`: no candidates, for the prompt was not let through.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .answers import ARGUMENTS, TOOL, asks_for_a_tool, dated, pieces_for

Json = dict[str, Any]

PROMPT_USAGE: Json = {"promptTokenCount": 23, "cachedContentTokenCount": 6}
THOUGHTS_USAGE: Json = {"thoughtsTokenCount": 4}
USAGE: Json = {**PROMPT_USAGE, **THOUGHTS_USAGE, "candidatesTokenCount": 9, "totalTokenCount": 36}
EMBEDDING_USAGE: Json = {"promptTokenCount": 29}
VECTOR = [0.25, -0.5, 1.0]
_STATUS = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 429: "RESOURCE_EXHAUSTED", 500: "INTERNAL"}


def error(status: int) -> Json:
    """Return the body of an error."""
    kind = _STATUS.get(status, "UNAVAILABLE")
    return {"error": {"code": status, "message": f"asked for: {status}", "status": kind}}


def _usage(behaviour: str, usage: Json) -> Json:
    if behaviour == "no-usage":
        return {}
    if behaviour == "no-details":
        usage = {name: usage[name] for name in ("promptTokenCount", "candidatesTokenCount") if name in usage}
    return {"usageMetadata": usage}


def _answer(behaviour: str, parts: list[Json], finish: str | None) -> Json:
    candidate: Json = {"content": {"role": "model", "parts": parts}, "index": 0}
    if finish:
        candidate["finishReason"] = finish
    return {"candidates": [candidate], "modelVersion": dated(behaviour), "responseId": "gemini-1"}


def generate(behaviour: str, body: Json) -> Json:
    """Return a whole answer."""
    if behaviour == "blocked":
        blocked = {"promptFeedback": {"blockReason": "SAFETY"}, "modelVersion": dated(behaviour)}
        return {**blocked, "responseId": "gemini-1", "usageMetadata": PROMPT_USAGE}
    if asks_for_a_tool(behaviour, body, "functionResponse"):
        parts: list[Json] = [{"functionCall": {"id": "call_1", "name": TOOL, "args": ARGUMENTS}}]
    else:
        parts = [{"text": "".join(pieces_for(behaviour))}]
    finish = "MAX_TOKENS" if behaviour == "length" else "STOP"
    return {**_answer(behaviour, parts, finish), **_usage(behaviour, USAGE)}


def generate_events(behaviour: str, body: Json) -> Iterator[str]:
    """Yield the events of a streamed answer: a thought, then the text or the tool call in the last ones."""
    for chunk in _chunks(behaviour, body):
        yield f"data: {json.dumps(chunk)}\r\n\r\n"


def _chunks(behaviour: str, body: Json) -> Iterator[Json]:
    thought = _answer(behaviour, [{"text": "Hm.", "thought": True}], None)
    yield {**thought, **_usage(behaviour, PROMPT_USAGE | THOUGHTS_USAGE)}
    whole = generate(behaviour, body)
    if behaviour == "blocked" or "functionCall" in str(whole):
        yield whole
        return
    *first, last = pieces_for(behaviour)
    for piece in first:
        if behaviour == "error-event":
            yield error(500)
            return
        usage = PROMPT_USAGE | THOUGHTS_USAGE | {"candidatesTokenCount": 2}
        yield {**_answer(behaviour, [{"text": piece}], None), **_usage(behaviour, usage)}
    finish = whole["candidates"][0]["finishReason"]
    yield {**_answer(behaviour, [{"text": last}], finish), **_usage(behaviour, USAGE)}


def embed(behaviour: str, body: Json) -> Json:
    """Return one embedding a request, of `batchEmbedContents`; of `embedContent` the one."""
    requests = body.get("requests")
    usage = {} if behaviour == "no-usage" else {"usageMetadata": EMBEDDING_USAGE}
    if requests is None:
        return {"embedding": {"values": VECTOR}, **usage}
    return {"embeddings": [{"values": VECTOR} for _ in requests], **usage}
