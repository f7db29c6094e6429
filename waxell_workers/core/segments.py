"""Names, order, seal and creation of the journal's segments: what the writers and the shipper agree on.

    <spool>/<destination>/   000007.ndjson 000008.ndjson …   procs   ship.lock   shipper.db   …

A segment opens with a line of its own, `{"kind":"segment","version":1,"sealed":0}`. Invariants, on which
everything else rests:

* The highest segment is the one that is written to. It is never sealed and never deleted.
* A segment appears under its name complete with its first line: it is linked, not created, there.
* The seal is one byte, `0` to `1`, in that line. It comes only after a higher segment exists, and before the
  last read: a writer that sees no seal after its write has written what that read will find.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

import msgspec

from .records import FORMAT_VERSION

_SUFFIX = ".ndjson"
_MARK = b'{"kind":"segment"'
"""How a segment's first line begins, in every version."""

FIRST_LINE = b'{"kind":"segment","version":%d,"sealed":0}\n' % FORMAT_VERSION
SEAL_AT = FIRST_LINE.index(b"0}")
"""Offset of the seal's byte."""
_OPEN = b"0}\n"
"""The line's end: what comes to stand there if the line is damaged is no open seal by chance."""


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
    """Make segment `number` exist, complete with its first line; somebody else may have been first.

    Raises:
        OSError: the directory cannot be written to, or the disk is full.
    """
    temporary = f"{directory}/.{number:06d}.{os.getpid()}.{os.urandom(4).hex()}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if os.write(descriptor, FIRST_LINE) != len(FIRST_LINE):
            raise OSError(errno.ENOSPC, "a segment's first line was written in part", directory)
        os.link(temporary, segment_path(directory, number))
    except FileExistsError:
        pass
    finally:
        os.close(descriptor)
        os.unlink(temporary)


def is_first_line(line: bytes) -> bool:
    """True for a segment's first line, of whatever version."""
    return line.startswith(_MARK)


def version_of(first_line: bytes) -> int:
    """Return the version of the format that a first line names, or 0 if it names none."""
    try:
        version = msgspec.json.decode(first_line)["version"]
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError):
        return 0
    return version if isinstance(version, int) else 0


def is_sealed(descriptor: int) -> bool:
    """True if a segment takes no more records."""
    return os.pread(descriptor, len(_OPEN), SEAL_AT) != _OPEN


def seal(directory: str, number: int) -> None:
    """Seal a segment; a higher one must exist.

    Raises:
        OSError: it is gone, or cannot be written to.
    """
    # Not O_APPEND, with which Linux would put the byte at the end.
    descriptor = os.open(segment_path(directory, number), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.pwrite(descriptor, b"1", SEAL_AT)
    finally:
        os.close(descriptor)
