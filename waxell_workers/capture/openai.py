"""The OpenAI SDK, heard through `opentelemetry-instrumentation-genai-openai` (read at 1.3b0).

The instrumentor does the patching. It is handed a tracer that listens (`tracer`), providers of metrics and
logs that do nothing, so that a user's are not told everything twice, and gates (`gates`) around its wrappers.
Ours is a class of its own: instrumentors are singletons, and the user's is theirs to switch on and off.

Import this only once `openai` has been imported: it imports OpenTelemetry and the SDK's resources.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from opentelemetry._logs import NoOpLoggerProvider
from opentelemetry.instrumentation.genai.openai import OpenAIInstrumentor
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.util.genai import completion_hook
from wrapt import FunctionWrapper

from .calls import Listener
from .gates import gate
from .platform import platform_sdk_is_active
from .tracer import CallSpan, ListeningTracerProvider

_MODULES = (
    "openai.resources.chat.completions.completions",
    "openai.resources.chat.completions",
    "openai.resources.embeddings",
    "openai.resources.responses.responses",
)
"""Where the instrumented classes are; the first is the second's home since openai 1.55."""

# Hooks are called in a guard that swallows every `Exception`, a soft time limit with the rest. A hook that is
# a guard itself is taken as it is.
_Guard: Any = getattr(completion_hook, "_SafeCompletionHook", object)


class _ContentHook(_Guard):  # type: ignore[misc]  # no public class to inherit from
    """Leaves the messages of a call with its span; what to make of them is decided at the span's end."""

    def __init__(self) -> None:
        """Guard nothing."""

    def on_completion(self, *, inputs: Any, outputs: Any, span: Any = None, **_: Any) -> None:
        if isinstance(span, CallSpan):
            span.content = (inputs, outputs)


class _NoHook:
    """Stands in where there is no no-op: with no hook at all the instrumentor would load the user's again."""

    def on_completion(self, **_: Any) -> None:
        """Do nothing."""


def _hook(capture_content: bool) -> Any:
    if capture_content:
        return _ContentHook()
    # Only by this class does the instrumentor know that it need not collect messages.
    return getattr(completion_hook, "_NoOpCompletionHook", _NoHook)()


class _Instrumentor(OpenAIInstrumentor):
    """The instrumentor, once more, with gates. `uninstrument()` is never called: see `release`."""

    _instance = None
    _is_instrumented_by_opentelemetry = False

    def __new__(cls) -> _Instrumentor:
        return object.__new__(cls)

    def __init__(self) -> None:
        self.provider = ListeningTracerProvider()
        self.listening = False
        self.classes: frozenset[type] = frozenset()
        self._gates: list[Any] = []

    def _active(self, wrapper: Callable[..., Any]) -> Callable[..., Any]:
        """Put a gate around a wrapper (in the base: let calls pass after `uninstrument()`)."""
        made = gate(wrapper, self._is_open)
        self._gates.append(made)
        return made

    def _is_open(self) -> bool:
        return self.listening and not platform_sdk_is_active()

    def start(self, capture_content: bool) -> bool:
        """Instrument the SDK; False if its version does not suit the instrumentor, which logs why."""
        self.instrument(
            tracer_provider=self.provider,
            meter_provider=NoOpMeterProvider(),
            logger_provider=NoOpLoggerProvider(),
            completion_hook=_hook(capture_content),
        )
        if not self.is_instrumented_by_opentelemetry:
            return False
        self.classes = frozenset(kind for kind in _classes() if self._seal(kind))
        return True

    def _seal(self, kind: type) -> bool:
        """Replace our proxies on a class by plain functions.

        An instrumentor that is switched off takes away the outermost proxy of a method, whosever it is; a
        plain function it leaves alone.
        """
        proxies = [
            (name, member)
            for name, member in vars(kind).items()
            if issubclass(type(member), FunctionWrapper) and member._self_wrapper in self._gates
        ]
        for name, proxy in proxies:
            setattr(kind, name, _plain(proxy.__wrapped__, proxy._self_wrapper))
        return bool(proxies)


def _plain(method: Any, wrapper: Callable[..., Any]) -> Callable[..., Any]:
    bind = method.__get__
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def async_plain(self: Any, *args: Any, **kwargs: Any) -> Any:
            return await wrapper(bind(self, type(self)), self, args, kwargs)

        return async_plain

    @functools.wraps(method)
    def plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(bind(self, type(self)), self, args, kwargs)

    return plain


def _classes() -> frozenset[type]:
    modules = [sys.modules[name] for name in _MODULES if name in sys.modules]
    return frozenset(
        member
        for module in modules
        for member in vars(module).values()
        # Not `isinstance`: openai 1.26 has stand-ins for absent packages here, which raise when asked.
        if issubclass(type(member), type) and member.__module__.startswith("openai.resources.")
    )


_layers: dict[bool, _Instrumentor] = {}
"""By whether content is collected: that is settled when methods are wrapped, and wrappers stay."""
_CLAIM = "openai"
_claims: dict[str, object] = {}
"""The claim of the thread that wraps methods, if one does: no lock, which an interrupt could leave locked."""


def listen(listener: Listener) -> bool:
    """Let `listener` hear of every call of the OpenAI SDK that starts from now on.

    May be called again, with the same or another listener, and after the SDK was imported anew.

    Returns:
        False if the installed version of the SDK is none that the instrumentor takes.

    Raises:
        Exception: of any kind, from the instrumentor: the SDK is not built as it expects.
    """
    claim = object()
    try:
        # Never waited for: whoever has it may be waiting for an import lock that this thread holds.
        if _claims.setdefault(_CLAIM, claim) is not claim:
            return True
        layer = _layers.get(listener.capture_content)
        if layer is None or not layer.classes <= _classes():
            layer = _Instrumentor()
            if not layer.start(listener.capture_content):
                return False
            _layers[listener.capture_content] = layer
        layer.provider.tracer.listener = listener
        for other in _layers.values():
            other.listening = other is layer
        return True
    finally:
        if _claims.get(_CLAIM) is claim:
            del _claims[_CLAIM]


def release() -> None:
    """Hear no more calls.

    Our wrappers stay in place and let every call pass: others may have been wrapped around them since.
    """
    for layer in _layers.values():
        layer.listening = False
