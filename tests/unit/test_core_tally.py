"""Counting from anywhere."""

from __future__ import annotations

import sys
import threading

from waxell_workers.core.tally import Tally


def test_threads_lose_no_count() -> None:
    """Given threads that switch all the time, when each of them counts, then the sum is exact."""
    tally, threads, times = Tally(), 8, 20_000

    def work() -> None:
        for _ in range(times):
            tally.add()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        running = [threading.Thread(target=work) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert tally.value == threads * times
    assert tally.value == threads * times, "looking changes nothing"
