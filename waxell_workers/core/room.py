"""Doing what needs room on a disk that may be full: first as it is, then at the price of the reserve.

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
