"""How much of a text is kept: cut once it is redacted, so that what `redact` would find is not cut in two.

Every cut says so where it was made, but for the text of an error of which no content is wanted: that is
bounded, not content. `encoding` bounds whatever comes through here to what a line may hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from .encoding import MAX_LINE, cut_text, reduce, with_texts
from .records import LLMCall, Record, RunEnded, Step

_CALL_ERROR_CHARACTERS = 500
_ARGUMENTS_CHARACTERS = 2_000
_ERROR_CHARACTERS = 200
_MESSAGE_CHARACTERS = 32
"""What a message takes of a line beside its text."""


def limit_call(call: Record, characters: int, left_out: int = 0) -> Record:
    """Return a captured call with its texts cut.

    Args:
        call: a redacted `LLMCall`; any other record is returned as it is.
        characters: how many are kept of the prompt, of the response, and of all messages together.
        left_out: how many messages were left out already, the oldest ones.
    """
    if type(call) is not LLMCall:
        return call
    if not (call.prompt or call.response or call.messages or call.tool_calls or call.error_message):
        return call
    messages, more = newest(call.messages, characters)
    left_out += more
    if left_out:
        messages.insert(0, {"role": "…", "text": f"… [{left_out} messages cut]"})
    return msgspec.structs.replace(
        call,
        prompt=_cut(call.prompt, characters),
        response=_cut(call.response, characters),
        messages=messages,
        tool_calls=[_with_arguments_cut(asked) for asked in call.tool_calls],
        error_message=_cut(call.error_message, _CALL_ERROR_CHARACTERS),
    )


def limit_step(step: Record, characters: int) -> Record:
    """Return a captured step with each text of its output cut.

    Args:
        step: a redacted `Step`; any other record is returned as it is.
        characters: how many are kept of a text.
    """
    if type(step) is not Step:
        return step
    return msgspec.structs.replace(
        step, output=with_texts(step.output, lambda text: cut_text(text, characters))
    )


def newest(messages: Sequence[dict[str, Any]], characters: int) -> tuple[list[dict[str, Any]], int]:
    """Return the newest messages, whole as long as they fit, and how many older ones are left out.

    The first that does not fit is cut to the room that is left, if there is any.
    """
    kept: list[dict[str, Any]] = []
    for message in reversed(messages):
        if characters <= 0 and kept:
            break
        text = message.get("text")
        size = len(text) if type(text) is str else 0
        if type(text) is str and size > characters:
            message = message | {"text": cut_text(text, characters)}
        kept.append(message)
        characters -= size
    kept.reverse()
    return kept, len(messages) - len(kept)


def oldest_kept(messages: Sequence[dict[str, Any]]) -> int:
    """Return where those of a call's messages begin that are worth redacting: the last ones, whole.

    They are more than a record can hold; the last one is among them, whatever its length.
    """
    characters = MAX_LINE
    for index in range(len(messages) - 1, -1, -1):
        text = messages[index].get("text")
        characters -= _MESSAGE_CHARACTERS + (len(text) if type(text) is str else 0)
        if characters < 0:
            return min(index + 1, len(messages) - 1)
    return 0


def limit_error(end: Record) -> Record:
    """Return the end of a run of which no content is wanted, with the text of its error cut."""
    if type(end) is not RunEnded:
        return end
    return msgspec.structs.replace(end, error_message=end.error_message[:_ERROR_CHARACTERS])


def _cut(text: str, characters: int) -> str:
    return cut_text(text, characters) if type(text) is str else text


def _with_arguments_cut(asked: dict[str, Any]) -> dict[str, Any]:
    arguments = asked.get("arguments")
    if arguments is None:
        return asked
    text = arguments if type(arguments) is str else msgspec.json.encode(reduce(arguments)).decode()
    if len(text) <= _ARGUMENTS_CHARACTERS:
        return asked
    return asked | {"arguments": cut_text(text, _ARGUMENTS_CHARACTERS)}
