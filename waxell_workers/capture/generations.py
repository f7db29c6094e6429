"""What a span of an agents framework says of a call of a model, turned into the fields of an `LLMCall`.

Read from `GenerationSpanData` and `ResponseSpanData` of openai-agents (0.2 to 0.24), whose values come from
whichever model was used: OpenAI's objects, their dumps, or what a model of the user's own has put there.
So nothing is relied on to be there, nor to be of a type. Imports no SDK.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import semconv

_INPUT = ("input_tokens", "prompt_tokens")
_OUTPUT = ("output_tokens", "completion_tokens")


def generation_fields(data: Any, wants_content: bool) -> dict[str, Any]:
    """Return what a generation span's data says; content only where it is wanted."""
    # A streamed completion is told as one `Response`, dumped: its items are the output.
    output = [item for one in _list(get(data, "output")) for item in _list(get(one, "output")) or [one]]
    return {
        **_model(data),
        **_tokens(get(data, "usage")),
        **_content(_list(get(data, "input")), output, wants_content),
    }


def response_fields(data: Any, wants_content: bool) -> dict[str, Any]:
    """Return what a response span's data says, likewise."""
    response = get(data, "response")
    model = text_of(get(response, "model"))
    asked = get(data, "input")
    inputs = [{"role": "user", "content": asked}] if text_of(asked) else _list(asked)
    if instructions := text_of(get(response, "instructions")):
        inputs = [{"role": "system", "content": instructions}, *inputs]
    return {
        "model": model or "unknown",
        "response_model": model,
        "response_id": text_of(get(response, "id")) or text_of(get(data, "_response_id")),
        **_tokens(get(response, "usage") or get(data, "usage")),
        **_content(inputs, _list(get(response, "output")), wants_content),
    }


def _model(data: Any) -> dict[str, str]:
    """Return the model, and its provider where the name says that: litellm's do, `anthropic/claude-…`."""
    model = text_of(get(data, "model"))
    prefix, _, name = model.partition("/")
    if name and get(get(data, "model_config"), "model_impl") == "litellm":
        return {"model": name, "provider": semconv.PROVIDERS.get(prefix, prefix)}
    return {"model": model or "unknown"}


def get(value: Any, name: str) -> Any:
    """Return what a dict or an object has by that name, or None."""
    return dict.get(value, name) if issubclass(type(value), dict) else getattr(value, name, None)


def text_of(value: Any) -> str:
    """Return a text as it is, and an empty one for anything else."""
    return value if type(value) is str else ""


def _list(value: Any) -> list[Any]:
    return list(value) if issubclass(type(value), list | tuple) else []


def _tokens(usage: Any) -> dict[str, int | None]:
    tokens_in, tokens_out = _number(usage, *_INPUT), _number(usage, *_OUTPUT)
    if not tokens_in and not tokens_out:  # so the SDK says that the provider said nothing
        return {}
    read = get(usage, "input_tokens_details") or get(usage, "prompt_tokens_details")
    made = get(usage, "output_tokens_details") or get(usage, "completion_tokens_details")
    return {
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "tokens_cached": _number(read, "cached_tokens"),
        "tokens_cache_written": _number(read, "cache_write_tokens"),
        "tokens_reasoning": _number(made, "reasoning_tokens"),
    }


def _number(value: Any, *names: str) -> int | None:
    found = (get(value, name) for name in names)
    return next((number for number in found if type(number) is int and number >= 0), None)


def _content(inputs: list[Any], outputs: list[Any], wants_content: bool) -> dict[str, Any]:
    """Return messages, prompt, response, and the tools that were asked for: names are no content."""
    fields: dict[str, Any] = {}
    calls = [_tool_call(call, wants_content) for item in outputs for call in _tool_calls(item)]
    if calls:
        fields["tool_calls"] = calls
    if wants_content:
        messages = [_message(item) for item in inputs]
        asked = [message["text"] for message in messages if message["role"] == "user"]
        fields["messages"] = messages
        fields["prompt"] = asked[-1] if asked else ""
        fields["response"] = "\n".join(filter(None, (_said(get(item, "content")) for item in outputs)))
    return fields


def _tool_calls(item: Any) -> Iterator[Any]:
    if get(item, "type") == "function_call":
        yield item
    yield from _list(get(item, "tool_calls"))


def _tool_call(call: Any, wants_content: bool) -> dict[str, Any]:
    function = get(call, "function") or call
    told = {
        "name": text_of(get(function, "name")),
        "id": text_of(get(call, "call_id")) or text_of(get(call, "id")),
    }
    if wants_content:
        told["arguments"] = get(function, "arguments")
    return told


def _message(item: Any) -> dict[str, str]:
    kind = text_of(get(item, "type"))
    if kind == "function_call_output":
        return {"role": "tool", "text": _said(get(item, "output"))}
    called = [f"[called {text_of(get(get(call, 'function') or call, 'name'))}]" for call in _tool_calls(item)]
    text = "\n".join(filter(None, [_said(get(item, "content")), *called]))
    other = "" if kind in ("", "message") else f"[{kind}]"
    return {"role": text_of(get(item, "role")) or "assistant", "text": text or other}


def _said(content: Any) -> str:
    """Return the text of a message's content: a string, or parts of which some have a `text`."""
    parts = [text_of(get(part, "text")) for part in _list(content)]
    return text_of(content) or "\n".join(filter(None, parts))
