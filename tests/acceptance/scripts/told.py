"""A script that does what it is told: each line of stdin is Python, answered by one: the result's `repr`.

The end of stdin is the end of the script: a normal exit.
"""

import contextlib
import os
import signal
import sys
import threading
import time

from asking import ask

import waxell_workers
from waxell_workers import WaxellContext, force_flush, get_context, record_llm_call, shutdown, stats

__all__ = ["WaxellContext", "ask", "contextlib", "force_flush", "get_context", "record_llm_call", "shutdown"]
__all__ += ["os", "signal", "stats", "threading", "time"]

waxell_workers.init()


def waxell_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("waxell")]


while line := sys.stdin.readline():
    try:
        result = eval(line)
    except SyntaxError:
        result = exec(line)
    print(repr(result), flush=True)
