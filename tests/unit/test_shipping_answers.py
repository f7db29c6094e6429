"""What becomes of records by what the server answers: the whole way, from the journal to a strict server.

Each row of the table in docs/export.md is fired at a shipper that runs, for both shapes of the protocol.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.destination import Destination, call, ended, started, states
from tests.faulty import FaultyServer
from tests.harness import await_
from waxell_workers.core import shipper as shipping
from waxell_workers.core import window
from waxell_workers.core.records import Step
from waxell_workers.core.shipper import Shipper

RUNS = ("a", "b", "c")


@pytest.fixture(params=["ingest", "rest"])
def server(request: pytest.FixtureRequest) -> Iterator[FaultyServer]:
    with FaultyServer(ingest=request.param == "ingest") as server:
        yield server
        assert server.violations == []


@pytest.fixture
def data(server: FaultyServer) -> str:
    """The endpoint that the first record of a run goes to."""
    return "ingest" if server.ingest else "start"


@pytest.fixture
def destination(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Destination:
    monkeypatch.setattr(window, "_BACKOFF_MOST_S", 0.1)
    monkeypatch.setattr(shipping, "_POLL_S", 0.02)
    return Destination(server, tmp_path)


class Running:
    """A shipper at work in a thread."""

    def __init__(self, destination: Destination) -> None:
        self.rounds = 0
        self.shipper = Shipper(destination.settings, destination.directory, stay=True, progress=self._count)
        self._thread = threading.Thread(target=self.shipper.run)

    def _count(self, delivered: int, pending: int) -> None:
        self.rounds += 1

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shipper.stop(time.monotonic())
        self._thread.join()

    def goes_round(self, times: int) -> None:
        """Wait until the shipper has had the occasion to do something `times` times more."""
        target = self.rounds + times
        await_(lambda: self.rounds >= target, f"{times} rounds")


def record_runs(destination: Destination) -> None:
    for name in RUNS:
        destination.append(started(name), call(name), ended(name))


def all_arrived_once(server: FaultyServer) -> bool:
    return states(server) == dict.fromkeys(RUNS, "success") and sorted(
        record["model"] for record in server.calls
    ) == ["a-0", "b-0", "c-0"]


def quarantined(destination: Destination) -> list[dict[str, Any]]:
    path = Path(destination.directory, "quarantine.ndjson")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        *((status, {}) for status in ("408", "425", "429", "500", "502", "503", "504", "599")),
        ("invalid_json", {}),
        ("reset", {"where": "request"}),
        ("reset", {"where": "body"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("where", ""),
)
def test_what_may_pass_is_tried_again_until_it_has(
    server: FaultyServer, destination: Destination, data: str, fault: str, options: dict[str, str]
) -> None:
    """Given an answer that may be another one later, everything is kept and tried again without end."""
    server.mode(fault, endpoint=data, **options)
    record_runs(destination)
    with Running(destination) as running:
        await_(lambda: server.fired[fault] >= 5, "repeats")
        assert running.shipper.delivered == 0
        server.mode("healthy")
        await_(lambda: running.shipper.pending == 0, "delivery")
    assert all_arrived_once(server)
    assert quarantined(destination) == []


def test_a_server_that_is_down_is_tried_again(server: FaultyServer, destination: Destination) -> None:
    """Given a closed port, everything is kept, and arrives once it opens."""
    server.mode("refuse")
    record_runs(destination)
    with Running(destination) as running:
        running.goes_round(60)
        assert running.shipper.delivered == 0
        server.mode("healthy")
        await_(lambda: running.shipper.pending == 0, "delivery")
    assert all_arrived_once(server)


def test_a_name_that_is_not_found_is_tried_again(
    server: FaultyServer, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a host name that nobody knows, everything is kept, and arrives once it is known."""
    asked: list[str] = []
    look_up = socket.getaddrinfo

    def nobody_knows(host: Any, *more: Any, **named: Any) -> Any:
        if host not in (b"localhost", "localhost"):
            return look_up(host, *more, **named)
        asked.append("localhost")
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    destination.settings = dataclasses.replace(
        destination.settings, api_url=server.url.replace("127.0.0.1", "localhost")
    )
    monkeypatch.setattr(socket, "getaddrinfo", nobody_knows)
    record_runs(destination)
    with Running(destination) as running:
        await_(lambda: len(asked) >= 5, "repeats")
        assert running.shipper.delivered == 0
        assert server.requests == []
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        await_(lambda: running.shipper.pending == 0, "delivery")
    assert all_arrived_once(server)
    assert quarantined(destination) == []


def test_a_server_without_tls_is_tried_again(server: FaultyServer, destination: Destination) -> None:
    """Given `https://` to a port that speaks no TLS, or none that is trusted, everything is kept."""
    plain = destination.settings
    destination.settings = dataclasses.replace(plain, api_url=server.url.replace("http:", "https:"))
    record_runs(destination)
    with Running(destination) as running:
        await_(lambda: server.connections >= 5, "repeats")
        assert running.shipper.delivered == 0
        assert running.shipper.pending == 3 * len(RUNS)
    assert server.requests == []
    destination.settings = plain
    assert destination.ship().pending == 0
    assert all_arrived_once(server)
    assert quarantined(destination) == []


def test_a_server_that_never_answers_is_tried_again(
    server: FaultyServer, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a connection that hangs, a batch is given up at its deadline and tried again."""
    monkeypatch.setattr(shipping, "_EXPORT_S", 0.3)
    server.mode("hang")
    record_runs(destination)
    with Running(destination) as running:
        await_(lambda: server.fired["hang"] >= 3, "repeats")
        server.mode("healthy")
        await_(lambda: running.shipper.pending == 0, "delivery")
    assert all_arrived_once(server)


def test_retry_after_is_waited_for(server: FaultyServer, destination: Destination, data: str) -> None:
    """Given a server that says when to come again, nobody comes sooner."""
    server.mode("429", endpoint=data, retry_after="3600")
    record_runs(destination)
    with Running(destination) as running:
        await_(lambda: server.fired["429"], "the answer")
        running.goes_round(2)
        asked = len(server.requests)
        running.goes_round(40)
        assert len(server.requests) == asked
        assert running.shipper.delivered == 0


@pytest.mark.parametrize("fault", ["401", "402", "403", "404", "405", "407", "411", "451", "redirect"])
def test_a_refusal_pauses_and_keeps_everything(
    server: FaultyServer,
    destination: Destination,
    data: str,
    fault: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Given a wrong key or address, it is said once, nothing is thrown away, and it is tried again later."""
    caplog.set_level(logging.WARNING, "waxell_workers")
    server.mode(fault, endpoint=data)
    record_runs(destination)
    with Running(destination) as running:
        await_(lambda: server.fired[fault], "the refusal")
        running.goes_round(2)
        asked = len(server.requests)
        running.goes_round(40)
        assert len(server.requests) == asked, "it is tried again each minute, not each round"
        assert running.shipper.delivered == 0
    assert quarantined(destination) == []
    assert len([record for record in caplog.records if "everything is kept" in record.message]) == 1
    monkeypatch.setattr(shipping, "_PAUSE_S", 0.2)
    with Running(destination) as running:
        await_(lambda: server.fired[fault] >= 4, "more refusals")
        server.mode("healthy")
        await_(lambda: running.shipper.pending == 0, "delivery")
    assert all_arrived_once(server)


@pytest.mark.parametrize("status", [400, 409, 413, 422])
def test_a_poisonous_record_goes_to_quarantine_alone(
    server: FaultyServer, destination: Destination, status: int
) -> None:
    """Given one record that is never taken, it is kept aside with the reason; the rest arrives."""
    server.mode("reject", status=status, marker="poison")
    record_runs(destination)
    destination.append(call("b", 1, model="poison", tokens_in=77), call("b", 2))
    with Running(destination) as running:
        await_(lambda: running.shipper.pending == 0, "delivery")
        assert running.shipper.rejected == 1
    assert server.fired["reject"] > 0
    assert sorted(record["model"] for record in server.calls) == ["a-0", "b-0", "b-2", "c-0"]
    (kept,) = quarantined(destination)
    assert (kept["record"]["model"], kept["record"]["tokens_in"]) == ("poison", 77)
    assert str(status) in kept["reason"]


@pytest.mark.parametrize("status", ["400", "409", "413", "422"])
def test_a_server_that_rejects_everything_is_paused_and_nothing_is_thrown_away(
    server: FaultyServer, destination: Destination, data: str, status: str
) -> None:
    """Given five refusals in a row, it is the server's fault: what was refused is kept for later."""
    server.mode(status, endpoint=data)
    for number in range(20):
        destination.append(started(f"r{number}"), call(f"r{number}"), ended(f"r{number}"))
    with Running(destination) as running:
        await_(lambda: server.fired[status] >= 5, "five refusals")
        running.goes_round(2)
        asked = len(server.requests)
        running.goes_round(40)
        assert len(server.requests) == asked
    server.mode("healthy")
    assert destination.ship().pending == 0
    arrived = {record["model"] for record in server.calls}
    given_up = {kept["record"].get("run_id") for kept in quarantined(destination)}
    assert len(given_up) <= 4
    assert arrived | {f"{run_id}-0" for run_id in given_up} == {f"r{number}-0" for number in range(20)}


def test_what_a_good_answer_rejects_goes_to_quarantine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a 2xx of `ingest` that rejects one record, that is kept aside, the rest arrives."""
    monkeypatch.setattr("tests.faulty._KINDS", frozenset({"run_started", "llm_call", "run_ended"}))
    with FaultyServer(ingest=True) as server:
        destination = Destination(server, tmp_path)
        step = Step(id="unwanted", at=time.time(), run_id="a", name="step", position=0)
        destination.append(started("a"), call("a"), step, ended("a"))
        with Running(destination) as running:
            await_(lambda: running.shipper.pending == 0, "delivery")
            assert (running.shipper.delivered, running.shipper.rejected) == (3, 1)
        assert states(server) == {"a": "success"}
        assert server.violations == []
    (kept,) = quarantined(destination)
    assert (kept["record"]["id"], kept["reason"]) == ("unwanted", "ingest: unknown kind")


@pytest.fixture
def rest() -> Iterator[FaultyServer]:
    """A server that speaks REST alone."""
    with FaultyServer() as server:
        yield server
        assert server.violations == []


def test_where_no_reply_is_needed_2xx_is_enough(rest: FaultyServer, tmp_path: Path) -> None:
    """Given a 200 without JSON for calls, they are acknowledged, and are not sent again."""
    destination = Destination(rest, tmp_path)
    rest.mode("raw", endpoint="llm-calls", processed=True, play=_says_ok)
    record_runs(destination)
    assert destination.ship().pending == 0
    assert rest.fired["raw"] == len(RUNS)
    assert all_arrived_once(rest)


def _says_ok(connection: socket.socket, still: Callable[[], bool]) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@pytest.mark.parametrize("status", ["404", "410"])
def test_an_answer_that_a_run_is_not_there_starts_it_again(
    rest: FaultyServer, tmp_path: Path, status: str
) -> None:
    """Given 404 or 410 of a run, it is started once more, and what was left goes to the new one."""
    destination = Destination(rest, tmp_path)
    rest.mode(status, endpoint="llm-calls", times=1)
    destination.append(started("a"), call("a"), ended("a"))
    with Running(destination) as running:
        await_(lambda: running.shipper.pending == 0, "delivery")
    assert rest.fired[status] == 1
    first, second = rest.runs.values()
    assert (first.calls, first.state) == ([], "")
    assert ([record["model"] for record in second.calls], second.state) == (["a-0"], "success")
    assert quarantined(destination) == []


@pytest.mark.parametrize("status", ["400", "404", "410", "422"])
def test_spans_that_are_refused_cost_no_record(rest: FaultyServer, tmp_path: Path, status: str) -> None:
    """Given a server that takes no spans, they are given up, and everything else arrives, once."""
    destination = Destination(rest, tmp_path)
    rest.mode(status, endpoint="spans")
    record_runs(destination)
    with Running(destination) as running:
        await_(lambda: running.shipper.pending == 0, "delivery")
    assert rest.fired[status] >= len(RUNS)
    assert len(rest.runs) == len(RUNS), "no run was started again for its spans"
    assert all_arrived_once(rest)
    assert quarantined(destination) == []


def test_an_ingest_that_is_gone_has_the_configuration_asked_for_again(tmp_path: Path) -> None:
    """Given a server that is replaced by one without `ingest`, the rest goes by REST, in the same life."""
    with FaultyServer(ingest=True) as server:
        destination = Destination(server, tmp_path)
        destination.append(started("a"), call("a"), ended("a"))
        with Running(destination):
            await_(lambda: states(server) == {"a": "success"}, "delivery by ingest")
            server.mode("404", endpoint="ingest")
            server.ingest = False
            destination.append(started("b"), call("b"), ended("b"))
            await_(lambda: states(server) == {"a": "success", "b": "success"}, "delivery by REST")
        assert server.fired["404"] == 1
        assert server.count("config") == 2
        assert server.violations == []


def test_a_run_that_the_server_forgot_is_started_again(tmp_path: Path) -> None:
    """Given a REST server that was reset in mid-run, the rest of the run goes to a new one."""
    with FaultyServer() as server:
        destination = Destination(server, tmp_path)
        destination.append(started("a"), call("a"))
        with Running(destination) as running:
            await_(lambda: running.shipper.pending == 0 and server.calls, "delivery")
            server.forget_runs()
            destination.append(call("a", 1), ended("a"))
            await_(lambda: states(server) == {"a": "success"}, "delivery to a new run")
        assert [record["model"] for record in server.calls] == ["a-1"]
        assert server.violations == []
