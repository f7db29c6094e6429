"""Starlette and FastAPI: this middleware makes each background task of an app a run.

    app.add_middleware(waxell_workers.starlette.WaxellMiddleware)

A task is seen where Starlette itself makes and calls it: `BackgroundTask.__init__` and `__call__` are wrapped
once, when the first middleware is made, and do nothing of their own outside a request that came through one.
A request is a run only if it enqueues a message outside any other, and then never the current one. The
response is not touched, and nothing here blocks the event loop.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .core import lineage, tasks, w3c
from .core.collector import Collector, configured
from .core.encoding import reduce
from .core.ids import new_id
from .core.runs import Run, state_of

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
        scope[_SEEN] = True
        request = _Request(_framework(scope.get("app", self.app)), scope, send)
        outer, origin, around = _current.get(), lineage.origin.get(), w3c.around.get()
        _current.set(request)
        lineage.origin.set(request.as_origin)
        w3c.around.set(request.place())
        self._requests += 1
        try:
            try:
                await self.app(scope, receive, request.send)
            except BaseException as error:
                request.over(error)
                if isinstance(error, Exception):
                    await request.flush()
                raise
            request.over(None)
            await request.flush()
        finally:
            self._requests -= 1
            _current.set(outer)
            lineage.origin.set(origin)
            w3c.around.set(around)

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


class _RequestRun(Run):
    """The run of a request: the parent of what it enqueues, and of its background tasks."""

    __slots__ = ()

    @property
    def passes_on(self) -> dict[str, Any] | None:
        """Nothing: its metadata is ours, not the user's."""
        return None


class _Request:
    """One request: what its tasks inherit from it, and whether its end is to wait for a flush."""

    __slots__ = (
        "_began",
        "_collector",
        "_end",
        "_flush_timeout",
        "_framework",
        "_inherited",
        "_pid",
        "_runs",
        "_scope",
        "_send",
        "_status",
    )

    def __init__(self, framework: str, scope: Scope, send: Send) -> None:
        self._framework = framework
        self._scope = scope
        self._send = send
        self._inherited = _trace_headers(scope)
        self._began = time.perf_counter()
        self._pid = os.getpid()
        self._status = 0
        self._runs: dict[str, Run] = {}
        """At most one; threads of an endpoint may come for it at once, and none of them waits here."""
        self._end: tuple[str, str] | None = None
        """State and reason, once the app has returned."""
        self._collector: Collector | None = None
        self._flush_timeout = 0.0

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message of the response on, and note the status."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
        return self._send(message)

    def place(self) -> w3c.Trace:
        """Return where in a trace all is that begins in this request: the client's, or one of its own."""
        incoming = self._incoming()
        if incoming is not None:
            return incoming
        trace_id = new_id()
        return w3c.Trace(trace_id, trace_id[:16])

    def _incoming(self) -> w3c.Trace | None:
        return w3c.read(*map(self._inherited.get, (w3c.TRACEPARENT, w3c.TRACESTATE)))

    def as_origin(self) -> Run | None:
        """Return this request's run, made now unless it was; None where it is not recorded.

        What the endpoint has left running may enqueue when the request is over: its run begins late, and has
        ended already. A process that it has forked makes none: nobody would end it there.
        """
        run = self.run()
        if run is not None or self._pid != os.getpid():
            return run
        collector, name = configured(), _request_name(self._scope)
        if collector is None or not collector.active or collector.excluded(name):
            return None
        made = _RequestRun(
            collector,
            name,
            self._framework,
            metadata={"framework": self._framework},
            parent_run_id="",
            trace=self._incoming(),
        )
        made.connect()  # whoever else finds it there must find its trace, too
        run = self._runs.setdefault("run", made)
        if run is made:
            made.start(time.perf_counter() - self._began)
            if self._end is not None:
                state, reason = self._end
                made.end(state, reason=reason)
        return run

    def run(self) -> Run | None:
        """Return this request's run if there is one."""
        return self._runs.get("run")

    def over(self, error: BaseException | None) -> None:
        """End the request's run, if there is one, now that the app has returned."""
        state, reason = state_of(error), ""
        if isinstance(error, ClientDisconnect):
            state, reason = "interrupted", "interrupted: the client has gone"
        elif state == "interrupted":
            reason = "interrupted: the request was cancelled"
        elif error is None and self._status >= 500:
            state, reason = "error", f"answered {int(self._status)}"
        self._end = (state, reason)  # first: another thread may be making the run
        run = self.run()
        if run is not None:
            run.end(state, error, reason=reason)

    def added(self, task: BackgroundTask) -> None:
        """Note with a task what is known where it is made: in a sync endpoint, nobody else knows the run."""
        task.__dict__[_ADDED] = _Added({**self._inherited, **self._sent()}, new_id())

    def _sent(self) -> dict[str, Any]:
        """Return what a message would carry; a task alone makes no run of its request."""
        origin = lineage.origin.get()
        lineage.origin.set(self.run)
        try:
            return lineage.outgoing({})
        finally:
            lineage.origin.set(origin)

    def _message(self, added: _Added) -> Mapping[str, Any]:
        """Return what a task has carried; its request may have become a run since."""
        before = added.message.get(lineage.HEADER, {})
        if self.run() is None or "run" in before:
            return added.message
        sent = self._sent()
        return {**added.message, **sent, lineage.HEADER: {**sent.get(lineage.HEADER, {}), **before}}

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
                message=self._message(added),
                inputs=lambda: {"args": reduce(args), "kwargs": reduce(kwargs)},
                nested=True,  # the event loop's thread is no serial slot
            ),
            tasks.options_of(*candidates),
        )

    def end(self, attempt: tasks.Attempt, error: BaseException | None) -> None:
        """Close the run of a task; its flush is the request's."""
        described = {} if error is None else attempt.run.describe(error)
        state = state_of(error)
        reason = (
            f"interrupted: {type(error).__name__} went through the task" if state == "interrupted" else ""
        )
        tasks.close(attempt, state, reason=reason, **described)
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


def _trace_headers(scope: Scope) -> dict[str, str]:
    """Return the trace that the client is in; our own header travels in messages only, not over HTTP."""
    found: dict[str, str] = {}
    for name, value in scope.get("headers", ()):
        if name == b"traceparent":
            found[w3c.TRACEPARENT] = value.decode("latin-1")
        elif name == b"tracestate":  # a list, which may come in parts
            text = value.decode("latin-1")
            before = found.get(w3c.TRACESTATE)
            found[w3c.TRACESTATE] = text if before is None else f"{before},{text}"
    return found


_METHODS = frozenset(
    ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY")
)


def _request_name(scope: Scope) -> str:
    """Return method and template of the route: `POST /tickets/{id}`.

    Nothing of what the client has sent: ids and secrets stand in paths, and a method may be any word. Where
    no route is known, as in other middleware, it is the method alone.
    """
    method = scope.get("method")
    return f"{method if method in _METHODS else 'HTTP'} {_template(scope)}".rstrip()


def _template(scope: Scope) -> str:
    prefix, routes = _mounted(scope)
    route = scope.get("route") or _route_of_endpoint(scope, routes)
    included = scope.get(
        "fastapi"
    )  # FastAPI from 0.13x: the route itself knows nothing of its router's prefix
    context = included.get("effective_route_context") if isinstance(included, dict) else None
    if context is not None and getattr(context, "original_route", None) is route:
        route = context
    path = None if isinstance(route, Mount) else getattr(route, "path_format", None)
    return prefix + path if isinstance(path, str) else prefix


def _mounted(scope: Scope) -> tuple[str, Sequence[BaseRoute]]:
    """Return the template of where the app stands that has the route, and its routes."""
    routes: Sequence[BaseRoute] = getattr(scope.get("router"), "routes", ())
    rest = scope.get("root_path", "").removeprefix(scope.get("app_root_path", scope.get("root_path", "")))
    template = ""
    while rest:
        for route in routes:
            found = route.path_regex.match(rest + "/") if isinstance(route, Mount) else None
            if found is not None and isinstance(route, Mount):
                template += route.path
                rest = ("/" + found["path"]).rstrip("/")
                routes = route.routes
                break
        else:
            return "", ()
    return template, routes


def _route_of_endpoint(scope: Scope, routes: Sequence[BaseRoute]) -> BaseRoute | None:
    """Return the route to an endpoint, where Starlette does not tell it: 0.40 does not."""
    endpoint = scope.get("endpoint")
    path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
    for route in routes if endpoint is not None else ():
        if isinstance(route, Route) and route.endpoint is endpoint and route.path_regex.match(path):
            return route
    return None


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
