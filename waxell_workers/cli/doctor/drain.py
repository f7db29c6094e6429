"""Which of the installed tracers are flushed at our flush points, and which are not. Imports none of them.

Whether a worker uses one, only the worker knows: what is said here is about what is installed, and about the
word that workers left beside the journal of flushes that failed or came late.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import msgspec

from ...core.values import DRAINABLE
from ...drain import LOG
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
    yield from _of_failures(f"{situation.directory}/{LOG}")


def _of_named(name: str, distribution: str, number: str) -> Finding:
    if number:
        return Finding(AREA, "ok", f"{distribution} {number}: flushed where we flush, if it is used")
    return Finding(
        AREA,
        "warn",
        f"drain names {name}, and {distribution} is not installed here",
        "take it out of drain, or run the doctor with the Python of the workers",
    )


class _Word(msgspec.Struct):
    """What a worker has left of the first failure, or the first lateness, in one of its processes."""

    at: float
    pid: int
    tracer: str
    end: str
    reason: str


_LATELY_S = 86_400.0
_TAIL_BYTES = 64 << 10
_ENDS = {"failed": "flushes failed", "late": "flushes were late"}


def _of_failures(path: str) -> Findings:
    """Say of each tracer how its flushes went wrong in the last day."""
    words = [word for word in _words(path) if word.at > time.time() - _LATELY_S]
    for tracer, end in sorted({(word.tracer, word.end) for word in words}):
        its = [word for word in words if (word.tracer, word.end) == (tracer, end)]
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(its[-1].at))
        yield Finding(
            AREA,
            "warn",
            f"{tracer}: {_ENDS.get(end, end)} in {len(its)} processes of the last day, the last at {when}: "
            f"{its[-1].reason}",
            f"see what {tracer} sends to; {path} has more",
        )


def _words(path: str) -> Iterator[_Word]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield msgspec.json.decode(line, type=_Word)
        except msgspec.MsgspecError:  # the first may be half a line
            continue
