"""Two instrumentors around one stream: what its reader raises reaches the inner one, too.

A stream of `opentelemetry-util-genai` (1.3b0) that is left by an exception ends its call with that, and
closes the stream inside it. If that is a user's instrumentor's, their call would end as if nothing had been.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from typing import Any

_CLOSES = ("close", "aclose")


class _Inside:
    """Stands for the inner stream where the outer one closes it."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, inner: Any, outer: Any) -> None:
        self._inner = inner
        self._outer = weakref.ref(outer)  # a cycle would keep an abandoned stream until the next collection

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._inner, name)
        error = sys.exc_info()[1]
        # Closed in an `except` block of the reader's, the outer stream has not ended before its close.
        if name not in _CLOSES or error is None or not getattr(self._outer(), "_self_finalized", False):
            return member
        inner = self._inner
        # wrapt's proxies have both, whatever they stand for.
        is_async = inspect.iscoroutinefunction(getattr(type(inner), "__aexit__", None))
        leave = inner.__aexit__ if is_async else inner.__exit__
        return lambda: leave(type(error), error, error.__traceback__)


def link(outer: Any, inner: Any) -> None:
    """Have a stream of ours tell an instrumentor's stream inside it what its reader has raised."""
    if hasattr(type(inner), "_finalize_failure") and getattr(outer, "_self_stream", None) is inner:
        outer._self_stream = _Inside(inner, outer)
