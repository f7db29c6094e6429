"""One instrumentor on one SDK: switched on once, gated, and from then on listening to whom it is told to.

The instrumentor does the patching. It is handed a tracer that listens (`tracer`), providers of metrics and
logs that do nothing, so that a user's are not told everything twice, and, around its wrappers, gates
(`gates`). Ours is a class of its own: instrumentors are singletons, and the user's is theirs to switch on and
off. Import this only once the SDK has been imported: it imports OpenTelemetry and the SDK's resources.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakSet

from opentelemetry._logs import NoOpLoggerProvider
from opentelemetry.metrics import NoOpMeterProvider
from wrapt import FunctionWrapper

from .calls import Listener, Message
from .gates import Passage, gate
from .hooks import guard
from .openinference import OpenInferenceSpan, let_interrupts_out
from .platform import platform_sdk_is_active
from .sdks import Instrumentor, Sdk
from .tracer import CachedApartSpan, CallSpan, ListeningTracer, ListeningTracerProvider

try:
    from opentelemetry.util.genai import completion_hook
except ImportError:  # OpenInference's instrumentors do without
    completion_hook = None  # type: ignore[assignment]

# Hooks are called in a guard that swallows every `Exception`, a soft time limit with the rest. A hook that is
# a guard itself is taken as it is.
_Guard: Any = getattr(completion_hook, "_SafeCompletionHook", object)


class _ContentHook(_Guard):  # type: ignore[misc]  # no public class to inherit from
    """Leaves the messages of a call with its span; what to make of them is decided at the span's end."""

    _wrapped = None

    def __init__(self) -> None:
        """Guard nothing."""

    def on_completion(
        self, *, inputs: Any, outputs: Any, system_instruction: Any = (), span: Any = None, **_: Any
    ) -> None:
        if isinstance(span, CallSpan):
            system = [Message("system", system_instruction)] if system_instruction else []
            span.content = ([*system, *inputs], outputs)


class Layer:
    """An instrumentor's wrappers on an SDK. They are never taken off: others may be wrapped around them."""

    def __init__(self, sdk: Sdk, instrumentor: Instrumentor, tracer: ListeningTracer) -> None:
        """Prepare it; `start` puts the wrappers on."""
        self.sdk = sdk
        self._instrumentor = instrumentor
        self._provider = ListeningTracerProvider(tracer)
        self._gated: frozenset[tuple[int, str]] = frozenset()

    def start(self) -> bool:
        """Instrument the SDK; False if its version does not suit the instrumentor, which logs why."""
        ours = _own_class(self._instrumentor)()
        before = {id(proxy) for _, _, proxy in _proxies(self.sdk.places)}
        with _SameEnvironment():
            ours.instrument(
                tracer_provider=self._provider,
                meter_provider=NoOpMeterProvider(),
                logger_provider=NoOpLoggerProvider(),
                completion_hook=_ContentHook(),
            )
        if not ours.is_instrumented_by_opentelemetry:
            return False
        if self._instrumentor.is_openinference:
            let_interrupts_out(self._instrumentor.module)
        else:
            guard(self._instrumentor.module)
        new = [found for found in _proxies(self.sdk.places) if id(found[2]) not in before]
        for owner, name, proxy in new:
            setattr(owner, name, self._gated_method(proxy))
        self._gated = frozenset((id(owner), name) for owner, name, _ in new)
        return True

    @property
    def is_in_place(self) -> bool:
        """False once the SDK has been imported anew, so that its classes are others, or a method put back.

        That is done by a mock that stood there before us, and by a user's instrumentor of Gemini (1.3b0).
        """
        found = {(id(owner), name): vars(owner).get(name) for owner, name in _members(self.sdk.places)}
        return all(
            any(plain not in _buried for plain in _plains_in(found.get(place))) for place in self._gated
        )

    def listen(self, listener: Listener | None) -> None:
        """Tell calls that start from now on to `listener`, or to nobody."""
        self._provider.tracer.listener = listener

    def _gated_method(self, proxy: Any) -> Any:
        """Return a plain function instead of a proxy.

        An instrumentor that is switched off takes away the outermost proxy of a method, whosever it is; a
        plain function it leaves alone.
        """
        method = proxy.__wrapped__
        while _is_plain(method):  # put on again, gates do not pile up
            method = method.__wrapped__
        if not hasattr(method, "__get__"):  # a mock, which stands there for a while
            return method
        _buried.update(_plains_in(method))
        mark = self.sdk.name if self.sdk.calls_itself else ""
        passage = Passage(self._is_open, mark, self.sdk.kept, self.sdk.has_managers, _variables(self.sdk))
        return _plain(method, gate(proxy._self_wrapper, passage))

    def _is_open(self) -> bool:
        return self._provider.tracer.listener is not None and not platform_sdk_is_active()


def _variables(sdk: Sdk) -> tuple[ContextVar[Any], ...]:
    named = (name.partition(":") for name in sdk.variables)
    found = (getattr(sys.modules.get(module), name, None) for module, _, name in named)
    return tuple(variable for variable in found if isinstance(variable, ContextVar))


def _own_class(instrumentor: Instrumentor) -> type[Any]:
    """Return an instrumentor's class once more, with a state of its own."""
    base = instrumentor.load()
    # litellm's keeps what it has replaced in its class.
    state = {name: type(value)() for name, value in vars(base).items() if type(value) is dict}

    class Ours(base):  # type: ignore[misc,valid-type]  # found at run time
        _instance = None
        _is_instrumented_by_opentelemetry = False

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return object.__new__(cls)

        def instrumentation_dependencies(self) -> Any:
            return instrumentor.requires or super().instrumentation_dependencies()

    for name, empty in state.items():
        setattr(Ours, name, empty)
    return Ours


_EMIT_EVENT = "OTEL_INSTRUMENTATION_GENAI_EMIT_EVENT"
"""google-genai's instrumentor (1.3b0) sets it, and so switches on the events of a user's instrumentors."""


class _SameEnvironment:
    """Takes back what an instrumentor changes in the environment."""

    def __enter__(self) -> None:
        self._before = os.environ.get(_EMIT_EVENT)

    def __exit__(self, *exc_info: object) -> None:
        if self._before is None:
            os.environ.pop(_EMIT_EVENT, None)
        else:
            os.environ[_EMIT_EVENT] = self._before


def _members(places: tuple[str, ...]) -> Iterator[tuple[Any, str]]:
    """Yield the classes of an SDK's modules with the names of their members."""
    seen = set()
    for name, module in list(sys.modules.items()):
        if not f"{name}.".startswith(places) or not isinstance(module, ModuleType):
            continue
        for kind in list(ModuleType.__getattribute__(module, "__dict__").values()):
            # Not `isinstance`: openai 1.26 has stand-ins for absent packages here, which raise when asked.
            if not issubclass(type(kind), type) or id(kind) in seen:
                continue
            seen.add(id(kind))
            if f"{kind.__module__}.".startswith(places):
                for member in list(vars(kind)):
                    yield kind, member


def _proxies(places: tuple[str, ...]) -> list[tuple[Any, str, Any]]:
    """Return the wrapped methods in an SDK's classes: class, name, and wrapt's proxy."""
    if not places:
        return []
    found = ((kind, name, vars(kind)[name]) for kind, name in _members(places))
    return [(kind, name, proxy) for kind, name, proxy in found if issubclass(type(proxy), FunctionWrapper)]


def _is_plain(method: Any) -> bool:
    # A proxy says that it is a function, and equal to what it wraps.
    return type(method) is FunctionType and method in _plains


def _plains_in(method: Any) -> Iterator[Any]:
    """Yield those functions of ours that a method is, or is wrapped around."""
    for _ in range(_MOST_WRAPPERS):
        if _is_plain(method):
            yield method
        method = getattr(method, "__wrapped__", None)


def _plain(method: Any, wrapper: Callable[..., Any]) -> Callable[..., Any]:
    bind = method.__get__
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def async_plain(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = bind(self, type(self))
            return await (
                bound(*args, **kwargs) if async_plain in _buried else wrapper(bound, self, args, kwargs)
            )

        _plains.add(async_plain)
        return async_plain

    @functools.wraps(method)
    def plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = bind(self, type(self))
        return bound(*args, **kwargs) if plain in _buried else wrapper(bound, self, args, kwargs)

    _plains.add(plain)
    return plain


_layers: dict[str, list[Layer]] = {}
"""By the SDK's name: those that are in place."""
_former: WeakSet[Layer] = WeakSet()
"""Those that were in place: what a mock puts back is theirs, and heard. Their functions keep them alive."""
_plains: WeakSet[Callable[..., Any]] = WeakSet()
"""The functions that stand in the place of SDKs' methods, and are gated."""
_buried: WeakSet[Callable[..., Any]] = WeakSet()
"""Those that stand beneath another one, with something of a user's between them: they let calls pass."""
_MOST_WRAPPERS = 30
_claims: dict[str, object] = {}
"""The claim of the thread that wraps an SDK's methods, if one does: no lock, which an interrupt could leave
locked."""
os.register_at_fork(after_in_child=_claims.clear)  # that thread is not in the child


def listen(sdk: Sdk, listener: Listener) -> Instrumentor | None:
    """Let `listener` hear of every call of an SDK that starts from now on.

    May be called again, with the same or another listener, and after the SDK was imported anew.

    Returns:
        The instrumentor that hears it; None if the installed version of the SDK is none that it takes.

    Raises:
        ImportError: there is no instrumentor.
        Exception: of any kind, from the instrumentor: the SDK is not built as it expects.
    """
    chosen = sdk.instrumentor() or sdk.instrumentors[0]
    claim = object()
    try:
        # Never waited for: whoever has it may be waiting for an import lock that this thread holds.
        if _claims.setdefault(sdk.name, claim) is not claim:
            return chosen
        layers = _layers.get(sdk.name)
        if layers is None or not all(layer.is_in_place for layer in layers):
            layers = _start(sdk, chosen)
            if not layers:
                return None
            _former.update(_layers.get(sdk.name, ()))
            _layers[sdk.name] = layers
        for layer in _all_layers(sdk):
            layer.listen(listener)
        return chosen
    finally:
        if _claims.get(sdk.name) is claim:
            del _claims[sdk.name]


def _start(sdk: Sdk, chosen: Instrumentor) -> list[Layer]:
    beside = sdk.beside if chosen is sdk.instrumentors[0] else ()
    layers = [Layer(sdk, one, _tracer(sdk, one)) for one in (chosen, *beside)]
    return layers if all(layer.start() for layer in layers) else []


def _tracer(sdk: Sdk, instrumentor: Instrumentor) -> ListeningTracer:
    tracer = ListeningTracer()
    tracer.is_framework = sdk.is_framework
    if instrumentor.counts_cached_apart:
        tracer.span_class = CachedApartSpan
    if instrumentor.is_openinference:
        facts = {"provider": sdk.provider, "has_prefixed_models": sdk.has_prefixed_models}
        tracer.span_class = type(OpenInferenceSpan.__name__, (OpenInferenceSpan,), facts)
    return tracer


def release(sdk: Sdk) -> None:
    """Hear no more calls of an SDK.

    Our wrappers stay in place and let every call pass: others may have been wrapped around them since.
    """
    for layer in _all_layers(sdk):
        layer.listen(None)


def _all_layers(sdk: Sdk) -> list[Layer]:
    return [*_layers.get(sdk.name, ()), *(layer for layer in _former if layer.sdk is sdk)]
