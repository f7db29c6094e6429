"""What can happen to a task, one task each. The tests run them: `celery -A scenarios worker`.

A scenario makes one call, to a model that is called `marker`, so that the call can be found again at the
server; then it ends as its name says. What it notes as a witness goes to a file of the test's, by a road of
its own. Change one, and it is a bug report.
"""

import os
import signal
import time

from celery.exceptions import Ignore, Reject
from celery.signals import task_postrun
from tasks import app
from tasks import ask as ask_model

from waxell_workers import options
from waxell_workers.testing.conformance import witness

QUESTION = "Say yes."


def call(marker: str) -> str:
    """Call the model; note the beginning and the end of what a task does."""
    witness.note("began", marker)
    answer = ask_model(QUESTION, model=marker)
    witness.note("body", marker)
    return answer


@task_postrun.connect
def note_end(task_id: str, **_: object) -> None:
    """Note that Celery is through with a task: this handler is younger than all others, and so the last."""
    witness.note("over", task_id)


@app.task
def ask(marker: str) -> str:
    """Call the model, and succeed."""
    return call(marker)


@app.task
def ask_then_sleep(marker: str, seconds: float) -> str:
    """Call the model, then be slow: for time limits, revocations and stops in mid-task."""
    answer = call(marker)
    time.sleep(seconds)
    return answer


@app.task
def ask_then_die(marker: str) -> None:
    """Call the model, then die as the kernel's memory killer would have it: nothing runs after it."""
    call(marker)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task
def fail(marker: str) -> None:
    """Call the model, then fail."""
    answer = call(marker)
    raise ValueError(f"the answer has {len(answer)} characters")


@app.task(bind=True)
def flaky(self, marker: str, succeeds_at: int, attempts: int) -> str:
    """Call the model at each of at most `attempts` attempts; fail before the one that `succeeds_at` names."""
    answer = call(marker)
    attempt = self.request.retries + 1
    if attempt < succeeds_at:
        error = ConnectionError(f"attempt {attempt} failed")
        raise self.retry(exc=error, countdown=0, max_retries=attempts - 1)
    return answer


@app.task
def control(marker: str, name: str) -> None:
    """Call the model, then leave by one of Celery's own exceptions."""
    call(marker)
    raise {"Ignore": Ignore(), "Reject": Reject("not today", requeue=False)}[name]


@app.task
def look_then_ask(marker: str) -> str:
    """Note how many runs have ended at the server, then call the model."""
    witness.note("saw", witness.runs_ended_at_server())
    return call(marker)


@app.task
@options(flush="task")
def look_then_ask_and_flush(marker: str) -> str:
    """The same; its records are at the server before this slot takes its next task."""
    witness.note("saw", witness.runs_ended_at_server())
    return call(marker)


@app.task
def enqueue(marker: str, child_marker: str) -> None:
    """Call the model, then enqueue another task."""
    call(marker)
    ask.apply_async((child_marker,), queue=os.environ["QUEUE"])


@app.task
def enqueue_for(marker: str, child_marker: str) -> None:
    """The same, on behalf of somebody."""
    call(marker)
    with witness.on_behalf(marker):
        ask.apply_async((child_marker,), queue=os.environ["QUEUE"])
