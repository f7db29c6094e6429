"""Which calls are made inside a framework's own span: one call of a model is told once, by who knows it best.

A framework (langchain, litellm, an agent's generation) describes a call of a model, and the SDK beneath it
describes the same call. The inner one is told: it knows the true model, tokens and retries. The outer one is
told only if nobody spoke inside it. What encloses what is read from the OpenTelemetry context, where a
framework makes its span current, and from a contextvar of ours, where it only has callbacks.
"""

from __future__ import annotations

from contextvars import ContextVar

_FOLD_AT = 64


class Layer:
    """A span of any kind, as far as nesting goes; `tracer.CallSpan` and agents' spans are such."""

    def __init__(self, enclosing: Layer | None, *, is_framework: bool) -> None:
        """Open inside `enclosing`, the framework's span around this one, or None."""
        self.enclosing = enclosing
        self.is_framework = is_framework
        self.is_open = True
        self.is_told = False
        """True once a call was told for it."""
        self.inner: list[Layer] = []
        self._fold_at = _FOLD_AT
        if enclosing is not None:
            enclosing._take(self)

    def _take(self, inner: Layer) -> None:
        self.inner.append(inner)
        if len(self.inner) >= self._fold_at:
            self._fold()
            self._fold_at = max(_FOLD_AT, 2 * len(self.inner))

    def _fold(self) -> None:
        """Forget all that is settled but one that was told: a span may be open for as long as its process."""
        known = next((inner for inner in self.inner if inner.is_told), None)
        for inner in list(self.inner):
            if not inner.is_open and inner is not known and (inner.is_told or not inner.inner):
                # in place, for other threads may be adding to it
                self.inner.remove(inner)

    def is_superseded(self) -> bool:
        """True if a call was told inside it, or will be: a stream in there is still open."""
        return self.is_framework and any(
            inner.is_told or (inner.is_open and not inner.is_framework) or inner.is_superseded()
            for inner in self.inner
        )


_around: ContextVar[Layer | None] = ContextVar("waxell_framework_span", default=None)


def enclosing(current: object) -> Layer | None:
    """Return the framework's span around a span that starts here.

    Arguments:
        current: the span that the OpenTelemetry context holds, of whatever kind.
    """
    if isinstance(current, Layer):
        found = current if current.is_framework else current.enclosing
        if found is not None and found.is_open:
            return found
    around = _around.get()
    while around is not None and not around.is_open:
        around = around.enclosing
    return around


def innermost() -> Layer | None:
    """Return what was entered last here, open or not."""
    return _around.get()


def enter(layer: Layer) -> None:
    """Make a framework's span the one around all that starts here, until `leave`."""
    _around.set(layer)


def leave(layer: Layer) -> None:
    """Leave a framework's span, if it is still the one that is around here."""
    if _around.get() is layer:
        _around.set(layer.enclosing)
