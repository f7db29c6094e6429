"""Whatever is handed in becomes one line that can be read again: whole, reduced or cut, never an error."""

from __future__ import annotations

import datetime
import enum
import json
import math
import random
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waxell_workers.core.encoding import MAX_LINE, decode, encode
from waxell_workers.core.records import LLMCall, RunStarted, Step
from waxell_workers.core.redaction import redacted


class Mute:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


def _raise(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("the user's code was run")


_METHODS = (
    *("__iter__", "__len__", "__getitem__", "__contains__", "items", "keys", "values", "__next__", "copy"),
    *("__str__", "__repr__", "__format__", "__int__", "__index__", "__float__", "__trunc__", "__bool__"),
    *("encode", "hex", "isoformat", "__bytes__", "__lt__", "__le__", "__gt__", "__ge__", "__class__"),
)


def lazy(base: type) -> type:
    """Make a subclass that has a mind of its own: whatever it is asked, it raises."""
    methods: dict[str, Any] = {name: _raise for name in _METHODS if hasattr(base, name)}
    return type(f"Lazy{base.__name__}", (base,), methods | {"__class__": property(_raise)})


Text, Number, Real, Bytes, Items, Fixed, Mapping, Bag, FixedBag = map(
    lazy, (str, int, float, bytes, list, tuple, dict, set, frozenset)
)


class Zone(datetime.tzinfo):
    utcoffset = dst = tzname = _raise


class Color(enum.Enum):
    RED = "red"

    def __getattribute__(self, name: str) -> Any:
        return _raise() if name in ("value", "name") else super().__getattribute__(name)


@dataclass
class Row:
    cells: Any

    def __getattribute__(self, name: str) -> Any:
        _raise()


class Secretive:
    def __getattribute__(self, name: str) -> Any:
        _raise()


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


def lazily(value: Any, chance: random.Random) -> Any:
    """Return `value` with some of its parts as objects of the user's classes.

    Made inside the test: Hypothesis would ask them what it has drawn.
    """
    if type(value) is dict:
        pairs = {_LAZY.get(type(key), _same)(key): lazily(item, chance) for key, item in value.items()}
        return chance.choice((dict, Mapping))(pairs)
    if type(value) in (list, tuple):
        return chance.choice((Items, Fixed, list, Row))([lazily(item, chance) for item in value])
    if type(value) is frozenset:
        return chance.choice((Bag, FixedBag, set))(value)
    if type(value) in _LAZY:
        return chance.choice((_LAZY[type(value)], type(value)))(value)
    return chance.choice(
        (value, value, Secretive(), Color.RED, datetime.datetime(2024, 2, 29, tzinfo=Zone()))
    )


_LAZY = {str: Text, int: Number, float: Real, bytes: Bytes}


def _same(value: Any) -> Any:
    return value


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


@given(_values, st.randoms(use_true_random=False))
def test_anything_becomes_a_line_and_can_be_read_again(value: Any, chance: random.Random) -> None:
    """Bytes, NaN, lone surrogates, keys of any type, objects without a text: one line, one record; and no
    class of the user's is asked anything."""
    for output in (value, lazily(value, chance)):
        record = once(step(output))
        assert (record.id, record.run_id, record.name) == ("i", "r", "n")


@given(_values, st.randoms(use_true_random=False))
def test_anything_is_plain_data_to_a_redactor(value: Any, chance: random.Random) -> None:
    """It is what JSON can say, no class of the user's is asked anything, and what it returns is written."""
    seen: list[dict[str, Any]] = []

    def note(record: dict[str, Any]) -> dict[str, Any]:
        seen.append(record)
        return record | {"name": "redacted"}

    for output in (value, lazily(value, chance)):
        record = once(redacted(note, step(output)))
        assert (record.id, record.run_id, record.name) == ("i", "r", "redacted")
        text = json.dumps(seen[-1])
        assert json.loads(text) == seen[-1] or "NaN" in text
        record = once(redacted(lambda values, output=output: values | {"output": output}, step(None)))
        assert (record.id, record.run_id, record.name) == ("i", "r", "n")


@given(_values, st.randoms(use_true_random=False))
def test_anything_can_be_cut(value: Any, chance: random.Random) -> None:
    """The same beside a text that is too long, for which everything is looked at."""
    record = once(step({"value": lazily(value, chance), "page": "x" * MAX_LINE}))
    assert "characters cut" in record.output["page"]


@pytest.mark.parametrize("beside", ["", "\ud800", "x" * 300_000], ids=["alone", "surrogate", "too long"])
def test_what_the_user_s_classes_hold_is_kept(beside: str) -> None:
    """A list, a text, an enum, a dataclass of the user's: what they hold, not what they say."""
    values = [
        *(Items([1]), Fixed([2]), Mapping(a=3), Bag([4]), FixedBag([5])),
        *(Text("six"), Number(7), Real(8.5), Color.RED, Row([9])),
    ]
    kept = [[1], [2], {"a": 3}, [4], [5], "six", 7, 8.5, "red", {"cells": [9]}]
    assert once(step([values, beside])).output[0] == kept


@pytest.mark.parametrize("beside", ["", "x" * 300_000], ids=["alone", "too long"])
def test_times_and_numbers_of_the_standard_library_are_texts(beside: str) -> None:
    """What has one text and no code of a user's keeps it."""
    values = [
        *(datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 1, tzinfo=datetime.timezone.utc)),
        *(datetime.datetime(2024, 7, 1, tzinfo=ZoneInfo("UTC")), Decimal("1.50"), UUID(int=5)),
    ]
    kept = ["2024-02-29", "2024-02-29T01:00:00Z", "2024-07-01T00:00:00Z", "1.50", str(UUID(int=5))]
    assert once(step([values, beside])).output[0] == kept


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


def test_a_thicket_of_cycles_ends() -> None:
    """Children that know their parent, and parents that know each child: a bound on what is looked at."""
    parent: dict[str, Any] = {}
    parent["children"] = [{"parent": parent} for _ in range(100)]
    once(step(parent))


def test_depth_ends() -> None:
    """So does a list in a list, ten thousand times."""
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    once(step(deep))


def test_a_number_without_end_is_no_text() -> None:
    """Python makes no text of an integer with so many digits."""
    assert once(step([10**5_000])).output == ["<int of 16610 bits>"]


def test_no_number_is_nothing() -> None:
    """NaN and the infinities are no JSON: null."""
    assert once(step([math.nan, math.inf, 1.5])).output == [None, None, 1.5]
