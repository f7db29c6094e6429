"""W3C Trace Context: `traceparent` and `tracestate`, read, written, and asked of OpenTelemetry.

What comes in may be anybody's: what is not as the specification wants it counts as not there. OpenTelemetry
is asked only where the process has imported it already; nothing here imports it.

Source: https://www.w3.org/TR/trace-context/, level 1, sections 3.2 and 3.3; for flags, level 2.
"""

from __future__ import annotations

import re
import sys
from contextvars import ContextVar

import msgspec

from .content import is_interrupt

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"

_TRACE_ID = re.compile(r"(?!0{32})[0-9a-f]{32}")
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-((?!0{32})[0-9a-f]{32})-((?!0{16})[0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL
)
_TRACESTATE = re.compile(r"[\x20-\x7e]{1,512}")
_KNOWN_FLAGS = 0b11
"""`sampled` and, of level 2, `random`; whoever passes a place on clears the others."""
_USUAL_FLAGS = ("01", "00")
_LONGEST = 512
"""Characters of a `traceparent` of a version to come that are looked at; today's has 55."""


class Trace(msgspec.Struct, frozen=True):
    """A place in a trace."""

    trace_id: str
    """32 hexadecimal digits, not all 0."""
    span_id: str
    """16 hexadecimal digits, not all 0."""
    flags: str = "01"
    """2 hexadecimal digits; the lowest bit says that the trace is sampled."""
    state: str = ""
    """`tracestate` as it came, whole."""

    def headers(self) -> dict[str, str]:
        """Return the headers that say so."""
        parent = {TRACEPARENT: f"00-{self.trace_id}-{self.span_id}-{self.flags}"}
        return {**parent, TRACESTATE: self.state} if self.state else parent


around: ContextVar[Trace | None] = ContextVar("waxell_around", default=None)
"""Where in a trace all is that begins here: an adapter sets it for a web request."""


def read(traceparent: object, tracestate: object = None) -> Trace | None:
    """Return the place that these headers tell; None if they tell none.

    A version to come may say more behind what we read; that of ours may not.
    """
    if type(traceparent) is not str or len(traceparent) > _LONGEST:
        return None
    match = _TRACEPARENT.fullmatch(traceparent.strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if more and version == "00":
        return None
    known = type(tracestate) is str and _TRACESTATE.fullmatch(tracestate) is not None
    if flags not in _USUAL_FLAGS:
        flags = f"{int(flags, 16) & _KNOWN_FLAGS:02x}"
    return Trace(trace_id, span_id, flags, str(tracestate) if known else "")


def is_trace_id(value: object) -> bool:
    """True for 32 hexadecimal digits in lower case that are not all 0."""
    return type(value) is str and _TRACE_ID.fullmatch(value) is not None


def of_opentelemetry() -> Trace | None:
    """Return the place of OpenTelemetry's current span; None if it is not in use here, or has none."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return None
    try:
        context = api.get_current_span().get_span_context()
        if not context.is_valid:
            return None
        state = context.trace_state.to_header()
        flags = f"{int(context.trace_flags) & 0xFF:02x}"
        return read(f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags}", state)
    except Exception as error:  # spans may be of anybody's class, or the module half imported
        if is_interrupt(error):
            raise
        return None
