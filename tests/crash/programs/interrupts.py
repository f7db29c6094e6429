"""A thread that records and into which exceptions are raised from outside, as Dramatiq's time limit does.

    python interrupts.py NOTES INTERRUPTS plain|tasks

`plain` records in a block of its own; `tasks` begins and ends each round as an adapter does. Reports how many
interrupts reached the thread's own code, how many of them came out of ours, how many left a run current that
should not be, how many tasks took such a run for their parent; and, two undisturbed rounds later, whether a
run is still current, and how many tasks and blocks are still open.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import random
import sys
import threading
import time
from types import TracebackType

import promises

import waxell_workers
from waxell_workers.core import tasks
from waxell_workers.core.collector import current
from waxell_workers.core.runs import get_context

OURS = os.sep + "waxell_workers" + os.sep
PATIENCE_S = 60.0


class Interrupt(BaseException):
    """Raised from outside, at any instruction."""


class Victim(threading.Thread):
    """Records until it is told to stop, and starts again after each interrupt."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.round = {"plain": self.record, "tasks": self.work}[style]
        self.number = self.caught = self.inside = self.left_current = self.adopted = 0
        self.still_current: waxell_workers.WaxellContext | None = None
        self.is_done = self.is_current_to_the_end = False

    def run(self) -> None:
        while not self.is_done:
            try:
                self.go_on()
            except Interrupt:
                self.caught += 1
        self.is_current_to_the_end = get_context() is not None

    def go_on(self) -> None:
        while not self.is_done:
            try:
                while not self.is_done:
                    self.round()
            except Interrupt as interrupt:
                self.inside += is_ours(interrupt.__traceback__)
                self.look_what_is_current()
                self.caught += 1  # last: from here on the next one may come

    def look_what_is_current(self) -> None:
        """Count a run that this interrupt has left current, and none that an earlier one has."""
        run = get_context()
        self.left_current += run is not None and run is not self.still_current
        self.still_current = run

    def record(self) -> None:
        """Record a run with a call, and a call outside any."""
        self.number += 1
        with waxell_workers.WaxellContext("block") as run:
            promises.run(run.run_id, "any")
            self.call(f"{self.number}-run")
        self.call(f"{self.number}-loose")

    def work(self) -> None:
        """Execute a task in the way in which adapters call the core."""
        self.number += 1
        task = tasks.Task(framework="test", name="task", task_id=str(self.number))
        attempt = tasks.prepare(task, tasks.Options())
        state = "interrupted"
        try:
            tasks.begin(attempt)
            self.adopted += attempt.run.parent_run_id is not None
            self.record()
            state = "success"
        finally:
            tasks.task_ended(attempt, state)

    def call(self, marker: str) -> None:
        waxell_workers.record_llm_call(model=marker)
        promises.call(marker)


def is_ours(trace: TracebackType | None) -> bool:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and OURS in trace.tb_frame.f_code.co_filename


def interrupt(victim: Victim) -> bool:
    """Raise one into the thread; true if it arrived in the thread's own code."""
    caught = victim.caught
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(victim.ident or 0), ctypes.py_object(Interrupt))
    deadline = time.monotonic() + PATIENCE_S
    while victim.caught == caught:
        if time.monotonic() > deadline:
            return False
        time.sleep(0)
    return True


def main(notes: str, interrupts: int, style: str) -> None:
    faulthandler.enable()
    promises.note_to(notes)
    waxell_workers.init(capture=())
    sys.setswitchinterval(1e-5)
    victim = Victim(style)
    victim.start()
    arrived = 0
    for _ in range(interrupts):
        time.sleep(random.uniform(0, 0.001))
        arrived += interrupt(victim)
    rounds = victim.number
    while victim.number < rounds + 2:  # what the last one has left open, the next task closes
        time.sleep(0.001)
    victim.is_done = True
    victim.join()
    waxell_workers.record_llm_call(model="afterwards")
    promises.call("afterwards")
    flushed = bool(waxell_workers.force_flush(300))
    report = {
        "arrived": arrived,
        "inside": victim.inside,
        "left_current": victim.left_current,
        "current_to_the_end": victim.is_current_to_the_end,
        "adopted": victim.adopted,
        "tasks_left_open": sum(run.agent_name == "task" for run in current().open_runs.values()),
        "blocks_left_open": sum(run.agent_name == "block" for run in current().open_runs.values()),
        "flushed": flushed,
        "dropped": waxell_workers.stats().dropped,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
