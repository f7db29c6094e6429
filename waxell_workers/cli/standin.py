"""A stand-in for a model server in the shape of OpenAI's, for the demo and for tests: no model is in it.

It never passes for the real thing: each reply's text begins with `[stand-in]`, its `system_fingerprint` is
`waxell-standin`, and each answer carries the header `X-Waxell-Standin: 1`. What it says about tokens is true
of the texts that it got and sent, by a tokenizer of its own: a word or a punctuation mark is a token.

    python -m waxell_workers.cli.standin [--port 0] [--delay-ms N]

prints its base URL as the only line on stdout once it is listening. Any model is taken, and named in the
reply. A name that begins with `fail-<status>` is answered with that status and an error in OpenAI's shape,
one that begins with `slow-<ms>-` after so many milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

LABEL = "[stand-in]"
FINGERPRINT = "waxell-standin"
HEADERS = {"X-Waxell-Standin": "1"}
MODELS = ("gpt-4o", "gpt-4o-mini", "text-embedding-3-small")
"""What `GET /v1/models` lists; others work as well."""

_TOKEN = re.compile(r"\w+|[^\w\s]")
_FAIL = re.compile(r"fail-([45]\d\d)\b")
_SLOW = re.compile(r"slow-(\d+)-")
_ECHOED_WORDS = 12
_DIMENSIONS = 16
_ERRORS = {
    401: ("invalid_request_error", "invalid_api_key"),
    404: ("invalid_request_error", "model_not_found"),
    429: ("requests", "rate_limit_exceeded"),
    500: ("server_error", "server_error"),
}
_ids = itertools.count(1)


def count_tokens(text: str) -> int:
    """Return the number of words and punctuation marks in a text."""
    return len(_TOKEN.findall(text))


def reply_to(prompt: str) -> str:
    """Return the reply to a prompt: always the same one, and short."""
    words = prompt.split()
    shown = " ".join(words[:_ECHOED_WORDS])
    return f"{LABEL} You wrote: {shown}{' …' if len(words) > _ECHOED_WORDS else ''}"


def texts_of(content: Any) -> Iterator[str]:
    """Yield the texts in a message's content: a string, or parts of which some have a `text`."""
    if isinstance(content, str):
        yield content
        return
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            yield part["text"]


def chunks_of(text: str) -> list[str]:
    """Return a text in pieces, one a word, as a stream sends it."""
    return re.findall(r"\s*\S+", text)


class _Refused(Exception):
    """Answered with an error instead of a reply."""

    def __init__(self, status: int, message: str, kind: str, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def _read(request: Request) -> dict[str, Any]:
    """Return the request's body once its model's name has had its effect.

    Raises:
        _Refused: the body is no JSON object with a model, or the model's name asks for an error.
    """
    try:
        body = json.loads(await request.body())
    except ValueError:
        body = None
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise _Refused(400, "expected a JSON object with a model", "invalid_request_error", "invalid_request")
    model = body["model"]
    slow = _SLOW.match(model)
    delay_ms = int(slow.group(1)) if slow else request.app.state.delay_ms
    if delay_ms:
        await asyncio.sleep(delay_ms / 1000)
    failing = _FAIL.match(model)
    if failing:
        status = int(failing.group(1))
        kind, code = _ERRORS.get(
            status, ("invalid_request_error" if status < 500 else "server_error", "stand_in")
        )
        quoted = " ".join(_prompts(body))[:200]
        raise _Refused(status, f"{LABEL} {model} asked for it; the request was: {quoted}", kind, code)
    return body


def _prompts(body: dict[str, Any]) -> list[str]:
    """Return all texts of a request, whichever of the endpoints it is for; the last is the one to answer."""
    texts = list(texts_of(body.get("instructions")))
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, str):
        return [*texts, messages]
    for message in messages if isinstance(messages, list) else ():
        texts.extend([message] if isinstance(message, str) else texts_of(message.get("content")))
    return texts


async def _chat(request: Request) -> Response:
    body = await _read(request)
    prompts = _prompts(body)
    text = _shaped(reply_to(prompts[-1] if prompts else ""), body.get("response_format"))
    tokens_in, tokens_out = sum(map(count_tokens, prompts)), count_tokens(text)
    head = {
        "id": f"chatcmpl-standin-{next(_ids)}",
        "created": int(time.time()),
        "model": body["model"],
        "system_fingerprint": FINGERPRINT,
    }
    usage = {
        "prompt_tokens": tokens_in,
        "completion_tokens": tokens_out,
        "total_tokens": tokens_in + tokens_out,
    }
    if not body.get("stream"):
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        return _json({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

    with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
    chunk = {**head, "object": "chat.completion.chunk"}
    if with_usage:
        chunk["usage"] = None

    def deltas() -> Iterator[dict[str, Any]]:
        yield {**chunk, "choices": [_delta({"role": "assistant", "content": ""})]}
        for piece in chunks_of(text):
            yield {**chunk, "choices": [_delta({"content": piece})]}
        yield {**chunk, "choices": [_delta({}, "stop")]}
        if with_usage:
            yield {**chunk, "choices": [], "usage": usage}

    return _events(
        itertools.chain((f"data: {json.dumps(item)}\n\n" for item in deltas()), ["data: [DONE]\n\n"])
    )


def _delta(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _shaped(text: str, response_format: Any) -> str:
    """Return the reply as the JSON object that a structured output asks for, where one does."""
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "json_object":
        return json.dumps({"reply": text}, ensure_ascii=False)
    if kind != "json_schema":
        return text
    schema = (response_format.get("json_schema") or response_format).get("schema") or {}
    return json.dumps(_instance(schema, text), ensure_ascii=False)


def _instance(schema: dict[str, Any], text: str) -> Any:
    """Return some value that fits a simple JSON schema; its strings are the reply."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object":
        return {name: _instance(inner, text) for name, inner in (schema.get("properties") or {}).items()}
    return {"array": [], "integer": 0, "number": 0, "boolean": False, "null": None}.get(str(kind), text)


async def _responses(request: Request) -> Response:
    body = await _read(request)
    prompts = _prompts(body)
    text = _shaped(reply_to(prompts[-1] if prompts else ""), (body.get("text") or {}).get("format"))
    tokens_in, tokens_out = sum(map(count_tokens, prompts)), count_tokens(text)
    number = next(_ids)
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    message = {
        "id": f"msg_standin_{number}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }
    response = {
        "id": f"resp_standin_{number}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "metadata": {"system_fingerprint": FINGERPRINT},
        "model": body["model"],
        "output": [message],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "text": {"format": (body.get("text") or {}).get("format") or {"type": "text"}},
        "usage": {
            "input_tokens": tokens_in,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": tokens_out,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens_in + tokens_out,
        },
    }
    if not body.get("stream"):
        return _json(response)
    numbered = ({**event, "sequence_number": n} for n, event in enumerate(_response_events(response, text)))
    return _events(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in numbered)


def _response_events(response: dict[str, Any], text: str) -> Iterator[dict[str, Any]]:
    """Yield the events of a streamed response, in the order and the shape of OpenAI's reference."""
    message = response["output"][0]
    part = message["content"][0]
    begun = {**response, "status": "in_progress", "output": [], "usage": None}
    where = {"item_id": message["id"], "output_index": 0, "content_index": 0}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    item = {**message, "status": "in_progress", "content": []}
    yield {"type": "response.output_item.added", "output_index": 0, "item": item}
    yield {"type": "response.content_part.added", **where, "part": {**part, "text": ""}}
    for piece in chunks_of(text):
        yield {"type": "response.output_text.delta", **where, "delta": piece, "logprobs": []}
    yield {"type": "response.output_text.done", **where, "text": text, "logprobs": []}
    yield {"type": "response.content_part.done", **where, "part": part}
    yield {"type": "response.output_item.done", "output_index": 0, "item": message}
    yield {"type": "response.completed", "response": response}


async def _embeddings(request: Request) -> Response:
    body = await _read(request)
    given = body.get("input")
    texts = [given] if isinstance(given, str) else [text for text in given or [] if isinstance(text, str)]
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(text)}
        for index, text in enumerate(texts)
    ]
    tokens = sum(map(count_tokens, texts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _json({"object": "list", "model": body["model"], "data": data, "usage": usage})


def _vector(text: str) -> list[float]:
    """Return a vector that depends on the text alone and means nothing."""
    counts = [0.0] * _DIMENSIONS
    for character in text:
        counts[ord(character) % _DIMENSIONS] += 1.0
    length = sum(count * count for count in counts) ** 0.5 or 1.0
    return [count / length for count in counts]


async def _models(request: Request) -> Response:
    models = [{"id": name, "object": "model", "created": 0, "owned_by": FINGERPRINT} for name in MODELS]
    return _json({"object": "list", "data": models})


async def _refuse(request: Request, error: Exception) -> Response:
    if not isinstance(error, _Refused):
        raise error
    return JSONResponse(error.body, error.status, HEADERS)


def _json(content: dict[str, Any]) -> Response:
    return JSONResponse(content, headers=HEADERS)


def _events(events: Iterable[str]) -> Response:
    async def body() -> AsyncIterator[str]:
        for event in events:
            yield event
            await asyncio.sleep(0)  # a piece each, and room to notice that nobody reads any more

    return StreamingResponse(body(), media_type="text/event-stream", headers=HEADERS)


def make_app(delay_ms: int = 0) -> Starlette:
    """Return the server as an ASGI application.

    Arguments:
        delay_ms: how long each answer waits, in milliseconds; a model named `slow-<ms>-…` waits its own time.
    """
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", _chat, methods=["POST"]),
            Route("/v1/responses", _responses, methods=["POST"]),
            Route("/v1/embeddings", _embeddings, methods=["POST"]),
            Route("/v1/models", _models),
        ],
        exception_handlers={_Refused: _refuse},
    )
    app.state.delay_ms = delay_ms
    return app


def main(arguments: list[str] | None = None) -> None:
    """Serve on the loopback until a signal ends the process."""
    parser = argparse.ArgumentParser(prog="python -m waxell_workers.cli.standin", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--delay-ms", type=int, default=0, metavar="N", help="wait before each answer")
    options = parser.parse_args(arguments)
    # With the protocol named: only then does asyncio set TCP_NODELAY, without which a reply on a warm
    # connection takes 40 ms longer.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", options.port))
    listening.listen(512)
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", flush=True)  # noqa: T201  what it is asked for
    config = uvicorn.Config(make_app(options.delay_ms), log_level="warning", access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
