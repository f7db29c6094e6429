"""Given `WAXELL_SHIPPER=thread`, then all holds but delivery after SIGKILL."""

from __future__ import annotations

import pytest

from tests.acceptance.test_celery import POOLS, TASKS, assert_each_once
from tests.harness import await_


@pytest.mark.parametrize("end", ["left_running", "sigterm"])
@pytest.mark.parametrize("pool", POOLS)
def test_every_run_arrives_once(make_worker, server, pool, end):
    """100 of 100 runs and calls arrive, none twice, and there is no shipper process."""
    worker = make_worker(server.url, WAXELL_SHIPPER="thread")
    sent = worker.send_many(TASKS)
    worker.start(*POOLS[pool])
    worker.await_received_results(TASKS)
    assert worker.shipper() is None
    if end == "sigterm":
        worker.terminate()
        assert worker.process.returncode == 0
    assert_each_once(server, sent)


def test_after_sigkill_the_next_start_delivers(make_worker, server):
    """The thread dies with its process; the journal does not."""
    worker = make_worker(server.url, WAXELL_SHIPPER="thread", WAXELL_FLUSH_INTERVAL="3600")
    sent = worker.send_many(20)
    worker.start(*POOLS["prefork"])
    worker.await_received_results(20)
    worker.kill_tree()
    assert server.runs() == []
    worker.settings["WAXELL_FLUSH_INTERVAL"] = "1"
    worker.start(*POOLS["prefork"])
    assert_each_once(server, sent)


def test_hard_limits_and_kills_are_reported(make_worker, server):
    """A killed task is shown as killed, with its call and the reason, as with the process."""
    worker = make_worker(server.url, WAXELL_SHIPPER="thread")
    worker.start(*POOLS["prefork"])
    limited = worker.send("ask_then_sleep", "limited", 60, time_limit=4)
    died = worker.send("ask_then_die", "died")
    await_(lambda: len(server.ended()) == 2, "two ended runs")
    runs = {run["task_id"]: run for run in server.runs()}
    assert {runs[limited]["status"], runs[died]["status"]} == {"killed"}
    assert "TimeLimitExceeded" in runs[limited]["error"]
    assert "WorkerLostError" in runs[died]["error"]
    assert (runs[limited]["markers"], runs[died]["markers"]) == (["limited"], ["died"])
