"""Support tickets, read by a model: triage, then a summary. One line records every call of every attempt.

Run it:  dramatiq tasks        (README.md has the rest)
"""

import os
from functools import cache

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import CurrentMessage
from openai import APIConnectionError, OpenAI

from waxell_workers import options
from waxell_workers.dramatiq import WaxellMiddleware

MODEL = os.environ.get("OPENAI_MODEL", "gpt-4o-mini")
QUEUE = os.environ.get("QUEUE", "default")


def make_broker(url: str) -> dramatiq.Broker:
    """Return the broker that a URL names: `redis://…` or `amqp://…`."""
    if url.startswith("amqp"):
        # A trailing slash would be a virtual host without a name.
        return RabbitmqBroker(url=url.rstrip("/"))
    return RedisBroker(url=url)


broker = make_broker(os.environ.get("BROKER_URL", "redis://127.0.0.1:6379/0"))
broker.add_middleware(CurrentMessage())
broker.add_middleware(WaxellMiddleware())  # records every message of this broker
dramatiq.set_broker(broker)


@cache
def client() -> OpenAI:
    """Return this process's client, shared by its threads."""
    return OpenAI(api_key=os.environ.get("OPENAI_API_KEY", "unset"))


def ask(question: str, model: str = MODEL) -> str:
    """Ask the model one thing."""
    answer = client().chat.completions.create(model=model, messages=[{"role": "user", "content": question}])
    return answer.choices[0].message.content or ""


@dramatiq.actor(queue_name=QUEUE)
def triage(ticket: str) -> dict[str, str]:
    """Sort a ticket into a queue of the support desk."""
    return {"ticket": ticket, "queue": ask(f"Which queue: billing, login or other? {ticket}")}


@dramatiq.actor(queue_name=QUEUE)
def summarise(triaged: dict[str, str]) -> None:
    """Write the line that the support desk reads."""
    ask(f"Summarise for the {triaged['queue']} queue: {triaged['ticket']}")


@dramatiq.actor(queue_name=QUEUE, max_retries=0)
def translate(ticket: str, language: str) -> None:
    """Translate a ticket; fails for a language that the desk does not have."""
    detected = ask(f"In which language is this? {ticket}")
    if language not in ("de", "en", "fr"):
        raise ValueError(f"no desk for {language}; the ticket is in {detected[:20]!r}")
    ask(f"Translate into {language}: {ticket}")


def is_passing(retries: int, error: BaseException) -> bool:
    """True for an error that may be gone at the next attempt."""
    return retries < 3 and isinstance(error, (APIConnectionError, TimeoutError))


@dramatiq.actor(queue_name=QUEUE, retry_when=is_passing, min_backoff=1000)
def update_crm(ticket: str) -> None:
    """Note a ticket in the CRM, which times out at the first attempt: two attempts, two runs, one task."""
    ask(f"Write a CRM note: {ticket}")
    message = CurrentMessage.get_current_message()
    if message is not None and not message.options.get("retries"):
        raise TimeoutError("the CRM did not answer")


@dramatiq.actor(queue_name=QUEUE)
@options(flush="task")
def escalate(ticket: str) -> None:
    """Wake somebody up: delivered before this worker thread takes its next message."""
    ask(f"Is this an emergency? {ticket}")


def send(ticket: str) -> None:
    """Hand one ticket to the worker, in every way this app knows."""
    (triage.message(ticket) | summarise.message()).run()
    dramatiq.group([translate.message(ticket, language) for language in ("de", "tlh")]).run()
    update_crm.send(ticket)
    escalate.send(ticket)


if __name__ == "__main__":
    send("I was charged twice and now I cannot log in.")
