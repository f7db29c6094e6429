"""Dramatiq: a middleware that makes each attempt of each message a run.

    broker.add_middleware(waxell_workers.dramatiq.WaxellMiddleware())

It may stand anywhere in the list: a run opens in `before_process_message` and closes in `before_ack` or
`before_nack`, in the same thread, when every other middleware is done with the message. Not earlier:
until `after_process_message` has gone round, time limits are armed, and what is slow there turns a success
into a failure. In a process that is no worker it only adds options to messages.

Dramatiq logs an `Exception` of a hook and goes on, so that nothing here guards against one. Its interrupts
are no `Exception`s and surface at any instruction, here too; they go through.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import weakref
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from dramatiq import Actor, Broker, Middleware, Worker
from dramatiq.broker import MessageProxy
from dramatiq.errors import ActorNotFound
from dramatiq.message import Message
from dramatiq.middleware import AgeLimit, Retries, Shutdown, TimeLimit, TimeLimitExceeded

from .core import collector, lineage, tasks, w3c
from .core.encoding import reduce
from .core.runs import get_context

_FRAMEWORK = "dramatiq"
_LOOK_S = 2.0
_WAITS = "waits"
"""In what a message carries: the consumer holds it back until its eta, then enqueues it once more."""
_SENT = "_waxell_sent"
"""The attribute of a message that has what it has got from us, and what stood there before."""
_OURS = (lineage.HEADER, w3c.TRACEPARENT, w3c.TRACESTATE)
_AT_MOST = 1e14
"""No number that Dramatiq means in milliseconds; what comes in a message may be anything."""
_LONGEST = 200
_ABORTS = "dramatiq_abort"
"""The package whose middleware skips, or interrupts, what somebody has aborted."""


@dataclass(slots=True)
class _Processing:
    """The message that a worker thread processes, with what its run needs at its end."""

    message: MessageProxy
    attempt: tasks.Attempt
    state: str = "success"
    reason: str = ""
    error: dict[str, Any] = field(default_factory=dict)
    again: str = ""
    """Once the message was sent again: how that is said."""
    failed: str = "rejected: failed by a middleware"
    """How it is said if the message fails without an exception."""


class _Here(threading.local):
    """What this worker thread, or greenlet, is processing."""

    processing: _Processing | None = None
    refused: MessageProxy | None = None
    """What a consumer's thread has refused last; its end comes again while the broker cannot be reached."""


_here = _Here()
_working: weakref.WeakSet[Worker] = weakref.WeakSet()
"""The workers of this process: when the last of them stops, nothing more is recorded here."""


class WaxellMiddleware(Middleware):
    """Record what each actor does, and the LLM calls that it makes.

    Add it to the broker; `broker.add_middleware(WaxellMiddleware())` is all. Settings come from `init` or the
    environment, those of one actor from `waxell_workers.options`, above or below `@dramatiq.actor`.
    """

    def __init__(self) -> None:
        self._look: _Look | None = None

    # -- messages ------------------------------------------------------------------------------

    def before_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        if next((one for one in broker.middleware if isinstance(one, WaxellMiddleware)), self) is not self:
            return  # added twice
        before = _before(message)
        carried = _carried(before)
        if carried.get(_WAITS) is True and get_context() is None:  # not sent anew: its eta has come
            options = {**before, lineage.HEADER: _without(carried, _WAITS)}
        else:
            options = _sent(message, before)
        if options is not message.options:
            _exchange(message, options, before)

    def after_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        here = _here.processing
        if here is not None and here.message.message_id == message.message_id:
            here.again = "retry: sent again"  # at once: an interrupt may prevent the rest
            here.again = _again(broker, message, delay)

    def before_delay_message(self, broker: Broker, message: MessageProxy) -> None:
        eta = _number(message.options.get("eta"))
        if eta is not None and not collector.is_off():
            carried = _carried(message.options)
            message.options[lineage.HEADER] = {**carried, "eta": eta / 1000, _WAITS: True}

    # -- attempts, in the thread that executes them --------------------------------------------

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        if _processing(message) is None:
            _open(broker, message)

    def after_process_message(
        self,
        broker: Broker,
        message: MessageProxy,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        # Comes a second time, with an exception, if an interrupt surfaces while it goes round.
        if exception is None:
            return
        here = _processing(message) or _open(broker, message)  # one may have surfaced before we had begun
        here.state, here.reason = _failed(broker, here, exception)
        here.error = here.attempt.run.describe(exception)

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        here = _processing(message) or _open(broker, message)  # who skipped it may stand before us
        here.state, here.reason = "ignored", "ignored: skipped by a middleware"
        frames = _frames(sys.exc_info()[1])
        if any(frame.f_code is Actor.__call__.__code__ for frame in frames):
            here.reason = "ignored: skipped by its actor"
        elif frames and _is_of(_ABORTS, frames[-1].f_globals.get("__name__")):
            here.state, here.reason = "revoked", "revoked before start"
        elif frames and frames[-1].f_code is AgeLimit.before_process_message.__code__:
            here.failed = _too_old(broker, message)

    def before_ack(self, broker: Broker, message: MessageProxy) -> None:
        here = _processing(message)
        if here is None:
            return
        if here.error and here.again:
            _close(here, "retry", here.again)
        else:  # not failed in spite of an exception: there is no `Retries` to fail it
            _close(here, here.state, here.reason)

    def before_nack(self, broker: Broker, message: MessageProxy) -> None:
        here = _processing(message)
        if here is None:
            _refused(broker, message)
        elif here.error:
            _close(here, here.state, here.reason)
        else:
            _close(here, "rejected", here.failed)

    # -- the worker process --------------------------------------------------------------------

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        tasks.worker_booting()

    def after_worker_boot(self, broker: Broker, worker: Worker) -> None:
        _working.add(worker)
        tasks.worker_ready()
        configured = collector.configured()
        if configured is not None and configured.active:
            self._look = _Look()
            self._look.start()

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        # Threads that have outlasted --worker-shutdown-timeout are left to die: their runs end here, and
        # nobody else's. There may be another worker in this process.
        if self._look is not None:
            self._look.over.set()
            self._look = None
        left = [thread.ident for thread in worker.workers if thread.is_alive()]
        tasks.abandon(left, "interrupted: the worker did not wait for it any longer")
        _working.discard(worker)
        # By their threads: a fork leaves its child our workers, but not those.
        if not any(thread.is_alive() for other in _working for thread in other.workers):
            tasks.worker_stopping()


class _Look(threading.Thread):
    """Looks after the shipper while the worker is idle: Dramatiq has no hook that would do."""

    def __init__(self) -> None:
        super().__init__(name="waxell-look", daemon=True)
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(_LOOK_S):
            tasks.look_after_shipper()


def _processing(message: MessageProxy) -> _Processing | None:
    here = _here.processing
    return here if here is not None and here.message is message else None


def _open(broker: Broker, message: MessageProxy) -> _Processing:
    _here.processing = None
    attempt = tasks.prepare(_describe(message), _options(broker, message))
    here = _here.processing = _Processing(message, attempt)
    tasks.begin(attempt)
    return here


def _close(here: _Processing, state: str, reason: str) -> None:
    tasks.close(here.attempt, state, reason=reason, **here.error)
    _here.processing = None
    tasks.flush(here.attempt)


def _refused(broker: Broker, message: MessageProxy) -> None:
    """Record a message that a consumer has not even given to a worker thread, if its actor is unknown."""
    if _actor(broker, message) is not None or _here.refused is message:
        return
    _here.refused = message
    reason = "rejected: no actor of this name in this worker"
    error_type = f"{ActorNotFound.__module__}.{ActorNotFound.__qualname__}"
    tasks.never_began(_describe(message), tasks.Options(), "rejected", reason, error_type)


# -- what is sent ------------------------------------------------------------------------------


def _before(message: Message[Any]) -> dict[str, Any]:
    """Return a message's options without what this very object has got from us as it was enqueued before.

    It is the user's, who may enqueue it again, elsewhere and for somebody else.
    """
    header, replaced = getattr(message, _SENT, (None, {}))
    if header is None or message.options.get(lineage.HEADER) is not header:
        return message.options
    return {**_without(message.options, *_OURS), **replaced}


def _sent(message: Message[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a message that is being enqueued, with ours; the very same if we add none."""
    run, here = get_context(), _here.processing
    own_attempt = here is not None and here.message.message_id == message.message_id
    again = run is not None and (own_attempt or run.task_id == message.message_id)
    sent = lineage.outgoing(options, again=again)
    if not sent:
        return options
    if w3c.TRACEPARENT in sent:
        options = _without(options, w3c.TRACESTATE)  # of a place elsewhere, from which it was copied
    own = _without(sent[lineage.HEADER], "eta", _WAITS)  # a retry has its own, or none
    if run is not None and not run.is_muted:
        if not again and "run" in own:
            # A context of the user's has no task, but may stand in one.
            task_id = run.task_id or (here.message.message_id if here is not None else "")
            own |= {"parent_task_id": str(task_id)} if task_id else {}
        elif again and own_attempt and here is not None and not here.attempt.run.is_muted:
            own["previous"] = here.attempt.run.run_id  # also if an interrupt has left something current in it
    return {**options, **sent, lineage.HEADER: own}


def _exchange(message: Message[Any] | MessageProxy, options: dict[str, Any], before: dict[str, Any]) -> None:
    """Give a message other options. The dict that it has may be the user's own, and others' as well."""
    if isinstance(message, MessageProxy):
        message = message._message
    if isinstance(message, Message):
        replaced = {name: before[name] for name in _OURS if name in before}
        object.__setattr__(message, _SENT, (options.get(lineage.HEADER), replaced))
        object.__setattr__(message, "options", options)  # frozen: Dramatiq does the same with `args`
    else:
        message.options.update(options)


# -- how it is said ----------------------------------------------------------------------------


def _failed(broker: Broker, here: _Processing, exception: BaseException) -> tuple[str, str]:
    """Return the state, and the reason, of an attempt that is not tried again."""
    if isinstance(exception, TimeLimitExceeded):
        limit = _limit(broker, here.message, "time_limit", TimeLimit)
        # It may have been raised by hand; and what stands before us may have begun earlier.
        if limit is not None and here.attempt.run.elapsed_s() > limit / 1000 - 1:
            return "error", f"error: time limit of {_seconds(limit)}"
        return "error", ""
    if isinstance(exception, Exception):
        return "error", ""
    if isinstance(exception, Shutdown):
        return "interrupted", "interrupted: the worker was told to stop"
    if type(exception).__name__ == "Abort" and _is_of(_ABORTS, type(exception).__module__):
        return "revoked", "revoked: aborted by user"
    return "interrupted", f"interrupted: {type(exception).__name__} went through the actor"


def _again(broker: Broker, message: Message[Any], delay: int | None) -> str:
    """Say that a message was sent again, and when it will be tried."""
    wait = _number(delay) or 0
    when = "at once" if wait < 50 else f"in {_seconds(wait, 0 if wait >= 10_000 else 1)}"
    retries = message.options.get("retries")
    if type(retries) is not int:
        return f"retry: sent again, {when}"
    at_most = _found(broker, message, "max_retries", Retries)
    decides = any(callable(found) for found in _found(broker, message, "retry_when", Retries))
    known = not decides and bool(at_most) and type(at_most[0]) is int and at_most[0] >= retries
    total = f" of {at_most[0] + 1}" if known else ""
    return f"retry: attempt {retries + 1}{total} {when}"


def _too_old(broker: Broker, message: MessageProxy) -> str:
    limit = _limit(broker, message, "max_age", AgeLimit)
    return "rejected: older than its age limit" + (f" of {_seconds(limit)}" if limit is not None else "")


def _limit(broker: Broker, message: MessageProxy, name: str, kind: type[Middleware]) -> float | None:
    """Return a limit in milliseconds as Dramatiq finds it; nothing and 0 count as unsaid."""
    return next((number for found in _found(broker, message, name, kind) if (number := _number(found))), None)


def _found(
    broker: Broker, message: Message[Any] | MessageProxy, name: str, kind: type[Middleware]
) -> list[Any]:
    """Return what the message, its actor, and the broker's middleware say of an option, in this order."""
    actor = _actor(broker, message)
    said = (message.options, {} if actor is None else actor.options)
    found = [options[name] for options in said if name in options]
    return found + [getattr(one, name, None) for one in broker.middleware if isinstance(one, kind)]


def _seconds(milliseconds: float, digits: int = 3) -> str:
    return f"{round(milliseconds / 1000, digits):.3f}".rstrip("0").rstrip(".") + " s"


def _frames(error: BaseException | None) -> list[FrameType]:
    """Return the frames that an exception has gone through, the one that raised it last."""
    frames, trace = [], None if error is None else error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    return frames


def _is_of(package: str, module: object) -> bool:
    return isinstance(module, str) and module.partition(".")[0] == package


# -- translation -------------------------------------------------------------------------------


def _describe(message: MessageProxy) -> tasks.Task:
    options = message.options
    carried = _carried(options)
    if lineage.incoming(options).enqueued_at is None:  # sent by a process without the middleware
        sent_at = _number(options.get("requeue_timestamp")) or _number(message.message_timestamp)
        carried = {**carried, "enqueued_at": None if sent_at is None else sent_at / 1000}
    args, kwargs, retries = message.args, message.kwargs, options.get("retries")
    return tasks.Task(
        framework=_FRAMEWORK,
        name=message.actor_name,
        task_id=str(message.message_id),
        attempt=retries + 1 if type(retries) is int and 0 <= retries < _AT_MOST else 1,
        queue=message.queue_name,
        worker=f"{socket.gethostname()}:{os.getpid()}",
        redelivered=bool(getattr(message, "redelivered", False)),  # RabbitMQ's say so
        eta=_number(carried.get("eta")),
        message={**options, lineage.HEADER: carried},
        parent_task_id=_text(carried.get("parent_task_id")),
        group_id=_text(options.get("group_completion_uuid")),
        inputs=lambda: {"args": reduce(args), "kwargs": reduce(kwargs)},
    )


def _options(broker: Broker, message: MessageProxy) -> tasks.Options:
    actor = _actor(broker, message)
    # Marked above @dramatiq.actor, the actor carries it; below, its function.
    return tasks.Options() if actor is None else tasks.options_of(actor, actor.fn)


def _actor(broker: Broker, message: Message[Any] | MessageProxy) -> Actor[Any, Any] | None:
    try:
        return broker.get_actor(message.actor_name)
    except ActorNotFound:
        return None


def _carried(options: dict[str, Any]) -> dict[str, Any]:
    carried = options.get(lineage.HEADER)
    return carried if isinstance(carried, dict) else {}


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _number(value: object) -> float | None:
    if isinstance(value, (int, float)) and type(value) is not bool and 0 <= value < _AT_MOST:
        return value
    return None


def _text(value: object) -> str:
    return value if isinstance(value, str) and len(value) <= _LONGEST else ""
