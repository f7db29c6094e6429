"""Given a real worker, when a task leads to others, then each run knows whose child it is, all of them are
one trace, and each end says in words what it was."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import uuid
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import pytest
from celery import Celery
from celery.concurrency.base import BasePool
from celery.concurrency.gevent import TaskPool
from celery.signals import before_task_publish

from tests.harness import Worker, await_, children_in, environment, start_server

APP = Path(__file__).parent / "celery_lineage"
PREFORK = ("--pool", "prefork", "--concurrency", "4")
POOLS = {
    "prefork": ("--pool", "prefork", "--concurrency", "1"),
    "threads": ("--pool", "threads", "--concurrency", "2"),
    "gevent": ("--pool", "gevent", "--concurrency", "2"),
    "solo": ("--pool", "solo"),
}
FAMILIES = {
    "one": {"a": ["root"]},
    "by name": {"a": ["root"]},
    "link": {"a": ["root"], "b": ["a"]},
    "chain": {"a": ["root"], "b": ["a"], "c": ["b"]},
    "group": {"a": ["root"], "b": ["root"]},
    "chord": {"a": ["root"], "late": ["root"], "c": ["late"]},
    "chain of groups": {"a": ["root"], "late": ["root"], "c": ["late"], "d": ["late"]},
    "chord in chain": {"a": ["root"], "b": ["a"], "late": ["a"], "d": ["late"]},
    "group of chains": {"a": ["root"], "b": ["a"], "c": ["root"], "d": ["c"]},
    "error": {"fails": ["root"], "errback": ["fails"]},
    "retry": {"flaky": ["root"] * 3, "block": ["flaky"] * 2},
    "replaced": {"replaced": ["root"], "a": ["replaced"]},
    "replaced by chain": {"replaced": ["root"], "a": ["replaced"], "b": ["a"], "c": ["b"]},
    "replaced in chain": {"replaced": ["root"], "a": ["replaced"], "c": ["a"]},
    "eager": {"eager": ["root"], "a": ["eager"], "b": ["eager"]},
    "headers": {"headers": ["root"], "a": ["headers"], "b": ["headers"], "c": ["headers"]},
}
"""By canvas: of each task, the parents of its runs."""
LEFT = 3 if tuple(map(int, version("billiard").split(".")[:2])) >= (4, 3) else 0
"""With which code a process is said to have ended whose task said 3: older ones do not tell."""


class Stage:
    """One worker with its server, and what is sent to it."""

    def __init__(self, worker, server):
        self.worker, self.server = worker, server
        self.client = Celery(broker=worker.broker, set_as_current=False)

    def send(self, name, *arguments, **options):
        """Enqueue as one who knows nothing of us, though another test has imported the adapter; return the
        task's id."""
        with patch.object(before_task_publish, "receivers", []):
            return self.client.send_task(name, arguments, queue=self.worker.queue, **options).id

    def runs_of(self, task_id, count=1):
        """Wait for the runs of one task to end; return them in order."""

        def ended():
            found = [run for run in self.server.runs() if run["task_id"] == task_id]
            return len(found) >= count and all(run["status"] != "running" for run in found) and found

        return sorted(await_(ended, f"{count} ended runs of the task"), key=lambda run: run["at"])

    def trace_of(self, kind, count):
        """Send a canvas; return the runs of its trace once there are so many, and all have ended."""
        trace = self.runs_of(self.send("root", kind))[0]["trace"]

        def ended():
            found = [run for run in self.server.runs() if run["trace"] == trace]
            return len(found) >= count and all(run["status"] != "running" for run in found) and found

        return sorted(await_(ended, f"{count} ended runs of the trace"), key=lambda run: run["at"])


def make_stage(valkey, server, directory, *arguments, **settings):
    worker = Worker(valkey, "http://127.0.0.1:9", server.url, directory, app=APP)
    worker.settings = {"QUEUE": worker.queue, "WITNESS": str(directory / "witness")} | settings
    worker.start(*arguments)
    return Stage(worker, server)


@pytest.fixture(scope="module")
def stage(valkey, tmp_path_factory):
    """A worker for all tests that leave it as it is."""
    directory = tmp_path_factory.mktemp("lineage")
    with children_in(directory / "children") as children:
        stage = make_stage(valkey, start_server(children, directory), directory, *PREFORK)
        yield stage
        stage.worker.stop()


@pytest.fixture
def make(valkey, server, tmp_path):
    """Make a stage of one's own."""
    made = []

    def make(*arguments, **settings):
        made.append(make_stage(valkey, server, tmp_path, *arguments, **settings))
        return made[-1]

    yield make
    for stage in made:
        stage.worker.stop()


def family(runs):
    """Return the parents' names of each name."""
    names = {run["run_id"]: run["agent_name"] for run in runs}
    found = {}
    for run in runs:
        found.setdefault(run["agent_name"], []).append(names.get(run["parent"], run["parent"]))
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_run_has_the_parent_that_has_enqueued_it(stage, kind):
    """Whatever the canvas: one trace, one root, and what was set on the root goes on to every run."""
    expected = FAMILIES[kind]
    runs = stage.trace_of(kind, 1 + sum(map(len, expected.values())))
    assert family(runs) == {"root": [""], **expected}
    [root] = {run["root"] for run in runs}
    assert root == next(run["run_id"] for run in runs if run["agent_name"] == "root")
    assert all(run["tags"]["customer"] == "acme" for run in runs)


def test_an_errback_that_celery_calls_is_part_of_the_failed_run(stage):
    """It has no message, and no run of its own."""
    runs = {run["agent_name"]: run for run in stage.trace_of("error", 3)}
    assert runs["fails"]["tags"]["called"] == "ValueError"
    assert (runs["fails"]["status"], runs["fails"]["reason"]) == ("error", "")


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("lost", "dies", "killed: signal 9, probably out of memory"),
        ("late", "hangs", "killed: hard time limit of 1 s"),
    ],
)
def test_the_errback_of_a_killed_task_is_part_of_its_story(stage, kind, name, reason):
    """The main process sends it, which does not know the run: it tells the task, and keeps the trace."""
    runs = stage.trace_of(kind, 3)
    by_name = {run["agent_name"]: run for run in runs}
    lost, errback, root = by_name[name], by_name["errback"], by_name["root"]
    assert (lost["status"], lost["reason"]) == ("killed", reason)
    assert (errback["parent"], errback["root"]) == ("", root["run_id"])
    assert errback["metadata"]["parent_task_id"] == lost["task_id"]
    assert errback["tags"]["customer"] == "acme"


def test_the_attempts_of_a_task_are_siblings_that_know_each_other(stage):
    """A retry keeps its parent, names the attempt before, waits from when it was due, and has its headers."""
    runs = [run for run in stage.trace_of("retry", 6) if run["agent_name"] == "flaky"]
    assert len({run["task_id"] for run in runs}) == 1
    assert [run["metadata"]["attempt"] for run in runs] == [1, 2, 3]
    previous = [run["metadata"].get("previous_run_id") for run in runs]
    assert previous == [None, runs[0]["run_id"], runs[1]["run_id"]]
    assert [(run["status"], run["reason"]) for run in runs] == [
        ("retry", "retry: attempt 2 of 4 in 0.2 s"),
        ("retry", "retry: attempt 3 of 4 in 0.2 s"),
        ("success", ""),
    ]
    assert all(run["tags"]["theirs"] == {"kept": True} for run in runs)
    assert ["eta" in run["metadata"] for run in runs] == [False, True, True]
    for run in runs[1:]:
        assert run["metadata"]["eta"] > run["metadata"]["enqueued_at"]
        assert run["metadata"]["wait_s"] < run["metadata"]["eta"] - runs[0]["metadata"]["enqueued_at"] + 30


def test_attempts_of_a_task_that_nobody_has_told_us_of_are_one_story(stage):
    """It was enqueued without us: its first attempt is the root of them all."""
    runs = stage.runs_of(stage.send("flaky"), 3)
    assert {run["parent"] for run in runs} == {""}
    assert {(run["root"], run["trace"]) for run in runs} == {(runs[0]["run_id"], runs[0]["trace"])}
    assert "wait_s" not in runs[0]["metadata"]
    assert runs[1]["metadata"]["previous_run_id"] == runs[0]["run_id"]


def test_a_replaced_task_says_by_what(stage):
    """It is `ignored`, since it has no result; what has taken its place has its task id."""
    for kind, count in (("replaced", 3), ("replaced by group", 5)):
        runs = {run["agent_name"]: run for run in stage.trace_of(kind, count)}
        assert (runs["replaced"]["status"], runs["replaced"]["reason"]) == (
            "ignored",
            "ignored: replaced by a",
        )
        assert runs["a"]["parent"] == runs["replaced"]["run_id"]
        assert runs["a"]["metadata"]["replaced"] == 1
        last = runs["a" if kind == "replaced" else "celery.accumulate"]
        assert last["task_id"] == runs["replaced"]["task_id"]


def test_the_body_of_a_chord_waits_from_when_the_last_task_has_ended(stage):
    """Not from when the chord was sent; Celery's own `parent_id` names the same task."""
    runs = {run["agent_name"]: run for run in stage.trace_of("chord", 4)}
    body, late = runs["c"]["metadata"], runs["late"]["metadata"]
    assert body["parent_task_id"] == late["task_id"]
    assert body["enqueued_at"] > late["enqueued_at"] + late["wait_s"] + 0.9
    assert late["group_id"] == runs["a"]["metadata"]["group_id"]


def test_the_user_s_headers_stay_the_user_s(stage):
    """They arrive, their dict is as it was, and ours that were copied with them count for nothing."""
    runs = {run["agent_name"]: run for run in stage.trace_of("headers", 5)}
    assert runs["headers"]["tags"]["unchanged"] is True
    assert runs["a"]["tags"]["theirs"] == runs["b"]["tags"]["theirs"] == {"kept": True}


@pytest.mark.parametrize(("kind", "child"), [("linked", "c"), ("alone", "d")])
def test_a_task_can_be_linked_or_left_alone(stage, kind, child):
    """`link`: a trace of its own that names the enqueuing run, and whom it is for. `none`: nothing at all."""
    root = stage.runs_of(stage.send("root", kind))[0]
    [run] = await_(
        lambda: [run for run in stage.server.ended() if run["agent_name"] == kind], f"the run that is {kind}"
    )
    [below] = await_(
        lambda: [found for found in stage.server.ended() if found["parent"] == run["run_id"]], "its child"
    )
    assert (run["parent"], run["root"], below["agent_name"]) == ("", run["run_id"], child)
    assert run["trace"] == below["trace"] != root["trace"]
    link = [run["metadata"].get(key) for key in ("linked_run_id", "linked_trace_id", "parent_task_id")]
    if kind == "linked":
        assert (link, run["tags"]) == ([root["run_id"], root["trace"], None], {"customer": "acme"})
    else:
        assert (link, run["tags"]) == ([None, None, None], {})
    assert run["metadata"]["wait_s"] >= 0


def test_a_whole_worker_can_be_unconnected(make):
    """`WAXELL_PROPAGATE=none`: each run is a root, and still knows how long it has waited."""
    stage = make(*PREFORK, WAXELL_PROPAGATE="none")
    stage.send("root", "chain")
    runs = await_(lambda: len(stage.server.ended()) == 4 and stage.server.runs(), "four ended runs")
    assert {run["parent"] for run in runs} == {""}
    assert len({run["trace"] for run in runs}) == 4
    assert sum("wait_s" in run["metadata"] for run in runs) == 3


def test_protocol_1_tells_the_same(make):
    """Celery's older messages have the id in their body."""
    stage = make(*PREFORK, PROTOCOL="1")
    runs = stage.trace_of("retry", 6)
    assert family(runs) == {"root": [""], **FAMILIES["retry"]}
    assert family(stage.trace_of("link", 3)) == {"root": [""], **FAMILIES["link"]}


def test_beat_is_no_parent(make, tmp_path):
    """`worker -B`: what beat sends is a root, names its entry, of two that send the same task, has its
    headers, and its wait is known."""
    stage = make("--pool", "prefork", "--concurrency", "1", "-B", "-s", str(tmp_path / "schedule"))
    runs = await_(lambda: len(stage.server.ended()) >= 6 and stage.server.ended(), "six ticks")
    assert {run["tags"]["schedule"] for run in runs} == {"every 1 s", "every 1.5 s"}
    for run in runs:
        assert (run["agent_name"], run["parent"], run["root"]) == ("ticking", "", run["run_id"])
        assert run["metadata"]["schedule"] == run["tags"]["schedule"]
        assert run["tags"]["theirs"] == "kept"
        assert run["metadata"]["wait_s"] >= 0


def spans(when):
    """Run the program with OpenTelemetry's Celery instrumentation; return what it prints."""
    settings = environment(WAXELL_API_URL="http://127.0.0.1:9")
    command = [sys.executable, "-W", "ignore", str(APP / "spans.py"), when]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_opentelemetry_s_own_instrumentation_sees_what_it_saw_before():
    """With us, imported before it or after, each of its spans has the parent that it has without us; and each
    of our runs is in the trace of the span that is around its task."""
    pytest.importorskip("opentelemetry.instrumentation.celery")
    expected = spans("none")
    for when in ("before", "after"):
        found = spans(when)
        assert found["parents"] == expected["parents"], when
        assert found["runs"] == found["executed"], when
        assert len(found["runs"]) == 12


# -- ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "options", "status", "reason"),
    [
        ("dies", (), {}, "killed", "killed: signal 9, probably out of memory"),
        ("dies", (signal.SIGSEGV,), {}, "killed", "killed: signal 11 (SIGSEGV), a crash in native code"),
        ("exits", (3,), {}, "killed", "killed: the process ended with exit code 3"),
        ("leaves", (3,), {}, "killed", f"killed: the process ended with exit code {LEFT}"),
        ("hangs", (), {"time_limit": 1}, "killed", "killed: hard time limit of 1 s"),
        ("hangs", (), {"soft_time_limit": 1}, "error", "error: soft time limit of 1 s"),
        ("rejects", (False,), {}, "rejected", "rejected, dropped"),
        ("nobody.knows", (), {}, "rejected", "rejected: no task of this name in this worker"),
    ],
)
def test_an_end_says_why(stage, name, arguments, options, status, reason):
    """In words for people; nobody has told us of the task before."""
    [run] = stage.runs_of(stage.send(name, *arguments, **options))
    assert (run["status"], run["reason"]) == (status, reason)
    assert (run["agent_name"], run["metadata"]["attempt"]) == (name, 1)
    assert run["metadata"]["queue"] == stage.worker.queue
    assert run["metadata"]["worker"] == f"{stage.worker.queue}@test"


def test_a_message_that_is_requeued_has_a_run_for_each_delivery(stage):
    """The first says that it comes back, the second that it does not."""
    runs = stage.runs_of(stage.send("rejects", True), 2)
    assert [run["reason"] for run in runs] == ["rejected, requeued", "rejected, dropped"]
    assert runs[1]["metadata"]["redelivered"] is True


def test_each_death_of_a_task_is_told(stage, tmp_path):
    """A task that is killed once is redelivered under its id; its second run is not told to be lost, too."""
    runs = stage.runs_of(stage.send("dies_once", str(tmp_path / "died")), 2)
    assert [run["status"] for run in runs] == ["killed", "success"]


@pytest.mark.parametrize("pool", POOLS)
def test_what_has_never_begun_is_told(make, pool):
    """A task that was revoked, or has expired, before it could begin has one run that says so, with its place
    in the story, in every pool."""
    stage = make(*POOLS[pool])
    revoked = str(uuid.uuid4())

    def flagged():
        stage.client.control.revoke(revoked)  # a broadcast: whoever does not listen yet does not hear it
        return f"Tasks flagged as revoked: {revoked}" in stage.worker.text

    await_(flagged, "revocation")
    parent = {
        "waxell": {"enqueued_at": 1.0, "run": "r1", "root": "r0", "trace": "ab" * 16, "tags": {"k": "v"}}
    }
    stage.send("a", task_id=revoked, headers=parent)
    expired = stage.send("b", expires=1e-6, retries=1, headers=parent)
    stage.runs_of(stage.send("c"))
    for task_id, name, reason, attempt in (
        (revoked, "a", "revoked before start", 1),
        (expired, "b", "revoked: expired before start", 2),
    ):
        [run] = stage.runs_of(task_id)
        assert (run["agent_name"], run["status"], run["reason"]) == (name, "revoked", reason)
        assert (run["parent"], run["root"], run["trace"]) == ("r1", "r0", "ab" * 16)
        assert run["tags"] == {"k": "v"}
        assert (run["metadata"]["queue"], run["metadata"]["attempt"]) == (stage.worker.queue, attempt)
        assert "wait_s" not in run["metadata"]


@pytest.mark.skipif(
    TaskPool.terminate_job is BasePool.terminate_job, reason="this Celery ends no greenlet that has begun"
)
def test_a_greenlet_that_is_revoked_says_so(make):
    """Where the task runs in the process that hears of its revocation, too."""
    stage = make(*POOLS["gevent"])
    task = stage.send("hangs")
    noted = Path(stage.worker.settings["WITNESS"])
    await_(lambda: noted.exists() and task in noted.read_text(), "beginning of the task")
    stage.client.control.revoke(task, terminate=True)
    [run] = stage.runs_of(task)
    assert (run["status"], run["reason"]) == ("revoked", "revoked: terminated by SIGTERM while it ran")
