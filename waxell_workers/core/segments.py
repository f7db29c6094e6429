"""Names, order and creation of the journal's segments: what the writers and the shipper agree on.

    <spool>/<destination>/   000007.ndjson 000008.ndjson …   procs   ship.lock   shipper.db   …

Invariants, on which everything else rests:

* The highest segment is the one that is written to. It is never sealed and never deleted.
* A segment appears under its name complete with its version line: it is linked, not created, there.
* A seal is `chmod 0400`; it comes only after a higher segment exists, and before the last read.
"""

from __future__ import annotations

import fcntl
import os
import stat
from typing import NamedTuple

from .records import FORMAT_VERSION

_SUFFIX = ".ndjson"
_HIGH_DESCRIPTOR = 512

VERSION_LINE = b'{"kind":"segment","version":%d}\n' % FORMAT_VERSION


class Position(NamedTuple):
    """A place in the journal: everything before it is at a lower offset or in a lower segment."""

    segment: int
    offset: int


def segment_path(directory: str, number: int) -> str:
    """Return the path of segment `number`."""
    return f"{directory}/{number:06d}{_SUFFIX}"


def segment_numbers(directory: str) -> list[int]:
    """Return the numbers of all segments, ascending.

    Raises:
        OSError: the directory cannot be read.
    """
    names = [name for name in os.listdir(directory) if name.endswith(_SUFFIX)]
    return sorted(int(name[: -len(_SUFFIX)]) for name in names if name[: -len(_SUFFIX)].isdecimal())


def create_segment(directory: str, number: int) -> None:
    """Make segment `number` exist, complete with its version line; somebody else may have been first.

    Raises:
        OSError: the directory cannot be written to, or the disk is full.
    """
    temporary = f"{directory}/.{number:06d}.{os.getpid()}.{os.urandom(4).hex()}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        written = os.write(descriptor, VERSION_LINE)
        if written == len(VERSION_LINE):
            os.link(temporary, segment_path(directory, number))
    except FileExistsError:
        pass
    finally:
        os.close(descriptor)
        os.unlink(temporary)


def is_sealed(status: os.stat_result) -> bool:
    """True if a segment with this status takes no more records: sealed, or deleted."""
    return status.st_nlink == 0 or not status.st_mode & stat.S_IWUSR


def move_high(descriptor: int) -> int:
    """Move a descriptor out of the low numbers, where daemons close and reuse them.

    Returns the new number, or the old one where the process may not have so many.
    """
    try:
        high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGH_DESCRIPTOR)
    except OSError:
        return descriptor
    os.close(descriptor)
    return high
