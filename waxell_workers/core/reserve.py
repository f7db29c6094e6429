"""A file that keeps room on the disk, to be given up when the disk is full (`room`).

Made with the first segment, and again by the shipper when there is room.
"""

from __future__ import annotations

import errno
import os

RESERVE_BYTES = 4 << 20
"""What the ledger may need for all that is read at once; while there is no reserve, it hardly grows."""


def is_kept(directory: str) -> bool:
    """True if the reserve is there."""
    return os.path.exists(f"{directory}/reserve")


def keep(directory: str) -> bool:
    """Make the reserve, if it is not there; false if there is no room for it."""
    path = f"{directory}/reserve"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return True
    except OSError:
        return False
    try:
        _allocate(descriptor)
    except OSError:
        os.unlink(path)
        return False
    finally:
        os.close(descriptor)
    return True


def give_up(directory: str) -> bool:
    """Delete the reserve; false if there was none."""
    try:
        os.unlink(f"{directory}/reserve")
    except FileNotFoundError:
        return False
    return True


def _allocate(descriptor: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
    elif os.write(descriptor, bytes(RESERVE_BYTES)) != RESERVE_BYTES:  # macOS
        raise OSError(errno.ENOSPC, "no room for the reserve")
