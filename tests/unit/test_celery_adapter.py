"""The Celery adapter in one process: eager tasks, messages, and what the main process says of the dead.

Real workers are in `tests/acceptance`.
"""

from __future__ import annotations

import pytest
from celery import Celery, signals
from celery.exceptions import Ignore, Reject, WorkerLostError

import waxell_workers.celery
from waxell_workers import WaxellContext, get_context, options
from waxell_workers.core.records import LLMCall, RunEnded, RunStarted, TaskLost


@pytest.fixture
def app():
    app = Celery("t", broker="memory://", set_as_current=False)
    app.conf.task_always_eager = True
    yield app
    app.close()


def test_an_eager_task_is_a_run_of_its_own(app, records):
    """An eager task called inside a run is its child, and the outer run is current again afterwards."""

    @app.task(name="t.inner")
    def inner():
        get_context().record_llm_call(model="m")

    with WaxellContext("outer") as outer:
        inner.delay()
        assert get_context() is outer
    started = {record.agent_name: record for record in records(RunStarted)}
    assert started["t.inner"].parent_run_id == started["outer"].run_id
    assert [call.run_id for call in records(LLMCall)] == [started["t.inner"].run_id]
    assert get_context() is None


@pytest.mark.parametrize(
    ("error", "state"),
    [(ValueError("no"), "error"), (Ignore(), "ignored"), (Reject("no"), "rejected"), (None, "success")],
)
def test_states(app, records, error, state):
    """What Celery makes of a task is the run's state; its control-flow exceptions pass through."""

    @app.task(name="t.task")
    def task():
        if error is not None:
            raise error

    task.apply()
    [end] = records(RunEnded)
    assert end.state == state
    assert (end.error_type, end.error_message) == (("ValueError", "no") if state == "error" else ("", ""))


def test_each_attempt_is_a_run(app, records):
    """A task that is retried has a run an attempt, the first with the reason."""

    @app.task(name="t.flaky", bind=True)
    def flaky(self):
        if self.request.retries == 0:
            raise self.retry(exc=KeyError("gone"), countdown=0)

    flaky.apply()
    attempts = {record.run_id: record.metadata["attempt"] for record in records(RunStarted)}
    ends = {attempts[record.run_id]: (record.state, record.error_type) for record in records(RunEnded)}
    assert ends == {1: ("retry", "KeyError"), 2: ("success", "")}


@pytest.mark.parametrize("how", ["excluded", "marked"])
def test_what_is_not_recorded_leaves_nothing(app, records, how):
    """An excluded task leaves no run, and its calls do not turn up as calls outside any run either."""

    @app.task(name="t.secret" if how == "excluded" else "t.task")
    @options(record=how != "marked")
    def task():
        waxell_workers.record_llm_call(model="m")
        get_context().set_tag("a", 1)

    task.delay()
    assert records(RunStarted) + records(LLMCall) + records(RunEnded) == []


def test_arguments_are_content(app, records, configure):
    """Arguments are recorded only if content is captured."""

    @app.task(name="t.task")
    def task(number, text):
        pass

    task.delay(1, text="x")
    configure(capture_content=True)
    task.delay(1, text="x")
    assert [record.inputs for record in records(RunStarted)] == [{}, {"args": [1], "kwargs": {"text": "x"}}]


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("above", [True, False], ids=["above @app.task", "below it"])
def test_a_task_chooses_its_content(app, records, configure, wanted, above):
    """`@options(capture_content=…)` beats the setting, for arguments, errors, and a task inside."""
    configure(capture_content=not wanted)
    mark = options(capture_content=wanted)

    @app.task(name="t.inner")
    def inner():
        raise ValueError("x" * 300)

    @app.task(name="t.plain")
    def plain(text):
        pass

    def chosen(text):
        inner.apply()
        raise ValueError("x" * 300)

    make = app.task(name="t.chosen")
    task = mark(make(chosen)) if above else make(mark(chosen))
    task.delay("text")
    plain.delay("text")
    inputs = {record.agent_name: bool(record.inputs) for record in records(RunStarted)}
    assert inputs == {"t.chosen": wanted, "t.inner": wanted, "t.plain": not wanted}
    names = {record.run_id: record.agent_name for record in records(RunStarted)}
    errors = {names[end.run_id]: len(end.error_message) for end in records(RunEnded) if end.state == "error"}
    assert errors == dict.fromkeys(("t.chosen", "t.inner"), 300 if wanted else 200)


def test_a_message_carries_its_lineage(records):
    """A message that is sent inside a run names it; sent again, it keeps its first parent."""
    headers = {}
    with WaxellContext("web") as run:
        signals.before_task_publish.send(sender="t", headers=headers)
    assert headers["waxell"]["parent"] == run.run_id
    assert headers["traceparent"].split("-")[1] == run.trace_id
    first = headers["waxell"]["enqueued_at"]
    with WaxellContext("worker"):
        signals.before_task_publish.send(sender="t", headers=headers)
    assert headers["waxell"]["parent"] == run.run_id
    assert headers["waxell"]["enqueued_at"] > first


def test_another_tracer_s_traceparent_is_left_alone(records):
    """A `traceparent` that somebody else has put there stays."""
    headers = {"traceparent": "theirs"}
    with WaxellContext("web"):
        signals.before_task_publish.send(sender="t", headers=headers)
    assert headers["traceparent"] == "theirs"


def test_a_lost_task_is_reported_once(app, records):
    """A hard time limit is reported twice by Celery, and once by us."""

    @app.task(name="t.task")
    def task():
        pass

    for _ in range(2):
        signals.task_failure.send(
            sender=task,
            task_id="the-id",
            exception=WorkerLostError("signal 9"),
        )
    assert [(lost.task_id, lost.reason) for lost in records(TaskLost)] == [("the-id", "signal 9")]


@pytest.mark.parametrize(("observe", "expected"), [("true", ["waxell"]), ("false", [])])
def test_a_process_that_is_no_worker_only_adds_headers(in_a_web_process, observe, expected):
    """In a web process the import adds headers, if that: no file, no thread, nothing instrumented."""
    code = (
        "import json, sys, threading, openai, waxell_workers.celery\n"
        "from celery import signals\n"
        "from waxell_workers.core import collector\n"
        "headers = {}\n"
        "signals.before_task_publish.send(sender='t', headers=headers)\n"
        "assert collector.configured() is None and threading.active_count() == 1\n"
        "assert 'opentelemetry' not in sys.modules, 'the SDK was instrumented'\n"
        "print(json.dumps(sorted(headers)))\n"
    )
    assert in_a_web_process(code, observe=observe) == expected
