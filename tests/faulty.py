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

import json
import re
import socket
import ssl
from dataclasses import dataclass, field
from typing import Any

from waxell_workers.testing.conformance.faults import FaultyHTTP, Request

OBSERVE = "/api/v1/observe/"
INGEST = "/api/v1/observe/ingest/"
_HANDSHAKE_S = 10.0


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


class FaultyServer(FaultyHTTP):
    """The server, on a port of 127.0.0.1 that stays the same through every mode.

    Args:
        key: If not empty, requests must carry it as `X-Wax-Key`.
        ingest: Offer `ingest` in the configuration; may be switched at any time.
    """

    def __init__(self, *, key: str = "", ingest: bool = False) -> None:
        super().__init__()
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
        self.connections = 0
        """How many were accepted, whatever came of them."""
        self.violations: list[str] = []
        self.tls: ssl.SSLContext | None = None
        """Speak TLS; handshakes that fail are counted as `fired["tls"]`."""
        self.deaf = False
        """Accept connections and read nothing of them, until `listens()`; counted as `fired["deaf"]`."""
        self._gone: set[str] = set()

    @property
    def calls(self) -> list[dict[str, Any]]:
        """All calls of all runs."""
        with self._changed:
            return [call for run in self.runs.values() for call in run.calls]

    def forget_runs(self) -> None:
        """Lose all runs, as a server does that has been reset: their ids are 404 from now on."""
        with self._changed:
            self._gone.update(self.runs)
            self.runs.clear()

    def _serve(self, connection: socket.socket, address: Any) -> None:
        with self._changed:
            self.connections += 1
            if self.deaf:
                self.fired["deaf"] += 1
                self._changed.wait_for(lambda: not self.deaf)
        if self.tls is not None:
            connection.settimeout(_HANDSHAKE_S)
            try:
                connection = self.tls.wrap_socket(connection, server_side=True)
            except OSError:
                with self._changed:
                    self.fired["tls"] += 1
                connection.close()
                return
        super()._serve(connection, address)

    def listens(self) -> None:
        """Read again what comes."""
        with self._changed:
            self.deaf = False
            self._changed.notify_all()

    def answer(self, request: Request) -> tuple[int, Any]:
        """Answer as WIRE says, or note a violation."""
        with self._changed:
            return self._answer(request)

    def _answer(self, request: Request) -> tuple[int, Any]:
        if self.key and request.headers.get("x-wax-key") != self.key:
            return 401, {"detail": "key"}
        is_ingest = self.ingest and request.path == str(self.ingest_endpoint).removeprefix(self.url)
        if not is_ingest and not _ADDRESSES.fullmatch(request.path):
            return self._violation(request, "address", 404)
        if unknown := request.headers.keys() - _HEADERS:
            return self._violation(request, f"header {min(unknown)}")
        if request.endpoint == "config":
            return self._configuration(request)
        if request.method != "POST":
            return self._violation(request, f"method {request.method}", 405)
        if is_ingest:
            return self._ingest(request)
        if request.headers.get("content-type") != "application/json" or "content-encoding" in request.headers:
            return self._violation(request, "content headers")
        try:
            body = json.loads(request.body)
        except ValueError:
            return self._violation(request, "no JSON")
        if request.endpoint == "start":
            return self._start(request, body)
        return self._of_run(request, body)

    def _configuration(self, request: Request) -> tuple[int, Any]:
        if request.method != "GET":
            return self._violation(request, f"method {request.method}", 405)
        if _CONTENT_HEADERS & request.headers.keys() or request.body:
            return self._violation(request, "content headers")
        config = {"otel_endpoint": "", "tenant_id": "t", "tenant_slug": "t"}
        return 200, config | ({"ingest_endpoint": self.ingest_endpoint} if self.ingest else {})

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
        content = {request.headers.get(name) for name in ("content-type", "content-encoding")}
        if content != {"application/x-ndjson", "gzip"}:
            return self._violation(request, "content headers")
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


# --- what WIRE knows: addresses and headers, those that httpx adds among them -----------------------------

_ADDRESSES = re.compile(
    rf"{re.escape(OBSERVE)}(config/|runs/start/|runs/[^/?]+/(llm-calls|steps|spans|complete)/)"
)
_CONTENT_HEADERS = {"content-type", "content-encoding"}
_HEADERS = {"x-wax-key", "traceparent", "user-agent", "accept", "accept-encoding", "connection", "host"}
_HEADERS |= {"content-length", *_CONTENT_HEADERS}

# --- … and bodies: field → (always there?, allowed types or the schema of a list's items) ------------------

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
