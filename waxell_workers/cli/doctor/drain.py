"""Which of the installed tracers are flushed at our flush points, and which are not. Imports none of them.

Whether a worker uses one, only the worker knows: what is said here is about what is installed.
"""

from __future__ import annotations

from ...core.values import DRAINABLE
from .findings import Finding, Findings
from .situation import Situation
from .versions import installed

AREA = "drain"
_DISTRIBUTIONS = {"openai-agents": "openai-agents", "opentelemetry": "opentelemetry-sdk"}
"""What a worker must have installed for a name of `drain` to mean anything."""


def check(situation: Situation) -> Findings:
    """Say of each tracer that could be flushed whether it is; nothing of those that are not there."""
    if situation.problem:
        return
    for name in DRAINABLE:
        distribution = _DISTRIBUTIONS[name]
        number = installed(distribution)
        if name in situation.settings.drain:
            yield _of_named(name, distribution, number)
        elif number:
            text = f"{distribution} {number}: not flushed where we flush, drain does not name it"
            yield Finding(AREA, "info", text)


def _of_named(name: str, distribution: str, number: str) -> Finding:
    if number:
        return Finding(AREA, "ok", f"{distribution} {number}: flushed where we flush, if it is used")
    return Finding(
        AREA,
        "warn",
        f"drain names {name}, and {distribution} is not installed here",
        "take it out of drain, or run the doctor with the Python of the workers",
    )
