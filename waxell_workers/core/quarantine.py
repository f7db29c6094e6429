"""Records that will never be taken: kept beside the journal, with the reason, for a person to look at."""

from __future__ import annotations

import errno
import os
import time

import msgspec

from .encoding import to_json
from .records import Record
from .room import with_room

FILE_BYTES = 16 << 20
"""Of each of the two files, about."""


def keep(directory: str, record: Record, reason: str) -> str:
    """Write a record down; return the file's path.

    Raises:
        OSError: there is no room, or no right.
    """
    line = msgspec.json.encode({"reason": reason, "at": time.time(), "record": msgspec.Raw(to_json(record))})
    path = f"{directory}/quarantine.ndjson"
    with_room(directory, lambda: _append(path, line + b"\n"))
    return path


def _append(path: str, line: bytes) -> None:
    if os.path.exists(path) and os.path.getsize(path) > FILE_BYTES:
        os.replace(path, f"{path}.1")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, "a line was written in part", path)
    finally:
        os.close(descriptor)
