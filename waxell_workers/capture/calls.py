"""What an instrumentor told about one call, turned into the fields of an `LLMCall`.

The content rules are applied here, before anything leaves: without `capture_content` there is no prompt, no
response, and no text of an error that could quote one. Imports neither an SDK nor OpenTelemetry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.content import harmless_message, redact_text
from ..core.values import Redactor
from . import semconv

CONTENT_CHARACTERS = 10_000
"""Prompts and responses are cut after so many characters."""
ERROR_CHARACTERS = 500
"""The text of an error is cut after so many characters."""

Sink = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Listener:
    """Who hears about calls, and how much."""

    sink: Sink
    """Called once per finished call with the fields of `LLMCall`, except `proc`."""
    current_run: Callable[[], str]
    """Returns the id of the run that is current in the calling context, or an empty string."""
    capture_content: bool = False
    redact: Redactor | None = None


def call_fields(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a span's attributes settle; none of them is content.

    Arguments:
        attributes: by the names in `semconv`; times in seconds there, in milliseconds in what is returned.
    """
    get = attributes.get
    finish_reasons = get(semconv.FINISH_REASONS) or ("",)
    first_chunk_s = get(semconv.TIME_TO_FIRST_CHUNK_S)
    response_model = get(semconv.RESPONSE_MODEL) or ""
    return {
        "model": str(get(semconv.REQUEST_MODEL) or response_model or "unknown"),
        "response_model": response_model,
        "provider": get(semconv.PROVIDER) or "",
        "operation": get(semconv.OPERATION) or "chat",
        "tokens_in": get(semconv.INPUT_TOKENS) or 0,
        "tokens_out": get(semconv.OUTPUT_TOKENS) or 0,
        "tokens_cached": get(semconv.CACHED_TOKENS) or 0,
        "tokens_reasoning": get(semconv.REASONING_TOKENS) or 0,
        "streamed": bool(get(semconv.REQUEST_STREAM)),
        "ttft_ms": None if first_chunk_s is None else first_chunk_s * 1000,
        "response_id": get(semconv.RESPONSE_ID) or "",
        "finish_reason": finish_reasons[0] or "",
    }


def short_error_type(name: str) -> str:
    """Return the top-level package and the class of an exception's full name, as in `openai.RateLimitError`.

    That is how the platform names them; builtins and codes of a provider have no package and stay.
    """
    parts = name.split(".")
    return name if len(parts) < 3 else f"{parts[0]}.{parts[-1]}"


def error_text(listener: Listener, message: str) -> str:
    """Return an error's text by the content rules, cut after `ERROR_CHARACTERS`."""
    if not listener.capture_content:
        return harmless_message(message)
    return redact_text(listener.redact, message)[:ERROR_CHARACTERS]


def content_fields(listener: Listener, inputs: Iterable[Any], outputs: Iterable[Any]) -> dict[str, str]:
    """Return `prompt`, the text of the last user message, and `response`, the text that came back.

    Arguments:
        inputs: `InputMessage`s of `opentelemetry.util.genai.types`: a `role`, and `parts` of which the ones
            of type `text` have a `content`.
        outputs: `OutputMessage`s, alike.
    """
    asked = [_text([message]) for message in inputs if message.role == "user"]
    texts = {"prompt": asked[-1] if asked else "", "response": _text(outputs)}
    return {name: redact_text(listener.redact, text)[:CONTENT_CHARACTERS] for name, text in texts.items()}


def _text(messages: Iterable[Any]) -> str:
    parts = [part for message in messages for part in message.parts if part.type == "text"]
    return "\n".join(part.content for part in parts if isinstance(part.content, str))
