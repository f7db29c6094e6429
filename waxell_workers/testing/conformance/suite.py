"""The scenarios that every adapter must play, in every mode that its driver names.

Each is a claim about real processes: the framework's own worker, started by its own command line, a real
broker, the real server. Import them all into a test module, or run this one with `--pyargs`.
"""

from __future__ import annotations

import signal
import statistics
import time
from itertools import pairwise
from typing import Any

import pytest

from .driver import (
    CHILD,
    ENQUEUE,
    HARD_LIMIT,
    RECYCLE,
    REPLACED,
    RETRY,
    SOFT_LIMIT,
    THREADS,
    WAITS,
)
from .faults import FaultyProxy
from .plugin import Cell, Kind
from .stage import RunningWorker

TASKS = 100
FEW = 25
RECYCLED = 12
LIMIT_S = 4
"""A time limit that leaves a busy machine the time for the call that comes first."""
CROWD = 1000
LATE_S = 1.5
FAULTS = {"refuse": {}, "503": {}, "hang": {}, "reset": {"where": "body"}}
FLUSHED = {"globally": ("task", "look_then_ask"), "by its options": ("periodic", "look_then_ask_and_flush")}
PROMISED_RATIO = 1.2
PROMISED_STOP_S = 3.0
ROUNDS = 3
MOST_ROUNDS = 20
NOISE = 0.05
FEWEST, MOST_IN_BATCH, BATCH_S = 5, 40, 1.5
"""Tasks in a batch, so that one takes about as long."""
STOP_TASKS = 8
MOST_STOPS = 3
FLUSH_TASKS = 6
TIMELY_S = 2.0
"""Beside a wait that is bounded, what a task of milliseconds may take on a busy machine."""


def names(prefix: str, count: int) -> list[str]:
    """Return markers that tell calls apart."""
    return [f"{prefix}-{number:04d}" for number in range(count)]


def run_tasks(worker: RunningWorker, markers: list[str], scenario: str = "ask") -> None:
    """Have tasks executed by a worker that has executed nothing since its start."""
    if worker.mode.broker:
        worker.send_many(markers, scenario)
        worker.start()
    else:
        worker.start()
        worker.send_many(markers, scenario)
    worker.wait_done(len(markers))


# -- 1 and 3: every task, whatever the worker's end --------------------------------------------


def test_each_task_is_a_run_with_exactly_its_own_call(cell: Cell) -> None:
    """100 tasks of a worker that is left running: 100 runs, each with its call, none twice."""
    worker, markers = cell.worker(), names("left", TASKS)
    run_tasks(worker, markers)
    runs = cell.await_runs(markers)
    assert {run["status"] for run in runs} == {"success"}
    assert {run["workflow_name"] for run in runs} == {cell.driver.framework}
    assert len({run["task_id"] for run in runs}) == TASKS
    for run in runs:
        metadata = run["metadata"]
        assert metadata["framework"] == cell.driver.framework
        assert metadata["task"].endswith("ask")
        assert metadata["attempt"] == 1
        assert {"task_id", "pid", "host"} <= metadata.keys()


def test_sigterm_after_the_last_task_loses_nothing(cell: Cell) -> None:
    """SIGTERM right after the last task."""
    worker, markers = cell.worker(), names("term", FEW)
    run_tasks(worker, markers)
    worker.terminate()
    cell.await_runs(markers)


def test_a_second_sigterm_loses_nothing(cell: Cell) -> None:
    """SIGTERM, and again while a task is in the middle: what was done arrives, and no run stays open.

    What a second signal does to the task is the framework's business: it may end it, or let it finish.
    """
    worker, markers = cell.worker(), names("twice", FEW)
    run_tasks(worker, markers)
    worker.send("ask_then_sleep", "slow", 6)
    worker.wait_noted("body", FEW + 1)
    worker.signal(signal.SIGTERM)
    try:
        worker.wait_ended(2.0)  # frameworks take two signals within a second for one
    except AssertionError:
        worker.signal(signal.SIGTERM)
    worker.wait_ended()
    cell.after_kill(worker)
    cell.await_runs([*markers, "slow"])


def test_sigkill_of_the_whole_tree_loses_nothing(cell: Cell) -> None:
    """SIGKILL of every process of the worker right after the last task."""
    worker, markers = cell.worker(), names("kill", FEW)
    run_tasks(worker, markers)
    worker.kill_tree()
    cell.after_kill(worker)
    runs = cell.await_runs(markers)
    assert {run["status"] for run in runs} == {"success"}


@pytest.mark.needs(RECYCLE)
def test_recycling_after_every_task_loses_nothing(cell: Cell) -> None:
    """Each process executes one task and is replaced."""
    worker, markers = cell.worker(recycle=True, slots=4), names("recycled", RECYCLED)
    run_tasks(worker, markers)
    runs = cell.await_runs(markers)
    assert len({run["metadata"]["pid"] for run in runs}) == RECYCLED


def test_a_task_that_is_killed_keeps_its_call(cell: Cell) -> None:
    """A process SIGKILLed in mid-task: its run is `killed`, with its call and a reason."""
    worker = cell.worker()
    worker.start()
    worker.send("ask_then_die", "dying")
    lives_on = cell.can(CHILD) or cell.can(REPLACED)
    if not lives_on:
        worker.wait_ended()
        cell.after_kill(worker)
    run = cell.await_run("dying")
    assert run["status"] == "killed"
    why = "signal 9, probably out of memory" if cell.can(CHILD) else "the process died without a word"
    assert run["reason"] == f"killed: {why}"
    if lives_on:
        worker.send("ask", "survivor")
        assert cell.await_run("survivor")["status"] == "success"


@pytest.mark.needs(SOFT_LIMIT)
def test_a_soft_time_limit_is_an_error_with_its_call(cell: Cell) -> None:
    """A time limit that raises in the task: the exception is the framework's, the run has call and type."""
    worker = cell.worker()
    worker.start()
    worker.send("ask_then_sleep", "slow", 30, soft_limit_s=LIMIT_S)
    run = cell.await_run("slow")
    assert run["status"] == "error"
    assert cell.driver.soft_limit_error in run["error"]


@pytest.mark.needs(HARD_LIMIT)
def test_a_hard_time_limit_leaves_a_killed_run(cell: Cell) -> None:
    """A time limit that kills the process: the run is `killed`, with its call and the reason."""
    worker = cell.worker()
    worker.start()
    worker.send("ask_then_sleep", "slow", 60, hard_limit_s=LIMIT_S)
    run = cell.await_run("slow")
    assert run["status"] == "killed"
    assert run["reason"] == f"killed: hard time limit of {LIMIT_S} s"


# -- 2: what became of a task ------------------------------------------------------------------


@pytest.mark.quick
def test_every_outcome_has_its_state(cell: Cell) -> None:
    """Success, failure, control flow: the run says what happened; the framework says what it always says."""
    worker = cell.worker()
    worker.start()
    failed = worker.send("fail", "failing")
    controlled = {name: worker.send("control", f"control-{name}", name) for name in cell.driver.controls}
    worker.send("ask", "asking")
    assert cell.await_run("asking")["status"] == "success"
    run = cell.await_run("failing")
    assert run["status"] == "error"
    assert run["error"].startswith("ValueError: the answer has")
    assert "in fail" in run["traceback"]
    assert "raise ValueError" not in run["traceback"], "source lines are content"
    assert run["inputs"] == "{}", "arguments are content"
    assert cell.driver.outcome(worker, failed) == cell.driver.failed
    for name, expected in cell.driver.controls.items():
        run = cell.await_run(f"control-{name}")
        assert run["status"] == expected.state, name
        assert run["reason"].startswith(expected.reason), name
        assert expected.state == "error" or run["reason"], f"{name}: no word of why"
        assert cell.driver.outcome(worker, controlled[name]) == expected.outcome


@pytest.mark.needs(RETRY)
def test_retries_are_runs_of_one_task(cell: Cell) -> None:
    """Each attempt is a run of its own, with its number, its call and the task's id."""
    worker = cell.worker()
    worker.start()
    worker.send("flaky", "in the end", 3, 3)
    worker.send("flaky", "never", 9, 3)
    for marker, last in (("in the end", "success"), ("never", "error")):
        runs = cell.await_runs([marker], runs_each=3)
        states = {run["metadata"]["attempt"]: run["status"] for run in runs}
        assert states == {1: "retry", 2: "retry", 3: last}
        assert len({run["task_id"] for run in runs}) == 1
        failures = {run["metadata"]["attempt"]: run["error"] for run in runs if run["status"] != "success"}
        for attempt, error in failures.items():
            assert error == f"ConnectionError: attempt {attempt} failed"
        _one_story(cell, runs, last)


def _one_story(cell: Cell, runs: list[dict[str, Any]], last: str) -> None:
    """The attempts are one group at the server: each knows the one before; what failed has its price."""
    attempts = sorted(runs, key=lambda run: run["metadata"]["attempt"])
    ids = [run["run_id"] for run in attempts]
    assert [run["metadata"].get("previous_run_id") for run in attempts] == [None, *ids[:-1]]
    assert {run["parent"] for run in attempts} == {""}, "an attempt is no child of the one before"
    assert {run["root"] for run in attempts} == {ids[0]}
    assert len({run["trace"] for run in attempts}) == 1
    assert all(run["reason"].startswith("retry: ") for run in attempts[:-1])
    group = cell.server.get(f"/api/tasks/{attempts[0]['task_id']}")
    assert [(run["run_id"], run["attempt"], run["delivery"]) for run in group["runs"]] == [
        (run_id, number, 1) for number, run_id in enumerate(ids, 1)
    ]
    assert group["final_state"] == last
    failed = 2 if last == "success" else 3
    assert (group["calls"], group["failed"]["calls"]) == (3, failed)
    assert group["failed"]["tokens_in"] * 3 == group["tokens_in"] * failed, "each attempt asks the same"


# -- 4: a sick server --------------------------------------------------------------------------


@pytest.mark.timed
def test_tasks_do_not_notice_a_sick_server(cell: Cell) -> None:
    """Tasks take at most 1.2 x as long (paired medians), whatever the fault; and all arrives afterwards."""
    with FaultyProxy(cell.server.url) as faulty:
        worker = cell.worker(slots=1, WAXELL_API_URL=faulty.url, WAXELL_FLUSH_INTERVAL="0.5")
        worker.start()
        pairs = Pairs(worker)
        for fault in FAULTS:
            faulty.mode("healthy")
            cell.await_calls(pairs.markers)  # the shipper does not wait any more for what was before
            ratio = statistics.median(pairs.ratios(faulty, fault))
            assert ratio <= PROMISED_RATIO, (fault, pairs.measured)
        faulty.mode("healthy")
        cell.await_runs(pairs.markers)


class Pairs:
    """Batches of tasks in the only slot of a worker, in pairs: a sick server, a healthy one."""

    def __init__(self, worker: RunningWorker) -> None:
        self.markers: list[str] = []
        self.measured: dict[str, list[float]] = {}
        self._worker = worker
        self._size = FEWEST
        warm = [self._median_cycle_s("warm", number) for number in range(2)]
        self._size = max(FEWEST, min(MOST_IN_BATCH, int(BATCH_S / warm[1])))

    def ratios(self, faulty: FaultyProxy, fault: str) -> list[float]:
        """Measure how much longer tasks take; machines are noisy: where few pairs say no, more are asked."""
        ratios = self.measured[fault] = []
        while len(ratios) < ROUNDS or (
            len(ratios) < MOST_ROUNDS and statistics.median(ratios) > PROMISED_RATIO - NOISE
        ):
            times = {}
            for mode in ("healthy", fault) if len(ratios) % 2 else (fault, "healthy"):
                faulty.mode(mode, **FAULTS.get(mode, {}))
                if mode not in ("healthy", "refuse"):
                    self._wait_until_it_fires(faulty, mode, len(ratios))
                times[mode] = self._median_cycle_s(f"{fault}-{mode}", len(ratios))
            ratios.append(times[fault] / times["healthy"])
        return ratios

    def _wait_until_it_fires(self, faulty: FaultyProxy, fault: str, number: int) -> None:
        """Have something to deliver, and wait until that meets the fault: the shipper may be pausing."""
        fired, bait = faulty.fired[fault], f"bait-{fault}-{number}"
        self._worker.send_many([bait])
        self.markers.append(bait)
        self._worker.wait(lambda: faulty.fired[fault] > fired, "request that meets the fault")
        self._worker.wait_done(len(self.markers))

    def _median_cycle_s(self, name: str, number: int) -> float:
        """Have a batch executed; return the median time from one task's beginning to the next one's."""
        batch = names(f"{name}-{number}", self._size)
        self._worker.send_many(batch)
        self.markers += batch
        self._worker.wait_done(len(self.markers))
        moments = [note.at for note in self._worker.notes("began") if note.marker in batch]
        return statistics.median(after - earlier for earlier, after in pairwise(moments))


@pytest.mark.timed
@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_stops_in_time_though_the_server_is_sick(
    cell: Cell, fault: str, own_stops_s: dict[Kind, float]
) -> None:
    """The stop takes at most 3 s more than the worker's own, and all arrives once the server is healthy.

    Noise only adds, so that the quickest of a few counts, for either.
    """
    later_by: list[float] = []
    with FaultyProxy(cell.server.url) as faulty:
        while not later_by or (min(later_by) > PROMISED_STOP_S and len(later_by) < MOST_STOPS):
            if later_by or cell.kind not in own_stops_s:
                off = cell.worker(WAXELL_OBSERVE="false")
                run_tasks(off, names("off", STOP_TASKS))
                own_stops_s[cell.kind] = off.terminate()
            faulty.mode(fault, **FAULTS[fault])
            worker, markers = cell.worker(WAXELL_API_URL=faulty.url), names(f"{len(later_by)}", STOP_TASKS)
            run_tasks(worker, markers)
            later_by.append(worker.terminate() - own_stops_s[cell.kind])
            assert not set(markers) & set(cell.server.calls()), "the fault did not fire"
            faulty.mode("healthy")
            cell.after_kill(worker)
            cell.await_runs(markers)
    assert min(later_by) <= PROMISED_STOP_S, later_by


# -- 5: a flush for each task ------------------------------------------------------------------


def test_without_a_flush_a_task_finds_nothing_at_the_server(cell: Cell) -> None:
    """Under `periodic`, with an interval of an hour: so that the next two claims can fail."""
    worker = cell.worker(slots=1, WAXELL_FLUSH_INTERVAL="3600")
    run_tasks(worker, names("unflushed", FLUSH_TASKS), "look_then_ask")
    assert [note.marker for note in worker.notes("saw")] == ["0"] * FLUSH_TASKS


@pytest.mark.parametrize("where", FLUSHED)
def test_a_flushed_task_is_at_the_server_before_the_next_begins(cell: Cell, where: str) -> None:
    """With one slot, the k-th task finds k ended runs there."""
    policy, scenario = FLUSHED[where]
    worker = cell.worker(
        slots=1, WAXELL_FLUSH=policy, WAXELL_FLUSH_INTERVAL="3600", WAXELL_FLUSH_TIMEOUT="20"
    )
    run_tasks(worker, names("flushed", FLUSH_TASKS), scenario)
    assert [note.marker for note in worker.notes("saw")] == [str(number) for number in range(FLUSH_TASKS)]
    cell.await_runs(names("flushed", FLUSH_TASKS))


@pytest.mark.timed
def test_a_flush_is_bounded_when_the_server_hangs(cell: Cell) -> None:
    """A task waits no longer than `flush_timeout`, and all arrives later."""
    with FaultyProxy(cell.server.url) as faulty:
        faulty.mode("hang")
        worker = cell.worker(
            slots=1, WAXELL_API_URL=faulty.url, WAXELL_FLUSH="task", WAXELL_FLUSH_TIMEOUT="1"
        )
        markers = names("patient", FLUSH_TASKS)
        run_tasks(worker, markers)
        moments = [note.at for note in worker.notes("began")]
        cycles = [after - earlier for earlier, after in pairwise(moments)]
        assert statistics.median(cycles) >= 0.9, "nothing was waited for"
        assert statistics.median(cycles) <= 1 + TIMELY_S
        assert faulty.fired["hang"] > 0, "the fault did not fire"
        faulty.mode("healthy")
        cell.await_runs(markers)


@pytest.mark.needs(SOFT_LIMIT)
def test_a_flush_never_outlasts_the_framework_s_own_limit(cell: Cell) -> None:
    """A task with a time limit is not failed or killed by the flush after it, whatever `flush_timeout` is."""
    limits = {"soft_limit_s": 5.0}
    if cell.can(HARD_LIMIT):
        limits["hard_limit_s"] = 6.0
    with FaultyProxy(cell.server.url) as faulty:
        faulty.mode("hang")
        worker = cell.worker(
            slots=1, WAXELL_API_URL=faulty.url, WAXELL_FLUSH="task", WAXELL_FLUSH_TIMEOUT="12"
        )
        worker.start()
        handles = [worker.send("ask", marker, **limits) for marker in ("limited", "after")]
        worker.wait_done(2)
        assert faulty.fired["hang"] > 0, "the fault did not fire"
        faulty.mode("healthy")
        assert {run["status"] for run in cell.await_runs(["limited", "after"])} == {"success"}
        unhindered = worker.send("ask", "unhindered")
        worker.wait_done(3)
        outcomes = {cell.driver.outcome(worker, handle) for handle in [*handles, unhindered]}
        assert len(outcomes) == 1, outcomes


# -- 6: many at once ---------------------------------------------------------------------------


@pytest.mark.needs(THREADS)
def test_a_thousand_tasks_at_once_keep_their_calls_apart(cell: Cell) -> None:
    """1,000 tasks over 8 threads or greenlets: no call in a wrong run, no context left in a pool's thread."""
    worker, markers = cell.worker(slots=8), names("crowd", CROWD)
    run_tasks(worker, markers)
    runs = cell.await_runs(markers)
    assert {run["parent"] for run in runs} == {""}, "a context was left behind"
    assert len({run["root"] for run in runs}) == CROWD


# -- 7: tasks that enqueue tasks ---------------------------------------------------------------


@pytest.mark.needs(ENQUEUE)
def test_a_task_that_another_enqueues_is_its_child(cell: Cell) -> None:
    """Parent, root and trace connect; the wait in the queue is known."""
    worker = cell.worker()
    worker.start()
    worker.send("enqueue", "parent", "child")
    child, parent = cell.await_run("child"), cell.await_run("parent")
    assert child["parent"] == parent["run_id"]
    assert child["root"] == parent["root"] == parent["run_id"]
    assert child["trace"] == parent["trace"]
    assert child["metadata"]["wait_s"] >= 0
    tree = cell.server.get(f"/api/runs/{child['run_id']}/tree")
    (root,) = tree["tree"]
    assert root["run_id"] == parent["run_id"]
    assert [node["run_id"] for node in root["children"]] == [child["run_id"]]
    assert (root["subtotal"]["runs"], root["subtotal"]["calls"]) == (2, 2)


@pytest.mark.needs(ENQUEUE)
def test_for_whom_a_task_works_travels_to_its_children(cell: Cell) -> None:
    """Session, user, tag and metadata of a context are those of what is enqueued in it."""
    worker = cell.worker()
    worker.start()
    worker.send("enqueue_for", "parent", "child")
    child, parent = cell.await_run("child"), cell.await_run("parent")
    assert (child["session"], child["user"]) == ("s-parent", "u-parent")
    assert child["tags"] == {"tenant": "acme"}
    assert child["metadata"]["plan"] == "gold"
    assert (parent["session"], parent["user"], parent["tags"]) == ("", "", {})
    assert child["root"] == parent["run_id"]


@pytest.mark.needs(ENQUEUE)
@pytest.mark.parametrize("mode", ["link", "none"])
def test_a_task_can_be_connected_by_less(cell: Cell, mode: str) -> None:
    """With `propagate`, a task begins a trace of its own, which names the other one, or does not."""
    worker = cell.worker(WAXELL_PROPAGATE=mode)
    worker.start()
    worker.send("enqueue_for", "parent", "child")
    child, parent = cell.await_run("child"), cell.await_run("parent")
    assert (child["parent"], child["root"]) == ("", child["run_id"])
    assert child["trace"] != parent["trace"]
    linked = child["metadata"].get("linked_trace_id")
    assert (linked, child["session"]) == ((parent["trace"], "s-parent") if mode == "link" else (None, ""))
    assert child["metadata"]["wait_s"] >= 0


@pytest.mark.needs(WAITS)
def test_how_long_a_task_has_waited_is_known(cell: Cell) -> None:
    """A task that is enqueued before its worker has started has waited for that."""
    worker = cell.worker()
    worker.send("ask", "waiting")
    time.sleep(LATE_S)
    worker.start()
    run = cell.await_run("waiting")
    assert run["metadata"]["wait_s"] >= LATE_S
    assert run["metadata"]["enqueued_at"] + run["metadata"]["wait_s"] == pytest.approx(run["at"], abs=0.1)
    (queue,) = cell.server.get("/api/queues")
    assert (queue["framework"], queue["runs"]) == (cell.driver.framework, 1)
    assert queue["wait_s"]["max"] == pytest.approx(run["metadata"]["wait_s"])


def test_content_is_recorded_where_it_is_asked_for(cell: Cell) -> None:
    """With `capture_content`, a run has its arguments, and a traceback its source lines."""
    worker = cell.worker(WAXELL_CAPTURE_CONTENT="true")
    worker.start()
    worker.send("fail", "telling")
    run = cell.await_run("telling")
    assert "raise ValueError" in run["traceback"]
    assert "telling" in run["inputs"]


__all__ = [name for name in globals() if name.startswith("test_")]
