"""A few daemon threads that do jobs until a deadline.

Not a `ThreadPoolExecutor`: the interpreter joins that one's threads when it exits, so a request that hangs
would hold the user's process. Where no thread can be started (Python 3.12 refuses at interpreter exit) the
jobs are done one after another on the calling thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

Job = Callable[[], None]

GRACE_S = 0.2
"""How long after the deadline a job may still end by itself, and again after it was told to."""


class _Shift:
    """The jobs of one call of `run()`, and how many hands are still at work."""

    def __init__(self, jobs: Sequence[Job], deadline: float) -> None:
        self._jobs = deque(jobs)
        self._deadline = deadline
        self._hands = 0
        self._done = threading.Condition()

    def join(self, hands: int) -> None:
        self._hands = hands

    def work(self) -> None:
        try:
            while time.monotonic() < self._deadline:
                try:
                    job = self._jobs.popleft()
                except IndexError:
                    return
                job()
        finally:
            with self._done:
                self._hands -= 1
                self._done.notify_all()

    def wait(self, until: float) -> bool:
        with self._done:
            return self._done.wait_for(lambda: self._hands <= 0, max(0.0, until - time.monotonic()))


class Crew:
    """Up to `size` threads, started when they are first needed and kept."""

    def __init__(self, size: int) -> None:
        self._size = max(1, size)
        self._queue: SimpleQueue[_Shift | None] = SimpleQueue()
        self._threads = 0

    def run(self, jobs: Sequence[Job], deadline: float, overrun: Callable[[], None]) -> bool:
        """Do the jobs, several at a time; jobs that have not begun at the deadline are not begun.

        Args:
            jobs: They must not raise.
            deadline: `time.monotonic()` seconds.
            overrun: Called if jobs are still running a moment after the deadline; should make them end.
                Jobs that do not even then are left alone, with their threads.

        Returns:
            False if jobs were left alone.
        """
        shift = _Shift(jobs, deadline)
        hands = min(self._size, len(jobs))
        self._hire(hands)
        if self._threads == 0:
            shift.join(1)
            shift.work()
            return True
        shift.join(hands)
        for _ in range(hands):
            self._queue.put(shift)
        if shift.wait(deadline + GRACE_S):
            return True
        overrun()
        if shift.wait(time.monotonic() + GRACE_S):
            return True
        self.dismiss()
        return False

    def dismiss(self) -> None:
        """Let the threads end, each after its job; new ones are started when needed."""
        for _ in range(self._threads):
            self._queue.put(None)
        self._queue = SimpleQueue()
        self._threads = 0

    def _hire(self, wanted: int) -> None:
        while self._threads < wanted:
            thread = threading.Thread(
                target=_work, args=(self._queue,), name="waxell-workers-export", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:
                return  # no more threads for us; those that we have do it all
            self._threads += 1


def _work(queue: SimpleQueue[_Shift | None]) -> None:
    while (shift := queue.get()) is not None:
        shift.work()
        del shift  # or the last batch would stay in memory while this thread waits
