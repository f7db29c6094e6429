"""A tracer that listens: the OpenTelemetry API, with spans that end as one call told to a `Listener`.

It relies on `opentelemetry-api` alone. To everybody else its spans are not there: they carry the span context
that was current before, so that a user's own spans keep their parents and their trace. They are never
exported, sampled or propagated. Import this only once an SDK has been imported: it imports OpenTelemetry.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context, get_current
from opentelemetry.trace import SpanContext, SpanKind
from opentelemetry.trace.status import Status, StatusCode

from ..core.content import error_type
from ..core.ids import new_id
from . import nesting, semconv
from .calls import BUGS, Listener, call_fields, content_fields, error_text, short_error_type
from .platform import platform_sdk_is_active

_logger = logging.getLogger("waxell_workers.capture")

OPENED = "waxell_workers.capture.opened"
"""Where in the OpenTelemetry context a list may stand that wants each span which is opened there."""
KNOWN = "waxell_workers.capture.known"
"""Where in the OpenTelemetry context attributes may stand that a gate knows better than its instrumentor."""


_BUGS = frozenset(kind.__name__ for kind in BUGS)


class CallSpan(trace.Span, nesting.Layer):
    """Collects what is told about one call; told to the listener at its end, once."""

    is_whole = False
    """True if the instrumentor says that nothing is missing, also where no reason to finish was given."""

    is_answered = False
    """True once the SDK has returned: unless that is a stream, nothing of it can fail any more."""

    def __init__(
        self,
        listener: Listener | None,
        around: trace.Span,
        attributes: Mapping[str, Any] | None,
        *,
        is_framework: bool = False,
        start_time_ns: int | None = None,
    ) -> None:
        """Open it inside `around`, the span that is current, whoever's that is."""
        nesting.Layer.__init__(self, nesting.enclosing(around), is_framework=is_framework)
        self._listener = listener
        self._around = around.get_span_context()
        self._attributes: dict[str, Any] = dict(attributes or {})
        self.known: Mapping[str, Any] = {}
        self._error: str | None = None
        self._id = new_id()
        self._start_time_ns = start_time_ns
        self._at = time.time() if start_time_ns is None else start_time_ns / 1e9
        self._started = time.perf_counter()
        # What is current now: a stream may end in another context, in another thread, or never.
        self._run_id = listener.current_run() if listener is not None else ""
        self._wants_content = listener is not None and listener.wants_content()
        self.content: tuple[Sequence[Any], Sequence[Any]] = ((), ())

    def get_span_context(self) -> SpanContext:
        """Return the span context that was current before this span."""
        return self._around

    def is_recording(self) -> bool:
        """True until the end."""
        return self.is_open

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Collect attributes."""
        self._attributes.update(attributes)

    def set_attribute(self, key: str, value: Any) -> None:
        """Collect an attribute."""
        self._attributes[key] = value

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Note an error; any other status says nothing that the end does not."""
        code = status
        if isinstance(status, Status):
            code, description = status.status_code, status.description
        if code is StatusCode.ERROR:
            self._error = description or ""

    def record_exception(
        self,
        exception: BaseException,
        attributes: Any = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """Note an error's type, where it does not come as an attribute; the text comes with the status."""
        self._attributes.setdefault(semconv.ERROR_TYPE, error_type(exception))

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        """Ignore it: a call has no events."""

    def add_link(self, context: SpanContext, attributes: Any = None) -> None:
        """Ignore it: a call has no links."""

    def update_name(self, name: str) -> None:
        """Ignore it: a call is named by its model."""

    def fail(self, error: BaseException) -> None:
        """End it with an error, where the instrumentor has forgotten to."""
        if self.is_open:
            self.record_exception(error)
            self._error = ""
            self.end()

    def end(self, end_time: int | None = None) -> None:
        """Tell the listener. Only the first call does anything.

        Raises:
            Exception: only an interrupt of a task framework that surfaced here or in the user's redactor; the
                call is told first, in the latter case without content.
        """
        try:
            self._end(end_time)
        except BaseException:  # the call was made, and has cost money; told twice, it is one, by its id
            self._end(end_time)
            raise

    def _read(self) -> Mapping[str, Any]:
        """Return the attributes by the names of `semconv`, and leave messages in `content`."""
        return self._attributes

    def _end(self, end_time_ns: int | None) -> None:
        self.is_open = False
        listener = self._listener
        if listener is None:
            return
        attributes = {**self._read(), **self.known}
        if attributes.get(semconv.OPERATION) not in semconv.INFERENCES or self.is_superseded():
            return
        fields = call_fields(attributes)
        fields["id"] = self._id
        fields["run_id"] = self._run_id
        fields["at"] = self._at
        fields["duration_ms"] = self._duration_ms(end_time_ns)
        fields["status"] = "ok"
        if self._error is not None:
            self._tell_error(fields, self._error)
        if _is_left(fields) and not self.is_whole:
            # Closed or dropped before the model was done: nobody's error, but no whole answer either.
            fields["metadata"] = {"stream": "left early"}
        fields.update(self._content())
        listener.sink(**fields)
        self.is_told = True
        self._listener = None
        self.content = ((), ())

    def _content(self) -> dict[str, Any]:
        try:
            return content_fields(*self.content, self._wants_content)
        except BUGS as error:  # a stream may end outside any gate
            _logger.warning("a call was recorded without its content", exc_info=error)
            return {}

    def _duration_ms(self, end_time_ns: int | None) -> float:
        if end_time_ns is not None and self._start_time_ns is not None:
            return (end_time_ns - self._start_time_ns) / 1e6
        return (time.perf_counter() - self._started) * 1000

    def _tell_error(self, fields: dict[str, Any], message: str) -> None:
        kind = str(self._attributes.get(semconv.ERROR_TYPE) or "")
        if (kind, message) == semconv.ABANDONED_STREAM or kind == semconv.CLOSED_GENERATOR:
            return
        if self.is_answered and not fields["streamed"] and kind in _BUGS:
            return  # the instrumentor's
        fields["status"] = "error"
        fields["error_type"] = short_error_type(kind)
        fields["error_message"] = error_text(message, self._wants_content)


def _is_left(fields: Mapping[str, Any]) -> bool:
    return bool(fields["streamed"] and fields["status"] == "ok" and not fields["finish_reason"])


class CachedApartSpan(CallSpan):
    """A span that is told tokens as Bedrock counts them: the cached ones are not among the others."""

    def _read(self) -> Mapping[str, Any]:
        told = self._attributes
        cached = sum(told.get(name) or 0 for name in (semconv.CACHED_TOKENS, *semconv.CACHE_WRITTEN_TOKENS))
        found = told.get(semconv.INPUT_TOKENS)
        return told if found is None else {**told, semconv.INPUT_TOKENS: found + cached}


class ListeningTracer(trace.Tracer):
    """Opens `CallSpan`s for the listener that is set at that moment."""

    span_class: type[CallSpan] = CallSpan
    is_framework = False
    """True for an instrumentor whose calls are, as a rule, made through an SDK that is heard as well."""

    def __init__(self) -> None:
        self.listener: Listener | None = None

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Any = None,
        links: Any = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
    ) -> CallSpan:
        """Open a span that carries the span context of `context`, or of the current one."""
        span = self.span_class(
            None if platform_sdk_is_active() else self.listener,
            trace.get_current_span(context),
            attributes,
            is_framework=self.is_framework,
            start_time_ns=start_time,
        )
        span.update_name(name)
        here = get_current() if context is None else context
        opened, known = here.get(OPENED), here.get(KNOWN)
        if isinstance(opened, list):
            opened.append(span)
        if isinstance(known, dict):
            span.known = known
        return span

    @contextmanager
    def start_as_current_span(  # type: ignore[override]  # there in a form for async functions too
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Any = None,
        links: Any = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
        end_on_exit: bool = True,
    ) -> Iterator[CallSpan]:
        """Open a span and make it current in the block."""
        span = self.start_span(name, context, kind, attributes, start_time=start_time)
        with trace.use_span(
            span,
            end_on_exit=end_on_exit,
            record_exception=record_exception,
            set_status_on_exception=set_status_on_exception,
        ):
            yield span


class ListeningTracerProvider(trace.TracerProvider):
    """Hands out one `ListeningTracer`, whoever asks."""

    def __init__(self, tracer: ListeningTracer | None = None) -> None:
        self.tracer = tracer or ListeningTracer()

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,
        schema_url: str | None = None,
        attributes: Any = None,
    ) -> ListeningTracer:
        """Return the tracer."""
        return self.tracer
