"""Hearing the calls that an application makes through an LLM SDK.

`install` watches for the SDKs of `sdks`: each is instrumented when the application imports it, by an
instrumentor that is installed and a tracer of ours that listens. Nothing is imported before that, neither an
SDK nor OpenTelemetry, and nothing is ever wrapped, counted or logged on behalf of anybody else.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..core.content import is_interrupt
from ..core.errors import ConfigError
from .calls import Listener, Sink
from .imports import forget, is_being_imported, when_imported
from .platform import platform_sdk_is_active
from .sdks import SUPPORTED, Sdk

__all__ = ["SUPPORTED", "install", "uninstall"]

_logger = logging.getLogger("waxell_workers.capture")
_listener: Listener | None = None
_said: set[str] = set()


def install(
    sink: Sink,
    *,
    names: tuple[str, ...] | None,
    current_run: Callable[[], str],
    wants_content: Callable[[], bool],
    begin_step: Callable[[], tuple[str, int]] | None = None,
    step_sink: Sink | None = None,
) -> None:
    """Start to hear calls. A second installation replaces the first.

    Arguments:
        sink: called once per finished call, in the thread in which it ends, with `LLMCall`'s fields except
            `proc` as keyword arguments; after an interrupt once more, with the same `id`. Texts are whole. It
            must not block, nor raise anything but an interrupt that surfaces in it.
        names: the SDKs to listen to; None for every supported one, () for none.
        current_run: returns the id of the run that is current in the calling context, or an empty string.
            Called when a call starts; it must neither block nor raise.
        wants_content: returns whether prompts, responses, tools' arguments and the full text of errors are to
            be told of a call that starts there; likewise.
        begin_step: returns the id of the run in which a step that an agents framework tells of begins there,
            and its position; an empty string for none. Likewise; without it no step is told.
        step_sink: called once per finished step, with `Step`'s fields except `proc`, as `sink` is.

    Raises:
        ConfigError: a name that is not supported.
    """
    global _listener
    chosen = tuple(SUPPORTED) if names is None else names
    for name in chosen:
        if name not in SUPPORTED:
            raise ConfigError("capture", name, f"expected some of {', '.join(sorted(SUPPORTED))}")
    uninstall()
    _listener = Listener(sink, current_run, wants_content)
    if begin_step is not None and step_sink is not None:
        _listener = replace(_listener, begin_step=begin_step, step_sink=step_sink)
    for name in chosen:
        sdk = SUPPORTED[name]
        for instrumentor in sdk.instrumentors:
            when_imported(instrumentor.module, functools.partial(_after_instrumentor, sdk))
        when_imported(sdk.module, functools.partial(_after_sdk, sdk))


def uninstall() -> None:
    """Hear no more calls; those that are under way are still told when they end."""
    global _listener
    _listener = None
    for sdk in SUPPORTED.values():
        forget(sdk.module)
        for instrumentor in sdk.instrumentors:
            forget(instrumentor.module)
        hears = _loaded(sdk.heard_by)
        if hears is not None:
            hears.release(sdk)


def _loaded(name: str) -> Any:
    module = sys.modules.get(name)
    return None if module is None or is_being_imported(name) else module


def _after_sdk(sdk: Sdk) -> None:
    """Listen to an SDK that has just been imported."""
    # An instrumentor that the user imports first imports the SDK while it is half there itself: later, then.
    if not any(is_being_imported(instrumentor.module) for instrumentor in sdk.instrumentors):
        _instrument(sdk)


def _after_instrumentor(sdk: Sdk) -> None:
    """Listen to an SDK whose instrumentor has just been imported: by the user, or by us on the way."""
    if sdk.module in sys.modules and sdk.name not in _under_way:
        _instrument(sdk)


_under_way: set[str] = set()
"""SDKs that are being instrumented: on the way, their instrumentors are imported."""


def _instrument(sdk: Sdk) -> None:
    """Let the listener hear an SDK. This runs inside an import of the user's, and must not fail it."""
    listener = _listener
    if listener is None or platform_sdk_is_active() or (sdk.is_common and sdk.instrumentor() is None):
        return
    _under_way.add(sdk.name)
    try:
        heard = importlib.import_module(sdk.heard_by).listen(sdk, listener)
    except Exception as error:  # the instrumentor's code, and the SDK's: anything may come
        if is_interrupt(error):
            raise
        if _is_missing(sdk, error):
            _say(sdk, "its instrumentor is missing; %s", sdk.install_command)
        else:
            _say(sdk, "it does not suit its instrumentor (%s: %s)", type(error).__name__, error)
    else:
        if heard is None:
            _say(sdk, "its instrumentor does not take this version")
    finally:
        _under_way.discard(sdk.name)


def _is_missing(sdk: Sdk, error: Exception) -> bool:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    return bool(missing) and any(f"{one.module}.".startswith(f"{missing}.") for one in sdk.instrumentors)


def _say(sdk: Sdk, reason: str, *arguments: object) -> None:
    if sdk.name not in _said:
        _said.add(sdk.name)
        _logger.warning(f"%s is not captured: {reason}", sdk.name, *arguments)
