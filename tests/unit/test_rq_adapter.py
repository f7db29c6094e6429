"""The RQ adapter in one process: a SimpleWorker over a real Valkey, queues without a worker, and what is said
of the dead.

Real workers are in `tests/acceptance`, and in the conformance suite.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import inspect
import sys
import time
from pathlib import Path

import pytest
import rq
import rq.registry
import rq.scheduler
from redis import Redis
from rq.job import Callback, Job, JobStatus, Retry
from rq.timeouts import BaseDeathPenalty, JobTimeoutException

import waxell_workers.rq as adapter
from waxell_workers import WaxellContext, get_context, options
from waxell_workers.core import collector as collecting
from waxell_workers.core import lineage
from waxell_workers.core.records import LLMCall, RunEnded, RunStarted, TaskLost
from waxell_workers.testing.conformance.stage import children_in, start_valkey

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:rq")  # RQ 1.16 uses what it deprecates
PACKAGE = str(Path(adapter.__file__).parent)
RETURNS_RETRIES = hasattr(rq.worker.BaseWorker, "handle_job_retry")
HAS_CRON = importlib.util.find_spec("rq.cron") is not None
ABANDONED = "{0}" if rq.__version__ < "2" else "{0}:an-execution"
"""How RQ names an execution among those that are under way."""


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with children_in(tmp_path_factory.mktemp("broker")) as children:
        yield start_valkey(children)


@pytest.fixture
def redis(broker):
    connection = Redis.from_url(broker)
    connection.flushdb()
    yield connection
    connection.close()


@pytest.fixture
def queue(redis):
    return adapter.Queue("q", connection=redis)


def work(redis, kind=adapter.SimpleWorker, **options):
    """Execute what is in the queue, here."""
    worker = kind(["q"], connection=redis, **options)
    worker._install_signal_handlers = lambda: None  # they would outlive the test
    worker.work(burst=True)
    return worker


def ends(records):
    """Return the state and the type of the error of each attempt, by its number."""
    attempts = {record.run_id: record.metadata["attempt"] for record in records(RunStarted)}
    return {attempts[record.run_id]: (record.state, record.error_type) for record in records(RunEnded)}


# -- the jobs: RQ finds them by name -----------------------------------------------------------


def succeed():
    pass


def call(*args, **kwargs):
    get_context().record_llm_call(model="m")


def secret():
    import waxell_workers

    waxell_workers.record_llm_call(model="m")
    get_context().set_tag("a", 1)


marked = options(record=False)(secret)


@options(agent_name="billing")
def named():
    pass


@options(capture_content=True)
def fail_with_content(text):
    raise ValueError("x" * 300)


@options(capture_content=False)
def fail_without_content(text):
    raise ValueError("x" * 300)


def fail():
    raise ValueError("no")


def leave():
    sys.exit("enough")


def be_interrupted():
    raise JobTimeoutException("too slow")


def return_a_retry():
    return Retry(max=1)


def return_a_late_retry():
    return Retry(max=2, interval=20)


@options(propagate="link")
def linked():
    pass


@options(propagate="none")
def unconnected():
    pass


def enqueue_another():
    job = rq.get_current_job()
    if job.retries_left:
        raise KeyError("gone")
    adapter.Queue(job.origin, connection=job.connection).enqueue(succeed)


def enqueue_itself(name):
    job = rq.get_current_job()
    if not job.meta.get("waxell"):
        adapter.Queue(name, connection=job.connection).enqueue_job(job)


def leave_without_a_word():
    raise SystemExit


def never_twice():
    if rq.get_current_job().retries_left:
        raise KeyError("gone")


# -- runs --------------------------------------------------------------------------------------


def test_a_job_is_a_run(redis, queue, records):
    """A job is a run with what RQ knows of it, and with what it does; afterwards nothing is current."""
    job = queue.enqueue(call)
    worker = work(redis)
    [started], [ended], [made] = records(RunStarted), records(RunEnded), records(LLMCall)
    assert (started.agent_name, started.workflow_name) == (f"{__name__}.call", "rq")
    assert (started.task_id, ended.state, made.run_id) == (job.id, "success", started.run_id)
    expected = {
        "framework": "rq",
        "task": f"{__name__}.call",
        "task_id": job.id,
        "attempt": 1,
        "queue": "q",
        "worker": worker.name,
    }
    assert expected.items() <= started.metadata.items()
    assert 0 <= started.metadata["wait_s"] < 60
    assert get_context() is None
    assert job.get_status() == JobStatus.FINISHED


@pytest.mark.parametrize(
    ("job", "state", "error"),
    [
        (succeed, "success", ("", "")),
        (fail, "error", ("ValueError", "no")),
        (leave, "interrupted", ("SystemExit", "enough")),
        (be_interrupted, "error", ("rq.timeouts.JobTimeoutException", "too slow")),
    ],
)
def test_states(redis, queue, records, job, state, error):
    """What RQ makes of a job is the run's state, and the exception is RQ's as it was."""
    handle = queue.enqueue(job)
    work(redis)
    [end] = records(RunEnded)
    assert (end.state, end.error_type, end.error_message) == (state, *error)
    assert handle.get_status() == (JobStatus.FINISHED if job is succeed else JobStatus.FAILED)
    if job is not succeed:
        assert handle.latest_result().exc_string.strip().endswith(f"{error[0]}: {error[1]}")


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (fail, {1: ("retry", "ValueError"), 2: ("retry", "ValueError"), 3: ("error", "ValueError")}),
        (never_twice, {1: ("retry", "KeyError"), 2: ("retry", "KeyError"), 3: ("success", "")}),
    ],
)
def test_each_attempt_is_a_run(redis, queue, records, job, expected):
    """A job that is retried has a run an attempt, numbered, each but the last as `retry` with its reason."""
    handle = queue.enqueue(job, retry=Retry(max=2), meta={"own": 1})
    work(redis)
    assert ends(records) == expected
    assert {record.task_id for record in records(RunStarted)} == {handle.id}
    handle.refresh()
    assert handle.meta["own"] == 1


@pytest.mark.skipif(not RETURNS_RETRIES, reason="RQ 2.1 has it first")
def test_a_returned_retry_is_a_retry(redis, queue, records):
    """A job that returns a `Retry` is tried again; when none is left, RQ fails it, and so does the run."""
    queue.enqueue(return_a_retry)
    work(redis)
    assert ends(records) == {1: ("retry", ""), 2: ("error", "Retry")}


@pytest.mark.skipif(not RETURNS_RETRIES, reason="RQ 2.2 has it first")
def test_a_job_that_repeats_is_a_success_each_time(redis, queue, records):
    """A job that RQ puts into the queue once more because it has succeeded is no retry."""
    from rq import Repeat

    queue.enqueue(succeed, repeat=Repeat(times=1))
    work(redis)
    assert [end.state for end in records(RunEnded)] == ["success", "success"]


@pytest.mark.parametrize("name", [f"{__name__}.missing", "no_such_module.missing"])
def test_a_function_that_is_not_there_is_a_failed_run(redis, queue, records, name):
    """A job whose function cannot be found is a run, with the reason."""
    job = queue.enqueue(name)
    work(redis)
    [started], [ended] = records(RunStarted), records(RunEnded)
    assert (started.agent_name, ended.state) == (name, "error")
    assert ended.error_type in ("ValueError", "AttributeError", "ModuleNotFoundError")
    assert job.get_status() == JobStatus.FAILED


def test_a_job_that_cannot_be_read_is_a_failed_run(redis, queue, records):
    """A job whose data cannot be unpickled is a run, with the reason."""
    job = queue.enqueue(succeed)
    redis.hset(job.key, "data", b"not a pickle")
    work(redis)
    assert [end.error_type for end in records(RunEnded)] == ["rq.exceptions.DeserializationError"]
    assert job.get_status() == JobStatus.FAILED


@pytest.mark.parametrize("job", [secret, marked])
def test_what_is_not_recorded_leaves_nothing(redis, queue, records, monkeypatch, job):
    """An excluded job leaves no run, and its calls do not turn up as calls outside any run either."""
    if job is marked:
        monkeypatch.setattr(f"{__name__}.secret", marked)
    queue.enqueue(secret)
    work(redis)
    assert records(RunStarted) + records(LLMCall) + records(RunEnded) == []


def test_a_job_s_options_name_its_run(redis, queue, records):
    """`@options` on a job's function counts, though RQ knows the function by its name alone."""
    queue.enqueue(named)
    work(redis)
    assert [started.agent_name for started in records(RunStarted)] == ["billing"]


def test_arguments_are_content(redis, queue, records, monkeypatch):
    """Arguments are recorded only if content is captured."""
    queue.enqueue(call, 1, text="x")
    work(redis)
    settings = collecting.current().settings
    with_content = dataclasses.replace(settings, capture_content=True)
    monkeypatch.setattr(collecting, "_collector", collecting.Collector(with_content))
    queue.enqueue(call, 1, text="x")
    work(redis)
    assert [record.inputs for record in records(RunStarted)] == [{}, {"args": [1], "kwargs": {"text": "x"}}]


@pytest.mark.parametrize("setting", [True, False])
def test_a_job_chooses_its_content(redis, queue, records, monkeypatch, setting):
    """`@options(capture_content=…)` beats the setting, for the job's arguments and its error."""
    settings = dataclasses.replace(collecting.current().settings, capture_content=setting)
    monkeypatch.setattr(collecting, "_collector", collecting.Collector(settings))
    queue.enqueue(fail_with_content, "text")
    queue.enqueue(fail_without_content, "text")
    work(redis)
    with_content, without_content = records(RunStarted)
    assert (with_content.inputs, without_content.inputs) == ({"args": ["text"], "kwargs": {}}, {})
    lengths = {end.run_id: len(end.error_message) for end in records(RunEnded)}
    assert lengths == {with_content.run_id: 300, without_content.run_id: 200}


def test_a_job_that_rq_cannot_account_for_is_no_retry(redis, queue, records, monkeypatch):
    """If Redis goes away under a job, what RQ raises is the run's end, and goes on to RQ."""

    def lose(*args, **kwargs):
        raise ConnectionError("gone")

    job = queue.enqueue(succeed, retry=Retry(max=1))
    worker = adapter.SimpleWorker(["q"], connection=redis)
    for method in ("handle_job_success", "handle_job_failure"):
        monkeypatch.setattr(worker, method, lose)
    with pytest.raises(ConnectionError):
        worker.execute_job(job, queue)
    assert [(end.state, end.error_type) for end in records(RunEnded)] == [("error", "ConnectionError")]


def test_a_worker_class_of_one_s_own_records_by_the_mixin(redis, queue, records):
    """`WorkerMixin` before a worker class of one's own is all that it takes."""

    class Own(adapter.WorkerMixin, rq.SimpleWorker):
        performed = 0

        def perform_job(self, *args, **kwargs):
            Own.performed += 1
            return super().perform_job(*args, **kwargs)

    queue.enqueue(call)
    work(redis, Own)
    assert (Own.performed, len(records(RunEnded))) == (1, 1)


def test_an_exception_handler_sees_the_run(redis, queue, records):
    """Exception handlers and callbacks run inside the run, and a handler's answer is RQ's to judge."""
    seen = []

    def handle(job, kind, error, trace):
        seen.append((get_context().task_id, kind))
        return False

    job = queue.enqueue(fail)
    work(redis, exception_handlers=[handle])
    assert seen == [(job.id, ValueError)]


# -- a time limit, wherever it surfaces --------------------------------------------------------


class Interrupting(BaseDeathPenalty):
    """RQ's time limit, which surfaces at the n-th line that is executed in our package."""

    lines = 0
    at = 0
    surfaced = False

    def setup_death_penalty(self):
        if self._exception is JobTimeoutException:
            Interrupting.lines, Interrupting.surfaced = 0, False
            sys.settrace(self._trace)

    def cancel_death_penalty(self):
        sys.settrace(None)

    def _trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and not Interrupting.surfaced:
            Interrupting.lines += 1
            if Interrupting.lines == Interrupting.at:
                Interrupting.surfaced = True
                raise JobTimeoutException("too slow")
        return self._trace


class Interrupted(adapter.SimpleWorker):
    death_penalty_class = Interrupting


def test_a_time_limit_that_surfaces_in_our_code_is_the_job_s(redis, queue, records):
    """At every line of ours that is executed under RQ's time limit: the job fails by it, as it must, its run
    has an end, and nothing stays current."""
    Interrupting.at = 0
    worker = Interrupted(["q"], connection=redis)
    worker.register_birth()
    while True:
        Interrupting.at += 1
        before = len(records(RunEnded))
        job = queue.enqueue(call)
        worker.execute_job(job, queue)
        if not Interrupting.surfaced:
            break
        where = f"at line {Interrupting.at}"
        assert job.get_status() == JobStatus.FAILED, where
        assert get_context() is None, where
        ended = records(RunEnded)[before:]
        assert [end.state for end in ended] == ["error"], where
        assert {end.run_id for end in records(RunEnded)} == {start.run_id for start in records(RunStarted)}
        assert not collecting.current().open_runs, where
    assert Interrupting.at > 30, "the limit surfaced hardly anywhere"


# -- what is said of the dead ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ret_val", "began_s_ago", "reason"),
    [
        (9, 1, "signal 9, probably out of memory"),
        (11, 1, "signal 11 (SIGSEGV), a crash in native code"),
        (6 | 0x80, 1, "signal 6 (SIGABRT), a crash in native code"),  # with a core dump
        (15, 1, "signal 15 (SIGTERM)"),
        (40, 1, "signal 40 (unknown)"),
        (3 << 8, 1, "the work-horse ended with status 3"),
        (None, 241, "60 s past its time limit of 180 s"),
        (None, 1, "the work-horse is gone, and nobody has kept its status"),
    ],
)
def test_a_killed_work_horse_has_a_reason(redis, queue, records, ret_val, began_s_ago, reason):
    """The worker says why a work-horse is gone, and RQ's own handler is called as ever."""
    called = []
    worker = adapter.Worker(
        ["q"], connection=redis, work_horse_killed_handler=lambda *args: called.append(args)
    )
    job = queue.enqueue(succeed)
    now = datetime.datetime.now(datetime.timezone.utc)
    job.started_at = now - datetime.timedelta(seconds=began_s_ago)
    worker.handle_work_horse_killed(job, 1, ret_val, None)
    [lost] = records(TaskLost)
    assert (lost.task_id, lost.reason, lost.error_type) == (job.id, reason, "WorkHorseKilled")
    assert called == [(job, 1, ret_val, None)]


# -- queues ------------------------------------------------------------------------------------

SOON = datetime.timedelta(hours=1)
WAYS = {
    "enqueue": lambda queue: queue.enqueue(succeed),
    "enqueue_call": lambda queue: queue.enqueue_call(succeed),
    "enqueue_many": lambda queue: queue.enqueue_many([adapter.Queue.prepare_data(succeed)])[0],
    "enqueue_in": lambda queue: queue.enqueue_in(SOON, succeed),
    "enqueue_at": lambda queue: queue.enqueue_at(datetime.datetime.now() + SOON, succeed),
    "enqueue_job": lambda queue: queue.enqueue_job(Job.create(succeed, connection=queue.connection)),
    "a pipeline": lambda queue: enqueue_by_pipeline(queue),
    "schedule_job": lambda queue: queue.schedule_job(
        Job.create(succeed, connection=queue.connection), datetime.datetime.now() + SOON
    ),
}
if "unique" in inspect.signature(rq.Queue.enqueue_call).parameters:
    WAYS["unique"] = lambda queue: queue.enqueue(succeed, job_id="only", unique=True)
    WAYS["unique, later"] = lambda queue: queue.enqueue_in(SOON, succeed, job_id="only", unique=True)


def enqueue_by_pipeline(queue):
    with queue.connection.pipeline() as pipeline:
        job = queue.enqueue(succeed, pipeline=pipeline)
        pipeline.execute()
    return job


@pytest.mark.parametrize("way", WAYS)
def test_a_job_carries_its_lineage(redis, queue, records, way):
    """However a job is enqueued inside a run, it names that run, in Redis."""
    with WaxellContext("web") as run:
        job = WAYS[way](queue)
    stored = Job.fetch(job.id, connection=redis).meta
    assert stored["waxell"]["run"] == run.run_id
    assert stored["traceparent"].split("-")[1] == run.trace_id


@pytest.mark.parametrize("way", ["enqueue", "enqueue_call", "enqueue_many", "enqueue_job"])
def test_outside_a_run_a_job_carries_nothing(queue, records, way):
    """Outside any run, a job's `meta` stays as it is."""
    assert WAYS[way](queue).meta == {}


def test_a_child_of_a_run(redis, queue, records):
    """A job that was enqueued inside a run is that run's child, also when it is tried again."""
    with WaxellContext("web") as run:
        queue.enqueue(never_twice, retry=Retry(max=1))
    work(redis)
    [web, *children] = records(RunStarted)
    assert [child.metadata["attempt"] for child in children] == [1, 2]
    assert {child.parent_run_id for child in children} == {run.run_id}
    assert {child.trace_id for child in children} == {web.trace_id}


def test_a_meta_that_is_used_again_is_left_alone(queue, records):
    """The `meta` that was handed over is the caller's; and what it carries of another job does not count."""
    own = {"own": 1}
    with WaxellContext("first"):
        first = queue.enqueue(succeed, meta=own)
    assert own == {"own": 1}
    with WaxellContext("second") as second:
        job = queue.enqueue(succeed, meta=first.meta)
    assert (job.meta["waxell"]["run"], job.meta["own"]) == (second.run_id, 1)
    assert job.meta["traceparent"].split("-")[1] == second.trace_id


def test_the_helper_is_for_queues_of_other_classes(redis, records):
    """`meta()` does the same where the queue is not ours, and leaves another tracer's traceparent alone."""
    with WaxellContext("web") as run:
        job = rq.Queue("q", connection=redis).enqueue(
            succeed, meta=adapter.meta({"traceparent": "theirs", "own": 1})
        )
    assert job.meta["waxell"]["run"] == run.run_id
    assert (job.meta["traceparent"], job.meta["own"]) == ("theirs", 1)
    assert adapter.meta({"own": 1}) == {"own": 1}


def test_a_scheduled_job_has_waited_since_it_was_due(redis, queue, records):
    """`eta` is when it was due, and `wait_s` is counted from then, also where the scheduler was late."""
    due = time.time() - 100
    job = queue.enqueue_at(datetime.datetime.fromtimestamp(due), succeed)
    job.meta["waxell"]["enqueued_at"] = due - 100
    job.save_meta()
    worker = adapter.SimpleWorker(["q"], connection=redis)
    worker._install_signal_handlers = lambda: None
    worker.work(burst=True, with_scheduler=True)
    [started] = records(RunStarted)
    assert started.metadata["eta"] == int(due)
    assert started.metadata["enqueued_at"] == pytest.approx(due - 100)
    assert 100 <= started.metadata["wait_s"] < 160


def test_a_queue_without_a_worker_makes_runs_of_its_jobs(redis, records):
    """With `is_async=False` a job is a run where it was enqueued, and a child of the run there."""
    queue = adapter.Queue("q", connection=redis, is_async=False)
    with WaxellContext("web") as web:
        good, bad = queue.enqueue(call), queue.enqueue(fail)
        assert get_context() is web
    assert (good.get_status(), bad.get_status()) == (JobStatus.FINISHED, JobStatus.FAILED)
    started = {record.task_id: record for record in records(RunStarted) if record.task_id}
    ended = {record.run_id: record for record in records(RunEnded)}
    assert {record.parent_run_id for record in started.values()} == {web.run_id}
    assert [call.run_id for call in records(LLMCall)] == [started[good.id].run_id]
    assert ended[started[good.id].run_id].state == "success"
    failed = ended[started[bad.id].run_id]
    assert (failed.state, failed.error_type, failed.error_message) == ("error", "ValueError", "no")


# -- attempts, waits, repetitions --------------------------------------------------------------


def started_by_attempt(records):
    return {record.metadata["attempt"]: record for record in records(RunStarted) if record.task_id}


def make_due(redis):
    """Have everything that is scheduled be due, and put it into its queue, as RQ's scheduler does."""
    registry = rq.registry.ScheduledJobRegistry("q", connection=redis)
    for job_id in redis.zrange(registry.key, 0, -1):
        redis.zadd(registry.key, {job_id: time.time() - 1})
    scheduler = rq.scheduler.RQScheduler(["q"], redis)
    scheduler.acquire_locks()
    scheduler.enqueue_scheduled_jobs()
    scheduler.release_locks()


@pytest.mark.parametrize("kind", [adapter.Queue, rq.Queue])
@pytest.mark.parametrize("in_a_run", [True, False])
def test_an_attempt_knows_the_one_before(redis, records, kind, in_a_run):
    """Each retry names the run of the attempt before, keeps its first parent, and is of the same trace; so is
    a root's."""
    queue = kind("q", connection=redis)
    if in_a_run:
        with WaxellContext("web") as web:
            queue.enqueue(fail, retry=Retry(max=2), meta=adapter.meta())
    else:
        queue.enqueue(fail, retry=Retry(max=2))
    work(redis)
    runs = started_by_attempt(records)
    assert sorted(runs) == [1, 2, 3]
    assert "previous_run_id" not in runs[1].metadata
    assert runs[2].metadata["previous_run_id"] == runs[1].run_id
    assert runs[3].metadata["previous_run_id"] == runs[2].run_id
    assert {run.parent_run_id for run in runs.values()} == {web.run_id if in_a_run else ""}
    assert {run.root_run_id for run in runs.values()} == {web.run_id if in_a_run else runs[1].run_id}
    assert len({run.trace_id for run in runs.values()}) == 1


def test_retries_say_which_and_when(redis, queue, records):
    """A run that will be tried again says which retry comes, of how many, and in how many seconds; the last
    says nothing but its error."""
    queue.enqueue(fail, retry=Retry(max=2, interval=[30, 0]))
    work(redis)
    make_due(redis)
    work(redis)
    assert [end.reason for end in records(RunEnded)] == ["retry: 1 of 2 in 30 s", "retry: 2 of 2", ""]


@pytest.mark.parametrize("kind", [adapter.Queue, rq.Queue])
def test_a_retry_has_waited_since_it_was_due(redis, records, kind):
    """What waits for its interval has not waited, and was due when that is over; also where the worker's
    own queues are RQ's. The next, at once, has no such time."""
    queue = kind("q", connection=redis)
    queue.enqueue(fail, retry=Retry(max=2, interval=[30, 0]))
    work(redis)
    failed_at = records(RunEnded)[0].at
    make_due(redis)
    work(redis)
    second, third = (started_by_attempt(records)[number].metadata for number in (2, 3))
    assert second["eta"] == pytest.approx(failed_at + 30, abs=5)
    assert second["enqueued_at"] == pytest.approx(failed_at, abs=5)
    assert second["wait_s"] == 0, "this test did not wait for the interval"
    assert "eta" not in third
    assert third["enqueued_at"] >= second["enqueued_at"]


def test_what_is_requeued_waits_from_then(redis, queue, records):
    """A job that somebody requeues long after it has failed was not due when it was scheduled first."""
    due = time.time() - 100
    job = queue.enqueue_at(datetime.datetime.fromtimestamp(due), fail)
    make_due(redis)
    work(redis)
    job.refresh()
    job.requeue()
    work(redis)
    first, second = records(RunStarted)
    assert first.metadata["eta"] == int(due)
    assert "eta" not in second.metadata
    assert second.metadata["enqueued_at"] > due + 50
    assert second.metadata["wait_s"] < 60


@pytest.mark.skipif(not RETURNS_RETRIES, reason="RQ 2.1 has it first")
def test_a_returned_retry_says_when(redis, queue, records):
    """A job that returns a `Retry` says which, of how many, and when; the next attempt knows it."""
    queue.enqueue(return_a_late_retry)
    work(redis)
    make_due(redis)
    work(redis)
    assert [end.reason for end in records(RunEnded)] == ["retry: 1 of 2 in 20 s", "retry: 2 of 2 in 20 s"]
    first, second = started_by_attempt(records).values()
    assert second.metadata["previous_run_id"] == first.run_id
    assert second.metadata["eta"] == pytest.approx(records(RunEnded)[0].at + 20, abs=5)


@pytest.mark.skipif(not hasattr(rq, "Repeat"), reason="RQ 2.2 has it first")
@pytest.mark.parametrize("kind", [adapter.Queue, rq.Queue])
def test_repetitions_are_numbered_and_each_begins_at_its_first_attempt(redis, records, kind):
    """A job that repeats keeps its id and its parent: `repeat` counts from 0, attempts from 1 each time, and
    what comes after an interval is due then."""
    queue = kind("q", connection=redis)
    repeat = rq.Repeat(times=2, interval=[40, 50])
    with WaxellContext("web") as web:
        job = queue.enqueue(never_twice, meta=adapter.meta({"own": 1}), retry=Retry(max=1), repeat=repeat)
    work(redis)
    for _ in range(2):
        make_due(redis)
        work(redis)
    runs = [record for record in records(RunStarted) if record.task_id]
    told = [(run.metadata["repeat"], run.metadata["attempt"]) for run in runs]
    assert told == [(0, 1), (0, 2), (1, 1), (2, 1)]
    assert {run.parent_run_id for run in runs} == {web.run_id}
    ends = [end.at for end in records(RunEnded) if end.run_id != web.run_id]
    intervals = [run.metadata["eta"] - end for run, end in zip(runs[2:], ends[1:], strict=False)]
    expected = [40, 50] if rq.__version__ >= "3" else [50, 40]  # RQ 2 takes them from the end
    assert intervals == pytest.approx(expected, abs=5)
    assert [run.metadata.get("previous_run_id") for run in runs] == [None, runs[0].run_id, None, None]
    job.refresh()
    assert job.meta["own"] == 1


def test_a_job_that_depends_waits_from_when_it_was_ready(redis, queue, records):
    """It is a child of the run that made it, names the jobs that it waited for, and its wait begins when
    they had ended."""
    with WaxellContext("web") as web:
        first = queue.enqueue(succeed)
        second = queue.enqueue(succeed, depends_on=first)
        third = queue.enqueue(call, depends_on=[first, second])
    made_at = time.time()
    assert third.get_status() == JobStatus.DEFERRED
    work(redis)
    runs = {record.task_id: record for record in records(RunStarted)}
    ended = {record.run_id: record.at for record in records(RunEnded)}
    last = runs[third.id]
    assert last.parent_run_id == web.run_id
    assert last.metadata["depends_on"] == [first.id, second.id]
    assert "depends_on" not in runs[first.id].metadata
    assert last.metadata["enqueued_at"] >= made_at
    # RQ puts it into the queue as it ends the second: a moment before that run's end.
    assert last.metadata["enqueued_at"] == pytest.approx(ended[runs[second.id].run_id], abs=1)
    assert last.metadata["wait_s"] <= last.at - made_at


def test_a_clock_that_is_ahead_is_no_negative_wait(redis, queue, records):
    """A job that comes from a clock ahead of ours has waited for 0 s, and the skew is told."""
    job = queue.enqueue(succeed)
    job.enqueued_at += datetime.timedelta(seconds=50)
    job.save()
    work(redis)
    [started] = records(RunStarted)
    assert started.metadata["wait_s"] == 0
    assert started.metadata["clock_skew_s"] == pytest.approx(50, abs=20)


def test_what_is_cancelled_before_it_starts_is_no_run(redis, queue, records):
    """RQ takes such a job out of the queue: no worker hears of it."""
    queue.enqueue(succeed).cancel()
    work(redis)
    assert records(RunStarted) == []


# -- whom it is for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "function", "mode"),
    [
        ("parent", "call", "parent"),
        ("link", "call", "link"),
        ("none", "call", "none"),
        ("parent", "linked", "link"),
        ("parent", "unconnected", "none"),
    ],
)
def test_how_a_job_is_connected_is_a_choice(redis, queue, records, monkeypatch, setting, function, mode):
    """`propagate`, globally where a job is enqueued, or by `@options` on its function."""
    settings = dataclasses.replace(collecting.current().settings, propagate=setting)
    monkeypatch.setattr(collecting, "_collector", collecting.Collector(settings))
    with WaxellContext("web", session_id="s-1") as web:
        job = queue.enqueue(globals()[function])
    if setting == "none":
        assert job.meta["waxell"].keys() == {"enqueued_at", "mode"}
    work(redis)
    [child] = [record for record in records(RunStarted) if record.task_id]
    assert child.parent_run_id == (web.run_id if mode == "parent" else "")
    assert (child.trace_id == web.trace_id) == (mode == "parent")
    assert child.metadata.get("linked_run_id") == (web.run_id if mode == "link" else None)
    assert child.session_id == ("" if mode == "none" else "s-1")
    assert child.metadata["wait_s"] >= 0


def test_what_is_known_of_whom_it_is_for_travels(redis, queue, records):
    """Session, user, group, tags and metadata of the run that enqueues are the job's, at each attempt, and
    its children's."""
    about = {"session_id": "s-1", "user_id": "u-1", "user_group": "g-1", "metadata": {"tenant": "acme"}}
    with WaxellContext("web", **about) as web:
        web.set_tag("plan", "pro")
        queue.enqueue(enqueue_another, retry=Retry(max=1))
    work(redis)
    runs = [record for record in records(RunStarted) if record.task_id]
    assert [run.metadata["task"].rpartition(".")[2] for run in runs] == ["enqueue_another"] * 2 + ["succeed"]
    for run in runs:
        assert (run.session_id, run.user_id, run.user_group) == ("s-1", "u-1", "g-1")
        assert (run.tags, run.ambient) == ({"plan": "pro"}, {"tenant": "acme"})
    assert runs[2].parent_run_id == runs[1].run_id


def test_a_web_request_becomes_a_run_when_it_enqueues(redis, queue, records, monkeypatch):
    """Where no run is current, who could make one is asked; also if `meta` is a copy of another job's."""
    with WaxellContext("first"):
        other = queue.enqueue(succeed)
    web = WaxellContext("request")
    token = lineage.origin.set(lambda: web.__enter__())
    try:
        job = queue.enqueue(succeed, meta=other.meta)
    finally:
        lineage.origin.reset(token)
        web.__exit__(None, None, None)
    assert job.meta["waxell"]["run"] == web.run_id
    assert job.meta["traceparent"].split("-")[1] == web.trace_id


def test_a_meta_that_was_made_for_a_thread_counts_there(redis, queue, records):
    """What `meta()` has said inside the run still says it outside, where `Queue` itself knows of no run; what
    was one job's story is not copied."""
    with WaxellContext("web") as web:
        made = adapter.meta()
    made["waxell"] |= {"attempt": 7, "eta": 1.0, "previous": "p", "repeat": 3}
    job = queue.enqueue(succeed, meta=made)
    assert job.meta["waxell"]["run"] == web.run_id
    assert not {"attempt", "eta", "previous", "repeat"} & job.meta["waxell"].keys()


def test_a_job_that_enqueues_itself_is_no_child_of_itself(redis, queue, records):
    """A job that puts itself into the queue once more keeps its parent, which is none here."""
    queue.enqueue(enqueue_itself, queue.name)
    work(redis)
    first, second = records(RunStarted)
    assert (first.parent_run_id, second.parent_run_id) == ("", "")
    assert (second.task_id, second.root_run_id) == (first.task_id, first.run_id)


def test_a_schedule_has_a_name(redis, records):
    """`meta(schedule=…)` names the schedule by which a job comes, in any queue, also RQ's cron's."""
    rq.Queue("q", connection=redis).enqueue(succeed, meta=adapter.meta(schedule="nightly"))
    work(redis)
    [started] = records(RunStarted)
    assert (started.metadata["schedule"], started.parent_run_id) == ("nightly", "")


@pytest.mark.skipif(not HAS_CRON, reason="RQ 2.4 has it first")
def test_jobs_of_rq_s_cron_are_roots(redis, records):
    """RQ's cron takes queues of its own class: its jobs have no parent, and a name if they are given one."""
    import rq.cron

    cron = rq.cron.CronScheduler(connection=redis)
    cron.register(succeed, "q", interval=60, meta=adapter.meta(schedule="nightly"))
    cron.register(call, "q", interval=60)
    with WaxellContext("around"):
        cron.enqueue_jobs()
    work(redis)
    runs = [record for record in records(RunStarted) if record.task_id]
    assert {run.parent_run_id for run in runs} == {""}
    assert [run.metadata.get("schedule") for run in runs] == ["nightly", None]
    assert all(run.metadata["wait_s"] < 60 for run in runs)


# -- callbacks ---------------------------------------------------------------------------------


def on_success(job, connection, result):
    get_context().record_llm_call(model="success")


def on_failure(job, connection, *error):
    get_context().record_llm_call(model="failure")


def be_late(job, connection, *error):
    raise JobTimeoutException("Task exceeded maximum timeout value (5 seconds)")


@pytest.mark.parametrize(("job", "model"), [(succeed, "success"), (fail, "failure")])
@pytest.mark.parametrize("is_async", [True, False])
def test_callbacks_are_part_of_the_run(redis, records, job, model, is_async):
    """What a job's callbacks call belongs to its run, which is still open; without a worker, too."""
    queue = adapter.Queue("q", connection=redis, is_async=is_async)
    queue.enqueue(job, on_success=Callback(on_success), on_failure=Callback(on_failure))
    work(redis)
    [started] = records(RunStarted)
    assert [(made.run_id, made.model) for made in records(LLMCall)] == [(started.run_id, model)]


# -- reasons -----------------------------------------------------------------------------------


def be_limited():
    raise JobTimeoutException("Task exceeded maximum timeout value (7 seconds)")


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (succeed, ""),
        (fail, ""),
        (be_interrupted, ""),  # the words are the user's
        (be_limited, "error: time limit of 7 s"),
        (leave, "interrupted: SystemExit went through the job"),
    ],
)
def test_a_reason_where_no_error_says_it(redis, queue, records, job, reason):
    """A time limit names its seconds; what goes through a job is named; an error speaks for itself."""
    queue.enqueue(job)
    work(redis)
    assert [end.reason for end in records(RunEnded)] == [reason]


def test_a_callback_s_time_limit_is_its_own(redis, queue, records):
    """A callback that is late fails the job, by its own limit and not by the job's."""
    queue.enqueue(succeed, job_timeout=100, on_success=Callback(be_late))
    work(redis)
    [end] = records(RunEnded)
    assert (end.state, end.reason) == ("error", "error: time limit of 5 s")


def test_a_second_sigterm_in_a_simple_worker_is_the_reason(redis, queue, records):
    """What RQ's handler of a second SIGTERM raises is RQ's doing, and the run says so."""
    worker = adapter.SimpleWorker(["q"], connection=redis)
    worker._shutdown_requested_date = datetime.datetime.now(datetime.timezone.utc)
    for job in (leave_without_a_word, leave):
        worker.execute_job(queue.enqueue(job), queue)
    assert [end.reason for end in records(RunEnded)] == [
        "interrupted: the worker was told twice to stop",
        "interrupted: SystemExit went through the job",
    ]


def test_a_dead_work_horse_s_job_is_tried_again(redis, queue, records):
    """RQ tries such a job again where a retry is left: its attempt counts, though no run is known here."""
    worker = adapter.Worker(["q"], connection=redis)
    with WaxellContext("web") as web:
        queue.enqueue(fail, retry=Retry(max=2))
    work(redis)
    with WaxellContext("around the worker"):
        own = {"run": web.run_id, "previous": "p"}
        plain = rq.Queue("q", connection=redis)
        job = plain.enqueue(fail, retry=Retry(max=1), meta={"waxell": own})
        worker.handle_job_failure(job, queue, exc_string="gone")
    stored = Job.fetch(job.id, connection=redis)
    assert stored.meta["waxell"]["attempt"] == 2
    assert "previous" not in stored.meta["waxell"]


def test_an_abandoned_job_s_next_run_is_of_the_same_attempt(redis, queue, records):
    """A job whose worker has died is put back by another's clean-up, which nobody can follow: the next run
    is the attempt once more, and waits from then."""
    with WaxellContext("web") as web:
        job = queue.enqueue_in(datetime.timedelta(seconds=-100), call, retry=Retry(max=2))
    make_due(redis)
    redis.lpop(queue.key)
    job.refresh()
    with redis.pipeline() as pipeline:
        job.prepare_for_execution("dead-worker", pipeline)
        pipeline.execute()
    registry = queue.started_job_registry
    redis.zadd(registry.key, {ABANDONED.format(job.id): 1})
    registry.cleanup()
    work(redis)
    [started] = [record for record in records(RunStarted) if record.task_id]
    assert (started.metadata["attempt"], started.parent_run_id) == (1, web.run_id)
    assert "eta" not in started.metadata
    assert started.metadata["wait_s"] < 60


# -- what is foreign or broken -----------------------------------------------------------------

FOREIGN = [
    "text",
    ["list"],
    7,
    None,
    {1: 2},
    {"attempt": "two", "eta": "soon", "enqueued_at": [], "repeat": {}, "schedule": 7, "previous": 1},
    {"attempt": -1, "eta": float("nan"), "enqueued_at": float("inf"), "run": "\x00", "trace": 9},
    {"attempt": True, "eta": 1e300, "enqueued_at": -1.0, "tags": [], "metadata": "x", "session": b"y"},
    {"attempt": 1 << 80, "eta": -1, "enqueued_at": 1.0, "repeat": 1 << 80},
]


@pytest.mark.parametrize("header", FOREIGN, ids=repr)
def test_a_foreign_header_is_never_fatal(redis, records, header):
    """Whatever stands under our key, the job runs, is tried again, and is a run with a number each time."""
    job = rq.Queue("q", connection=redis).enqueue(
        fail, retry=Retry(max=1), meta={"waxell": header, "traceparent": header, "own": 1}
    )
    work(redis)
    assert {end.state for end in records(RunEnded)} == {"retry", "error"}
    assert sorted(started_by_attempt(records)) == [1, 2]
    job.refresh()
    assert job.meta["own"] == 1


@pytest.mark.parametrize("header", FOREIGN, ids=repr)
@pytest.mark.parametrize("in_a_run", [True, False])
def test_a_foreign_header_is_never_fatal_where_one_enqueues(redis, queue, records, header, in_a_run):
    """Nor does it keep anybody from enqueuing."""
    with WaxellContext("web") if in_a_run else contextlib.nullcontext():
        queue.enqueue(succeed, meta={"waxell": header})
        queue.enqueue_in(datetime.timedelta(seconds=-1), succeed, meta={"waxell": header})
    make_due(redis)
    work(redis)
    assert [end.state for end in records(RunEnded) if end.run_id in _ids(records)] == ["success"] * 2


def _ids(records):
    return {record.run_id for record in records(RunStarted) if record.task_id}


@pytest.mark.parametrize("foreign", ["text", ["a", "list"]])
def test_a_meta_that_is_no_dict_is_left_alone(redis, queue, records, foreign):
    """RQ takes more than a dict as `meta`; that stays as it is, and the job runs."""
    with WaxellContext("web"):
        job = queue.enqueue(never_twice, meta=foreign, retry=Retry(max=1))
        queue.enqueue_in(datetime.timedelta(hours=1), succeed, meta=foreign)
    work(redis)
    job.refresh()
    assert job.meta == foreign
    assert [end.state for end in records(RunEnded) if end.run_id in _ids(records)] == ["retry", "success"]


def test_a_meta_that_cannot_be_read_is_left_alone(redis, queue, records):
    """A `meta` that this process cannot unpickle is nobody's to change; the job runs, and is tried again."""
    job = queue.enqueue(never_twice, retry=Retry(max=1))
    redis.hset(job.key, "meta", b"not a pickle")
    work(redis)
    assert [end.state for end in records(RunEnded)] == ["retry", "success"]
    if rq.__version__ >= "3":
        assert redis.hget(job.key, "meta") == b"not a pickle"


def test_a_time_at_the_end_of_times_is_none(redis, queue, records):
    """Whatever date RQ takes, we take; one that has no Unix time here is none."""
    job = queue.enqueue_at(datetime.datetime.max.replace(tzinfo=datetime.timezone.utc), succeed)
    assert "waxell" in job.meta
    assert adapter._due(datetime.datetime.min) is None


def test_where_it_is_switched_off_nothing_is_touched(redis, queue, monkeypatch):
    """With `observe` off a job's `meta` is what the user has made of it, also when it is tried again."""
    settings = dataclasses.replace(collecting.current().settings, observe=False)
    monkeypatch.setattr(collecting, "_collector", collecting.Collector(settings))
    own = {"own": 1}
    jobs = [queue.enqueue(fail, retry=Retry(max=1), meta=own), queue.enqueue_in(SOON, succeed, meta=own)]
    work(redis)
    for job in jobs:
        job.refresh()
        assert job.meta == own
    assert adapter.meta(own, schedule="nightly") == own


@pytest.mark.parametrize("observe", ["true", "false"])
def test_a_process_that_is_no_worker_only_enqueues(broker, in_a_web_process, observe):
    """In a web process the import does nothing but name runs: no file, no thread, nothing instrumented."""
    code = (
        "import json, sys, threading, openai, waxell_workers.rq\n"
        "from redis import Redis\n"
        "from waxell_workers.core import collector\n"
        "connection = Redis.from_url(sys.argv[1])\n"
        "job = waxell_workers.rq.Queue('web', connection=connection).enqueue('a.b', meta={'own': 1})\n"
        "assert collector.configured() is None and threading.active_count() == 1\n"
        "assert 'opentelemetry.instrumentation' not in sys.modules, 'the SDK was instrumented'\n"
        "print(json.dumps(job.meta))\n"
    )
    assert in_a_web_process(code, broker, observe=observe) == {"own": 1}
