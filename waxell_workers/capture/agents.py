"""Hearing openai-agents: a `TracingProcessor` of ours, beside those of the user, which stay as they are.

What an agent does (tools, handoffs, guardrails, …) becomes steps of the run that is current where it begins.
A generation becomes a call, unless the SDK beneath it was heard (`nesting`). A processor is called in the
agent's own thread and context: here is no lock, network or import, and nothing is raised into the agent but
an interrupt. What is known of an open span hangs on the span itself, so that one that never ends is forgotten
with it. Imports neither openai-agents nor OpenTelemetry.
"""

from __future__ import annotations

import logging
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

from ..core.content import error_message, error_type, is_interrupt
from ..core.ids import new_id
from . import nesting
from .calls import Listener, error_text, short_error_type
from .generations import generation_fields, get, response_fields, text_of
from .platform import platform_sdk_is_active
from .sdks import Sdk

_logger = logging.getLogger("waxell_workers.capture")

_TRACING = "agents.tracing"
_OPENED = "_waxell_workers"
"""The attribute of a span in which stands what we know of it."""

_CALLS = {"generation": generation_fields, "response": response_fields}

_NAMES: dict[str, Callable[[Any], str]] = {
    "agent": lambda data: f"agent: {_name(data, 'name')}",
    "function": lambda data: f"tool: {_name(data, 'name')}",
    "handoff": lambda data: f"handoff: {_name(data, 'from_agent')} → {_name(data, 'to_agent')}",
    "guardrail": lambda data: (
        f"guardrail: {_name(data, 'name')}{' (triggered)' if get(data, 'triggered') is True else ''}"
    ),
    "custom": lambda data: f"custom: {_name(data, 'name')}",
    "mcp_tools": lambda data: f"mcp tools: {_name(data, 'server')}",
    "transcription": lambda data: f"transcription: {_name(data, 'model')}",
    "speech": lambda data: f"speech: {_name(data, 'model')}",
    "speech_group": lambda _: "speech group",
}
"""Types of spans that become steps. Not `task` and `turn` (0.24), which only frame others, and sum up."""

_CONTENT = {
    "function": ("input", "output"),
    "custom": ("data",),
    "mcp_tools": ("result",),
    "transcription": ("output",),  # its input is sound, and so is what a speech puts out
    "speech": ("input",),
    "speech_group": ("input",),
}

_HARMLESS = frozenset(
    {
        "Error getting response",
        "Error running tool",
        "Error running tool (non-fatal)",
        "Error streaming response",
        "Guardrail tripwire triggered",
        "Invalid JSON",
        "Invalid JSON provided",
        "Max turns exceeded",
        "Tool execution rejected",
        "Tool not found",
    }
)
"""Messages of span errors that are constants of openai-agents; others may quote what was said."""


def _name(data: Any, attribute: str) -> str:
    return text_of(get(data, attribute)) or "?"


class _Span:
    """What is known of an open span, of whatever type: by whom its children name their parent."""

    def __init__(self, span: Any, listener: Listener, parent_id: str) -> None:
        self._id = new_id()
        self._listener = listener
        self._at = time.time()
        self._started = time.perf_counter()
        self._handled = id(sys.exc_info()[1])
        self._wants_content = listener.wants_content()
        self._parent_id = parent_id
        self.step_id = parent_id
        """The span id of the nearest step around what begins inside it."""

    def end(self, span: Any) -> None:
        """Tell what became of it."""

    def _duration_ms(self) -> float:
        return (time.perf_counter() - self._started) * 1000

    def _error(self, span: Any) -> tuple[str, str, str]:
        """Return an error's type, what openai-agents says of it, and what it quotes; empty without one.

        An exception that unwinds the span's block is the one that is handled now, and was not at the start.
        """
        said = get(span, "error")
        message = text_of(get(said, "message"))
        detail = text_of(get(get(said, "data"), "error"))
        error = sys.exc_info()[1]
        if error is None or id(error) == self._handled or isinstance(error, GeneratorExit):
            return "", message or ("error" if said else ""), detail
        kind = short_error_type(error_type(error))
        return kind, message, detail or error_message(error, wants_content=self._wants_content)


class _Step(_Span):
    """A span that becomes a step of a run."""

    def __init__(self, span: Any, listener: Listener, parent_id: str, *, run_id: str, position: int) -> None:
        super().__init__(span, listener, parent_id)
        self._run_id = run_id
        self._position = position
        self.step_id = text_of(get(span, "span_id"))

    def end(self, span: Any) -> None:
        """Record the step."""
        data = get(span, "span_data")
        kind = get(data, "type")
        output = {
            "type": kind,
            "span_id": self.step_id,
            "parent_id": self._parent_id,
            "trace_id": text_of(get(span, "trace_id")),
            "duration_ms": self._duration_ms(),
            **self._failure(span),
        }
        if self._wants_content:
            found = {name: get(data, name) for name in _CONTENT.get(kind, ())}
            output |= {name: value for name, value in found.items() if value is not None}
        self._listener.step_sink(
            id=self._id,
            at=self._at,
            run_id=self._run_id,
            position=self._position,
            name=_NAMES[kind](data),
            output=output,
        )

    def _failure(self, span: Any) -> dict[str, str]:
        kind, message, detail = self._error(span)
        if self._wants_content:
            text = ": ".join(filter(None, (message, detail)))
        else:
            text = message if message in _HARMLESS else "error" if message else ""
        return {name: told for name, told in (("error_type", kind), ("error", text)) if told}


class _Call(nesting.Layer, _Span):
    """A span that becomes a call, unless one is told inside it."""

    def __init__(self, span: Any, listener: Listener, parent_id: str) -> None:
        self._span = weakref.ref(span)
        _Span.__init__(self, span, listener, parent_id)
        nesting.Layer.__init__(self, nesting.enclosing(None), is_framework=True)
        self._run_id = listener.current_run()
        nesting.enter(self)

    @property
    def is_open(self) -> bool:
        """True until the end; a span that nobody has any more never gets one."""
        return self._is_open and self._span() is not None

    @is_open.setter
    def is_open(self, is_open: bool) -> None:
        self._is_open = is_open

    def end(self, span: Any) -> None:
        """Record the call."""
        nesting.leave(self)
        self.is_open = False
        if self.is_superseded():
            return
        data = get(span, "span_data")
        fields = _CALLS[get(data, "type")](data, self._wants_content)
        kind, message, detail = self._error(span)
        if kind or message:
            fields["status"] = "error"
            fields["error_type"] = kind
            fields["error_message"] = error_text(detail or message, self._wants_content)
        elif isinstance(sys.exc_info()[1], GeneratorExit) and "tokens_out" not in fields:
            fields["metadata"] = {"stream": "left early"}
        try:
            self._listener.sink(
                id=self._id, at=self._at, run_id=self._run_id, duration_ms=self._duration_ms(), **fields
            )
        finally:
            self.is_told = True


class Processor:
    """A `TracingProcessor` by its methods; there is one, and without a listener it does nothing.

    Interrupts pass. Later versions (0.6, not 0.2) call each processor in a guard that logs and drops every
    `Exception`, a soft time limit that surfaces here with the rest; the guard is not ours to open.
    """

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self._said: set[str] = set()

    def on_trace_start(self, trace: Any) -> None:
        """Ignore it: a trace is in its spans."""

    def on_trace_end(self, trace: Any) -> None:
        """Ignore it: a trace is in its spans."""

    def on_span_start(self, span: Any) -> None:
        """Note what is current where the span begins. Called in the context that begins it."""
        listener = self.listener
        if listener is None or platform_sdk_is_active():
            return
        try:
            if getattr(span, _OPENED, None) is None:
                setattr(span, _OPENED, _opened(span, listener))
        except Exception as error:  # a span, or a provider of the user's, of a kind that nobody expects
            if is_interrupt(error):
                raise
            self._say(error)

    def on_span_end(self, span: Any) -> None:
        """Tell the listener that the span began with."""
        opened = getattr(span, _OPENED, None)
        if opened is None:
            return
        try:
            opened.end(span)
        except BaseException as error:  # as above
            if is_interrupt(error):
                opened.end(span)  # it has happened; told twice, it is one, by its id
                raise
            self._say(error)
        finally:
            setattr(span, _OPENED, None)

    def force_flush(self) -> None:
        """Do nothing: a record is on the disk once it is made."""

    def shutdown(self, timeout: float | None = None) -> None:
        """Do nothing, likewise; a trace that goes on is heard on."""

    def _say(self, error: BaseException) -> None:
        kind = error_type(error)
        if kind not in self._said:
            self._said.add(kind)
            _logger.warning("a span of openai-agents could not be recorded (%s)", kind)


def _opened(span: Any, listener: Listener) -> _Span:
    kind = get(get(span, "span_data"), "type")
    parent_id = _parent_id(span)
    if kind in _CALLS:
        return _Call(span, listener, parent_id)
    if kind in _NAMES:
        run_id, position = listener.begin_step()
        if run_id:
            return _Step(span, listener, parent_id, run_id=run_id, position=position)
    return _Span(span, listener, parent_id)


def _parent_id(span: Any) -> str:
    """Return the span id of the step around a span that begins here: spans between are not recorded."""
    named = text_of(get(span, "parent_id"))
    around = sys.modules[_TRACING].get_current_span() if named else None
    if around is None or get(around, "span_id") != named:  # the user has said who the parent is
        return named
    opened = getattr(around, _OPENED, None)
    return named if opened is None else opened.step_id


# -- registration --------------------------------------------------------------------------------


_processor = Processor()


def listen(sdk: Sdk, listener: Listener) -> Processor | None:
    """Let `listener` hear of every span that starts from now on. May be called again.

    The module `agents` that was imported may be another one: many projects have their own. Then there is
    nothing to hear, and nothing to say.

    Returns:
        What hears it; None if this version has no trace provider to register with.

    Raises:
        Exception: of any kind, from a trace provider of the user's.
    """
    tracing = sys.modules.get(_TRACING)
    if not hasattr(tracing, "TracingProcessor"):
        return _processor
    get_provider = getattr(tracing, "get_trace_provider", None)
    if get_provider is None:
        return None
    _processor.listener = listener
    provider = get_provider()
    if getattr(provider, _OPENED, None) is not _processor:
        provider.register_processor(_processor)  # as `add_trace_processor` does
        _stay(provider)
        setattr(provider, _OPENED, _processor)
    return _processor


def release(sdk: Sdk) -> None:
    """Hear no more spans; those that are open are still told when they end."""
    _processor.listener = None


def _stay(provider: Any) -> None:
    """Have `set_trace_processors([…])` replace the processors of the user, not ours."""
    replace = provider.set_processors

    def set_processors(processors: list[Any]) -> None:
        replace([*processors, _processor])

    provider.set_processors = set_processors
