"""Records to lines and back. Whatever a user hands in becomes a line: whole, reduced or cut, never an error.

User code is never called, neither to make text of an object (`__repr__` may raise, block or take a lock) nor
to look into one of a class of the user's: what JSON cannot say becomes a placeholder with the object's type.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import math
import re
import types
import uuid
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypeVar, get_args

import msgspec

from .records import Record

MAX_LINE = 256 << 10
"""A longer record is cut, visibly, in bytes."""
SHORT = 2_000
"""How many characters of a text are kept where a record is cut."""
_MAX_DEPTH = 12
_DEEPEST = 64
"""How deep a value may nest that is written as it is: nobody's parser, nor our own stack, minds that."""
_MAX_ITEMS = 200
_MAX_NODES = 50_000
"""How many values of a field are looked at where it must be cut: cycles have no end of them."""
_LARGEST_BITS = 2_048
_NAME = 200
_R = TypeVar("_R")


class _TooLarge(Exception):
    """What was made so far of a record is longer than a line may be: the rest need not be looked at."""


def _placeholder(value: object) -> str:
    return f"<{type_name(type(value))}>"


# The descriptors themselves: a class asked for its attributes may ask a metaclass of the user's.
_module_of = type.__dict__["__module__"].__get__
_qualname_of = type.__dict__["__qualname__"].__get__
_mro_of = type.__dict__["__mro__"].__get__
_dict_of = type.__dict__["__dict__"].__get__


def module_name(kind: type) -> str:
    """Return the module of a class; empty where what stands there is no text."""
    try:
        module = _module_of(kind)
    except AttributeError:
        return ""
    return module if type(module) is str else ""


def type_name(kind: type) -> str:
    """Return the qualified name of a class, without running code of a user's, as text that can be written."""
    name = str.__str__(_qualname_of(kind))
    module = module_name(kind)
    return _clean((f"{module}.{name}" if module else name)[:_NAME])


def _clean(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


_CUT = re.compile(r"… \[(\d{1,18}) characters cut\]\Z")
_LONGEST_CUT = 40


def cut_text(text: str, characters: int) -> str:
    """Return the first characters of a text, saying how many were cut, those of an earlier cut included."""
    if len(text) <= characters:
        return text
    size = len(text)
    earlier = _CUT.search(text[-_LONGEST_CUT:])
    if earlier is not None:
        size += int(earlier[1]) - len(earlier[0])
        text = text[: -len(earlier[0])]
    return f"{text[:characters]}… [{size - characters} characters cut]"


_encode = msgspec.json.Encoder(enc_hook=_placeholder).encode
_UNSAYABLE = (TypeError, ValueError, OverflowError, RecursionError)
"""What encoding raises for lone surrogates, keys that are no texts, cycles."""
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def encode(record: Record) -> bytes:
    r"""Return a record's line for the journal: `\n`, JSON, `\n`; at most `MAX_LINE` bytes and a little."""
    values = msgspec.structs.astuple(record)
    left = _left(values, MAX_LINE, 0)
    body = _encode_as_it_is(record) if left >= 0 else b""
    if not body and left != _LARGE:
        body = _encode_cut(record, MAX_LINE, _MAX_NODES)
    if not body or len(body) > MAX_LINE:
        body = _encode_cut(record, SHORT, _MAX_ITEMS)
    if not body or len(body) > MAX_LINE:
        body = _encode_cut(record, SHORT, 0)
    return b"\n" + body + b"\n"


def _encode_as_it_is(record: Record) -> bytes:
    """Return a record as it is, or nothing if that cannot be said."""
    try:
        return _encode(record)
    except _UNSAYABLE:
        return b""


def _encode_cut(record: Record, text: int, items: int) -> bytes:
    """Return a record with its values cut, or nothing if that is still far too large."""
    cut = _Cut(text, items)
    try:
        return _encode(_replace_values(record, cut))
    except _TooLarge:
        return b""


def to_json(record: Record) -> bytes:
    """Return a record that came from the journal as JSON, without newlines."""
    return _encode(record)


def decode(line: bytes) -> Record:
    """Return the record of a line; a field of another type than it should be is made to fit.

    Raises:
        msgspec.MsgspecError: the line is torn or damaged, or no record that this version knows.
    """
    try:
        try:
            return _decoder.decode(line)
        except msgspec.ValidationError:
            return _fit(msgspec.json.decode(line, type=dict[str, Any]))
    except (UnicodeDecodeError, RecursionError) as error:  # which msgspec lets through
        raise msgspec.DecodeError(str(error)) from None


_KINDS = {kind.__struct_config__.tag: kind for kind in get_args(Record)}


def _fit(values: dict[str, Any]) -> Record:
    """Return a record of plain values that a user handed in without minding types: taken, so it arrives."""
    name = values.get("kind")
    kind = _KINDS.get(name) if type(name) is str else None
    if kind is None:
        raise msgspec.ValidationError("no known kind of record")
    fitting = {}
    for field in msgspec.structs.fields(kind):
        if field.name not in values:
            continue
        value = values[field.name]
        try:
            fitting[field.name] = msgspec.convert(value, field.type, strict=False)
        except msgspec.ValidationError:
            if (fitted := _fitted(value, field.type, field.required)) is not None:
                fitting[field.name] = fitted
    record: Record = msgspec.convert({"kind": kind.__struct_config__.tag, **fitting}, kind)
    return record


def _fitted(value: Any, kind: Any, is_required: bool) -> Any:
    """Return a value as one of a field's type, or None for the field's default."""
    if value is None:
        return {str: "unknown", float: 0.0}.get(kind) if is_required else None
    if kind is str:
        return str(value)
    if kind in (int, int | None) and isinstance(value, float) and math.isfinite(value):
        return round(value)
    if kind is float and is_required:
        return 0.0
    if kind == dict[str, Any]:
        return {"value": value}
    if kind == list[dict[str, Any]]:
        items = value if isinstance(value, list) else [value]
        return [item if isinstance(item, dict) else {"value": item} for item in items]
    return None


def reduce(value: Any) -> Any:
    """Return `value` as plain data that JSON can say, with long texts and collections cut, visibly."""
    try:
        return _Cut(SHORT, _MAX_ITEMS).reduce(value)
    except _TooLarge:
        return _Cut(SHORT, 0).reduce(value)


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return `value` as plain data, with each text in it, keys too, as `change` returns it."""
    for text, items, depth in ((MAX_LINE, _MAX_NODES, _DEEPEST), (SHORT, _MAX_ITEMS, _MAX_DEPTH)):
        try:
            return _Cut(text, items, depth, change).reduce(value)
        except _TooLarge:
            continue
    return _Cut(SHORT, 0, _MAX_DEPTH, change).reduce(value)


def to_values(record: Record) -> tuple[dict[str, Any], bool]:
    """Return all fields of a record and its `kind` as plain data, a copy; texts are whole.

    Where there is far too much for a record, whole items are left out.

    Returns:
        The values, and True if one is a text that had to be cut all the same: no line can hold it.
    """
    values = {"kind": record.__struct_config__.tag, **msgspec.structs.asdict(record)}
    if _left(values.values(), MAX_LINE, 0, bytes_as_text=False) >= 0:  # in which nobody would find a secret
        try:
            return msgspec.json.decode(_encode(values)), False
        except (*_UNSAYABLE, msgspec.DecodeError):
            pass
    found = {name: _plain(value) for name, value in values.items()}
    return {name: value for name, (value, _) in found.items()}, any(was_cut for _, was_cut in found.values())


def from_values(values: dict[str, Any], *, cut: bool = False) -> Record:
    """Return a record of values of any kind; what is of another type than its field is made to fit.

    Args:
        values: by the names of the fields, with the `kind`.
        cut: cut each text as where a record is too long.

    Raises:
        msgspec.ValidationError: what a record is known by is missing.
    """
    if not cut and _left(values.values(), MAX_LINE, 0, bytes_as_text=False) >= 0:
        try:
            return decode(_encode(values))
        except _UNSAYABLE:
            pass
    return _fit({name: reduce(value) if cut else _plain(value)[0] for name, value in values.items()})


def _plain(value: Any) -> tuple[Any, bool]:
    for items, depth, counted in ((_MAX_NODES, _DEEPEST, MAX_LINE), (_MAX_ITEMS, _MAX_DEPTH, SHORT)):
        cut = _Cut(MAX_LINE, items, depth, _unchanged, counted)
        try:
            return cut.reduce(value), cut.has_cut
        except _TooLarge:
            continue
    return _Cut(SHORT, 0, _MAX_DEPTH, _unchanged).reduce(value), True


def _unchanged(text: str) -> str:
    return text


def key_text(key: object) -> str:
    """Return a key of any kind as text."""
    return key if type(key) is str else _Cut(SHORT, 0).key(key)


# -- values of any kind ------------------------------------------------------------------------

_NUMBERS = (type(None), bool, int, float)
_TIMES = (datetime.date, datetime.timedelta, decimal.Decimal, uuid.UUID)
_BYTES = (bytes, bytearray)
_SEQUENCES = (list, tuple, set, frozenset)
_ZONES = ("datetime", "zoneinfo", "pytz", "dateutil")
"""Packages whose time zones may be asked for an offset."""

# Types that are encoded by their C code alone; not so their subclasses, which a user may have written. By
# their ids: a type that is looked up in a set is asked for its hash, which a metaclass may answer.
_FIXED = frozenset(map(id, (*_NUMBERS, *_TIMES)))
_MEASURED = frozenset(map(id, _BYTES))
_COLLECTIONS = frozenset(map(id, _SEQUENCES))

_LARGE, _UNPLAIN = -1, -2


def _left(values: Iterable[Any], left: int, depth: int, bytes_as_text: bool = True) -> int:
    """Return how many bytes of a line are left, at most, once these values are in it.

    `_LARGE` if there are none; `_UNPLAIN` if code of a user's would run when a value is encoded as it is, if
    it nests too deeply, or has bytes that must not become text.
    """
    for value in values:
        kind = type(value)
        if kind is str:
            left -= len(value)
        elif id(kind) in _FIXED:
            left -= 1
        elif kind is dict or id(kind) in _COLLECTIONS:
            if value:
                left = _left_inside(value, left, depth, bytes_as_text)
                if left < 0:
                    return left
        elif id(kind) in _MEASURED:
            if not bytes_as_text:
                return _UNPLAIN
            left -= len(value)
        elif not _is_plain_time(value):
            return _UNPLAIN
        if left < 0:
            return _LARGE
    return left


def _left_inside(collection: Any, left: int, depth: int, bytes_as_text: bool) -> int:
    if depth >= _DEEPEST:
        return _UNPLAIN
    if len(collection) > left:  # before it is copied
        return _LARGE
    # Of copies, since another thread may change it meanwhile.
    left = _left(tuple(collection), left - len(collection), depth + 1, bytes_as_text)
    if left >= 0 and type(collection) is dict:
        left = _left(tuple(collection.values()), left, depth + 1, bytes_as_text)
    return left


def _is_plain_time(value: Any) -> bool:
    kind = type(value)
    if kind is not datetime.datetime and kind is not datetime.time:
        return False
    zone = value.tzinfo
    return zone is None or module_name(type(zone)).partition(".")[0] in _ZONES


def _replace_values(record: _R, cut: _Cut) -> _R:
    values = {name: getattr(record, name) for name in record.__struct_fields__}  # type: ignore[attr-defined]
    return msgspec.structs.replace(record, **cut.fields(values))  # type: ignore[type-var]


class _Cut:
    """Makes plain data, which JSON can say, of anything, with long texts and collections cut, visibly.

    Classes are told by `type`, not by `isinstance`, which asks the object; and what a subclass of the user's
    holds is read by the methods of the built-in class.
    """

    def __init__(
        self,
        text: int,
        items: int,
        depth: int = _MAX_DEPTH,
        change: Callable[[str], str] | None = None,
        counted: int = MAX_LINE,
    ) -> None:
        """Prepare for one record, or one value.

        Args:
            text: how many characters of a text are kept.
            items: how many items of a collection are kept.
            depth: how deep collections may nest.
            change: what is done to each text before it is cut.
            counted: how many characters of a text count, at most, for what fits into a line.
        """
        self.has_cut = False
        """True once a text was cut."""
        self._items = items
        self._text = text
        self._counted = min(text, counted)
        self._depth = depth
        self._change = change
        self._nodes = _MAX_NODES
        self._room = 2 * MAX_LINE

    def fields(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return a record's values as plain data.

        Raises:
            _TooLarge: they do not fit into a line, even so.
        """
        found = {}
        for name, value in values.items():
            self._nodes = _MAX_NODES
            # an empty dict stays one: its field's type is dict
            is_empty = not self._items and issubclass(type(value), dict)
            found[name] = {} if is_empty else self.reduce(value)
        return found

    def reduce(self, value: Any, depth: int = 0) -> Any:
        """Return `value` as plain data; depth is how deep inside the record's field it stands.

        Raises:
            _TooLarge: it does not fit into a line, even so.
        """
        kind = type(value)
        self._nodes -= 1
        if self._nodes < 0:
            return "…"
        if value is None or kind is bool or kind is float:
            return value
        if issubclass(kind, enum.Enum):
            return self._member(value, depth)
        if issubclass(kind, str):
            return self._shorten(str.__str__(value))
        if issubclass(kind, int):
            return _number(int.__int__(value))
        if issubclass(kind, float):
            return float.__float__(value)
        if issubclass(kind, _BYTES):
            return f"<{(bytes if issubclass(kind, bytes) else bytearray).__len__(value)} bytes>"
        if id(kind) in _FIXED or _is_plain_time(value):
            return value if self._change is None else self._shorten(str(msgspec.to_builtins(value)))
        return self._collection(value, kind, depth)

    def key(self, key: object) -> str:
        """Return a key as text."""
        return str(self.reduce(key, self._depth))

    def _member(self, value: enum.Enum, depth: int) -> Any:
        try:
            return self.reduce(object.__getattribute__(value, "_value_"), depth)
        except AttributeError:
            return _placeholder(value)

    def _collection(self, value: Any, kind: type, depth: int) -> Any:
        if depth >= self._depth:
            return _placeholder(value)
        if issubclass(kind, dict):
            return self._dict(value, depth)
        for sequence in _SEQUENCES:
            if issubclass(kind, sequence):
                items = list(islice(sequence.__iter__(value), self._items))
                return self._list(items, sequence.__len__(value), depth)
        fields = _fields(value)
        return self._dict(fields, depth) if fields is not None else _placeholder(value)

    def _dict(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        pairs = list(islice(dict.items(value), self._items))
        result = {self.key(key): self.reduce(item, depth + 1) for key, item in pairs}
        if (size := dict.__len__(value)) > len(pairs):
            result["…"] = f"{size - len(pairs)} items cut"
        return result

    def _list(self, items: list[Any], size: int, depth: int) -> list[Any]:
        plain = [self.reduce(item, depth + 1) for item in items]
        return plain if size <= len(items) else [*plain, f"… {size - len(items)} items cut"]

    def _shorten(self, text: str) -> str:
        if self._change is not None:
            text = self._change(text)
        self._room -= min(len(text), self._counted)
        if self._room < 0:
            raise _TooLarge
        if len(text) <= self._text:
            return _clean(text)
        self.has_cut = True
        return _clean(cut_text(text, self._text))


def _number(value: int) -> int | str:
    # Python writes no integer of more digits than this, and raises instead.
    return value if value.bit_length() < _LARGEST_BITS else f"<int of {value.bit_length()} bits>"


def _fields(value: object) -> dict[str, Any] | None:
    """Return the values of a dataclass, if it keeps them in a `__dict__`."""
    if _attribute(type(value), "__dataclass_fields__") is None:
        return None
    own = _attribute(type(value), "__dict__")
    if type(own) is not types.GetSetDescriptorType:  # slots, or something of the user's
        return None
    found = own.__get__(value)
    return found if type(found) is dict else None


def _attribute(kind: type, name: str) -> object:
    """Return what stands in a class under a name, or None, without asking it."""
    for base in _mro_of(kind):
        if name in (own := _dict_of(base)):
            return own[name]
    return None
