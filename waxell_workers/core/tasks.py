"""The few verbs into which every adapter translates its framework: enqueued, started, ended, lost; worker
booting, stopping.

What two frameworks both need is here: options, the lineage that travels with a message, the metadata keys,
the flush policy. An adapter calls these from its framework's own hooks and holds nothing else.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from . import lineage
from .collector import Collector, configured, current
from .errors import ConfigError
from .ids import new_id
from .records import TaskLost
from .runs import Run, get_context
from .values import FLUSH_POLICIES, PARSERS, PROPAGATION

_CLOCKS_S = 3600.0
"""How far the clock of whoever has enqueued a task may be ahead of ours."""
_SKEW_S = 0.001
"""Clocks that differ by less are not worth a word."""
_LIMIT_MARGIN_S = 0.5
"""A flush ends this long before a framework's hard limit would kill the process."""
_OPTIONS = "__waxell_options__"
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Options:
    """What `@options` says about one task; None leaves a setting as it is."""

    flush: str | None = None
    flush_timeout: float | None = None
    agent_name: str | None = None
    record: bool = True
    capture_content: bool | None = None
    propagate: str | None = None


def options(
    *,
    flush: str | None = None,
    flush_timeout: float | None = None,
    agent_name: str | None = None,
    record: bool = True,
    capture_content: bool | None = None,
    propagate: str | None = None,
) -> Callable[[_F], _F]:
    """Mark a task function, in any framework, above or below the framework's own decorator.

        @app.task
        @waxell_workers.options(flush="task", agent_name="billing")
        def charge(order_id): …

    Args:
        flush: `periodic` or `task`, for this task.
        flush_timeout: the longest wait of `task`, in seconds.
        agent_name: the run's agent name; the task's name otherwise.
        record: False to record nothing of this task.
        capture_content: whether its content is recorded: prompts, responses, arguments, and errors in full.
        propagate: how this task is connected with what enqueues it: `parent`, `link` or `none`.

    Raises:
        ConfigError: one of them is none of what it may be.
    """
    if flush is not None and flush not in FLUSH_POLICIES:
        raise ConfigError("flush", flush, f"expected one of {', '.join(FLUSH_POLICIES)}")
    if capture_content is not None and not isinstance(capture_content, bool):
        raise ConfigError("capture_content", capture_content, "expected True or False")
    if propagate is not None and propagate not in PROPAGATION:
        raise ConfigError("propagate", propagate, f"expected one of {', '.join(PROPAGATION)}")
    if flush_timeout is not None:
        flush_timeout = PARSERS["flush_timeout"]("flush_timeout", flush_timeout)
    if agent_name is not None:
        agent_name = PARSERS["agent_name"]("agent_name", agent_name)
    chosen = Options(flush, flush_timeout, agent_name, record, capture_content, propagate)

    def mark(function: _F) -> _F:
        setattr(function, _OPTIONS, chosen)
        return function

    return mark


def options_of(*candidates: object) -> Options:
    """Return the options of the first object that was marked, or the default ones."""
    for candidate in candidates:
        found = getattr(candidate, _OPTIONS, None)
        if isinstance(found, Options):
            return found
    return _DEFAULT


_DEFAULT = Options()


@dataclass(frozen=True, slots=True)
class Task:
    """One attempt of a task, as its framework describes it. Times are Unix time in seconds."""

    framework: str
    name: str
    task_id: str
    attempt: int = 1
    queue: str = ""
    worker: str = ""
    redelivered: bool = False
    eta: float | None = None
    message: Mapping[str, Any] = field(default_factory=dict)
    """The message's headers, or whatever carries what `lineage` has put there."""
    parent_task_id: str = ""
    root_task_id: str = ""
    group_id: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else one framework knows, as plain data: `schedule`, `depends_on`, …"""
    inputs: Callable[[], dict[str, Any]] | None = None
    """Makes the arguments, as plain data; called only if content is captured."""
    nested: bool = False
    """True if the task runs inside another on the same slot, as eager tasks do."""


# -- started and ended -------------------------------------------------------------------------

_slots: dict[int, Run] = {}
"""Thread or greenlet to the run of the task that it executes."""
_here = threading.local()
"""Has the guard of this thread, which goes with it."""
_guards: dict[int, weakref.ref[_Guard]] = {}


class _Guard:
    """Stands for one thread; when it goes, what the thread has left open is ended."""

    __slots__ = ("__weakref__",)


@dataclass(slots=True)
class Attempt:
    """An open run together with what its end needs."""

    run: Run
    collector: Collector
    flush: str
    flush_timeout: float
    slot: int | None
    begun: bool = False
    """True once its run is open and current."""


def prepare(task: Task, marked: Options) -> Attempt:
    """Make an attempt without beginning it.

    The caller puts it where the end will find it, then calls `begin`: an interrupt may surface at any
    instruction, and must not leave a run that nobody can close. A task that is not recorded gets a muted run.
    """
    collector = current()
    settings = collector.settings
    name = marked.agent_name or settings.agent_name or task.name
    slot = None if task.nested else threading.get_ident()
    timeout = settings.flush_timeout if marked.flush_timeout is None else marked.flush_timeout
    carried = lineage.incoming(task.message)
    mode = marked.propagate or lineage.stronger(settings.propagate, carried.mode)
    kept: Collector | None = collector
    if not settings.observe or not marked.record or collector.excluded(task.name):
        kept = None
    wants_content = marked.capture_content
    if wants_content is None:  # on a slot of its own, what may still be current is no outer run
        outer = get_context() if task.nested else None
        wants_content = None if outer is None else outer.capture_content
    if wants_content is None:
        wants_content = settings.capture_content
    run = Run(
        kept,
        name,
        task.framework,
        inputs=task.inputs() if task.inputs is not None and wants_content and kept is not None else None,
        metadata=_metadata(task, carried, mode),
        task_id=task.task_id,
        capture_content=wants_content,
        **_connected(carried, mode),
    )
    flush = "periodic" if kept is None else marked.flush or settings.flush
    return Attempt(run, collector, flush, timeout, slot)


def _connected(carried: lineage.Carried, mode: str) -> dict[str, Any]:
    """Return what a run takes from the one that has enqueued it, as `Run` takes it."""
    alone = {
        "parent_run_id": "",
        "root_run_id": carried.own_root_run_id or None,
        # Without one, it would be of the trace that a web request, or OpenTelemetry, is in here.
        "trace_id": carried.own_trace_id or new_id(),
    }
    if mode == "none":
        return alone
    ambient = {
        "session_id": carried.session_id or None,
        "user_id": carried.user_id or None,
        "user_group": carried.user_group or None,
        "tags": carried.tags or None,
        "ambient": carried.metadata or None,
    }
    if mode == "link":
        return {**alone, **ambient}
    return {
        "parent_run_id": carried.run_id or None,
        "root_run_id": carried.root_run_id or carried.own_root_run_id or None,
        "trace_id": carried.trace_id or carried.own_trace_id or None,
        "trace": carried.trace,
        **ambient,
    }


def never_began(task: Task, marked: Options, state: str, reason: str, error_type: str = "") -> None:
    """Record an attempt that has ended before it could begin, from whichever process knows of it.

    Args:
        task: the attempt.
        marked: the task's options.
        state: one of `records.STATES`.
        reason: why, in words for people: `revoked before start`.
        error_type: the framework's exception, if there is one.
    """
    collector = configured()
    if collector is None or not collector.active:
        return
    run = prepare(
        replace(task, nested=True, facts={**task.facts, "wait_s": None, "never_began": True}), marked
    ).run
    run.parent_run_id = run.parent_run_id or ""  # never what happens to be current here
    run.start()
    run.end(state, reason=reason, error_type=error_type)


def begin(attempt: Attempt) -> None:
    """Open the attempt's run and make it current; an older one left open on this slot is closed.

    Once more after an interrupt, it writes what may have been written already: that has the same id.
    """
    slot = attempt.slot
    if slot is not None:
        if getattr(_here, "guard", None) is None:
            _guard(slot)
        older = _slots.get(slot)
        if older is not None and older is not attempt.run and older.is_open:
            older.leave_all()
            older.end("interrupted", reason="interrupted: it was cut off before the next task began")
        _slots[slot] = attempt.run
    attempt.run.start()
    attempt.run.enter()
    attempt.begun = True


def _guard(slot: int) -> None:
    """Have the last run of this thread end with it, at the latest: an interrupt may end the thread itself."""

    # By arguments: at the interpreter's end the module's own names have gone before the main thread's guard.
    def ended(_: object, guards: dict[int, Any] = _guards, slots: dict[int, Run] = _slots) -> None:
        guards.pop(slot, None)
        run = slots.pop(slot, None)
        if run is not None and run.is_open:
            run.end("interrupted", reason="interrupted: its thread ended before it did")

    guard = _Guard()
    _guards[slot] = weakref.ref(guard, ended)
    _here.guard = guard


def abandon(threads: Iterable[int | None], reason: str) -> None:
    """End what these threads execute, for which nobody waits any longer; their own ends come too late.

    Args:
        threads: the threads' idents; None for one that has never begun.
        reason: why, in words for people.
    """
    for slot in threads:
        run = None if slot is None else _slots.get(slot)
        if run is not None:
            run.end("interrupted", reason=reason)


def task_ended(
    attempt: Attempt,
    state: str,
    *,
    time_left_s: float | None = None,
    **error: Any,
) -> None:
    """Close an attempt's run and, under the `task` policy, wait until it is at the server.

    Args:
        attempt: what `prepare` returned.
        state: one of `records.STATES`.
        time_left_s: seconds until the framework would kill this process, if it would.
        error: the error's fields, as `Run.end` takes them.
    """
    close(attempt, state, **error)
    flush(attempt, time_left_s)


def close(attempt: Attempt, state: str, **error: Any) -> None:
    """Close an attempt's run and wait for nothing: for an adapter that flushes at a moment of its own.

    Args:
        attempt: what `prepare` returned.
        state: one of `records.STATES`.
        error: the error's fields, as `Run.end` takes them.
    """
    try:
        _close(attempt, state, error)
    except BaseException:  # an interrupt's: it goes on, once this is done
        _close(attempt, state, error)
        raise


def _close(attempt: Attempt, state: str, error: dict[str, Any]) -> None:
    run = attempt.run
    if not attempt.begun:  # an interrupt has surfaced there
        begin(attempt)
    run.leave_all()
    run.end(state, **error)
    if attempt.slot is not None and _slots.get(attempt.slot) is run:
        del _slots[attempt.slot]


def flush(attempt: Attempt, time_left_s: float | None = None, *, ends_process: bool = False) -> None:
    """Wait, under the `task` policy, until what an attempt has recorded is at the server.

    Args:
        attempt: what was closed.
        time_left_s: seconds until the framework would kill this process, if it would.
        ends_process: True if this process ends with the attempt; whatever the policy, other tracers have then
            to be flushed, if they are at all.
    """
    if attempt.flush != "task" and not ends_process:
        return
    timeout = attempt.flush_timeout
    if time_left_s is not None:
        timeout = min(timeout, time_left_s - _LIMIT_MARGIN_S)
    if timeout <= 0:
        return
    if attempt.flush == "task":
        attempt.collector.force_flush(timeout)
    else:
        attempt.collector.drain(timeout)


def task_lost(task_id: str, reason: str, error_type: str = "", *, state: str = "killed") -> None:
    """Say, from the process that supervises, that the process which ran a task is gone.

    Args:
        task_id: the framework's id of the task.
        reason: why, for people.
        error_type: the framework's exception.
        state: `killed`, or `revoked` if somebody asked for it.
    """
    collector = configured()
    if collector is not None and collector.active:
        collector.record(TaskLost, task_id=task_id, reason=reason, error_type=error_type, state=state)


# -- worker ------------------------------------------------------------------------------------


def worker_booting() -> None:
    """Configure this worker from the environment unless `init` did, and start its shipper."""
    collector = current()
    collector.boot()
    collector.flush_at_exit()


def app_booting() -> None:
    """Do, before a task waits for it, what the first record of a process does that is no worker.

    It opens the journal, sees to a shipper, and to the exit of the interpreter.
    """
    current().token()


def worker_ready() -> None:
    """Start the shipper where it is a thread: after the pool has forked."""
    current().ensure_shipper()


def look_after_shipper() -> None:
    """Start a shipper if nobody ships; may be called often, and looks every few seconds."""
    current().look_for_shipper()


def pool_process_started() -> None:
    """Say that this process belongs to a worker whose main process looks after the shipper."""
    current().enter_worker()


def pool_process_stopping() -> None:
    """End what this pool process leaves open; its records are safe, so that they are not waited for.

    Other tracers are flushed, if that is asked for: what they have in memory goes with this process.
    """
    collector = configured()
    if collector is not None:
        collector.close_open_runs()
        collector.drain(collector.pool_share_s)


def drains() -> bool:
    """True if other tracers are flushed where we flush."""
    collector = configured()
    return collector is not None and collector.others is not None


def pool_share_s() -> float:
    """Return the seconds of `shutdown_timeout` that a pool's processes may have waited as they ended."""
    collector = configured()
    return 0.0 if collector is None else collector.pool_share_s


def worker_stopping(spent_s: float = 0.0) -> None:
    """Have what is there delivered, for at most `shutdown_timeout`, worker and pool together.

    Args:
        spent_s: seconds of `shutdown_timeout` that the adapter has waited already.
    """
    collector = configured()
    if collector is not None:
        collector.stop(spent_s)


def _metadata(task: Task, carried: lineage.Carried, mode: str) -> dict[str, Any]:
    now = time.time()
    enqueued_at = carried.enqueued_at
    # Whoever can enqueue can write what he likes there: a time of the next century, for one.
    if enqueued_at is not None and enqueued_at > now + _CLOCKS_S:
        enqueued_at = None
    since = max(enqueued_at or 0.0, task.eta or 0.0)
    metadata = {
        "framework": task.framework,
        "task": task.name,
        "task_id": task.task_id,
        "attempt": task.attempt,
        "queue": task.queue,
        "worker": task.worker,
        "pid": os.getpid(),
        "host": _host,
        "redelivered": task.redelivered or None,
        "enqueued_at": enqueued_at,
        "eta": task.eta,
        "wait_s": round(max(0.0, now - since), 6) if since else None,
        "group_id": task.group_id,
        "previous_run_id": carried.previous_run_id,
    }
    if enqueued_at is not None and enqueued_at > now + _SKEW_S:  # an eta may lie ahead: schedulers round
        metadata["clock_skew_s"] = round(enqueued_at - now, 6)
    if mode == "parent":
        metadata["parent_task_id"], metadata["root_task_id"] = task.parent_task_id, task.root_task_id
    elif mode == "link":
        metadata["linked_run_id"], metadata["linked_trace_id"] = carried.run_id, carried.trace_id
    if task.facts:
        metadata |= task.facts
    return {key: value for key, value in metadata.items() if value is not None and value != ""}


_host = socket.gethostname()
