"""What a writer of the kill loop says under a marker, and whether what arrived under it is the same.

The payload follows from the marker alone, so that the oracle can tell it without trusting a file of the
writer's. It is made to hurt: several bytes a character, newlines and quotes, text that looks like a line of
the journal, and sizes on both sides of the 256 KiB at which a record is cut.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

CUT_AT = 256 << 10
"""Bytes of JSON beyond which a record is cut; the documented limit."""
CUT_TO = 2_000
"""Characters that are left of a text then."""
OVERHEAD = 2_000
"""More than a call's line holds beside its two texts."""

_SCRAPS = (
    "Say hello to Bob. ",
    "żółć und Größe ",
    "你好世界 ",
    "😀👩‍👩‍👧 ",
    'quote " backslash \\ slash / ',
    "line\nbreak\r\n\ttab ",
    '\n{"kind":"segment","version":99,"sealed":1}\n',
    '{"kind":"llm_call","id":"0","at":0,"model":"no"}\n',
    "\u2028\u2029\x7f\x01 ",
)
_MODELS = ("gpt-4o", "claude-sonnet-4-5", "модель-7b", 'a "quoted" model')
LOOSE_MODELS = ("loose-a", "loose-b")
"""Models of calls outside any run: few, so that several calls share an automatic run."""


def call(marker: str, *, loose: bool = False) -> dict[str, Any]:
    """Return the arguments of `record_llm_call` for a marker."""
    chance = random.Random(marker)
    return {
        "model": chance.choice(LOOSE_MODELS if loose else _MODELS),
        "tokens_in": chance.randrange(1_000_000),
        "tokens_out": chance.randrange(1_000_000),
        "cost": chance.choice((0.0, 0.25, 1e-7)),
        "task": chance.choice(("chat", "embeddings", "tâche")),
        "prompt_preview": _text(chance, _size(chance)),
        "response_preview": _text(chance, chance.randrange(300)),
        "metadata": {"marker": marker, "nested": {"größe": [1, None, True, 0.5, "✓"]}},
    }


def output(marker: str) -> dict[str, Any]:
    """Return the output of the step with this marker."""
    chance = random.Random(marker)
    return {
        "text": _text(chance, chance.randrange(2_000)),
        "number": chance.randrange(1 << 50),
        "empty": None,
    }


def tag(marker: str) -> str:
    """Return the value of the tag with this marker."""
    return _text(random.Random(marker), 40)


def difference(marker: str, row: Mapping[str, Any], *, loose: bool = False) -> str:
    """Say how a call that arrived differs from what was issued; empty if it does not."""
    issued = call(marker, loose=loose)
    texts = {"prompt": issued["prompt_preview"], "response": issued["response_preview"]}
    plain = {
        "model": issued["model"],
        "tokens_in": issued["tokens_in"],
        "tokens_out": issued["tokens_out"],
        "cost_usd": issued["cost"],
        "operation": issued["task"],
        "status": "ok",
    }
    for name, value in plain.items():
        if row[name] != value:
            return f"{name}: {row[name]!r} instead of {value!r}"
    if json.loads(row["metadata"]) != issued["metadata"]:
        return f"metadata: {row['metadata'][:200]}"
    arrived = {name: row[name] for name in texts}
    size = sum(len(json.dumps(text, ensure_ascii=False).encode()) for text in texts.values())
    allowed = []
    if size <= CUT_AT:
        allowed.append(texts)
    if size > CUT_AT - OVERHEAD:
        allowed.append({name: _cut(text) for name, text in texts.items()})
    return "" if arrived in allowed else f"texts of {size} bytes differ: {str(arrived)[:200]}"


def _cut(text: str) -> str:
    return text if len(text) <= CUT_TO else f"{text[:CUT_TO]}… [{len(text) - CUT_TO} characters cut]"


def _size(chance: random.Random) -> int:
    kind = chance.random()
    if kind < 0.008:
        return CUT_AT + chance.randrange(-3 * OVERHEAD, OVERHEAD)
    if kind < 0.03:
        return chance.randrange(20_000, 60_000)
    return chance.randrange(2_000)


def _text(chance: random.Random, size: int) -> str:
    """Return a text that takes about `size` bytes of JSON."""
    scraps = chance.choices(_SCRAPS, k=12)
    once = "".join(scraps)
    times, rest = divmod(size, len(json.dumps(once, ensure_ascii=False).encode()) - 2)
    return once * times + "x" * rest
