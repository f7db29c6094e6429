"""Spans and runs as trees: what stands under what, and that no span is lost whatever a client sends."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waxell_workers.server.model import Node, Span, Tree
from waxell_workers.server.tree import MAX_INDENT, RunRow, run_rows, span_rows


def span(name: str, position: int, parent: int | None = None, **more: Any) -> Span:
    facts: dict[str, Any] = {"kind": "chain", "status": "ok", "start_offset_ms": None, "duration_ms": None}
    empty: dict[str, Any] = {"attributes": {}, "input_data": None, "output_data": None, "events": []}
    made: Any = facts | empty | {"name": name, "position": position, "parent_position": parent} | more
    found: Span = made
    return found


def own(**more: Any) -> Span:
    return span("run", 0, kind="agent", **more)


def outline(*spans: Span) -> list[str]:
    return ["  " * row.depth + row.span["name"] for row in span_rows(list(spans))]


def test_a_span_stands_after_its_parent_and_one_deeper() -> None:
    """Given nested spans in the order of their recording, when shown, then each is under its parent."""
    assert outline(own(), span("a", 1, 0), span("b", 2, 0), span("a1", 3, 1), span("a11", 4, 3)) == [
        "run",
        "  a",
        "    a1",
        "      a11",
        "  b",
    ]


def test_a_span_without_a_parent_stands_under_the_runs_own() -> None:
    """The platform's client names a parent inside containers only; its first message has position 0, too."""
    assert outline(own(), span("message", 0), span("a", 1), span("a1", 2, 1), span("b", 3, 0)) == [
        "run",
        "  message",
        "  a",
        "    a1",
        "  b",
    ]


def test_the_runs_own_span_may_come_last() -> None:
    """Given a message at position 0 before the run's own span, when shown, then the run is the parent."""
    assert outline(span("message", 0), span("a", 1, 0), own()) == ["run", "  message", "  a"]


def test_without_the_runs_own_span_there_are_several_trees() -> None:
    """A run that was cut off has no span of its own yet."""
    assert outline(span("a", 1), span("a1", 2, 1), span("b", 3)) == ["a", "  a1", "b"]


def test_a_parent_that_is_missing_loses_nobody() -> None:
    """Given a span whose parent never came, when shown, then it stands under the run, or at the top."""
    assert outline(own(), span("a", 5, 99)) == ["run", "  a"]
    assert outline(span("a", 5, 99)) == ["a"]


def test_spans_that_are_each_others_parents_are_shown_once() -> None:
    """Given a circle, and a span that is its own parent, when shown, then each is there, and it ends."""
    circle = outline(own(), span("a", 1, 2), span("b", 2, 1), span("self", 3, 3), span("below", 4, 2))
    assert circle == ["run", "a", "  b", "    below", "self"]


def test_a_very_deep_tree_is_shown_and_indented_within_bounds() -> None:
    """Given 20,000 spans in each other, when shown, then no recursion ends it and no row leaves the page."""
    rows = span_rows([own(), *(span(f"s{n}", n, n - 1) for n in range(1, 20_000))])
    assert [row.depth for row in rows] == list(range(20_000))
    assert max(row.indent for row in rows) == MAX_INDENT


def test_bars_cover_the_time_of_all_spans() -> None:
    """Given offsets and durations, when shown, then a bar begins and ends where its span did."""
    rows = span_rows(
        [
            own(start_offset_ms=0, duration_ms=200),
            span("half", 1, 0, start_offset_ms=100, duration_ms=50),
            span("moment", 2, 0, start_offset_ms=200),
        ]
    )
    assert [(row.left, row.width) for row in rows[:2]] == [(0, 100), (50, 25)]
    assert 0 < rows[2].width < 1
    assert rows[2].left + rows[2].width == pytest.approx(100)


times = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False), st.integers(-5, 2**53))
positions = st.integers(0, 6)
anything = st.builds(
    lambda position, parent, kind, offset, duration: span(
        "x", position, parent, kind=kind, start_offset_ms=offset, duration_ms=duration
    ),
    positions,
    st.one_of(st.none(), positions),
    st.sampled_from(["agent", "llm"]),
    times,
    times.map(lambda value: None if value is None else abs(value)),
)


@given(st.lists(anything, max_size=12))
def test_whatever_was_sent_is_shown_exactly_once(spans: list[Span]) -> None:
    """Given any positions, parents and times, when shown, then all are there, and bars are on the scale."""
    rows = span_rows(spans)
    assert sorted(row.number for row in rows) == list(range(1, len(spans) + 1))
    assert all(spans[row.number - 1] is row.span for row in rows)
    assert all(0 <= row.left <= 100 and 0 < row.width <= 100 for row in rows)
    for before, row in itertools.pairwise(rows):
        assert row.depth <= before.depth + 1


def node(run_id: str, *children: Node, offset_ms: float = 0, **more: Any) -> Node:
    facts: dict[str, Any] = {"status": "success", "duration_ms": None, "wait_s": None}
    made: Any = facts | {"run_id": run_id, "offset_ms": offset_ms, "children": list(children)} | more
    found: Node = made
    return found


def rows_of(*nodes: Node, current: str = "", limit: int = 100, now_ms: float = 0) -> list[RunRow]:
    tree: Any = {"tree": list(nodes)}
    found: Tree = tree
    return run_rows(found, current, limit, now_ms)


def names(rows: list[RunRow]) -> list[str]:
    return ["  " * row.depth + row.run["run_id"] for row in rows]


def test_a_run_stands_after_the_one_that_started_it() -> None:
    """Given runs in each other, then each is below its parent, one deeper, in the store's order."""
    rows = rows_of(node("r", node("a", node("a1")), node("b")), node("s"))
    assert names(rows) == ["r", "  a", "    a1", "  b", "s"]


def test_bars_of_runs_have_waiting_before_work() -> None:
    """Given waits, then the scale begins with the first wait, and each bar ends where its run did."""
    first, second = rows_of(
        node("r", node("a", offset_ms=100, duration_ms=200, wait_s=0.05), duration_ms=50, wait_s=0.1)
    )
    assert (first.wait_left, first.wait_width, first.left, first.width) == (0, 25, 25, 12.5)
    assert (second.wait_left, second.wait_width, second.left, second.width) == (37.5, 12.5, 50, 50)


def test_the_bar_of_a_running_run_ends_now() -> None:
    """Given a run that has not ended, when shown, then its bar goes on to the present."""
    ended, running = rows_of(
        node("r", duration_ms=100), node("on", offset_ms=100, status="running"), now_ms=400
    )
    assert (ended.left, ended.width) == (0, 25)
    assert (running.left, running.width) == (25, 75)


def test_of_too_many_runs_those_around_the_current_one_are_shown() -> None:
    """Given more runs than fit, then those above and below one's own are shown, each with its parent."""
    crowd = [node(f"c{n}", node(f"d{n}")) for n in range(10)]
    own = node("p", node("other"), node("me", node("below")))
    tree = node("r", *crowd, own, node("after"))
    assert names(rows_of(tree, current="me", limit=6)) == [
        "r",
        "  c0",
        "    d0",
        "  p",
        "    me",
        "      below",
    ]
    assert names(rows_of(tree, current="elsewhere", limit=3)) == ["r", "  c0", "    d0"]
    assert names(rows_of(tree, current="me", limit=1)) == ["r"]


@given(st.data(), st.integers(1, 30))
def test_whatever_is_left_out_every_run_has_its_parent(data: st.DataObject, limit: int) -> None:
    """Given any tree and any limit, then as many rows as fit are shown, each with its parent."""
    count = data.draw(st.integers(1, 40))
    nodes = [node(str(n)) for n in range(count)]
    parents = [data.draw(st.integers(-1, n - 1)) for n in range(count)]
    for n, parent in enumerate(parents):
        if parent >= 0:
            nodes[parent]["children"].append(nodes[n])
    top = [nodes[n] for n, parent in enumerate(parents) if parent < 0]
    rows = rows_of(*top, current=str(data.draw(st.integers(0, count - 1))), limit=limit)
    shown = {row.run["run_id"] for row in rows}
    assert len(rows) == min(count, limit)
    assert all(parents[int(name)] < 0 or str(parents[int(name)]) in shown for name in shown)
