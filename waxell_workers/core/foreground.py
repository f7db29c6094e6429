"""The shipper as a process: detached, started by a worker, or in the foreground for a person.

A worker starts this module with `python -m` (`launch`).
"""

from __future__ import annotations

import logging
import logging.handlers
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import msgspec

from . import spool
from .config import Settings
from .flush import FlushResult, request_flush
from .segments import segment_numbers
from .shipper import DRAIN_S, LOCK_WAIT_S, Shipper

_LOG_BYTES = 1 << 20
_TURN_S = 2.0
"""How long one that drains waits for the shipper that is there, before it looks whether it still is."""


def main() -> None:
    """Ship for a worker: settings come as a line of JSON on standard input, from `launch`."""
    # Not to the end of the file: a child that is forked just then has the pipe's other end too.
    order = msgspec.json.decode(sys.stdin.buffer.readline())
    directory: str = order["directory"]
    settings = Settings(**order["settings"])
    _log_to(f"{directory}/shipper.log")
    shipper = Shipper(settings, directory, stay=False)
    _on_signal(shipper.terminate)
    shipper.run()


def run(
    settings: Settings,
    *,
    drain: bool,
    progress: Callable[[int, int], None] | None = None,
    timeout: float = DRAIN_S,
) -> FlushResult:
    """Ship in the foreground, as `waxell-workers ship` does.

    Args:
        settings: where to, and whose spool.
        drain: True to deliver what is there and return; False to stay until SIGTERM or SIGINT.
        progress: called with the records delivered and those known to be pending.
        timeout: with `drain`, the seconds after which to give up.

    Returns:
        What was delivered, what is still there, and what the server rejected.

    Raises:
        OSError: there is no usable spool.
    """
    directory = spool.prepare(settings)
    shipper = Shipper(settings, directory, stay=not drain, progress=progress)
    if threading.current_thread() is threading.main_thread():
        _on_signal(shipper.terminate)
    deadline = time.monotonic() + timeout
    if drain:
        if not segment_numbers(directory):
            return FlushResult(0, 0, 0)
        shipper.stop(deadline)
    delivered = dropped = 0
    while not shipper.run(0.0 if drain else LOCK_WAIT_S):
        if not drain:
            raise OSError(f"another shipper works in {directory}")
        # In turns: one that is just leaving takes no more requests, and makes room.
        answer = request_flush(directory, 0, min(deadline, time.monotonic() + _TURN_S))
        pending = 1
        if answer is not None:
            pending = abs(answer.pending)  # -1: it does not know
            delivered, dropped = delivered + answer.delivered, dropped + answer.dropped
        if pending == 0 or time.monotonic() >= deadline:
            return FlushResult(delivered, pending, dropped)
    return FlushResult(delivered + shipper.delivered, shipper.pending, dropped + shipper.rejected)


def _on_signal(terminate: Callable[[], None]) -> None:
    def handle(number: int, frame: FrameType | None) -> None:
        terminate()
        signal.signal(number, signal.SIG_DFL)  # who asks twice is in a hurry

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _log_to(path: str) -> None:
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    logger = logging.getLogger("waxell_workers")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    main()
