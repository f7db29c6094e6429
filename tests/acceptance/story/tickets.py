"""Celery's part: a chain, a group, and a chord with one retry, whose body goes on with RQ."""

import reports
from celery import Celery
from desk import CELERY_URL, ask

import waxell_workers.celery  # noqa: F401
from waxell_workers import WaxellContext

app = Celery("tickets", broker=CELERY_URL, backend=CELERY_URL)
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1

RETRY_S = 2


@app.task
def triage(number: int) -> str:
    """Begin the chain."""
    return ask(f"Which queue has ticket {number}?")


@app.task
def summarise(queue: str) -> str:
    """End the chain."""
    return ask(f"Summarise for {queue}.")


@app.task
def translate(language: str) -> str:
    """Be one of the group."""
    return ask(f"Translate into {language}.")


@app.task
def score(number: int) -> str:
    """Be one of the chord's header."""
    return ask(f"How urgent is ticket {number}?")


@app.task(bind=True)
def check(self, number: int) -> str:
    """Be the other; pay for the model, fail once, and be tried again."""
    answer = ask(f"Is ticket {number} a duplicate?")
    if self.request.retries == 0:
        raise self.retry(exc=TimeoutError("the desk did not answer"), countdown=RETRY_S, max_retries=2)
    return answer


@app.task
def decide(found: list[str]) -> str:
    """Be the chord's body: on behalf of somebody, have two jobs done, one after the other."""
    with WaxellContext("consult", session_id="s-1", user_id="u-7", metadata={"plan": "gold"}) as run:
        run.set_tag("tenant", "acme")
        answer = ask(f"What to do, given {len(found)} answers?")
        fetched = reports.queue.enqueue(reports.fetch, answer)
        reports.queue.enqueue(reports.report, depends_on=fetched)
    return answer
