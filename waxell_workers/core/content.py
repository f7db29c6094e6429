"""What may be written down of an error: the content rules, applied before a record exists.

Where content is not wanted, an error is its type and a bounded message, without what an LLM SDK's error says
in it; a traceback has no source lines. Where it is, texts are kept. What `redact` makes of them, and the
bounds, come later: a text is redacted whole.
"""

from __future__ import annotations

import os
import re
import traceback
from collections import deque
from collections.abc import Iterator
from types import TracebackType

from .encoding import module_name, type_name

_REPEATED = 200
"""So much of an SDK's message is looked for in the form that `repr` gives it."""
_FRAMES = 50
_MOST_ARGUMENTS = 50
_PROVIDERS = (
    *("anthropic.", "cohere.", "google.genai.", "google.generativeai.", "groq.", "instructor.", "langchain"),
    *("litellm.", "llama_index.", "mistralai.", "openai.", "together.", "vertexai."),
)
"""Modules of LLM SDKs: their errors like to quote the request, or the answer."""
_TELLING = 20
"""By so many characters a text is known again in another one, which may have cut it."""
_CAUSES = 10
_HTTP_STATUS = re.compile(r"Error code: \d{3}\b")
_HARMLESS = frozenset({"Connection error.", "Request timed out."})
"""Messages that are constants of the SDK (`openai._exceptions`): they quote nothing."""
_INTERRUPTING = ("billiard", "celery", "dramatiq", "rq", "gevent", "greenlet")


def is_interrupt(error: BaseException) -> bool:
    """True if an exception is a framework's way to stop a task, whose way out must stay free.

    `SoftTimeLimitExceeded` and `JobTimeoutException` are plain `Exception`s, raised at any bytecode; they are
    told by the package that defines them, so that no framework is imported.
    """
    if not issubclass(type(error), Exception):
        return True
    return any(name.split(".", 1)[0] in _INTERRUPTING for name in _modules(error))


def _modules(error: BaseException) -> Iterator[str]:
    """Yield the modules that an exception's type and those above it were defined in."""
    return map(module_name, type.__dict__["__mro__"].__get__(type(error)))


def error_type(error: BaseException) -> str:
    """Return an exception's qualified type, without `builtins`."""
    return type_name(type(error)).removeprefix("builtins.").removeprefix("__main__.")


def error_message(error: BaseException, *, wants_content: bool) -> str:
    """Return an exception's text, whole; where no content is wanted, without what an LLM SDK said.

    Made from its arguments that are texts or numbers; `str()` of the exception may run the user's code.
    """
    text = _text(_arguments(error))
    return text if wants_content else _without_quotes(text, error)


def harmless_message(message: str) -> str:
    """Return what may be kept of an LLM SDK's error without `capture_content`.

    Providers like to quote the request in their errors, so only an HTTP status ("Error code: 429", as
    `openai.APIStatusError` begins) and known constants pass.
    """
    status = _HTTP_STATUS.match(message)
    if status:
        return status.group()
    return message if message in _HARMLESS else ""


def _without_quotes(text: str, error: BaseException) -> str:
    """Return an error's text up to where it says what an SDK's error said that led to it."""
    for cause in _causes(error):
        if not any(f"{name}.".startswith(_PROVIDERS) for name in _modules(cause)):
            continue
        said = _text(_arguments(cause))
        if cause is error:
            return harmless_message(said)
        for form in (said, repr(said[:_REPEATED])[1:-1]):
            before, quoted, _ = text.partition(form[:_TELLING])
            if form and quoted:
                text = before + (harmless_message(said) or "…")
    return text


# Not the exception's own attributes, which may be the user's code.
_args_of = BaseException.__dict__["args"].__get__
_cause_of = BaseException.__dict__["__cause__"].__get__
_context_of = BaseException.__dict__["__context__"].__get__
_traceback_of = BaseException.__dict__["__traceback__"].__get__


def traceback_of(error: BaseException) -> TracebackType | None:
    """Return the traceback of an exception."""
    found: TracebackType | None = _traceback_of(error)
    return found


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that led to it, the last one first."""
    inner: BaseException | None = error
    for _ in range(_CAUSES):
        if inner is None:
            return
        yield inner
        cause = _cause_of(inner)
        inner = _context_of(inner) if cause is None else cause


def _arguments(error: BaseException) -> tuple[object, ...]:
    """Return an exception's arguments, but for a text that could not be encoded: `str()` leaves that out."""
    arguments: tuple[object, ...] = _args_of(error)
    if issubclass(type(error), UnicodeError) and len(arguments) > 3:
        return tuple(part for part in arguments if part is not arguments[-4])
    return arguments[:_MOST_ARGUMENTS]


def _text(arguments: tuple[object, ...]) -> str:
    return ", ".join(filter(None, map(_text_of, arguments)))


def _text_of(part: object) -> str:
    # Not str(), nor isinstance(), which asks the object: of a subclass it may be the user's code.
    kind = type(part)
    if issubclass(kind, str):
        return str.__str__(part)
    try:
        if issubclass(kind, int):
            return int.__repr__(part)
        return float.__repr__(part) if issubclass(kind, float) else ""
    except ValueError:  # an integer of more digits than Python writes
        return ""


def format_traceback(trace: TracebackType | None, *, wants_content: bool) -> str:
    """Return the innermost frames of a traceback; source lines only where content is wanted."""
    if trace is None:
        return ""
    innermost = deque(traceback.walk_tb(trace), _FRAMES)
    frames = traceback.StackSummary.extract(innermost, lookup_lines=False)
    lines = ["Traceback (most recent call last):"]
    for frame in frames:
        lines.append(f'  File "{_short(frame.filename)}", line {frame.lineno}, in {frame.name}')
        if wants_content and frame.line:
            lines.append(f"    {frame.line}")
    return "\n".join(lines)


def _short(filename: str) -> str:
    home = os.path.expanduser("~")
    return f"~{filename[len(home) :]}" if filename.startswith(f"{home}/") else filename
