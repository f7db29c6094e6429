"""Destinations that nobody uses any more, after a key was changed: which they are, and how they are emptied.

A destination is in use while a process lives that records to it, or a shipper of it. Afterwards its backlog
waits for `waxell-workers ship --adopt` (`adoption`), or is removed when `spool_max_age` is over, by whichever
shipper of the same spool is at work. Nothing here touches a destination of its own shipper, or takes a record
of a process that lives: what is taken is closed off first (`close_off`), and then it is asked who lives.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import time
from collections.abc import Iterator

from .inspection import Walk, destinations, read_ledger
from .liveness import Procs, ship_lock
from .parking import remove_parked
from .room import with_room
from .segments import FIRST_LINE, create_segment, seal, segment_numbers, segment_path
from .spool import used_here

logger = logging.getLogger("waxell_workers.shipper")

_EVERY_S = 900.0
_NOTICE_S = 3600.0
"""How long one must have been known to be unused: after a holiday, workers do not start all at once."""
_SLICE_S = 0.05
"""How long a shipper counts what it will remove, before it looks after its own journal again."""
_COUNTED_AT_ONCE = 500
_NOTICE = "unused"
_REMAINS = ("reserve", "shipper.db", "shipper.db-wal", "shipper.db-shm", "drain.log", "drain.log.1")
"""What goes with the last segment."""
_DAY_S = 86_400


class InUse(OSError):
    """Somebody works there."""


def last_use(directory: str) -> float:
    """Return when a process was last at work in a destination's directory, as far as it shows, in Unix time.

    Writing shows in the segments; a shipper that lives touches `procs` and `ship.lock` each minute.

    Raises:
        OSError: the directory cannot be read.
    """
    names = [name for name in os.listdir(directory) if name in ("procs", "ship.lock") or _is_segment(name)]
    moments = [_written_at(f"{directory}/{name}") for name in names]
    return max(moments) if moments else os.stat(directory).st_mtime


def is_ours(directory: str) -> bool:
    """True if it is a directory, no link to one, and belongs to this user."""
    try:
        status = os.lstat(directory)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def close_off(directory: str, procs: Procs) -> int:
    """Have whatever is recorded from now on go to another segment; return the highest of those before.

    A writer registers before it writes, and writes again if it finds the seal. So who wrote to these segments
    is dead if nobody lives now.

    Raises:
        InUse: a process lives that records there.
        OSError: the directory cannot be written to.
    """
    if procs.anyone_alive():
        raise InUse(f"a process records to {directory}")
    number = max(segment_numbers(directory), default=0)
    with_room(directory, lambda: create_segment(directory, number + 1))
    if number:
        seal(directory, number)
    if procs.anyone_alive():
        raise InUse(f"a process records to {directory}")
    return number


class Sweeper:
    """Removes, slice by slice, what nobody has used for `spool_max_age` in the spool around a directory."""

    def __init__(self, directory: str, max_age_s: float) -> None:
        """Prepare.

        Args:
            directory: the destination's directory that is in use here, and is left alone.
            max_age_s: seconds; 0 to remove nothing.
        """
        self._directory = directory
        self._max_age_s = max_age_s
        self._next = 0.0
        self._sweep: Iterator[None] | None = None

    def go_on(self) -> None:
        """Work for a moment, if there is something to do."""
        if self._sweep is None:
            if not self._max_age_s or time.monotonic() < self._next:
                return
            self._next = time.monotonic() + _EVERY_S
            self._sweep = _sweep(self._directory, self._max_age_s)
        until = time.monotonic() + _SLICE_S
        while time.monotonic() < until:
            if next(self._sweep, self) is self:
                self._sweep = None
                return

    def close(self) -> None:
        """Stop in the middle, and let go of whatever is held."""
        sweep, self._sweep = self._sweep, None
        if sweep is not None:
            sweep.close()  # type: ignore[attr-defined]  # it is a generator


def _sweep(directory: str, max_age_s: float) -> Iterator[None]:
    root, own = os.path.split(directory)
    try:
        names = destinations(root)
    except OSError:
        return
    for name in names:
        if name == own:
            continue
        try:
            yield from _sweep_one(f"{root}/{name}", max_age_s)
        except (OSError, sqlite3.Error) as error:
            logger.debug("%s is left as it is: %s", name, error)
        yield


def _sweep_one(directory: str, max_age_s: float) -> Iterator[None]:
    if not is_ours(directory) or not _holds_anything(directory):
        return
    before, used = _sizes(directory), last_use(directory)
    if time.time() - used < max_age_s or not _was_noticed(directory, used):
        return
    lock = ship_lock(directory)
    procs = Procs(directory)
    if procs.anyone_alive() or not lock.acquire():
        return
    try:
        yield from _remove(directory, procs, before, used)
    finally:
        lock.release()


def _remove(directory: str, procs: Procs, before: dict[int, int], used: float) -> Iterator[None]:
    """Remove the backlog of a destination whose lock we hold; a process that comes meanwhile loses nothing.

    Args:
        directory: the destination's directory.
        procs: who lives there.
        before: the segments and their sizes when nobody had used it for so long.
        used: when somebody last did, Unix time.
    """
    last = close_off(directory, procs)
    if {number: size for number, size in _sizes(directory).items() if number <= last} != before:
        return  # somebody came, wrote, and died
    walk = Walk(directory, read_ledger(directory))
    records = 0
    for line in walk.lines():
        if line.end.segment > last:
            break
        records += 1
        if records % _COUNTED_AT_ONCE == 0:
            yield
    if any(segment.is_newer for segment in walk.segments):
        return
    for number in before:
        os.unlink(segment_path(directory, number))
    remove_parked(directory)
    for name in (*_REMAINS, _NOTICE):
        _unlink(f"{directory}/{name}")
    logger.warning(
        "%d records removed (spool_max_age): nobody has used the destination %s for %.1f days",
        records,
        os.path.basename(directory),
        (time.time() - used) / _DAY_S,
    )


def _was_noticed(directory: str, used: float) -> bool:
    """True if a shipper has found the destination unused before, a while ago; else make a note of it."""
    path = f"{directory}/{_NOTICE}"
    noticed = _written_at(path)
    if noticed > used:
        return time.time() - noticed >= _NOTICE_S
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    os.utime(path)
    return False


def _holds_anything(directory: str) -> bool:
    """True if there is more than the first line of a segment, which every destination keeps."""
    return used_here(directory) > len(FIRST_LINE)


def _sizes(directory: str) -> dict[int, int]:
    return {number: os.stat(segment_path(directory, number)).st_size for number in segment_numbers(directory)}


def _is_segment(name: str) -> bool:
    return name.endswith(".ndjson") and name[:1].isdecimal()


def _written_at(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
