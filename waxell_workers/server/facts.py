"""What a task has told about itself, out of the metadata of its run: one column each in the table of runs.

Metadata may hold anything, since users write there too. A value that is not what its column means is not
known. The same reading serves a run that arrives, and one that an older version has stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .model import LATEST
from .values import MAX_INT, amount, cut, number
from .values import moment as checked


def name(value: object) -> str:
    """Return a name or an id; empty for what is no text."""
    return cut(value) if isinstance(value, str) else ""


def ordinal(value: object) -> int | None:
    """Return a whole number from 1, or None."""
    found = number(value)
    return int(found) if found is not None and 1 <= found <= MAX_INT and found == int(found) else None


def count(value: object) -> int | None:
    """Return a whole number from 0, or None."""
    found = number(value)
    return int(found) if found is not None and 0 <= found <= MAX_INT and found == int(found) else None


def moment(value: object) -> float | None:
    """Return Unix seconds, or None."""
    return checked(value, LATEST)


FACTS: dict[str, Callable[[object], str | int | float | None]] = {
    "framework": name,
    "task": name,
    "queue": name,
    "attempt": ordinal,
    "repeat": count,
    "replaced": count,
    "enqueued_at": moment,
    "eta": moment,
    "wait_s": amount,
    "previous_run_id": name,
    "linked_run_id": name,
    "parent_task_id": name,
    "user_group": name,
}
"""A column of `runs`, which is a key of the metadata, to what may stand there."""


def facts(metadata: Mapping[str, Any]) -> dict[str, str | int | float | None]:
    """Return the columns that this metadata has something to say about."""
    return {column: read(metadata[column]) for column, read in FACTS.items() if column in metadata}
