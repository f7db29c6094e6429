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

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from celery import Task as CeleryTask
from celery import current_task, signals, states
from celery.app.task import Context

from . import _celery_ends as ends
from ._celery_requests import (
    attempt_number,
    describe,
    entry_name,
    message_of,
    nesting,
    number_after,
    timestamp,
)
from .core import lineage, tasks
from .core.runs import Run, get_context

_F = TypeVar("_F", bound=Callable[..., None])
_ATTEMPT = "_waxell_attempt"
_END = "_waxell_end"
_AROUND = "_waxell_around"
"""What its caller was handling as an eager task began, by its identity: no error of the task's own."""
_SUCCESSOR = "_waxell_successor"
_TOLD = "_waxell_told"
_LOOK_FOR_SHIPPER_S = 5.0
_STATES = {
    states.SUCCESS: "success",
    states.FAILURE: "error",
    states.RETRY: "retry",
    states.IGNORED: "ignored",
    states.REJECTED: "rejected",
    states.REVOKED: "revoked",
}
_OF_A_STORY = ("root", "trace", "session", "user", "user_group", "tags", "metadata")
"""What of our header is true of all that a task leads to."""
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
def _enqueued(sender: Any = None, headers: Any = None, body: Any = None, **_: Any) -> None:
    # Celery has made `headers` of the user's; ours go into that, and no dict inside it is changed.
    if not isinstance(headers, dict):
        return
    told: Mapping[str, Any] = body if isinstance(body, dict) else headers  # as protocol 1 and 2 have it
    request = getattr(current_task, "request", None)
    attempt = _attempt_of(request)
    if attempt is not None and _is_retry(told, request):
        ours = lineage.outgoing(headers, again=True)
        if ours and not attempt.run.is_muted:  # a block of the user's may be what is current
            ours[lineage.HEADER]["previous"] = attempt.run.run_id
        headers.update(ours)
        return
    if attempt is not None and _takes_its_place(told, request):
        setattr(request, _SUCCESSOR, getattr(request, _SUCCESSOR, None) or sender)
    sent = headers if get_context() is not None else _for_a_lost_task(told, headers)
    ours = lineage.outgoing(sent)
    headers.update(ours)
    service = _beats.get(threading.get_ident())
    if service is not None and ours:
        ours[lineage.HEADER]["schedule"] = entry_name(service.scheduler, sender)


def _is_retry(told: Mapping[str, Any], request: Any) -> bool:
    number = number_after(told.get("retries"))
    return bool(told.get("id") == request.id and number > attempt_number(request))


def _takes_its_place(told: Mapping[str, Any], request: Any) -> bool:
    return nesting(told.get("replaced_task_nesting")) > nesting(request.replaced_task_nesting)


def _for_a_lost_task(told: Mapping[str, Any], headers: dict[str, Any]) -> Mapping[str, Any]:
    """Return what a message carries that is sent outside any run; the main process speaks for a lost task."""
    own = headers.get(lineage.HEADER)
    if isinstance(own, Mapping):  # its retry: this process does not know the attempt's run
        return {**headers, lineage.HEADER: {name: own[name] for name in own if name != "previous"}}
    parent_id = told.get("parent_id")
    lost = _received.get(parent_id) if isinstance(parent_id, str) else None
    if lost is None:
        return headers
    # Its errback: whose child it is can only be told by `parent_id`, but the story is the same.
    carried = message_of(Context(lost.request_dict))[lineage.HEADER]
    if not isinstance(carried, Mapping):
        return headers
    return {**headers, lineage.HEADER: {name: carried[name] for name in _OF_A_STORY if name in carried}}


_beats: dict[int, Any] = {}
"""By thread, the beat that runs in it."""


@_connect(signals.beat_init)
def _beating(sender: Any = None, **_: Any) -> None:
    _beats[threading.get_ident()] = sender


# -- tasks, in the process that executes them --------------------------------------------------


@_connect(signals.task_prerun, times=2)
def _started(task_id: str, task: CeleryTask, args: Any = (), kwargs: Any = None, **_: Any) -> None:
    request = task.request
    attempt = _attempt_of(request)
    if attempt is None:
        described = describe(task_id, task.name or "", request, args, kwargs)
        attempt = tasks.prepare(described, _options(task))
        setattr(request, _AROUND, id(sys.exc_info()[1]))
        setattr(request, _ATTEMPT, attempt)
    if not attempt.begun:
        tasks.begin(attempt)


@_connect(signals.task_retry, times=2)
def _will_retry(request: Context, sender: Any = None, reason: Any = None, **_: Any) -> None:
    cause = getattr(reason, "exc", None)  # a Retry tells what it was raised for
    if cause is None:
        cause = reason
    if _attempt_of(request) is None:
        if type(cause).__name__ in _LOST:  # the main process tries once more
            _lost(request.id, cause)
        return
    if isinstance(cause, BaseException):
        _note_end(request, cause, _retry_in_words(request, sender, reason))
    following = getattr(reason, "sig", None)
    if request.is_eager and following is not None:  # it is not sent, so that nothing else would tell it
        ours = lineage.outgoing({}, again=True).get(lineage.HEADER)
        if ours is not None:
            following.options["headers"] = {**(following.options.get("headers") or {}), lineage.HEADER: ours}


@_connect(signals.task_failure, times=2)
def _failed(
    task_id: str, sender: CeleryTask | None = None, exception: BaseException | None = None, **_: Any
) -> None:
    request = getattr(sender, "request", None)
    if exception is None:
        return
    if getattr(request, "id", None) == task_id and _attempt_of(request) is not None:
        # Celery clears the traceback's frames after this signal.
        reason = ""
        if type(exception).__name__ == "SoftTimeLimitExceeded":
            reason = f"error: soft time limit of {ends.seconds(_limits(sender)[1])}"
        _note_end(request, exception, reason)
    elif type(exception).__name__ in _LOST:
        _lost(task_id, exception)


@_connect(signals.task_postrun, times=2)
def _ended(task: CeleryTask, state: str | None = None, retval: Any = None, **_: Any) -> None:
    request = task.request
    attempt = _attempt_of(request)
    if attempt is None:
        return
    name = _STATES.get(state, "success")
    told: dict[str, str] = getattr(request, _END, None) or {}
    if name == "success":
        told = {}
    elif name == "rejected":
        told = {"reason": ends.rejected(retval)}
    elif name == "ignored":
        told = {"reason": ends.ignored(retval, getattr(request, _SUCCESSOR, None) or "")}
    error = sys.exc_info()[1]
    passing = isinstance(error, Exception) and id(error) != getattr(request, _AROUND, None)
    # Celery itself has failed, maybe with what comes after the task's body; or something has gone through it.
    if state is None or (name == "success" and passing):
        if isinstance(error, Exception):
            name, told = "error", attempt.run.describe(error)
        else:
            name, told = "interrupted", {"reason": ends.interrupted(error)}
    tasks.close(attempt, name, **told)
    setattr(request, _ATTEMPT, None)
    tasks.flush(attempt, _time_left_s(task, attempt.run))


# -- the main process --------------------------------------------------------------------------


_received: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""By task id, what Celery has of a message for as long as it has it: its task may be lost."""
_parents: set[int] = set()
"""The process that has made pool processes, which have a part of the stop's seconds."""


@_connect(signals.task_received)
def _has_received(request: Any = None, **_: Any) -> None:
    _received[request.id] = request
    tasks.look_after_shipper()


def _lost(task_id: str, error: BaseException) -> None:
    request = _received.get(task_id)
    if _once(error if request is None else request):  # a hard time limit is reported twice, by two errors
        tasks.task_lost(task_id, ends.killed(error), type(error).__name__)


@_connect(signals.task_revoked)
def _revoked(
    sender: Any = None,
    request: Any = None,
    terminated: bool = False,
    signum: Any = None,
    expired: bool = False,
    **_: Any,
) -> None:
    if request is None or not _once(request):  # whoever terminates may do so again and again
        return
    if terminated:
        tasks.task_lost(request.id, ends.terminated(signum), "Terminated", state="revoked")
        return
    task = describe(request.id, sender.name, request, request.args, request.kwargs)
    reason = "revoked: expired before start" if expired else "revoked before start"
    tasks.never_began(task, _options(sender), "revoked", reason)


@_connect(signals.task_unknown)
def _unknown(sender: Any = None, message: Any = None, name: str = "", **more: Any) -> None:
    headers = message.headers if isinstance(message.headers, dict) else {}
    told = headers if "task" in headers else {**message.payload, "headers": headers}  # protocol 2, or 1
    hostname = getattr(sender, "hostname", "")
    request = Context(told, delivery_info=message.delivery_info, hostname=hostname, is_eager=False)
    task = describe(more["id"], name, request, None, None)
    reason = "rejected: no task of this name in this worker"
    tasks.never_began(task, tasks.Options(), "rejected", reason, "NotRegistered")


def _once(told: Any) -> bool:
    """True for the first word about an object of Celery's."""
    if getattr(told, _TOLD, False):
        return False
    setattr(told, _TOLD, True)
    return True


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


@_connect(signals.heartbeat_sent)
def _lives(**_: Any) -> None:
    # Celery 5.3 clears its timer whenever it loses the broker, and begins its heartbeats anew.
    tasks.look_after_shipper()


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


def _options(task: CeleryTask) -> tasks.Options:
    # Marked above @app.task, the task object carries it; below, its function.
    return tasks.options_of(task, task.run, getattr(task, "__wrapped__", None))


def _attempt_of(request: Any) -> tasks.Attempt | None:
    attempt = getattr(request, _ATTEMPT, None)
    return attempt if isinstance(attempt, tasks.Attempt) else None


def _note_end(request: Context, error: BaseException, reason: str) -> None:
    attempt = _attempt_of(request)
    if attempt is not None and getattr(request, _END, None) is None:
        setattr(request, _END, {**attempt.run.describe(error), "reason": reason})


def _retry_in_words(request: Context, task: Any, reason: Any) -> str:
    # `retry(max_retries=…)` is kept by Celery on the task, and counts from then on.
    most = getattr(task, "override_max_retries", None)
    most = getattr(task, "max_retries", None) if most is None else most
    when = getattr(reason, "when", None)
    wait_s = when if isinstance(when, (int, float)) else None
    moment = timestamp(when)
    if moment is not None:
        wait_s = moment - time.time()
    return ends.retry(attempt_number(request) + 1, most + 1 if isinstance(most, int) else None, wait_s)


def _limits(task: Any) -> tuple[float | None, float | None]:
    """Return the hard and the soft time limit of the task that is executed, in seconds."""
    told = task.request.timelimit
    hard, soft = told if isinstance(told, (list, tuple)) and len(told) == 2 else (None, None)
    conf = task.app.conf
    return (
        hard or task.time_limit or conf.task_time_limit,
        soft or task.soft_time_limit or conf.task_soft_time_limit,
    )


def _time_left_s(task: CeleryTask, run: Run) -> float | None:
    """Return the seconds until a time limit strikes, which goes on while we wait; None without one.

    The soft one too: it would surface in our handler, and Celery would log that it did.
    """
    left = [limit - run.elapsed_s() for limit in _limits(task) if limit is not None]
    return min(left) if left else None
