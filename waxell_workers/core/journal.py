r"""The journal, written by every process of every worker; the buffer that outlives them.

On disk, per destination, are numbered segments of NDJSON (`segments`). A record is

    \n{"kind":"llm_call","id":"…",…}\n

in **one** `os.write` on an `O_APPEND` descriptor: the kernel orders the writers, and the leading newline
keeps a line that a dying writer tore from spoiling its neighbour. When `append` has returned True, no death
of a process loses the record.

Invariants:

* Nothing is inherited. A process opens the segment by its path, for itself, at its first record and again
  when `getpid()` has changed. Before each write the descriptor must stand where this process's last write
  left it, or else prove itself by (device, inode): a forked child's descriptors may have been closed and
  their numbers given to a socket.
* A record after which the segment shows a seal may have come after the shipper's last read, so it is written
  again, into the highest segment; the shipper drops the repeat by its id.
* No lock is waited for, no thread started, nothing imported, no network touched. A signal handler, a
  greenlet switch or an asynchronous exception at any bytecode leaves this object usable.
* A short write is not continued: the record counts as dropped.
"""

from __future__ import annotations

import errno
import logging
import os
import time

from . import liveness, reserve, spool
from .config import Settings
from .descriptors import file_of, is_at, move_high, stands_for
from .segments import create_segment, is_sealed, segment_numbers, segment_path
from .tally import Tally

logger = logging.getLogger("waxell_workers.journal")

_MOVES = 8
"""How often one record follows the segments that are sealed under it."""
_LOOK_S = 1.0
"""How often a writer looks whether its segment was deleted, or the directory moved away, under it."""
_PAUSE_S = 1.0
"""After a refusal, how long until the disk is asked again."""


class _Segment:
    """The segment that this process writes to. Closed when the last thread that writes through it lets go."""

    __slots__ = ("descriptor", "file", "looked_at", "offset", "path", "pid", "room")

    def __init__(self, descriptor: int, path: str) -> None:
        self.descriptor = descriptor
        self.file = file_of(descriptor)
        self.path = path
        self.pid = os.getpid()
        self.offset = os.lseek(descriptor, 0, os.SEEK_END)
        """Where this process's last write through the descriptor ended."""
        self.room = 0
        self.looked_at = time.monotonic()

    def __del__(self) -> None:
        try:
            if self.pid == os.getpid() and stands_for(self.descriptor, self.file):
                os.close(self.descriptor)
        except (OSError, AttributeError, TypeError):  # closed by others, or the interpreter is going down
            pass

    def check(self) -> None:
        """Make sure that the descriptor is still ours, and its file still in the directory.

        Cheap as long as nobody else uses the descriptor; `fstat` makes the next write slower on kernels with
        multigrain timestamps (6.13 and later), so it is left to doubt, and to once a second.

        Raises:
            OSError: it is somebody else's (`EBADF`), or no longer where a shipper looks for it (`ENOENT`).
        """
        now = time.monotonic()
        if os.lseek(self.descriptor, 0, os.SEEK_CUR) == self.offset and now - self.looked_at < _LOOK_S:
            return
        self.looked_at = now
        if not stands_for(self.descriptor, self.file):
            raise OSError(errno.EBADF, "the descriptor is somebody else's now")
        if not is_at(self.path, self.file):
            raise OSError(errno.ENOENT, "the segment was deleted, or the spool was moved")


class Journal:
    """The writer's side of one destination's journal, in this process and, after a fork, in its children."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._segment: _Segment | None = None
        self._directory = ""
        self._token = 0
        self._token_pid = 0
        self._tokens: set[tuple[int, int]] = set()
        """Process and token, as records may carry them: more than one after a race of threads, or a loss."""
        self._paused_until = 0.0
        self._pause_reason = ""
        self._warned: set[str] = set()
        self._dropped: dict[int, dict[str, Tally]] = {}
        """Process to its losses, by reason: a forked child has lost nothing of what its parent has."""

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
        # Again where it is gone, or where somebody has put another one in its place.
        if not self._directory or not spool.is_private(self._settings, self._directory):
            self._directory = spool.prepare(self._settings)
            self._token_pid = 0
        # The same one again, unless we were forked, or the directory was deleted and others made it anew.
        self._token = liveness.register(self._directory)
        self._tokens.add((os.getpid(), self._token))
        self._token_pid = os.getpid()
        return self._directory

    def token(self) -> int:
        """Return this process's token, or 0 if there is no usable spool."""
        segment = self._segment
        if segment is not None and segment.pid == os.getpid():
            try:
                segment.check()
                return self._token
            except OSError as error:
                # The token went the same way: a run that is begun with it would be taken for dead.
                if error.errno in (errno.EBADF, errno.ESPIPE):
                    segment.pid = 0
                self._leave(segment)
                self._token_pid = 0
        self._current()
        return self._token if self._token_pid == os.getpid() else 0

    def flush_token(self) -> int:
        """Return the token whose records a flush waits for; 0, for everybody's, if there were two here."""
        tokens = {token for pid, token in list(self._tokens) if pid == os.getpid()} | {self.token()}
        return tokens.pop() if len(tokens) == 1 else 0

    def append(self, line: bytes) -> bool:
        """Write one record; True if it is safe, False if it was dropped and counted.

        Args:
            line: `\\n`, the record's JSON, `\\n`.
        """
        for _ in range(_MOVES):
            segment = self._current()
            if segment is None:
                self.drop(self._pause_reason)
                return False
            try:
                segment.check()
                if segment.offset + len(line) > segment.room:
                    self._leave(segment)
                    self._refuse("spool_limit", "the spool has reached its limit")
                    return False
                written = os.write(segment.descriptor, line)
                segment.offset = os.lseek(segment.descriptor, 0, os.SEEK_CUR)
                sealed = is_sealed(segment.descriptor)
            except OSError as error:
                self._leave(segment)
                if error.errno in (errno.EBADF, errno.ESPIPE):
                    segment.pid = 0  # not ours to close: its number may be the next segment's
                if error.errno in (errno.EBADF, errno.ESPIPE, errno.ENOENT):
                    self._token_pid = 0  # the token's descriptor, or its file, went the same way
                    continue
                self._refuse(_reason(error), str(error.strerror))
                return False
            if written != len(line):
                self._refuse("disk_full", "a record was written in part")
                return False
            if sealed:
                self._leave(segment)
                continue
            return True
        self._refuse("moving", "segments were sealed faster than a record could be written")
        return False

    @property
    def dropped(self) -> dict[str, int]:
        """Records that this process has lost, by reason."""
        return {reason: tally.value for reason, tally in list(self._dropped.get(os.getpid(), {}).items())}

    def drop(self, reason: str) -> None:
        """Count a record that is lost, by reason."""
        tallies = self._dropped.setdefault(os.getpid(), {})
        tally = tallies.get(reason) or tallies.setdefault(reason, Tally())
        tally.add()

    def _current(self) -> _Segment | None:
        segment = self._segment
        if segment is not None and segment.pid == os.getpid():
            return segment
        if self._paused_until > time.monotonic():
            return None
        try:
            segment = self._open_highest()
        except OSError as error:
            self._pause(_reason(error), str(error))
            return None
        self._segment = segment
        return segment

    def _open_highest(self) -> _Segment:
        directory = self.open()
        share = spool.share(self._settings, directory)
        for _ in range(_MOVES):
            numbers = segment_numbers(directory)
            if not numbers:
                reserve.keep(directory)
                create_segment(directory, 1)
                continue
            path = segment_path(directory, numbers[-1])
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:  # rotated since the listing
                continue
            segment = _Segment(move_high(descriptor), path)
            if is_sealed(segment.descriptor):  # or written by a version that knows no seal
                create_segment(directory, numbers[-1] + 1)
                continue
            segment.room = share - (spool.used_here(directory) - segment.offset)
            return segment
        raise OSError(errno.EAGAIN, "no segment stays open long enough")

    def _leave(self, segment: _Segment) -> None:
        if self._segment is segment:
            self._segment = None

    def _refuse(self, reason: str, message: str) -> None:
        self.drop(reason)
        self._pause(reason, message)

    def _pause(self, reason: str, message: str) -> None:
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
