"""Lineage: what a message carries, so that its run knows by which other it was enqueued, and for whom.

Our own header, `waxell`, is a dict of plain values; W3C `traceparent` and `tracestate` stand beside it, for
everybody else. Both may be missing, cut, or somebody else's: each part that is not what it should be is left
out by itself, and nothing here raises. The user's own headers are never touched.

    enqueued_at  Unix seconds, on the clock of whoever has enqueued
    run, root    the enqueuing run, and the first run of all
    trace        the trace id of both, 32 hexadecimal digits
    session, user, user_group, tags, metadata      what is known of whom it is for, and travels on
    previous     in a message that is sent again: the run of the attempt before
    own_root, own_trace      likewise, where they are not those of the enqueuing run
    mode         `link` or `none`, if the sender wants no child
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import msgspec

from . import w3c
from .collector import configured, is_off
from .encoding import reduce
from .runs import Run, get_context
from .travelling import is_portable_integer, travelling
from .values import PROPAGATION

HEADER = "waxell"
"""The name under which lineage travels in a message: Celery headers, RQ's `job.meta`, Dramatiq's options."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,199}")
_LONGEST = 1000
_FOR_EVER = 1e11
"""No Unix time in seconds that anybody means."""

origin: ContextVar[Callable[[], Run | None] | None] = ContextVar("waxell_origin", default=None)
"""Makes the run that enqueues where none is current: an adapter sets it for a web request."""


class Carried(msgspec.Struct, frozen=True):
    """What a message has carried, as far as it can be believed; empty what it has not."""

    enqueued_at: float | None = None
    run_id: str = ""
    root_run_id: str = ""
    trace_id: str = ""
    previous_run_id: str = ""
    own_root_run_id: str = ""
    own_trace_id: str = ""
    mode: str = "parent"
    session_id: str = ""
    user_id: str = ""
    user_group: str = ""
    tags: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    trace: w3c.Trace | None = None
    """The place in a trace that `traceparent` tells."""


def outgoing(message: Mapping[str, Any], *, again: bool = False) -> dict[str, Any]:
    """Return what a message that is being enqueued is to carry more than it does.

    Args:
        message: what it carries already: the user's headers, and ours if it was sent before.
        again: True if the current run sends its own message once more: a retry. It keeps its parent.
    """
    if is_off():
        return {}
    before = _plain(message.get(HEADER))
    run = get_context()
    now = time.time()
    if again and run is not None:
        return {HEADER: _sent_again(before, run) | {"enqueued_at": now}} | _trace_of(run, message)
    mode = _mode()
    own: dict[str, Any] = {"enqueued_at": now} if mode == "parent" else {"enqueued_at": now, "mode": mode}
    if mode == "none":
        return {HEADER: own}
    if run is None and not before:
        make = origin.get()
        run = None if make is None else make()
    if run is None:  # sent on by nobody who is somebody's child: a delay is over, a worker requeues
        return {HEADER: before | own, **_trace_of(None, message)}
    # Whatever was there is of another message, from which the user has copied all headers.
    own |= _of(run)
    if mode == "link":
        return {HEADER: own}
    return {HEADER: own, **_trace_of(run, {} if _has_place_of(before, message) else message)}


def incoming(message: Mapping[str, Any]) -> Carried:
    """Return what a message has carried; whatever it is, this raises nothing."""
    found = message.get(HEADER)
    own: dict[str, Any] = found if type(found) is dict else {}
    mode = _text(own.get("mode"))
    return Carried(
        enqueued_at=_time(own.get("enqueued_at")),
        run_id=_id(own.get("run")),
        root_run_id=_id(own.get("root")),
        trace_id=_trace_id(own.get("trace")),
        previous_run_id=_id(own.get("previous")),
        own_root_run_id=_id(own.get("own_root")),
        own_trace_id=_trace_id(own.get("own_trace")),
        mode=mode if mode in PROPAGATION else "parent",
        session_id=_text(own.get("session")),
        user_id=_text(own.get("user")),
        user_group=_text(own.get("user_group")),
        tags=_values(own.get("tags")),
        metadata=_values(own.get("metadata")),
        trace=w3c.read(message.get(w3c.TRACEPARENT), message.get(w3c.TRACESTATE)),
    )


def stronger(one: str, other: str) -> str:
    """Return the one of two modes that connects less."""
    return max(one, other, key=PROPAGATION.index)


def _mode() -> str:
    collector = configured()
    if collector is not None:
        return collector.settings.propagate
    # A process that only enqueues: nothing is configured for that, but what is said there counts.
    said = os.environ.get("WAXELL_PROPAGATE", "")
    return said if said in PROPAGATION else "parent"


def _plain(header: object) -> dict[str, Any]:
    # By its type alone, here and below: what is pickled may be an object that answers with the user's code.
    return dict(header) if type(header) is dict else {}


def _has_place_of(before: dict[str, Any], message: Mapping[str, Any]) -> bool:
    """True if the headers for other tracers are ours, copied from another message with all the rest."""
    place = w3c.read(message.get(w3c.TRACEPARENT))
    return place is not None and place.span_id == _id(before.get("run"))[:16]


def _sent_again(before: dict[str, Any], run: Run) -> dict[str, Any]:
    if run.is_muted:
        return before
    own = before | {"previous": run.run_id}
    if run.root_run_id != before.get("root"):  # the attempts of a root, or of what is only linked
        own |= {"own_root": run.root_run_id, "own_trace": run.trace_id}
    return own


def _of(run: Run) -> dict[str, Any]:
    parent = run.seen_as
    own = {
        "run": parent,
        "root": run.root_run_id if parent else None,
        "trace": run.trace_id,
        "session": _said_text(run.session_id),
        "user": _said_text(run.user_id),
        "user_group": _said_text(run.user_group),
        "tags": travelling(run.tags),
        "metadata": travelling(run.passes_on),
    }
    return {name: value for name, value in own.items() if value}


def _trace_of(run: Run | None, message: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers for other tracers; none if one of them has said already what it wants."""
    if w3c.TRACEPARENT in message:
        return {}
    theirs = w3c.of_opentelemetry()
    if theirs is not None:
        return theirs.headers()
    place = None if run is None else run.place
    return {} if place is None else place.headers()


def _said_text(value: object) -> str:
    """Return an id of the user's as text, as it stands in the run's own record; empty for what is none."""
    kind = type(value)
    if kind is uuid.UUID:
        return str(value)
    if kind is bool or not issubclass(kind, (str, int)):
        return ""
    plain = reduce(value)
    is_text = type(plain) is str and issubclass(kind, str)
    is_number = type(plain) is int and is_portable_integer(plain)
    return str(plain)[:_LONGEST] if is_text or is_number else ""


def _time(value: object) -> float | None:
    kind = type(value)
    if (kind is float or kind is int) and 0 <= value < _FOR_EVER:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    return None


def _id(value: object) -> str:
    return value if type(value) is str and _ID.fullmatch(value) else ""


def _trace_id(value: object) -> str:
    return str(value) if w3c.is_trace_id(value) else ""


def _text(value: object) -> str:
    return value[:_LONGEST] if type(value) is str else ""


def _values(value: object) -> dict[str, Any]:
    if type(value) is not dict or not value:
        return {}
    plain = reduce(value)
    return plain if type(plain) is dict else {}
