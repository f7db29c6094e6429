"""A parent that forks again and again while its threads record, flush and ship.

    python forker.py NOTES FORKS SEED

Each child records, and leaves in one of the ways of `KINDS`. One that hangs is told to dump its stack. On
stdout comes one line of JSON: what became of the children, and what the parent holds before and after.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter

import promises

import waxell_workers
from waxell_workers.core import shipper

KINDS = ("leaves", "inherits", "flushes", "has_child", "exits", "abandons", "dies")
AT_ONCE = 6
HUNG_S = 60.0
PAUSE_S = 0.01

shipper.SEGMENT_BYTES = 64 << 10
# Python 3.12 and later warn of what this program is for.
warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)


def call(marker: str, run: waxell_workers.WaxellContext | None = None) -> None:
    (waxell_workers if run is None else run).record_llm_call(model=marker, prompt_preview="x" * 300)
    promises.call(marker)


def child(kind: str, name: str, inherited: waxell_workers.WaxellContext) -> None:
    """Record in a run of its own, outside any and, if it stands in one, in the parent's; then leave."""
    call(f"{name}-before")
    if kind == "inherits":
        call(f"{name}-inherited", inherited)
        inherited.end("error")  # not its own to end
    with waxell_workers.WaxellContext("child") as run:
        promises.run(run.run_id, "killed" if kind in ("abandons", "dies") else "success")
        call(f"{name}-run")
        if kind == "abandons":
            os._exit(0)
        if kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
    if kind == "flushes" and not waxell_workers.force_flush(30):
        os._exit(3)
    if kind == "has_child":
        grandchild = os.fork()
        if grandchild == 0:
            child("leaves", f"{name}-grandchild", inherited)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
    if kind == "exits":
        sys.exit(0)
    os._exit(0)


def record(stopping: threading.Event, name: str) -> None:
    number = 0
    while not stopping.is_set():
        number += 1
        with waxell_workers.WaxellContext("thread") as run:
            promises.run(run.run_id, "success")
            call(f"{name}-{number}-run")
        call(f"{name}-{number}-loose")
        time.sleep(PAUSE_S)


def flush(stopping: threading.Event) -> None:
    while not stopping.is_set():
        waxell_workers.force_flush(5)
        waxell_workers.stats()
        time.sleep(PAUSE_S)


class Nursery:
    """The children that live, and what became of the others."""

    def __init__(self) -> None:
        self.born: dict[int, tuple[float, str]] = {}
        self.failed: list[tuple[str, int]] = []
        self.kinds: Counter[str] = Counter()
        self.hung = 0

    def add(self, pid: int, kind: str) -> None:
        self.born[pid] = (time.monotonic(), kind)
        self.kinds[kind] += 1

    def reap(self) -> bool:
        """Bury one that has ended, if there is one."""
        for pid, (since, kind) in list(self.born.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self.born[pid]
                code = os.waitstatus_to_exitcode(status)
                if code != (-signal.SIGKILL if kind == "dies" else 0):
                    self.failed.append((kind, code))
                return True
            if time.monotonic() - since > HUNG_S:
                self.hung += 1
                self.born[pid] = (time.monotonic(), kind)
                os.kill(pid, signal.SIGABRT)  # faulthandler dumps its stack
        return False


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def main(notes: str, forks: int, seed: int) -> None:
    faulthandler.enable()
    promises.note_to(notes)
    waxell_workers.init(capture=())
    chance = random.Random(seed)
    long_run = waxell_workers.WaxellContext("parent")
    long_run.start()
    promises.run(long_run.run_id, "success")
    call("first")
    warm = bool(waxell_workers.force_flush(60))
    before = descriptors()

    stopping = threading.Event()
    threads = [threading.Thread(target=record, args=(stopping, f"thread-{n}")) for n in range(2)]
    threads += [threading.Thread(target=flush, args=(stopping,))]
    for thread in threads:
        thread.start()
    nursery = Nursery()
    for number in range(forks):
        kind = KINDS[number] if number < len(KINDS) else chance.choice(KINDS)
        while len(nursery.born) >= AT_ONCE and not nursery.reap():
            time.sleep(0.001)
        if kind == "inherits":
            long_run.enter()
        pid = os.fork()
        if pid == 0:
            try:
                child(kind, f"child-{number}", long_run)
            except Exception:  # noqa: BLE001  a child must not go on as a second parent
                traceback.print_exc()
                os._exit(4)
        if kind == "inherits":
            long_run.leave()
        nursery.add(pid, kind)
    while nursery.born:
        if not nursery.reap():
            time.sleep(0.001)
    stopping.set()
    for thread in threads:
        thread.join()
    long_run.end()
    flushed = bool(waxell_workers.force_flush(120))
    report = {
        "failed": nursery.failed,
        "hung": nursery.hung,
        "kinds": nursery.kinds,
        "flushed": warm and flushed,
        "dropped": waxell_workers.stats().dropped,
        "descriptors": [before, descriptors()],
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
