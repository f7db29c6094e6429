"""A real HTTP server that speaks the platform's REST protocol strictly, and misbehaves on request.

Strict: whatever WIRE (the protocol as waxell-observe 0.1.10 speaks it) does not know, in a body, a header or
an address, is answered with 400 or 404 and kept in `violations`. Misbehaving: `mode()` switches at run time
what happens to requests. Everything is in memory, every attribute may be read from any thread.

    with FaultyServer() as server:
        server.mode("503", endpoint="llm-calls", times=2, retry_after="1")
        ...
        server.mode("healthy")
        server.wait_until(lambda: len(server.calls) == 100)
        assert server.violations == []
"""

from __future__ import annotations

import gzip
import json
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

OBSERVE = "/api/v1/observe/"
INGEST = "/api/v1/observe/ingest/"
SPECIAL = frozenset({"healthy", "refuse", "hang", "reset", "trickle", "redirect", "invalid_json", "reject"})


@dataclass
class Run:
    """A run as the server has it; by REST or by ingest."""

    run_id: str
    """The server's own id (REST), or the client's (ingest)."""
    start: dict[str, Any]
    calls: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    ends: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of `complete/`, or `run_ended` records: more than one if it was repeated."""
    order: list[str] = field(default_factory=list)
    """What was taken for this run, in order: endpoints (REST) or kinds of records (ingest)."""

    @property
    def client_id(self) -> str:
        """waxell-workers' own id of the run, if it was sent by that."""
        return str(self.start.get("metadata", {}).get("waxell", {}).get("run_id") or self.run_id)

    @property
    def state(self) -> str:
        """The true state in which the run ended, or an empty string."""
        if not self.ends:
            return ""
        end = self.ends[0]
        if "status" not in end:
            return str(end.get("state", "success"))
        return str((end["result"].get("waxell") or {}).get("state") or end["status"])

    @property
    def tokens(self) -> tuple[int, int]:
        """Sums of tokens_in and tokens_out of its calls."""
        return (
            sum(c.get("tokens_in", 0) for c in self.calls),
            sum(c.get("tokens_out", 0) for c in self.calls),
        )


@dataclass
class Request:
    """A request as it came, with the status that it was answered with (0: none)."""

    method: str
    endpoint: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int = 0


@dataclass
class _Fault:
    name: str = "healthy"
    endpoint: str | None = None
    """Only requests to this endpoint: config, start, llm-calls, steps, spans, complete, ingest …"""
    marker: str = ""
    """Only requests whose (uncompressed) body contains this text."""
    times: int | None = None
    """After so many times it is healthy again."""
    processed: bool = False
    """Do what was asked and only then misbehave: the outcome is unknown to the client."""
    status: int = 500
    retry_after: str | None = None
    location: str = "/elsewhere/"
    where: str = "body"
    """`reset` and `trickle`: at the `request` (reset), in the `headers` (trickle) or in the `body`."""
    interval: float = 0.1
    """`trickle`: seconds between two bytes."""


class FaultyServer:
    """The server, on a port of 127.0.0.1 that stays the same through every mode.

    Args:
        key: If not empty, requests must carry it as `X-Wax-Key`.
        ingest: Offer `ingest` in the configuration; may be switched at any time.
    """

    def __init__(self, *, key: str = "", ingest: bool = False) -> None:
        self.key = key
        self.ingest = ingest
        self.ingest_endpoint: str = INGEST
        """What the configuration names if `ingest` is on."""
        self.governance: dict[str, Any] | None = None
        """Added to replies of llm-calls, steps and complete."""
        self.runs: dict[str, Run] = {}
        self.records: dict[str, dict[str, Any]] = {}
        """Ingest records by id."""
        self.duplicates = 0
        self.violations: list[str] = []
        self.fired: Counter[str] = Counter()
        """How often each mode's fault has hit a request (`refuse`: not counted, there is no request)."""
        self.requests: list[Request] = []
        self._gone: set[str] = set()
        self._fault = _Fault()
        self._generation = 0
        self._changed = threading.Condition(threading.RLock())
        self._connections: set[socket.socket] = set()
        self._closed = False
        self._socket: socket.socket | None = _bound(0)
        self._port = self._socket.getsockname()[1]
        self._listening = False

    @property
    def url(self) -> str:
        """The base URL, for `WAXELL_API_URL`."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def calls(self) -> list[dict[str, Any]]:
        """All calls of all runs."""
        with self._changed:
            return [call for run in self.runs.values() for call in run.calls]

    def __enter__(self) -> FaultyServer:
        self._listen()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def mode(self, name: str, **options: Any) -> FaultyServer:
        """Switch what happens to requests from now on.

        Args:
            name: `healthy`; a status code (`"503"`); `refuse` (nobody listens); `hang` (the request is
                read, an answer never comes); `reset` (the connection is torn down); `trickle` (an answer,
                byte by byte); `redirect`; `invalid_json` (200 and HTML); `reject` (`status`, for bodies
                with `marker`).
            options: Fields of `_Fault`: `endpoint`, `marker`, `times`, `processed`, `retry_after`,
                `location`, `where`, `interval`, `status`.
        """
        if name.isdecimal():
            options["status"] = int(name)
        elif name not in SPECIAL:
            raise ValueError(f"no such mode: {name}")
        if name == "reject":
            options.setdefault("status", 422)
        with self._changed:
            self._fault = _Fault(name=name, **options)
            self._generation += 1
            self._changed.notify_all()
            if name == "refuse":
                self._unlisten()
            else:
                self._listen()
        return self

    def forget_runs(self) -> None:
        """Lose all runs, as a server does that has been reset: their ids are 404 from now on."""
        with self._changed:
            self._gone.update(self.runs)
            self.runs.clear()

    def wait_until(self, predicate: Callable[[], bool], timeout_s: float = 10.0) -> bool:
        """Wait until something is true, looked at after every request; return whether it is."""
        with self._changed:
            return self._changed.wait_for(predicate, timeout_s)

    def count(self, endpoint: str) -> int:
        """Count the requests to an endpoint that have come."""
        with self._changed:
            return sum(request.endpoint == endpoint for request in self.requests)

    def close(self) -> None:
        """Close every connection and the port."""
        with self._changed:
            self._closed = True
            self._generation += 1
            self._changed.notify_all()
            self._unlisten()
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    # --- connections ------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._listening or self._closed or self._socket is None:
            return
        self._socket.listen(512)
        self._listening = True
        threading.Thread(target=self._accept, args=(self._socket,), daemon=True).start()

    def _unlisten(self) -> None:
        """Refuse connections; the port stays ours: a socket that is bound and does not listen."""
        for connection in list(self._connections):
            _shut(connection)
        if not self._listening or self._socket is None:
            return
        self._listening = False
        _shut(self._socket)  # wakes accept()
        self._socket.close()
        self._socket = _bound(self._port)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:
                return
            with self._changed:
                if listener is not self._socket:
                    connection.close()
                    return
                self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection, address), daemon=True).start()

    def _serve(self, connection: socket.socket, address: Any) -> None:
        try:
            _Handler(connection, address, self)  # type: ignore[arg-type]  # it is handed on as `self.server`
        except OSError:
            pass  # the client has gone, or we have
        finally:
            with self._changed:
                self._connections.discard(connection)
            connection.close()

    # --- requests ---------------------------------------------------------------------------------

    def _take_fault(self, request: Request) -> tuple[_Fault, int]:
        with self._changed:
            self.requests.append(request)
            fault = self._fault
            wanted = (
                fault.name not in ("healthy", "refuse")
                and fault.endpoint in (None, request.endpoint)
                and fault.marker.encode() in request.body
                and fault.times != 0
            )
            if not wanted:
                return _Fault(), self._generation
            if fault.times is not None:
                fault.times -= 1
            self.fired[fault.name] += 1
            return fault, self._generation

    def _still(self, generation: int) -> bool:
        return generation == self._generation

    def _wait_for_change(self, generation: int, timeout: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._still(generation), timeout)

    def _process(self, request: Request) -> tuple[int, Any]:
        with self._changed:
            status, reply = self._answer(request)
            request.status = status
            self._changed.notify_all()
            return status, reply

    def _answer(self, request: Request) -> tuple[int, Any]:
        if self.key and request.headers.get("x-wax-key") != self.key:
            return 401, {"detail": "key"}
        if request.endpoint == "config":
            config = {"otel_endpoint": "", "tenant_id": "t", "tenant_slug": "t"}
            return 200, config | ({"ingest_endpoint": self.ingest_endpoint} if self.ingest else {})
        if request.method != "POST":
            return self._violation(request, f"method {request.method}", 405)
        if request.endpoint == "ingest" and self.ingest:
            return self._ingest(request)
        if request.headers.get("content-type") != "application/json" or "content-encoding" in request.headers:
            return self._violation(request, "content headers")
        try:
            body = json.loads(request.body)
        except ValueError:
            return self._violation(request, "no JSON")
        if request.endpoint == "start":
            return self._start(request, body)
        if request.endpoint in _BODIES:
            return self._of_run(request, body)
        return self._violation(request, "address", 404)

    def _violation(self, request: Request, what: str, status: int = 400) -> tuple[int, Any]:
        self.violations.append(f"{request.method} {request.path}: {what}")
        return status, {"detail": what}

    def _start(self, request: Request, body: Any) -> tuple[int, Any]:
        if problem := _check(body, _START):
            return self._violation(request, problem)
        run_id = f"srv-{len(self.runs) + len(self._gone) + 1}"
        self.runs[run_id] = Run(run_id, body, order=["start"])
        return 201, {"run_id": run_id, "workflow_id": run_id, "started_at": "2030-01-01T00:00:00Z"}

    def _of_run(self, request: Request, body: Any) -> tuple[int, Any]:
        run_id = request.path.removeprefix(f"{OBSERVE}runs/").split("/")[0]
        if run_id in self._gone:
            return 404, {"detail": "run"}
        if run_id not in self.runs:
            return self._violation(request, "unknown run", 404)
        if problem := _check(body, _BODIES[request.endpoint]):
            return self._violation(request, problem)
        run = self.runs[run_id]
        run.order.append(request.endpoint)
        if request.endpoint == "llm-calls":
            run.calls += body["calls"]
        elif request.endpoint == "steps":
            run.steps += body["steps"]
        elif request.endpoint == "spans":
            run.spans += body["spans"]
        else:
            run.ends.append(body)
        if self.governance is None or request.endpoint == "spans":
            return 200, {}
        return 200, {"governance": self.governance}

    def _ingest(self, request: Request) -> tuple[int, Any]:
        accepted = duplicates = 0
        rejected: list[dict[str, str]] = []
        for line in request.body.splitlines():
            try:
                record = json.loads(line)
                record_id, kind = record["id"], record["kind"]
            except (ValueError, KeyError, TypeError):
                return self._violation(request, "no record")
            if kind not in _KINDS:
                rejected.append({"id": record_id, "reason": "unknown kind"})
            elif record_id in self.records:
                duplicates += 1
            else:
                accepted += 1
                self.records[record_id] = record
                self._file(record)
        self.duplicates += duplicates
        return 200, {"accepted": accepted, "duplicates": duplicates, "rejected": rejected}

    def _file(self, record: dict[str, Any]) -> None:
        run_id = record.get("run_id", "")
        run = self.runs.setdefault(run_id, Run(run_id, {}))
        run.order.append(record["kind"])
        if record["kind"] == "run_started":
            run.start = record
        elif record["kind"] == "llm_call":
            run.calls.append(record)
        elif record["kind"] == "step":
            run.steps.append(record)
        elif record["kind"] == "run_ended":
            run.ends.append(record)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        pass

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        server: FaultyServer = self.server  # type: ignore[assignment]
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = int(headers.get("content-length", 0))
        body = self.rfile.read(length)
        if len(body) < length:  # cut off, by the client or by our own `refuse`: no request at all
            self.close_connection = True
            return
        if headers.get("content-encoding") == "gzip":
            try:
                body = gzip.decompress(body)
            except (OSError, EOFError, zlib.error):
                body = b""
        request = Request(self.command or "", _endpoint(self.path), self.path, headers, body)
        fault, generation = server._take_fault(request)
        reply: tuple[int, Any] = (200, {})
        if fault.name == "healthy" or fault.name == "trickle" or fault.processed:
            reply = server._process(request)
        if fault.name == "healthy":
            self._send(*reply)
        elif fault.name == "hang":
            server._wait_for_change(generation)
            self.close_connection = True
        elif fault.name == "reset":
            self._reset(fault)
        elif fault.name == "trickle":
            self._trickle(server, fault, generation, reply)
        elif fault.name == "redirect":
            self._send(307, {}, {"Location": fault.location})
        elif fault.name == "invalid_json":
            self._send(200, b"<html>Welcome to this hotel's network</html>")
        else:
            extra = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            self._send(fault.status, {"detail": "as you wish"}, extra)

    def _send(self, status: int, reply: Any, headers: dict[str, str] | None = None) -> None:
        self.wfile.write(self._response(status, reply, headers))

    def _response(self, status: int, reply: Any, headers: dict[str, str] | None = None) -> bytes:
        body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        head = {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in head.items()), "", ""]
        return "\r\n".join(lines).encode() + body

    def _reset(self, fault: _Fault) -> None:
        self.close_connection = True
        if fault.where == "body":
            self.wfile.write(b'HTTP/1.1 200 X\r\nContent-Length: 1000\r\n\r\n{"run_id"')
            time.sleep(0.05)  # or the RST may overtake what was sent
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _trickle(self, server: FaultyServer, fault: _Fault, generation: int, reply: tuple[int, Any]) -> None:
        response = self._response(*reply)
        head = 0 if fault.where == "headers" else response.index(b"\r\n\r\n") + 4
        self.wfile.write(response[:head])
        for index in range(head, len(response)):
            if server._wait_for_change(generation, fault.interval):
                self.close_connection = True
                return
            self.wfile.write(response[index : index + 1])


def _endpoint(path: str) -> str:
    """Name the endpoint: the last part of the address (`llm-calls`, `config`, …)."""
    return path.split("?")[0].rstrip("/").rpartition("/")[2]


def _bound(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # gone already


# --- what WIRE knows: field → (always there?, allowed types or the schema of a list's items) --------------

_Schema = dict[str, tuple[bool, Any]]
_NUMBER = (int, float)
_MAYBE_OBJECT = (dict, type(None))


def _filled(value: Any) -> bool:
    return isinstance(value, str) and value != ""


_START: _Schema = {
    "agent_name": (True, str),
    "workflow_name": (True, str),
    "inputs": (True, dict),
    "metadata": (True, dict),
    "trace_id": (True, lambda value: value == ""),
    "interaction_mode": (False, lambda value: value in ("interactive", "autonomous")),
    "user_id": (False, _filled),
    "user_group": (False, _filled),
    "session_id": (False, _filled),
    "parent_workflow_id": (False, str),
    "root_workflow_id": (False, str),
    "pre_execution_evaluations": (False, list),
    "agent_slug": (False, str),
    "agent_id": (False, str),
}
_CALL: _Schema = {
    "model": (True, str),
    "tokens_in": (True, int),
    "tokens_out": (True, int),
    "cost": (True, _NUMBER),
    "task": (True, str),
    "prompt_preview": (True, lambda value: isinstance(value, str) and len(value) <= 500),
    "response_preview": (True, lambda value: isinstance(value, str) and len(value) <= 500),
    "status": (False, lambda value: value in ("ok", "error")),
    "error_type": (False, str),
    "error_message": (False, str),
    "prompt_hash": (False, str),
    "is_streaming": (False, lambda value: value is True),
    "ttft_ms": (False, int),
    "chunk_count": (False, int),
}
_STEP: _Schema = {"step_name": (True, str), "output": (True, dict), "position": (True, int)}
_SPAN: _Schema = {
    "name": (True, str),
    "kind": (True, str),
    "status": (True, lambda value: value in ("ok", "error")),
    "duration_ms": (True, (int, type(None))),
    "position": (True, int),
    "start_offset_ms": (True, int),
    "parent_position": (True, (int, type(None))),
    "attributes": (True, dict),
    "input_data": (True, _MAYBE_OBJECT),
    "output_data": (True, _MAYBE_OBJECT),
    "events": (False, list),
}
_BODIES: dict[str, _Schema] = {
    "llm-calls": {
        "calls": (True, [_CALL]),
        "hardware_uuid": (True, str),
        "conversation_state": (False, dict),
    },
    "steps": {"steps": (True, [_STEP]), "hardware_uuid": (True, str), "conversation_state": (False, dict)},
    "spans": {"spans": (True, [_SPAN])},
    "complete": {
        "result": (True, dict),
        "status": (True, lambda value: value in ("success", "error", "interrupted")),
        "error": (True, str),
        "steps": (True, lambda value: value == []),
        "error_type": (False, str),
        "traceback": (False, str),
        "trace_id": (False, lambda value: isinstance(value, str) and len(value) == 32),
        "root_span_id": (False, lambda value: isinstance(value, str) and len(value) == 16),
        "conversation_state": (False, dict),
    },
}
_KINDS = frozenset({"run_started", "llm_call", "step", "run_updated", "run_ended", "task_lost"})


def _check(body: Any, schema: _Schema) -> str:
    """Return what is wrong with a body, or an empty string."""
    if not isinstance(body, dict):
        return "no object"
    for name in body.keys() - schema.keys():
        return f"unknown field {name}"
    for name, (always, allowed) in schema.items():
        if name not in body:
            if always:
                return f"missing field {name}"
        elif isinstance(allowed, list):
            if not isinstance(body[name], list) or not body[name]:
                return f"{name}: no list, or an empty one"
            for item in body[name]:
                if problem := _check(item, allowed[0]):
                    return f"{name}: {problem}"
        elif isinstance(allowed, (type, tuple)):
            if not isinstance(body[name], allowed) or (isinstance(body[name], bool) and allowed is int):
                return f"{name}: wrong type {type(body[name]).__name__}"
        elif not allowed(body[name]):
            return f"{name}: wrong value"
    return ""
