"""Two instrumentors on one SDK, neither of which notices the other.

An instrumented method asks the OpenTelemetry context whether it runs inside another instrumented call, and if
so, tells nothing. A user's instrumentation and ours would therefore silence each other, in whichever order
they came. A gate stands around each of our wrappers and switches the context: our wrapper runs in one in
which no call is open, the SDK's method (which may be the user's wrapper) runs in the caller's own.

A gate also keeps the promise that nothing of ours raises into a task: where the instrumentation itself fails,
the SDK's method is called, or its result returned, as if nobody listened. It restores the caller's context
even where an interrupt surfaced between two lines of the instrumentor.

Import this only once an SDK has been imported: it imports OpenTelemetry and wrapt.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextvars import Token
from typing import Any

from opentelemetry import context as otel
from opentelemetry.context import Context, attach, get_current
from wrapt import ObjectProxy

from . import semconv

_logger = logging.getLogger("waxell_workers.capture")

_OURS = "waxell_workers.capture.open_call"
"""Set in the caller's context while a call of ours is open: a call within it (`parse()` calls `create()` in
some versions of the SDK) belongs to it."""

_WRAPPED_STREAM = "_self_is_response_stream_wrapper"
"""By this mark of 1.3b0, a wrapped stream manager takes a stream for its own and leaves its call open."""

BUGS = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What a defect of an instrumentor raises. No interrupt of a task framework is among them."""

Wrapper = Callable[..., Any]


def detach(token: Token[Context]) -> None:
    """Restore the context that was current before `attach`; by OpenTelemetry's own way only where it must be.

    That catches and logs every `Exception` that surfaces in it, a soft time limit too.
    """
    if type(token) is not Token:  # a runtime context of the user's choice
        otel.detach(token)
        return
    try:
        token.var.reset(token)
    except ValueError:  # a coroutine that another context closes
        pass


class _Method:
    """The SDK's method, to be called in the caller's context; knows how far it got."""

    __slots__ = ("__wrapped__", "called", "context", "result", "returned")

    def __init__(self, wrapped: Callable[..., Any], context: Context) -> None:
        self.__wrapped__ = wrapped  # where `inspect.signature` looks, which the instrumentor asks
        self.context = context
        self.called = False
        self.returned = False
        self.result: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        token = attach(self.context)
        try:
            self.result = self.__wrapped__(*args, **kwargs)
            self.returned = True
        finally:
            detach(token)
        return self.result


class _AsyncMethod(_Method):
    """The same for a coroutine function."""

    __slots__ = ()

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        token = attach(self.context)
        try:
            self.result = await self.__wrapped__(*args, **kwargs)
            self.returned = True
        finally:
            detach(token)
        # `with_streaming_response`: 1.3b0 calls the coroutine function and never awaits it. The body is the
        # caller's to read, so that the call is told without its tokens.
        streaming = inspect.iscoroutinefunction(getattr(self.result, "parse", None))
        return None if streaming and not kwargs.get("stream") else self.result


def gate(wrapper: Wrapper, is_open: Callable[[], bool]) -> Wrapper:
    """Return a wrapper, in wrapt's sense, that isolates `wrapper` from all others.

    Arguments:
        wrapper: called with (wrapped, instance, args, kwargs); a coroutine function for such a method.
        is_open: asked at every call; while it is false, calls go straight through.
    """
    if inspect.iscoroutinefunction(wrapper):

        async def async_gate(
            wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            outside = get_current()
            if _OURS in outside or not is_open():
                return await wrapped(*args, **kwargs)
            method = _AsyncMethod(wrapped, _with_ours(outside))
            token = attach(_without_open_calls(outside))
            try:
                result = await wrapper(method, instance, args, kwargs)
                return method.result if result is None else result
            except BUGS as error:
                if method.called and not method.returned:
                    raise
                _say_defect(error)
            finally:
                detach(token)
            return method.result if method.returned else await wrapped(*args, **kwargs)

        return async_gate

    def sync_gate(
        wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        outside = get_current()
        if _OURS in outside or not is_open():
            return wrapped(*args, **kwargs)
        if wrapped.__name__ == "stream":
            return _manager_gate(wrapper, wrapped, instance, args, kwargs)
        method = _Method(wrapped, _with_ours(outside))
        token = attach(_without_open_calls(outside))
        try:
            return wrapper(method, instance, args, kwargs)
        except BUGS as error:
            if method.called and not method.returned:
                raise
            _say_defect(error)
        finally:
            detach(token)
        return method.result if method.returned else wrapped(*args, **kwargs)

    return sync_gate


def _with_ours(context: Context) -> Context:
    return Context({**context, _OURS: True})


def _without_open_calls(context: Context) -> Context:
    open_calls = [key for key in context if key.startswith(semconv.OPEN_CALL_PREFIX)]
    if not open_calls:
        return context
    return Context({key: value for key, value in context.items() if key not in open_calls})


_said: set[str] = set()


def _say_defect(error: Exception) -> None:
    kind = type(error).__name__
    if kind not in _said:
        _said.add(kind)
        _logger.warning("a call was not recorded as it should: its instrumentor failed", exc_info=error)


# `responses.stream()` returns a manager, and the call begins when that is entered: contexts are switched
# there, with a proxy on either side of our manager.


class _Doorway:
    """Hands the context of the caller who enters from the outer proxy to the inner one."""

    __slots__ = ("context",)

    def __init__(self) -> None:
        self.context = Context()


def _manager_gate(
    wrapper: Wrapper,
    wrapped: Callable[..., Any],
    instance: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    doorway = _Doorway()

    def method(*args: Any, **kwargs: Any) -> Any:
        return _Inner(wrapped(*args, **kwargs), doorway)

    return _Outer(wrapper(method, instance, args, kwargs), doorway)


class _Manager(ObjectProxy):  # type: ignore[type-arg]  # generic for type checkers alone
    """Entered either way, as wrapt's proxies offer it whatever they stand for."""

    def __init__(self, manager: Any, doorway: _Doorway) -> None:
        super().__init__(manager)
        self._self_doorway = doorway

    def __exit__(self, *exc_info: Any) -> Any:
        return self.__wrapped__.__exit__(*exc_info)

    async def __aexit__(self, *exc_info: Any) -> Any:
        return await self.__wrapped__.__aexit__(*exc_info)


class _Outer(_Manager):
    """What the caller gets: our manager, entered in a context in which no call is open."""

    def __enter__(self) -> Any:
        token = self._enter()
        try:
            return _unmarked(self.__wrapped__.__enter__())
        finally:
            detach(token)

    async def __aenter__(self) -> Any:
        token = self._enter()
        try:
            return _unmarked(await self.__wrapped__.__aenter__())
        finally:
            detach(token)

    def _enter(self) -> Token[Context]:
        outside = get_current()
        self._self_doorway.context = _with_ours(outside)
        return attach(_without_open_calls(outside))


class _Inner(_Manager):
    """What our manager gets: the SDK's (or the user's), entered in the caller's context."""

    def __enter__(self) -> Any:
        token = attach(self._self_doorway.context)
        try:
            return _unmarked(self.__wrapped__.__enter__())
        finally:
            detach(token)

    async def __aenter__(self) -> Any:
        token = attach(self._self_doorway.context)
        try:
            return _unmarked(await self.__wrapped__.__aenter__())
        finally:
            detach(token)


def _unmarked(stream: Any) -> Any:
    if getattr(stream, _WRAPPED_STREAM, False):
        setattr(stream, _WRAPPED_STREAM, False)
    return stream
