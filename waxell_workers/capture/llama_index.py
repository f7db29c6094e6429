"""The calls of llama-index's models and embeddings, for those whose SDK is not heard itself.

llama-index dispatches events; whoever wants them adds a handler, and nothing is replaced. A second handler,
for spans, is there for errors alone: what a model raised comes in no event.

Import this only once `llama_index.core` has been imported.
"""

from __future__ import annotations

import inspect
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events import embedding as embeddings
from llama_index.core.instrumentation.events import llm as models
from llama_index.core.instrumentation.events.exception import ExceptionEvent
from llama_index.core.instrumentation.span import BaseSpan
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined]  # not re-exported
    BaseInstrumentor,
)
from opentelemetry.trace.status import StatusCode
from pydantic import PrivateAttr

from . import nesting, semconv
from .calls import Message
from .openinference import Part
from .tracer import CallSpan, ListeningTracer

_MOST_OPEN = 1_000
"""A stream that nobody ever reads has no end; the oldest calls are given up."""

_STARTS = (models.LLMChatStartEvent, models.LLMCompletionStartEvent, embeddings.EmbeddingStartEvent)
_PIECES = (models.LLMChatInProgressEvent, models.LLMCompletionInProgressEvent)
_ENDS = (models.LLMChatEndEvent, models.LLMCompletionEndEvent, embeddings.EmbeddingEndEvent)

_PROVIDERS = {
    name: name
    for name in ("anthropic", "azure", "bedrock", "cohere", "gemini", "groq", "mistralai", "ollama", "openai")
} | {"together": "together", "vertex": "vertex_ai", "genai": "gemini", "google": "gemini"}
"""How the names of llama-index's classes of models begin (`openai_llm`, `Ollama_llm`)."""

_COUNTS = {
    semconv.INPUT_TOKENS: ("prompt_tokens", "input_tokens", "prompt_token_count", "prompt_eval_count"),
    semconv.OUTPUT_TOKENS: ("completion_tokens", "output_tokens", "candidates_token_count", "eval_count"),
}


class _ModelSpan(CallSpan):
    """One call of a model, as its events tell it."""

    def note_piece(self) -> None:
        """Note that a piece of a stream has come."""
        self._attributes.setdefault(semconv.TIME_TO_FIRST_CHUNK_S, time.perf_counter() - self._started)
        self._attributes[semconv.REQUEST_STREAM] = True

    def end_with(self, error: BaseException) -> None:
        """End it with what the model raised; a generator that was closed is a stream that was left."""
        if not isinstance(error, GeneratorExit):
            self.record_exception(error)
            self.set_status(StatusCode.ERROR, str(error))
        self.end()


class _Calls:
    """The calls that have begun and not ended, by the id of llama-index's span."""

    def __init__(self, tracer: ListeningTracer) -> None:
        self._tracer = tracer
        self._open: OrderedDict[str, _ModelSpan] = OrderedDict()

    def start(self, event: Any) -> None:
        """Begin a call."""
        if self._tracer.listener is None or event.span_id is None or event.span_id in self._open:
            return  # a completion that is made of a chat is one call
        span = self._tracer.start_span("call")
        assert isinstance(span, _ModelSpan)
        span.set_attributes(_asked(event))
        self._open[event.span_id] = span
        nesting.enter(span)
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)

    def piece(self, event: Any) -> None:
        """Note a piece of a stream."""
        span = self._open.get(event.span_id)
        if span is not None:
            span.note_piece()

    def end(self, event: Any) -> None:
        """End a call with its answer."""
        span = self._open.pop(event.span_id, None)
        if span is not None:
            nesting.leave(span)
            response = getattr(event, "response", None)
            span.set_attributes(_answered(response))
            span.is_whole = True
            span.content = (_inputs(event), _messages((response,)))
            span.end()

    def fail(self, span_id: str, error: BaseException | None) -> None:
        """End a call with an error."""
        span = self._open.pop(span_id, None)
        if span is not None:
            nesting.leave(span)
            span.end_with(error or RuntimeError())


def _asked(event: Any) -> dict[str, Any]:
    about: Mapping[str, Any] = event.model_dict or {}
    kind = str(about.get("class_name") or "").lower()
    is_embedding = isinstance(event, embeddings.EmbeddingStartEvent)
    return {
        semconv.OPERATION: "embeddings" if is_embedding else "chat",
        semconv.REQUEST_MODEL: str(about.get("model") or about.get("model_name") or ""),
        semconv.PROVIDER: next((ours for name, ours in _PROVIDERS.items() if kind.startswith(name)), ""),
    }


def _answered(response: Any) -> dict[str, Any]:
    """Return what can be read of a provider's answer, which llama-index hands on as it is."""
    raw = getattr(response, "raw", None)
    more = getattr(response, "additional_kwargs", None) or {}
    usage = _get(raw, "usage") or _get(raw, "usage_metadata")
    found: dict[str, Any] = {}
    for ours, names in _COUNTS.items():
        counts = [_get(holder, name) for holder in (usage, raw, more) for name in names]
        found[ours] = next((count for count in counts if type(count) is int), None)
    choices = _get(raw, "choices")
    reason = _get(choices[0], "finish_reason") if isinstance(choices, list) and choices else None
    reason = reason or _get(raw, "stop_reason") or _get(raw, "done_reason")
    if isinstance(reason, str):
        found[semconv.FINISH_REASONS] = (reason,)
    model, identity = _get(raw, "model"), _get(raw, "id")
    found[semconv.RESPONSE_MODEL] = model if isinstance(model, str) else ""
    found[semconv.RESPONSE_ID] = identity if isinstance(identity, str) else ""
    return found


def _get(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def _inputs(event: Any) -> list[Message]:
    prompt = getattr(event, "prompt", None)
    return [Message("user", [Part("text", prompt)])] if prompt else _messages(getattr(event, "messages", ()))


def _messages(of: Any) -> list[Message]:
    """Return messages of llama-index's, or of its responses, as `calls` reads them."""
    found = []
    for one in of:
        message = getattr(one, "message", one)
        text = getattr(message, "content", None) or getattr(one, "text", None)
        parts = [Part("text", str(text))] if text else []
        for block in getattr(message, "blocks", ()):
            if getattr(block, "block_type", "") == "tool_call":
                identity = str(block.tool_call_id or "")
                part = Part("tool_call", name=block.tool_name, id=identity, arguments=block.tool_kwargs)
                parts.append(part)
        role = getattr(message, "role", "assistant")
        if one is not None:
            found.append(Message(str(getattr(role, "value", role)), parts))
    return found


class _Events(BaseEventHandler):  # type: ignore[misc]  # comes without types
    """Hears events."""

    _calls: _Calls = PrivateAttr()

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self._calls = calls

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        """Take those of models."""
        if isinstance(event, _STARTS):
            self._calls.start(event)
        elif isinstance(event, _PIECES):
            self._calls.piece(event)
        elif isinstance(event, _ENDS):
            self._calls.end(event)
        elif isinstance(event, ExceptionEvent) and event.span_id:
            self._calls.fail(event.span_id, event.exception)


class _Errors(BaseSpanHandler[BaseSpan]):  # type: ignore[misc]  # likewise
    """Hears how spans end that end badly."""

    _calls: _Calls = PrivateAttr()

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self._calls = calls

    def new_span(self, *args: Any, **kwargs: Any) -> None:
        """Open none of our own."""

    def prepare_to_exit_span(self, *args: Any, **kwargs: Any) -> None:
        """Leave it to the event, which knows the answer."""

    def prepare_to_drop_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any = None,
        err: BaseException | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell the call that ends with its span."""
        self._calls.fail(id_, err)


class LlamaIndexInstrumentor(BaseInstrumentor):  # type: ignore[misc]  # comes without types
    """Adds the handlers to llama-index's root dispatcher."""

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return the versions of llama-index whose events these are."""
        return ("llama-index-core >= 0.12.0",)

    def _instrument(self, **kwargs: Any) -> None:
        tracer: ListeningTracer = kwargs["tracer_provider"].tracer
        tracer.span_class = _ModelSpan
        calls = _Calls(tracer)
        dispatcher = get_dispatcher()
        dispatcher.add_event_handler(_Events(calls))
        dispatcher.add_span_handler(_Errors(calls))

    def _uninstrument(self, **kwargs: Any) -> None:
        """Do nothing: without a listener, the handlers do nothing."""
