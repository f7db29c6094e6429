"""Records to lines and back. Whatever a user hands in becomes a line: whole, reduced or cut, never an error.

User code is never called, neither to make text of an object (`__repr__` may raise, block or take a lock) nor
to look into one of a class of the user's: what JSON cannot say becomes a placeholder with the object's type.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import uuid
from typing import Any, TypeVar, get_args

import msgspec

from .records import Record

MAX_LINE = 256 << 10
"""A longer record is cut, visibly, in bytes."""
_MAX_DEPTH = 12
_MAX_ITEMS = 200
_MAX_NODES = 50_000
"""How many values of a field are looked at where it must be cut: cycles have no end of them."""
_LARGEST_BITS = 2_048
_SHORT = 2_000
_R = TypeVar("_R")


def _placeholder(value: object) -> str:
    return f"<{_name(type(value))}>"


def _name(kind: type) -> str:
    # Not `kind.__module__`, which a metaclass may make anything of; and what stands there need be no text.
    module = type.__getattribute__(kind, "__module__")
    name = type.__getattribute__(kind, "__qualname__")
    return f"{module}.{name}" if type(module) is str else name


_encode = msgspec.json.Encoder(enc_hook=_placeholder).encode
_UNSAYABLE = (TypeError, ValueError, OverflowError, RecursionError)
"""What encoding raises for lone surrogates, keys that are no texts, cycles."""
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def encode(record: Record) -> bytes:
    r"""Return a record's line for the journal: `\n`, JSON, `\n`; at most `MAX_LINE` bytes and a little."""
    body = _encode_whole(record) or _encode(_replace_values(record, MAX_LINE, MAX_LINE))
    if len(body) > MAX_LINE:
        body = _encode(_replace_values(record, _SHORT, _MAX_ITEMS))
    if len(body) > MAX_LINE:
        body = _encode(_replace_values(record, _SHORT, 0))
    return b"\n" + body + b"\n"


def _encode_whole(record: Record) -> bytes:
    """Return a record as it is, or nothing if that cannot be said, or not without code of a user's."""
    try:
        plain = _are_plain(msgspec.structs.astuple(record))
    except RecursionError:
        return b""
    try:
        return _encode(record) if plain else b""
    except _UNSAYABLE:
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
    """Return a record of values that a user handed in without minding types: it was taken, so it arrives."""
    kind = _KINDS.get(values.pop("kind", None))
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
            if field.type is str and value is not None:
                fitting[field.name] = str(value)
            elif field.type is str and field.required:
                fitting[field.name] = "unknown"
            elif field.type is int and isinstance(value, float):
                fitting[field.name] = round(value)
            elif field.type == dict[str, Any] and value is not None:
                fitting[field.name] = {"value": value}
    record: Record = msgspec.convert({"kind": kind.__struct_config__.tag, **fitting}, kind)
    return record


def plain(value: Any) -> Any:
    """Return `value` as JSON would have it: None, bool, int, float, str, list and dict with text keys."""
    try:
        if _is_plain(value):
            return msgspec.json.decode(_encode(value))
    except _UNSAYABLE:
        pass
    return msgspec.json.decode(_encode(_Cut(MAX_LINE, MAX_LINE).reduce(value)))


def reduce(value: Any) -> Any:
    """Return `value` as plain data that JSON can say, with long texts and collections cut, visibly."""
    return _Cut(_SHORT, _MAX_ITEMS).reduce(value)


# -- values of any kind ------------------------------------------------------------------------

_ATOMS = frozenset({type(None), bool, int, float})
_LEAVES = _ATOMS | {str, bytes, bytearray, datetime.date, datetime.timedelta, decimal.Decimal, uuid.UUID}
"""Types that are encoded by their C code alone; not so their subclasses, which a user may have written."""
_SEQUENCES = (list, tuple, set, frozenset)
_BYTES = (bytes, bytearray)
_ZONES = ("datetime", "zoneinfo", "pytz", "dateutil")
"""Packages whose time zones may be asked for an offset."""


def _is_plain(value: Any) -> bool:
    """True if no code of a user's runs when this is encoded as it is."""
    kind = type(value)
    if kind in _LEAVES:
        return True
    if kind is dict:
        return not value or (_are_plain(tuple(value)) and _are_plain(tuple(value.values())))
    if kind in _SEQUENCES:
        return _are_plain(tuple(value))
    return _is_plain_time(value)


def _are_plain(values: tuple[object, ...]) -> bool:
    """The same of each of them; of copies, since another thread may change a collection meanwhile."""
    return all(map(_is_plain, [value for value in values if type(value) not in _LEAVES]))


def _is_plain_time(value: Any) -> bool:
    if type(value) not in (datetime.datetime, datetime.time):
        return False
    zone = value.tzinfo
    return zone is None or _name(type(zone)).partition(".")[0] in _ZONES


def _replace_values(record: _R, text: int, items: int) -> _R:
    values = {name: getattr(record, name) for name in record.__struct_fields__}  # type: ignore[attr-defined]
    plain = {
        # an empty dict stays one: its field's type is dict
        name: {} if not items and issubclass(type(value), dict) else _Cut(text, items).reduce(value)
        for name, value in values.items()
    }
    return msgspec.structs.replace(record, **plain)  # type: ignore[type-var]


class _Cut:
    """Makes plain data, which JSON can say, of anything, with long texts and collections cut, visibly.

    Classes are told by `type`, not by `isinstance`, which asks the object; and what a subclass of the user's
    holds is read by the methods of the built-in class.
    """

    def __init__(self, text: int, items: int) -> None:
        """Prepare for one field of a record.

        Args:
            text: how many characters of a text are kept.
            items: how many items of a collection are kept.
        """
        self._items = items
        self._text = text
        self._left = _MAX_NODES

    def reduce(self, value: Any, depth: int = 0) -> Any:
        """Return `value` as plain data; depth is how deep inside the record's field it stands."""
        kind = type(value)
        self._left -= 1
        if self._left < 0:
            return "…"
        if kind in _ATOMS and kind is not int:
            return value
        if issubclass(kind, enum.Enum):
            return self.reduce(object.__getattribute__(value, "_value_"), depth)
        if issubclass(kind, str):
            return self._shorten(str.__str__(value))
        if issubclass(kind, int):
            return _number(int.__int__(value))
        if issubclass(kind, float):
            return float.__float__(value)
        if issubclass(kind, _BYTES):
            return f"<{(bytes if issubclass(kind, bytes) else bytearray).__len__(value)} bytes>"
        if kind in _LEAVES or _is_plain_time(value):
            return value
        return self._collection(value, kind, depth)

    def _collection(self, value: Any, kind: type, depth: int) -> Any:
        if depth >= _MAX_DEPTH:
            return _placeholder(value)
        if issubclass(kind, dict):
            return self._dict(value, depth)
        for sequence in _SEQUENCES:
            if issubclass(kind, sequence):
                return self._list(list(sequence.__iter__(value)), depth)
        fields = _fields(value)
        return self._dict(fields, depth) if fields is not None else _placeholder(value)

    def _dict(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        pairs = list(dict.items(value))
        result = {self._key(key): self.reduce(item, depth + 1) for key, item in pairs[: self._items]}
        if len(pairs) > self._items:
            result["…"] = f"{len(pairs) - self._items} items cut"
        return result

    def _list(self, values: list[Any], depth: int) -> list[Any]:
        plain = [self.reduce(item, depth + 1) for item in values[: self._items]]
        return plain if len(values) <= self._items else [*plain, f"… {len(values) - self._items} items cut"]

    def _key(self, key: object) -> str:
        return str(self.reduce(key, _MAX_DEPTH))

    def _shorten(self, text: str) -> str:
        clean = text[: self._text].encode("utf-8", "replace").decode()
        return clean if len(text) <= self._text else f"{clean}… [{len(text) - self._text} characters cut]"


def _number(value: int) -> int | str:
    # Python writes no integer of more digits than this, and raises instead.
    return value if value.bit_length() < _LARGEST_BITS else f"<int of {value.bit_length()} bits>"


def _fields(value: object) -> dict[str, Any] | None:
    """Return the values of a dataclass, if it keeps them in a `__dict__`."""
    try:
        type.__getattribute__(type(value), "__dataclass_fields__")
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if type(found) is dict else None
