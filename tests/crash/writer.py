"""A process of the kill loop that records, in threads and forked children, until it is killed or stopped.

    python -m tests.crash.writer DIRECTORY NAME [--once]

Before each record it notes what it is about to issue, after it that the journal took it; around a flush, that
it asks, and that the answer was yes. Each process notes in a file of its own, one `write` a line, so that a
note survives its writer as a record must. One byte on standard output tells the killer what begins:

    w  a write       f  a forked child runs       u  a flush

    notes:   I kind marker run   about to issue a record (c call, l call outside any run, s step, t tag)
             A marker            the journal has it
             D marker            it was refused, and counted
             R run   S run       about to begin a run; it has begun
             E run state  X run  about to end a run; it has ended
             f n  F n time  N n  about to flush; yes, at that time.monotonic(); no
             Q                   the process is about to end by itself
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable

import waxell_workers
from tests.crash import payloads
from waxell_workers.core import launch
from waxell_workers.core.runs import Run

SMALL_LIMITS = """
from waxell_workers.core import foreground, shipper, tracking
shipper.SEGMENT_BYTES = 48 << 10
tracking._REASON_GRACE_S = 0.5
"""
"""Segments are rotated all the time, and a dead run is closed by a shipper that may soon be killed itself."""


def use_small_limits(tag: str) -> None:
    """Give the shippers that this process starts small limits; `tag` marks those that are processes."""
    exec(SMALL_LIMITS, {})
    command = "[sys.argv[1], '-m', 'waxell_workers.core.foreground']"
    assert command in launch._BOOT
    code = f"{SMALL_LIMITS}foreground.main()"
    launch._BOOT = launch._BOOT.replace(command, f"[sys.argv[1], '-c', {code!r}, {tag!r}]")


class Notes:
    """This process's notes; a forked child makes its own."""

    def __init__(self, directory: str, name: str) -> None:
        self.directory = directory
        self.name = f"{name}.{os.getpid()}"
        path = f"{directory}/{self.name}.log"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def note(self, *words: object) -> None:
        os.write(self._descriptor, (" ".join(map(str, words)) + "\n").encode())


def tell(event: bytes) -> None:
    """Tell the killer what begins; nobody need listen."""
    try:
        os.write(1, event)
    except OSError:  # the pipe is full, or the killer has gone
        pass


class Work:
    """What one thread records."""

    def __init__(self, notes: Notes, thread: str) -> None:
        self._notes = notes
        self._thread = thread
        self._count = 0
        self.chance = random.Random(f"{notes.name} {thread}")

    def stopped(self) -> bool:
        return os.path.exists(f"{self._notes.directory}/stop")

    def marker(self) -> str:
        self._count += 1
        return f"{self._notes.name}.{self._thread}.{self._count}"

    def issue(self, kind: str, marker: str, run_id: str, write: Callable[[], None]) -> None:
        note = self._notes.note
        note("I", kind, marker, run_id)
        before = refused()
        tell(b"w")
        write()
        note("A" if refused() == before else "D", marker)

    def record(self, run: Run) -> None:
        """Issue one record in a run."""
        marker = self.marker()
        kind = self.chance.choices("cst", (8, 1, 1))[0]
        if kind == "c":
            self.issue(kind, marker, run.run_id, lambda: run.record_llm_call(**payloads.call(marker)))
        elif kind == "s":
            self.issue(kind, marker, run.run_id, lambda: run.record_step(marker, payloads.output(marker)))
        else:
            self.issue(kind, marker, run.run_id, lambda: run.set_tag(marker, payloads.tag(marker)))

    def record_loose(self) -> None:
        """Issue a call outside any run; in a child that was forked inside one, it belongs to that."""
        marker = self.marker()
        run = waxell_workers.get_context()
        fields = payloads.call(marker, loose=True)
        self.issue("l", marker, run.run_id if run else "-", lambda: waxell_workers.record_llm_call(**fields))

    def begin(self) -> waxell_workers.WaxellContext:
        note = self._notes.note
        run = waxell_workers.WaxellContext("torture", "kill loop", metadata={"writer": self._notes.name})
        note("R", run.run_id)
        before = refused()
        tell(b"w")
        run.__enter__()
        note("S" if refused() == before else "D", run.run_id)
        return run

    def end(self, run: waxell_workers.WaxellContext) -> None:
        note = self._notes.note
        error = ValueError("on purpose") if self.chance.random() < 0.1 else None
        note("E", run.run_id, "error" if error else "success")
        before = refused()
        tell(b"w")
        run.__exit__(type(error) if error else None, error, None)
        note("X" if refused() == before else "D", run.run_id)

    def flush(self) -> None:
        self._count += 1
        number = f"{self._thread}.{self._count}"
        self._notes.note("f", number)
        tell(b"u")
        result = waxell_workers.force_flush(self.chance.choice((0.05, 0.5, 2.0)))
        at = time.monotonic()
        self._notes.note("F", number, at) if result else self._notes.note("N", number)

    def one_run(self) -> None:
        run = self.begin()
        for _ in range(self.chance.randrange(12)):
            self.record(run)
            if self.chance.random() < 0.3:
                self.pause()
        self.end(run)

    def round(self) -> None:
        """Do what one task would do: a run or a loose call, at times a flush, and a pause."""
        if self.chance.random() < 0.15:
            self.record_loose()
        else:
            self.one_run()
        if self.chance.random() < 0.15:
            self.flush()
        self.pause()

    def pause(self) -> None:
        time.sleep(min(0.3, self.chance.expovariate(1 / 0.02)))

    def go_on(self, rounds: int) -> None:
        for _ in range(rounds):
            if self.stopped():
                return
            self.round()


def refused() -> int:
    """Return how many records this process has lost."""
    return sum(waxell_workers.stats().dropped.values())


def fork_inside(notes: Notes, work: Work, name: str) -> int:
    """Fork in the middle of a run; the child records into the parent's run and into runs of its own."""
    run = work.begin()
    work.record(run)
    ends_by_itself = work.chance.random() < 0.5
    rounds = work.chance.randrange(2, 25)
    pid = os.fork()
    if pid == 0:
        child_notes = Notes(notes.directory, name)
        tell(b"f")
        child = Work(child_notes, "c")
        child.record(run)
        other = threading.Thread(target=Work(child_notes, "d").go_on, args=(rounds,))
        other.start()
        child.go_on(rounds)
        other.join()
        if not ends_by_itself:
            os._exit(0)
        child_notes.note("Q")
        sys.exit(0)
    work.record(run)
    work.end(run)
    return pid


def main(directory: str, name: str) -> None:
    os.set_blocking(1, False)  # events may be lost; nobody waits for the killer
    use_small_limits(f"{directory}/shipper")
    waxell_workers.init(capture=())
    notes = Notes(directory, name)
    work = Work(notes, "m")
    rounds = work.chance.randrange(20, 400)
    threads = [
        threading.Thread(target=Work(notes, f"t{number}").go_on, args=(rounds,), daemon=True)
        for number in range(work.chance.randrange(3))
    ]
    for thread in threads:
        thread.start()
    children = []
    for _ in range(rounds):
        if work.stopped():
            break
        if work.chance.random() < 0.08 and len(children) < 8:
            children.append(fork_inside(notes, work, name))
        work.round()
    for thread in threads:
        thread.join()
    for pid in children:
        os.waitpid(pid, 0)
    if work.chance.random() < 0.5:
        work.record(work.begin())  # and leave it open: the exit must end it
    notes.note("Q")


def once(directory: str, name: str) -> None:
    """Record one run, flush, and end: what must work after every fault."""
    use_small_limits(f"{directory}/shipper")
    waxell_workers.init(capture=())
    work = Work(Notes(directory, name), "m")
    run = work.begin()
    work.record(run)
    work.end(run)
    work.flush()
    work._notes.note("Q")


if __name__ == "__main__":
    (once if sys.argv[3:] == ["--once"] else main)(sys.argv[1], sys.argv[2])
