"""How an attempt of an RQ job has ended, in words for people; never the user's own, but names of classes."""

from __future__ import annotations

import os
import re
import signal
import time

from rq.timeouts import JobTimeoutException

_LIMIT = re.compile(r"\((\d+) seconds\)")
"""In RQ's own words of a `JobTimeoutException`: the job's limit, or that of one of its callbacks."""
_PATIENCE_S = 60
"""So long after its time limit does RQ kill a work-horse."""
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT})


def of_error(error: BaseException, state: str, *, told_to_stop: bool) -> str:
    """Return what an error does not say by itself, as a whole phrase; empty if it says all."""
    if state == "interrupted":
        if told_to_stop and type(error) is SystemExit and error.code is None:  # RQ's own
            return "interrupted: the worker was told twice to stop"
        return f"interrupted: {type(error).__name__} went through the job"
    if type(error) is not JobTimeoutException:
        return ""
    said = error.args[0] if error.args else None
    limit = _LIMIT.search(said) if type(said) is str else None
    return "" if limit is None else f"error: time limit of {limit[1]} s"


def of_retry(number: int, of: int, interval_s: float) -> str:
    """Return which retry comes next, as a whole phrase."""
    return f"retry: {number} of {of}" + (f" in {interval_s:g} s" if interval_s else "")


def of_work_horse(status: int | None, limit_s: float | None, began: float | None) -> str:
    """Return why a work-horse is gone.

    Args:
        status: as `os.wait4` has it; None if RQ has killed it (RQ 1.16 to 3.0 do not keep it then), or if
            somebody else has waited for it.
        limit_s: the job's time limit; negative for none.
        began: when RQ began to look after the work-horse, in Unix seconds.
    """
    if status is None:
        if limit_s and began is not None and 0 < limit_s + _PATIENCE_S <= time.time() - began:
            return f"{_PATIENCE_S} s past its time limit of {limit_s:g} s"
        return "the work-horse is gone, and nobody has kept its status"
    if not os.WIFSIGNALED(status):
        return f"the work-horse ended with status {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    if number == signal.SIGKILL:
        return f"signal {number}, probably out of memory"
    crash = ", a crash in native code" if number in _CRASHES else ""
    return f"signal {number} ({_name(number)}){crash}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return "unknown"
