"""Make what a client sent fit the database: never raise, never trust a type, a size or a sign.

The REST protocol has no schema that a server could hold a client to, so a wrong value becomes an empty one
here; ingest records have been checked before, and only their numbers need bounds.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

_MAX_INT = 2**53
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,199}")
_STATE = re.compile(r"[a-z][a-z_]{0,31}")


def text(value: object) -> str:
    """Return a string as it is, None as the empty string, anything else as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else dumps(value)


def integer(value: object) -> int:
    """Return a whole number from 0 to 2**53; 0 for what is no number."""
    found = number(value)
    return 0 if found is None else int(min(max(found, 0), _MAX_INT))


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
    """Return a finite number that is not below 0, or None: a duration, a cost."""
    found = number(value)
    return None if found is None or found < 0 else found


def moment(value: object, latest: float) -> float | None:
    """Return Unix seconds above 0 and not after `latest`, or None: milliseconds are not seconds."""
    found = number(value)
    return found if found is not None and 0 < found <= latest else None


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
