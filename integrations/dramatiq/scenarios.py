"""What can happen to a message, one actor each. The tests run them: `dramatiq scenarios`.

A scenario makes one call, to a model that is called `marker`, so that the call can be found again at the
server; then it ends as its name says. What it notes as a witness goes to a file of the test's, by a road of
its own. Change one, and it is a bug report.
"""

import os
import signal
import sys
import time
from typing import Any

import dramatiq
from dramatiq.middleware import CurrentMessage, Middleware, Shutdown, SkipMessage, TimeLimitExceeded
from tasks import QUEUE, broker
from tasks import ask as ask_model

from waxell_workers import options
from waxell_workers.testing.conformance import witness

QUESTION = "Say yes."
SLICE_S = 0.05
SOON_MS = 1
NOT_IN_THIS_TEST_MS = 24 * 3600 * 1000


class Account(Middleware):
    """Writes what Dramatiq says of each attempt, once it has acknowledged or rejected the message."""

    def __init__(self) -> None:
        self.ends: dict[str, str] = {}

    def after_process_message(
        self, broker: Any, message: Any, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        """Keep the exception as it reaches the broker's middleware."""
        raised = "" if exception is None else f"raised {type(exception).__name__}: {exception}"
        self.ends[message.message_id] = raised or "succeeded"

    def after_skip_message(self, broker: Any, message: Any) -> None:
        """Keep that the message was skipped."""
        self.ends[message.message_id] = "skipped"

    def after_ack(self, broker: Any, message: Any) -> None:
        """Say that the broker has the acknowledgement."""
        self._say("acknowledged", message)

    def after_nack(self, broker: Any, message: Any) -> None:
        """Say that the broker has the message among the dead letters."""
        self._say("rejected", message)

    def _say(self, word: str, message: Any) -> None:
        end = self.ends.pop(message.message_id, "")
        if end:  # otherwise a consumer moved it from the queue of the delayed
            sys.stderr.write(f"{word} {message.message_id} {end}\n")
            sys.stderr.flush()


broker.add_middleware(Account())


def call(marker: str) -> str:
    """Call the model; note the beginning and the end of what an actor does."""
    witness.note("began", marker)
    answer = ask_model(QUESTION, model=marker)
    witness.note("body", marker)
    return answer


@dramatiq.actor(queue_name=QUEUE, max_retries=0)
def ask(marker: str) -> None:
    """Call the model, and succeed."""
    call(marker)


@dramatiq.actor(queue_name=QUEUE, max_retries=0)
def ask_then_sleep(marker: str, seconds: float) -> None:
    """Call the model, then be slow: for time limits and stops in mid-task."""
    call(marker)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:  # in slices: Dramatiq interrupts between two of Python's steps
        time.sleep(SLICE_S)


@dramatiq.actor(queue_name=QUEUE, max_retries=0)
def ask_then_die(marker: str) -> None:
    """Call the model, then die as the kernel's memory killer would have it: nothing runs after it."""
    call(marker)
    os.kill(os.getpid(), signal.SIGKILL)


@dramatiq.actor(queue_name=QUEUE, max_retries=0)
def fail(marker: str) -> None:
    """Call the model, then fail."""
    answer = call(marker)
    raise ValueError(f"the answer has {len(answer)} characters")


@dramatiq.actor(queue_name=QUEUE, min_backoff=SOON_MS, max_backoff=SOON_MS)
def flaky(marker: str, succeeds_at: int, attempts: int) -> None:
    """Call the model at each attempt; fail before the one that `succeeds_at` names.

    How many attempts there are at most is an option of the message, `max_retries`, one less than `attempts`.
    """
    message = CurrentMessage.get_current_message()
    attempt = (message.options.get("retries") or 0) + 1 if message is not None else 1
    call(marker)
    if attempt < succeeds_at:
        raise ConnectionError(f"attempt {attempt} failed")


def is_asked_for(retries: int, error: BaseException) -> bool:
    """True for the exceptions by which an actor asks to be retried."""
    return isinstance(error, (dramatiq.Retry, dramatiq.RateLimitExceeded))


CONTROLS: dict[str, BaseException] = {
    "Retry": dramatiq.Retry("not today", delay=NOT_IN_THIS_TEST_MS),
    "RateLimitExceeded": dramatiq.RateLimitExceeded("not today"),
    "SkipMessage": SkipMessage("not today"),
    "Shutdown": Shutdown("not today"),
    "TimeLimitExceeded": TimeLimitExceeded("not today"),
    "SystemExit": SystemExit("not today"),
}


@dramatiq.actor(queue_name=QUEUE, retry_when=is_asked_for, min_backoff=NOT_IN_THIS_TEST_MS)
def control(marker: str, name: str) -> None:
    """Call the model, then leave by one of Dramatiq's own exceptions."""
    call(marker)
    raise CONTROLS[name]


@dramatiq.actor(queue_name=QUEUE, max_retries=0)
def look_then_ask(marker: str) -> None:
    """Note how many runs have ended at the server, then call the model."""
    witness.note("saw", witness.runs_ended_at_server())
    call(marker)


@dramatiq.actor(queue_name=QUEUE, max_retries=0)
@options(flush="task")
def look_then_ask_and_flush(marker: str) -> None:
    """The same; its records are at the server before this thread takes its next message."""
    witness.note("saw", witness.runs_ended_at_server())
    call(marker)


@dramatiq.actor(queue_name=QUEUE, max_retries=0)
def enqueue(marker: str, child_marker: str) -> None:
    """Call the model, then enqueue another message."""
    call(marker)
    ask.send(child_marker)


@dramatiq.actor(queue_name=QUEUE, max_retries=0)
def enqueue_for(marker: str, child_marker: str) -> None:
    """The same, on behalf of somebody."""
    call(marker)
    with witness.on_behalf(marker):
        ask.send(child_marker)
