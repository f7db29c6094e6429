"""Starlette and FastAPI: this middleware makes each background task of an app a run.

    app.add_middleware(waxell_workers.starlette.WaxellMiddleware)

A task is seen where Starlette itself makes and calls it: `BackgroundTask.__init__` and `__call__` are wrapped
once, when the first middleware is made, and do nothing of their own outside a request that came through one.
The request is no run, the response is not touched, and nothing here blocks the event loop.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
from starlette.background import BackgroundTask
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .core import lineage, tasks, w3c
from .core.collector import Collector
from .core.encoding import reduce
from .core.ids import new_id
from .core.runs import state_of

__all__ = ["WaxellMiddleware"]

logger = logging.getLogger("waxell_workers")

_SEEN = "waxell_workers.request"
"""The key in a request's scope by which a second middleware, or one of a mounted app, knows to stand back."""
_ADDED = "_waxell_added"
"""The attribute of a background task that has what was known when it was made."""
_UNWIND_S = 0.5
"""How long a stopping app waits for requests that its server has cancelled."""
_PAUSE_S = 0.01
_THREADS = 40
"""How many flushes wait at once, each in a thread; anyio's own limit is for the app's threads."""


class WaxellMiddleware:
    """Pure ASGI middleware, anywhere in the list, for the app that has it and all that is mounted in it.

    Args:
        app: the next ASGI app; `add_middleware` gives it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._booted = False
        self._requests = 0
        _watch_background_tasks()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything through; know the request that background tasks belong to."""
        if _SEEN in scope or scope["type"] not in ("http", "lifespan"):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._request(scope, receive, send)
        else:
            await self._lifespan(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._booted:  # no lifespan: switched off, or this is the middleware of a mounted app
            await self._boot()
        request = _Request(_framework(scope.get("app", self.app)), _traceparent(scope))
        scope[_SEEN] = request
        outer = _current.get()
        _current.set(request)
        self._requests += 1
        try:
            try:
                await self.app(scope, receive, send)
            except Exception:
                await request.flush()
                raise
            await request.flush()
        finally:
            self._requests -= 1
            _current.set(outer)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def after_the_app(message: Message) -> None:
            # The app's own startup may call `init`, and its own shutdown may record.
            if message["type"] == "lifespan.startup.complete":
                await self._boot()
            elif message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                await self._stop()
            await send(message)

        scope[_SEEN] = True
        await self.app(scope, receive, after_the_app)

    async def _boot(self) -> None:
        self._booted = True
        await _in_thread(tasks.app_booting)

    async def _stop(self) -> None:
        # With timeout_graceful_shutdown, uvicorn (0.30 to 0.54) cancels requests and begins this before they
        # have unwound; once it is over, it lets a SIGTERM kill the process, without atexit.
        began = time.monotonic()
        with anyio.move_on_after(_UNWIND_S):
            while self._requests:
                await anyio.sleep(_PAUSE_S)
        await _in_thread(tasks.worker_stopping, time.monotonic() - began)


# -- the request that is served here -----------------------------------------------------------


class _Request:
    """One request: what its tasks inherit from it, and whether its end is to wait for a flush."""

    __slots__ = ("_collector", "_flush_timeout", "_framework", "_inherited")

    def __init__(self, framework: str, inherited: Mapping[str, Any]) -> None:
        self._framework = framework
        self._inherited = inherited
        self._collector: Collector | None = None
        self._flush_timeout = 0.0

    def added(self, task: BackgroundTask) -> None:
        """Note with a task what is known where it is made: in a sync endpoint, nobody else knows the run."""
        message = {**self._inherited, **lineage.outgoing({})}
        task.__dict__[_ADDED] = _Added(message, new_id())

    def prepare(self, task: BackgroundTask) -> tasks.Attempt:
        """Make the attempt of a task; it is not begun yet."""
        added: _Added = task.__dict__.get(_ADDED) or _Added(self._inherited, new_id())
        added.attempts += 1
        function, args, kwargs = task.func, task.args, task.kwargs
        candidates = _unwrapped(function)
        return tasks.prepare(
            tasks.Task(
                framework=self._framework,
                name=_name(candidates[-1]),
                task_id=added.task_id,
                attempt=added.attempts,
                message=added.message,
                inputs=lambda: {"args": reduce(args), "kwargs": reduce(kwargs)},
                nested=True,  # the event loop's thread is no serial slot
            ),
            tasks.options_of(*candidates),
        )

    def end(self, attempt: tasks.Attempt, error: BaseException | None) -> None:
        """Close the run of a task; its flush is the request's."""
        described = {} if error is None else attempt.run.describe(error)
        tasks.close(attempt, state_of(error), **described)
        if attempt.flush == "task":
            self._collector = attempt.collector
            self._flush_timeout = max(self._flush_timeout, attempt.flush_timeout)

    async def flush(self) -> None:
        """Wait, once for all tasks, until their records are at the server, if one of them asked for it."""
        collector, timeout = self._collector, self._flush_timeout
        if collector is None or timeout <= 0:
            return
        deadline = time.monotonic() + timeout
        with anyio.move_on_after(timeout):  # also while all threads are taken
            await _in_thread(lambda: collector.force_flush(deadline - time.monotonic()))


class _Added:
    """What is known of a task since it was made."""

    __slots__ = ("attempts", "message", "task_id")

    def __init__(self, message: Mapping[str, Any], task_id: str) -> None:
        self.message = message
        self.task_id = task_id
        self.attempts = 0


_current: ContextVar[_Request | None] = ContextVar("waxell_request", default=None)


@functools.cache
def _watch_background_tasks() -> None:
    """Wrap the two methods through which each background task goes, in Starlette 0.36 to 1.10 and FastAPI.

    A subclass of `BackgroundTasks` would miss the response argument, a wrapper around each function would
    change the user's objects; middleware alone does not see where one task ends and the next begins.
    """
    make, run = BackgroundTask.__init__, BackgroundTask.__call__

    @functools.wraps(make)
    def __init__(self: BackgroundTask, /, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        request = _current.get()
        if request is not None:
            request.added(self)

    @functools.wraps(run)
    async def __call__(self: BackgroundTask) -> None:
        request = _current.get()
        if request is None:
            await run(self)
            return
        attempt = request.prepare(self)
        try:
            tasks.begin(attempt)
            await run(self)
        except BaseException as error:
            request.end(attempt, error)
            raise
        request.end(attempt, None)

    BackgroundTask.__init__ = __init__  # type: ignore[method-assign,assignment]
    BackgroundTask.__call__ = __call__  # type: ignore[method-assign]


# -- translation -------------------------------------------------------------------------------


def _unwrapped(function: object) -> list[object]:
    """Return a task's function and, if it is a partial, what it is one of."""
    found = [function]
    while isinstance(function, functools.partial):
        function = function.func
        found.append(function)
    return found


def _name(function: object) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__


def _framework(app: object) -> str:
    """Return `fastapi` for a FastAPI app, whichever module the middleware came from."""
    fastapi = any(kind.__module__.split(".", 1)[0] == "fastapi" for kind in type(app).__mro__)
    return "fastapi" if fastapi else "starlette"


def _traceparent(scope: Scope) -> dict[str, str]:
    """Return the trace that the client is in; our own header travels in messages only, not over HTTP."""
    for name, value in scope.get("headers", ()):
        if name == b"traceparent":
            return {w3c.TRACEPARENT: value.decode("latin-1")}
    return {}


_limiters: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar("waxell_threads")


async def _in_thread(function: Callable[..., object], *args: object) -> None:
    """Run something that may wait without blocking the event loop, asyncio's or trio's."""
    try:
        limiter = _limiters.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(_THREADS)
        _limiters.set(limiter)
    try:
        await anyio.to_thread.run_sync(function, *args, limiter=limiter)
    except RuntimeError as error:  # no more threads: nothing is lost, the records are in the journal
        logger.warning("nothing was waited for: %s", error)
