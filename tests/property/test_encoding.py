"""Whatever is handed in becomes one line that can be read again: whole, reduced or cut, never an error."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waxell_workers.core.encoding import MAX_LINE, decode, encode
from waxell_workers.core.records import LLMCall, RunStarted, Step


class Mute:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None))
    | st.binary()
    | st.datetimes()
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.complex_numbers()
    | st.builds(Mute)
    | st.builds(object)
)
_keys = (
    st.text(st.characters(codec=None))
    | st.integers()
    | st.floats()
    | st.none()
    | st.binary()
    | st.tuples(st.text())
)
_values = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(_keys, inner) | st.frozensets(_leaves)
    ),
    max_leaves=20,
)


def step(output: Any) -> Step:
    return Step(id="i", at=1.0, run_id="r", name="n", output=output)


def once(record: Any) -> Any:
    """Encode, check the line, decode."""
    line = encode(record)
    assert line.startswith(b"\n")
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 2
    assert len(line) <= MAX_LINE + 2
    return decode(line[1:-1])


@given(_values)
def test_anything_becomes_a_line_and_can_be_read_again(value: Any) -> None:
    """Bytes, NaN, lone surrogates, keys of any type, objects without a text: one line, one record."""
    record = once(step(value))
    assert (record.id, record.run_id, record.name) == ("i", "r", "n")


_text = st.text(st.characters(exclude_categories=["Cs"]))
_plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | _text,
    lambda inner: st.lists(inner) | st.dictionaries(_text, inner),
)


@given(_plain)
def test_plain_data_comes_back_as_it_was(value: Any) -> None:
    """What JSON can say is not touched."""
    assert once(step(value)).output == value


@given(st.text(st.characters(codec=None)))
def test_lone_surrogates_are_replaced_and_nothing_else(text: str) -> None:
    """A text that is no Unicode loses the part that is none."""
    call = once(LLMCall(id="i", at=1.0, model="m", prompt=text))
    assert call.prompt == text.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("size", [MAX_LINE - 300, MAX_LINE, 3 * MAX_LINE])
def test_long_texts_are_cut_visibly(size: int) -> None:
    """A record fits into the bound, and says how much of a text is gone."""
    call = once(LLMCall(id="i", at=1.0, model="m", prompt="x" * size, response="short"))
    assert call.response == "short"
    if size < MAX_LINE - 200:
        assert len(call.prompt) == size
    else:
        assert "characters cut" in call.prompt


@pytest.mark.parametrize(
    "value",
    [
        {str(n): "x" * 1000 for n in range(2000)},
        [["x" * 1000] * 300 for _ in range(300)],
        {"k" * 300_000: 1},
        "é" * 300_000,
        "\0" * 100_000,
        "\ud800" * 300_000,
    ],
    ids=["dict", "list", "key", "bytes per character", "escapes", "surrogates"],
)
def test_large_collections_are_cut(value: Any) -> None:
    """Whatever makes a record large, it fits, and its other fields are whole."""
    once(step(value))
    start = once(
        RunStarted(id="i", at=1.0, run_id="r", agent_name="a", inputs={"v": value}, metadata={"k": 1})
    )
    assert (start.agent_name, start.run_id) == ("a", "r")


def test_cycles_end() -> None:
    """A cycle becomes a finite line."""
    cycle: dict[str, Any] = {"a": [1]}
    cycle["self"] = cycle
    cycle["a"].append(cycle)
    assert once(step(cycle)).output["self"]["a"][0] == 1


def test_depth_ends() -> None:
    """So does a list in a list, ten thousand times."""
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    once(step(deep))


def test_no_number_is_nothing() -> None:
    """NaN and the infinities are no JSON: null."""
    assert once(step([math.nan, math.inf, 1.5])).output == [None, None, 1.5]
