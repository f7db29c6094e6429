"""Make what a client sent fit the database: never raise, never trust a type, a size or a sign.

The REST protocol has no schema that a server could hold a client to, so a wrong value becomes an empty one
here; ingest records have been checked before, and only their sizes need bounds.
"""

from __future__ import annotations

import math
import re
from datetime import datetime, timezone
from typing import Any

import msgspec

MAX_INT = 2**53
LONGEST_NAME = 1000
"""Characters of what stands in lists and choices: names, ids, states."""
LONGEST_LINE = 32_768
"""Characters of an error."""
LARGEST_MAPPING = 65_536
"""Bytes of a run's metadata or tags: a list of runs reads them for each."""
MAX_DEPTH = 100
"""How deep lists and objects may be nested: beyond, what was stored could not be written out again."""

_LARGEST_AMOUNT = 1e12
"""Above any duration in milliseconds and any cost; a sum of many is still a number."""
_LEFT_OUT = "not kept here"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,199}")
_SPAN = re.compile(r"([0-9]{1,9})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_STATE = re.compile(r"[a-z][a-z_]{0,31}")


def text(value: object) -> str:
    """Return a string as it is, None as the empty string, anything else as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else dumps(value)


def words(value: object) -> str:
    """Return a name, an id, a state as text, no longer than one should be."""
    return cut(text(value))


def integer(value: object) -> int:
    """Return a whole number from 0 to 2**53; 0 for what is no number."""
    found = number(value)
    return 0 if found is None else int(min(max(found, 0), MAX_INT))


def tokens(value: object) -> int | None:
    """Return a count from 0 to 2**53; None for what is no such number: it is not known."""
    found = number(value)
    return None if found is None or found < 0 else int(min(found, MAX_INT))


def number(value: object) -> float | None:
    """Return a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def amount(value: object) -> float | None:
    """Return a number from 0 to 1e12, or None: a duration, a cost."""
    found = number(value)
    return None if found is None or not 0 <= found <= _LARGEST_AMOUNT else found


def moment(value: object, latest: float) -> float | None:
    """Return Unix seconds above 0 and not after `latest`, or None: milliseconds are not seconds."""
    found = number(value)
    return found if found is not None and 0 < found <= latest else None


def instant(text: str) -> float | None:
    """Return Unix seconds of an ISO 8601 time, in UTC if it names no offset; None if it is none."""
    try:
        # Python 3.10 reads no `Z`
        found = datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text)
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()


def since(text: str, now: float) -> float:
    """Return Unix seconds of the beginning of a time that ends now.

    Args:
        text: an ISO 8601 time, or a span of seconds, minutes, hours, days or weeks, such as `24h`; empty
            for all.
        now: Unix seconds.

    Raises:
        ValueError: it is neither.
    """
    if not text:
        return 0.0
    if span := _SPAN.fullmatch(text):
        return now - int(span[1]) * _SECONDS[span[2]]
    found = instant(text)
    if found is None:
        raise ValueError("since: expected an ISO 8601 time, or a span such as 30m, 24h or 7d")
    return found


def cut(value: str, length: int = LONGEST_NAME) -> str:
    """Return a text, cut at `length` characters, visibly."""
    return value if len(value) <= length else f"{value[: length - 1]}…"


def small(value: dict[str, Any]) -> str:
    """Write a run's metadata or tags as JSON; what is beyond `LARGEST_MAPPING` is left out, visibly."""
    whole = dumps(value)
    if len(whole) <= LARGEST_MAPPING:
        return whole
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    room = LARGEST_MAPPING - 2 * LONGEST_NAME
    for name, item in value.items():
        size = len(dumps({name: item}))
        if size > room:
            left_out.append(name)
        else:
            kept[name] = item
            room -= size
    return dumps(kept | {_LEFT_OUT: cut(f"{len(left_out)} too large: {', '.join(left_out[:20])}")})


def too_deep(value: object) -> bool:
    """Tell whether lists and objects are nested deeper than `MAX_DEPTH`."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner.extend(item for item in each.values() if isinstance(item, (dict, list)))
            elif isinstance(each, list):
                inner.extend(item for item in each if isinstance(item, (dict, list)))
        if not inner:
            return False
        level = inner
    return True


def mapping(value: object) -> dict[str, Any]:
    """Return a dictionary as it is, anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: object) -> list[Any]:
    """Return a list as it is, anything else as an empty one."""
    return value if isinstance(value, list) else []


def error_line(error_type: object, message: object) -> str:
    """Write `Type: message`, or the one of them that there is."""
    parts = dict.fromkeys([text(error_type), text(message)])  # a client without a message repeats the type
    return ": ".join(part for part in parts if part)


def is_run_id(value: object) -> bool:
    """Tell whether this can be the id of a run: it stands in addresses."""
    return isinstance(value, str) and _RUN_ID.fullmatch(value) is not None


def is_end_state(value: object) -> bool:
    """Tell whether a run can end so: any word but `running`, since a newer client may know more states."""
    return isinstance(value, str) and value != "running" and _STATE.fullmatch(value) is not None


def dumps(value: object) -> str:
    """Write JSON text."""
    return msgspec.json.encode(value).decode()


def loads(value: str) -> Any:
    """Read JSON text that `dumps` wrote."""
    return msgspec.json.decode(value)
