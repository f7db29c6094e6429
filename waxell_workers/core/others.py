"""What the core knows of the tracers that a process has beside us: that somebody can flush them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class OtherTracers(Protocol):
    """Flushes other tracers, for whoever has asked for it; `_api` gives one to the collector."""

    def begin(self, deadline: float) -> Callable[[], None]:
        """Start flushing and return at once; what is returned waits for the end, or for the deadline.

        Args:
            deadline: `time.monotonic()` in seconds.
        """

    def counts(self) -> dict[str, dict[str, int]]:
        """Return, by tracer, how many flushes of this process came to which end."""
