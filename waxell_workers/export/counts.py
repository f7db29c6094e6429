"""The tokens of a call as a price needs them, or None where too little is known for any price."""

from __future__ import annotations

from typing import NamedTuple

from ..core.records import LLMCall

WITHOUT_OUTPUT = frozenset({"embeddings"})
"""Operations that have no output: there, a count of it that nobody told is 0."""


class Counts(NamedTuple):
    """Tokens that are paid for."""

    input: int
    """All of the prompt: also those that follow."""
    cached: int
    cache_written: int
    output: int


def counts(call: LLMCall) -> Counts | None:
    """Return the tokens of a call; None if they are unknown, none at all, or contradict each other.

    A provider that says nothing of a cache has not used one: those two count as 0.
    """
    output = tokens_out(call)
    if call.tokens_in is None or output is None:
        return None
    counted = Counts(call.tokens_in, call.tokens_cached or 0, call.tokens_cache_written or 0, output)
    if min(counted) < 0 or counted.cached + counted.cache_written > counted.input:
        return None
    return counted if counted.input or counted.output else None


def tokens_out(call: LLMCall) -> int | None:
    """Return the tokens of the output, which is 0 for an operation that has none."""
    return 0 if call.tokens_out is None and call.operation in WITHOUT_OUTPUT else call.tokens_out
