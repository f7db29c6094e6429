"""A script that waits for a server that hangs, is hit by a limit, and then asks once more."""

import signal
import sys
import threading
import time

import noting
from dramatiq.middleware.threading import raise_thread_exception

import waxell_workers
from waxell_workers import WaxellContext, force_flush, record_llm_call

LONG_S = 120


class Limit(BaseException):
    """What strikes."""


def limit(number, frame):
    raise Limit


def wait():
    try:
        force_flush(LONG_S)
    except Limit:
        struck.append(time.monotonic())


def strike():
    struck.append(time.monotonic())
    if in_main:
        signal.pthread_kill(waits.ident, signal.SIGALRM)
    else:
        raise_thread_exception(waits.ident, Limit)


struck = []
in_main = sys.argv[1] == "main"
waxell_workers.init()
with WaxellContext("waiting"):
    record_llm_call(model="waiting")
if in_main:
    signal.signal(signal.SIGALRM, limit)
    waits = threading.main_thread()
    noting.when_waiting(waits.ident, strike)
    wait()
else:
    waits = threading.Thread(target=wait)
    waits.start()
    noting.when_waiting(waits.ident, strike)
    waits.join()
print(struck[1] - struck[0] if len(struck) == 2 else LONG_S, flush=True)
sys.stdin.readline()  # the server is well again
print(bool(force_flush(LONG_S)), flush=True)
