"""Spans as a tree, in the order in which a page shows them.

A span names its parent by position only, and positions repeat (the platform's client gives 0 to the run's own
span and to the first message). A client may send anything: no span is lost here, whatever it says. Pure
functions.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from .model import Span

AGENT = "agent"
"""The kind of a run's own span, which the client puts at position 0."""

MAX_INDENT = 12
"""Beyond this depth rows are indented no further; the style sheet knows as many classes."""

_LONGEST_MS = 1e12
_THINNEST = 0.8


@dataclass(frozen=True, slots=True)
class SpanRow:
    """A span, and where it stands."""

    span: Span
    number: int
    """Its place in the run's list of spans, from 1."""
    depth: int
    left: float
    """Where its bar begins, in percent of the time that all spans cover."""
    width: float

    @property
    def indent(self) -> int:
        """The depth, as far as it is shown."""
        return min(self.depth, MAX_INDENT)


def span_rows(spans: list[Span]) -> list[SpanRow]:
    """Put each span after its parent, one deeper, and siblings in the order of the list.

    A span without a parent stands under the run's own span, if there is one: that is what the run is. So does
    one whose parent is missing. Spans that are each other's parents stand at the top.
    """
    children = _children(spans)
    start_ms, whole_ms = _covered(spans)
    rows: list[SpanRow] = []
    seen: set[int] = set()
    # those at the top first; who has not been met after them is part of a circle
    waiting = [(index, 0) for index in [*reversed(range(len(spans))), *reversed(children[None])]]
    while waiting:
        index, depth = waiting.pop()
        if index in seen:
            continue
        seen.add(index)
        span = spans[index]
        left = 100 * (_ms(span["start_offset_ms"]) - start_ms) / whole_ms
        width = 100 * _ms(span["duration_ms"]) / whole_ms
        shown = max(round(width, 2), _THINNEST)
        rows.append(SpanRow(span, index + 1, depth, min(round(left, 2), 100 - _THINNEST), shown))
        waiting.extend((child, depth + 1) for child in reversed(children[index]))
    return rows


def _children(spans: list[Span]) -> defaultdict[int | None, list[int]]:
    own = next((index for index, span in enumerate(spans) if _is_own(span)), None)
    by_position: dict[int, int] = {} if own is None else {0: own}
    for index, span in enumerate(spans):
        by_position.setdefault(span["position"], index)
    children: defaultdict[int | None, list[int]] = defaultdict(list)
    for index, span in enumerate(spans):
        named = span["parent_position"]
        parent = own if named is None else by_position.get(named, own)
        children[None if index == own else parent].append(index)
    return children


def _is_own(span: Span) -> bool:
    return span["kind"] == AGENT and span["position"] == 0 and span["parent_position"] is None


def _covered(spans: list[Span]) -> tuple[float, float]:
    starts = [_ms(span["start_offset_ms"]) for span in spans]
    ends = [start + _ms(span["duration_ms"]) for start, span in zip(starts, spans, strict=True)]
    start_ms = min(starts, default=0.0)
    return start_ms, max(max(ends, default=0.0) - start_ms, 1.0)


def _ms(value: float | None) -> float:
    return min(max(value or 0.0, -_LONGEST_MS), _LONGEST_MS)  # the difference of two large ones is no number
