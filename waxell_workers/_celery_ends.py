"""How an attempt of a Celery task has ended, in words for people; none of them is the user's own.

Only what Celery, billiard and the operating system say is read here: types, numbers, and the fixed texts of
Celery 5.3 to 5.7. What is none of them gets a phrase that claims less.
"""

from __future__ import annotations

import re
import signal

_LOST_BY = re.compile(r"\b(?P<kind>signal|exitcode) (?P<number>\d{1,9})\b")
"""In `WorkerLostError`, as `billiard.common.human_status` writes it."""
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE})
_REPLACED = "Replaced by new task"
"""What `Task.on_replace` raises `Ignore` with."""
_STOPS = ("GreenletExit", "WorkerShutdown", "WorkerTerminate")
_BILLIARD = 256
"""A pool process that is stopped by a signal calls `sys.exit(-(256 - signal))`: `billiard.common`."""


def killed(error: BaseException) -> str:
    """Return why a pool process is gone, from what the main process has for it."""
    text = ", ".join(str(part) for part in error.args)
    kind = type(error).__name__
    if kind == "TimeLimitExceeded":
        return f"hard time limit of {seconds(error.args[0] if error.args else None)}"
    if kind == "Terminated":
        return f"terminated by {signal_name(text)}"
    found = _LOST_BY.search(text)
    if found is None:
        return "the worker has lost the process"
    number = int(found["number"])
    if found["kind"] == "exitcode":
        return f"the process ended with exit code {number}"
    if _BILLIARD // 2 < number < _BILLIARD:
        return f"the process was stopped by {signal_name(_BILLIARD - number)}"
    if number == signal.SIGKILL:
        return "signal 9, probably out of memory"
    name = signal_name(number)
    words = f"signal {number} ({name})" if name != f"signal {number}" else name
    return f"{words}, a crash in native code" if number in _CRASHES else words


def terminated(number: object) -> str:
    """Return how a task was ended that somebody has revoked; Celery names the signal in several ways."""
    return f"terminated by {signal_name(number)} while it ran"


def rejected(error: object) -> str:
    """Return what becomes of a message that its task has rejected."""
    return "rejected, requeued" if getattr(error, "requeue", False) is True else "rejected, dropped"


def ignored(error: object, successor: str) -> str:
    """Return why a task has no result.

    Args:
        error: Celery's `Ignore`.
        successor: the name of the task that has taken its place, if one has.
    """
    if getattr(error, "args", None) == (_REPLACED,):
        return f"ignored: replaced by {successor or 'another task'}"
    return "ignored: the task asked for it"


def retry(attempt: int, attempts: int | None, wait_s: float | None) -> str:
    """Return what comes next.

    Args:
        attempt: the next one's number.
        attempts: how many there may be; None without a limit.
        wait_s: seconds until then; None if Celery has not said.
    """
    text = f"retry: attempt {attempt}" if attempts is None else f"retry: attempt {attempt} of {attempts}"
    if wait_s is None:
        return text
    return f"{text} in {seconds(wait_s)}" if wait_s > 0 else f"{text} at once"


def interrupted(error: BaseException | None) -> str:
    """Return what has gone through a task that is no `Exception`."""
    kind = type(error).__name__
    code = getattr(error, "code", None)
    told = type(code) is int and -_BILLIARD < code < -_BILLIARD // 2
    if kind in _STOPS or told or error is None:
        return "interrupted: the worker was told to stop"
    if isinstance(error, SystemExit):
        return "interrupted: the task asked for the end of its process"
    return f"interrupted: {kind}" if isinstance(error, KeyboardInterrupt) else "interrupted"


def signal_name(number: object) -> str:
    """Return a signal's name, from its number or its name."""
    text = str(number)
    if not text.isdecimal():
        return text if re.fullmatch(r"SIG[A-Z0-9+]{1,12}", text) else "a signal"
    try:
        return signal.Signals(int(text)).name
    except ValueError:
        return f"signal {int(text)}"


def seconds(value: object) -> str:
    """Return a number of seconds, with a decimal only if it has one."""
    if not isinstance(value, (int, float)):
        return "unknown length"
    return f"{value:.1f}".removesuffix(".0") + " s"
