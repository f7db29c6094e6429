"""The demo's Celery app: a support desk whose tasks succeed, fail, are retried, hang and die.

The worker imports it by name (`celery -A waxell_workers.cli.demo_celery worker`). Each task notes in the
tally what it did; that waxell-workers records it too is the one import below, as in any user's app.
"""

from __future__ import annotations

import os
import signal
import time
from random import Random
from typing import Any

from celery import Celery, Task, chain
from celery.signals import task_failure, task_success

import waxell_workers.celery  # noqa: F401  records every task

from . import demo_desk
from .demo_desk import HANG_S, VALKEY_SOCKET, tally
from .demo_tally import Attempt

HARD_LIMIT_S = 3
LEAST_TASKS = 10
"""Fewer tasks than this cannot be of every kind."""


class NotedTask(Task):  # type: ignore[misc]  # celery ships no types
    """A task that notes each of its attempts before its body runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tally().attempt_started(self._attempt)
        return super().__call__(*args, **kwargs)

    def ask(self, question: str) -> str:
        """Ask the model."""
        return demo_desk.ask(self._attempt, question)

    def embed(self, text: str) -> list[float]:
        """Have the model embed a text."""
        return demo_desk.embed(self._attempt, text)

    @property
    def _attempt(self) -> Attempt:
        return Attempt(self.request.id, self.request.retries + 1, "celery")


app = Celery("demo", broker=f"redis+socket://{VALKEY_SOCKET}", task_cls=NotedTask)
app.conf.update(
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    worker_send_task_events=False,
)


@app.task(bind=True, name="tickets.triage")  # type: ignore[untyped-decorator]
def triage(self: NotedTask, ticket: str) -> dict[str, str]:
    """Sort a ticket into a queue."""
    return {"ticket": ticket, "queue": self.ask(f"Which queue: billing, login, delivery or other? {ticket}")}


@app.task(bind=True, name="tickets.summarise")  # type: ignore[untyped-decorator]
def summarise(self: NotedTask, triaged: dict[str, str]) -> str:
    """Write the line that the support desk reads."""
    return self.ask(f"Summarise for the {triaged['queue']} queue: {triaged['ticket']}")


@app.task(bind=True, name="knowledge.lookup")  # type: ignore[untyped-decorator]
def lookup(self: NotedTask, ticket: str) -> int:
    """Embed a ticket, to look for articles like it."""
    return len(self.embed(ticket))


@app.task(bind=True, name="tickets.translate")  # type: ignore[untyped-decorator]
def translate(self: NotedTask, ticket: str) -> None:
    """Fail after a call: a language that nobody at the desk speaks."""
    self.ask(f"In which language is this? {ticket}")
    raise ValueError("no desk for this language")


@app.task(bind=True, name="crm.update", max_retries=2)  # type: ignore[untyped-decorator]
def update_crm(self: NotedTask, ticket: str, failures: int) -> None:
    """Fail `failures` times, each after a call, and be retried at most twice."""
    self.ask(f"Write a CRM note: {ticket}")
    if self.request.retries < failures:
        raise self.retry(exc=ConnectionError("the CRM did not answer"), countdown=0.3)


@app.task(bind=True, name="tickets.research", time_limit=HARD_LIMIT_S)  # type: ignore[untyped-decorator]
def research(self: NotedTask, ticket: str) -> None:
    """Hang after a call, until the hard time limit kills the pool process."""
    self.ask(f"What else do we know about this? {ticket}")
    time.sleep(HANG_S)


@app.task(bind=True, name="attachments.read")  # type: ignore[untyped-decorator]
def read_attachment(self: NotedTask, ticket: str) -> None:
    """Die after a call as the kernel's memory killer would have it: nothing runs after it."""
    self.ask(f"What is in the attachment? {ticket}")
    os.kill(os.getpid(), signal.SIGKILL)


@task_success.connect  # type: ignore[untyped-decorator]
def _note_success(sender: NotedTask, **_: object) -> None:
    tally().task_ended(sender.request.id, "success", "celery")


@task_failure.connect  # type: ignore[untyped-decorator]
def _note_failure(sender: NotedTask, task_id: str, exception: BaseException, **_: object) -> None:
    """Note the end of a task; for one whose process is gone, Celery's main process comes here."""
    tally().task_ended(task_id, type(exception).__name__, "celery")
    for successor in sender.request.chain or ():
        tally().task_ended(successor["options"]["task_id"], "not started", "celery")


def send(tasks: int) -> None:
    """Send `tasks` tasks of every kind, those first whose death takes Celery longest to notice."""
    for signature in plan(tasks):
        signature.apply_async()


def plan(tasks: int) -> list[Any]:
    """Return signatures that make `tasks` tasks: one killed, two hanging, the others in fixed proportions."""
    failing, retried, hopeless, lookups = (max(1, tasks * share // 60) for share in (4, 4, 2, 9))
    chains, odd = divmod(tasks - 3 - failing - retried - hopeless - lookups, 2)
    tickets = [demo_desk.ticket(number) for number in range(tasks)]
    routine = [
        *(chain(triage.s(ticket), summarise.s()) for ticket in tickets[:chains]),
        *(lookup.s(ticket) for ticket in tickets[: lookups + odd]),
        *(translate.s(ticket) for ticket in tickets[:failing]),
        *(update_crm.s(ticket, 1) for ticket in tickets[:retried]),
        *(update_crm.s(ticket, 3) for ticket in tickets[:hopeless]),
    ]
    deadly = [read_attachment.s(tickets[0]), research.s(tickets[1]), research.s(tickets[2])]
    return [*deadly, *Random(len(routine)).sample(routine, len(routine))]
