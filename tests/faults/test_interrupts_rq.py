"""RQ's time limit and its second SIGTERM, raised by RQ's own signal handlers while our code runs.

A `SimpleWorker` over a real Valkey, and what RQ itself does with each job: `Worker.execute_job`.
"""

from __future__ import annotations

import datetime
import signal
from collections.abc import Iterator

import pytest
from redis import Redis
from rq.job import JobStatus
from rq.timeouts import JobTimeoutException, UnixSignalDeathPenalty

import waxell_workers
import waxell_workers.rq as adapter
from tests.faults.interrupting import Interrupt, left_behind, locked, open_runs, sweep
from tests.torture import effort, found
from waxell_workers import WaxellContext, get_context
from waxell_workers.core import tasks
from waxell_workers.testing import record_runs
from waxell_workers.testing.conformance.stage import children_in, start_valkey

pytestmark = [
    pytest.mark.timeout(effort(400, 1800)),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:rq"),  # RQ 1.16 uses what it deprecates
]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with children_in(tmp_path_factory.mktemp("broker")) as children:
        yield start_valkey(children)


@pytest.fixture
def redis(broker: str) -> Iterator[Redis]:
    connection = Redis.from_url(broker)
    connection.flushdb()
    yield connection
    connection.close()


@pytest.fixture
def queue(redis: Redis) -> adapter.Queue:
    return adapter.Queue("q", connection=redis)


seen: list[str] = []
"""What has surfaced in the job's own function."""


def ask() -> None:
    try:
        with WaxellContext("block") as run:
            run.record_step("step", {"number": 1})
            waxell_workers.record_llm_call(model="asked")
    except BaseException as error:
        seen.append(type(error).__name__)
        raise


class Limited(UnixSignalDeathPenalty):
    """RQ's own time limit, but that the sweep says when it is over."""

    interrupt: Interrupt | None = None

    def setup_death_penalty(self) -> None:
        self._before = signal.signal(signal.SIGALRM, self.handle_death_penalty)
        if self.interrupt is not None and self._exception is JobTimeoutException:
            self.interrupt.__enter__()

    def cancel_death_penalty(self) -> None:
        if self.interrupt is not None:
            self.interrupt.__exit__()
        signal.signal(signal.SIGALRM, self._before)


class Worker(adapter.SimpleWorker):
    death_penalty_class = Limited


def test_a_time_limit_anywhere_in_our_code(redis: Redis, queue: adapter.Queue) -> None:
    """Given a job, when its time limit surfaces at any instruction of ours, then the job fails by it, as RQ
    has it; it is one run, with one end, and nothing of it is open or current afterwards."""
    worker = Worker(["q"], connection=redis)
    worker.register_birth()
    ends = {}
    seen.clear()

    def interrupted(interrupt: Interrupt) -> None:
        job = queue.enqueue(ask)
        Limited.interrupt = interrupt
        worker.execute_job(job, queue)
        Limited.interrupt = None
        assert job.get_status() == (JobStatus.FAILED if interrupt.where else JobStatus.FINISHED)
        assert get_context() is None, interrupt.where
        assert open_runs() == [], interrupt.where
        ends[job.id] = ("error", "rq.timeouts.JobTimeoutException") if interrupt.where else ("success", "")

    with record_runs() as runs:
        for _ in sweep(lambda: signal.raise_signal(signal.SIGALRM), interrupted, step=effort(9, 2)):
            pass
        assert locked() == []
        assert left_behind() == []
        of_jobs = [run for run in runs if run.task_id]
        assert {run.task_id: (run.state, run.error_type) for run in of_jobs} == ends
        assert {run.parent_run_id for run in of_jobs} == {""}
        assert len(of_jobs) == len(ends)
        assert all(call.run_id for call in runs.calls), "a call is outside any run"
    found("RQ's time limit in our code", reached_the_job=len(ends), reached_its_function=len(seen))
    assert 30 < len(seen) < len(ends)


def test_a_second_sigterm_anywhere_in_our_code(redis: Redis, queue: adapter.Queue) -> None:
    """Given a SimpleWorker that was told to stop, when it is told again at any instruction of ours, then it
    leaves, or the job fails by it, as with RQ alone; and once it has left, no run is open."""
    left = failed = still_open = 0
    seen.clear()

    def interrupted(interrupt: Interrupt) -> None:
        nonlocal left, failed, still_open
        job = queue.enqueue(ask)
        worker = Worker(["q"], connection=redis)
        worker.register_birth()
        worker._shutdown_requested_date = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(9)
        before = signal.signal(signal.SIGTERM, worker.request_force_stop)
        try:
            with interrupt:
                worker.execute_job(job, queue)
            failed += bool(interrupt.where)
            assert job.get_status() == (JobStatus.FAILED if interrupt.where else JobStatus.FINISHED)
            assert open_runs() == [], interrupt.where
            assert get_context() is None, interrupt.where
        except SystemExit:
            left += 1
        finally:
            signal.signal(signal.SIGTERM, before)
            worker.register_death()
        still_open += len(open_runs())
        tasks.pool_process_stopping()  # what the exit of the process does first
        still_current = get_context()
        if still_current is not None:  # and with the process, its contexts go
            still_current.leave()

    with record_runs() as runs:
        for _ in sweep(lambda: signal.raise_signal(signal.SIGTERM), interrupted, step=effort(11, 5)):
            pass
        assert locked() == []
        assert left_behind() == []
        assert all(call.run_id for call in runs.calls), "a call is outside any run"
    found("a second SIGTERM in our code", jobs_failed=failed, workers_left=left, open_until_then=still_open)
    assert failed > 30
    assert left > 5
