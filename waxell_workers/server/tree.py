"""Spans and runs as trees, in the order in which a page shows them.

A span names its parent by position only, and positions repeat (the platform's client gives 0 to the run's own
span and to the first message). A client may send anything: no span is lost here, whatever it says. The
runs of a trace come from the store as a tree; of a very large one a page shows those that matter for one run.
Pure functions.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from .model import RUNNING, Node, Span, Tree

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


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run of a trace, and where it stands."""

    run: Node
    depth: int
    wait_left: float
    """Where the bar of its waiting begins, in percent of the time of all runs; then that of its work."""
    wait_width: float
    left: float
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


def run_rows(tree: Tree, current: str, limit: int, now_ms: float) -> list[RunRow]:
    """Put each run after the one that enqueued it, one deeper, as the store has them.

    Args:
        tree: the runs.
        current: the id of the run whose page it is.
        limit: how many rows; of more runs, those above and below the current one are kept, then the first.
        now_ms: how long after the tree's start it is now: a running run's bar ends there.
    """
    found = _below(tree["tree"])
    spread = [(_ms(run["offset_ms"]), *_lasted(run, now_ms)) for run, _ in found]
    first = min((start - wait for start, wait, _ in spread), default=0.0)
    whole = max(max((start + lasted for start, _, lasted in spread), default=0.0) - first, 1.0)
    rows: list[RunRow] = []
    for index in sorted(_kept(found, current, limit)):
        run, depth = found[index]
        start, wait, lasted = spread[index]
        wait_left, left = 100 * (start - wait - first) / whole, 100 * (start - first) / whole
        rows.append(
            RunRow(
                run,
                depth,
                wait_left=round(wait_left, 2),
                wait_width=round(left - wait_left, 2),
                left=min(round(left, 2), 100 - _THINNEST),
                width=max(round(100 * lasted / whole, 2), _THINNEST),
            )
        )
    return rows


def _below(nodes: list[Node]) -> list[tuple[Node, int]]:
    """Return all runs with their depth, each after its parent."""
    found = []
    waiting = [(node, 0) for node in reversed(nodes)]
    while waiting:
        node, depth = waiting.pop()
        found.append((node, depth))
        waiting.extend((child, depth + 1) for child in reversed(node["children"]))
    return found


def _kept(found: list[tuple[Node, int]], current: str, limit: int) -> set[int]:
    """Return the places of the runs to show. A run is never there without those above it."""
    if len(found) <= limit:
        return set(range(len(found)))
    here = next((index for index, (run, _) in enumerate(found) if run["run_id"] == current), None)
    order: dict[int, None] = {}
    if here is not None:
        own = depth = found[here][1]
        above = []
        for index in range(here, -1, -1):
            if index == here or found[index][1] < depth:
                above.append(index)
                depth = found[index][1]
        order.update(dict.fromkeys(reversed(above)))
        for index in range(here + 1, len(found)):
            if found[index][1] <= own:
                break
            order[index] = None
    order.update(dict.fromkeys(range(len(found))))
    return set(list(order)[:limit])


def _lasted(run: Node, now_ms: float) -> tuple[float, float]:
    """Return how long a run waited and worked, in ms; what is not known is nothing."""
    wait_ms = max(_ms((run["wait_s"] or 0.0) * 1000), 0.0)
    if run["status"] == RUNNING:
        return wait_ms, max(_ms(now_ms) - _ms(run["offset_ms"]), 0.0)
    return wait_ms, max(_ms(run["duration_ms"]), 0.0)


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
