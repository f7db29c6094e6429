"""A server that answers like OpenAI (responses, chat completions), plain or streamed: no model is in it.

What it answers is said by the name of the model:

| model | answer |
| --- | --- |
| `call.<tool>[.<tool>…]` | asks for these tools at once; has the text once there is a result |
| `turns-<n>.<tool>` | asks for the tool until it has n results |
| `fail-<status>` | an error, which quotes the request |
| `slow` | the text, after `SLOW_S` |
| any other | the text |
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Json = dict[str, Any]

SLOW_S = 0.3
TEXT = "It is done."
ARGUMENTS = '{"query": "arguments of the model"}'
USAGE: Json = {
    "input_tokens": 13,
    "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 0},
    "output_tokens": 8,
    "output_tokens_details": {"reasoning_tokens": 4},
    "total_tokens": 21,
}
CHAT_USAGE: Json = {
    "prompt_tokens": 13,
    "prompt_tokens_details": {"cached_tokens": 5},
    "completion_tokens": 8,
    "completion_tokens_details": {"reasoning_tokens": 4},
    "total_tokens": 21,
}


class ModelServer:
    """Serves on the loopback from a thread of its own, and counts what it is asked."""

    def __init__(self) -> None:
        self.models: list[str] = []
        """The model of each request, in their order."""
        self._ids = itertools.count(1)
        routes = [
            Route("/v1/responses", self._responses, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.bind(("127.0.0.1", 0))
        listening.listen(512)
        self.base_url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        config = uvicorn.Config(
            Starlette(routes=routes),
            log_level="warning",
            lifespan="off",
            ws="none",
            headers=[("Connection", "close")],  # a client's connections must not outlive its event loop
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._server.should_exit = True
        self._thread.join(10)

    async def _read(self, request: Request) -> tuple[Json, Response | None]:
        body = await request.json()
        model = body["model"]
        self.models.append(model)
        if model == "slow":
            await asyncio.sleep(SLOW_S)
        if model.startswith("fail-"):
            error = {"message": f"you said: {json.dumps(body)}", "type": "invalid_request_error", "code": "x"}
            return body, JSONResponse({"error": error}, int(model.removeprefix("fail-")))
        return body, None

    async def _responses(self, request: Request) -> Response:
        body, refused = await self._read(request)
        if refused is not None:
            return refused
        given = body["input"] if isinstance(body["input"], list) else []
        tools = _asked_for(body["model"], sum(one.get("type") == "function_call_output" for one in given))
        number = next(self._ids)
        output = [_called(number, at, tool) for at, tool in enumerate(tools)] or [_message(number)]
        response = {
            "id": f"resp_{number}",
            "object": "response",
            "created_at": 1,
            "status": "completed",
            "error": None,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "metadata": {},
            "model": f"{body['model']}-2026",
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": USAGE,
        }
        if not body.get("stream"):
            return JSONResponse(response)
        return _events(
            f"event: {event['type']}\ndata: {json.dumps(event | {'sequence_number': at})}\n\n"
            for at, event in enumerate(_response_events(response))
        )

    async def _chat(self, request: Request) -> Response:
        body, refused = await self._read(request)
        if refused is not None:
            return refused
        tools = _asked_for(body["model"], sum(one.get("role") == "tool" for one in body["messages"]))
        number = next(self._ids)
        calls = [
            {
                "index": at,
                "id": f"call_{number}_{at}",
                "type": "function",
                "function": {"name": tool, "arguments": ARGUMENTS},
            }
            for at, tool in enumerate(tools)
        ]
        message: Json = {"role": "assistant", "content": None if calls else TEXT, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        head = {"id": f"chatcmpl-{number}", "created": 1, "model": f"{body['model']}-2026"}
        reason = "tool_calls" if calls else "stop"
        if not body.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
            whole = head | {"object": "chat.completion", "choices": [choice], "usage": CHAT_USAGE}
            return JSONResponse(whole)
        deltas = [({"role": "assistant"} | message, None), ({}, reason)]
        chunks: list[Json] = [
            head
            | {
                "object": "chat.completion.chunk",
                "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
            }
            for delta, reason in deltas
        ]
        if (body.get("stream_options") or {}).get("include_usage"):
            chunks.append(head | {"object": "chat.completion.chunk", "choices": [], "usage": CHAT_USAGE})
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        return _events(iter([*lines, "data: [DONE]\n\n"]))


def _asked_for(model: str, results: int) -> list[str]:
    kind, *tools = model.split(".")
    turns = int(kind.removeprefix("turns-")) if kind.startswith("turns-") else 1
    return tools if results < turns else []


def _called(number: int, at: int, tool: str) -> Json:
    return {
        "id": f"fc_{number}_{at}",
        "type": "function_call",
        "status": "completed",
        "call_id": f"call_{number}_{at}",
        "name": tool,
        "arguments": ARGUMENTS,
    }


def _message(number: int) -> Json:
    part = {"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}
    return {
        "id": f"msg_{number}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }


def _response_events(response: Json) -> Iterator[Json]:
    begun = response | {"status": "in_progress", "output": [], "usage": None}
    yield {"type": "response.created", "response": begun}
    for at, item in enumerate(response["output"]):
        yield {"type": "response.output_item.added", "output_index": at, "item": item}
        yield {"type": "response.output_item.done", "output_index": at, "item": item}
    yield {"type": "response.completed", "response": response}


def _events(lines: Iterator[str]) -> Response:
    async def body() -> Any:
        for line in lines:
            yield line
            await asyncio.sleep(0)

    return StreamingResponse(body(), media_type="text/event-stream")
