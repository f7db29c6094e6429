r"""The journal, written by every process of every worker; the buffer that outlives them.

On disk, per destination, are numbered segments of NDJSON (`segments`). A record is

    \n{"kind":"llm_call","id":"…",…}\n

in **one** `os.write` on an `O_APPEND` descriptor: the kernel orders the writers, and the leading newline
keeps a line that a dying writer tore from spoiling its neighbour. When `append` has returned a position,
no death of a process loses the record.

Invariants:

* Nothing is inherited. A process opens the segment by its path, for itself, at its first record and again
  when `getpid()` has changed; the descriptor is compared by (device, inode) before each write, since a
  forked child's descriptors may have been closed and their numbers given to a socket.
* A write whose `fstat` *afterwards* shows a seal may have come after the shipper's last read, so the record
  is written again, into the highest segment; the shipper drops the repeat by its id.
* No lock is waited for, no thread started, nothing imported, no network touched. A signal handler, a
  greenlet switch or an asynchronous exception at any bytecode leaves this object usable.
* A short write is not continued: the record counts as dropped.
"""

from __future__ import annotations

import errno
import logging
import os
import time

from . import liveness, spool
from .config import Settings
from .segments import Position, create_segment, is_sealed, move_high, segment_numbers, segment_path

logger = logging.getLogger("waxell_workers.journal")

_MOVES = 8
"""How often one record follows the segments that are sealed under it."""
_PAUSE_S = 1.0
"""After a refusal, how long until the disk is asked again."""


class _Segment:
    """The segment that this process writes to. Closed when the last thread that writes through it lets go."""

    __slots__ = ("descriptor", "file", "number", "pid", "room")

    def __init__(self, descriptor: int, number: int, room: int) -> None:
        status = os.fstat(descriptor)
        self.descriptor = descriptor
        self.file = (status.st_dev, status.st_ino)
        self.number = number
        self.pid = os.getpid()
        self.room = room

    def __del__(self) -> None:
        try:
            status = os.fstat(self.descriptor)
            if self.pid == os.getpid() and (status.st_dev, status.st_ino) == self.file:
                os.close(self.descriptor)
        except (OSError, AttributeError, TypeError):  # closed by others, or the interpreter is going down
            pass


class Journal:
    """The writer's side of one destination's journal, in this process and, after a fork, in its children."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._segment: _Segment | None = None
        self._directory = ""
        self._token = 0
        self._token_pid = 0
        self._paused_until = 0.0
        self._pause_reason = ""
        self._warned: set[str] = set()
        self.last: Position | None = None
        """The end of the last record that this process wrote."""
        self.dropped: dict[str, int] = {}
        """Records refused, by reason; the counts of a forked child start with its parent's."""

    @property
    def directory(self) -> str:
        """The destination's directory, or empty before the journal was opened."""
        return self._directory

    def open(self) -> str:
        """Create the directory and take this process's token, so that its death will be noticed.

        Returns the directory.

        Raises:
            OSError: there is no usable spool.
        """
        if not self._directory or not os.path.isdir(self._directory):
            self._directory = spool.prepare(self._settings)
            self._token_pid = 0
        if self._token_pid != os.getpid():
            self._token = liveness.register(self._directory)
            self._token_pid = os.getpid()
        return self._directory

    def token(self) -> int:
        """Return this process's token, or 0 if there is no usable spool."""
        segment = self._segment
        if segment is not None and segment.pid == os.getpid():
            return self._token
        self._current()
        return self._token if self._token_pid == os.getpid() else 0

    def append(self, line: bytes) -> bool:
        """Write one record; True if it is safe, False if it was dropped and counted.

        Args:
            line: `\\n`, the record's JSON, `\\n`.
        """
        for _ in range(_MOVES):
            segment = self._current()
            if segment is None:
                return False
            try:
                before = os.fstat(segment.descriptor)
                if (before.st_dev, before.st_ino) != segment.file:
                    raise OSError(errno.EBADF, "the descriptor is somebody else's now")
                if is_sealed(before):
                    self._leave(segment)
                    continue
                if before.st_size + len(line) > segment.room:
                    self._leave(segment)
                    self._refuse("spool_limit", "the spool has reached its limit")
                    return False
                written = os.write(segment.descriptor, line)
                after = os.fstat(segment.descriptor)
            except OSError as error:
                self._leave(segment)
                if error.errno == errno.EBADF:
                    self._token_pid = 0  # whoever closed this descriptor closed the token's with it
                    continue
                self._refuse(_reason(error), str(error.strerror))
                return False
            if written != len(line):
                self._refuse("disk_full", "a record was written in part")
                return False
            if is_sealed(after):
                self._leave(segment)
                continue
            self.last = Position(segment.number, after.st_size)
            return True
        self._refuse("moving", "segments were sealed faster than a record could be written")
        return False

    def drop(self, reason: str, count: int = 1) -> None:
        """Count records that are lost, by reason."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count

    def _current(self) -> _Segment | None:
        segment = self._segment
        if segment is not None and segment.pid == os.getpid():
            return segment
        if self._paused_until > time.monotonic():
            self.drop(self._pause_reason)
            return None
        try:
            segment = self._open_highest()
        except OSError as error:
            self._refuse(_reason(error), str(error))
            return None
        self._segment = segment
        return segment

    def _open_highest(self) -> _Segment:
        directory = self.open()
        limit = spool.limit(self._settings, directory)
        for _ in range(_MOVES):
            numbers = segment_numbers(directory)
            if not numbers:
                create_segment(directory, 1)
                continue
            path = segment_path(directory, numbers[-1])
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
            except (FileNotFoundError, PermissionError):  # rotated since the listing
                continue
            segment = _Segment(move_high(descriptor), numbers[-1], 0)
            status = os.fstat(segment.descriptor)
            if is_sealed(status):
                continue
            segment.room = limit - (spool.used(directory) - status.st_size)
            return segment
        raise OSError(errno.EAGAIN, "no segment stays open long enough")

    def _leave(self, segment: _Segment) -> None:
        if self._segment is segment:
            self._segment = None

    def _refuse(self, reason: str, message: str) -> None:
        self.drop(reason)
        self._pause_reason = reason
        self._paused_until = time.monotonic() + _PAUSE_S
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning("records are dropped (%s): %s", reason, message)


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "disk_full"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "no_descriptor"
    return "spool_unavailable"
