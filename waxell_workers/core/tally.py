"""Counts that threads, signal handlers and finalisers may raise at once, without a lock or a loss."""

from __future__ import annotations

from itertools import count


class Tally:
    """A count from 0. `+= 1` would lose what another thread adds between its read and its write."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = count()

    def add(self) -> None:
        """Count one."""
        next(self._next)

    @property
    def value(self) -> int:
        """How often `add` was called."""
        # `count(7)`: the one way to look at it that neither takes a number nor is deprecated.
        return int(repr(self._next)[len("count(") : -1])
