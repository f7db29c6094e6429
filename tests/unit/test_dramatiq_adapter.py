"""The Dramatiq middleware in one process: a stub broker and Dramatiq's own worker threads.

Real workers and brokers are in the conformance suite and in `tests/acceptance`.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import threading
import time
from pathlib import Path

import dramatiq
import pytest
from dramatiq import GenericActor, Middleware, Worker
from dramatiq.asyncio import get_event_loop_thread
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import (
    AsyncIO,
    CurrentMessage,
    GroupCallbacks,
    Retries,
    Shutdown,
    SkipMessage,
    TimeLimitExceeded,
)
from dramatiq.rate_limits.backends import StubBackend
from dramatiq.worker import _ConsumerThread, _WorkerThread

import waxell_workers
from waxell_workers import WaxellContext, get_context, options
from waxell_workers.core import collector as collecting
from waxell_workers.core import runs
from waxell_workers.core.config import Settings
from waxell_workers.core.records import LLMCall, RunEnded, RunStarted
from waxell_workers.dramatiq import WaxellMiddleware

PACKAGE = str(Path(waxell_workers.__file__).parent)
SOON_MS = 1


@pytest.fixture
def broker():
    """A broker with Dramatiq's default middleware and ours at the end."""
    return make_broker()


def make_broker(place: str = "last", *added: Middleware) -> StubBroker:
    broker = StubBroker()
    for middleware in added:
        broker.add_middleware(middleware)
    if place == "first":
        broker.add_middleware(WaxellMiddleware(), before=type(broker.middleware[0]))
    elif place == "amid":
        broker.add_middleware(WaxellMiddleware(), before=Retries)
    else:
        broker.add_middleware(WaxellMiddleware())
    broker.emit_after("process_boot")
    return broker


def work(broker: StubBroker, *, threads: int = 1) -> None:
    """Have a worker process everything that was sent, then stop."""
    worker = Worker(broker, worker_timeout=20, worker_threads=threads)
    worker.start()
    try:
        for name in broker.get_declared_queues():
            if not name.endswith(".DQ"):
                join(broker, name)
        worker.join()
    finally:
        worker.stop()


def join(broker: StubBroker, name: str) -> None:
    broker.join(name, fail_fast=False, timeout=20_000)


def ends(records) -> list[tuple[str, str]]:
    return [(end.state, end.error_type.rpartition(".")[2]) for end in records(RunEnded)]


class Skips(Middleware):
    """Skips every message, as middleware for aborted messages does."""

    def before_process_message(self, broker, message):
        raise SkipMessage("aborted")


class Fails(Middleware):
    """Fails every message before its actor is called."""

    def before_process_message(self, broker, message):
        message.fail()


@pytest.mark.parametrize("place", ["first", "amid", "last"])
@pytest.mark.parametrize(
    ("error", "allowed", "expected"),
    [
        (None, {}, [("success", "")]),
        (ValueError("no"), {"max_retries": 0}, [("error", "ValueError")]),
        (ValueError("no"), {"max_retries": 1}, [("retry", "ValueError"), ("error", "ValueError")]),
        (ValueError("no"), {"throws": ValueError}, [("error", "ValueError")]),
        (dramatiq.Retry("no", delay=1), {"max_retries": 1}, [("retry", "Retry"), ("error", "Retry")]),
        (SkipMessage("no"), {}, [("ignored", "")]),
        (TimeLimitExceeded("no"), {"max_retries": 0}, [("error", "TimeLimitExceeded")]),
        (Shutdown("no"), {"max_retries": 0}, [("interrupted", "Shutdown")]),
        (Shutdown("no"), {"max_retries": 1}, [("retry", "Shutdown"), ("interrupted", "Shutdown")]),
        (SystemExit("no"), {"max_retries": 0}, [("interrupted", "SystemExit")]),
    ],
)
def test_states(records, place, error, allowed, expected):
    """What Dramatiq makes of a message is its run's state, wherever the middleware stands."""
    broker = make_broker(place)

    @dramatiq.actor(broker=broker, min_backoff=SOON_MS, max_backoff=SOON_MS, **allowed)
    def task():
        if error is not None:
            raise error

    task.send()
    work(broker)
    assert ends(records) == expected
    attempts = [start.metadata["attempt"] for start in records(RunStarted)]
    assert attempts == list(range(1, len(expected) + 1))


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize(("why", "state"), [(Skips, "ignored"), (Fails, "rejected")])
def test_a_message_whose_actor_is_never_called(records, place, why, state):
    """Skipped is `ignored` and failed is `rejected`, whether that is done before us or after us."""
    broker = make_broker(place, why())

    @dramatiq.actor(broker=broker)
    def task():
        raise AssertionError

    task.send()
    work(broker)
    assert ends(records) == [(state, "")]


def test_too_old_a_message_is_rejected(records, broker):
    """Dramatiq's age limit skips the message and fails it."""

    @dramatiq.actor(broker=broker, max_age=1)
    def task():
        raise AssertionError

    message = task.message()
    broker.enqueue(message.copy())
    broker.queues["default"].get()
    broker.queues["default"].task_done()
    old = dramatiq.Message("default", "task", (), {}, {}, message_timestamp=message.message_timestamp - 1000)
    broker.enqueue(old)
    work(broker)
    assert ends(records) == [("rejected", "")]


def test_without_retries_a_failure_is_an_error(records):
    """Dramatiq without its `Retries` acknowledges what has failed: to us it has failed all the same."""
    broker = StubBroker(middleware=[WaxellMiddleware()])

    @dramatiq.actor(broker=broker)
    def task():
        raise ValueError("no")

    task.send()
    work(broker)
    assert ends(records) == [("error", "ValueError")]


def test_each_call_is_in_its_own_run_and_nothing_is_left_current(records):
    """Many messages over a few long-lived threads: each run has its call, and ends outside any run."""
    left = []

    class Looks(Middleware):
        def after_ack(self, broker, message):
            left.append(get_context())

        after_nack = after_ack

    broker = make_broker("last", Looks())
    errors = [None, ValueError("no"), SystemExit(), TimeLimitExceeded()]

    @dramatiq.actor(broker=broker, max_retries=0)
    def task(number):
        get_context().record_llm_call(model=str(number))
        WaxellContext("left open").__enter__()
        if (error := errors[number % len(errors)]) is not None:
            raise error

    sent = {task.send(number).message_id: str(number) for number in range(200)}
    work(broker, threads=4)
    starts = {start.run_id: start for start in records(RunStarted) if start.agent_name == "task"}
    assert {starts[call.run_id].task_id: call.model for call in records(LLMCall)} == sent
    assert left == [None] * 200
    assert {end.run_id for end in records(RunEnded)} >= set(starts)


def test_added_twice_is_once(records, broker):
    """A second one of the middleware makes no second run."""
    broker.add_middleware(WaxellMiddleware())

    @dramatiq.actor(broker=broker)
    def task():
        pass

    task.send()
    work(broker)
    assert ends(records) == [("success", "")]


# -- async actors ------------------------------------------------------------------------------


def test_an_async_actor_runs_inside_its_run(records):
    """The run is current in the coroutine, and in what it awaits and sends, in the event loop thread."""
    broker = make_broker("last", AsyncIO())

    @dramatiq.actor(broker=broker)
    def child():
        pass

    @dramatiq.actor(broker=broker)
    @options(agent_name="mine")
    async def task(number):
        assert threading.current_thread() is get_event_loop_thread()
        await asyncio.sleep(0.01)
        await asyncio.create_task(call(number))
        child.send()

    async def call(number):
        get_context().record_llm_call(model=str(number))

    sent = {task.send(number).message_id: str(number) for number in range(20)}
    work(broker, threads=4)
    starts = {start.run_id: start for start in records(RunStarted)}
    assert {starts[call.run_id].task_id: call.model for call in records(LLMCall)} == sent
    children = [start for start in starts.values() if start.agent_name == "child"]
    assert {starts[start.parent_run_id].agent_name for start in children} == {"mine"}
    assert {start.metadata["parent_task_id"] for start in children} == set(sent)


# -- messages ----------------------------------------------------------------------------------


def test_a_message_carries_its_lineage(records, broker):
    """A message that is sent inside a run names it, as JSON, and is its child; its own options stay."""

    @dramatiq.actor(broker=broker)
    def task():
        pass

    with WaxellContext("web") as run:
        message = task.send_with_options(max_retries=7)
    assert message.options["max_retries"] == 7
    assert json.loads(message.encode())["options"]["waxell"]["parent"] == run.run_id
    assert message.options["traceparent"].split("-")[1] == run.trace_id
    work(broker)
    [_, start] = records(RunStarted)
    assert (start.parent_run_id, start.root_run_id, start.trace_id) == (run.run_id, run.run_id, run.trace_id)


def test_a_retry_keeps_its_parent_and_takes_a_new_time(records, broker):
    """Every attempt is the child of who sent the message; each waited from when it was last sent."""

    @dramatiq.actor(broker=broker, max_retries=2, min_backoff=SOON_MS, max_backoff=SOON_MS)
    def task():
        time.sleep(0.05)
        raise ValueError("no")

    with WaxellContext("web") as run:
        message = task.send()
    work(broker)
    starts = [start for start in records(RunStarted) if start.agent_name == "task"]
    assert [start.parent_run_id for start in starts] == [run.run_id] * 3
    assert {start.task_id for start in starts} == {message.message_id}
    times = [start.metadata["enqueued_at"] for start in starts]
    assert times[1] - times[0] > 0.05
    assert times[2] - times[1] > 0.05
    assert all("parent_task_id" not in start.metadata for start in starts)


def test_a_delayed_message_has_waited_since_its_eta(records, broker):
    """The queue of the delayed changes neither when a message was sent nor how long it waited in vain."""

    @dramatiq.actor(broker=broker)
    def task():
        pass

    before = time.time()
    task.send_with_options(delay=400)
    sent = time.time()
    work(broker)
    [start] = records(RunStarted)
    assert before <= start.metadata["enqueued_at"] <= sent
    assert before + 0.399 <= start.metadata["eta"] <= sent + 0.401
    assert start.metadata["wait_s"] == pytest.approx(start.at - start.metadata["eta"], abs=0.05)
    assert start.metadata["queue"] == "default"


def test_a_retry_of_a_delayed_message_forgets_the_eta(records, broker):
    """The eta that a retry has is its own."""

    @dramatiq.actor(broker=broker, max_retries=1, min_backoff=SOON_MS, max_backoff=SOON_MS)
    def task():
        raise ValueError("no")

    task.send_with_options(delay=100)
    work(broker)
    first, second = (start.metadata for start in records(RunStarted))
    assert second["eta"] > first["eta"]
    assert second["enqueued_at"] >= first["eta"]


def test_switched_off_it_leaves_messages_alone(broker, monkeypatch):
    """With `observe=False`, a delayed message reaches its actor with its sender's options."""
    monkeypatch.setattr(collecting, "_collector", collecting.Collector(Settings(observe=False)))
    broker.add_middleware(CurrentMessage())
    seen = []

    @dramatiq.actor(broker=broker)
    def task():
        seen.append(CurrentMessage.get_current_message().options)

    task.send_with_options(delay=50, mine=1)
    work(broker)
    assert seen == [{"mine": 1}]


def test_a_message_that_is_sent_again_at_once_forgets_the_eta(records):
    """What an actor sends again without a delay waits from then on."""
    broker = make_broker("last", CurrentMessage())

    @dramatiq.actor(broker=broker)
    def task():
        message = CurrentMessage.get_current_message()
        if "again" not in message.options:
            broker.enqueue(message.copy(options={"again": True}))

    task.send_with_options(delay=100)
    work(broker)
    first, second = (start.metadata for start in records(RunStarted))
    assert "eta" not in second
    assert second["enqueued_at"] >= first["eta"]


def test_who_has_no_middleware_can_send_too(records, broker):
    """A message from elsewhere has Dramatiq's own time as its own."""

    @dramatiq.actor(broker=broker)
    def task():
        pass

    message = dramatiq.Message("default", "task", (), {}, {})
    broker.queues["default"].put(message.encode())
    work(broker)
    [start] = records(RunStarted)
    assert start.metadata["enqueued_at"] == message.message_timestamp / 1000


def test_a_pipeline_is_one_story(records, broker):
    """Each step is the child of the step before it."""

    @dramatiq.actor(broker=broker)
    def step(*_numbers):
        return 1

    with WaxellContext("web") as run:
        dramatiq.pipeline([step.message() for _ in range(3)], broker=broker).run()
    work(broker)
    starts = [start for start in records(RunStarted) if start.agent_name == "step"]
    parents = [run.run_id, starts[0].run_id, starts[1].run_id]
    assert [start.parent_run_id for start in starts] == parents
    assert [start.metadata.get("parent_task_id") for start in starts] == [
        None,
        starts[0].task_id,
        starts[1].task_id,
    ]
    assert {start.root_run_id for start in starts} == {run.run_id}


def test_a_group_is_known_by_its_id(records):
    """The members of a group with a callback share an id; the callback is the child of who came last."""
    broker = make_broker("last", GroupCallbacks(StubBackend()))

    @dramatiq.actor(broker=broker)
    def task():
        pass

    group = dramatiq.group([task.message(), task.message()], broker=broker)
    group.add_completion_callback(task.message_with_options(args=()))
    group.run()
    work(broker)
    first, second, last = records(RunStarted)
    assert first.metadata["group_id"] == second.metadata["group_id"] != ""
    assert "group_id" not in last.metadata
    assert last.parent_run_id == second.run_id


# -- options and content -----------------------------------------------------------------------


def mark_below(broker):
    @dramatiq.actor(broker=broker)
    @options(agent_name="marked")
    def task():
        pass

    return task


def mark_above(broker):
    @options(agent_name="marked")
    @dramatiq.actor(broker=broker)
    def task():
        pass

    return task


def mark_async(broker):
    @dramatiq.actor(broker=broker)
    @options(agent_name="marked")
    async def task():
        pass

    return task


def mark_class(broker):
    dramatiq.set_broker(broker)

    @options(agent_name="marked")
    class Task(GenericActor):
        def perform(self):
            pass

    return Task


@pytest.mark.parametrize("mark", [mark_below, mark_above, mark_async, mark_class])
def test_an_actor_can_be_marked(records, mark):
    """`@options` counts above and below the decorator, on a function, a coroutine or a class."""
    broker = make_broker("last", AsyncIO())
    mark(broker).send()
    work(broker)
    assert [start.agent_name for start in records(RunStarted)] == ["marked"]


@pytest.mark.parametrize("how", ["excluded", "marked"])
def test_what_is_not_recorded_leaves_nothing(records, broker, how):
    """An excluded actor leaves no run, and its calls do not turn up as calls outside any run either."""

    @dramatiq.actor(broker=broker, actor_name="secret" if how == "excluded" else "task", max_retries=0)
    @options(record=how != "marked")
    def task():
        waxell_workers.record_llm_call(model="m")
        raise ValueError("no")

    task.send()
    work(broker)
    assert records(RunStarted) + records(LLMCall) + records(RunEnded) == []


def test_arguments_are_content(records, broker, tmp_path, monkeypatch):
    """Arguments are recorded only if content is captured."""

    @dramatiq.actor(broker=broker)
    def task(number, text):
        pass

    task.send(1, text="x")
    work(broker)
    settings = Settings(
        api_url="http://127.0.0.1:9",
        spool_dir=str(tmp_path),
        shipper="external",
        shutdown_timeout=0.0,
        capture_content=True,
    )
    monkeypatch.setattr(collecting, "_collector", collecting.Collector(settings))
    task.send(1, text="x")
    work(broker)
    assert [start.inputs for start in records(RunStarted)] == [{}, {"args": [1], "kwargs": {"text": "x"}}]


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("above", [True, False], ids=["above @actor", "below it"])
def test_an_actor_chooses_its_content(records, broker, tmp_path, monkeypatch, wanted, above):
    """`@options(capture_content=…)` beats the setting, for the actor's arguments and its error."""
    settings = Settings(
        api_url="http://127.0.0.1:9",
        spool_dir=str(tmp_path),
        shipper="external",
        shutdown_timeout=0.0,
        capture_content=not wanted,
    )
    monkeypatch.setattr(collecting, "_collector", collecting.Collector(settings))
    mark, make = options(capture_content=wanted), dramatiq.actor(broker=broker, max_retries=0)

    def chosen(text):
        raise ValueError("x" * 300)

    @dramatiq.actor(broker=broker, max_retries=0)
    def other(text):
        raise ValueError("x" * 300)

    actor = mark(make(chosen)) if above else make(mark(chosen))
    actor.send("text")
    other.send("text")
    work(broker)
    names = {start.run_id: start.agent_name for start in records(RunStarted)}
    assert {start.agent_name: bool(start.inputs) for start in records(RunStarted)} == {
        "chosen": wanted,
        "other": not wanted,
    }
    assert {names[end.run_id]: len(end.error_message) for end in records(RunEnded)} == {
        "chosen": 300 if wanted else 200,
        "other": 200 if wanted else 300,
    }


# -- interrupts, ends, and processes that are no worker ----------------------------------------


def open_runs() -> list[runs.Run]:
    """Return the runs of this process that have not ended."""
    return [run for run in collecting.current().open_runs.values() if run.is_open]


class Interrupts:
    """Raises a time limit in this thread at the n-th line that the package executes."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __enter__(self) -> Interrupts:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_exc_info: object) -> None:
        sys.settrace(None)

    def _enter(self, frame, _event, _argument):
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, _frame, event, _argument):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise TimeLimitExceeded
        return self._line


def test_an_interrupt_at_any_line_of_ours_leaves_nothing_open(records):
    """Wherever an interrupt surfaces in a hook, the next message on the thread finds no run current, and all
    runs of the thread end."""
    broker = make_broker("last")

    @dramatiq.actor(broker=broker, max_retries=0)
    def task(number):
        get_context().record_llm_call(model=str(number))

    work_queue = queue.PriorityQueue()
    settings = {"broker": broker, "work_queue": work_queue, "worker_timeout": 10}
    consumer = _ConsumerThread(queue_name="default", prefetch=10_000, **settings)
    consumer.consumer = broker.consume("default", prefetch=10_000)
    thread = _WorkerThread(consumers={"default": consumer}, **settings)

    def receive(number):
        task.send(number)
        work_queue.put((0, None))
        return next(consumer.consumer)

    thread.process_message(receive(0))
    line, reached = 0, True
    while reached:
        line += 1
        message = receive(line)
        with Interrupts(line) as interrupts:
            try:
                thread.process_message(message)
                assert get_context() is None
                assert not open_runs()
            except TimeLimitExceeded:
                pass  # after the actor: Dramatiq's thread would end by it
            reached = interrupts.left <= 0
        thread.process_message(receive(-line))
        assert get_context() is None
    assert line > 100, "it was not interrupted in every hook"
    started = {start.run_id for start in records(RunStarted)}
    assert {end.run_id for end in records(RunEnded)} >= started
    assert not open_runs()
    clean = {str(-number) for number in range(1, line + 1)}
    starts = {start.run_id: start.task_id for start in records(RunStarted)}
    calls = {call.model: call.run_id for call in records(LLMCall)}
    assert clean <= calls.keys()
    assert len({starts[calls[number]] for number in clean}) == len(clean)


def test_an_abandoned_thread_s_run_is_interrupted(records, broker):
    """What a stopping worker leaves behind unfinished ends as `interrupted`."""
    go_on, began = threading.Event(), threading.Event()

    @dramatiq.actor(broker=broker)
    def task():
        began.set()
        go_on.wait(20)

    worker = Worker(broker, worker_timeout=20, worker_threads=1)
    worker.start()
    try:
        task.send()
        assert began.wait(20)
        worker.stop(timeout=50)
        assert ends(records) == [("interrupted", "")]
    finally:
        go_on.set()
        for thread in worker.workers:
            thread.join(20)
    assert ends(records) == [("interrupted", "")]


def test_the_worker_looks_after_the_shipper_until_it_stops(records, broker):
    """There is one thread that looks, as long as the worker runs; and none where nothing is recorded."""
    worker = Worker(broker, worker_timeout=20, worker_threads=1)
    worker.start()
    looking = [thread for thread in threading.enumerate() if thread.name == "waxell-look"]
    worker.stop()
    assert collecting.current().in_worker
    assert len(looking) == 1
    looking[0].join(20)
    assert not looking[0].is_alive()


def test_an_unconfigured_worker_has_no_thread_more(broker, monkeypatch, tmp_path):
    """Without a server to send to, a worker is as it was."""
    monkeypatch.setattr(collecting, "_collector", collecting.Collector(Settings(spool_dir=str(tmp_path))))

    @dramatiq.actor(broker=broker)
    def task():
        pass

    task.send()
    worker = Worker(broker, worker_timeout=20, worker_threads=1)
    worker.start()
    join(broker, "default")
    names = {thread.name for thread in threading.enumerate()}
    worker.stop()
    assert "waxell-look" not in names
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("observe", "expected"), [("true", ["waxell"]), ("false", [])])
def test_a_process_that_is_no_worker_only_adds_options(in_a_web_process, observe, expected):
    """In a web process the middleware adds options, if that: no file, no thread, nothing instrumented."""
    code = (
        "import json, sys, threading, dramatiq, openai\n"
        "from dramatiq.brokers.stub import StubBroker\n"
        "from waxell_workers.core import collector\n"
        "from waxell_workers.dramatiq import WaxellMiddleware\n"
        "broker = StubBroker(middleware=[])\n"
        "broker.add_middleware(WaxellMiddleware())\n"
        "message = dramatiq.actor(print, broker=broker).send()\n"
        "assert collector.configured() is None and threading.active_count() == 1\n"
        "assert 'opentelemetry' not in sys.modules, 'the SDK was instrumented'\n"
        "print(json.dumps(sorted(message.options)))\n"
    )
    assert in_a_web_process(code, observe=observe) == expected
