"""Whole batches to a server that offers ingest: one request, exactly once by record id."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.export_cases import batch, call, ended, export, exporter, ids, left, started
from tests.faulty import FaultyServer
from waxell_workers.core.exporting import RunBatch, RunState
from waxell_workers.core.records import RunUpdated, TaskLost
from waxell_workers.export import ingest
from waxell_workers.export.waxell import WaxellExporter


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(ingest=True) as server:
        yield server
        assert server.violations == []


@pytest.fixture
def waxell(server: FaultyServer) -> Iterator[WaxellExporter]:
    waxell = exporter(server.url)
    yield waxell
    waxell.close()


def test_a_batch_is_one_request(server: FaultyServer, waxell: WaxellExporter) -> None:
    runs = [batch(f"r{number}") for number in range(50)]
    outcome = export(waxell, *runs)
    assert outcome.acknowledged == ids(*runs) == server.records.keys()
    assert (outcome.rejected, outcome.error, outcome.paused) == ({}, "", "")
    assert [request.endpoint for request in server.requests] == ["config", "ingest"]


def test_the_order_of_a_runs_records_is_kept(server: FaultyServer, waxell: WaxellExporter) -> None:
    update = RunUpdated(id="u", at=1, run_id="r", tags={"a": "b"})
    lost = TaskLost(id="l", at=1, task_id="t", reason="gone")
    export(waxell, batch("r", started(), call(), update, call(number=1), ended(), lost))
    assert list(server.records) == ["r.start", "r.call0", "u", "r.call1", "r.end", "l"]


def test_only_what_is_among_the_records_is_sent(server: FaultyServer, waxell: WaxellExporter) -> None:
    export(waxell, RunBatch(RunState(started()), [call()]))
    assert list(server.records) == ["r.call0"]


def test_calls_are_priced_and_belong_to_a_run(server: FaultyServer, waxell: WaxellExporter) -> None:
    run = batch("auto", started("auto"), call("", number=1), ended("auto"))
    export(waxell, run)
    record = server.records[".call1"]
    assert record["run_id"] == "auto"
    assert record["cost_usd"] > 0


@pytest.mark.parametrize("fault", ["500", "503", "429", "408", "reset", "invalid_json"])
@pytest.mark.parametrize("processed", [False, True])
def test_a_repeat_is_recognised(
    server: FaultyServer, waxell: WaxellExporter, fault: str, processed: bool
) -> None:
    """Given a request whose outcome is unknown, when it is repeated, then every record is there once."""
    run = batch()
    server.mode(fault, endpoint="ingest", times=1, processed=processed)
    first = export(waxell, run)
    assert first.error.startswith("ingest: ")
    assert first.acknowledged == set()
    second = export(waxell, run)
    assert second.acknowledged == ids(run) == server.records.keys()
    assert server.duplicates == (4 if processed else 0)
    assert server.count("config") == 1


def test_a_long_batch_is_cut(
    server: FaultyServer, waxell: WaxellExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "BODY_LIMIT", 2000)
    calls = [call(number=number, prompt="x" * (5000 if number == 7 else 10)) for number in range(40)]
    run = batch("r", started(), *calls, ended())
    assert export(waxell, run).acknowledged == ids(run)
    bodies = [request.body for request in server.requests if request.endpoint == "ingest"]
    assert len(bodies) > 3
    assert all(len(body) <= 2000 or body.count(b"\n") == 1 for body in bodies)
    assert [record["id"] for record in map(json.loads, b"".join(bodies).splitlines())] == [
        record.id for record in run.records
    ]


def test_after_a_failure_the_rest_of_a_cut_batch_is_not_sent_out_of_order(
    server: FaultyServer, waxell: WaxellExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "BODY_LIMIT", 1000)
    run = batch("r", started(), *[call(number=number) for number in range(40)], ended())
    server.mode("503", endpoint="ingest", marker="r.call9")
    outcome = export(waxell, run)
    assert "r.call20" not in server.records
    server.mode("healthy")
    rest = export(waxell, *left(outcome, run))
    assert outcome.acknowledged | rest.acknowledged == ids(run)
    assert list(server.records) == [record.id for record in run.records]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_the_poison_is_found_among_a_hundred_records(
    server: FaultyServer, waxell: WaxellExporter, status: int
) -> None:
    calls = [call(number=number, model="poison" if number == 63 else "gpt-4o") for number in range(98)]
    run = batch("r", started(), *calls, ended())
    server.mode("reject", marker="poison", status=status)
    outcome = export(waxell, run)
    assert outcome.rejected == {"r.call63": f"ingest: {status}"}
    assert outcome.acknowledged == ids(run) - {"r.call63"}
    assert server.fired["reject"] < 16


def test_a_server_that_refuses_everything_is_paused_and_nothing_is_thrown_away(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    run = batch("r", started(), *[call(number=number) for number in range(50)], ended())
    server.mode("422", endpoint="ingest")
    outcome = export(waxell, run)
    assert outcome.paused == "ingest: 422, 5 times in a row"
    assert (outcome.acknowledged, outcome.rejected) == (set(), {})
    server.mode("healthy")
    assert export(waxell, run).acknowledged == ids(run)


def test_records_rejected_inside_a_good_answer_go_to_quarantine(
    server: FaultyServer, waxell: WaxellExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.faulty._KINDS", frozenset({"run_started", "run_ended", "step"}))
    run = batch()
    outcome = export(waxell, run)
    assert outcome.rejected == {"r.call0": "ingest: unknown kind"}
    assert outcome.acknowledged == ids(run) - {"r.call0"}


@pytest.mark.parametrize("status", ["404", "405"])
def test_when_the_endpoint_is_gone_the_server_is_asked_again(
    server: FaultyServer, waxell: WaxellExporter, status: str
) -> None:
    """Given a server replaced by one that speaks REST only, then the next export goes by REST."""
    export(waxell, batch("first"))
    server.mode(status, endpoint="ingest")
    run = batch()
    outcome = export(waxell, run)
    assert (outcome.acknowledged, outcome.error, outcome.paused) == (set(), f"ingest: {status}", "")
    server.ingest = False
    assert export(waxell, run).acknowledged == ids(run)
    assert server.count("config") == 2
    assert server.count("complete") == 1


def test_an_endpoint_that_was_offered_a_moment_ago_and_is_not_there_pauses(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    server.mode("404", endpoint="ingest")
    assert export(waxell, batch()).paused == "ingest: 404"


def test_what_json_cannot_say_goes_to_quarantine(server: FaultyServer, waxell: WaxellExporter) -> None:
    run = batch("r", started(), call(error_message="\ud800"), ended())
    outcome = export(waxell, run)
    assert outcome.rejected == {"r.call0": "ingest: cannot be encoded (UnicodeEncodeError)"}
    assert outcome.acknowledged == {"r.start", "r.end"}
