"""What may be written down: the content rules, applied before a record exists.

Without `capture_content`, an error is its type and a bounded message, a traceback has no source lines.
With it, texts are kept, through the user's `redact`.
"""

from __future__ import annotations

import os
import traceback
from types import TracebackType
from typing import Any

from .config import Settings
from .encoding import plain
from .values import Redactor

_MESSAGE_CHARACTERS = 200
_FRAMES = 50
REDACTION_FAILED = "[redaction failed]"
"""Stands where a text would, whose redactor failed."""
_INTERRUPTING = ("billiard", "celery", "dramatiq", "rq", "gevent", "greenlet")


def is_interrupt(error: BaseException) -> bool:
    """True if an exception is a framework's way to stop a task, whose way out must stay free.

    `SoftTimeLimitExceeded` and `JobTimeoutException` are plain `Exception`s, raised at any bytecode; they are
    told by the package that defines them, so that no framework is imported.
    """
    if not isinstance(error, Exception):
        return True
    return any(kind.__module__.split(".", 1)[0] in _INTERRUPTING for kind in type(error).__mro__)


def redact_text(redact: Redactor | None, text: str) -> str:
    """Return a text as the user's `redact` leaves it; one that fails costs the text, never the task."""
    if redact is None or not text:
        return text
    try:
        clean = redact(text)
    except Exception as error:  # the user's code: anything may come, and interrupts must pass
        if is_interrupt(error):
            raise
        return REDACTION_FAILED
    return clean if isinstance(clean, str) else REDACTION_FAILED


def redacted(settings: Settings, value: Any) -> Any:
    """Return `value` with each text in it, keys too, passed through the user's `redact`."""
    redact = settings.redact
    if redact is None or value is None:
        return value
    return _redacted(redact, plain(value))


def _redacted(redact: Redactor, value: Any) -> Any:
    if isinstance(value, str):
        return redact_text(redact, value)
    if isinstance(value, dict):
        return {redact_text(redact, key): _redacted(redact, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(redact, item) for item in value]
    return value


def error_type(error: BaseException) -> str:
    """Return an exception's qualified type, without `builtins`."""
    kind = type(error)
    module = kind.__module__
    return kind.__qualname__ if module in ("builtins", "__main__") else f"{module}.{kind.__qualname__}"


def error_message(settings: Settings, error: BaseException) -> str:
    """Return an exception's text: bounded, and redacted.

    Made from its arguments that are texts or numbers; `str()` of the exception may run the user's code.
    """
    text = redact_text(settings.redact, ", ".join(filter(None, map(_text_of, error.args))))
    return text if settings.capture_content else text[:_MESSAGE_CHARACTERS]


def _text_of(part: object) -> str:
    # Not str(): of a subclass it may be the user's code.
    if isinstance(part, str):
        return str.__str__(part)
    try:
        return (
            int.__repr__(part)
            if isinstance(part, int)
            else float.__repr__(part)
            if isinstance(part, float)
            else ""
        )
    except ValueError:  # an integer of more digits than Python writes
        return ""


def format_traceback(settings: Settings, trace: TracebackType | None) -> str:
    """Return the innermost frames of a traceback; source lines only with `capture_content`."""
    if trace is None:
        return ""
    frames = traceback.StackSummary.extract(traceback.walk_tb(trace), lookup_lines=False)[-_FRAMES:]
    lines = ["Traceback (most recent call last):"]
    for frame in frames:
        lines.append(f'  File "{_short(frame.filename)}", line {frame.lineno}, in {frame.name}')
        if settings.capture_content and frame.line:
            lines.append(f"    {redact_text(settings.redact, frame.line)}")
    return "\n".join(lines)


def _short(filename: str) -> str:
    home = os.path.expanduser("~")
    return f"~{filename[len(home) :]}" if filename.startswith(f"{home}/") else filename
