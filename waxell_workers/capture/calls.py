"""What an instrumentor told about one call, turned into the fields of an `LLMCall`.

The content rules begin here: where no content is wanted, there is no prompt, no response, no argument of a
tool, and no text of an error that could quote one. Redaction and limits are the collector's, so that they see
texts whole. Imports neither an SDK nor OpenTelemetry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.content import harmless_message
from . import semconv

Sink = Callable[..., None]

_NAME = re.compile(r"[\w.<>:-]{0,200}")

BUGS = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What a defect of an instrumentor raises. No interrupt of a task framework is among them."""


def _no_step() -> tuple[str, int]:
    return "", 0


def _ignore(**fields: Any) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Listener:
    """Who hears about calls, and how much."""

    sink: Sink
    """Called once per finished call with the fields of `LLMCall`, except `proc`; texts are whole."""
    current_run: Callable[[], str]
    """Returns the id of the run that is current in the calling context, or an empty string."""
    wants_content: Callable[[], bool]
    """Returns whether prompts, responses and the full text of errors are to be told there."""
    begin_step: Callable[[], tuple[str, int]] = _no_step
    """Returns the id of the run in which a step begins there, and its position; an empty string for none."""
    step_sink: Sink = _ignore
    """Called once per finished step with the fields of `Step`, except `proc`; texts are whole."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message, shaped like those of `opentelemetry.util.genai.types`."""

    role: str
    parts: Sequence[Any]


def call_fields(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a span's attributes settle; none of them is content.

    Arguments:
        attributes: by the names in `semconv`; times in seconds there, in milliseconds in what is returned.

    Returns:
        Tokens that the provider did not send are None.
    """
    get = attributes.get
    first_chunk_s = get(semconv.TIME_TO_FIRST_CHUNK_S)
    response_model = _name(get(semconv.RESPONSE_MODEL))
    provider = _name(get(semconv.PROVIDER))
    written, written_before = semconv.CACHE_WRITTEN_TOKENS
    return {
        "model": _name(get(semconv.REQUEST_MODEL)) or response_model or "unknown",
        "response_model": response_model,
        "provider": semconv.PROVIDERS.get(provider, provider),
        "operation": _name(get(semconv.OPERATION)) or "chat",
        "tokens_in": _count(get(semconv.INPUT_TOKENS)),
        "tokens_out": _count(get(semconv.OUTPUT_TOKENS)),
        "tokens_cached": _count(get(semconv.CACHED_TOKENS)),
        "tokens_cache_written": _count(get(written, get(written_before))),
        "tokens_reasoning": _count(get(semconv.REASONING_TOKENS)),
        "streamed": get(semconv.REQUEST_STREAM) is True,
        "ttft_ms": first_chunk_s * 1000 if isinstance(first_chunk_s, float) else None,
        "response_id": _name(get(semconv.RESPONSE_ID)),
        "finish_reason": _finish_reason(get(semconv.FINISH_REASONS)),
    }


# What an instrumentor hands on of an odd answer may be of any type, and must not fail a call.


def _name(value: object) -> str:
    return value if isinstance(value, str) else ""


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _finish_reason(reasons: object) -> str:
    first = _name(reasons[0]) if isinstance(reasons, (list, tuple)) and reasons else ""
    # What openai's 1.3b0 makes of none, where a stream was left; no provider calls anything so.
    return "" if first == "error" else first


def billed_attributes(error: BaseException) -> dict[str, Any]:
    """Return what an error tells about the answer that it is about, and that was paid for.

    openai's `LengthFinishReasonError`, which `parse()` raises, has it as its `completion`.
    """
    if type(error).__name__ != "LengthFinishReasonError":  # what others have there may be the user's code
        return {}
    completion = getattr(error, "completion", None)
    usage = getattr(completion, "usage", None)
    details = getattr(usage, "prompt_tokens_details", None), getattr(usage, "completion_tokens_details", None)
    found = {
        semconv.RESPONSE_ID: getattr(completion, "id", None),
        semconv.RESPONSE_MODEL: getattr(completion, "model", None),
        semconv.FINISH_REASONS: [c.finish_reason for c in getattr(completion, "choices", None) or ()],
        semconv.INPUT_TOKENS: getattr(usage, "prompt_tokens", None),
        semconv.OUTPUT_TOKENS: getattr(usage, "completion_tokens", None),
        semconv.CACHED_TOKENS: getattr(details[0], "cached_tokens", None),
        semconv.REASONING_TOKENS: getattr(details[1], "reasoning_tokens", None),
    }
    return {name: value for name, value in found.items() if value not in (None, [])}


def short_error_type(name: str) -> str:
    """Return the top-level package and the class of an exception's full name, as in `openai.RateLimitError`.

    That is how the platform names them; builtins and codes of a provider have no package and stay. What is no
    name is not told: in the place of a code, a provider may put a text, which may quote the request.
    """
    if not _NAME.fullmatch(name):
        return "unknown"
    parts = name.split(".")
    return name if len(parts) < 3 else f"{parts[0]}.{parts[-1]}"


def error_text(message: str, wants_content: bool) -> str:
    """Return an error's text by the content rules."""
    return message if wants_content else harmless_message(message)


def content_fields(inputs: Iterable[Any], outputs: Iterable[Any], wants_content: bool) -> dict[str, Any]:
    """Return `prompt`, `response` and `messages`, what was said; and `tool_calls`: names are no content.

    Arguments:
        inputs: `InputMessage`s of `opentelemetry.util.genai.types`: a `role`, and `parts` of which the ones
            of type `text` have a `content`.
        outputs: `OutputMessage`s, alike.
        wants_content: False to leave only the names and ids of tool calls.
    """
    fields: dict[str, Any] = {}
    tool_calls = [_tool_call(part, wants_content) for part in _parts(outputs) if part.type == "tool_call"]
    if tool_calls:
        fields["tool_calls"] = tool_calls
    if wants_content:
        messages = [{"role": message.role, "text": _text(message.parts)} for message in inputs]
        asked = [message["text"] for message in messages if message["role"] == "user"]
        fields["messages"] = messages
        fields["prompt"] = asked[-1] if asked else ""
        fields["response"] = _text(part for part in _parts(outputs) if part.type == "text")
    return fields


def _parts(messages: Iterable[Any]) -> Sequence[Any]:
    return [part for message in messages for part in message.parts]


def _tool_call(part: Any, wants_content: bool) -> dict[str, Any]:
    call = {"name": part.name, "id": part.id or ""}
    if wants_content:
        call["arguments"] = part.arguments
    return call


def _text(parts: Iterable[Any]) -> str:
    return "\n".join(filter(None, map(_part_text, parts)))


def _part_text(part: Any) -> str:
    """Return the text of a part; of one without any, what it is."""
    if part.type == "text":
        return part.content if isinstance(part.content, str) else ""
    if part.type == "tool_call":
        return f"[called {part.name}]"
    response = getattr(part, "response", None)
    return response if isinstance(response, str) else f"[{part.type}]"
