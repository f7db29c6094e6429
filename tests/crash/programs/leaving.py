"""An interpreter that comes to its end while everybody still records.

    python leaving.py NOTES [daemon]

A thread goes on after the main module's end; exit handlers were registered before and after `init`; the
module's last object goes when the module is taken apart. With `daemon`, a thread never stops, and Python then
does not take the module apart.
"""

from __future__ import annotations

import atexit
import faulthandler
import sys
import threading
import time
from typing import Any

import promises

import waxell_workers


def record(name: str, *, module: Any = waxell_workers, note: Any = promises) -> None:
    # Both modules as defaults: at the very end, this module's own names are gone.
    module.record_llm_call(model=f"{name}-loose")
    note.call(f"{name}-loose")
    with module.WaxellContext("leaving") as run:
        note.run(run.run_id, "success")
        module.record_llm_call(model=f"{name}-run")
        note.call(f"{name}-run")


class Last:
    """Goes when its module is taken apart."""

    def __del__(self, record: Any = record) -> None:
        record("module-teardown")


def go_on(started: threading.Event) -> None:
    record("thread-first")
    started.set()
    threading.main_thread().join()  # the main module has ended: the interpreter waits for this thread alone
    for number in range(50):
        record(f"thread-{number}")


def never_stop(started: threading.Event) -> None:
    number = 0
    while True:
        number += 1
        waxell_workers.record_llm_call(model=f"daemon-{number}")
        promises.call(f"daemon-{number}")
        started.set()
        time.sleep(0.001)


if __name__ == "__main__":
    faulthandler.enable()
    promises.note_to(sys.argv[1])
    atexit.register(record, "registered-before")
    waxell_workers.init(capture=())
    atexit.register(record, "registered-after-init")
    last = Last()
    started = threading.Event()
    threading.Thread(target=go_on, args=(started,)).start()
    if "daemon" in sys.argv:
        running = threading.Event()
        threading.Thread(target=never_stop, args=(running,), daemon=True).start()
        running.wait()
    started.wait()
    record("main")
    atexit.register(record, "registered-last")
