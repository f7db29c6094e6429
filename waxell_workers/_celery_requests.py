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


def describe(task_id: str, name: str, request: Context, args: Any, kwargs: Any) -> tasks.Task:
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
            "schedule": _schedule(request),
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


def _schedule(request: Context) -> str:
    """Return the name of the beat entry that has sent a task: we tell it, or django-celery-beat does."""
    own = _header(request, lineage.HEADER)
    told = own.get("schedule") if isinstance(own, dict) else None
    return text(told) or text(_header(request, "periodic_task_name"))


def entry_name(scheduler: Any, task: str) -> str:
    """Return the name of the entry for which beat sends a task: the one that it has just noted as run.

    Args:
        scheduler: beat's. Those of Celery have their entries in memory; another one's may look further.
        task: the task's name.
    """
    if type(scheduler).__module__ != "celery.beat":
        return ""
    entries = [entry for entry in scheduler.schedule.values() if entry.task == task]
    latest = max(entries, key=lambda entry: entry.last_run_at.timestamp(), default=None)
    return text(getattr(latest, "name", None))


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
