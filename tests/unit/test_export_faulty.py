"""The test server itself: strict about addresses, headers and bodies, and each fault is what it says."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.faulty import INGEST, FaultyServer

RUNS = "/api/v1/observe/runs/"
START = {"agent_name": "a", "workflow_name": "w", "inputs": {}, "metadata": {}, "trace_id": ""}
CALL = {
    "model": "m",
    "tokens_in": 1,
    "tokens_out": 2,
    "cost": 0.0,
    "task": "chat.completions",
    "prompt_preview": "",
    "response_preview": "",
}


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server


@pytest.fixture
def client(server: FaultyServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=5) as client:
        yield client


def test_a_run_as_the_platforms_client_sends_it(server: FaultyServer, client: httpx.Client) -> None:
    run_id = client.post(f"{RUNS}start/", json=START).json()["run_id"]
    calls = {"calls": [CALL, CALL], "hardware_uuid": ""}
    end = {"result": {}, "status": "success", "error": "", "steps": []}
    assert client.post(f"{RUNS}{run_id}/llm-calls/", json=calls).json() == {}
    assert client.post(f"{RUNS}{run_id}/complete/", json=end).status_code == 200
    assert (len(server.calls), server.runs[run_id].tokens, server.runs[run_id].state) == (
        2,
        (2, 4),
        "success",
    )
    assert server.violations == []


@pytest.mark.parametrize(
    ("path", "body", "violation"),
    [
        ("start/", {}, "missing field"),
        ("start/", START | {"surprise": 1}, "unknown field surprise"),
        ("start/", START | {"inputs": []}, "inputs: wrong type list"),
        ("start/", START | {"trace_id": "ab"}, "trace_id: wrong value"),
        ("start/", START | {"user_id": ""}, "user_id: wrong value"),
        ("start/", [], "no object"),
        ("RUN/llm-calls/", {"calls": [CALL]}, "missing field hardware_uuid"),
        ("RUN/llm-calls/", {"calls": [], "hardware_uuid": ""}, "an empty one"),
        ("RUN/llm-calls/", {"calls": [CALL | {"id": "x"}], "hardware_uuid": ""}, "calls: unknown field id"),
        ("RUN/llm-calls/", {"calls": [CALL | {"tokens_in": True}], "hardware_uuid": ""}, "wrong type bool"),
        ("RUN/llm-calls/", {"calls": [CALL | {"cost": None}], "hardware_uuid": ""}, "wrong type NoneType"),
        (
            "RUN/complete/",
            {"result": {}, "status": "killed", "error": "", "steps": []},
            "status: wrong value",
        ),
        ("RUN/start/", START, "address"),
        ("start", START, "address"),
        ("start/?draft=1", START, "address"),
        ("RUN/llm-calls/more/llm-calls/", {"calls": [CALL], "hardware_uuid": ""}, "address"),
        ("RUN/notes/", {}, "address"),
        ("../../elsewhere/runs/start/", START, "address"),
        ("nobody/llm-calls/", {"calls": [CALL], "hardware_uuid": ""}, "unknown run"),
    ],
)
def test_what_the_protocol_does_not_know_is_a_violation(
    server: FaultyServer, client: httpx.Client, path: str, body: Any, violation: str
) -> None:
    run_id = client.post(f"{RUNS}start/", json=START).json()["run_id"]
    answer = client.post(RUNS + path.replace("RUN", run_id), json=body)
    assert answer.status_code in (400, 404)
    assert [violation in found for found in server.violations] == [True]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "violation"),
    [
        ("GET", "/somewhere/else/config/", {}, 404, "address"),
        ("GET", "/api/v1/observe/config/?verbose=1", {}, 404, "address"),
        ("POST", "/api/v1/observe/config/", {}, 405, "method POST"),
        ("GET", "/api/v1/observe/config/", {"Content-Type": "application/json"}, 400, "content headers"),
        ("GET", "/api/v1/observe/config/", {"X-Waxell-Host": "me"}, 400, "header x-waxell-host"),
        ("GET", f"{RUNS}start/", {}, 405, "method GET"),
        ("POST", f"{RUNS}start/", {"Idempotency-Key": "1"}, 400, "header idempotency-key"),
        ("POST", f"{RUNS}start/", {"Content-Type": "text/json"}, 400, "content headers"),
        ("POST", f"{RUNS}start/", {"Content-Encoding": "gzip"}, 400, "content headers"),
        ("POST", INGEST, {"Content-Type": "application/json"}, 400, "content headers"),
        ("POST", "/other/ingest/", {"Content-Type": "application/x-ndjson"}, 404, "address"),
    ],
)
def test_an_address_or_header_that_the_protocol_does_not_know_is_a_violation(
    server: FaultyServer,
    client: httpx.Client,
    method: str,
    path: str,
    headers: dict[str, str],
    status: int,
    violation: str,
) -> None:
    server.ingest = True
    body = json.dumps(START) if method == "POST" else None
    own = {"Content-Type": "application/json", "X-Wax-Key": "k"} if body else {"X-Wax-Key": "k"}
    assert client.request(method, path, content=body, headers=own | headers).status_code == status
    assert [found.rpartition(": ")[2] for found in server.violations] == [violation]


def test_ingest_is_no_address_of_a_server_that_does_not_offer_it(
    server: FaultyServer, client: httpx.Client
) -> None:
    assert client.post(INGEST, content=b"").status_code == 404
    assert [found.rpartition(": ")[2] for found in server.violations] == ["address"]


def test_a_forgotten_run_is_no_violation(server: FaultyServer, client: httpx.Client) -> None:
    run_id = client.post(f"{RUNS}start/", json=START).json()["run_id"]
    server.forget_runs()
    calls = {"calls": [CALL], "hardware_uuid": ""}
    assert client.post(f"{RUNS}{run_id}/llm-calls/", json=calls).status_code == 404
    assert server.violations == []


def test_a_fault_hits_what_it_is_meant_for_and_is_counted(server: FaultyServer, client: httpx.Client) -> None:
    server.mode("503", endpoint="start", marker="poison", times=1, retry_after="3")
    poison = START | {"agent_name": "poison"}
    assert client.get("/api/v1/observe/config/").status_code == 200
    assert client.post(f"{RUNS}start/", json=START).status_code == 201
    answer = client.post(f"{RUNS}start/", json=poison)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
    assert client.post(f"{RUNS}start/", json=poison).status_code == 201
    assert server.fired == {"503": 1}


def test_processed_means_done_and_then_misbehaved(server: FaultyServer, client: httpx.Client) -> None:
    server.mode("500", processed=True)
    assert client.post(f"{RUNS}start/", json=START).status_code == 500
    assert len(server.runs) == 1


def test_a_refusing_server_comes_back_on_its_port(server: FaultyServer, client: httpx.Client) -> None:
    for _ in range(3):
        server.mode("refuse")
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url)
        server.mode("healthy")
        assert client.get("/api/v1/observe/config/").status_code == 200


def test_a_body_that_is_cut_off_is_no_request(server: FaultyServer) -> None:
    head = f"POST {RUNS}start/ HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), 5) as connection:
        connection.sendall(head.encode() + b'{"agent_name"')
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    assert (server.requests, server.violations) == ([], [])


@pytest.mark.parametrize("where", ["request", "body"])
def test_a_reset_breaks_the_connection(server: FaultyServer, client: httpx.Client, where: str) -> None:
    server.mode("reset", where=where)
    with pytest.raises(httpx.TransportError):
        client.get("/api/v1/observe/config/")


def test_a_hanging_server_never_answers_until_it_changes(server: FaultyServer, client: httpx.Client) -> None:
    server.mode("hang")
    with pytest.raises(httpx.ReadTimeout):
        client.get("/api/v1/observe/config/", timeout=0.2)
    server.mode("healthy")
    assert client.get("/api/v1/observe/config/").status_code == 200


def test_an_unknown_mode_is_an_error(server: FaultyServer) -> None:
    with pytest.raises(ValueError, match="no such mode"):
        server.mode("sleepy")
