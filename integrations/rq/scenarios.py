"""What can happen to a job, one function each. The tests run them, with `rq worker` and its siblings.

A scenario makes one call, to a model that is called `marker`, so that the call can be found again at the
server; then it ends as its name says. What it notes as a witness goes to a file of the test's, by a road of
its own. Change one, and it is a bug report.
"""

import os
import signal
import sys
import time

import tasks
from rq import get_current_job
from rq.timeouts import JobTimeoutException

from waxell_workers import options
from waxell_workers.testing.conformance import witness

QUESTION = "Say yes."


def call(marker: str) -> str:
    """Call the model; note the beginning and the end of what a job does."""
    witness.note("began", marker)
    answer = tasks.ask(QUESTION, model=marker)
    witness.note("body", marker)
    return answer


def ask(marker: str) -> str:
    """Call the model, and succeed."""
    return call(marker)


def ask_then_sleep(marker: str, seconds: float) -> str:
    """Call the model, then be slow: for time limits and stops in the middle of a job."""
    answer = call(marker)
    time.sleep(seconds)
    return answer


def ask_then_die(marker: str) -> None:
    """Call the model, then die as the kernel's memory killer would have it: nothing runs after it."""
    call(marker)
    os.kill(os.getpid(), signal.SIGKILL)


def fail(marker: str) -> None:
    """Call the model, then fail."""
    answer = call(marker)
    raise ValueError(f"the answer has {len(answer)} characters")


def flaky(marker: str, succeeds_at: int, attempts: int) -> str:
    """Call the model at each of at most `attempts` attempts; fail before the one that `succeeds_at` names.

    It is enqueued with `retry=Retry(max=attempts - 1)`: with RQ, who enqueues says how often.
    """
    answer = call(marker)
    attempt = attempts - (get_current_job().retries_left or 0)
    if attempt < succeeds_at:
        raise ConnectionError(f"attempt {attempt} failed")
    return answer


def control(marker: str, name: str) -> None:
    """Call the model, then leave by something that RQ knows better than an error."""
    call(marker)
    if name == "SystemExit":
        sys.exit("not today")
    raise JobTimeoutException("not today")


def look_then_ask(marker: str) -> str:
    """Note how many runs have ended at the server, then call the model."""
    witness.note("saw", witness.runs_ended_at_server())
    return call(marker)


@options(flush="task")
def look_then_ask_and_flush(marker: str) -> str:
    """The same; its records are at the server before this worker takes its next job."""
    witness.note("saw", witness.runs_ended_at_server())
    return call(marker)


def enqueue(marker: str, child_marker: str) -> None:
    """Call the model, then enqueue another job."""
    call(marker)
    tasks.queue.enqueue(ask, child_marker)


def enqueue_for(marker: str, child_marker: str) -> None:
    """The same, on behalf of somebody."""
    call(marker)
    with witness.on_behalf(marker):
        tasks.queue.enqueue(ask, child_marker)
