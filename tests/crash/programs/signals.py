"""A main thread that records in a loop, and a signal handler that records, at whatever instruction.

    python signals.py NOTES SIGNALS

Reports how many signals were handled, how many of them in the middle of our own code, and how deep.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
from types import FrameType

import promises

import waxell_workers
from waxell_workers.core.runs import get_context

OURS = os.sep + "waxell_workers" + os.sep
LONGEST_S = 0.002


class Alarm:
    """The handler: a run with a call, and a call outside any run's block of its own."""

    def __init__(self) -> None:
        self.handled = self.inside = self.depth = self.deepest = 0
        self.mixed = 0
        self.is_over = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.handled += 1
        name = f"handler-{self.handled}"
        self.inside += frame is not None and OURS in frame.f_code.co_filename
        self.depth += 1
        self.deepest = max(self.deepest, self.depth)
        if not self.is_over:
            set_alarm()  # before the recording: it is interrupted as well
        before = get_context()
        waxell_workers.record_llm_call(model=f"{name}-first")
        promises.call(f"{name}-first")
        with waxell_workers.WaxellContext("handler") as run:
            promises.run(run.run_id, "success")
            waxell_workers.record_llm_call(model=f"{name}-run")
            promises.call(f"{name}-run")
            self.mixed += get_context() is not run
        # A run whose block was just being left when the signal came is not made current again.
        self.mixed += get_context() is not before and not (before is not None and before._left)
        self.depth -= 1


def set_alarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, LONGEST_S))


def main(notes: str, signals: int) -> None:
    faulthandler.enable()
    promises.note_to(notes)
    waxell_workers.init(capture=())
    alarm = Alarm()
    signal.signal(signal.SIGALRM, alarm)
    set_alarm()  # before the first record: opening the journal is interrupted as well
    number = 0
    while alarm.handled < signals:
        number += 1
        with waxell_workers.WaxellContext("main") as run:
            promises.run(run.run_id, "success")
            waxell_workers.record_llm_call(model=f"main-{number}-run")
            promises.call(f"main-{number}-run")
            alarm.mixed += get_context() is not run
        waxell_workers.record_llm_call(model=f"main-{number}-loose")
        promises.call(f"main-{number}-loose")
        alarm.mixed += get_context() is not None
        if number % 100 == 0:
            waxell_workers.force_flush(5)
    alarm.is_over = True  # first: one more may be under way
    signal.setitimer(signal.ITIMER_REAL, 0)
    flushed = bool(waxell_workers.force_flush(60))
    report = {
        "handled": alarm.handled,
        "inside": alarm.inside,
        "deepest": alarm.deepest,
        "mixed": alarm.mixed,
        "flushed": flushed,
        "dropped": waxell_workers.stats().dropped,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
