"""The Celery adapter in one process: eager tasks, messages, and what the main process says of the dead.

Real workers are in `tests/acceptance`.
"""

from __future__ import annotations

import copy
import gc
import threading
import uuid
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import pytest
from billiard.exceptions import SoftTimeLimitExceeded, Terminated
from celery import Celery, signals
from celery.app.task import Context
from celery.app.trace import build_tracer
from celery.beat import Scheduler, Service
from celery.exceptions import Ignore, Reject, Retry, TimeLimitExceeded, WorkerLostError
from celery.worker.heartbeat import Heart
from gevent import GreenletExit
from kombu.asynchronous.timer import Timer

import waxell_workers.celery
from waxell_workers import WaxellContext, _celery_ends, get_context, options
from waxell_workers.core import launch
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
    ("error", "state", "reason"),
    [
        (ValueError("no"), "error", ""),
        (SoftTimeLimitExceeded(), "error", "error: soft time limit of 7 s"),
        (Ignore(), "ignored", "ignored: the task asked for it"),
        (Ignore("Replaced by new task"), "ignored", "ignored: replaced by another task"),
        (Reject("no"), "rejected", "rejected, dropped"),
        (Reject("no", requeue=True), "rejected", "rejected, requeued"),
        (None, "success", ""),
    ],
)
def test_states(app, records, error, state, reason):
    """What Celery makes of a task is the run's state; its control-flow exceptions pass through."""

    @app.task(name="t.task", soft_time_limit=7)
    def task():
        if error is not None:
            raise error

    task.apply()
    [end] = records(RunEnded)
    assert (end.state, end.reason) == (state, reason)
    kind = {ValueError: "ValueError", SoftTimeLimitExceeded: "billiard.exceptions.SoftTimeLimitExceeded"}
    assert end.error_type == kind.get(type(error), "")
    assert end.error_message == ("no" if type(error) is ValueError else "")


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
    """A message that is sent inside a run names it; outside any run, it keeps what it carries."""
    headers = {}
    with WaxellContext("web") as run:
        signals.before_task_publish.send(sender="t", headers=headers)
    assert headers["waxell"]["run"] == run.run_id
    assert headers["traceparent"].split("-")[1] == run.trace_id
    first = headers["waxell"]["enqueued_at"]
    signals.before_task_publish.send(sender="t", headers=headers)
    assert headers["waxell"]["run"] == run.run_id
    assert headers["waxell"]["enqueued_at"] > first


def test_another_tracer_s_traceparent_is_left_alone(records):
    """A `traceparent` that somebody else has put there stays."""
    headers = {"traceparent": "theirs"}
    with WaxellContext("web"):
        signals.before_task_publish.send(sender="t", headers=headers)
    assert headers["traceparent"] == "theirs"


class Received:
    """What the main process has of a message."""

    def __init__(self, task_id, **headers):
        self.id = task_id
        self.request_dict = {"id": task_id, **headers}


def test_a_lost_task_is_reported_once(app, records):
    """A hard time limit is reported twice by Celery, by two errors, and once by us; the next delivery, which
    may be killed as well, is another matter."""

    @app.task(name="t.task")
    def task():
        pass

    for number in range(2):
        received = Received("the-id")
        signals.task_received.send(sender=None, request=received)
        for _ in range(2):
            error = TimeLimitExceeded(30) if number else WorkerLostError("exited: signal 9 (SIGKILL) Job: 1.")
            signals.task_failure.send(sender=task, task_id="the-id", exception=error)
    signals.task_failure.send(sender=task, task_id="another", exception=WorkerLostError("exitcode 3"))
    told = [(lost.task_id, lost.reason) for lost in records(TaskLost)]
    assert told == [
        ("the-id", "signal 9, probably out of memory"),
        ("the-id", "hard time limit of 30 s"),
        ("another", "the process ended with exit code 3"),
    ]


def test_what_the_main_process_retries_is_lost_all_the_same(app, records):
    """`retry_on_worker_lost`: Celery sends no `task_failure` then."""

    @app.task(name="t.task")
    def task():
        pass

    request = Context({"id": "the-id", "retries": 0})
    reason = Retry(exc=WorkerLostError("signal 11 (SIGSEGV)"), when=180)
    signals.task_retry.send(sender=task, request=request, reason=reason)
    [lost] = records(TaskLost)
    assert (lost.task_id, lost.reason) == ("the-id", "signal 11 (SIGSEGV), a crash in native code")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeLimitExceeded(0.5), "hard time limit of 0.5 s"),
        (TimeLimitExceeded(), "hard time limit of unknown length"),
        (WorkerLostError("Worker exited prematurely: signal 15 (SIGTERM) Job: 9."), "signal 15 (SIGTERM)"),
        (WorkerLostError("Worker exited prematurely: signal 63 Job: 9."), "signal 63"),
        (WorkerLostError("Worker exited prematurely: signal 241."), "the process was stopped by SIGTERM"),
        (
            WorkerLostError("Worker exited prematurely: exitcode 0 Job: 9."),
            "the process ended with exit code 0",
        ),
        (WorkerLostError("Worker exited prematurely: exitcode None."), "the worker has lost the process"),
        (WorkerLostError(), "the worker has lost the process"),
        (Terminated("SIGTERM"), "terminated by SIGTERM"),
        (Terminated("secret words"), "terminated by a signal"),
    ],
)
def test_a_death_in_words(error, words):
    """What Celery and billiard have for it, for people; a text that is none of theirs is not repeated."""
    assert _celery_ends.killed(error) == words


@pytest.mark.parametrize(
    ("when", "max_retries", "words"),
    [
        (30, 3, "retry: attempt 2 of 4 in 30 s"),
        (0, 3, "retry: attempt 2 of 4 at once"),
        (1.25, None, "retry: attempt 2 in 1.2 s"),
        (None, 3, "retry: attempt 2 of 4"),
        (datetime.now(timezone.utc) - timedelta(seconds=9), 3, "retry: attempt 2 of 4 at once"),
        ("soon", 3, "retry: attempt 2 of 4"),
    ],
)
def test_a_retry_in_words(app, records, when, max_retries, words):
    """When the next attempt is, and how many there may be."""

    @app.task(name="t.task", max_retries=max_retries)
    def task():
        if task.request.retries == 0:
            raise Retry(exc=KeyError("gone"), when=when)

    task.apply()
    assert [end.reason for end in records(RunEnded)] == [words]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SystemExit(-241), "interrupted: the worker was told to stop"),
        (GreenletExit(), "interrupted: the worker was told to stop"),
        (SystemExit(3), "interrupted: the task asked for the end of its process"),
        (KeyboardInterrupt(), "interrupted: KeyboardInterrupt"),
        (type("Secret", (BaseException,), {})(), "interrupted"),
    ],
)
def test_what_goes_through_a_task_is_told(app, records, error, words):
    """It is no `Exception`: Celery says no state, and lets it go on."""

    @app.task(name="t.task")
    def task():
        raise error

    with pytest.raises(type(error)):
        task.apply()
    [end] = records(RunEnded)
    assert (end.state, end.reason) == ("interrupted", words)


def test_a_failure_of_celery_s_own_is_an_error(traced, records):
    """Where the result cannot be stored that says that the task has failed, Celery names no state."""

    def refuse(*_, **__):
        del task.app.backend.mark_as_failure
        raise ConnectionError("the backend is away")

    task = traced(lambda: 1 / 0)
    task.app.backend.mark_as_failure = refuse
    with pytest.warns(RuntimeWarning, match="raised outside body"):
        task.execute()
    [end] = records(RunEnded)
    assert (end.state, end.error_type, end.reason) == ("error", "ConnectionError", "")


def test_a_task_whose_successor_celery_cannot_send_has_failed(traced, records):
    """As Celery has it: the task's body is through, but its state is FAILURE and the chain ends there."""
    task = traced(lambda: 1)
    following = traced(lambda: 2).si(1)  # takes no arguments
    with pytest.warns(RuntimeWarning, match="raised outside body"):
        task.execute({"chain": [following]})
    assert task.AsyncResult("the-id").state == "FAILURE"
    [end] = records(RunEnded)
    assert (end.state, end.error_type) == ("error", "TypeError")


def test_what_the_caller_of_an_eager_task_handles_is_no_error_of_its_own(app, records):
    """The task has succeeded, also where it was called because something else had failed."""

    @app.task(name="t.task")
    def task():
        return 1

    try:
        raise KeyError("the caller's")
    except KeyError:
        task.delay()
    [end] = records(RunEnded)
    assert (end.state, end.error_type) == ("success", "")


# -- lineage -----------------------------------------------------------------------------------


@pytest.fixture
def traced():
    """Make a task that is executed as a pool process does it; messages go to a broker in memory."""
    with Celery("traced", broker="memory://", backend="cache+memory://", set_as_current=False) as app:

        def make(body, **options):
            body.__name__ = "body"  # Celery makes a function of that name
            task = app.task(body, name=f"t-{uuid.uuid4().hex}", shared=False, **options)

            def execute(request=None):
                told = {"id": "the-id", "task": task.name, "delivery_info": {}, **(request or {})}
                return build_tracer(task.name, task, app=app)(told["id"], (), {}, told)

            task.execute = execute
            return task

        yield make


@pytest.fixture
def published():
    """The headers of each message, as they are when they leave."""
    found = []

    def note(headers, **_):
        found.append(dict(headers))

    signals.after_task_publish.connect(note, weak=False)
    yield found
    signals.after_task_publish.disconnect(note)


@pytest.mark.parametrize("protocol", [1, 2])
def test_a_retry_names_its_attempt_and_keeps_its_parent(traced, published, records, protocol):
    """Even if it is sent inside a block of the user's; the user's headers go on as well."""
    own = {"enqueued_at": 1.0, "run": "r1", "root": "r0", "trace": "ab" * 16, "previous": "older"}

    def body(self):
        with WaxellContext("block"):
            raise self.retry(countdown=0)

    task = traced(body, bind=True)
    task.app.conf.task_protocol = protocol  # 1 has the id in the body
    task.execute({"waxell": own, "theirs": [1]})
    [run, block] = records(RunStarted)
    [again] = published
    assert block.parent_run_id == run.run_id
    assert again["theirs"] == [1]
    assert again["waxell"] == own | {"previous": run.run_id, "enqueued_at": again["waxell"]["enqueued_at"]}


def test_what_a_task_sends_under_its_own_id_is_no_retry(traced, published, records):
    """`replace` is the case: the second attempt's successor counts its attempts anew."""

    def body(self):
        raise self.replace(self.si())

    traced(body, bind=True).execute({"retries": 1, "waxell": {"run": "r1"}})
    [run] = records(RunStarted)
    assert published[0]["id"] == "the-id"
    assert published[0]["waxell"]["run"] == run.run_id


def test_a_message_of_the_main_process_keeps_what_is_still_true(app, records):
    """It sends once more what a lost process was at: whose attempt that was, it does not know."""
    headers = {"id": "t", "retries": 2, "waxell": {"run": "r1", "previous": "the first attempt"}}
    signals.before_task_publish.send(sender="t", headers=headers)
    assert headers["waxell"]["run"] == "r1"
    assert "previous" not in headers["waxell"]


def test_the_errback_of_a_lost_task_keeps_its_story(app, records):
    """What its message carried goes on, but for the parent, who was another's."""
    own = {"enqueued_at": 1.0, "run": "r1", "root": "r0", "trace": "ab" * 16, "user": "u", "previous": "p"}
    lost = Received("lost", waxell=own)
    signals.task_received.send(sender=None, request=lost)
    for parent_id, expected in (("lost", {"root": "r0", "trace": "ab" * 16, "user": "u"}), ("other", {})):
        headers = {"id": "t", "parent_id": parent_id}
        signals.before_task_publish.send(sender="t", headers=headers)
        del headers["waxell"]["enqueued_at"]
        assert headers["waxell"] == expected


def test_a_worker_that_has_lost_its_broker_looks_after_the_shipper(app, configure, monkeypatch):
    """Celery 5.3 clears its timer then: heartbeats begin anew, and without them there are messages."""
    dispatcher = SimpleNamespace(
        enabled=True, on_enabled=set(), on_disabled=set(), send=lambda *_, **__: None
    )
    started = []
    monkeypatch.setattr(launch, "start", lambda *_, **__: started.append(1))
    for is_told in (
        Heart(Timer(), dispatcher).start,
        lambda: signals.task_received.send(sender=None, request=Received("t")),
    ):
        configure(shipper="process")
        is_told()
        assert started.pop()


def test_what_celery_has_of_a_message_is_not_kept(records):
    """It goes when Celery is through with it."""
    received = Received("short-lived")
    signals.task_received.send(sender=None, request=received)
    assert "short-lived" in waxell_workers.celery._received
    del received
    gc.collect()
    assert "short-lived" not in waxell_workers.celery._received


def test_the_user_s_dict_is_left_as_it_is(traced, published, records):
    """Sent twice, with a header of ours in it that was copied from another message."""
    task = traced(lambda: None)
    theirs = {"waxell": {"run": "copied", "tags": {"k": "v"}}, "theirs": {"a": 1}}
    before = copy.deepcopy(theirs)
    for name in ("one", "two"):
        with WaxellContext(name):
            task.apply_async(headers=theirs)
    assert theirs == before
    runs = [record.run_id for record in records(RunStarted)]
    assert [headers["waxell"]["run"] for headers in published] == runs
    assert all(headers["theirs"] == {"a": 1} and "tags" not in headers["waxell"] for headers in published)


def test_eager_attempts_know_each_other(app, records):
    """They are children of what they run in, whatever headers they were given, and one story without it."""
    theirs = {"waxell": {"run": "copied", "previous": "copied"}, "theirs": 1}

    @app.task(name="t.flaky", bind=True)
    def flaky(self):
        assert self.request.headers["theirs"] == 1
        if self.request.retries < 2:
            raise self.retry(exc=KeyError("gone"), countdown=0)

    flaky.apply_async(headers=theirs)
    with WaxellContext("outer") as outer:
        flaky.apply(headers=theirs)
    runs = records(RunStarted)
    alone, inside = runs[:3], runs[4:]
    assert {run.parent_run_id for run in alone} == {""}
    assert {(run.root_run_id, run.trace_id) for run in alone} == {(alone[0].run_id, alone[0].trace_id)}
    assert {run.parent_run_id for run in inside} == {outer.run_id}
    for attempts in (alone, inside):
        previous = [run.metadata.get("previous_run_id") for run in attempts]
        assert previous == [None, attempts[0].run_id, attempts[1].run_id]
    assert theirs == {"waxell": {"run": "copied", "previous": "copied"}, "theirs": 1}


HOSTILE = (
    None,
    "x",
    7,
    1e308,
    float("nan"),
    [],
    [1],
    {},
    {"run": {}},
    {"run": "r" * 5000, "trace": "?"},
    b"\xff",
)


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("protocol", [1, 2])
def test_a_broken_message_is_still_a_run(traced, records, value, protocol):
    """Whatever stands in its headers, the task is executed, recorded, and may send on."""
    done = []
    names = (
        "waxell",
        "traceparent",
        "tracestate",
        "retries",
        "parent_id",
        "root_id",
        "group",
        "origin",
        "get",
    )
    names += ("periodic_task_name", "celery_beat_task", "replaced_task_nesting", "is_eager")
    for name in names:
        broken = {name: value}
        headers = {"headers": broken} if protocol == 1 else {**broken, "headers": broken}
        if name in ("retries", "root_id"):  # of the message itself
            headers = broken

        def body(name=name, broken=broken):
            done.append(name)
            get_context().record_llm_call(model=name)
            message = {**broken, "id": "the-id"}
            signals.before_task_publish.send(sender="t", headers=message, body=None)
            assert message["waxell"]["run"] == get_context().run_id

        traced(body).execute(headers)
        signals.before_task_publish.send(sender="t", headers={}, body=broken)
        signals.before_task_publish.send(sender="t", headers={**broken}, body=value)
    assert done == list(names)
    runs = {record.run_id: record for record in records(RunStarted)}
    assert {runs[call.run_id].metadata["task_id"] for call in records(LLMCall)} == {"the-id"}
    assert len(runs) == len(records(LLMCall)) == len(names)
    assert [end.state for end in records(RunEnded)] == ["success"] * len(names)


@pytest.mark.parametrize(
    "headers", [{}, {"id": 1}, {"task": "t"}, {"task": "t", "retries": "x", "get": 1}, None]
)
def test_an_unknown_task_of_a_broken_message_is_told(records, headers):
    """Protocol 2, or 1, or neither."""
    message = SimpleNamespace(headers=headers, payload={"task": "t", "id": "x"}, delivery_info=None)
    signals.task_unknown.send(sender=None, message=message, exc=KeyError(), name="t", id="the-id")
    [end] = records(RunEnded)
    assert (end.state, end.reason) == ("rejected", "rejected: no task of this name in this worker")
    [start] = records(RunStarted)
    assert (start.agent_name, start.task_id) == ("t", "the-id")


def test_switched_off_an_eager_retry_has_the_user_s_headers_alone(app, configure):
    """As `Celery` itself gives them on."""
    configure(observe=False)
    seen = []

    @app.task(name="t.flaky", bind=True)
    def flaky(self):
        seen.append(self.request.headers)
        if self.request.retries == 0:
            raise self.retry(countdown=0)

    flaky.apply_async(headers={"theirs": 1})
    assert [sorted(headers) for headers in seen] == [["theirs"], ["theirs"]]


def test_a_schedule_is_told_by_whoever_knows_it(traced, records):
    """By us in beat, at each attempt, or by django-celery-beat; beat's own mark says nothing."""
    task = traced(lambda: None)
    task.execute({"waxell": {"schedule": "nightly"}, "celery_beat_task": True})
    task.execute({"periodic_task_name": "theirs", "waxell": {"schedule": 1}})
    task.execute({"celery_beat_task": True})
    assert [record.metadata.get("schedule") for record in records(RunStarted)] == ["nightly", "theirs", None]


@pytest.mark.parametrize("ours", [True, False], ids=["Celery's scheduler", "somebody's"])
def test_beat_tells_the_entry_that_is_due(app, monkeypatch, ours):
    """Of two that send the same task, in the thread of beat alone; another's scheduler is not asked."""
    entry = {"task": "t", "schedule": 60.0, "options": {"headers": {"theirs": 1}}}
    app.conf.beat_schedule = {"one": entry, "two": entry, "other": {"task": "other", "schedule": 1.0}}
    kind = Scheduler if ours else type("Theirs", (Scheduler,), {"schedule": property(lambda _: 1 / 0)})
    monkeypatch.setattr(waxell_workers.celery, "_beats", {})
    scheduler = Scheduler(app)
    app.finalized = True  # the tasks of other tests are not to be known here
    service = Service(app)
    service.scheduler = scheduler if ours else object.__new__(kind)
    signals.beat_init.send(sender=service)
    sent = []

    def send_task(name, *_, headers=None, **__):
        message = {**headers}
        signals.before_task_publish.send(sender=name, headers=message)
        sent.append((message["theirs"], message["waxell"].get("schedule")))

    monkeypatch.setattr(scheduler, "send_task", send_task)
    for name in ("one", "two", "one"):
        scheduler.apply_async(scheduler.schedule[name], advance=True)
    names = ("one", "two", "one") if ours else ("", "", "")
    assert sent == [(1, name) for name in names]
    headers = {}
    thread = threading.Thread(
        target=signals.before_task_publish.send, args=("t",), kwargs={"headers": headers}
    )
    thread.start()
    thread.join()
    assert "schedule" not in headers["waxell"]


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
