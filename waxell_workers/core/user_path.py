"""Where the process that configured this library imports from, told to a shipper that starts without it.

A shipper process has a safe import path, so that no file of the user's can stand in for a module of Python's
or ours. The one thing of the user's that it may have to import, a function that prices calls, is looked for
where the configuring process would find it; these places come last, and only for as long as that takes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

_MOST_BYTES = 12_000
"""Of all places together: they go through a pipe that nobody reads yet, and that must not fill up."""

_entries: list[str] = []


def of_this_process() -> list[str]:
    """Return the places where this process imports from, as absolute paths."""
    places: list[str] = []
    size = 0
    for entry in sys.path:
        try:
            place = os.path.abspath(entry)  # an empty one is the current directory
        except OSError:  # which has been removed
            continue
        size += len(os.fsencode(place))
        if size > _MOST_BYTES:
            break
        if place not in places and _can_be_told(place):
            places.append(place)
    return places


def remember(places: Iterable[str]) -> None:
    """Note where the configuring process imports from."""
    _entries[:] = places


@contextmanager
def importable() -> Iterator[None]:
    """Have these places at the end of `sys.path` for as long as the block lasts."""
    added = [place for place in _entries if place not in sys.path]
    sys.path.extend(added)
    try:
        yield
    finally:
        for place in added:
            with suppress(ValueError):
                sys.path.remove(place)


def _can_be_told(place: str) -> bool:
    try:
        place.encode()
    except UnicodeEncodeError:  # not in the file system's encoding: JSON has no place for it
        return False
    return True
