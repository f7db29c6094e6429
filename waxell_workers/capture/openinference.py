"""What OpenInference's instrumentors tell, in the words of OpenTelemetry's conventions.

Their spans say `llm.token_count.prompt` where the conventions say `gen_ai.usage.input_tokens`, put messages
in flattened attributes, and name one model where there are two. Only spans of a model's own work are calls:
chains, agents, tools, retrievers and rerankers are not. Import this only once an SDK has been imported.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opentelemetry.trace.status import Status, StatusCode

from ..core.content import is_interrupt
from . import semconv
from .calls import Message
from .tracer import CallSpan

_OPERATIONS = {"LLM": "chat", "EMBEDDING": "embeddings"}

_COUNTS = {
    semconv.OI_PROMPT_TOKENS: semconv.INPUT_TOKENS,
    semconv.OI_COMPLETION_TOKENS: semconv.OUTPUT_TOKENS,
    semconv.OI_CACHE_READ_TOKENS: semconv.CACHED_TOKENS,
    semconv.OI_CACHE_WRITE_TOKENS: semconv.CACHE_WRITTEN_TOKENS[0],
    semconv.OI_REASONING_TOKENS: semconv.REASONING_TOKENS,
}


@dataclass(slots=True)
class Part:
    """A part of a message, as `opentelemetry.util.genai.types` has them: a text, or a tool call."""

    type: str
    content: str = ""
    name: str = ""
    id: str = ""
    arguments: Any = None


class _LetInterruptsOut(logging.Filter):
    """Raises again what an instrumentor has caught and is about to log, if it was to stop a task.

    They guard all that they read of a call by `except Exception: logger.exception(…)`; and a soft time limit
    is an `Exception` that may surface anywhere.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every message pass that is about anything else."""
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and is_interrupt(error):
            raise error
        return True


_let_interrupts_out = _LetInterruptsOut()


def let_interrupts_out(package: str) -> None:
    """See to it that no module of an instrumentor's keeps a task from being stopped."""
    for name in list(sys.modules):
        if f"{name}.".startswith(f"{package}."):
            logging.getLogger(name).addFilter(_let_interrupts_out)


class OpenInferenceSpan(CallSpan):
    """A span that OpenInference's attributes are put on."""

    provider = ""
    """Who answers, where the instrumentor does not say it."""
    has_prefixed_models = False
    """True if models are named with their providers, as in `anthropic/claude-sonnet-4-5`."""
    _asked_model = ""
    _is_named_stream = False
    _first_chunk_s: float | None = None

    def set_attribute(self, key: str, value: Any) -> None:
        """Collect an attribute; the first model that is named is the one that was asked for."""
        if key == semconv.OI_MODEL and not self._asked_model:
            self._asked_model = str(value)
        super().set_attribute(key, value)

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Collect attributes."""
        for key, value in attributes.items():
            self.set_attribute(key, value)

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Note an error, or that there was none: a stream that was left has neither."""
        super().set_status(status, description)
        code = status.status_code if isinstance(status, Status) else status
        self.is_whole = code is StatusCode.OK

    def update_name(self, name: str) -> None:
        """Take from a name what no attribute says: cohere's streams are `…chat_stream`, or alike."""
        self._is_named_stream = "stream" in name.lower()

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        """Note when the first token came; nothing else that happens is of interest."""
        if name == semconv.OI_FIRST_TOKEN and self._first_chunk_s is None:
            self._first_chunk_s = time.perf_counter() - self._started

    def fail(self, error: BaseException) -> None:
        """End it with an error, where the instrumentor has forgotten to, before it said what this is."""
        self._attributes.setdefault(semconv.OI_KIND, "LLM")
        super().fail(error)

    def _read(self) -> Mapping[str, Any]:
        told = self._attributes
        parameters = _parameters(told)
        model = str(told.get(semconv.OI_MODEL) or told.get(semconv.OI_EMBEDDING_MODEL) or "")
        asked = told.get(semconv.OI_REQUEST_MODEL) or _model_in(parameters) or self._asked_model or model
        answered = told.get(semconv.OI_RESPONSE_MODEL) or ("" if model == asked else model)
        provider = _provider(told) or self.provider
        prefix, _, name = str(asked).partition("/")
        if self.has_prefixed_models and name:
            provider, asked = provider or prefix, name
        found: dict[str, Any] = {
            semconv.OPERATION: _OPERATIONS.get(str(told.get(semconv.OI_KIND)).upper()),
            semconv.PROVIDER: provider,
            semconv.REQUEST_MODEL: asked,
            semconv.RESPONSE_MODEL: answered,
            semconv.REQUEST_STREAM: self._is_streamed(parameters),
            semconv.TIME_TO_FIRST_CHUNK_S: self._first_chunk_s,
            semconv.ERROR_TYPE: told.get(semconv.ERROR_TYPE),
        }
        found.update({ours: told[theirs] for theirs, ours in _COUNTS.items() if theirs in told})
        if semconv.OI_FINISH_REASON in told:
            # Where it is an enumeration's member, as Gemini's, some are told as `FinishReason.STOP`.
            reason = str(told[semconv.OI_FINISH_REASON]).removeprefix("FinishReason.")
            found[semconv.FINISH_REASONS] = (reason,)
        self.content = (
            _messages(told, semconv.OI_INPUT_MESSAGES),
            _messages(told, semconv.OI_OUTPUT_MESSAGES),
        )
        return found

    def _is_streamed(self, parameters: Mapping[str, Any]) -> bool:
        return self._first_chunk_s is not None or self._is_named_stream or bool(parameters.get("stream"))

    def _tell_error(self, fields: dict[str, Any], message: str) -> None:
        # Told as "RateLimitError: Error code: 429 - …": the type is known already.
        kind = str(self._attributes.get(semconv.ERROR_TYPE) or "").rpartition(".")[2]
        super()._tell_error(fields, message.removeprefix(f"{kind}: "))


def _provider(told: Mapping[str, Any]) -> str:
    """Return who answered. It is `google` for both ways to Gemini."""
    provider = str(told.get(semconv.OI_PROVIDER) or "").lower()
    system = str(told.get(semconv.OI_SYSTEM) or "").lower()
    return system if provider in ("", "google") and system else provider


def _messages(told: Mapping[str, Any], prefix: str) -> list[Message]:
    """Return the messages that are flattened under `prefix`, as in `llm.input_messages.0.message.role`."""
    by_number: dict[int, dict[str, Any]] = {}
    for key, value in told.items():
        number, _, rest = key.removeprefix(f"{prefix}.").partition(".")
        if key.startswith(f"{prefix}.") and number.isdigit():
            by_number.setdefault(int(number), {})[rest] = value
    return [_message(flat) for _, flat in sorted(by_number.items())]


def _message(flat: Mapping[str, Any]) -> Message:
    parts: list[Part] = []
    if flat.get("message.content"):
        parts.append(Part("text", str(flat["message.content"])))
    for content in _numbered(flat, "message.contents"):
        kind = str(content.get("message_content.type", "text"))
        parts.append(Part(kind, str(content.get("message_content.text", ""))))
    for call in _numbered(flat, "message.tool_calls"):
        name = str(call.get("tool_call.function.name", ""))
        arguments = call.get("tool_call.function.arguments")
        parts.append(
            Part("tool_call", name=name, id=str(call.get("tool_call.id", "")), arguments=_loaded(arguments))
        )
    return Message(str(flat.get("message.role", "")), parts)


def _numbered(flat: Mapping[str, Any], prefix: str) -> Iterator[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for key, value in flat.items():
        number, _, rest = key.removeprefix(f"{prefix}.").partition(".")
        if key.startswith(f"{prefix}.") and number.isdigit():
            found.setdefault(int(number), {})[rest] = value
    return (found[number] for number in sorted(found))


def _parameters(told: Mapping[str, Any]) -> dict[str, Any]:
    text = told.get(semconv.OI_PARAMETERS) or told.get(semconv.OI_EMBEDDING_PARAMETERS)
    parameters = _loaded(text)
    return parameters if isinstance(parameters, dict) else {}


def _model_in(parameters: Mapping[str, Any]) -> str:
    return str(parameters.get("model") or parameters.get("model_name") or parameters.get("model_id") or "")


def _loaded(text: Any) -> Any:
    """Return what a text of JSON says; the text itself, if it is none."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
