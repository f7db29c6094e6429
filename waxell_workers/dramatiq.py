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
import threading
from dataclasses import dataclass, field
from typing import Any

from dramatiq import Broker, Middleware, Worker
from dramatiq.broker import MessageProxy
from dramatiq.errors import ActorNotFound
from dramatiq.message import Message
from dramatiq.middleware import TimeLimitExceeded

from .core import collector, lineage, tasks
from .core.encoding import reduce
from .core.runs import get_context

_FRAMEWORK = "dramatiq"
_LOOK_S = 2.0
_WAITS = "waits"
"""In what a message carries: the consumer holds it back until its eta, then enqueues it once more."""


@dataclass(slots=True)
class _Processing:
    """The message that a worker thread processes, with what its run needs at its end."""

    message: MessageProxy
    attempt: tasks.Attempt
    state: str = "success"
    error: dict[str, Any] = field(default_factory=dict)
    requeued: bool = False


class _Here(threading.local):
    """What this worker thread, or greenlet, is processing."""

    processing: _Processing | None = None


_here = _Here()


class WaxellMiddleware(Middleware):
    """Record what each actor does, and the LLM calls that it makes.

    Add it to the broker; `broker.add_middleware(WaxellMiddleware())` is all. Settings come from `init` or the
    environment, those of one actor from `waxell_workers.options`, above or below `@dramatiq.actor`.
    """

    def __init__(self) -> None:
        self._look: _Look | None = None

    # -- messages ------------------------------------------------------------------------------

    def before_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        carried = _carried(message.options)
        if carried.get(_WAITS):  # not sent anew: its eta has come
            message.options[lineage.HEADER] = {key: carried[key] for key in carried if key != _WAITS}
            return
        run = get_context()
        retry = run is not None and run.task_id == message.message_id
        sent = lineage.outgoing(message.options, again=retry)
        own = sent.get(lineage.HEADER)
        if own is not None:
            own.pop("eta", None)  # a retry has its own, or none
            if run is not None and run.task_id and run.task_id != message.message_id:
                own.setdefault("parent_task_id", run.task_id)
        message.options.update(sent)

    def after_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        here = _here.processing
        if here is not None and here.message.message_id == message.message_id:
            here.requeued = True

    def before_delay_message(self, broker: Broker, message: MessageProxy) -> None:
        eta = message.options.get("eta")
        if isinstance(eta, (int, float)) and not collector.is_off():
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
        stopped = not isinstance(exception, (Exception, TimeLimitExceeded))
        here.state = "interrupted" if stopped else "error"
        here.error = here.attempt.run.describe(exception)

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        here = _processing(message) or _open(broker, message)  # who skipped it may stand before us
        here.state = "ignored"

    def before_ack(self, broker: Broker, message: MessageProxy) -> None:
        here = _processing(message)
        if here is not None:
            # Not failed in spite of an exception: sent again, or there is no `Retries` to fail it.
            _close(here, "retry" if here.error and here.requeued else here.state)

    def before_nack(self, broker: Broker, message: MessageProxy) -> None:
        here = _processing(message)
        if here is not None:
            # Without an exception, a middleware has failed it: an age limit, for one.
            _close(here, here.state if here.error else "rejected")

    # -- the worker process --------------------------------------------------------------------

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        tasks.worker_booting()

    def after_worker_boot(self, broker: Broker, worker: Worker) -> None:
        tasks.worker_ready()
        configured = collector.configured()
        if configured is not None and configured.active:
            self._look = _Look()
            self._look.start()

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        # Threads that have outlasted --worker-shutdown-timeout are left to die: their runs end here.
        if self._look is not None:
            self._look.over.set()
            self._look = None
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


def _close(here: _Processing, state: str) -> None:
    tasks.close(here.attempt, state, **here.error)
    _here.processing = None
    tasks.flush(here.attempt)


# -- translation -------------------------------------------------------------------------------


def _describe(message: MessageProxy) -> tasks.Task:
    options = message.options
    carried = _carried(options)
    if "enqueued_at" not in carried:  # sent by a process without the middleware
        sent_at = options.get("requeue_timestamp") or message.message_timestamp
        carried = {**carried, "enqueued_at": sent_at / 1000}
    args, kwargs = message.args, message.kwargs
    return tasks.Task(
        framework=_FRAMEWORK,
        name=message.actor_name,
        task_id=message.message_id,
        attempt=(options.get("retries") or 0) + 1,
        queue=message.queue_name,
        worker=f"{socket.gethostname()}:{os.getpid()}",
        redelivered=bool(getattr(message, "redelivered", False)),  # RabbitMQ's say so
        eta=carried.get("eta"),
        message={**options, lineage.HEADER: carried},
        parent_task_id=carried.get("parent_task_id") or "",
        group_id=options.get("group_completion_uuid") or "",
        inputs=lambda: {"args": reduce(args), "kwargs": reduce(kwargs)},
    )


def _options(broker: Broker, message: MessageProxy) -> tasks.Options:
    try:
        actor = broker.get_actor(message.actor_name)
    except ActorNotFound:
        return tasks.Options()
    # Marked above @dramatiq.actor, the actor carries it; below, its function.
    return tasks.options_of(actor, actor.fn)


def _carried(options: dict[str, Any]) -> dict[str, Any]:
    carried = options.get(lineage.HEADER)
    return carried if isinstance(carried, dict) else {}
