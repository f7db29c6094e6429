"""Asking the shipper to deliver up to here, by then: a line of JSON over a Unix socket beside the journal.

The question is `{"token":…,"within_s":…}`, the answer `{"delivered":…,"pending":…,"dropped":…}`; `token` 0
stands for every process. "Here" is the journal's end when the shipper hears the question. Nobody who asks
waits longer than its deadline: no socket, a full backlog or silence mean that the records stay pending.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

_NAME = "ship.sock"
_LONGEST_PATH = 100
"""Bytes of a Unix socket's path that every system takes."""
_ANSWER_MARGIN_S = 0.05
"""How much earlier than the asker's deadline the shipper answers."""
_RETRY_S = 0.05
_SLICE_S = 0.1
"""How late an exception may surface that another thread raises here: not in the midst of a system call."""


@dataclass(frozen=True)
class FlushResult:
    """What a flush has achieved; true only if nothing is pending and nothing was dropped."""

    delivered: int
    """Records that reached the server while the flush waited; what had arrived before is not counted."""
    pending: int
    """Records that are still on their way; they stay in the journal."""
    dropped: int
    """Records lost since the last flush: refused by the journal, or by the server for good."""

    def __bool__(self) -> bool:
        return self.pending == 0 and self.dropped == 0


class FlushRequest(msgspec.Struct, omit_defaults=True):
    """The question, as it goes over the socket."""

    within_s: float
    token: int = 0


class FlushAnswer(msgspec.Struct):
    """The answer; `pending` is -1 where the shipper was too busy to know."""

    delivered: int
    pending: int
    dropped: int


def request_flush(
    directory: str, token: int, deadline: float, *, patience_s: float = math.inf
) -> FlushAnswer | None:
    """Ask the shipper of a directory to deliver; None if nobody answered before the deadline.

    Args:
        directory: the destination's directory.
        token: whose records to wait for; 0 stands for everybody's.
        deadline: `time.monotonic()` in seconds.
        patience_s: seconds after which to give up sooner, if nobody listens.
    """
    listens_by = time.monotonic() + patience_s
    while (left := deadline - time.monotonic()) > 0:
        question = FlushRequest(max(0.0, left - _ANSWER_MARGIN_S), token)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(left)
                with socket_path(directory) as path:
                    connection.connect(path)
                connection.sendall(msgspec.json.encode(question) + b"\n")
                line = _receive(connection, deadline)
            if not line:
                raise ConnectionResetError("the shipper hung up")
        except (FileNotFoundError, ConnectionError):  # a shipper that is starting, or leaving
            if time.monotonic() > listens_by:
                return None
            time.sleep(max(0.0, min(_RETRY_S, deadline - time.monotonic())))
            continue
        except OSError:
            return None
        try:
            return msgspec.json.decode(line, type=FlushAnswer)
        except msgspec.MsgspecError:
            return None
    return None


def _receive(connection: socket.socket, deadline: float) -> bytes:
    """Return what comes first, waiting in slices: Dramatiq's time limit, for one, surfaces between them.

    Raises:
        TimeoutError: nothing came before the deadline.
    """
    while True:
        left = max(0.001, deadline - time.monotonic())
        connection.settimeout(min(left, _SLICE_S))
        try:
            return connection.recv(4096)
        except TimeoutError:
            if left <= _SLICE_S:
                raise


@contextmanager
def socket_path(directory: str) -> Iterator[str]:
    """Yield a path of the directory's socket that is short enough, valid inside the block.

    Raises:
        OSError: the directory's own path is too long and the system offers no way around.
    """
    path = f"{directory}/{_NAME}"
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        yield path
        return
    if sys.platform != "linux":
        raise OSError(errno.ENAMETOOLONG, "the spool's path is too long for a socket", path)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{_NAME}"
    finally:
        os.close(descriptor)
