"""The demo's Dramatiq app: actors that succeed, fail, are retried and run out of time.

The worker imports it by name (`dramatiq waxell_workers.cli.demo_dramatiq`); that waxell-workers records it is
the one middleware below.
"""

from __future__ import annotations

import time
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import CurrentMessage, Middleware

from ..dramatiq import WaxellMiddleware
from .demo_desk import HANG_S, VALKEY_URL, ask, tally, ticket
from .demo_tally import Attempt

TIMEOUT_MS = 2_000
SLICE_S = 0.05
"""A time limit surfaces between two bytecodes, not in the middle of a sleep."""
LEAST_TASKS = 6


class Noting(Middleware):
    """Notes the end of a message; first in the list, so that its hook runs when `Retries` has decided."""

    def after_process_message(
        self, broker: Any, message: Any, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        """Note an end after which there will be no other attempt."""
        if exception is None or message.failed:
            state = "success" if exception is None else type(exception).__name__
            tally().task_ended(message.message_id, state, "dramatiq")


broker = RedisBroker(url=VALKEY_URL)  # type: ignore[no-untyped-call]  # partly typed
broker.add_middleware(Noting(), before=type(broker.middleware[0]))
broker.add_middleware(CurrentMessage())
broker.add_middleware(WaxellMiddleware())
dramatiq.set_broker(broker)


def _begin() -> Attempt:
    message = CurrentMessage.get_current_message()
    assert message is not None
    attempt = Attempt(message.message_id, (message.options.get("retries") or 0) + 1, "dramatiq")
    tally().attempt_started(attempt)
    return attempt


@dramatiq.actor(max_retries=0)
def triage(text: str) -> None:
    """Sort a ticket into a queue, and have it summarised: an actor that sends to another."""
    desk = "other"
    try:
        desk = ask(_begin(), f"Which queue: billing, login, delivery or other? {text}")
    finally:
        summarise.send(text, desk)


@dramatiq.actor(max_retries=0)
def summarise(text: str, desk: str) -> None:
    """Write the line that the support desk reads."""
    ask(_begin(), f"Summarise for the {desk} queue: {text}")


@dramatiq.actor(max_retries=0)
def translate(text: str) -> None:
    """Fail after a call."""
    ask(_begin(), f"In which language is this? {text}")
    raise ValueError("no desk for this language")


@dramatiq.actor(max_retries=1, min_backoff=100, max_backoff=200)
def update_crm(text: str) -> None:
    """Fail after a call at the first of two attempts."""
    attempt = _begin()
    ask(attempt, f"Write a CRM note: {text}")
    if attempt.number == 1:
        raise ConnectionError("the CRM did not answer")


@dramatiq.actor(max_retries=0, time_limit=TIMEOUT_MS)
def research(text: str) -> None:
    """Hang after a call, until Dramatiq's time limit raises."""
    ask(_begin(), f"What else do we know about this? {text}")
    until = time.monotonic() + HANG_S
    while time.monotonic() < until:
        time.sleep(SLICE_S)


def send(tasks: int) -> None:
    """Send what makes `tasks` messages of every kind."""
    research.send(ticket(0))
    translate.send(ticket(1))
    update_crm.send(ticket(2))
    chains, odd = divmod(tasks - 3, 2)
    for number, actor in enumerate([*[triage] * chains, *[translate] * odd]):
        actor.send(ticket(number))
