"""Given a Celery worker with one import and a server that speaks nothing but REST, when the worker is left
alone, stopped, killed or recycled, then no call is lost and none comes twice.

To a server with `ingest`, and for every framework, the conformance suite says the same.
"""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.harness import ROOT, await_

TASKS = 100
POOLS = {
    "prefork": ["--pool", "prefork", "--concurrency", "2"],
    "threads": ["--pool", "threads", "--concurrency", "4"],
    "solo": ["--pool", "solo"],
    # Celery replaces pool processes every 5 s: with few of them, 100 tasks take minutes
    "recycled": ["--pool", "prefork", "--concurrency", "12", "--max-tasks-per-child", "1"],
}


@pytest.fixture
def protocol():
    """The platform's protocol as its own SDK speaks it."""
    return "rest"


def assert_each_once(server, sent):
    """Every task has one run, ended well, with exactly its own call; nothing came twice."""
    await_(lambda: len(server.ended()) >= len(sent), f"{len(sent)} ended runs, but {len(server.ended())}")
    runs = server.runs()
    assert {run["task_id"]: run["markers"] for run in runs} == {task: [sent[task]] for task in sent}
    assert len(runs) == len(sent)
    assert {run["status"] for run in runs} == {"success"}


def drain(worker):
    """Run `waxell-workers ship --drain` for the worker's spool."""
    return subprocess.run(
        [sys.executable, "-m", "waxell_workers.cli.main", "ship", "--drain"],
        env=worker.environ(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


@pytest.mark.parametrize("end", ["left_running", "sigterm", "sigkill"])
@pytest.mark.parametrize("pool", POOLS)
def test_every_run_arrives_once(make_worker, server, pool, end):
    """100 of 100 runs and calls arrive, whatever the pool and whatever the worker's end."""
    worker = make_worker(server.url)
    sent = worker.send_many(TASKS)
    worker.start(*POOLS[pool])
    worker.await_received_results(TASKS)
    if end == "sigterm":
        worker.terminate()
        assert worker.process.returncode == 0
    elif end == "sigkill":
        worker.kill_tree()
    assert_each_once(server, sent)


@pytest.mark.rabbitmq
@pytest.mark.parametrize("end", ["left_running", "sigterm", "sigkill"])
def test_every_run_arrives_once_over_rabbitmq(make_worker, server, rabbitmq, end):
    """The broker makes no difference."""
    worker = make_worker(server.url, broker=rabbitmq)
    sent = worker.send_many(TASKS)
    worker.start(*POOLS["prefork"])
    worker.await_received_results(TASKS)
    if end == "sigterm":
        worker.terminate()
    elif end == "sigkill":
        worker.kill_tree()
    assert_each_once(server, sent)


def test_a_hard_time_limit_leaves_a_killed_run_with_its_call(make_worker, server):
    """A task that the hard limit killed is shown as killed, with the call that it had made and the reason."""
    worker = make_worker(server.url)
    worker.start(*POOLS["prefork"])
    task = worker.send("ask_then_sleep", "the-marker", 60, time_limit=4)
    [run] = await_(server.ended, "ended run")
    assert (run["task_id"], run["status"], run["markers"]) == (task, "killed", ["the-marker"])
    assert "TimeLimitExceeded" in run["error"]
    assert run["reason"] == "killed: hard time limit of 4 s"


def test_a_task_that_is_sigkilled_leaves_a_killed_run_with_its_call(make_worker, server):
    """A task whose process is killed in mid-task is shown as killed, with its call and the reason."""
    worker = make_worker(server.url)
    worker.start(*POOLS["prefork"])
    task = worker.send("ask_then_die", "the-marker")
    [run] = await_(server.ended, "ended run")
    assert (run["task_id"], run["status"], run["markers"]) == (task, "killed", ["the-marker"])
    assert "WorkerLostError" in run["error"]
    assert run["reason"] == "killed: signal 9, probably out of memory"


def test_what_a_killed_shipper_left_is_delivered_by_the_next_worker(make_worker, server):
    """If worker and shipper are killed together, the next worker start delivers."""
    worker = make_worker(server.url, WAXELL_FLUSH_INTERVAL="3600")
    sent = worker.send_many(20)
    worker.start(*POOLS["prefork"])
    worker.await_received_results(20)
    kill_with_shipper(worker)
    assert server.runs() == []
    worker.settings["WAXELL_FLUSH_INTERVAL"] = "1"
    worker.start(*POOLS["prefork"])
    assert_each_once(server, sent)


def test_what_a_killed_shipper_left_is_delivered_by_ship_drain(make_worker, server):
    """If worker and shipper are killed together, `ship --drain` delivers."""
    worker = make_worker(server.url, WAXELL_FLUSH_INTERVAL="3600")
    sent = worker.send_many(20)
    worker.start(*POOLS["prefork"])
    worker.await_received_results(20)
    kill_with_shipper(worker)
    assert server.runs() == []
    result = drain(worker)
    assert result.returncode == 0, result.stderr
    assert_each_once(server, sent)


def kill_with_shipper(worker):
    shipper = await_(worker.shipper, "shipper")
    shipper.suspend()  # not killed yet: the worker would start another
    worker.kill_tree()
    shipper.kill()
    shipper.wait(10)
    assert worker.shipper() is None


def test_a_killed_shipper_is_started_again_by_the_worker(make_worker, server):
    """The worker's main process notices that nobody ships, and starts another shipper."""
    worker = make_worker(server.url)
    worker.start(*POOLS["prefork"])
    await_(worker.shipper, "shipper").kill()
    sent = worker.send_many(5)
    assert_each_once(server, sent)


def test_the_shipper_leaves_after_its_worker(make_worker, server):
    """A stopped worker leaves no process behind once everything has been delivered."""
    worker = make_worker(server.url)
    worker.start(*POOLS["prefork"])
    sent = worker.send_many(5)
    worker.await_received_results(5)
    shipper = await_(worker.shipper, "shipper")
    worker.terminate()
    assert_each_once(server, sent)
    await_(lambda: not shipper.is_running(), "end of the shipper")


def test_failures_and_retries_are_told_apart(make_worker, server):
    """A failure has its type, message and frames without source; each attempt is a run of its own."""
    worker = make_worker(server.url)
    worker.start(*POOLS["prefork"])
    failed = worker.send("fail", "fails")
    flaky = worker.send("flaky", "flaky", 3, 3)
    await_(lambda: len(server.ended()) == 4, "four ended runs")
    runs = server.runs()
    [run] = [run for run in runs if run["task_id"] == failed]
    assert run["status"] == "error"
    assert run["error"].startswith("ValueError: the answer has")
    assert "in fail" in run["traceback"]
    assert "raise" not in run["traceback"], "source lines are content"
    attempts = {run["metadata"]["attempt"]: run for run in runs if run["task_id"] == flaky}
    assert {number: run["status"] for number, run in attempts.items()} == {
        1: "retry",
        2: "retry",
        3: "success",
    }
    assert attempts[1]["error"].startswith("ConnectionError: attempt 1 failed")
    assert all(run["markers"] == ["flaky"] for run in attempts.values())


def test_a_chain_is_one_story(make_worker, server):
    """What a task enqueues is its child: parent and root connect, and the wait in the queue is known."""
    worker = make_worker(server.url)
    worker.start(*POOLS["prefork"])
    worker.send_chain("Hello?")
    await_(lambda: len(server.ended()) == 2, "two ended runs")
    runs = {run["agent_name"]: run for run in server.runs()}
    first, second = runs["tasks.triage"], runs["tasks.summarise"]
    assert second["parent"] == first["run_id"]
    assert second["root"] == first["run_id"]
    assert second["metadata"]["wait_s"] >= 0
    assert second["metadata"]["root_task_id"] == first["task_id"]


APP_WITHOUT_IMPORT = """
import os
from celery import Celery
from openai import OpenAI

app = Celery("plain", broker=os.environ["BROKER_URL"])

@app.task
def ask(marker):
    OpenAI().chat.completions.create(model=marker, messages=[{"role": "user", "content": "hello"}])
"""


def test_include_does_the_same_as_the_import(make_worker, server, tmp_path):
    """`--include waxell_workers.celery` records as the import does."""
    worker = make_worker(server.url)
    worker.app = tmp_path / "app"
    worker.app.mkdir()
    (worker.app / "scenarios.py").write_text(APP_WITHOUT_IMPORT)
    worker.start(*POOLS["prefork"], "--include", "waxell_workers.celery")
    sent = worker.send_many(5)
    assert_each_once(server, sent)


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGQUIT]])
def test_other_stops_lose_nothing(make_worker, server, signals):
    """A warm stop by Ctrl-C and a cold one deliver like SIGTERM does."""
    worker = make_worker(server.url)
    sent = worker.send_many(10)
    worker.start(*POOLS["prefork"])
    worker.await_received_results(10)
    for number in signals:
        worker.process.send_signal(number)
    worker.process.wait(60)
    assert_each_once(server, sent)
