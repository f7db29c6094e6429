"""What the providers' stand-in answers, whichever provider it plays: texts, tools, and names.

How many tokens an answer says that it cost is written down with each provider's shape, as constants: nothing
here counts anything, so that a test compares what was heard with a number in a table.
"""

from __future__ import annotations

from typing import Any

PIECES = ("Hello", " there", ".")
"""The text of an answer, as a stream sends it."""
TEXT = "".join(PIECES)
JSON_PIECES = ('{"text":', ' "Hello', ' there."}')
"""The same as a structured output: what `behaviour` `json` answers."""
REFUSAL = "I will not."
TOOL = "get_weather"
ARGUMENTS = {"city": "Paris"}
ARGUMENT_PIECES = ('{"city": ', '"Paris"}')


def dated(model: str) -> str:
    """Return the name of the model that answers, which is seldom the one that was asked for."""
    return f"{model}-2026-01-01"


def pieces_for(behaviour: str) -> tuple[str, ...]:
    """Return the text of an answer, in pieces."""
    return JSON_PIECES if behaviour == "json" else PIECES


def asks_for_a_tool(behaviour: str, body: dict[str, Any], done: str) -> bool:
    """Return whether the model wants its tool: until the conversation has the tool's result.

    Arguments:
        done: a word that the request contains only then, as the provider writes it.
    """
    return behaviour == "tools" and done not in str(body)
