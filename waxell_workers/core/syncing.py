"""Against power loss: the journal is written through to the disk now and then, by a thread of the shipper's.

Off unless `fsync_interval` is set: what a process has written outlives the process without it. No task ever
waits for it, nor does the shipper's own loop: a slow disk may take seconds.
"""

from __future__ import annotations

import logging
import os
import threading

from .segments import segment_numbers, segment_path

logger = logging.getLogger("waxell_workers.shipper")


class Syncer:
    """Writes a destination's segments through to the disk, those that have grown."""

    def __init__(self, directory: str, interval_s: float) -> None:
        """Prepare.

        Args:
            directory: the destination's directory.
            interval_s: seconds between two rounds; 0 for none at all.
        """
        self._directory = directory
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._synced: dict[int, tuple[int, int]] = {}
        """Segment to its inode and size when it was last written through."""

    def start(self) -> None:
        """Begin; nothing where it is off, or no thread can be started any more."""
        if not self._interval_s:
            return
        self._stopping.clear()
        try:
            threading.Thread(target=self._run, name="waxell-sync", daemon=True).start()
        except RuntimeError as error:  # at the interpreter's end
            logger.warning("the journal is not synced: %s", error)

    def close(self) -> None:
        """Stop; a round that is on its way goes on by itself."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            try:
                self._sync()
            except OSError as error:  # deleted meanwhile, or the disk: the next round will see
                logger.debug("the journal was not synced: %s", error)

    def _sync(self) -> None:
        synced: dict[int, tuple[int, int]] = {}
        for number in segment_numbers(self._directory):
            path = segment_path(self._directory, number)
            status = os.stat(path)
            synced[number] = (status.st_ino, status.st_size)
            if self._synced.get(number) != synced[number]:
                _write_through(path)
        if synced.keys() != self._synced.keys():
            _write_through(self._directory)  # else a new segment might have no name afterwards
        self._synced = synced


def _write_through(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
