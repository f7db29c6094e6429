"""Who lives: one POSIX byte lock per process, freed by the kernel whatever the death.

Each writer locks one byte at a random offset of `procs` and puts the offset (its *token*) into its records.
Whoever finds that byte unlocked knows that the writer is gone: zombies, reused pids, `exec`, pid namespaces
and shared volumes need no special case.

A POSIX lock goes when its process closes *any* descriptor of the file. So each process opens `procs` and
`ship.lock` once and never closes them; if somebody else does, it opens them and takes its bytes again.
"""

from __future__ import annotations

import fcntl
import os
import random
import struct
import sys
from typing import NamedTuple

from .descriptors import File, file_of, is_at, move_high, stands_for

_LAST_TOKEN = 1 << 48
_FLOCK = "hhqqi" if sys.platform == "linux" else "qqihh"


class _Held(NamedTuple):
    """What one process has of `procs` files: more than one, if it records to several destinations."""

    opened: dict[File, int]
    """Each file, to the process's one descriptor of it."""
    tokens: dict[File, set[int]]
    """Each file, to the tokens that the process holds there."""


_by_pid: dict[int, _Held] = {}


def _held() -> _Held:
    """Return what this process holds; a forked child holds nothing of its parent's."""
    # One atomic step: of two threads that come first, none throws away what the other has noted.
    return _by_pid.setdefault(os.getpid(), _Held({}, {}))


def register(directory: str) -> int:
    """Lock a byte of `procs` for this process, until its death, and return its offset.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    file, descriptor = _open(f"{directory}/procs")
    tokens = _held().tokens.setdefault(file, set())
    for token in tokens:
        return token
    chance = random.SystemRandom()
    while True:
        token = chance.randrange(1, _LAST_TOKEN)
        tokens.add(token)  # before the lock: see `_open`
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, token)
        except BlockingIOError:
            tokens.discard(token)
            continue
        return token


def _open(path: str) -> tuple[File, int]:
    """Return a `procs` file and this process's descriptor of it, opened if it is not, or no longer, open."""
    held = _held()
    try:
        status = os.stat(path)
    except FileNotFoundError:
        pass
    else:
        file = (status.st_dev, status.st_ino)
        if file in held.opened and stands_for(held.opened[file], file):
            return file, held.opened[file]
    descriptor = move_high(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    file = file_of(descriptor)
    held.opened[file] = descriptor
    # The move has closed a descriptor of the file, and so freed what another thread may just have locked.
    for token in list(held.tokens.get(file, ())):
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, token)
    return file, descriptor


class Procs:
    """The reader's side of `procs`: asks who lives, holds no lock itself."""

    def __init__(self, directory: str) -> None:
        """Open `procs`, for the process's life.

        Raises:
            OSError: the file cannot be opened.
        """
        self._path = f"{directory}/procs"
        self._opened: dict[File, int] = {}
        """File to descriptor: more than one if the file was deleted and made again."""
        self._follow()

    def is_alive(self, token: int) -> bool:
        """True if the process with this token lives."""
        if not 0 < token < _LAST_TOKEN:  # none, or damaged
            return False
        self._follow()
        return token in self._own() or any(
            _locked_by_other(descriptor, token, 1) for descriptor in self._opened.values()
        )

    def anyone_alive(self) -> bool:
        """True if any process, this one included, holds a token."""
        return bool(self._own()) or self.anyone_else_alive()

    def anyone_else_alive(self) -> bool:
        """True if any process but this one holds a token."""
        self._follow()
        return any(_locked_by_other(descriptor, 0, 0) for descriptor in self._opened.values())

    def _follow(self) -> None:
        file, descriptor = _open(self._path)
        self._opened[file] = descriptor

    def _own(self) -> set[int]:
        # The kernel does not report a process its own locks.
        return set().union(*(_held().tokens.get(file, set()) for file in self._opened))


class Holder(NamedTuple):
    """Another process that holds a byte lock."""

    token: int
    """The byte's offset; in `procs`, what its records carry as `proc`."""
    pid: int
    """0 for a process of another pid namespace."""


def holder(descriptor: int, start: int, length: int) -> Holder | None:
    """Return one of the other processes that lock a byte in a range (length 0: to the end), or None.

    Raises:
        OSError: the descriptor is not open.
    """
    linux = sys.platform == "linux"
    fields = (start, length, 0, fcntl.F_WRLCK, os.SEEK_SET)
    if linux:
        fields = (fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(_FLOCK, *fields))
    found = struct.unpack(_FLOCK, answer[: struct.calcsize(_FLOCK)])
    kind, token, pid = (found[0], found[2], found[4]) if linux else (found[3], found[0], found[2])
    return None if kind == fcntl.F_UNLCK else Holder(token, max(0, pid))


def _locked_by_other(descriptor: int, start: int, length: int) -> bool:
    return holder(descriptor, start, length) is not None


class ShipLock:
    """The right to ship from one directory: held by at most one process of the host.

    There is one object per directory and process (`ship_lock`), since the kernel would grant the same lock
    to a second thread of the holder.
    """

    def __init__(self, directory: str) -> None:
        self._path = f"{directory}/ship.lock"
        self._descriptor = -1
        self._file: File = (0, 0)
        self._opened_by = 0
        self._held_by = 0
        self._claims: dict[int, object] = {}
        """Process to the thread's claim; a forked child's own claim stands beside its parent's."""

    @property
    def held(self) -> bool:
        """True if this very process holds the lock."""
        return self._held_by == os.getpid()

    def is_in_place(self) -> bool:
        """True if what this process has locked is still the directory's `ship.lock`, and nobody else can."""
        return is_at(self._path, self._file)

    def taken(self) -> bool:
        """True if any process holds the lock; asks, never takes.

        Raises:
            OSError: the file cannot be opened.
        """
        return self.held or _locked_by_other(self._open(), 0, 1)

    def shipper_pid(self) -> int:
        """Return which other process holds the lock; 0 for none, or one of another pid namespace.

        Raises:
            OSError: the file cannot be opened.
        """
        found = holder(self._open(), 0, 1)
        return found.pid if found is not None else 0

    def acquire(self) -> bool:
        """Take the lock if it is free; False if another process, or a thread of this one, has it.

        Raises:
            OSError: the file cannot be opened.
        """
        claim = object()
        # One atomic step, and no lock that a fork could leave locked in a child.
        if self._claims.setdefault(os.getpid(), claim) is not claim:
            return False
        try:
            fcntl.lockf(self._open(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
            self._held_by = os.getpid()
        except BlockingIOError:
            return False
        finally:
            if not self.held:
                del self._claims[os.getpid()]
        return True

    def release(self) -> None:
        """Let go of the lock."""
        if self.held:
            self._held_by = 0
            try:
                if stands_for(self._descriptor, self._file):
                    fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, 0)
            finally:
                self._claims.pop(os.getpid(), None)

    def _open(self) -> int:
        # A forked child, or who forked it, may have closed all descriptors and given others their numbers;
        # and the directory may have been deleted, or moved away, and made anew.
        if (
            self._opened_by != os.getpid()
            or not stands_for(self._descriptor, self._file)
            or not is_at(self._path, self._file)
        ):
            opened = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._descriptor = move_high(opened)
            self._file = file_of(self._descriptor)
            self._opened_by = os.getpid()
        return self._descriptor


_ship_locks: dict[str, ShipLock] = {}


def ship_lock(directory: str) -> ShipLock:
    """Return this process's one `ShipLock` for a directory."""
    return _ship_locks.setdefault(directory, ShipLock(directory))
