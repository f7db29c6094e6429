"""A script that asks two things, one of them inside a run, and comes to its end as its argument says."""

import atexit
import os
import signal
import sys
import threading
import time
from typing import Any

from asking import ask

import waxell_workers
from waxell_workers import WaxellContext

ended_at = 0.0


def no_thread(*arguments: Any, **named: Any) -> None:
    """Refuse, as Python 3.12 does once the interpreter goes down."""
    raise RuntimeError("can't create new thread at interpreter shutdown")


def refuse_threads() -> None:
    threading.Thread.start = no_thread  # type: ignore[method-assign]


def say_whether_threads_start() -> None:
    try:
        threading.Thread(target=int).start()
    except RuntimeError:
        print("no thread starts", flush=True)


def say_how_long() -> None:
    print(f"{time.monotonic() - ended_at:.3f}", flush=True)


def main(way: str) -> None:
    global ended_at
    ask("loose")
    with WaxellContext("named"):
        ask("inside")
    if "nobody ships" in way:
        waxell_workers.shutdown()  # the thread is gone now
        ask("late")
    if "threads" in way:
        atexit.register(say_whether_threads_start)
    if "threads refused" in way:
        atexit.register(refuse_threads)  # what is registered last comes first: all else finds it refused
    if way == "exit 3":
        sys.exit(3)
    if way == "exception":
        raise ValueError("mine")
    if way == "ctrl-c":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    if way == "open run":
        WaxellContext("left open").__enter__()
        ask("in the open run")
    if way == "thread":
        threading.Thread(target=lambda: (time.sleep(0.5), ask("in a thread"))).start()
    ended_at = time.monotonic()


if __name__ == "__main__":
    if sys.argv[1] == "timed":
        atexit.register(say_how_long)  # what is registered first comes last
    waxell_workers.init()
    main(sys.argv[1])
