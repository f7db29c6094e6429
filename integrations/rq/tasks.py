"""Support tickets, read by a model: triage, then a summary. A worker class records each call of each attempt.

Run it:  rq worker -c settings --worker-class waxell_workers.rq.Worker        (README.md has the rest)
"""

import os
from functools import cache

from openai import OpenAI
from redis import Redis
from rq import Retry, get_current_job

from waxell_workers import options
from waxell_workers.rq import Queue  # RQ's own, and a job knows which other has enqueued it

REDIS_URL = os.environ.get("BROKER_URL", "redis://127.0.0.1:6379/0")
MODEL = os.environ.get("OPENAI_MODEL", "gpt-4o-mini")

queue = Queue(os.environ.get("QUEUE", "default"), connection=Redis.from_url(REDIS_URL))


@cache
def client() -> OpenAI:
    """Return this process's client. Made after the fork: connections must not be shared by work-horses."""
    return OpenAI(api_key=os.environ.get("OPENAI_API_KEY", "unset"))


def ask(question: str, model: str = MODEL) -> str:
    """Ask the model one thing."""
    answer = client().chat.completions.create(model=model, messages=[{"role": "user", "content": question}])
    return answer.choices[0].message.content or ""


def triage(ticket: str) -> None:
    """Sort a ticket into a queue of the support desk, and have it summarised for that."""
    desk = ask(f"Which queue: billing, login or other? {ticket}")
    queue.enqueue(summarise, ticket, desk)


def summarise(ticket: str, desk: str) -> str:
    """Write the line that the support desk reads."""
    return ask(f"Summarise for the {desk} queue: {ticket}")


def translate(ticket: str, language: str) -> str:
    """Translate a ticket; fails for a language that the desk does not have."""
    detected = ask(f"In which language is this? {ticket}")
    if language not in ("de", "en", "fr"):
        raise ValueError(f"no desk for {language}; the ticket is in {detected[:20]!r}")
    return ask(f"Translate into {language}: {ticket}")


def update_crm(ticket: str) -> str:
    """Note a ticket in the CRM, which times out at the first attempt: two attempts, two runs, one job."""
    note = ask(f"Write a CRM note: {ticket}")
    if get_current_job().retries_left == 3:
        raise TimeoutError("the CRM did not answer")
    return note


@options(flush="task")
def escalate(ticket: str) -> str:
    """Wake somebody up: delivered before this worker takes its next job."""
    return ask(f"Is this an emergency? {ticket}")


def send(ticket: str) -> None:
    """Hand one ticket to the worker, in every way this app knows."""
    queue.enqueue(triage, ticket)
    queue.enqueue(translate, ticket, "tlh")
    queue.enqueue(update_crm, ticket, retry=Retry(max=3))
    queue.enqueue(escalate, ticket)
