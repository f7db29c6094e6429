"""What can happen to a task, one task each. The acceptance tests run them: `celery -A scenarios worker`.

A scenario makes one call, to a model that is called `marker`, so that the call can be found again at the
server; then it ends as its name says. Change one, and it is a bug report.
"""

import os
import signal
import time

from tasks import app
from tasks import ask as ask_model

from waxell_workers import options

QUESTION = "Say yes."


@app.task
def ask(marker: str) -> str:
    """Call the model, and succeed."""
    return ask_model(QUESTION, model=marker)


@app.task
def ask_then_sleep(marker: str, seconds: float) -> str:
    """Call the model, then be slow: for time limits, revocations and stops in mid-task."""
    answer = ask_model(QUESTION, model=marker)
    time.sleep(seconds)
    return answer


@app.task
def ask_then_die(marker: str) -> None:
    """Call the model, then die as the kernel's memory killer would have it: nothing runs after it."""
    ask_model(QUESTION, model=marker)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task
def fail(marker: str) -> None:
    """Call the model, then fail."""
    answer = ask_model(QUESTION, model=marker)
    raise ValueError(f"the answer has {len(answer)} characters")


@app.task(bind=True)
def flaky(self, marker: str, attempts: int) -> str:
    """Call the model at each attempt; only the last of `attempts` succeeds."""
    answer = ask_model(QUESTION, model=marker)
    attempt = self.request.retries + 1
    if attempt < attempts:
        raise self.retry(exc=ConnectionError(f"attempt {attempt} failed"), countdown=0, max_retries=attempts)
    return answer


@app.task
@options(flush="task")
def ask_and_flush(marker: str) -> str:
    """Call the model; its record is at the server before this slot takes its next task."""
    return ask_model(QUESTION, model=marker)
