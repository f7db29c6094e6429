"""What travels from run to run of tags and metadata: plain, and bounded.

Every message pays for it, and every line that says that a run has begun; so both take what this returns.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import islice
from typing import Any

import msgspec

from .encoding import key_text, reduce

logger = logging.getLogger("waxell_workers")

TRAVELS = 4096
"""How many bytes of tags, and of metadata, travel: brokers have limits, and every hop pays."""
MOST = 500
"""How many of each are looked at: a run that lives for days may have been given any number."""

_LONGEST_KEY = 255
_INTEGERS = 1 << 63
_said: list[bool] = []


def travelling(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return tags or metadata as what every broker takes, as far as there is room."""
    kept: dict[str, Any] = {}
    if not values:
        return kept
    left = TRAVELS
    for key, value in islice(list(values.items()), MOST):  # of a copy: another thread may change it meanwhile
        # There and back: times and decimals become texts, which is all that most serializers know.
        written = msgspec.json.encode({reduce(key_text(key)): reduce(value)})
        plain = msgspec.json.decode(written)
        if len(written) <= left and _is_portable(plain):
            kept |= plain
            left -= len(written)
        else:
            _say()
    if len(values) > MOST:
        _say()
    return kept


def with_one(values: dict[str, Any] | None, name: str, value: Any) -> dict[str, Any]:
    """Return tags or metadata with one more; the same if there are so many that it would never travel."""
    if values is None:
        return {name: value}
    return {**values, name: value} if len(values) < MOST or name in values else values


def is_portable_integer(value: int) -> bool:
    """True if AMQP's tables and msgpack can say it: 64 bits."""
    return -_INTEGERS <= value < _INTEGERS


def _say() -> None:
    if not _said:
        _said.append(True)
        logger.warning("tags or metadata beyond %d bytes, or %d names, do not travel", TRAVELS, MOST)


def _is_portable(plain: Any) -> bool:
    """True if AMQP's tables and msgpack can say it: keys of less than 256 bytes, integers of 64 bits."""
    if type(plain) is dict:
        return all(len(key.encode()) <= _LONGEST_KEY and _is_portable(plain[key]) for key in plain)
    if type(plain) is list:
        return all(map(_is_portable, plain))
    return type(plain) is not int or is_portable_integer(plain)
