"""Redaction: every record goes, as plain data, through the user's `redact` before it is written.

`Collector.write` is the one place that calls it, so that no road leads around it. The user's code may do what
it likes: of a record whose redaction fails the content is not written, and what a record is known by (its
kind, ids and times) stays as it was. Only a framework's interrupt that surfaces in it goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .content import is_interrupt
from .encoding import from_values, to_values, type_name, with_texts
from .records import Record
from .values import Redactor

logger = logging.getLogger("waxell_workers")

REDACTION_FAILED = "[redaction failed]"
"""Stands where a text would, whose redaction failed."""

CONTENT: dict[str, tuple[str, ...]] = {
    "run_started": ("inputs", "metadata", "tags", "ambient"),
    "llm_call": ("prompt", "response", "messages", "tool_calls", "error_message", "metadata"),
    "step": ("output",),
    "run_updated": ("tags", "metadata"),
    "run_ended": ("result", "error_message", "traceback"),
    "task_lost": (),
}
"""Kind of record to the fields whose texts are content. All others say what happened, not about what."""
_ITEMS = {
    "messages": {"role": False, "text": True},
    "tool_calls": {"name": False, "id": False, "arguments": True},
}
"""Fields that are lists of dicts, with the keys that are ours, and whether what stands there is content."""
_IDENTITY = (
    *("kind", "id", "at", "proc", "run_id", "task_id", "parent_run_id", "root_run_id", "trace_id"),
    *("state", "status"),
)
"""What a record is known by, and what became of it: not the user's to change."""

_Change = Callable[[str], str]
_MOST_REASONS = 10
_failed: set[str] = set()
"""What was said of redactors that fail: once each."""


def redacted(redact: Redactor, record: Record) -> Record:
    """Return a record as the user's `redact` leaves it; without its content if that fails.

    Raises:
        BaseException: an interrupt that surfaced in the user's code, or here.
    """
    values, is_cut = to_values(record)
    identity = {name: values[name] for name in _IDENTITY if name in values}
    names = tuple(values)
    try:
        changed = redact(values)
        if not issubclass(type(changed), dict):
            _say(f"it returned {_name(changed)}, not the record")
            return without_content(record)
        # What was made of it is the user's too, and need be neither plain nor complete.
        kept = {name: dict.get(changed, name) for name in names}
        # Where a text was too long to be looked at whole, what is left of it may end with half of a secret.
        return from_values(kept | identity, cut=is_cut)
    except Exception as error:  # the user's code: anything may come, and interrupts must pass
        if is_interrupt(error):
            raise
        _say(f"it raised {_name(error)}")
        return without_content(record)


def _name(value: object) -> str:
    return type_name(type(value)).removeprefix("builtins.")


def _say(reason: str) -> None:
    if reason not in _failed and len(_failed) < _MOST_REASONS:
        _failed.add(reason)
        logger.warning("redact fails (%s): such records are written without their content", reason)


def without_content(record: Record) -> Record:
    """Return a record with `REDACTION_FAILED` for each text of its content."""
    values, _ = to_values(record)
    return from_values(_with_content(values, lambda text: text and REDACTION_FAILED))


def redact_texts(function: Callable[[str], str]) -> Redactor:
    """Make a `redact` of a function from text to text.

        waxell_workers.init(redact=waxell_workers.redact_texts(mask))

    The function sees each text of a record's content, whole: prompts, responses, messages, arguments of tool
    calls, inputs, outputs, results, tags and metadata at any depth, keys too, and errors. It does not see
    what says only what happened: names, models, states, ids, and what an adapter tells of its task. A text
    at which it fails, or for which it returns no text, becomes `[redaction failed]`.

    Args:
        function: returns what may be written of a text.

    Returns:
        What `init(redact=…)` takes; made of the same function, it is equal.
    """
    return _TextRedactor(function)


@dataclass(frozen=True, slots=True)
class _TextRedactor:
    function: Callable[[str], str]

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        return _with_content(record, self._change)

    def _change(self, text: str) -> str:
        if not text:
            return text
        try:
            clean = self.function(text)
        except Exception as error:  # as above
            if is_interrupt(error):
                raise
            return REDACTION_FAILED
        return str.__str__(clean) if issubclass(type(clean), str) else REDACTION_FAILED


def _with_content(values: dict[str, Any], change: _Change) -> dict[str, Any]:
    """Return a record's values with each text of its content, keys too, as `change` returns it."""
    changed = dict(values)
    for name in _content_of(values):
        value = values.get(name)
        if value is not None:
            known = _ITEMS.get(name)
            is_list = known is not None and type(value) is list
            changed[name] = _items(value, known or {}, change) if is_list else with_texts(value, change)
    return changed


def _content_of(values: dict[str, Any]) -> tuple[str, ...]:
    kind = values.get("kind", "")
    names = CONTENT.get(kind, ())
    if kind == "run_started" and values.get("task_id"):
        return tuple(name for name in names if name != "metadata")  # an adapter's: queue, attempt, worker, …
    return names


def _items(items: list[Any], known: dict[str, bool], change: _Change) -> list[Any]:
    return [_item(item, known, change) if type(item) is dict else with_texts(item, change) for item in items]


def _item(item: dict[str, Any], known: dict[str, bool], change: _Change) -> dict[str, Any]:
    changed = {}
    for key, value in item.items():
        is_content = known.get(key, True) or type(value) is not str
        changed[key if key in known else change(key)] = with_texts(value, change) if is_content else value
    return changed
