"""OpenAI's legacy completions (`client.completions.create`), which the official instrumentor leaves out.

Made like an instrumentor, of the parts that `opentelemetry-util-genai` offers to those (read at 1.3b0), so
that it is switched on, gated and heard like the others. It relies on `openai` being imported already.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined]  # not re-exported
    BaseInstrumentor,
)
from opentelemetry.util.genai.handler import TelemetryHandler
from opentelemetry.util.genai.stream import AsyncStreamWrapper, SyncStreamWrapper
from opentelemetry.util.genai.types import InputMessage, OutputMessage, TextPart
from wrapt import wrap_function_wrapper

_MODULE = "openai.resources.completions"


class CompletionsInstrumentor(BaseInstrumentor):  # type: ignore[misc]  # comes without types
    """Instruments `Completions.create` and `AsyncCompletions.create`."""

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return the versions of the SDK that this was tried on."""
        return ("openai >= 1.26.0, < 4",)

    def _instrument(self, **kwargs: Any) -> None:
        handler = TelemetryHandler(
            tracer_provider=kwargs["tracer_provider"],
            meter_provider=kwargs["meter_provider"],
            logger_provider=kwargs["logger_provider"],
            completion_hook=kwargs["completion_hook"],
        )
        wrap_function_wrapper(_MODULE, "Completions.create", _create(handler))
        wrap_function_wrapper(_MODULE, "AsyncCompletions.create", _async_create(handler))

    def _uninstrument(self, **kwargs: Any) -> None:
        """Do nothing: our wrappers stay, and are gated."""


def _create(handler: TelemetryHandler) -> Callable[..., Any]:
    def wrapper(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        invocation = _begin(handler, kwargs)
        try:
            result = wrapped(*args, **kwargs)
        except BaseException as error:
            invocation.fail(error)
            raise
        if kwargs.get("stream") is True and hasattr(result, "close") and hasattr(result, "__iter__"):
            return _Stream(result, invocation)
        return _finish(invocation, result)

    return wrapper


def _async_create(handler: TelemetryHandler) -> Callable[..., Any]:
    async def wrapper(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        invocation = _begin(handler, kwargs)
        try:
            result = await wrapped(*args, **kwargs)
        except BaseException as error:
            invocation.fail(error)
            raise
        if kwargs.get("stream") is True and hasattr(result, "__aiter__"):
            return _AsyncStream(result, invocation)
        return _finish(invocation, result)

    return wrapper


def _begin(handler: TelemetryHandler, kwargs: dict[str, Any]) -> Any:
    model = kwargs.get("model")
    invocation = handler.inference(
        "openai",
        request_model=model if isinstance(model, str) else None,
        operation_name="text_completion",
    )
    prompt = kwargs.get("prompt")
    texts = [prompt] if isinstance(prompt, str) else prompt if isinstance(prompt, list) else []
    invocation.input_messages = [
        InputMessage(role="user", parts=[TextPart(content=text)]) for text in texts if isinstance(text, str)
    ]
    return invocation


def _finish(invocation: Any, result: Any) -> Any:
    """End the call with what came back; a raw response is parsed for it, and remembers that."""
    parse = getattr(result, "parse", None)
    # An asynchronous or streaming response is its reader's.
    reads_itself = inspect.iscoroutinefunction(parse) or not hasattr(result, "http_response")
    completion = result if parse is None else None if reads_itself else parse()
    if completion is not None:
        heard = _Heard(invocation)
        heard.take(completion)
        heard.tell()
    invocation.stop()
    return result


class _Heard:
    """What was heard of a completion so far: whole, or in chunks."""

    def __init__(self, invocation: Any) -> None:
        self._invocation = invocation
        self._texts: dict[int, list[str]] = {}
        self._reasons: dict[int, str] = {}

    def take(self, part: Any) -> None:
        """Take a completion, or a chunk of one."""
        invocation = self._invocation
        invocation.response_id = getattr(part, "id", None) or invocation.response_id
        invocation.response_model_name = getattr(part, "model", None) or invocation.response_model_name
        usage = getattr(part, "usage", None)
        if usage is not None:
            invocation.input_tokens = usage.prompt_tokens
            invocation.output_tokens = usage.completion_tokens
            details = getattr(usage, "prompt_tokens_details", None)
            invocation.cache_read_input_tokens = getattr(details, "cached_tokens", None)
            details = getattr(usage, "completion_tokens_details", None)
            invocation.thinking_tokens = getattr(details, "reasoning_tokens", None)
        for choice in getattr(part, "choices", None) or ():
            self._texts.setdefault(choice.index, []).append(choice.text or "")
            if choice.finish_reason:
                self._reasons[choice.index] = choice.finish_reason

    def tell(self) -> None:
        """Give the invocation what only the end settles."""
        self._invocation.finish_reasons = list(self._reasons.values()) or None
        self._invocation.output_messages = [
            OutputMessage(
                role="assistant",
                parts=[TextPart(content="".join(texts))],
                finish_reason=self._reasons.get(index, ""),
            )
            for index, texts in self._texts.items()
        ]


class _StreamHooks:
    """What both kinds of streams do at a chunk and at their end."""

    def __init__(self, stream: Any, invocation: Any) -> None:
        super().__init__(stream, invocation=invocation)  # type: ignore[call-arg]  # the other class's
        self._self_invocation = invocation
        self._self_heard = _Heard(invocation)
        invocation.suspend()

    def _process_chunk(self, chunk: Any) -> None:
        self._self_heard.take(chunk)

    def _on_stream_end(self) -> None:
        self._self_heard.tell()
        self._self_invocation.stop()

    def _on_stream_error(self, error: BaseException) -> None:
        self._self_heard.tell()
        self._self_invocation.fail(error)


class _Stream(_StreamHooks, SyncStreamWrapper[Any]):
    pass


class _AsyncStream(_StreamHooks, AsyncStreamWrapper[Any]):
    pass
