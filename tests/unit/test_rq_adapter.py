"""The RQ adapter in one process: a SimpleWorker over a real Valkey, queues without a worker, and what is said
of the dead.

Real workers are in `tests/acceptance`, and in the conformance suite.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
from pathlib import Path

import pytest
import rq
from redis import Redis
from rq.job import Job, JobStatus, Retry
from rq.timeouts import BaseDeathPenalty, JobTimeoutException

import waxell_workers.rq as adapter
from waxell_workers import WaxellContext, get_context, options
from waxell_workers.core import collector as collecting
from waxell_workers.core.records import LLMCall, RunEnded, RunStarted, TaskLost
from waxell_workers.testing.conformance.stage import children_in, start_valkey

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:rq")  # RQ 1.16 uses what it deprecates
PACKAGE = str(Path(adapter.__file__).parent)
RETURNS_RETRIES = hasattr(rq.worker.BaseWorker, "handle_job_retry")


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
    ("ret_val", "reason"),
    [
        (9, "killed by signal 9 (SIGKILL)"),
        (3 << 8, "the work-horse ended with status 3"),
        (None, "killed by RQ: it went on for more than 60 s after its time limit of 180 s"),
    ],
)
def test_a_killed_work_horse_has_a_reason(redis, queue, records, ret_val, reason):
    """The worker says why a work-horse is gone, and RQ's own handler is called as ever."""
    called = []
    worker = adapter.Worker(
        ["q"], connection=redis, work_horse_killed_handler=lambda *args: called.append(args)
    )
    job = queue.enqueue(succeed)
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
}


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
    assert stored["waxell"]["parent"] == run.run_id
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
    assert (job.meta["waxell"]["parent"], job.meta["own"]) == (second.run_id, 1)
    assert job.meta["traceparent"].split("-")[1] == second.trace_id


def test_the_helper_is_for_queues_of_other_classes(redis, records):
    """`meta()` does the same where the queue is not ours, and leaves another tracer's traceparent alone."""
    with WaxellContext("web") as run:
        job = rq.Queue("q", connection=redis).enqueue(
            succeed, meta=adapter.meta({"traceparent": "theirs", "own": 1})
        )
    assert job.meta["waxell"]["parent"] == run.run_id
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
    assert started.metadata["eta"] == pytest.approx(due, abs=0.01)
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
