"""The REST sequence against a strict server: what is taken is acknowledged at once and never sent again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.export_cases import batch, call, ended, export, exporter, ids, left, started, step
from tests.faulty import FaultyServer, Run
from waxell_workers.core.exporting import RunBatch, RunState
from waxell_workers.core.records import RunUpdated, TaskLost
from waxell_workers.export import bodies, rest
from waxell_workers.export.waxell import WaxellExporter

SEQUENCE = ["start", "llm-calls", "steps", "spans", "complete"]


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server
        assert server.violations == []


@pytest.fixture
def waxell(server: FaultyServer) -> Iterator[WaxellExporter]:
    waxell = exporter(server.url)
    yield waxell
    waxell.close()


def the_run(server: FaultyServer) -> Run:
    (run,) = server.runs.values()
    return run


def test_a_run_goes_out_in_five_requests_and_everything_is_acknowledged(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    run = batch()
    outcome = export(waxell, run)
    assert outcome.acknowledged == ids(run)
    assert (outcome.rejected, outcome.error, outcome.paused) == ({}, "", "")
    assert the_run(server).order == SEQUENCE
    assert run.run.remote_id == the_run(server).run_id
    assert [span["kind"] for span in the_run(server).spans] == ["llm", "agent"]
    assert the_run(server).calls[0]["cost"] > 0


def test_the_records_of_a_run_may_come_in_several_batches(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    state = RunState(started())
    for records in ([state.started], [call(number=0)], [call(number=1), step()], [ended()]):
        outcome = export(waxell, RunBatch(state, records))
        assert outcome.acknowledged == {record.id for record in records}
    run = the_run(server)
    assert run.order == ["start", "llm-calls", "spans", "llm-calls", "steps", "spans", "spans", "complete"]
    assert [span["position"] for span in run.spans] == [1, 2, 0]
    assert state.spans == 2


def test_a_new_exporter_goes_on_with_the_state_that_the_shipper_kept(server: FaultyServer) -> None:
    state = RunState(started())
    for records in ([state.started, call()], [ended()]):
        shipper = exporter(server.url)
        export(shipper, RunBatch(state, records))
        shipper.close()
    assert the_run(server).state == "success"


def test_tags_and_metadata_reach_the_end_of_a_run_that_was_started_without_them(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    state = RunState(started())
    export(waxell, RunBatch(state, [state.started]))
    update = RunUpdated(id="u", at=1, run_id="r", tags={"a": "1"}, metadata={"k": 2})
    assert export(waxell, RunBatch(state, [update])).acknowledged == {"u"}
    export(waxell, RunBatch(state, [ended()]))
    ours = the_run(server).ends[0]["result"]["waxell"]
    assert (ours["tags"], ours["metadata"]) == ({"a": "1"}, {"k": 2})
    assert the_run(server).order == ["start", "spans", "complete"]


def test_a_lost_task_has_nothing_to_say_here(server: FaultyServer, waxell: WaxellExporter) -> None:
    lost = TaskLost(id="l", at=1, task_id="t", reason="killed by signal 9")
    assert export(waxell, RunBatch(RunState(started()), [lost])).acknowledged == {"l"}
    assert server.runs == {}


def test_many_runs_go_out_side_by_side_each_in_its_order(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    runs = [batch(f"r{number}") for number in range(60)]
    assert export(waxell, *runs).acknowledged == ids(*runs)
    assert len(server.runs) == 60
    assert all(run.order == SEQUENCE for run in server.runs.values())


def test_without_threads_the_runs_go_out_one_by_one(
    server: FaultyServer, waxell: WaxellExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [batch(f"r{number}") for number in range(5)]
    monkeypatch.setattr(waxell._crew, "_hire", lambda wanted: None)
    assert export(waxell, *runs).acknowledged == ids(*runs)


def test_an_empty_run_id_is_no_start(server: FaultyServer, waxell: WaxellExporter) -> None:
    run = batch()
    server.mode("200", endpoint="start", times=1)
    outcome = export(waxell, run)
    assert (outcome.acknowledged, outcome.error) == (set(), "start: 200, no run_id")
    assert export(waxell, run).acknowledged == ids(run)


@pytest.mark.parametrize("endpoint", SEQUENCE)
@pytest.mark.parametrize("fault", ["500", "503", "429", "408", "reset"])
def test_what_fails_is_tried_again_and_what_was_taken_is_not(
    server: FaultyServer, waxell: WaxellExporter, endpoint: str, fault: str
) -> None:
    """Given a run of which one request fails once, then every record arrives, and arrives once."""
    run = batch()
    server.mode(fault, endpoint=endpoint, times=1, **({"where": "request"} if fault == "reset" else {}))
    first = export(waxell, run)
    assert server.fired == {fault: 1}
    assert first.error.startswith(f"{endpoint}: ")
    assert not first.paused
    second = export(waxell, *left(first, run))
    assert first.acknowledged | second.acknowledged == ids(run)
    assert not first.acknowledged & second.acknowledged
    assert second.error == ""
    assert the_run(server).order == SEQUENCE
    assert len(the_run(server).spans) == 2


def test_a_reply_torn_after_the_status_line_counts_as_taken(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    """Given calls that the server took, when its reply breaks off, then they are not sent twice."""
    run = batch()
    server.mode("reset", endpoint="llm-calls", processed=True)
    assert export(waxell, run).acknowledged == ids(run)
    assert the_run(server).order == SEQUENCE


def test_html_instead_of_json_is_no_start(server: FaultyServer, waxell: WaxellExporter) -> None:
    server.mode("invalid_json", endpoint="start", times=1)
    run = batch()
    outcome = export(waxell, run)
    assert (outcome.acknowledged, outcome.paused) == (set(), "")
    assert outcome.error == "start: 200 with a web page"
    assert export(waxell, run).acknowledged == ids(run)


def test_one_failing_run_does_not_hold_up_the_others(server: FaultyServer, waxell: WaxellExporter) -> None:
    runs = [batch(f"r{number}") for number in range(20)]
    sick = batch("sick", started("sick"), call("sick", model="crashes-the-server"), ended("sick"))
    server.mode("500", marker="crashes-the-server")
    for _ in range(3):
        outcome = export(waxell, sick, *runs)
        assert outcome.error == "llm-calls: 500"
        (sick, *runs) = left(outcome, sick, *runs)
    assert [run.records for run in runs] == [[]] * 20
    assert {record.id for record in sick.records} == {"sick.call0", "sick.end"}
    server.mode("healthy")
    assert export(waxell, sick).acknowledged == {"sick.call0", "sick.end"}
    assert Counter(run.state for run in server.runs.values()) == {"success": 21}


def test_two_runs_that_break_connections_do_not_starve_the_rest(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    """Given runs in front that look like a dead server, then the others still get through the next time."""
    one = exporter(server.url, parallel=1)
    sick = [batch(f"sick{number}", started(f"sick{number}", inputs={"x": "evil"})) for number in range(2)]
    well = [batch(f"r{number}") for number in range(5)]
    server.mode("reset", marker="evil", where="request")
    first = export(one, *sick, *well)
    assert first.acknowledged == set(), "two broken connections in a row: the rest was not tried"
    second = export(one, *left(first, *sick, *well))
    one.close()
    assert second.acknowledged == ids(*well)


@pytest.mark.parametrize("status", ["401", "402", "403", "404", "405", "302"])
def test_a_refusal_of_the_start_pauses_the_destination(
    server: FaultyServer, waxell: WaxellExporter, status: str
) -> None:
    runs = [batch(f"r{number}") for number in range(30)]
    server.mode(status, endpoint="start")
    outcome = export(waxell, *runs)
    assert outcome.paused == f"start: {status}"
    assert (outcome.acknowledged, outcome.rejected) == (set(), {})
    assert server.fired[status] <= 8, "one attempt of each thread at most"
    server.mode("healthy")
    assert export(waxell, *runs).acknowledged == ids(*runs)


def test_a_run_that_the_server_has_forgotten_is_started_again(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    state = RunState(started())
    export(waxell, RunBatch(state, [state.started]))
    server.forget_runs()
    outcome = export(waxell, RunBatch(state, [call(), ended()]))
    assert outcome.acknowledged == {"r.call0", "r.end"}
    assert outcome.error == ""
    assert the_run(server).order == ["start", "llm-calls", "spans", "complete"]
    assert state.remote_id == the_run(server).run_id


def test_a_run_that_is_started_again_does_not_repeat_what_was_taken(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    """Given a server that loses the run in between, then the calls that it took are not sent again."""
    run = batch()
    server.mode("404", endpoint="steps", times=1)
    assert export(waxell, run).acknowledged == ids(run)
    first, second = server.runs.values()
    assert first.order == ["start", "llm-calls"]
    assert second.order == ["start", "steps", "spans", "complete"]
    assert [span["kind"] for span in second.spans] == ["llm", "agent"]


def test_a_server_that_forgets_at_once_is_not_asked_forever(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    server.mode("404", endpoint="llm-calls")
    run = batch()
    outcome = export(waxell, run)
    assert outcome.acknowledged == {"r.start"}
    assert (outcome.error, outcome.paused) == ("llm-calls: 404", "")
    assert server.count("start") == 2
    server.mode("healthy")
    assert export(waxell, *left(outcome, run)).acknowledged == ids(run) - {"r.start"}


@pytest.mark.parametrize("status", [400, 413, 422])
def test_the_poison_is_found_among_a_hundred_calls(
    server: FaultyServer, waxell: WaxellExporter, status: int
) -> None:
    calls = [call(number=number, model="poison" if number == 63 else "gpt-4o") for number in range(100)]
    run = batch("r", started(), *calls, ended())
    server.mode("reject", marker="poison", endpoint="llm-calls", status=status)
    outcome = export(waxell, run)
    assert outcome.rejected == {"r.call63": f"llm-calls: {status}"}
    assert outcome.acknowledged == ids(run) - {"r.call63"}
    assert (outcome.error, outcome.paused) == ("", "")
    assert len(the_run(server).calls) == 99
    assert len(the_run(server).spans) == 100
    assert the_run(server).state == "success"


def test_a_poisonous_step_does_not_cost_the_others(server: FaultyServer, waxell: WaxellExporter) -> None:
    steps = [step(number=number, output="poison" if number == 2 else "x") for number in range(5)]
    server.mode("reject", marker="poison", endpoint="steps")
    outcome = export(waxell, batch("r", started(), *steps, ended()))
    assert outcome.rejected == {"r.step2": "steps: 422"}
    assert [one["position"] for one in the_run(server).steps] == [0, 1, 3, 4]


def test_a_poisonous_input_costs_the_inputs_and_not_the_calls(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    run = batch("r", started(inputs={"q": "poison"}, metadata={"m": "poison"}), call(), ended())
    server.mode("reject", marker="poison")
    outcome = export(waxell, run)
    assert outcome.rejected == {"r.start": "start: 422, started without inputs and metadata"}
    assert outcome.acknowledged == {"r.call0", "r.end"}
    assert the_run(server).start["metadata"]["waxell"]["run_id"] == "r"


def test_a_poisonous_result_costs_the_result_and_not_the_end(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    run = batch("r", started(), ended(state="error", error_message="poison", result="poison"))
    server.mode("reject", marker="poison", endpoint="complete")
    outcome = export(waxell, run)
    assert outcome.rejected == {"r.end": "complete: 422, completed without result and error"}
    assert the_run(server).state == "error"


def test_a_run_that_cannot_be_started_goes_to_quarantine_whole(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    run, other = batch("r", started(agent_name="poison"), call(), ended()), batch("other")
    server.mode("reject", marker="poison")
    outcome = export(waxell, run, other)
    assert outcome.rejected == dict.fromkeys(ids(run), "start: 422")
    assert outcome.acknowledged == ids(other)


@pytest.mark.parametrize("endpoint", ["start", "llm-calls", "complete"])
def test_five_refusals_in_a_row_are_the_servers_fault(
    server: FaultyServer, waxell: WaxellExporter, endpoint: str
) -> None:
    """Given a server that refuses every body, then it pauses and nothing is thrown away."""
    runs = [batch(f"r{number}") for number in range(12)]
    server.mode("422", endpoint=endpoint)
    outcome = export(waxell, *runs)
    assert outcome.paused == f"{endpoint}: 422, 5 times in a row"
    assert outcome.rejected == {}
    server.mode("healthy")
    assert outcome.acknowledged | export(waxell, *left(outcome, *runs)).acknowledged == ids(*runs)


def test_refusals_in_a_row_are_counted_over_exports(server: FaultyServer, waxell: WaxellExporter) -> None:
    server.mode("422", endpoint="llm-calls")
    outcomes = [export(waxell, batch(f"r{number}")) for number in range(5)]
    assert [bool(outcome.paused) for outcome in outcomes] == [False] * 4 + [True]
    assert "r4.call0" not in outcomes[4].rejected


def test_six_poisonous_neighbours_are_no_reason_to_pause(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    calls = [call(number=number, model="poison" if number < 6 else "gpt-4o") for number in range(20)]
    server.mode("reject", marker="poison", endpoint="llm-calls")
    outcome = export(waxell, batch("r", started(), *calls))
    assert outcome.rejected.keys() == {f"r.call{number}" for number in range(6)}
    assert not outcome.paused
    assert len(the_run(server).calls) == 14


def test_spans_wait_for_the_end_of_their_run(server: FaultyServer, waxell: WaxellExporter) -> None:
    """Given spans that could not be sent in mid-run, then nothing needs a retry, and they go with the end."""
    state = RunState(started())
    server.mode("503", endpoint="spans", times=1)
    outcome = export(waxell, RunBatch(state, [state.started, call()]))
    assert (outcome.acknowledged, outcome.error) == ({"r.start", "r.call0"}, "")
    export(waxell, RunBatch(state, [ended()]))
    assert [span["position"] for span in the_run(server).spans] == [1, 0]
    assert waxell.spans_dropped == 0


def test_spans_that_a_healthy_server_cannot_take_do_not_keep_a_run_open(
    server: FaultyServer, waxell: WaxellExporter
) -> None:
    run = batch()
    server.mode("500", endpoint="spans")
    for _ in range(2):
        outcome = export(waxell, run)
        assert outcome.error == "spans: 500"
        (run,) = left(outcome, run)
    assert export(waxell, run).acknowledged == {"r.end"}
    assert waxell.spans_dropped == 2
    assert the_run(server).order == ["start", "llm-calls", "steps", "complete"]


def test_content_that_waits_with_spans_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans wait in memory while a server cannot take them: beyond a size, with previews only."""
    monkeypatch.setattr(rest, "CONTENT_WAITING", 2500)
    queue = rest.SpanQueue()
    large = call(prompt="p" * 600, response="r" * 600, messages=[{"role": "user", "text": "m" * 400}])
    for n in range(4):
        queue.add(f"run-{n % 2}", bodies.llm_span(large, started(), n))
    waiting = [*queue.of("run-0").spans, *queue.of("run-1").spans]
    whole = [
        "full_messages" in span["input_data"] and "full_response" in span["output_data"] for span in waiting
    ]
    assert sorted(whole) == [False, False, True, True]
    assert all(span["input_data"]["prompt_preview"] for span in waiting)
    queue.clear("run-0")
    queue.add("run-0", bodies.llm_span(large, started(), 9))
    assert "full_messages" in queue.of("run-0").spans[0]["input_data"]


def test_an_outage_is_no_reason_to_give_up_spans(server: FaultyServer, waxell: WaxellExporter) -> None:
    run = batch()
    server.mode("503", endpoint="spans")
    for _ in range(6):
        (run,) = left(export(waxell, run), run)
    server.mode("healthy")
    assert export(waxell, run).acknowledged == {"r.end"}
    assert len(the_run(server).spans) == 2
    assert waxell.spans_dropped == 0


@pytest.mark.parametrize("status", ["404", "422"])
def test_a_server_without_spans_gets_the_rest(
    server: FaultyServer, waxell: WaxellExporter, status: str
) -> None:
    run = batch()
    server.mode(status, endpoint="spans")
    assert export(waxell, run).acknowledged == ids(run)
    assert waxell.spans_dropped == 2


def test_governance_is_counted_and_not_enforced(server: FaultyServer, waxell: WaxellExporter) -> None:
    server.governance = {"action": "block", "reason": "no"}
    run = batch()
    assert export(waxell, run).acknowledged == ids(run)
    assert waxell.governance == {"block": 3}


def test_what_json_cannot_say_goes_to_quarantine_alone(server: FaultyServer, waxell: WaxellExporter) -> None:
    odd = call(number=1, metadata={}, error_message="\ud800")
    run = batch("r", started(), call(), odd, call(number=2), ended())
    outcome = export(waxell, run)
    assert outcome.rejected == {"r.call1": "llm-calls: cannot be encoded (UnicodeEncodeError)"}
    assert outcome.acknowledged == ids(run) - {"r.call1"}


def test_the_ids_of_a_server_are_quoted(server: FaultyServer, waxell: WaxellExporter) -> None:
    state = RunState(started(), remote_id="../../evil/?x=#")
    outcome = export(waxell, RunBatch(state, [call()]))
    paths = {request.path for request in server.requests}
    assert "/api/v1/observe/runs/..%2F..%2Fevil%2F%3Fx%3D%23/llm-calls/" in paths
    assert outcome.acknowledged == {"r.call0"}, "an unknown run: started again"
    server.violations.clear()


def test_a_dead_server_costs_one_timeout_and_not_one_per_run(server: FaultyServer) -> None:
    """Given 40 runs and a server that never answers, then the deadline of 1 s is all that is spent."""
    waxell = exporter(server.url)
    export(waxell, batch("first"))
    server.mode("hang")
    begun = time.monotonic()
    outcome = export(waxell, *[batch(f"r{number}") for number in range(40)], timeout_s=1.0)
    waxell.close()
    assert time.monotonic() - begun < 2.5
    assert outcome.acknowledged == set()
    assert outcome.error
    assert server.fired["hang"] <= 8
