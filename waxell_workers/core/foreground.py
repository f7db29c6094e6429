"""The shipper as a process: detached, started by a worker, or in the foreground for a person.

A worker starts this module with `python -m` (`launch`).
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from types import FrameType

import msgspec

from . import spool, user_path
from .config import Settings
from .flush import FlushResult, request_flush
from .segments import segment_numbers
from .shipper import DRAIN_S, LOCK_WAIT_S, Shipper, preload

_LOG_BYTES = 1 << 20
_TURN_S = 2.0
"""How long one that drains waits for the shipper that is there, before it looks whether it still is."""


def main() -> None:
    """Ship for a worker: settings come as a line of JSON on standard input, from `launch`."""
    # Not to the end of the file: a child that is forked just then has the pipe's other end too.
    order = msgspec.json.decode(sys.stdin.buffer.readline())
    _leave_standard_input()
    os.environ.update(order.get("environ", {}))  # others cannot read it there
    user_path.remember(order.get("user_path", []))
    directory: str = order["directory"]
    # The worker may be older or newer than what is installed now: what we do not know, we do without.
    known = {field.name for field in fields(Settings)} & order["settings"].keys()
    settings = Settings(**{name: order["settings"][name] for name in known})
    _log_to(f"{directory}/shipper.log")
    # Later, an upgrade or a removal of the release would change what there is to import; but nobody waits.
    threading.Thread(target=preload, args=(settings,), name="waxell-preload", daemon=True).start()
    shipper = Shipper(settings, directory, stay=False)
    _on_signal(shipper.terminate, repeatedly=True)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # sent to whole trees, to have them reload
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


def _leave_standard_input() -> None:
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)


def _on_signal(terminate: Callable[[], None], *, repeatedly: bool = False) -> None:
    """Have SIGTERM and SIGINT end the shipper in order.

    Args:
        terminate: what they call.
        repeatedly: True where the second one is to be in order too: systemd sends a unit's processes
            another SIGTERM when the main one has ended.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        terminate()
        if not repeatedly:
            signal.signal(number, signal.SIG_DFL)  # who asks twice is in a hurry

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _log_to(path: str) -> None:
    # Opened when there is something to say, and again if that failed: the disk may be full or read-only.
    handler = logging.handlers.RotatingFileHandler(
        path, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8", delay=True
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    logger = logging.getLogger("waxell_workers")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    main()
