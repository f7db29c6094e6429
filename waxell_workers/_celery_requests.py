"""What Celery's request says of an attempt, in the words of `core.tasks`.

A request is made of a message's headers, and whoever can enqueue can write anything there: what is not of the
type that it should be counts as not said.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from celery.app.task import Context

from .core import lineage, tasks, w3c
from .core.encoding import reduce

_FRAMEWORK = "celery"


def describe(task_id: str, name: str, app: Any, request: Context, args: Any, kwargs: Any) -> tasks.Task:
    # What came with the message may be anything.
    delivery = request.delivery_info if isinstance(request.delivery_info, dict) else {}
    return tasks.Task(
        framework=_FRAMEWORK,
        name=name,
        task_id=task_id,
        attempt=attempt_number(request),
        queue=text(delivery.get("routing_key")),
        worker=text(request.hostname),
        redelivered=bool(delivery.get("redelivered")),
        eta=timestamp(request.eta),
        message=message_of(request),
        parent_task_id=text(request.parent_id),
        root_task_id=text(request.root_id),
        group_id=text(request.group),
        facts={
            "schedule": _schedule(name, app, request),
            "replaced": nesting(request.replaced_task_nesting) or None,
        },
        inputs=lambda: {"args": reduce(args), "kwargs": reduce(kwargs)},
        nested=bool(request.is_eager),
    )


def message_of(request: Context) -> Mapping[str, Any]:
    own = _header(request, lineage.HEADER)
    if request.is_eager:  # what is called in its place has copied another's headers, but for its own retry
        return {lineage.HEADER: own if attempt_number(request) > 1 else None}
    return {
        lineage.HEADER: own,
        **{name: _header(request, name) for name in (w3c.TRACEPARENT, w3c.TRACESTATE)},
    }


def _header(request: Context, name: str) -> Any:
    # Where a header lands differs by Celery's version and protocol: both places have it in 5.3 to 5.7.
    headers = request.headers if isinstance(request.headers, dict) else {}
    return headers.get(name) or getattr(request, name, None)


def _schedule(name: str, app: Any, request: Context) -> str | None:
    """Return the name of the beat entry that a task is sent by, as far as it is told, or can only be one."""
    told = _header(request, "periodic_task_name")  # django-celery-beat tells it
    if told and isinstance(told, str):
        return told
    if _header(request, "celery_beat_task") is not True or app is None:
        return None
    entries = app.conf.beat_schedule or {}
    found = [entry for entry, of in entries.items() if isinstance(of, dict) and of.get("task") == name]
    return str(found[0]) if len(found) == 1 else None


def attempt_number(request: Any) -> int:
    return number_after(request.retries)


def number_after(retries: object) -> int:
    return retries + 1 if isinstance(retries, int) and retries > 0 else 1


def nesting(value: object) -> int:
    return value if isinstance(value, int) else 0


def text(value: object) -> str:
    return value if isinstance(value, str) else ""


def timestamp(eta: object) -> float | None:
    if isinstance(eta, str):
        try:
            eta = datetime.datetime.fromisoformat(eta.replace("Z", "+00:00"))
        except ValueError:
            return None
    if not isinstance(eta, datetime.datetime):
        return None
    return (eta if eta.tzinfo else eta.replace(tzinfo=datetime.timezone.utc)).timestamp()
