"""A tracer that listens: the OpenTelemetry API, with spans that end as one call told to a `Listener`.

It relies on `opentelemetry-api` alone. To everybody else its spans are not there: they carry the span context
that was current before, so that a user's own spans keep their parents and their trace. They are never
exported, sampled or propagated. Import this only once an SDK has been imported: it imports OpenTelemetry.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext, SpanKind
from opentelemetry.trace.status import Status, StatusCode

from ..core.ids import new_id
from . import semconv
from .calls import Listener, call_fields, content_fields, error_text, short_error_type


class CallSpan(trace.Span):
    """Collects what is told about one call; told to the listener at its end, once."""

    def __init__(
        self, listener: Listener | None, around: SpanContext, attributes: Mapping[str, Any] | None
    ) -> None:
        self._listener = listener
        self._around = around
        self._attributes: dict[str, Any] = dict(attributes or {})
        self._error: str | None = None
        self._id = new_id()
        self._ended = False
        self._at = time.time()
        self._started = time.perf_counter()
        # The run that is current now: a stream may end in another context, in another thread, or never.
        self._run_id = listener.current_run() if listener is not None else ""
        self.content: tuple[Sequence[Any], Sequence[Any]] = ((), ())

    def get_span_context(self) -> SpanContext:
        """Return the span context that was current before this span."""
        return self._around

    def is_recording(self) -> bool:
        """True until the end."""
        return not self._ended

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
        """Ignore it: the type comes as an attribute, the text with the status."""

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        """Ignore it: a call has no events."""

    def add_link(self, context: SpanContext, attributes: Any = None) -> None:
        """Ignore it: a call has no links."""

    def update_name(self, name: str) -> None:
        """Ignore it: a call is named by its model."""

    def end(self, end_time: int | None = None) -> None:
        """Tell the listener. Only the first call does anything.

        Raises:
            Exception: only an interrupt of a task framework that surfaced here or in the user's redactor; the
                call is told first, in the latter case without content.
        """
        try:
            self._end()
        except BaseException:  # the call was made, and has cost money; told twice, it is one, by its id
            self._end()
            raise

    def _end(self) -> None:
        self._ended = True
        listener = self._listener
        if listener is None or self._attributes.get(semconv.OPERATION) not in semconv.INFERENCES:
            return
        fields = call_fields(self._attributes)
        fields["id"] = self._id
        fields["run_id"] = self._run_id
        fields["at"] = self._at
        fields["duration_ms"] = (time.perf_counter() - self._started) * 1000
        fields["status"] = "ok"
        try:
            if self._error is not None:
                self._tell_error(fields, listener, self._error)
            if fields["streamed"] and fields["status"] == "ok" and not fields["finish_reason"]:
                # Closed or dropped before the model was done: nobody's error, but no whole answer either.
                fields["metadata"] = {"stream": "left early"}
            if listener.capture_content:
                fields.update(content_fields(listener, *self.content))
        finally:
            listener.sink(**fields)
            self._listener = None
            self.content = ((), ())

    def _tell_error(self, fields: dict[str, Any], listener: Listener, message: str) -> None:
        kind = str(self._attributes.get(semconv.ERROR_TYPE) or "")
        if (kind, message) == semconv.ABANDONED_STREAM:
            return
        fields["status"] = "error"
        fields["error_type"] = short_error_type(kind)
        fields["error_message"] = error_text(listener, message)


class ListeningTracer(trace.Tracer):
    """Opens `CallSpan`s for the listener that is set at that moment."""

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
        return CallSpan(self.listener, trace.get_current_span(context).get_span_context(), attributes)

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
        span = self.start_span(name, context, kind, attributes)
        with trace.use_span(span, end_on_exit=end_on_exit):
            yield span


class ListeningTracerProvider(trace.TracerProvider):
    """Hands out one `ListeningTracer`, whoever asks."""

    def __init__(self) -> None:
        self.tracer = ListeningTracer()

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,
        schema_url: str | None = None,
        attributes: Any = None,
    ) -> ListeningTracer:
        """Return the tracer."""
        return self.tracer
