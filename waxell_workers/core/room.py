"""Doing what needs room on a disk that may be full: first as it is, then at the price of the reserve. And
telling the troubles of a disk that pass, which are waited for.

For the shipper alone. Without that, a full disk would stop what empties it: not even the ledger could be
opened, so that nothing could be delivered, and nothing deleted.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
from collections.abc import Callable
from typing import TypeVar

from . import reserve

logger = logging.getLogger("waxell_workers.shipper")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SQLITE_NO_ROOM = ("database or disk is full", "disk I/O error")
"""SQLite's words for `ENOSPC`; and for a quota, or where it finds no room for its shared memory."""
_PASSING = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EBUSY),
)
"""What an administrator mends, or another process: a disk that was mounted read-only, a right, a limit."""
_R = TypeVar("_R")


def with_room(directory: str, act: Callable[[], _R]) -> _R:
    """Do something; if there is no room for it, give up the reserve and do it once more."""
    try:
        return act()
    except (OSError, sqlite3.OperationalError) as error:
        if not is_lack_of_room(error) or not reserve.give_up(directory):
            raise
        logger.warning("no room in %s (%s): the reserve is given up", directory, error)
    return act()


def is_lack_of_room(error: Exception) -> bool:
    """True if an error says that the disk is full, or that a quota or limit is reached."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    return isinstance(error, sqlite3.OperationalError) and str(error) in _SQLITE_NO_ROOM


def is_passing(error: Exception) -> bool:
    """True if what went wrong with the disk may go away by itself, or by somebody else's hand.

    With SQLite that is all but damage: `OperationalError` is its word for a file that it cannot open, write
    or lock. That the directory is gone does not pass: a new one has a new shipper.
    """
    if isinstance(error, OSError):
        return error.errno in (*_NO_ROOM, *_PASSING)
    return isinstance(error, sqlite3.OperationalError)
