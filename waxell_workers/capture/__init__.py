"""Hearing the calls that an application makes through an LLM SDK.

`install` watches for the supported SDKs: each is instrumented when the application imports it, by the
official OpenTelemetry instrumentor and a tracer of ours that listens. Nothing is imported before that,
neither an SDK nor OpenTelemetry, and nothing is ever wrapped, counted or logged on behalf of anybody else.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable

from ..core.content import is_interrupt
from ..core.errors import ConfigError
from ..core.values import Redactor
from .calls import Listener, Sink
from .imports import forget, is_being_imported, when_imported
from .platform import platform_sdk_is_active

__all__ = ["SUPPORTED", "install", "uninstall"]

_logger = logging.getLogger("waxell_workers.capture")

SUPPORTED = {"openai": ("waxell_workers.capture.openai", "opentelemetry.instrumentation.genai.openai")}
"""SDK (the top-level module that an application imports) to our module for it, and the instrumentor's."""

_listener: Listener | None = None
_said: set[str] = set()


def install(
    sink: Sink,
    *,
    names: tuple[str, ...] | None,
    capture_content: bool,
    redact: Redactor | None,
    current_run: Callable[[], str],
) -> None:
    """Start to hear calls. A second installation replaces the first.

    Arguments:
        sink: called once per finished call, in the thread in which it ends, with `LLMCall`'s fields except
            `proc` as keyword arguments; after an interrupt once more, with the same `id`. It must neither
            block nor raise.
        names: the SDKs to listen to; None for every supported one, () for none.
        capture_content: whether prompts, responses and the full text of errors are passed on.
        redact: applied to each of these texts before the sink sees it. A failure of its costs the text; an
            interrupt of a task framework that surfaces in it reaches the task.
        current_run: returns the id of the run that is current in the calling context, or an empty string.
            Called when a call starts; it must neither block nor raise.

    Raises:
        ConfigError: a name that is not supported.
    """
    global _listener
    chosen = tuple(SUPPORTED) if names is None else names
    for name in chosen:
        if name not in SUPPORTED:
            raise ConfigError("capture", name, f"expected some of {', '.join(sorted(SUPPORTED))}")
    uninstall()
    _listener = Listener(sink, current_run, capture_content, redact)
    for name in chosen:
        _, instrumentor = SUPPORTED[name]
        when_imported(instrumentor, functools.partial(_after_instrumentor, name))
        when_imported(name, functools.partial(_after_sdk, name))


def uninstall() -> None:
    """Hear no more calls; those that are under way are still told when they end."""
    global _listener
    _listener = None
    for name, (ours, instrumentor) in SUPPORTED.items():
        forget(name)
        forget(instrumentor)
        module = sys.modules.get(ours)
        if module is not None and not is_being_imported(ours):
            module.release()


def _after_sdk(name: str) -> None:
    """Listen to an SDK that has just been imported."""
    _, instrumentor = SUPPORTED[name]
    # An instrumentor that the user imports first imports the SDK while it is half there itself: later, then.
    if not is_being_imported(instrumentor):
        _instrument(name)


def _after_instrumentor(name: str) -> None:
    """Listen to an SDK whose instrumentor has just been imported: by the user, or by us on the way."""
    ours, _ = SUPPORTED[name]
    if name in sys.modules and not is_being_imported(ours):
        _instrument(name)


def _instrument(name: str) -> None:
    """Let the listener hear an SDK. This runs inside an import of the user's, and must not fail it."""
    listener = _listener
    if listener is None or platform_sdk_is_active():
        return
    ours, instrumentor = SUPPORTED[name]
    try:
        heard = importlib.import_module(ours).listen(listener)
    except Exception as error:  # the instrumentor's code, and the SDK's: anything may come
        if is_interrupt(error):
            raise
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{instrumentor}.".startswith(f"{missing}."):
            _say(name, 'its instrumentor is missing; pip install "waxell-workers[%s]"', name)
        else:
            _say(name, "it does not suit its instrumentor (%s: %s)", type(error).__name__, error)
    else:
        if not heard:
            _say(name, "its instrumentor does not take this version")


def _say(name: str, reason: str, *arguments: object) -> None:
    if name not in _said:
        _said.add(name)
        _logger.warning(f"%s is not captured: {reason}", name, *arguments)
