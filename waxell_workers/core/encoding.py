"""Records to lines and back. Whatever a user hands in becomes a line: whole, reduced or cut, never an error.

User code is never called to make text of an object (`__repr__` may raise, block or take a lock): what JSON
cannot say becomes a placeholder with the object's type.
"""

from __future__ import annotations

from typing import Any, TypeVar, get_args

import msgspec

from .records import Record

MAX_LINE = 256 << 10
"""A longer record is cut, visibly, in bytes."""
_MAX_DEPTH = 12
_MAX_ITEMS = 200
_SHORT = 2_000
_R = TypeVar("_R")


def _placeholder(value: object) -> str:
    kind = type(value)
    return f"<{kind.__module__}.{kind.__qualname__}>"


_encoder = msgspec.json.Encoder(enc_hook=_placeholder)
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def encode(record: Record) -> bytes:
    r"""Return a record's line for the journal: `\n`, JSON, `\n`; at most `MAX_LINE` bytes and a little."""
    try:
        body = _encoder.encode(record)
    except (TypeError, ValueError, OverflowError, RecursionError):
        # lone surrogates, keys that are no strings, cycles
        body = _encoder.encode(_replace_values(record, text=MAX_LINE))
    if len(body) > MAX_LINE:
        body = _encoder.encode(_replace_values(record, text=_SHORT))
    if len(body) > MAX_LINE:
        body = _encoder.encode(_replace_values(record, text=_SHORT, items=0))
    return b"\n" + body + b"\n"


def to_json(record: Record) -> bytes:
    """Return a record that came from the journal as JSON, without newlines."""
    return _encoder.encode(record)


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
        return msgspec.json.decode(_encoder.encode(value))
    except (TypeError, ValueError, OverflowError, RecursionError):
        return reduce(value, text=MAX_LINE)


def _replace_values(record: _R, *, text: int, items: int = _MAX_ITEMS) -> _R:
    values = {name: getattr(record, name) for name in record.__struct_fields__}  # type: ignore[attr-defined]
    plain = {
        # an empty dict stays one: its field's type is dict
        name: ({} if isinstance(value, dict) and not items else reduce(value, text=text, items=items))
        for name, value in values.items()
    }
    return msgspec.structs.replace(record, **plain)  # type: ignore[type-var]


def reduce(value: Any, *, text: int = _SHORT, items: int = _MAX_ITEMS, depth: int = 0) -> Any:
    """Return `value` as plain data that JSON can say, with long texts and collections cut, visibly."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        clean = value[:text].encode("utf-8", "replace").decode()
        return clean if len(value) <= text else f"{clean}… [{len(value) - text} characters cut]"
    if depth >= _MAX_DEPTH:
        return _placeholder(value)
    inner = {"text": text, "items": items, "depth": depth + 1}
    if isinstance(value, dict):
        pairs = list(dict.items(value))
        result = {_key(key, text): reduce(item, **inner) for key, item in pairs[:items]}
        if len(pairs) > items:
            result["…"] = f"{len(pairs) - items} items cut"
        return result
    if isinstance(value, (list, tuple, set, frozenset)):
        sequence = list(value)
        plain = [reduce(item, **inner) for item in sequence[:items]]
        return plain if len(sequence) <= items else [*plain, f"… {len(sequence) - items} items cut"]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    return _placeholder(value)


def _key(key: object, text: int) -> str:
    if isinstance(key, str):
        return str(reduce(key, text=text))
    return str(key) if isinstance(key, (int, float)) or key is None else _placeholder(key)
