"""Given the ways in which only Celery ends a task (revocation, cold and soft shutdown, redelivery), then each
run says what became of its attempt."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
from celery import Celery

from tests.acceptance.test_celery import POOLS
from tests.harness import APP, await_

REDELIVERED = f"""
import os, signal, sys
sys.path.insert(0, {str(APP)!r})
from tasks import app, ask

@app.task(acks_late=True, reject_on_worker_lost=True)
def ask_and_die_once(marker, path):
    ask("Say yes.", model=marker)
    if not os.path.exists(path):
        open(path, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
"""
SOFT_SHUTDOWN = """
app.conf.worker_soft_shutdown_timeout = 4.0
"""


@pytest.fixture
def worker(make_worker, server):
    return make_worker(server.url, WAXELL_FLUSH_INTERVAL="1")


def control(worker):
    """Return what speaks to the worker as `celery control` does."""
    return Celery(broker=worker.broker, set_as_current=False).control


@pytest.fixture
def busy_worker(worker, tmp_path):
    """A worker that executes one slow task, and has another in its queue."""
    worker.settings["WITNESS"] = str(tmp_path / "witness")

    def make(*arguments, seconds=30):
        worker.start(*arguments)
        task = worker.send("ask_then_sleep", "slow", seconds)
        path = tmp_path / "witness"
        await_(lambda: path.exists() and "body " in path.read_text(), "call of the task", 30)
        return task

    return make


@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_a_task_that_is_revoked_and_terminated_is_revoked(worker, busy_worker, server, number):
    """`revoke(terminate=True)`, whatever the signal: the run is `revoked`, with its call and the reason."""
    task = busy_worker("--pool", "prefork", "--concurrency", "1")
    control(worker).revoke(task, terminate=True, signal=number)
    [run] = await_(server.ended, "ended run")
    assert (run["task_id"], run["status"], run["markers"]) == (task, "revoked", ["slow"])
    assert run["reason"] == f"revoked: terminated by {number} while it ran"


def test_a_task_that_is_revoked_in_the_queue_says_so(worker, busy_worker, server):
    """It has never begun: its run has no call, and the reason; the task after it is not concerned."""
    busy_worker("--pool", "prefork", "--concurrency", "1", seconds=5)
    queued = worker.send("ask", "queued")
    worker.await_log(f"[{queued}] received")
    control(worker).revoke(queued)
    worker.await_log(f"Tasks flagged as revoked: {queued}")
    worker.send("ask", "next")
    await_(lambda: len(server.ended()) >= 3, "three ended runs")
    runs = server.runs()
    assert sorted(run["markers"] for run in runs) == [[], ["next"], ["slow"]]
    [revoked] = [run for run in runs if run["task_id"] == queued]
    assert (revoked["status"], revoked["reason"]) == ("revoked", "revoked before start")


def test_a_cold_shutdown_interrupts(worker, busy_worker, server):
    """SIGQUIT in mid-task: the run is `interrupted`, with its call."""
    busy_worker("--pool", "prefork", "--concurrency", "1")
    worker.process.send_signal(signal.SIGQUIT)
    worker.process.wait(30)
    [run] = await_(server.ended, "ended run")
    assert (run["status"], run["markers"]) == ("interrupted", ["slow"])
    assert run["reason"] == "interrupted: the worker was told to stop"


def test_a_warm_shutdown_lets_the_task_finish(worker, busy_worker, server):
    """SIGTERM in mid-task: it comes to its own end, and so does its run."""
    busy_worker("--pool", "prefork", "--concurrency", "1", seconds=3)
    worker.terminate()
    [run] = await_(server.ended, "ended run")
    assert (run["status"], run["markers"]) == ("success", ["slow"])


@pytest.mark.parametrize(("seconds", "state"), [(2, "success"), (30, "interrupted")])
def test_a_soft_shutdown_waits_a_while(worker, busy_worker, server, tmp_path, seconds, state):
    """SIGQUIT with `worker_soft_shutdown_timeout`: what ends in time is a success, the rest `interrupted`.

    Celery's main process says of either that it will be retried.
    """
    worker.app = tmp_path / "app"
    shutil.copytree(APP, worker.app)
    with (worker.app / "scenarios.py").open("a") as scenarios:
        scenarios.write(SOFT_SHUTDOWN)
    busy_worker("--pool", "prefork", "--concurrency", "1", seconds=seconds)
    worker.process.send_signal(signal.SIGQUIT)
    worker.process.wait(30)
    [run] = await_(server.ended, "ended run")
    assert (run["status"], run["markers"]) == (state, ["slow"])


@pytest.mark.parametrize("broker", ["valkey", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def test_a_redelivered_task_has_a_run_for_each_delivery(worker, server, tmp_path, request, broker):
    """`acks_late` and a killed process: the same task id twice, one `killed` and one success, told apart."""
    worker.broker = request.getfixturevalue(broker)
    worker.app = tmp_path / "app"
    worker.app.mkdir()
    (worker.app / "scenarios.py").write_text(REDELIVERED)
    worker.start(*POOLS["prefork"])
    task = worker.send("ask_and_die_once", "marker", str(tmp_path / "died"))
    await_(lambda: len(server.ended()) == 2, "two ended runs")
    runs = {run["status"]: run for run in server.runs()}
    assert runs.keys() == {"killed", "success"}
    assert {run["task_id"] for run in runs.values()} == {task}
    assert all(run["markers"] == ["marker"] for run in runs.values())
    assert "redelivered" not in runs["killed"]["metadata"]
    assert runs["success"]["metadata"]["redelivered"] is True


def test_the_whole_group_is_signalled(worker, busy_worker, server):
    """SIGTERM to every process at once, as a supervisor sends it: the run ends, with its call."""
    busy_worker("--pool", "prefork", "--concurrency", "1", seconds=20)
    os.killpg(worker.process.pid, signal.SIGTERM)
    worker.process.wait(30)
    [run] = await_(server.ended, "ended run")
    assert run["status"] in ("killed", "interrupted")
    assert run["markers"] == ["slow"]
