"""The calls of langchain's models, for those whose SDK is not heard itself.

langchain has callbacks, and `register_configure_hook` to be called back by every model: nothing is replaced.
What the callbacks say is read by OpenInference's tracer. That one's own instrumentor adds a tracer only where
none of its class is, so that ours and a user's would silence each other; ours hides behind a handler of a
class of its own, and takes only what models do.

Callbacks run beside a call: in threads, in tasks, in copies of the caller's context. What they set there the
call does not see. So a place is left in the caller's context before, which the callbacks find in their copy.

Import this only once `langchain_core` has been imported.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.outputs import LLMResult
from langchain_core.tracers.context import register_configure_hook
from openinference.instrumentation import OITracer, TraceConfig
from openinference.instrumentation.langchain._tracer import OpenInferenceTracer
from opentelemetry import trace
from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined]  # not re-exported
    BaseInstrumentor,
)

from ..core.content import error_message, is_interrupt
from . import nesting, semconv
from .openinference import OpenInferenceSpan
from .platform import platform_sdk_is_active
from .tracer import ListeningTracer


class _Place(nesting.Layer):
    """Where a model is about to be called: around what its SDK does, whoever describes it there.

    Several calls of models may begin in one place, as a batch; if one of them was heard of in there, all are.
    """

    def __init__(self, enclosing: nesting.Layer | None) -> None:
        super().__init__(enclosing, is_framework=True)
        self.is_open = False  # a chain's stays so
        self.spans: list[_ModelSpan] = []


class _ModelSpan(OpenInferenceSpan):
    """One call of a model, as its callbacks tell it."""

    _text = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        place = nesting.innermost()
        self._place = place if isinstance(place, _Place) else None
        if self._place is not None:
            self._stand_in(self._place)

    def _stand_in(self, place: _Place) -> None:
        """Stand beside what else is in a place, not inside it: one is told for all."""
        if self.enclosing is place:
            place.inner.remove(self)
            self.enclosing = place.enclosing
            if place.enclosing is not None:
                place.enclosing.inner.append(self)
        place.spans.append(self)
        place.is_open = True

    def is_superseded(self) -> bool:
        """True if a call was told in its place."""
        return super().is_superseded() or (self._place is not None and self._place.is_superseded())

    def note(self, error: BaseException) -> None:
        """Note what the model raised, in its own words: the callbacks add a traceback."""
        self.record_exception(error)
        self._text = error_message(error, wants_content=True)

    def _tell_error(self, fields: dict[str, Any], message: str) -> None:
        super()._tell_error(fields, self._text)

    def forget(self) -> None:
        """Tell nothing at the end."""
        self._listener = None

    def end(self, end_time: int | None = None) -> None:
        """Tell the listener, and close the place behind the last one."""
        try:
            super().end(end_time)
        finally:
            place = self._place
            if place is not None and not any(span.is_open for span in place.spans):
                place.is_told = place.is_superseded()
                place.is_open = False
                place.spans.clear()
                place.inner.clear()


class _Hook:
    """Stands where langchain expects a context variable with a handler; asked before each call."""

    def __init__(self, tracer: ListeningTracer, handler: _Handler) -> None:
        self._tracer = tracer
        self._handler = handler

    def get(self) -> _Handler | None:
        """Leave a place in the calling context, and return the handler."""
        if self._tracer.listener is None or platform_sdk_is_active():
            return None
        nesting.enter(_Place(nesting.enclosing(trace.get_current_span())))
        return self._handler


class _Handler(BaseCallbackHandler):  # type: ignore[misc]  # comes without types
    """Hands what models do to OpenInference's tracer."""

    ignore_chain = True
    ignore_agent = True
    ignore_retriever = True
    ignore_custom_event = True

    def __init__(self, tracer: OpenInferenceTracer) -> None:
        self._tracer = tracer

    @property
    def raise_error(self) -> bool:
        """True if an interrupt of a task framework surfaced in a callback: asked while that is handled."""
        error = sys.exc_info()[1]
        return error is not None and is_interrupt(error)

    def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
        """Begin the call of a model of texts."""
        self._tracer.on_llm_start(*args, **kwargs)

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        """Begin the call of a model of messages."""
        self._tracer.on_chat_model_start(*args, **kwargs)

    def on_llm_new_token(self, token: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Note that the first piece has come."""
        span = self._tracer.get_span(run_id)
        if span is not None:
            span.add_event(semconv.OI_FIRST_TOKEN)

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        """End the call."""
        span = self._tracer.get_span(run_id)
        if span is not None and _is_from_a_cache(response):
            span.forget()
        self._tracer.on_llm_end(response, run_id=run_id, **kwargs)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """End the call."""
        span = self._tracer.get_span(run_id)
        if span is not None:
            span.note(error)
        self._tracer.on_llm_error(error, run_id=run_id, **kwargs)


def _is_from_a_cache(response: LLMResult) -> bool:
    """True if no model was called: langchain marks the usage in a cached message with costs of nothing."""
    generations = [one for several in response.generations for one in several]
    usages = [getattr(getattr(one, "message", None), "usage_metadata", None) for one in generations]
    return bool(usages) and all(usage is not None and usage.get("total_cost") == 0 for usage in usages)


class LangchainInstrumentor(BaseInstrumentor):  # type: ignore[misc]  # comes without types
    """Registers the handler."""

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return the versions of langchain that OpenInference's tracer takes."""
        return ("langchain-core >= 0.3.9",)

    def _instrument(self, **kwargs: Any) -> None:
        tracer: ListeningTracer = kwargs["tracer_provider"].tracer
        tracer.span_class = _ModelSpan
        handler = _Handler(OpenInferenceTracer(OITracer(tracer, TraceConfig()), False))
        register_configure_hook(_Hook(tracer, handler), inheritable=True)

    def _uninstrument(self, **kwargs: Any) -> None:
        """Do nothing: without a listener, the hook has no handler."""
