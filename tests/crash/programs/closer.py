"""A process that closes all its descriptors in mid-run and gives their numbers to others.

    python closer.py NOTES parent|child REUSED

`child`: a forked child does it. With `REUSED` = 1, sockets and files take exactly the numbers that were open.
On stdout comes a line of JSON once everything is recorded: which of the strangers were touched. Then the
program waits for a line on stdin, its run still open.
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import os
import socket
import sys
import tempfile

import promises

import waxell_workers

FAR = 3000
CONTENT = b"a stranger's"


class File:
    """A file of somebody else's, under a given number."""

    def __init__(self, number: int) -> None:
        descriptor, self.path = tempfile.mkstemp()
        os.write(descriptor, CONTENT)
        os.dup2(descriptor, number)
        os.close(descriptor)
        self.number = number

    def is_untouched(self) -> bool:
        with open(self.path, "rb") as file:
            same = file.read() == CONTENT
        return same and os.path.samestat(os.fstat(self.number), os.stat(self.path))


class Socket:
    """A connection of somebody else's, under a given number."""

    def __init__(self, number: int) -> None:
        ours, peer = socket.socketpair()
        self.peer = socket.socket(fileno=fcntl.fcntl(peer.fileno(), fcntl.F_DUPFD, FAR))
        self.peer.setblocking(False)
        os.dup2(ours.fileno(), number)
        ours.close()
        peer.close()

    def is_untouched(self) -> bool:
        try:
            self.peer.recv(4096)
        except BlockingIOError:
            return True
        return False  # bytes, or the other end was closed


def close_everything(*, reuse: bool) -> list[File | Socket]:
    numbers = [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]
    os.closerange(3, FAR)
    # The strangers' makers need numbers in passing: let them be none of those that are to be taken.
    places = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
    strangers = [(Socket, File)[n % 2](number) for n, number in enumerate(numbers)] if reuse else []
    for place in set(places) - set(numbers):
        os.close(place)
    promises.note_again()
    return strangers


def call(marker: str) -> None:
    waxell_workers.record_llm_call(model=marker)
    promises.call(marker)


def record_and_close(*, reuse: bool) -> None:
    call("before-any-run")
    with waxell_workers.WaxellContext("open") as run:
        promises.run(run.run_id, "success")
        call("before")
        strangers = close_everything(reuse=reuse)
        for number in range(20):
            call(f"after-{number}")
        with waxell_workers.WaxellContext("inner") as inner:
            promises.run(inner.run_id, "success")
            call("inner")
        flushed = bool(waxell_workers.force_flush(30))
        dropped = waxell_workers.stats().dropped
        touched = [type(s).__name__ for s in strangers if not s.is_untouched()]
        told = {"touched": touched, "strangers": len(strangers), "flushed": flushed, "dropped": dropped}
        print(json.dumps(told), flush=True)
        sys.stdin.readline()
        call("last")


def main(notes: str, where: str, reused: str) -> None:
    faulthandler.enable()
    promises.note_to(notes)
    waxell_workers.init(capture=())
    if where == "parent":
        record_and_close(reuse=reused == "1")
        return
    call("parent")
    with waxell_workers.WaxellContext("parent") as run:
        promises.run(run.run_id, "success")
        child = os.fork()
        if child == 0:
            record_and_close(reuse=reused == "1")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        call("parent-after")
    waxell_workers.force_flush(30)
    sys.exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
