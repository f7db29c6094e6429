"""The demo's RQ app: jobs that succeed, fail, are retried, run out of time and die.

The worker takes its settings from here (`rq worker -c waxell_workers.cli.demo_rq`); that waxell-workers
records it is the worker's class. How jobs have ended is for RQ's own registries to say.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from redis import Redis
from rq import Retry, get_current_job
from rq.registry import FailedJobRegistry, FinishedJobRegistry

from ..rq import Queue
from .demo_desk import HANG_S, VALKEY_URL, ask, tally, ticket
from .demo_tally import Attempt

REDIS_URL = VALKEY_URL
QUEUE = "desk"
TIMEOUT_S = 2
LEAST_TASKS = 6


def _begin(attempts: int = 1) -> Attempt:
    """Note the attempt that is being made; RQ knows how many of `attempts` are left."""
    job = get_current_job()
    assert job is not None
    attempt = Attempt(job.id, attempts - (job.retries_left or 0), "rq")
    tally().attempt_started(attempt)
    return attempt


def triage(text: str) -> None:
    """Sort a ticket into a queue, and have it summarised: a job that enqueues another."""
    desk = "other"
    try:
        desk = ask(_begin(), f"Which queue: billing, login, delivery or other? {text}")
    finally:
        Queue(QUEUE, connection=Redis.from_url(REDIS_URL)).enqueue(summarise, text, desk)


def summarise(text: str, desk: str) -> None:
    """Write the line that the support desk reads."""
    ask(_begin(), f"Summarise for the {desk} queue: {text}")


def translate(text: str) -> None:
    """Fail after a call."""
    ask(_begin(), f"In which language is this? {text}")
    raise ValueError("no desk for this language")


def update_crm(text: str) -> None:
    """Fail after a call at the first of two attempts."""
    attempt = _begin(attempts=2)
    ask(attempt, f"Write a CRM note: {text}")
    if attempt.number == 1:
        raise ConnectionError("the CRM did not answer")


def research(text: str) -> None:
    """Hang after a call, until RQ's time limit raises."""
    ask(_begin(), f"What else do we know about this? {text}")
    time.sleep(HANG_S)


def read_attachment(text: str) -> None:
    """Die after a call as the kernel's memory killer would have it: nothing runs after it."""
    ask(_begin(), f"What is in the attachment? {text}")
    os.kill(os.getpid(), signal.SIGKILL)


def send(tasks: int) -> None:
    """Enqueue what makes `tasks` jobs of every kind."""
    queue = Queue(QUEUE, connection=Redis.from_url(REDIS_URL))
    queue.enqueue(read_attachment, ticket(0))
    queue.enqueue(research, ticket(1), job_timeout=TIMEOUT_S)
    queue.enqueue(translate, ticket(2))
    queue.enqueue(update_crm, ticket(3), retry=Retry(max=1))
    chains, odd = divmod(tasks - 4, 2)
    plan: list[Callable[[str], None]] = [*[triage] * chains, *[translate] * odd]
    for number, function in enumerate(plan):
        queue.enqueue(function, ticket(number))


def ended(connection: Redis) -> int:
    """Return how many jobs have ended, by RQ's own account."""
    registries = (FinishedJobRegistry, FailedJobRegistry)
    return sum(registry(QUEUE, connection=connection).count for registry in registries)
