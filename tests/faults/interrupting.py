"""Interrupts at an instruction of one's choice, and what may be asked of the process after one.

A sweep executes the same piece of work again and again, and lets a framework's real exception surface at the
first, the second, the third … instruction that this package executes in it, up to the last. The interpreter
looks for signals and asynchronous exceptions at some instructions only: a sweep is stricter than life.
"""

from __future__ import annotations

import dis
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from billiard.pool import soft_timeout_sighandler
from dramatiq.middleware import Shutdown, TimeLimitExceeded
from dramatiq.middleware.threading import raise_thread_exception
from greenlet import GreenletExit
from rq.timeouts import JobTimeoutException, UnixSignalDeathPenalty

import waxell_workers
from waxell_workers.core.collector import current
from waxell_workers.core.encoding import decode
from waxell_workers.core.records import Record, RunEnded, RunStarted
from waxell_workers.core.segments import is_first_line

PACKAGE = os.path.dirname(waxell_workers.__file__) + os.sep
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_NOP = dis.opmap["NOP"]
_RESUME = dis.opmap.get("RESUME")
_CONTAINERS = (dict, list, tuple, set, frozenset, MethodType)


class Interrupt:
    """Strikes once in this thread, at the n-th instruction of the package that it executes in the block.

    Args:
        at: which instruction, from 1.
        strike: raises the interrupt, by the framework's own means: its signal handler, its asynchronous
            exception.
    """

    def __init__(self, at: int, strike: Callable[[], object]) -> None:
        self._left = at
        self._strike = strike
        self.where = ""
        """File, line and function in which it struck; empty if the work was over before."""

    def __enter__(self) -> Interrupt:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        # A function's very beginning, where CPython looks for signals; not where something is thrown into it.
        if frame.f_lasti < 0 or frame.f_code.co_code[frame.f_lasti] == _RESUME:
            self._count(frame)
        return self._instruction

    def _instruction(self, frame: FrameType, event: str, _: Any) -> Any:
        # A NOP is what is left of a `try:`; it is in nobody's care, and CPython does not look there.
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] != _NOP:
            self._count(frame)
        return self._instruction

    def _count(self, frame: FrameType) -> None:
        self._left -= 1
        if self._left == 0:
            self.where = _place(frame)
            sys.settrace(None)
            self._strike()


def _place(frame: FrameType) -> str:
    code: CodeType = frame.f_code
    return f"{code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno} {code.co_name}+{frame.f_lasti}"


def sweep(
    strike: Callable[[], object], work: Callable[[Interrupt], object], step: int = 1
) -> Iterator[Interrupt]:
    """Do the work again and again, interrupted at each of its instructions of the package's.

    Args:
        strike: as for `Interrupt`.
        work: called with the interrupt, in whose block it does what is to be interrupted.
        step: 1 for every instruction, 2 for every second one, …

    Yields:
        Each interrupt that has struck.
    """
    at = 1
    while True:
        interrupt = Interrupt(at, strike)
        work(interrupt)
        if not interrupt.where:
            return
        yield interrupt
        at += step


# -- the frameworks' own ways to raise one -----------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A framework's interrupt."""

    exception: type[BaseException]
    strike: Callable[[], object]
    """Raises it in this thread, as the framework does."""
    signal: int = 0
    handler: Any = None
    """The framework's own handler of that signal."""


def _job_timeout(number: int, frame: FrameType | None) -> None:
    UnixSignalDeathPenalty(1, JobTimeoutException).handle_death_penalty(number, frame)


def _in_this_thread(exception: type[BaseException]) -> Callable[[], object]:
    return lambda: raise_thread_exception(threading.get_ident(), exception)


def _by_signal(number: int) -> Callable[[], object]:
    return lambda: signal.raise_signal(number)


def _raise(exception: type[BaseException]) -> None:
    raise exception


KINDS = {
    "celery": Kind(
        SoftTimeLimitExceeded, _by_signal(signal.SIGUSR1), signal.SIGUSR1, soft_timeout_sighandler
    ),
    "rq": Kind(JobTimeoutException, _by_signal(signal.SIGALRM), signal.SIGALRM, _job_timeout),
    "dramatiq": Kind(TimeLimitExceeded, _in_this_thread(TimeLimitExceeded)),
    "shutdown": Kind(Shutdown, _in_this_thread(Shutdown)),
    "greenlet": Kind(GreenletExit, lambda: _raise(GreenletExit)),
    "ctrl-c": Kind(KeyboardInterrupt, _by_signal(signal.SIGINT), signal.SIGINT, signal.default_int_handler),
}


@contextmanager
def armed(kind: Kind) -> Iterator[Kind]:
    """Have a framework's handler in place, if it has one."""
    if not kind.signal:
        yield kind
        return
    before = signal.signal(kind.signal, kind.handler)
    try:
        yield kind
    finally:
        signal.signal(kind.signal, before)


# -- what may be asked afterwards --------------------------------------------------------------


def open_runs() -> list[str]:
    """Return who runs in this process: the agents of the runs that have not ended."""
    return [run.agent_name for run in current().open_runs.values() if run.is_open]


def records() -> list[Record]:
    """Return all that this process has in its journal; each line of it must be whole."""
    directory = current().journal.directory
    paths = sorted(Path(directory).glob("0*.ndjson")) if directory else []
    lines = [line for path in paths for line in path.read_bytes().splitlines() if line]
    return [decode(line) for line in lines if not is_first_line(line)]


def left_behind() -> list[str]:
    """Return what is wrong with the runs in the journal: each has one beginning, and then one end."""
    began: set[str] = set()
    ended: set[str] = set()
    wrong = []
    for record in records():
        if isinstance(record, RunStarted):
            began.add(record.run_id)
        elif record.run_id and record.run_id not in began:
            wrong.append(f"{record.run_id}: {type(record).__name__} before its beginning")
        if isinstance(record, RunEnded):
            ended.add(record.run_id)
    return wrong + [f"{run_id}: no end" for run_id in sorted(began - ended)]


def locked() -> list[str]:
    """Return which of the package's own locks another thread cannot have at this moment."""
    found: list[str] = []

    def try_each() -> None:
        for path, lock in locks():
            if lock.acquire(blocking=False):
                lock.release()
            else:
                found.append(path)

    other = threading.Thread(target=try_each)
    other.start()
    other.join()
    return found


def locks() -> list[tuple[str, Any]]:
    """Return every lock that can be reached from the package's modules, with the way to it."""
    modules = [(name, module) for name, module in sys.modules.items() if name.startswith("waxell_workers")]
    todo = [(name, vars(module)) for name, module in modules]
    seen: set[int] = set()
    found = []
    while todo:
        path, value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _LOCKS):
            found.append((path, value))
        elif _is_ours(value):
            todo += [(f"{path} > {_label(part)}", part) for part in gc.get_referents(value)]
    return found


def _is_ours(value: object) -> bool:
    """True for what is worth looking into: containers, and what the package has defined or made."""
    if isinstance(value, (ModuleType, FrameType)):
        return False
    if isinstance(value, (FunctionType, type)):
        return value.__module__.startswith("waxell_workers")
    kind = type(value)
    return (
        kind in _CONTAINERS or kind.__module__.startswith("waxell_workers") or kind.__module__ == "threading"
    )


def _label(value: object) -> str:
    return type(value).__name__
