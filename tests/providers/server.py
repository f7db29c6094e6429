"""A server that answers like OpenAI (and Azure), Anthropic and Gemini, in one process: no model is in it.

    python -m tests.providers.server

prints its base URL as the only line on stdout once it is listening, and ends when its stdin does. What it
answers is in `openai_wire`, `anthropic_wire` and `gemini_wire`; how, is said by the name of the model:

| model | how |
| --- | --- |
| `fail-<status>` | with that status, an error in the provider's shape, and `Retry-After: 1` if it is 429 |
| `once-<status>` | the same to the first request of a call, which may be repeated at once; then as usual |
| `gzip` | compressed, to a client that takes that |
| `hang` | not at all: it reads the request and waits |
| `stall` | a stream: two events, and nothing more |
| `slow` | a stream: each event a moment later |
| `cut` | a stream: two events, then the connection ends without the body's end |
| `reset` | a stream: two events, then the connection is reset |
| any other | as usual |

A call is named by its client, in the header `X-Call`; `GET /heard/<call>` says how many requests it made.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import socket
import struct
import sys
import threading
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from . import anthropic_wire, gemini_wire, openai_wire

Json = dict[str, Any]

HANG_S = 60
SLOW_S = 0.02
EVENTS_BEFORE_THE_END = 2
_STATUS = re.compile(r"(fail|once)-(\d+)$")

_heard: Counter[str] = Counter()
_transports: dict[tuple[str, int], Any] = {}


class _Protocol(H11Protocol):
    """Remembers the transport of each peer, for those whose connection is to be reset."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        _transports[transport.get_extra_info("peername")[:2]] = transport

    def connection_lost(self, exc: Exception | None) -> None:
        _transports.pop(self.transport.get_extra_info("peername")[:2], None)
        super().connection_lost(exc)


class _Cut(Exception):
    """The body of a stream ends before its end."""


@dataclass(frozen=True)
class _Endpoint:
    whole: Callable[[str, Json], Json]
    events: Callable[[str, Json], Iterator[str]]
    error: Callable[[int], Json]
    model_in_path: bool = False

    async def __call__(self, request: Request) -> Response:
        body = json.loads(await request.body())
        model = request.path_params["model"] if self.model_in_path else body["model"]
        streamed = body.get("stream") or "stream" in request.path_params.get("method", "")
        call = request.headers.get("x-call", "")
        _heard[call] += 1
        failing = _STATUS.match(model)
        if failing and (failing[1] == "fail" or _heard[call] == 1):
            return self._fail(int(failing[2]), failing[1] == "once")
        if model == "hang":
            await asyncio.sleep(HANG_S)
        if streamed:
            return _stream(request, model, self.events(model, body))
        return _whole(request, model, self.whole(model, body))

    def _fail(self, status: int, at_once: bool) -> Response:
        headers = {"X-Should-Retry": "true", "Retry-After-Ms": "1"} if at_once else {}
        if status == 429 and not at_once:
            headers = {"Retry-After": "1"}
        return JSONResponse(self.error(status), status, headers)


def _takes_gzip(request: Request, model: str) -> bool:
    return model == "gzip" and "gzip" in request.headers.get("accept-encoding", "")


def _whole(request: Request, model: str, content: Json) -> Response:
    if not _takes_gzip(request, model):
        return JSONResponse(content)
    compressed = gzip.compress(json.dumps(content).encode())
    return Response(compressed, media_type="application/json", headers={"Content-Encoding": "gzip"})


def _stream(request: Request, model: str, events: Iterator[str]) -> Response:
    compress = zlib.compressobj(wbits=31) if _takes_gzip(request, model) else None

    async def body() -> AsyncIterator[bytes]:
        for number, event in enumerate(events):
            if number == EVENTS_BEFORE_THE_END:
                await _in_the_middle(request, model)
            data = event.encode()
            yield compress.compress(data) + compress.flush(zlib.Z_SYNC_FLUSH) if compress else data
            await asyncio.sleep(SLOW_S if model == "slow" else 0)  # a piece each
        if compress:
            yield compress.flush()

    headers = {"Content-Encoding": "gzip"} if compress else {}
    return StreamingResponse(body(), media_type="text/event-stream", headers=headers)


async def _in_the_middle(request: Request, model: str) -> None:
    """Do to a stream what its model's name asks for."""
    if model == "stall":
        await asyncio.sleep(HANG_S)
    if model == "cut":
        raise _Cut
    if model == "reset":
        await asyncio.sleep(SLOW_S)  # what was sent is read before the reset
        client = request.client
        assert client is not None
        transport = _transports[client.host, client.port]
        # With this option, closing is a reset.
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
        await asyncio.sleep(HANG_S)


async def _heard_of(request: Request) -> Response:
    return JSONResponse(_heard[request.path_params["call"]])


async def _models(request: Request) -> Response:
    model = {"id": "plain", "object": "model", "type": "model", "created": 1, "owned_by": "nobody"}
    model |= {"display_name": "Plain", "created_at": "2026-01-01T00:00:00Z"}
    return JSONResponse({"object": "list", "data": [model], "has_more": False})


async def _retrieve(request: Request) -> Response:
    return JSONResponse(openai_wire.responses("plain", {}))


async def _count_tokens(request: Request) -> Response:
    return JSONResponse({"input_tokens": 21})


def _no_events(behaviour: str, body: Json) -> Iterator[str]:
    raise AssertionError("this endpoint has no stream")


_OPENAI = {
    "chat/completions": _Endpoint(openai_wire.chat, openai_wire.chat_events, openai_wire.error),
    "completions": _Endpoint(openai_wire.completions, openai_wire.completions_events, openai_wire.error),
    "embeddings": _Endpoint(openai_wire.embeddings, _no_events, openai_wire.error),
    "responses": _Endpoint(openai_wire.responses, openai_wire.responses_events, openai_wire.error),
}
_MESSAGES = _Endpoint(anthropic_wire.messages, anthropic_wire.messages_events, anthropic_wire.error)
_GENERATE = _Endpoint(
    gemini_wire.generate, gemini_wire.generate_events, gemini_wire.error, model_in_path=True
)
_EMBED = _Endpoint(gemini_wire.embed, _no_events, gemini_wire.error, model_in_path=True)


async def _gemini(request: Request) -> Response:
    method = request.path_params["method"]
    if method == "countTokens":
        return JSONResponse({"totalTokens": 23})
    return await (_EMBED if "mbed" in method else _GENERATE)(request)


def make_app() -> Starlette:
    """Return the server as an ASGI application."""
    openai = [
        Route(f"{prefix}/{path}", endpoint.__call__, methods=["POST"])
        for path, endpoint in _OPENAI.items()
        for prefix in ("/v1", "/openai/deployments/{deployment}", "/openai", "/openai/v1")
    ]
    return Starlette(
        routes=[
            *openai,
            Route("/v1/responses/{id}", _retrieve),
            Route("/v1/messages", _MESSAGES.__call__, methods=["POST"]),
            Route("/v1/messages/count_tokens", _count_tokens, methods=["POST"]),
            Route("/v1/models", _models),
            Route("/{version}/models/{model}:{method}", _gemini, methods=["POST"]),
            Route("/heard/{call}", _heard_of),
        ]
    )


def main() -> None:
    """Serve on the loopback until stdin ends."""
    # With the protocol named: only then does asyncio set TCP_NODELAY, without which a reply on a warm
    # connection takes 40 ms longer.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(512)
    config = uvicorn.Config(
        make_app(),
        http=_Protocol,
        log_level="critical",
        access_log=False,
        lifespan="off",
        date_header=False,  # what a caller sees is the same every time
        timeout_graceful_shutdown=0,
    )
    server = uvicorn.Server(config)

    def end_with_stdin() -> None:
        sys.stdin.read()
        server.should_exit = server.force_exit = True

    threading.Thread(target=end_with_stdin, daemon=True).start()
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    server.run(sockets=[listening])


if __name__ == "__main__":
    main()
