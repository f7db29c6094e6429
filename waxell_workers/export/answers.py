"""What an answer of a server means, decided in one place.

Every request ends in an `Answer`: a verdict, and a reason for the log that consists of the endpoint's name
and a status code or an exception's class. A response's text is never quoted: it may echo prompts or keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any

RETRY_AFTER_MAX_S = 3600.0
"""A server that asks for more patience than an hour is asked again after an hour."""

_RETRIED = frozenset({408, 425, 429})
_REFUSED = frozenset({400, 409, 413, 422})
_MISSING = frozenset({404, 410})
_OVERLOADED = frozenset({429, 502, 503, 504})


class Verdict(Enum):
    """What has to happen next."""

    OK = "acknowledged"
    RETRY = "to be tried again"
    PAUSE = "the destination refuses us"
    REFUSED = "something in the body will never be taken"
    MISSING = "nothing is found under this address"
    LATE = "not sent: no time left, or another request has shown that there is no point"


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of one request."""

    verdict: Verdict
    reason: str = ""
    status: int = 0
    """HTTP status; 0 if there was none."""
    body: dict[str, Any] | None = None
    """The JSON object of the reply, `{}` for an empty one; None if there was none, or something else."""
    retry_after_s: float | None = None
    down: bool = False
    """True if the server cannot be reached or sends everybody away: others need not be tried."""


LATE = Answer(Verdict.LATE)


def verdict_of(status: int) -> Verdict:
    """Classify an HTTP status code.

    Codes that blame the body (400, 409, 413, 422) lead to a bisected batch. Every 4xx that is not known to be
    temporary or to concern the body is taken as a refusal of us as a whole: then nothing is thrown away.
    """
    if 200 <= status < 300:
        return Verdict.OK
    if status >= 500 or status in _RETRIED:
        return Verdict.RETRY
    if status in _MISSING:
        return Verdict.MISSING
    if status in _REFUSED:
        return Verdict.REFUSED
    return Verdict.PAUSE


def is_overload(status: int) -> bool:
    """True for the codes by which a server, or the proxy before it, sends everybody away."""
    return status in _OVERLOADED


def retry_after_s(value: str | None, now: datetime | None = None) -> float | None:
    """Read a `Retry-After` header (RFC 9110, 10.2.3): seconds, or an HTTP date.

    Returns:
        Seconds from now, between 0 and an hour; None if there is no such header or it cannot be read.
    """
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except (TypeError, ValueError):
            return None
        if when.tzinfo is None:
            when = when.replace(tzinfo=timezone.utc)
        seconds = (when - (now or datetime.now(timezone.utc))).total_seconds()
    if math.isnan(seconds):
        return None
    return min(max(seconds, 0.0), RETRY_AFTER_MAX_S)
