"""A script that is killed in the middle of a run, as its argument says, with calls undelivered."""

import os
import signal
import sys

from asking import ask

import waxell_workers
from waxell_workers import WaxellContext

waxell_workers.init(flush_interval=3600)

ask("loose")
with WaxellContext("victim"):
    ask("inside")
    way = sys.argv[1] if len(sys.argv) > 1 else "SIGKILL"
    if way == "os._exit":
        os._exit(0)
    if way == "execv":
        os.execv(sys.executable, [sys.executable, "-c", "pass"])
    os.kill(os.getpid(), getattr(signal, way))
