"""Dramatiq's time limit and its notice of shutdown, raised into worker threads while our code runs.

The sweep goes through what a worker thread does with each message, in a thread of Dramatiq's own class that
goes on to the next message; Dramatiq raises its interrupts itself, by `raise_thread_exception`.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import Middleware, Retries, Shutdown, TimeLimitExceeded
from dramatiq.worker import _ConsumerThread, _WorkerThread

import waxell_workers
from tests.faults.interrupting import KINDS, Interrupt, left_behind, locked, open_runs, sweep
from tests.torture import effort, found
from waxell_workers import WaxellContext, get_context
from waxell_workers.dramatiq import WaxellMiddleware
from waxell_workers.testing import record_runs

pytestmark = pytest.mark.timeout(effort(400, 1800))

seen: list[str] = []
"""What has surfaced in the actor."""


def ask() -> None:
    try:
        with WaxellContext("block") as run:
            run.record_step("step", {"number": 1})
            waxell_workers.record_llm_call(model="asked")
    except BaseException as error:
        seen.append(type(error).__name__)
        raise


class Slot:
    """A broker in memory and one worker thread's work, done message by message."""

    def __init__(self, place: str) -> None:
        self.broker = StubBroker()
        self.broker.add_middleware(WaxellMiddleware(), **place_of(self.broker, place))
        self.broker.emit_after("process_boot")
        self.actor = dramatiq.actor(ask, broker=self.broker, max_retries=0, actor_name="ask")
        self._work: queue.PriorityQueue[Any] = queue.PriorityQueue()
        settings: dict[str, Any] = {"broker": self.broker, "work_queue": self._work, "worker_timeout": 10}
        self._consumer = _ConsumerThread(queue_name="default", prefetch=10_000, **settings)
        self._consumer.consumer = self.broker.consume("default", prefetch=10_000)
        self.thread = _WorkerThread(consumers={"default": self._consumer}, **settings)

    def receive(self) -> Any:
        """Send a message, and return it as a worker thread gets it."""
        self.actor.send()
        self._work.put((0, None))
        return next(self._consumer.consumer)


def place_of(broker: StubBroker, place: str) -> dict[str, type[Middleware]]:
    return {"first": {"before": type(broker.middleware[0])}, "amid": {"before": Retries}, "last": {}}[place]


@pytest.fixture
def slot(request: pytest.FixtureRequest) -> Slot:
    return Slot(request.param)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("slot", ["first", "amid", "last"], indirect=True)
@pytest.mark.parametrize("kind", ["dramatiq", "shutdown"])
def test_an_interrupt_anywhere_in_our_code(slot: Slot, kind: str) -> None:
    """Given a message, when an interrupt surfaces at any instruction of ours, then the message fails by it;
    or Dramatiq, which was done with the actor, has its thread end. Each is one run, and none is open or
    current once the slot takes its next message, or is gone."""
    exception, strike = KINDS[kind].exception, KINDS[kind].strike
    assert exception in (TimeLimitExceeded, Shutdown)
    seen.clear()
    states: dict[str, str] = {}
    places: dict[str, str] = {}
    died: set[str] = set()
    struck = 0

    def interrupted(interrupt: Interrupt) -> None:
        nonlocal struck
        message, following = slot.receive(), slot.receive()

        def work() -> None:
            try:
                with interrupt:
                    slot.thread.process_message(message)
                assert get_context() is None, interrupt.where
                assert open_runs() == [], interrupt.where
            except exception:
                died.add(message.message_id)
                if struck % 2:  # the thread ends, as Dramatiq's would
                    return
            slot.thread.process_message(following)
            assert get_context() is None, interrupt.where
            states[following.message_id] = "success"

        problems: list[BaseException] = []
        in_a_thread(work, problems)
        assert problems == [], interrupt.where
        assert open_runs() == [], interrupt.where
        struck += bool(interrupt.where)
        places[message.message_id] = places[following.message_id] = interrupt.where
        if message.message_id not in died:
            failed = ("error" if kind == "dramatiq" else "interrupted") if interrupt.where else "success"
            states[message.message_id] = failed

    with record_runs() as runs:
        for _ in sweep(strike, interrupted, step=effort(23, 3)):
            pass
        assert locked() == []
        assert left_behind() == []
        of_messages = {run.task_id: run for run in runs if run.task_id}
        wrong = {
            (places[task_id], of_messages[task_id].state if task_id in of_messages else "no run", state)
            for task_id, state in states.items()
            if task_id not in of_messages or of_messages[task_id].state != state
        }
        assert wrong == set()
        assert {run.parent_run_id for run in of_messages.values()} == {""}
        own = {run.run_id for run in of_messages.values()}
        assert {run.parent_run_id for run in runs if not run.task_id} <= own
        assert all(call.run_id for call in runs.calls), "a call is outside any run"
    found(f"{exception.__name__} in our code", struck=struck, in_the_actor=len(seen), ended_thread=len(died))
    assert len(seen) > 30
    assert len(died) > 5
    assert struck - len(seen) - len(died) > 5


def in_a_thread(work: Any, problems: list[BaseException]) -> None:
    """Do something in a thread of its own, which is gone when this returns."""

    def guarded() -> None:
        try:
            work()
        except BaseException as problem:  # noqa: BLE001  for the test's own thread to see
            problems.append(problem)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
