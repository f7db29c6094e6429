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

import copy
import inspect
import logging
from collections.abc import Callable, Coroutine
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

from opentelemetry import context as otel
from opentelemetry.context import Context, attach, get_current
from wrapt import ObjectProxy

from . import semconv
from .calls import BUGS, billed_attributes
from .streams import link
from .tracer import KNOWN, OPENED

_logger = logging.getLogger("waxell_workers.capture")

_OURS = "waxell_workers.capture.open_call"
"""Set to the SDK's name in the caller's context while a call of ours is open: a call of the same SDK within
it (`parse()` calls `create()` in some versions) belongs to it."""

_WRAPPED_STREAM = "_self_is_response_stream_wrapper"
"""By this mark of 1.3b0, a wrapped stream manager takes a stream for its own and leaves its call open."""

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
    """The SDK's method, to be called in the caller's context and, where that matters, with its values."""

    __slots__ = (
        *("__wrapped__", "called", "context", "kept", "opened", "result", "returned", "shown", "values"),
        "variables",
    )

    def __init__(
        self,
        wrapped: Callable[..., Any],
        context: Context,
        kept: dict[str, Any],
        opened: list[Any],
        variables: tuple[ContextVar[Any], ...],
    ) -> None:
        self.__wrapped__ = wrapped  # where `inspect.signature` looks, which the instrumentor asks
        self.context = context
        self.kept = kept
        self.called = False
        self.returned = False
        self.opened = opened
        self.variables = variables
        self.values: list[tuple[ContextVar[Any], Any]] = []
        self.result: Any = None
        self.shown: Any = None
        """What the instrumentor gets for the result, where that is something else."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        token = attach(self.context)
        try:
            result = self.__wrapped__(*args, **{**kwargs, **self.kept})
        except BaseException as error:
            self._note(error)
            raise
        finally:
            detach(token)
        # Asked of what came back: a decorator of the SDK's may hide that a method is a coroutine function.
        if inspect.iscoroutine(result):
            return self._awaited(result, kwargs)
        self._has_returned(result)
        return self._show(result)

    def _note(self, error: BaseException) -> None:
        """Keep what an error tells about an answer that was paid for."""
        for span in self.opened:
            span.set_attributes(billed_attributes(error))

    def _show(self, result: Any) -> Any:
        """Return what the instrumentor sees: raw embeddings parsed, which 1.3b0 does not do itself.

        Not those of `with_streaming_response`: their body is the caller's to read.
        """
        is_raw = type(result).__name__ == "LegacyAPIResponse"
        if is_raw and self.__wrapped__.__qualname__.startswith(("Embeddings.", "AsyncEmbeddings.")):
            self.shown = result.parse()
            return self.shown
        return result

    def given(self, heard: Any) -> Any:
        """Return what the caller gets, where the instrumentor returns `heard`."""
        for variable, value in self.values:
            variable.set(value)
        if heard is None or heard is self.shown:
            return self.result
        link(heard, self.result)
        return heard

    def _has_returned(self, result: Any) -> None:
        self.result = result
        self.values = [(variable, variable.get(None)) for variable in self.variables]
        self.returned = True
        if not hasattr(result, "http_response"):  # its reader may still fail
            for span in self.opened:
                span.is_answered = True

    async def _awaited(self, coroutine: Coroutine[Any, Any, Any], kwargs: dict[str, Any]) -> Any:
        token = attach(self.context)
        try:
            result = await coroutine
            self._has_returned(result)
        except BaseException as error:
            self._note(error)
            raise
        finally:
            detach(token)
        # openai's `with_streaming_response`: 1.3b0 calls the coroutine function and never awaits it. The body
        # is the caller's to read, so that the call is told without its tokens.
        streaming = f"{type(result).__module__}.".startswith("openai.") and inspect.iscoroutinefunction(
            getattr(result, "parse", None)
        )
        return None if streaming and not kwargs.get("stream") else self._show(result)


@dataclass(frozen=True, slots=True)
class Passage:
    """How calls pass through the gates of one SDK."""

    is_open: Callable[[], bool]
    """Asked at every call; while it is false, calls go straight through."""
    mark: str = ""
    """Not empty where the SDK's methods call each other: a call in a call of the same mark belongs to it."""
    kept: tuple[str, ...] = ()
    """Arguments that the instrumentor changes: it gets a copy, and the SDK what the caller gave."""
    has_managers: bool = False
    """True if a method named `stream` returns a manager, and makes its call when that is entered."""
    variables: tuple[ContextVar[Any], ...] = ()
    """What an instrumentor reads after a call, and clears, though another one may want to read it then."""


class _Call:
    """One call through a gate: the two contexts, and the spans that were opened for it."""

    __slots__ = ("inside", "method", "opened", "outside", "passage")

    def __init__(
        self, passage: Passage, wrapped: Callable[..., Any], instance: Any, kwargs: dict[str, Any]
    ) -> None:
        self.passage = passage
        self.opened: list[Any] = []
        self.outside = get_current()
        known = _known(instance, is_stream=bool(kwargs.get("stream")))
        self.inside = Context({**_without_open_calls(self.outside), OPENED: self.opened, KNOWN: known})
        kept = {name: kwargs[name] for name in passage.kept if name in kwargs}
        self.method = _Method(
            wrapped, _marked(self.outside, passage.mark), kept, self.opened, passage.variables
        )

    def run(self, wrapper: Wrapper, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the wrapper in its context; what it returns may be a coroutine that has not begun."""
        result = None
        token = attach(self.inside)
        try:
            kept = self.method.kept
            seen = {**kwargs, **{name: copy.copy(value) for name, value in kept.items()}} if kept else kwargs
            result = wrapper(self.method, instance, args, seen)
            _suspend(result, self.opened)
            return self.method.given(result) if self.method.returned else result
        except BaseException as error:
            _suspend(result, self.opened)
            if not self._is_defect(error):
                self._fail(error)
                raise
            _say_defect(error)
        finally:
            detach(token)
        result = self.method.result if self.method.returned else self.method.__wrapped__(*args, **kwargs)
        self._end()
        return result

    async def finish(
        self, coroutine: Coroutine[Any, Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Await what the wrapper returned, in its context."""
        method = self.method
        result = None
        token = attach(self.inside)
        try:
            result = await coroutine
            _suspend(result, self.opened)
            return method.given(result)
        except BaseException as error:
            _suspend(result, self.opened)
            if not self._is_defect(error):
                self._fail(error)
                raise
            _say_defect(error)
        finally:
            detach(token)
        result = method.result if method.returned else await method.__wrapped__(*args, **kwargs)
        self._end()
        return result

    def restore(self) -> None:
        """Make the caller's context current again, if an interrupt has prevented that."""
        _restore(self.outside, self.opened)

    def _is_defect(self, error: BaseException) -> bool:
        """True for an error of the instrumentor's own; not for one of the SDK's, nor for an interrupt."""
        return isinstance(error, BUGS) and (self.method.returned or not self.method.called)

    def _fail(self, error: BaseException) -> None:
        """End what the instrumentor has left open."""
        for span in self.opened:
            span.fail(error)

    def _end(self) -> None:
        """End what a defect has left open: the call itself has succeeded."""
        for span in self.opened:
            if span.is_open:
                span.end()


def _restore(outside: Context, opened: list[Any]) -> None:
    """Make a caller's context current again, where one of the call that opened these spans still is.

    That need not be the one we made: the instrumentor makes its own of it, and may leave that to us.
    """
    if get_current().get(OPENED) is opened:
        attach(outside)


def _suspend(result: Any, opened: list[Any]) -> None:
    """Let a stream, its manager or a raw response not restore our context at its end: that is over by then.

    Anthropic's instrumentor (1.3b0) leaves its context attached until then; the others do this themselves.
    """
    if not isinstance(result, ObjectProxy):
        return
    invocation = getattr(result, "_self_invocation", None)
    span = getattr(invocation, "span", None)
    if any(span is ours for ours in opened):
        invocation.suspend()  # type: ignore[union-attr]  # it has a span


def gate(wrapper: Wrapper, passage: Passage) -> Wrapper:
    """Return a wrapper, in wrapt's sense, that isolates `wrapper` from all others.

    Arguments:
        wrapper: called with (wrapped, instance, args, kwargs); what it returns may be a coroutine.
        passage: when the gate is open, and for what.
    """

    def gated(
        wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if _is_inside(passage.mark) or not passage.is_open():
            return wrapped(*args, **kwargs)
        if passage.has_managers and getattr(wrapped, "__name__", "") == "stream":
            return _manager_gate(wrapper, wrapped, instance, args, kwargs, passage.mark)
        call = _Call(passage, wrapped, instance, kwargs)
        try:
            result = call.run(wrapper, instance, args, kwargs)
        except BaseException:
            call.restore()
            raise
        return _awaited(call, result, args, kwargs) if inspect.iscoroutine(result) else result

    return gated


async def _awaited(
    call: _Call, coroutine: Coroutine[Any, Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    try:
        return await call.finish(coroutine, args, kwargs)
    except BaseException:
        call.restore()
        raise


def _is_inside(mark: str) -> bool:
    return bool(mark) and get_current().get(_OURS) == mark


def _marked(context: Context, mark: str) -> Context:
    return Context({**context, _OURS: mark}) if mark else context


def _without_open_calls(context: Context) -> Context:
    open_calls = [key for key in context if key.startswith(semconv.OPEN_CALL_PREFIX)]
    if not open_calls:
        return context
    return Context({key: value for key, value in context.items() if key not in open_calls})


def _known(instance: Any, *, is_stream: bool) -> dict[str, Any]:
    """Return the attributes of a call that instrumentors do not tell, or not always."""
    # 1.3b0 says that it is a stream once there is one.
    known: dict[str, Any] = {semconv.REQUEST_STREAM: True} if is_stream else {}
    client = type(getattr(instance, "_client", None))
    if any(kind.__name__ in ("AzureOpenAI", "AsyncAzureOpenAI") for kind in client.__mro__):
        known[semconv.PROVIDER] = semconv.AZURE
    return known


_said: set[str] = set()


def _say_defect(error: BaseException) -> None:
    kind = type(error).__name__
    if kind not in _said:
        _said.add(kind)
        _logger.warning("a call was not recorded as it should: its instrumentor failed", exc_info=error)


# `responses.stream()` returns a manager, and the call begins when that is entered: contexts are switched
# there, with a proxy on either side of our manager.


class _Doorway:
    """Between the proxies of one manager: the caller's context, and how far the SDK has come."""

    __slots__ = ("called", "context", "known", "manager", "mark", "opened", "returned", "stream")

    def __init__(self, mark: str, known: dict[str, Any]) -> None:
        self.mark = mark
        self.known = known
        self.context = Context()
        self.opened: list[Any] = []
        self.manager: Any = None
        """The SDK's, once there is one."""
        self.called = False
        self.returned = False
        self.stream: Any = None

    def is_defect(self, error: BaseException) -> bool:
        """True for an error of the instrumentor's own; not for one of the SDK's, nor for an interrupt."""
        return isinstance(error, BUGS) and (self.returned or not self.called)

    def answer(self, stream: Any) -> Any:
        """Note what the SDK's manager returned."""
        self.stream = _unmarked(stream)
        self.returned = True
        return self.stream


def _manager_gate(
    wrapper: Wrapper,
    wrapped: Callable[..., Any],
    instance: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mark: str,
) -> Any:
    doorway = _Doorway(mark, _known(instance, is_stream=True))

    def method(*args: Any, **kwargs: Any) -> Any:
        doorway.called = True
        doorway.manager = wrapped(*args, **kwargs)
        doorway.called = False
        return _Inner(doorway.manager, doorway)

    outside = get_current()
    try:
        return _Outer(wrapper(method, instance, args, kwargs), doorway)
    except BaseException as error:
        if get_current() is not outside:
            attach(outside)
        if not doorway.is_defect(error):
            raise
        _say_defect(error)
    return wrapped(*args, **kwargs) if doorway.manager is None else doorway.manager


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
        outside = get_current()
        doorway = self._self_doorway
        try:
            token = self._enter(outside)
            try:
                stream = self.__wrapped__.__enter__()
                _suspend(self.__wrapped__, doorway.opened)
                return _unmarked(stream)
            finally:
                detach(token)
        except BaseException as error:
            _suspend(self.__wrapped__, doorway.opened)
            if not self._steps_aside(error, outside):
                raise
        return doorway.stream if doorway.returned else doorway.manager.__enter__()

    async def __aenter__(self) -> Any:
        outside = get_current()
        doorway = self._self_doorway
        try:
            token = self._enter(outside)
            try:
                stream = await self.__wrapped__.__aenter__()
                _suspend(self.__wrapped__, doorway.opened)
                return _unmarked(stream)
            finally:
                detach(token)
        except BaseException as error:
            _suspend(self.__wrapped__, doorway.opened)
            if not self._steps_aside(error, outside):
                raise
        return doorway.stream if doorway.returned else await doorway.manager.__aenter__()

    def _enter(self, outside: Context) -> Token[Context]:
        doorway = self._self_doorway
        doorway.context = _marked(outside, doorway.mark)
        inside = {**_without_open_calls(outside), OPENED: doorway.opened, KNOWN: doorway.known}
        return attach(Context(inside))

    def _steps_aside(self, error: BaseException, outside: Context) -> bool:
        """Leave the caller alone with the SDK's manager; False for an error that is no defect."""
        doorway = self._self_doorway
        _restore(outside, doorway.opened)
        if not doorway.is_defect(error):
            for span in doorway.opened:
                span.fail(error)
            return False
        _say_defect(error)
        self.__wrapped__ = doorway.manager
        for span in doorway.opened:
            if span.is_open:
                span.end()
        return True


class _Inner(_Manager):
    """What our manager gets: the SDK's (or the user's), entered in the caller's context."""

    def __enter__(self) -> Any:
        doorway = self._self_doorway
        doorway.called = True
        token = attach(doorway.context)
        try:
            return doorway.answer(self.__wrapped__.__enter__())
        finally:
            detach(token)

    async def __aenter__(self) -> Any:
        doorway = self._self_doorway
        doorway.called = True
        token = attach(doorway.context)
        try:
            return doorway.answer(await self.__wrapped__.__aenter__())
        finally:
            detach(token)


def _unmarked(stream: Any) -> Any:
    if getattr(stream, _WRAPPED_STREAM, False):
        setattr(stream, _WRAPPED_STREAM, False)
    return stream
