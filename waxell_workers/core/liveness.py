"""Who lives: one POSIX byte lock per process, freed by the kernel whatever the death.

Each writer locks one byte at a random offset of `procs` and puts the offset (its *token*) into its records.
Whoever finds that byte unlocked knows that the writer is gone: zombies, reused pids, `exec`, pid namespaces
and shared volumes need no special case.

A POSIX lock goes when its process closes *any* descriptor of the file. So each process opens `procs` and
`ship.lock` at most once a registration, and never closes them.
"""

from __future__ import annotations

import fcntl
import os
import random
import struct
import sys

from .segments import move_high

_LAST_TOKEN = 1 << 48
_FLOCK = "hhqqi" if sys.platform == "linux" else "qqihh"
_registered: dict[tuple[int, int], set[int]] = {}
"""(device, inode) of a `procs` file to the tokens that this process holds in it."""
_registered_pid = 0


def register(directory: str) -> int:
    """Lock a byte of `procs` for this process, until its death, and return its offset.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    descriptor = move_high(os.open(f"{directory}/procs", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    chance = random.SystemRandom()
    while True:
        token = chance.randrange(1, _LAST_TOKEN)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, token)
        except BlockingIOError:
            continue
        _remember(descriptor, token)
        return token


def _remember(descriptor: int, token: int) -> None:
    global _registered_pid
    if _registered_pid != os.getpid():
        _registered.clear()
        _registered_pid = os.getpid()
    status = os.fstat(descriptor)
    _registered.setdefault((status.st_dev, status.st_ino), set()).add(token)


class Procs:
    """The reader's side of `procs`: asks who lives, holds no lock itself."""

    def __init__(self, directory: str) -> None:
        """Open `procs`, for the process's life.

        Raises:
            OSError: the file cannot be opened.
        """
        self._path = f"{directory}/procs"
        self._opened: dict[tuple[int, int], int] = {}
        """(device, inode) to descriptor: more than one if the file was deleted and made again."""
        self._follow()

    def is_alive(self, token: int) -> bool:
        """True if the process with this token lives."""
        self._follow()
        return token in self._own() or any(
            _locked_by_other(descriptor, token, 1) for descriptor in self._opened.values()
        )

    def anyone_alive(self) -> bool:
        """True if any process, this one included, holds a token."""
        self._follow()
        return bool(self._own()) or any(
            _locked_by_other(descriptor, 0, 0) for descriptor in self._opened.values()
        )

    def _follow(self) -> None:
        try:
            status = os.stat(self._path)
            if (status.st_dev, status.st_ino) in self._opened:
                return
        except FileNotFoundError:
            pass
        descriptor = move_high(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        status = os.fstat(descriptor)
        self._opened[status.st_dev, status.st_ino] = descriptor

    def _own(self) -> set[int]:
        # The kernel does not report a process its own locks.
        if _registered_pid != os.getpid():
            return set()
        return set().union(*(_registered.get(file, set()) for file in self._opened))


def _locked_by_other(descriptor: int, start: int, length: int) -> bool:
    fields = (fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    if sys.platform != "linux":
        fields = (start, length, 0, fcntl.F_WRLCK, os.SEEK_SET)
    answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(_FLOCK, *fields))
    found = struct.unpack(_FLOCK, answer[: struct.calcsize(_FLOCK)])
    return bool(found[0 if sys.platform == "linux" else 3] != fcntl.F_UNLCK)


class ShipLock:
    """The right to ship from one directory: held by at most one process of the host.

    There is one object per directory and process (`ship_lock`), since the kernel would grant the same lock
    to a second thread of the holder.
    """

    def __init__(self, directory: str) -> None:
        self._path = f"{directory}/ship.lock"
        self._descriptor = -1
        self._opened_by = 0
        self._held_by = 0
        self._claims: dict[int, object] = {}
        """Process to the thread's claim; a forked child's own claim stands beside its parent's."""

    @property
    def held(self) -> bool:
        """True if this very process holds the lock."""
        return self._held_by == os.getpid()

    def taken(self) -> bool:
        """True if any process holds the lock; asks, never takes.

        Raises:
            OSError: the file cannot be opened.
        """
        return self.held or _locked_by_other(self._open(), 0, 1)

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
        except BlockingIOError:
            del self._claims[os.getpid()]
            return False
        self._held_by = os.getpid()
        return True

    def release(self) -> None:
        """Let go of the lock."""
        if self.held:
            self._held_by = 0
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, 0)
            self._claims.pop(os.getpid(), None)

    def _open(self) -> int:
        # A forked child may have had its descriptors closed and their numbers given to others.
        if self._opened_by != os.getpid():
            opened = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._descriptor = move_high(opened)
            self._opened_by = os.getpid()
        return self._descriptor


_ship_locks: dict[str, ShipLock] = {}


def ship_lock(directory: str) -> ShipLock:
    """Return this process's one `ShipLock` for a directory."""
    return _ship_locks.setdefault(directory, ShipLock(directory))
