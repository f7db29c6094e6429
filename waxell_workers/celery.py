"""Celery: importing this module makes each attempt of each task a run.

    import waxell_workers.celery  # noqa: F401

It connects to Celery's own signals and nothing else. Runs open in `task_prerun` and close in `task_postrun`,
in the process that executes the task; the main process starts the shipper, and says why a pool process died.
In a process that is no worker (a web server, beat, a shell) it only adds headers to messages.

Celery swallows and logs what a signal handler raises, so that nothing here guards against it; the handlers
are short, since a soft time limit that surfaces in one is lost to the task. What the handler had to do is
not: those of a task are connected twice, and the second call does what an interrupt has left, if it has.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from celery import Task as CeleryTask
from celery import signals, states
from celery.app.task import Context

from .core import lineage, tasks, w3c
from .core.encoding import reduce
from .core.runs import Run, get_context

_F = TypeVar("_F", bound=Callable[..., None])
_FRAMEWORK = "celery"
_ATTEMPT = "_waxell_attempt"
_ERROR = "_waxell_error"
_LOOK_FOR_SHIPPER_S = 5.0
_STATES = {
    states.SUCCESS: "success",
    states.FAILURE: "error",
    states.RETRY: "retry",
    states.IGNORED: "ignored",
    states.REJECTED: "rejected",
    states.REVOKED: "revoked",
    None: "interrupted",  # SystemExit or GreenletExit went through the task
}
_CARRIED = (lineage.HEADER, w3c.TRACEPARENT, w3c.TRACESTATE)
_LOST = ("WorkerLostError", "TimeLimitExceeded", "Terminated")


def _connect(signal: Any, times: int = 1) -> Callable[[_F], _F]:
    # weak=False and an id: the receivers are module functions, and the module may be imported twice.
    def connect(function: _F) -> _F:
        for number in range(times):
            name = f"waxell_workers.celery.{function.__name__}"
            signal.connect(function, weak=False, dispatch_uid=f"{name}.{number}" if number else name)
        return function

    return connect


# -- messages ----------------------------------------------------------------------------------


@_connect(signals.before_task_publish)
def _enqueued(headers: dict[str, Any] | None = None, **_: Any) -> None:
    if isinstance(headers, dict):
        run = get_context()
        retry = run is not None and headers.get("id") == run.task_id and bool(headers.get("retries"))
        headers.update(lineage.outgoing(headers, again=retry))


# -- tasks, in the process that executes them --------------------------------------------------


@_connect(signals.task_prerun, times=2)
def _started(task_id: str, task: CeleryTask, args: Any = (), kwargs: Any = None, **_: Any) -> None:
    request = task.request
    attempt = _attempt_of(request)
    if attempt is None:
        attempt = tasks.prepare(_describe(task_id, task, request, args, kwargs), _options(task))
        setattr(request, _ATTEMPT, attempt)
    if not attempt.begun:
        tasks.begin(attempt)


@_connect(signals.task_retry, times=2)
def _will_retry(request: Context, reason: Any = None, **_: Any) -> None:
    cause = getattr(reason, "exc", None) or reason  # a Retry tells what it was raised for
    if isinstance(cause, BaseException):
        _note_error(request, cause)


@_connect(signals.task_failure, times=2)
def _failed(
    task_id: str, sender: CeleryTask | None = None, exception: BaseException | None = None, **_: Any
) -> None:
    request = getattr(sender, "request", None)
    if exception is None:
        return
    if getattr(request, "id", None) == task_id and _attempt_of(request) is not None:
        # Celery clears the traceback's frames after this signal.
        _note_error(request, exception)
    elif type(exception).__name__ in _LOST:
        _lost(task_id, exception)


@_connect(signals.task_postrun, times=2)
def _ended(task: CeleryTask, state: str | None = None, **_: Any) -> None:
    request = task.request
    attempt = _attempt_of(request)
    if attempt is None:
        return
    error = getattr(request, _ERROR, None) or {}
    name = _STATES.get(state, "success")
    if name == "success":
        error = {}
    tasks.close(attempt, name, **error)
    setattr(request, _ATTEMPT, None)
    tasks.flush(attempt, _time_left_s(task, attempt.run))


# -- the main process --------------------------------------------------------------------------


_lost_tasks: dict[str, float] = {}
_parents: set[int] = set()
"""The process that has made pool processes, which have a part of the stop's seconds."""


def _lost(task_id: str, exception: BaseException) -> None:
    # A hard time limit is reported twice.
    if task_id in _lost_tasks:
        return
    if len(_lost_tasks) > 1000:
        _lost_tasks.clear()
    _lost_tasks[task_id] = time.monotonic()
    text = ", ".join(str(part) for part in exception.args)
    kind = type(exception).__name__
    reason = f"hard time limit ({text} s) exceeded" if kind == "TimeLimitExceeded" else text or kind
    tasks.task_lost(task_id, reason, kind)


@_connect(signals.task_revoked)
def _revoked(request: Any = None, terminated: bool = False, signum: Any = None, **_: Any) -> None:
    if terminated and request is not None:
        reason = f"revoked, and terminated by {signum or 'a signal'}"
        tasks.task_lost(request.id, reason, "Terminated", state="revoked")


@_connect(signals.worker_before_create_process)
def _creating_pool_process(**_: Any) -> None:
    _parents.add(os.getpid())
    tasks.worker_booting()


@_connect(signals.celeryd_after_setup)
def _booting(**_: Any) -> None:
    tasks.worker_booting()


@_connect(signals.worker_ready)
def _ready(sender: Any = None, **_: Any) -> None:
    tasks.worker_booting()
    tasks.worker_ready()
    timer = getattr(sender, "timer", None)
    if timer is not None:
        timer.call_repeatedly(_LOOK_FOR_SHIPPER_S, tasks.worker_ready)


@_connect(signals.worker_process_init)
def _pool_process_started(**_: Any) -> None:
    tasks.pool_process_started()


@_connect(signals.worker_process_shutdown)
def _pool_process_stopping(**_: Any) -> None:
    tasks.pool_process_stopping()


@_connect(signals.worker_shutdown)
def _worker_stopping(**_: Any) -> None:
    tasks.worker_stopping(tasks.pool_share_s() if os.getpid() in _parents else 0.0)


# -- translation -------------------------------------------------------------------------------


def _describe(task_id: str, task: CeleryTask, request: Context, args: Any, kwargs: Any) -> tasks.Task:
    delivery = request.delivery_info or {}
    return tasks.Task(
        framework=_FRAMEWORK,
        name=task.name or "",
        task_id=task_id,
        attempt=(request.retries or 0) + 1,
        queue=delivery.get("routing_key") or "",
        worker=request.hostname or "",
        redelivered=bool(delivery.get("redelivered")),
        eta=_timestamp(request.eta),
        message=_message(request),
        parent_task_id=request.parent_id or "",
        root_task_id=request.root_id or "",
        inputs=lambda: {"args": reduce(args), "kwargs": reduce(kwargs)},
        nested=bool(request.is_eager),
    )


def _message(request: Context) -> Mapping[str, Any]:
    # Where a header lands differs by Celery's version and protocol: both places have it in 5.3 to 5.7.
    headers = request.headers if isinstance(request.headers, dict) else {}
    return {name: headers.get(name) or request.get(name) for name in _CARRIED}


def _options(task: CeleryTask) -> tasks.Options:
    # Marked above @app.task, the task object carries it; below, its function.
    return tasks.options_of(task, task.run, getattr(task, "__wrapped__", None))


def _attempt_of(request: Any) -> tasks.Attempt | None:
    attempt = getattr(request, _ATTEMPT, None)
    return attempt if isinstance(attempt, tasks.Attempt) else None


def _note_error(request: Context, error: BaseException) -> None:
    attempt = _attempt_of(request)
    if attempt is not None and getattr(request, _ERROR, None) is None:
        setattr(request, _ERROR, attempt.run.describe(error))


def _time_left_s(task: CeleryTask, run: Run) -> float | None:
    """Return the seconds until a time limit strikes, which goes on while we wait; None without one.

    The soft one too: it would surface in our handler, and Celery would log that it did.
    """
    hard, soft = task.request.timelimit or (None, None)
    limits = (
        hard or task.time_limit or task.app.conf.task_time_limit,
        soft or task.soft_time_limit or task.app.conf.task_soft_time_limit,
    )
    left = [limit - run.elapsed_s() for limit in limits if limit is not None]
    return min(left) if left else None


def _timestamp(eta: object) -> float | None:
    if isinstance(eta, str):
        try:
            eta = datetime.datetime.fromisoformat(eta.replace("Z", "+00:00"))
        except ValueError:
            return None
    if not isinstance(eta, datetime.datetime):
        return None
    return (eta if eta.tzinfo else eta.replace(tzinfo=datetime.timezone.utc)).timestamp()
