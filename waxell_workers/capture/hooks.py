"""What an instrumentor runs where no gate stands: as a stream is read, and where it guards itself.

A gate ends when the call has returned its stream; the instrumentor then reads every chunk on the way to the
caller, and a chunk that it does not understand would fail the caller's loop. Here its hooks are guarded, for
our spans alone: a user's instrumentation behaves as it does without us. And where the instrumentor catches
every `Exception` and logs it, an interrupt of a task framework is let out. Import this only once an SDK has
been imported.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..core.content import is_interrupt
from .calls import BUGS
from .tracer import CallSpan

_logger = logging.getLogger("waxell_workers.capture")

_HOOKS = ("_process_chunk", "_on_stream_end", "_on_stream_error")
"""Of the streams of `opentelemetry.util.genai.stream` (1.3b0): at a chunk, at the end, at an error."""
_PARTS = "opentelemetry.util.genai."
"""What the official instrumentors are made of."""
_LEVELS = ("debug", "info", "warning", "error")
_GIVES_UP = "_accumulation_disabled"
"""Set by anthropic's instrumentor (1.3b0) at the first error in a chunk, an interrupt too: from then on, no
stream in the process has tokens."""


def guard(package: str) -> None:
    """Guard the hooks of all streams of an instrumentor's, and let interrupts out. May be called again."""
    for name, module in list(sys.modules.items()):
        if not f"{name}.".startswith((f"{package}.", _PARTS)) or not isinstance(module, ModuleType):
            continue
        logger = vars(module).get("_logger")
        if isinstance(logger, logging.Logger):
            module._logger = _Logger(logger)  # type: ignore[attr-defined]  # it is there
        for kind in list(vars(module).values()):
            if issubclass(type(kind), type) and kind.__module__ == name:
                _guard_class(kind)


def _guard_class(kind: type[Any]) -> None:
    for name in _HOOKS:
        hook = vars(kind).get(name)
        is_ours = hasattr(hook, "__wrapped__")
        if inspect.isfunction(hook) and not is_ours and not hasattr(hook, "__isabstractmethod__"):
            setattr(kind, name, _guarded(hook))


def _guarded(hook: Callable[..., None]) -> Callable[..., None]:
    is_end = hook.__name__ != "_process_chunk"

    @functools.wraps(hook)
    def guarded(stream: Any, *args: Any) -> None:
        try:
            hook(stream, *args)
        except BUGS as error:
            if _span(stream) is None:
                raise
            _say(error)
            if is_end:
                _end(stream._self_invocation, *args)
        except BaseException as error:
            if is_interrupt(error):
                _do_not_give_up(stream)
                if is_end and _is_open(_span(stream)):
                    hook(stream, *args)  # nobody comes again, and what was answered has cost money
            raise

    return guarded


def _span(stream: Any) -> CallSpan | None:
    """Return the span of a stream, if it is ours."""
    span = getattr(getattr(stream, "_self_invocation", None), "span", None)
    return span if isinstance(span, CallSpan) else None


def _is_open(span: CallSpan | None) -> bool:
    return span is not None and span.is_open


def _end(invocation: Any, error: BaseException | None = None) -> None:
    """End a call whose end the instrumentor could not describe."""
    try:
        if error is None:
            invocation.stop()
        else:
            invocation.fail(error)
    except BUGS:
        invocation.span.end()


def _do_not_give_up(stream: Any) -> None:
    module = sys.modules.get(type(stream).__module__)
    if getattr(module, _GIVES_UP, False):
        setattr(module, _GIVES_UP, False)


class _Logger:
    """An instrumentor's logger, to which it tells what it has caught; an interrupt is raised again.

    A filter would not do: most is told at a level that nobody listens to.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._logger, name)
        return functools.partial(self._tell, found) if name in _LEVELS else found

    def _tell(self, log: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        # Only what is told of is what was caught here: the caller may be handling an interrupt of before.
        error = sys.exc_info()[1] if kwargs.get("exc_info") else None
        try:
            if error is not None and is_interrupt(error):
                raise error
        finally:
            # Its traceback has this frame: a cycle, in which all would live on that the reader has dropped.
            del error
        log(*args, **kwargs)


_said: set[str] = set()


def _say(error: BaseException) -> None:
    kind = type(error).__name__
    if kind not in _said:
        _said.add(kind)
        _logger.warning("a stream was not recorded as it should: its instrumentor failed", exc_info=error)
