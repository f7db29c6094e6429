"""What is wrong with a destination's directory: its segments, its ledger, and how they fit together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ..core import inspection
from ..core.inspection import LedgerState, SegmentReport, Walk
from ..core.segments import segment_path

_WHY = {
    inspection.TORN: "a torn line: its writer died in the middle of it, or the disk was full",
    inspection.DAMAGED: "a damaged line: no JSON",
    inspection.UNKNOWN: "a line that is no record of this version",
    inspection.NO_FIRST_LINE: "the first line does not say that this is a segment",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that a person should know."""

    where: str
    """The file's name."""
    text: str
    damage: bool = True
    """False for what heals by itself."""
    offset: int | None = None
    """Bytes from the file's beginning, where that means something."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a destination's directory holds, and what is wrong with it."""

    directory: str
    segments: tuple[SegmentReport, ...]
    ledger: LedgerState
    problems: tuple[Problem, ...]

    @property
    def damaged(self) -> bool:
        """True if anything is damaged."""
        return any(problem.damage for problem in self.problems)


def check(directory: str) -> Checked:
    """Read a destination's directory as a whole.

    Raises:
        OSError: it cannot be read.
    """
    ledger = inspection.read_ledger(directory, thoroughly=True)
    walk = Walk(directory, ledger, everything=True)
    for _ in walk.lines():
        pass
    segments = tuple(walk.segments)
    writers = inspection.holders(f"{directory}/procs")
    problems = [
        *(problem for segment in segments for problem in _of_segment(segment, segments, bool(writers))),
        *_of_order(segments),
        *_of_ledger(directory, ledger),
    ]
    return Checked(directory, segments, ledger, tuple(problems))


def _of_segment(
    segment: SegmentReport, segments: tuple[SegmentReport, ...], written: bool
) -> Iterator[Problem]:
    where = _name(segment.number)
    for bad in segment.bad:
        yield Problem(where, f"{_WHY[bad.why]} ({bad.size} bytes)", offset=bad.offset)
    if segment.is_newer:
        yield Problem(where, f"written by a newer version (format {segment.version})", damage=False)
    highest = segment is segments[-1]
    if segment.unfinished:
        at = segment.size - segment.unfinished
        what = f"{segment.unfinished} bytes without an end"
        if highest and written and not segment.sealed:
            yield Problem(where, f"{what}: being written, or torn", damage=False, offset=at)
        else:
            yield Problem(where, f"{_WHY[inspection.TORN]} ({segment.unfinished} bytes)", offset=at)
    if not highest and not segment.sealed:
        yield Problem(where, "not sealed yet: a shipper will do that", damage=False)


def _of_order(segments: tuple[SegmentReport, ...]) -> Iterator[Problem]:
    for earlier, later in pairwise(segments):
        for number in range(earlier.number + 1, later.number):
            yield Problem(_name(number), "missing: segments are deleted from the lowest on")


def _of_ledger(directory: str, ledger: LedgerState) -> Iterator[Problem]:
    if ledger.problem:
        yield Problem("shipper.db", f"{ledger.problem}; the next shipper delivers the journal again")
        return
    if os.path.exists(f"{directory}/shipper.db.damaged"):
        yield Problem("shipper.db.damaged", "was damaged, and replaced by a shipper", damage=False)
    misplaced = ledger.misplaced(directory)
    if misplaced:
        yield Problem("shipper.db", f"the cursor does not fit: {misplaced}; the journal is delivered again")
    elif ledger.cursor is not None and not _is_boundary(directory, *ledger.cursor):
        yield Problem("shipper.db", "the cursor stands in the middle of a line", offset=ledger.cursor.offset)


def _is_boundary(directory: str, number: int, offset: int) -> bool:
    if offset == 0:
        return True
    try:
        with open(segment_path(directory, number), "rb") as file:
            return os.pread(file.fileno(), 1, offset - 1) == b"\n"
    except FileNotFoundError:  # delivered meanwhile
        return True


def _name(number: int) -> str:
    return os.path.basename(segment_path("", number))
