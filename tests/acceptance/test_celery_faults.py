"""Given a REST-only server that refuses, is broken or never answers, then tasks are as fast as ever, the
worker stops in time, and everything arrives once the server is back.

To a server with `ingest`, and for every framework, the conformance suite says the same.
"""

from __future__ import annotations

import re
import statistics

import pytest

from tests.faulty import FaultyServer
from tests.harness import await_

pytestmark = pytest.mark.timed

FAULTS = ["refuse", "503", "hang"]
ROUNDS = 4
MOST_ROUNDS = 16
NOISE = 0.05
BATCH = 30
PROMISED_RATIO = 1.2
PROMISED_STOP_S = 3.0
FLUSH_TIMEOUT_S = 2.0
STOP_TASKS = 4
MOST_STOPS = 3
SUCCEEDED = re.compile(r"succeeded in ([0-9.e-]+)s")


@pytest.fixture
def faulty():
    with FaultyServer() as server:
        yield server


def run_batch(worker, done):
    """Run a batch of tasks; return how many are done now, and how long each took by Celery's own clock."""
    worker.send_many(BATCH)
    worker.await_received_results(done + BATCH)
    return done + BATCH, [float(took) for took in SUCCEEDED.findall(worker.text)[done:]]


def assert_all_arrive(faulty, expected):
    """Every run has ended at the server, with its call.

    What was under way when the fault began has an unknown outcome, and may be there twice.
    """
    await_(lambda: len(ended(faulty)) >= expected, f"{expected} ended runs", 90)
    assert len(ended(faulty)) == expected
    assert all(run.calls for run in faulty.runs.values() if run.state)
    assert faulty.violations == []


def ended(faulty):
    return {run.client_id for run in list(faulty.runs.values()) if run.state}


@pytest.mark.parametrize("fault", FAULTS)
def test_tasks_do_not_notice_and_nothing_is_lost(make_worker, faulty, fault):
    """Median task time with a sick server is at most 1.2 x the healthy one, in paired batches.

    The tasks take milliseconds and the machine is noisy: where a few pairs say no, more are asked.
    """
    worker = make_worker(faulty.url, WAXELL_FLUSH_INTERVAL="0.5")
    worker.start("--pool", "prefork", "--concurrency", "2")
    done, _ = run_batch(worker, 0)  # connections, imports
    ratios = []
    while len(ratios) < ROUNDS or (
        len(ratios) < MOST_ROUNDS and statistics.median(ratios) > PROMISED_RATIO - NOISE
    ):
        number = len(ratios)
        times = {}
        for mode in ("healthy", fault) if number % 2 else (fault, "healthy"):
            faulty.mode(mode)
            done, times[mode] = run_batch(worker, done)
        ratios.append(statistics.median(times[fault]) / statistics.median(times["healthy"]))
    print(f"{fault}: {[round(ratio, 2) for ratio in ratios]}")
    assert fault == "refuse" or faulty.fired[fault] > 0, "the fault did not fire"
    assert statistics.median(ratios) <= PROMISED_RATIO, ratios
    faulty.mode("healthy")
    assert_all_arrive(faulty, done)


@pytest.mark.parametrize("policy", ["periodic", "task"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_worker_stops_in_time_and_everything_arrives_later(make_worker, faulty, fault, policy):
    """With a sick server, SIGTERM ends the worker at most 3 s later than with a healthy one.

    Under `task`, the tasks that are still flushing are the worker's own work: they have their 2 s. Celery's
    own stop takes 2 to 4 s here; noise only adds, so that the quickest of a few pairs is the one that counts.
    """
    worker = make_worker(faulty.url, WAXELL_FLUSH_INTERVAL="0.5", WAXELL_FLUSH=policy)
    own_work_s = FLUSH_TIMEOUT_S if policy == "task" else 0.0
    later_by = []
    while not later_by or (min(later_by) > own_work_s + PROMISED_STOP_S and len(later_by) < MOST_STOPS):
        faulty.mode("healthy")
        healthy = seconds_to_stop(worker)
        faulty.mode(fault)
        later_by.append(seconds_to_stop(worker) - healthy)
    assert min(later_by) <= own_work_s + PROMISED_STOP_S, later_by
    faulty.mode("healthy")
    assert_all_arrive(faulty, 2 * STOP_TASKS * len(later_by))


def seconds_to_stop(worker):
    """Run a worker with a few tasks; return how long it takes to end after SIGTERM."""
    worker.start("--pool", "prefork", "--concurrency", "2")
    worker.send_many(STOP_TASKS)
    worker.await_received_results(STOP_TASKS)
    return worker.terminate()
