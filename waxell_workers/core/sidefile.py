"""Files beside the journal for people to read: bounded, line by line, with what was before in `NAME.1`."""

from __future__ import annotations

import errno
import os


def append(path: str, line: bytes, most_bytes: int) -> None:
    """Write a line at the end of a file, which begins anew once it is larger than `most_bytes`.

    Raises:
        OSError: there is no room, or no right.
    """
    if os.path.exists(path) and os.path.getsize(path) > most_bytes:
        os.replace(path, f"{path}.1")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, "a line was written in part", path)
    finally:
        os.close(descriptor)
