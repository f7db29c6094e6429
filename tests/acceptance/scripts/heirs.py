"""A script that forks inside a run: the children go on in it, and each ends in its own way."""

import os
import signal

from asking import ask

import waxell_workers
from waxell_workers import WaxellContext, get_context

waxell_workers.init()


def child(way: str) -> int:
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    ask(f"child {way}")
    run = get_context()
    assert run is not None
    run.set_tag(way.replace(" ", "_"), True)
    if way == "by a signal":
        os.kill(os.getpid(), signal.SIGKILL)
    with WaxellContext(f"run of the child {way}"):
        ask(f"own {way}")
    os._exit(0)


with WaxellContext("family"):
    ask("parent before")
    print(child("by os._exit"), child("by a signal"))
    ask("parent after")
