"""Runs a script, and tells on stdout what it did to the host: files, processes, threads, connections.

    python audited.py SCRIPT ARGUMENTS…

Python says so itself, by its audit events. The last line of stdout is JSON.
"""

import atexit
import json
import os
import runpy
import sys
import threading
from typing import Any

import waxell_workers

done: list[list[str]] = []
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PROCESSES = ("os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen")
FILES = (
    "os.mkdir",
    "os.link",
    "os.rename",
    "os.remove",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "fcntl.lockf",
)


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        if flags & WRITES and path != os.devnull:
            done.append(["written", str(path)])
    elif event in PROCESSES:
        done.append(["process", f"{event} {arguments}"])
    elif event in FILES:
        done.append(["file", f"{event} {arguments[0]}"])
    elif event == "socket.connect":
        done.append(["connection", repr(arguments[1])])


def note_threads() -> None:
    start = threading.Thread.start

    def noted(thread: threading.Thread) -> None:
        done.append(["thread", thread.name])
        start(thread)

    threading.Thread.start = noted  # type: ignore[method-assign]  # an audit event only since 3.12


def tell() -> None:
    threads = [thread.name for thread in threading.enumerate()]
    report = {"done": done, "threads": threads, "dropped": waxell_workers.stats().dropped}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(sys.argv[1]))
    sys.argv = sys.argv[1:]
    atexit.register(tell)
    note_threads()
    sys.addaudithook(note)
    runpy.run_path(sys.argv[0], run_name="__main__")
