"""Support tickets, read by a model: triage, then a summary. One import records every call of every attempt.

Run it:  celery -A tasks worker        (README.md has the rest)
"""

import os
from functools import cache

from celery import Celery, chain
from openai import APIConnectionError, OpenAI

import waxell_workers.celery  # noqa: F401  records every task of this app
from waxell_workers import options

app = Celery("tasks", broker=os.environ.get("BROKER_URL", "redis://127.0.0.1:6379/0"))
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True

MODEL = os.environ.get("OPENAI_MODEL", "gpt-4o-mini")


@cache
def client() -> OpenAI:
    """Return this process's client. Made after the fork: connections must not be shared by pool processes."""
    return OpenAI(api_key=os.environ.get("OPENAI_API_KEY", "unset"))


def ask(question: str, model: str = MODEL) -> str:
    """Ask the model one thing."""
    answer = client().chat.completions.create(model=model, messages=[{"role": "user", "content": question}])
    return answer.choices[0].message.content or ""


@app.task
def triage(ticket: str) -> dict[str, str]:
    """Sort a ticket into a queue of the support desk."""
    return {"ticket": ticket, "queue": ask(f"Which queue: billing, login or other? {ticket}")}


@app.task
def summarise(triaged: dict[str, str]) -> str:
    """Write the line that the support desk reads."""
    return ask(f"Summarise for the {triaged['queue']} queue: {triaged['ticket']}")


@app.task
def translate(ticket: str, language: str) -> str:
    """Translate a ticket; fails for a language that the desk does not have."""
    detected = ask(f"In which language is this? {ticket}")
    if language not in ("de", "en", "fr"):
        raise ValueError(f"no desk for {language}; the ticket is in {detected[:20]!r}")
    return ask(f"Translate into {language}: {ticket}")


@app.task(bind=True, autoretry_for=(APIConnectionError, TimeoutError), max_retries=3, retry_backoff=True)
def update_crm(self, ticket: str) -> str:
    """Note a ticket in the CRM, which times out at the first attempt: two attempts, two runs, one task."""
    note = ask(f"Write a CRM note: {ticket}")
    if self.request.retries == 0:
        raise TimeoutError("the CRM did not answer")
    return note


@app.task
@options(flush="task")
def escalate(ticket: str) -> str:
    """Wake somebody up: delivered before this worker slot takes its next task."""
    return ask(f"Is this an emergency? {ticket}")


def send(ticket: str) -> None:
    """Hand one ticket to the worker, in every way this app knows."""
    chain(triage.s(ticket), summarise.s()).delay()
    translate.delay(ticket, "tlh")
    update_crm.delay(ticket)
    escalate.delay(ticket)


if __name__ == "__main__":
    send("I was charged twice and now I cannot log in.")
