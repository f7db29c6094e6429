"""Records that will never be taken: kept beside the journal, with the reason, for a person to look at."""

from __future__ import annotations

import time

import msgspec

from .encoding import to_json
from .records import Record
from .room import with_room
from .sidefile import append

FILE_BYTES = 16 << 20
"""Of each of the two files, about."""


def keep(directory: str, record: Record, reason: str) -> str:
    """Write a record down; return the file's path.

    Raises:
        OSError: there is no room, or no right.
    """
    line = msgspec.json.encode({"reason": reason, "at": time.time(), "record": msgspec.Raw(to_json(record))})
    path = f"{directory}/quarantine.ndjson"
    with_room(directory, lambda: append(path, line + b"\n", FILE_BYTES))
    return path
