"""Answers like OpenAI, Anthropic, Ollama, Cohere and Bedrock, in threads of the process that asks.

A model named `fail-<status>` is answered with that status, `once-<status>` only the first time that it is
asked for; any other with a text, and `tools` with a tool call. A stream comes in pieces. How many tokens that
cost is a constant here, so that a test compares what was heard with a number.
"""

from __future__ import annotations

import json
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

Json = dict[str, Any]

PIECES = ("Hello", " there", ".")
TEXT = "".join(PIECES)
TOKENS_IN, TOKENS_OUT, CACHED, REASONING = 11, 7, 3, 2

USAGE: Json = {
    "prompt_tokens": TOKENS_IN,
    "completion_tokens": TOKENS_OUT,
    "total_tokens": TOKENS_IN + TOKENS_OUT,
    "prompt_tokens_details": {"cached_tokens": CACHED},
    "completion_tokens_details": {"reasoning_tokens": REASONING},
}
_TOOL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"
    asked: Counter[str] = Counter()

    def do_POST(self) -> None:
        """Answer by the path."""
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        path = unquote(self.path.partition("?")[0])
        model = body.get("model") or path.split("/model/")[-1].split("/")[0]
        self.asked[model] += 1
        how, _, status = model.rpartition("/")[2].partition("-")
        if how == "fail" or (how == "once" and self.asked[model] == 1):
            error = {"message": f"asked for: {status}", "type": "asked", "code": None}
            self._whole({"error": error, "message": error["message"]}, int(status))
        elif path.endswith("/chat/completions"):
            self._openai(model, body)
        elif path.endswith("/embeddings"):
            vector = {"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}
            usage = {"prompt_tokens": TOKENS_IN, "total_tokens": TOKENS_IN}
            self._whole({"object": "list", "data": [vector], "model": model, "usage": usage})
        elif path.endswith("/v1/messages"):
            self._whole(_anthropic(model))
        elif path.endswith("/api/chat"):
            self._ollama(model, body)
        elif path.endswith("/v2/chat"):
            self._cohere(body)
        elif path.endswith("/v2/embed"):
            units = {"billed_units": {"input_tokens": TOKENS_IN}}
            self._whole({"id": "e1", "embeddings": {"float": [[0.5]]}, "texts": ["Hi"], "meta": units})
        elif path.endswith("/converse"):
            self._whole(_converse())
        elif path.endswith("/converse-stream"):
            self._pieces(_converse_events(), "application/vnd.amazon.eventstream")
        elif path.endswith("/invoke"):
            self._whole(_anthropic(model))
        else:
            self._whole({"message": f"no such path: {path}"}, 404)

    def _openai(self, model: str, body: Json) -> None:
        if not body.get("stream"):
            message: Json = {"role": "assistant", "content": TEXT}
            if _wants_tool(model, body):
                message |= {"content": None, "tool_calls": [_TOOL]}
            finish = "tool_calls" if "tool_calls" in message else "stop"
            choice = {"index": 0, "message": message, "finish_reason": finish}
            answer = {"id": "chat-1", "object": "chat.completion", "created": 1, "model": f"{model}-dated"}
            self._whole({**answer, "choices": [choice], "usage": USAGE})
            return
        self._pieces(_openai_events(model, body), "text/event-stream")

    def _ollama(self, model: str, body: Json) -> None:
        done: Json = {"done": True, "done_reason": "stop", "total_duration": 1, "load_duration": 1}
        done |= {"prompt_eval_count": TOKENS_IN, "eval_count": TOKENS_OUT}
        answer: Json = {"model": model, "created_at": "2026-01-01T00:00:00Z"}
        if body.get("stream"):
            said = [{**answer, "message": _said(piece), "done": False} for piece in PIECES]
            lines = [*said, {**answer, "message": _said(""), **done}]
            self._pieces((json.dumps(line).encode() + b"\n" for line in lines), "application/x-ndjson")
        else:
            self._whole({**answer, "message": _said(TEXT), **done})

    def _cohere(self, body: Json) -> None:
        tokens = {"input_tokens": TOKENS_IN, "output_tokens": TOKENS_OUT}
        usage = {"billed_units": tokens, "tokens": tokens}
        if not body.get("stream"):
            message = {"role": "assistant", "content": [{"type": "text", "text": TEXT}]}
            self._whole({"id": "c1", "message": message, "finish_reason": "COMPLETE", "usage": usage})
            return
        delta: Json = {"message": {"role": "assistant", "content": [], "tool_plan": "", "tool_calls": []}}
        events: list[Json] = [{"type": "message-start", "id": "c1", "delta": delta}]
        start = {"message": {"content": {"type": "text", "text": ""}}}
        events.append({"type": "content-start", "index": 0, "delta": start})
        for piece in PIECES:
            said = {"message": {"content": {"text": piece}}}
            events.append({"type": "content-delta", "index": 0, "delta": said})
        events.append({"type": "content-end", "index": 0})
        events.append({"type": "message-end", "delta": {"finish_reason": "COMPLETE", "usage": usage}})
        named = (f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events)
        self._pieces(named, "text/event-stream")

    def _whole(self, content: Json, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _pieces(self, pieces: Iterator[bytes], kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for piece in pieces:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # whoever asked has left
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def _said(text: str) -> Json:
    return {"role": "assistant", "content": text}


def _wants_tool(model: str, body: Json) -> bool:
    return "tools" in model and "'tool'" not in str(body)


def _openai_events(model: str, body: Json) -> Iterator[bytes]:
    chunk: Json = {"id": "chat-1", "object": "chat.completion.chunk", "created": 1, "model": f"{model}-dated"}

    def data(item: Json) -> bytes:
        return f"data: {json.dumps(item)}\n\n".encode()

    for number, piece in enumerate(PIECES):
        delta = _said(piece) if number == 0 else {"content": piece}
        yield data({**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    last: Json = {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    if (body.get("stream_options") or {}).get("include_usage"):
        yield data(last)
        yield data({**chunk, "choices": [], "usage": USAGE})
    else:
        yield data(last if model.startswith("gpt") else {**last, "usage": USAGE})
    yield b"data: [DONE]\n\n"


def _anthropic(model: str) -> Json:
    usage = {"input_tokens": TOKENS_IN - CACHED, "output_tokens": TOKENS_OUT}
    usage |= {"cache_read_input_tokens": CACHED, "cache_creation_input_tokens": 0}
    answer: Json = {"id": "msg_1", "type": "message", "role": "assistant", "model": model}
    return answer | {
        "content": [{"type": "text", "text": TEXT}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": usage,
    }


_BEDROCK_USAGE = {
    "inputTokens": TOKENS_IN - CACHED,
    "outputTokens": TOKENS_OUT,
    "totalTokens": TOKENS_IN + TOKENS_OUT,
    "cacheReadInputTokens": CACHED,
}


def _converse() -> Json:
    message = {"role": "assistant", "content": [{"text": TEXT}]}
    return {
        "output": {"message": message},
        "stopReason": "end_turn",
        "usage": _BEDROCK_USAGE,
        "metrics": {"latencyMs": 1},
    }


def _converse_events() -> Iterator[bytes]:
    yield _event("messageStart", {"role": "assistant"})
    for piece in PIECES:
        yield _event("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": piece}})
    yield _event("contentBlockStop", {"contentBlockIndex": 0})
    yield _event("messageStop", {"stopReason": "end_turn"})
    yield _event("metadata", {"usage": _BEDROCK_USAGE, "metrics": {"latencyMs": 1}})


def _event(kind: str, payload: Json) -> bytes:
    """Return a message of the event stream encoding, as Amazon's clients read it."""
    fields = {":event-type": kind, ":content-type": "application/json", ":message-type": "event"}
    headers = b"".join(
        struct.pack("!B", len(name))
        + name.encode()
        + b"\x07"
        + struct.pack("!H", len(value))
        + value.encode()
        for name, value in fields.items()
    )
    data = json.dumps(payload).encode()
    prelude = struct.pack("!II", 16 + len(headers) + len(data), len(headers))
    message = prelude + struct.pack("!I", zlib.crc32(prelude)) + headers + data
    return message + struct.pack("!I", zlib.crc32(message))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that has left."""


def start() -> str:
    """Start to answer; return the base URL."""
    server = _Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"
