"""What the crash programs promise, and whether it was kept: both ends of the oracle.

A program notes a call once the recording function has returned, and a run once it is open, with the end that
it is to have. The notes are single appends to a file of the test's, which no death takes back. That nothing
was dropped is told by the program's own `stats()` and by an empty stderr, so a note stands for a promise.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_descriptor = -1
_path = ""


# -- the program's end -------------------------------------------------------------------------


def note_to(path: str) -> None:
    """Take notes in a file; again, after every descriptor was closed."""
    global _descriptor, _path
    _path = path
    _descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def note_again() -> None:
    """Open the file again: its descriptor was closed."""
    note_to(_path)


def call(marker: str) -> None:
    """Note that a call was recorded; its model is its marker."""
    os.write(_descriptor, b"call " + marker.encode() + b"\n")


def run(run_id: str, state: str) -> None:
    """Note that a run is open, and how it will end."""
    os.write(_descriptor, f"run {run_id} {state}\n".encode())


# -- the test's end ----------------------------------------------------------------------------


@dataclass
class Promises:
    """What a program has noted."""

    calls: Counter[str] = field(default_factory=Counter)
    runs: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path) -> Promises:
        """Read the notes whose line is complete."""
        found = cls()
        for line in path.read_bytes().split(b"\n")[:-1]:
            what, first, *rest = line.decode().split(" ")
            if what == "call":
                found.calls[first] += 1
            else:
                found.runs.append((first, rest[0]))
        return found

    def broken(self, records: list[dict[str, Any]]) -> dict[str, list[Any]]:
        """Compare with the records at the server, and return what was not kept; empty if all was.

        A run may have one end only, of whichever kind; that of a run noted as `any` may be any.
        """
        arrived = Counter(record["model"] for record in records if record["kind"] == "llm_call")
        ends: dict[str, list[str]] = {}
        for record in records:
            if record["kind"] == "run_ended":
                ends.setdefault(record["run_id"], []).append(record.get("state", "success"))
        run_ids = Counter(run_id for run_id, _ in self.runs)
        found: dict[str, list[Any]] = {
            "lost calls": sorted(self.calls.keys() - arrived.keys()),
            "doubled calls": sorted(marker for marker, count in arrived.items() if count > 1),
            "doubled markers": sorted(marker for marker, count in self.calls.items() if count > 1),
            "doubled run ids": sorted(run_id for run_id, count in run_ids.items() if count > 1),
            "wrong ends": [
                (run_id, state, ends.get(run_id, []))
                for run_id, state in self.runs
                if len(ends.get(run_id, [])) != 1 or state not in ("any", ends[run_id][0])
            ],
        }
        return {what: which[:20] for what, which in found.items() if which}
