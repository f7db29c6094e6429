"""Descriptors in a process that is not ours: others close them all, and give their numbers to something else.

Daemons do that, and what forks. So ours stand at high numbers, and are known by the file behind them.
"""

from __future__ import annotations

import fcntl
import os

_HIGH = 512

File = tuple[int, int]
"""(device, inode)."""


def move_high(descriptor: int) -> int:
    """Move a descriptor out of the low numbers, where daemons close and reuse them.

    Returns the new number, or the old one where the process may not have so many.
    """
    try:
        high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGH)
    except OSError:
        return descriptor
    os.close(descriptor)
    return high


def file_of(descriptor: int) -> File:
    """Return what file a descriptor stands for.

    Raises:
        OSError: it is not open.
    """
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def stands_for(descriptor: int, file: File) -> bool:
    """True if the descriptor still stands for this file: somebody may have closed it and used its number."""
    try:
        return file_of(descriptor) == file
    except OSError:
        return False


def is_at(path: str, file: File) -> bool:
    """True if a path still leads to this file: not if it was deleted, moved away, or covered by a mount.

    Where that cannot be told, it is believed.
    """
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return (status.st_dev, status.st_ino) == file
