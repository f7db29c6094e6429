"""Cyclic garbage whose finalisers record, collected at whatever allocation: also at one of our own.

python finalisers.py NOTES FINALISERS
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys

import promises

import waxell_workers
from waxell_workers.core.runs import get_context

OURS = os.sep + "waxell_workers" + os.sep


class Garbage:
    """Something that a user's library leaves to the garbage collector, and that records when it goes."""

    finalised = inside = mixed = 0

    def __init__(self) -> None:
        self.cycle = self

    def __del__(self) -> None:
        Garbage.finalised += 1
        name = f"finaliser-{Garbage.finalised}"
        caller = sys._getframe(1)
        Garbage.inside += OURS in caller.f_code.co_filename
        before = get_context()
        with waxell_workers.WaxellContext("finaliser") as run:
            promises.run(run.run_id, "success")
            waxell_workers.record_llm_call(model=f"{name}-run")
            promises.call(f"{name}-run")
            Garbage.mixed += get_context() is not run
        Garbage.mixed += get_context() is not before


def main(notes: str, finalisers: int) -> None:
    faulthandler.enable()
    promises.note_to(notes)
    waxell_workers.init(capture=())
    gc.set_threshold(3, 2, 2)
    number = 0
    while Garbage.finalised < finalisers:
        number += 1
        Garbage()
        with waxell_workers.WaxellContext("main", metadata={"number": [number]}) as run:
            promises.run(run.run_id, "success")
            waxell_workers.record_llm_call(model=f"main-{number}", metadata={"a": {"b": [number]}})
            promises.call(f"main-{number}")
            run.record_step("step", {"number": [number]})
        if number % 100 == 0:
            waxell_workers.force_flush(5)
    gc.set_threshold(700, 10, 10)
    flushed = bool(waxell_workers.force_flush(60))
    report = {
        "finalised": Garbage.finalised,
        "inside": Garbage.inside,
        "mixed": Garbage.mixed,
        "flushed": flushed,
        "dropped": waxell_workers.stats().dropped,
    }
    print(json.dumps(report), flush=True)
    gc.disable()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
