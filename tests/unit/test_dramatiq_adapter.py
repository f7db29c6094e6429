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
    AgeLimit,
    AsyncIO,
    Callbacks,
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
SOON = {"min_backoff": SOON_MS, "max_backoff": SOON_MS}
PLACES = ["first", "amid", "last"]


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


def reasons(records) -> list[str]:
    return [end.reason for end in records(RunEnded)]


def starts_of(records, name: str) -> list[RunStarted]:
    return [start for start in records(RunStarted) if start.agent_name == name]


def put(broker: StubBroker, message: dramatiq.Message) -> None:
    """Put a message into its queue as a process without the middleware would."""
    broker.queues[message.queue_name].put(message.encode())


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
    words = {"ignored": "ignored: skipped by a middleware", "rejected": "rejected: failed by a middleware"}
    assert reasons(records) == [words[state]]


@pytest.mark.parametrize("where", ["message", "actor", "middleware"])
def test_too_old_a_message_is_rejected(records, where):
    """Dramatiq's age limit skips the message and fails it, whoever has set it."""
    broker = StubBroker(middleware=[AgeLimit(max_age=1500 if where == "middleware" else None)])
    broker.add_middleware(WaxellMiddleware())

    @dramatiq.actor(broker=broker, **{"max_age": 1500} if where == "actor" else {})
    def task():
        raise AssertionError

    age = {"max_age": 1500} if where == "message" else {}
    now = int(time.time() * 1000)
    broker.enqueue(dramatiq.Message("default", "task", (), {}, age, message_timestamp=now - 2000))
    work(broker)
    assert ends(records) == [("rejected", "")]
    assert reasons(records) == ["rejected: older than its age limit of 1.5 s"]


def test_what_failed_a_message_is_not_always_its_age(records):
    """An age limit that is not reached is not named."""
    broker = make_broker("last", Fails())

    @dramatiq.actor(broker=broker, max_age=60_000)
    def task():
        raise AssertionError

    task.send()
    work(broker)
    assert reasons(records) == ["rejected: failed by a middleware"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("error", "allowed", "expected"),
    [
        (None, {}, [""]),
        (ValueError("no"), {"max_retries": 0}, [""]),
        (
            ValueError("no"),
            {"max_retries": 2},
            ["retry: attempt 2 of 3 at once", "retry: attempt 3 of 3 at once", ""],
        ),
        (
            ValueError("no"),
            {"retry_when": lambda retries, error: retries < 1},
            ["retry: attempt 2 at once", ""],
        ),
        (dramatiq.Retry("no", delay=120), {"max_retries": 1}, ["retry: attempt 2 of 2 in 0.1 s", ""]),
        (SkipMessage("no"), {}, ["ignored: skipped by its actor"]),
        (TimeLimitExceeded("no"), {"max_retries": 0}, [""]),
        (Shutdown("no"), {"max_retries": 0}, ["interrupted: the worker was told to stop"]),
        (SystemExit("no"), {"max_retries": 0}, ["interrupted: SystemExit went through the actor"]),
    ],
)
def test_ends_in_words(records, place, error, allowed, expected):
    """How an attempt has ended can be read, where no error says it, wherever the middleware stands."""
    broker = make_broker(place)

    @dramatiq.actor(broker=broker, **SOON, **allowed)
    def task():
        if error is not None:
            raise error

    task.send()
    work(broker)
    assert reasons(records) == expected


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_time_limit_is_named(records, place):
    """The error is Dramatiq's; the reason says which limit it was."""
    broker = make_broker(place)

    @dramatiq.actor(broker=broker, max_retries=0, time_limit=700)
    def task():
        while True:
            time.sleep(0.01)

    task.send()
    work(broker)
    assert ends(records) == [("error", "TimeLimitExceeded")]
    assert reasons(records) == ["error: time limit of 0.7 s"]


@pytest.mark.parametrize("delay", [None, 50])
def test_an_actor_that_is_unknown_here(records, broker, delay):
    """What a worker refuses since it has no such actor is one rejected attempt, though no actor began."""
    broker.declare_queue("default")
    with WaxellContext("web") as run:
        broker.enqueue(dramatiq.Message("default", "elsewhere", (), {}, {}), delay=delay)
    work(broker)
    [start] = starts_of(records, "elsewhere")
    [end] = [end for end in records(RunEnded) if end.run_id == start.run_id]
    assert (end.state, end.error_type) == ("rejected", "dramatiq.errors.ActorNotFound")
    assert end.reason == "rejected: no actor of this name in this worker"
    assert (start.parent_run_id, start.trace_id) == (run.run_id, run.trace_id)
    assert "wait_s" not in start.metadata
    assert [message.actor_name for message in broker.dead_letters] == ["elsewhere"]


def test_a_refusal_is_told_once(records, broker):
    """While the broker cannot be reached, a message is refused again and again."""
    broker.declare_queue("default")
    message = dramatiq.broker.MessageProxy(dramatiq.Message("default", "elsewhere", (), {}, {}))
    for _ in range(3):
        broker.emit_before("nack", message)
    assert len(starts_of(records, "elsewhere")) == 1


class _Aborted(Middleware):
    """Skips what was aborted, from a module of dramatiq-abort's, as its `Abortable` does."""

    def __init__(self) -> None:
        module = {"__name__": "dramatiq_abort.middleware", "SkipMessage": SkipMessage}
        exec("def skip():\n    raise SkipMessage", module)
        self._skip = module["skip"]

    def before_process_message(self, broker, message):
        self._skip()


Abort = type("Abort", (Shutdown.__base__,), {"__module__": "dramatiq_abort.abort_manager"})


@pytest.mark.parametrize("place", ["first", "last"])
def test_what_somebody_aborts_is_revoked(records, place):
    """dramatiq-abort skips a message that waits and interrupts an actor that runs."""
    broker = make_broker(place)

    @dramatiq.actor(broker=broker, max_retries=0)
    def task():
        raise Abort

    task.send()
    work(broker)
    waiting = make_broker(place, _Aborted())
    dramatiq.actor(broker=waiting, actor_name="task")(print).send()
    work(waiting)
    assert ends(records) == [("revoked", "Abort"), ("revoked", "")]
    assert reasons(records) == ["revoked: aborted by user", "revoked before start"]


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
    assert json.loads(message.encode())["options"]["waxell"]["run"] == run.run_id
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


# -- who caused what ---------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_callbacks_are_children_of_the_attempt_that_caused_them(records, place):
    """`on_success`, `on_failure` and `on_retry_exhausted`: children of the run that succeeded or failed."""
    broker = make_broker(place)
    assert any(isinstance(one, Callbacks) for one in broker.middleware)

    @dramatiq.actor(broker=broker)
    def told(*_what):
        pass

    @dramatiq.actor(broker=broker, on_success="told")
    def succeeds():
        pass

    @dramatiq.actor(broker=broker, max_retries=1, on_failure="told", on_retry_exhausted="told", **SOON)
    def fails():
        raise ValueError("no")

    with WaxellContext("web") as run:
        good = succeeds.send()
        bad = fails.send()
    work(broker)
    [success] = starts_of(records, "succeeds")
    first, last = starts_of(records, "fails")
    causes = [start.parent_run_id for start in starts_of(records, "told")]
    assert sorted(causes) == sorted([success.run_id, first.run_id, last.run_id, last.run_id])
    caused = {start.metadata["parent_task_id"] for start in starts_of(records, "told")}
    assert caused == {good.message_id, bad.message_id}
    assert {start.trace_id for start in records(RunStarted)} == {run.trace_id}
    assert {start.root_run_id for start in records(RunStarted)} == {run.run_id}


@pytest.mark.parametrize("place", PLACES)
def test_a_pipeline_whose_stages_are_delayed(records, place):
    """A stage that waits for its delay is the child of the stage before it, and has not waited for that."""
    broker = make_broker(place)

    @dramatiq.actor(broker=broker)
    def step(*_numbers):
        return 1

    with WaxellContext("web") as run:
        stages = [step.message_with_options(delay=delay) for delay in (150, 200, 250)]
        dramatiq.pipeline(stages, broker=broker).run(delay=100)
    work(broker)
    starts = starts_of(records, "step")
    assert [start.parent_run_id for start in starts] == [run.run_id, starts[0].run_id, starts[1].run_id]
    assert {start.trace_id for start in starts} == {run.trace_id}
    for before, start in zip([run, *starts], starts, strict=False):
        facts = start.metadata
        began = before.metadata["eta"] if before is not run else facts["enqueued_at"]
        assert began <= facts["enqueued_at"] < facts["eta"] - 0.1
        assert facts["wait_s"] == pytest.approx(start.at - facts["eta"], abs=0.05)


@pytest.mark.parametrize("place", PLACES)
def test_a_pipeline_in_a_group(records, place):
    """Its stages are one story in the group's; the callback is the child of the member that ended last."""
    broker = make_broker(place, GroupCallbacks(StubBackend()))
    may_end = threading.Event()

    @dramatiq.actor(broker=broker)
    def step(*_numbers):
        return 1

    @dramatiq.actor(broker=broker)
    def last(*_numbers):
        may_end.set()
        return 2

    @dramatiq.actor(broker=broker)
    def single():
        assert may_end.wait(20)

    @dramatiq.actor(broker=broker)
    def done():
        pass

    with WaxellContext("web") as run:
        callback = done.message()
        pipeline = dramatiq.pipeline([step.message(), last.message_with_options(delay=50)], broker=broker)
        group = dramatiq.group([single.message(), pipeline], broker=broker)
        group.add_completion_callback(callback)
        group.run()
    work(broker, threads=2)
    [first], [second] = starts_of(records, "step"), starts_of(records, "last")
    [alone], [end] = starts_of(records, "single"), starts_of(records, "done")
    assert (first.parent_run_id, second.parent_run_id) == (run.run_id, first.run_id)
    assert alone.parent_run_id == run.run_id
    assert end.parent_run_id in (alone.run_id, second.run_id)
    by_end = {end.run_id: end.at for end in records(RunEnded)}
    assert by_end[end.parent_run_id] == max(by_end[alone.run_id], by_end[second.run_id])
    assert alone.metadata["group_id"] == second.metadata["group_id"] != ""
    assert {start.trace_id for start in records(RunStarted)} == {run.trace_id}
    assert callback.options == {}, "the callback's own message is the user's"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "added twice"])
def test_a_delay_changes_no_lineage(records, place, twice):
    """The consumer enqueues a delayed message once more: parent, trace and time are those of the sender."""
    broker = make_broker(place)
    if twice:
        broker.add_middleware(WaxellMiddleware())

    @dramatiq.actor(broker=broker)
    def task():
        pass

    with WaxellContext("web", session_id="s") as run:
        task.send_with_options(delay=200)
        sent = time.time()
    work(broker)
    [start] = starts_of(records, "task")
    assert (start.parent_run_id, start.root_run_id, start.trace_id) == (run.run_id, run.run_id, run.trace_id)
    assert start.session_id == "s"
    assert start.metadata["enqueued_at"] <= sent < start.metadata["eta"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sender", ["in a run", "outside", "without the middleware"])
def test_attempts_are_one_story(records, place, sender):
    """Each attempt has the parent of the first, and knows the one before, whoever has sent the message."""
    broker = make_broker(place)

    @dramatiq.actor(broker=broker, max_retries=2, **SOON)
    def task():
        WaxellContext("left open").__enter__()
        raise ValueError("no")

    if sender == "in a run":
        with WaxellContext("web"):
            task.send()
    elif sender == "outside":
        task.send()
    else:
        put(broker, task.message())
    work(broker)
    starts = starts_of(records, "task")
    ids = [start.run_id for start in starts]
    assert [start.metadata.get("previous_run_id") for start in starts] == [None, *ids[:-1]]
    [parent] = [start.run_id for start in starts_of(records, "web")] or [""]
    assert [start.parent_run_id for start in starts] == [parent] * 3
    assert {start.root_run_id for start in starts} == {parent or ids[0]}
    assert len({start.trace_id for start in starts}) == 1
    waits = [start.metadata["wait_s"] for start in starts]
    assert waits[1:] == pytest.approx([start.at - start.metadata["eta"] for start in starts[1:]], abs=0.05), (
        "a backoff is no waiting"
    )


@pytest.mark.parametrize("eta", [10**400, -1, True, float("nan")], ids=["huge", "negative", "bool", "nan"])
def test_an_eta_that_is_no_time(records, broker, caplog, eta):
    """What nobody can wait for is not ours to say; the consumer's hook fails at nothing."""
    message = dramatiq.broker.MessageProxy(dramatiq.Message("default", "task", (), {}, {"eta": eta}))
    broker.emit_before("delay_message", message)
    assert list(message.options) == ["eta"]
    assert "WaxellMiddleware" not in caplog.text


def test_who_sends_a_dead_letter_again(records, broker):
    """It has waited from then on, also if it was delayed once; it keeps its parent."""
    fails = [True]

    @dramatiq.actor(broker=broker, max_retries=0)
    def task():
        if fails:
            raise ValueError(fails.pop())

    with WaxellContext("web") as run:
        task.send_with_options(delay=50)
    work(broker)
    [dead] = broker.dead_letters
    sent = time.time()
    broker.enqueue(dead.copy())
    work(broker)
    first, second = starts_of(records, "task")
    assert first.metadata["enqueued_at"] < sent <= second.metadata["enqueued_at"]
    assert "eta" not in second.metadata
    assert second.parent_run_id == first.parent_run_id == run.run_id


def test_options_of_the_user_s_own_stay_his(records, broker):
    """A dict that messages share is as it was; each message has the lineage of where it was enqueued."""

    @dramatiq.actor(broker=broker)
    def task():
        pass

    shared = {"max_retries": 1, "mine": {"a": 1}}
    before = dict(shared)
    sent = {}
    for name in ("one", "two"):
        with WaxellContext(name) as run:
            message = broker.enqueue(dramatiq.Message("default", "task", (), {}, shared))
            sent[message.message_id] = run.run_id
    assert shared == before
    assert message.options == {**before, **message.options}
    work(broker)
    assert {start.task_id: start.parent_run_id for start in starts_of(records, "task")} == sent


def test_an_object_that_is_enqueued_again_is_not_the_first_one_s_any_more(records, broker):
    """Given a message that a module keeps, and several enqueue: none has another's parent, trace or user."""

    @dramatiq.actor(broker=broker)
    def task(*_):
        pass

    message = task.message()
    theirs = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    message.options.update(mine=1, traceparent=theirs)
    with WaxellContext("first", user_id="alice"):
        broker.enqueue(message)
    message.options["added"] = 2
    broker.enqueue(message)
    assert message.options["waxell"].keys() == {"enqueued_at"}
    assert {"mine": 1, "added": 2, "traceparent": theirs}.items() <= message.options.items()
    with WaxellContext("second", user_id="bob") as second:
        broker.enqueue(message)
    assert message.options["waxell"]["run"] == second.run_id
    assert message.options["waxell"]["user"] == "bob"
    assert message.options["traceparent"] == theirs


def test_a_copy_is_the_child_of_who_sends_it(records):
    """A copy of what was sent elsewhere keeps nothing of there, for us and for other tracers alike."""
    broker = make_broker("last", CurrentMessage())
    seen = []

    @dramatiq.actor(broker=broker)
    def task():
        seen.append(CurrentMessage.get_current_message().options)

    with WaxellContext("first") as first:
        message = task.send()
    with WaxellContext("second") as second:
        broker.enqueue(message.copy(message_id="copied"))
    work(broker)
    parents = {start.task_id: start.parent_run_id for start in starts_of(records, "task")}
    assert parents == {message.message_id: first.run_id, "copied": second.run_id}
    assert {options["traceparent"].split("-")[1] for options in seen} == {first.trace_id, second.trace_id}


def test_who_sends_his_own_message_again_is_the_attempt_before(records):
    """An actor that enqueues its own message, as it is, and without a delay, goes on with one story."""
    broker = make_broker("last", CurrentMessage())
    again = []

    @dramatiq.actor(broker=broker)
    def task():
        if not again:
            again.append(True)
            with WaxellContext("inside"):
                broker.enqueue(CurrentMessage.get_current_message())

    with WaxellContext("web") as run:
        task.send()
    work(broker)
    first, second = starts_of(records, "task")
    assert second.parent_run_id == first.parent_run_id == run.run_id
    assert second.metadata["previous_run_id"] == first.run_id


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_context_inside_an_actor_is_the_parent(records, kind):
    """What is sent in a block of the actor's is that block's child, and its task's."""
    broker = make_broker("last", AsyncIO())

    @dramatiq.actor(broker=broker)
    def child():
        pass

    def send():
        with WaxellContext("block"):
            child.send()

    async def send_async():
        child.send()

    actor = dramatiq.actor(broker=broker, actor_name="task")(send if kind == "sync" else send_async)
    message = actor.send()
    work(broker)
    [start], [task] = starts_of(records, "child"), starts_of(records, "task")
    [parent] = starts_of(records, "block") if kind == "sync" else [task]
    assert start.parent_run_id == parent.run_id
    assert start.metadata["parent_task_id"] == message.message_id
    assert start.root_run_id == task.run_id


@pytest.mark.parametrize("place", ["first", "last"])
def test_for_whom_it_is_travels_through_pipelines_and_retries(records, place):
    """Session, user, tags and metadata of whoever enqueues are those of each stage, and of each attempt."""
    broker = make_broker(place)

    @dramatiq.actor(broker=broker, max_retries=1, **SOON)
    def step(*_numbers):
        if get_context().run_id == starts_of(records, "step")[0].run_id:
            raise ValueError("no")
        return 1

    with WaxellContext("web", session_id="s", user_id="u", metadata={"plan": "gold"}) as run:
        run.set_tag("tenant", "acme")
        stages = [step.message(), step.message_with_options(delay=20)]
        dramatiq.pipeline(stages, broker=broker).run()
    work(broker)
    starts = starts_of(records, "step")
    assert len(starts) == 3
    for start in starts:
        assert (start.session_id, start.user_id) == ("s", "u")
        assert (start.tags, start.ambient) == ({"tenant": "acme"}, {"plan": "gold"})


@pytest.mark.parametrize("where", ["setting", "actor", "function"])
@pytest.mark.parametrize("mode", ["parent", "link", "none"])
def test_how_a_message_is_connected(records, configure, where, mode):
    """`propagate`, globally or by options: a child, a trace of its own that names the other, or neither."""
    if where == "setting":
        configure(propagate=mode)
    broker = make_broker()

    def task():
        raise ValueError("no")

    make = dramatiq.actor(broker=broker, max_retries=1, **SOON)
    mark = options(propagate=mode) if where != "setting" else lambda marked: marked
    actor = mark(make(task)) if where == "actor" else make(mark(task))
    with WaxellContext("web", session_id="s") as run:
        message = actor.send_with_options(delay=100)
    work(broker)
    for start in starts_of(records, "task"):
        expected = (run.run_id, run.trace_id) if mode == "parent" else ("", start.trace_id)
        assert (start.parent_run_id, start.trace_id) == expected
        assert start.session_id == ("" if mode == "none" else "s")
        linked = (start.metadata.get("linked_run_id"), start.metadata.get("linked_trace_id"))
        assert linked == ((run.run_id, run.trace_id) if mode == "link" else (None, None))
        assert mode == "parent" or start.trace_id != run.trace_id
        assert start.metadata["wait_s"] < 0.09 + max(0, start.at - start.metadata["eta"])
    carried = set(message.options["waxell"])
    assert where != "setting" or mode != "none" or carried == {"enqueued_at", "mode"}


def test_a_clock_that_is_ahead(records, broker):
    """A message from a host whose clock is ahead has not waited less than nothing; the skew is noted."""

    @dramatiq.actor(broker=broker)
    def task():
        pass

    broker.queues["default"].put(task.message_with_options(waxell={"enqueued_at": time.time() + 60}).encode())
    work(broker)
    [start] = records(RunStarted)
    assert start.metadata["wait_s"] == 0
    assert 0 < start.metadata["clock_skew_s"] <= 60


FOREIGN = [
    None,
    7,
    "text",
    ["a"],
    {"enqueued_at": "soon", "run": 7, "root": [], "trace": "x", "session": {}, "tags": "t", "metadata": 1},
    {"enqueued_at": -1, "eta": 10**400, "parent_task_id": ["x"], "previous": {}, "mode": "sideways"},
    {"enqueued_at": 1e300, "eta": "late", "parent_task_id": "x" * 10_000, "waits": True, "mode": None},
    {"enqueued_at": True, "eta": [1], "waits": "yes", "run": "r" * 500},
]


@pytest.mark.parametrize("delay", [None, 30])
@pytest.mark.parametrize("header", FOREIGN, ids=range(len(FOREIGN)))
def test_what_a_stranger_writes_is_never_fatal(records, broker, caplog, header, delay):
    """A header that is not ours is left out, part by part: each attempt is recorded, nothing is logged."""

    @dramatiq.actor(broker=broker, max_retries=1, **SOON)
    def task():
        raise ValueError("no")

    own = {"waxell": header, "group_completion_uuid": {"not": "one"}, "requeue_timestamp": 10**400, "mine": 1}
    message = task.message_with_options(traceparent=header, tracestate=[1], **own)
    if delay is not None:
        message = message.copy(options={"eta": int(time.time() * 1000) + delay})
    broker.queues["default"].put(message.encode())
    work(broker)
    starts = records(RunStarted)
    assert [start.metadata["attempt"] for start in starts] == [1, 2]
    assert ends(records) == [("retry", "ValueError"), ("error", "ValueError")]
    assert {start.parent_run_id for start in starts} == {""}
    assert starts[1].metadata["previous_run_id"] == starts[0].run_id
    assert [start.metadata.get("wait_s", 0) >= 0 for start in starts] == [True, True]
    assert starts[0].metadata["enqueued_at"] == message.message_timestamp / 1000
    assert {"group_id", "parent_task_id"}.isdisjoint(starts[0].metadata)
    assert "WaxellMiddleware" not in caplog.text
    [dead] = broker.dead_letters
    assert dead.options["mine"] == 1


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
        assert reasons(records) == ["interrupted: the worker did not wait for it any longer"]
    finally:
        go_on.set()
        for thread in worker.workers:
            thread.join(20)
    assert ends(records) == [("interrupted", "")]


def test_a_worker_that_stops_ends_nothing_of_another_s(records, broker):
    """Given two workers in one process, the second one's stop leaves alone what the first is executing."""
    go_on, began = threading.Event(), threading.Event()
    second = StubBroker()
    second.add_middleware(WaxellMiddleware())

    @dramatiq.actor(broker=broker)
    def task():
        began.set()
        go_on.wait(20)

    worker, other = (Worker(each, worker_timeout=20, worker_threads=1) for each in (broker, second))
    worker.start()
    other.start()
    try:
        task.send()
        assert began.wait(20)
        other.stop()
        assert ends(records) == []
    finally:
        go_on.set()
        worker.stop()
        second.close()
    assert ends(records) == [("success", "")]


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
