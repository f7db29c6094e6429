"""The journal, read by the shipper: in order, once, to the last byte of a segment before the next.

A line counts when its newline is there. What is left without one at the end of a sealed segment, and a line
that is no record, is torn or damaged: counted, passed over, never an error.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import msgspec

from .encoding import decode
from .records import FORMAT_VERSION, Record
from .segments import (
    Position,
    create_segment,
    is_first_line,
    is_sealed,
    seal,
    segment_numbers,
    segment_path,
    version_of,
)

_CHUNK = 1 << 20
_TAIL = 4 << 10


class NewerJournal(Exception):
    """A segment was written by a newer version: its shipper should read it."""


@dataclass(slots=True)
class Entry:
    """A record on its way. `record` is given up when it has arrived."""

    record: Record | None
    id: str
    token: int
    end: Position | None
    """Where the record's line ends; None for one that the shipper made."""
    size: int


class Reader:
    """Reads one destination's journal from a position on."""

    def __init__(self, directory: str, start: Position | None, inode: int, last: int | None = None) -> None:
        """Take up at `start`, if the segment there is still the same file; else at the lowest.

        Args:
            directory: the destination's directory.
            start: where reading goes on.
            inode: the inode of the segment there.
            last: the segment with which the journal ends for us; what is behind it is for others.

        Raises:
            OSError: the directory cannot be read.
        """
        self._directory = directory
        self._last = last
        self._descriptor = -1
        self._inodes: dict[int, int] = {}
        self.torn = 0
        numbers = self._numbers()
        self.position = Position(numbers[0] if numbers else 1, 0)
        if start is not None and start.segment in numbers:
            status = os.stat(segment_path(directory, start.segment))
            if status.st_ino == inode and status.st_size >= start.offset:
                self.position = start

    def inode_of(self, number: int) -> int:
        """Return the inode of a segment that was opened here, or 0."""
        return self._inodes.get(number, 0)

    def lowest(self) -> int:
        """Return the number of the lowest segment."""
        return min(self._numbers(), default=self.position.segment)

    def _numbers(self) -> list[int]:
        numbers = segment_numbers(self._directory)
        return numbers if self._last is None else [number for number in numbers if number <= self._last]

    def read(self) -> list[Entry]:
        """Return the next records, up to a chunk of them; empty at the journal's end.

        Raises:
            NewerJournal: the segment has a version that is not known here.
            OSError: the segment cannot be read.
        """
        while True:
            if self._descriptor < 0 and not self._open():
                return []
            sealed = is_sealed(self._descriptor)
            chunk = os.pread(self._descriptor, _CHUNK, self.position.offset)
            complete = chunk.rfind(b"\n") + 1
            if complete:
                if entries := self._entries(chunk[:complete]):
                    return entries
                continue  # the first line alone, or damage: not yet the end
            if len(chunk) == _CHUNK:  # no record is that long: damage
                self.torn += 1
                self.position = Position(self.position.segment, self.position.offset + _CHUNK)
                continue
            if not sealed or not self._next(torn=bool(chunk)):
                return []

    def end(self) -> Position:
        """Return the journal's end at this moment: behind its last complete line.

        What follows that is no record yet, or was torn by a death, and never will be one.
        """
        numbers = self._numbers()
        if not numbers:
            return self.position
        try:
            path = segment_path(self._directory, numbers[-1])
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return self.position
        try:
            return Position(numbers[-1], _end_of_lines(descriptor))
        finally:
            os.close(descriptor)

    def rotate(self) -> None:
        """Open the next segment, then seal the highest one; its end is still to be read.

        Raises:
            OSError: the disk is full, or the directory is gone.
        """
        numbers = self._numbers()
        if not numbers or self._last is not None:
            return
        create_segment(self._directory, numbers[-1] + 1)
        seal(self._directory, numbers[-1])

    def leave_last(self) -> None:
        """Go on to the segment behind the last one, without reading it: so that the last one is passed."""
        if self._last is not None:
            self.close()
            self.position = Position(self._last + 1, 0)
            self._last = None
            self._open()

    def delete_before(self, number: int) -> None:
        """Delete the segments below `number`, all of which must be read and acknowledged."""
        for old in segment_numbers(self._directory):
            if old < number:
                os.unlink(segment_path(self._directory, old))
                self._inodes.pop(old, None)

    def close(self) -> None:
        """Close the segment."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> bool:
        try:
            path = segment_path(self._directory, self.position.segment)
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        self._inodes[self.position.segment] = os.fstat(self._descriptor).st_ino
        return True

    def _next(self, *, torn: bool) -> bool:
        """Go on with the next segment; false if there is none yet."""
        higher = [number for number in self._numbers() if number > self.position.segment]
        if not higher:
            return False
        self.torn += torn
        self.close()
        self.position = Position(higher[0], 0)
        return True

    def follow(self) -> None:
        """Follow what others did to the directory: called before each round of reading.

        If the segment was deleted, reading starts again at the lowest one: somebody wiped the spool. If it
        was cut, it starts again at its beginning. If a higher one exists and this one has no seal, a shipper
        died between the two.

        Raises:
            OSError: the directory is gone.
        """
        if self._descriptor < 0:
            return
        numbers = self._numbers()
        status = os.fstat(self._descriptor)
        if status.st_nlink == 0:
            self.close()
            self.position = Position(numbers[0] if numbers else 1, 0)
            return
        if status.st_size < self.position.offset:
            self.position = Position(self.position.segment, 0)
        if max(numbers, default=0) > self.position.segment and not is_sealed(self._descriptor):
            seal(self._directory, self.position.segment)

    def _entries(self, chunk: bytes) -> list[Entry]:
        number, offset = self.position
        entries = []
        for line in chunk.split(b"\n")[:-1]:
            offset += len(line) + 1
            if not line:
                continue
            if is_first_line(line):
                self._check_version(line)
                continue
            try:
                record = decode(line)
            except msgspec.MsgspecError:
                self.torn += 1
                continue
            entries.append(Entry(record, record.id, record.proc, Position(number, offset), len(line)))
        self.position = Position(number, offset)
        return entries

    def _check_version(self, first_line: bytes) -> None:
        version = version_of(first_line)
        if version > FORMAT_VERSION:
            raise NewerJournal(f"a segment has version {version}, this is {FORMAT_VERSION}")
        self.torn += version == 0


def _end_of_lines(descriptor: int) -> int:
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _TAIL)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
