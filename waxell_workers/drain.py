"""Flushing the tracers that this process uses beside us, where `drain` names them, at our own flush points.

A tracer is looked up in `sys.modules` and called by its own public flush; nothing is imported or made here.
Such a flush may hang for minutes and may not be told to end, so each runs in a daemon thread that is started
for it and, past the deadline, left behind. No lock is waited for without a timeout: an interrupt may surface
in whoever waits, at any instruction, and a fork may happen at any other.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from .core.content import is_interrupt
from .core.sidefile import append
from .core.tally import Tally

logger = logging.getLogger("waxell_workers")

Flush = Callable[[float], object]
"""Flushes one tracer, given the seconds that there are; False if it says that it was not done."""

_SLICE_S = 0.1
"""How late an exception may surface that another thread raises here: not in the midst of a system call."""
_LEAST_MS = 1


# -- which tracers, and how --------------------------------------------------------------------


def _openai_agents() -> Iterator[Flush]:
    """openai-agents: its global provider, which exists once the first trace or processor was made.

    `GLOBAL_TRACE_PROVIDER`, not `get_trace_provider()`, which would make one, and an HTTP client with it.
    """
    provider = getattr(sys.modules.get("agents.tracing.setup"), "GLOBAL_TRACE_PROVIDER", None)
    if provider is None:
        return
    # 0.0.7 and others before `flush_traces()`: the provider hands everything on to this, and has no flush.
    flush = getattr(provider, "force_flush", None) or provider._multi_processor.force_flush
    yield lambda _: flush()


_SIGNALS = (
    ("opentelemetry.sdk.trace", "opentelemetry.trace", "get_tracer_provider"),
    ("opentelemetry.sdk._logs", "opentelemetry._logs", "get_logger_provider"),
    ("opentelemetry.sdk.metrics", "opentelemetry.metrics", "get_meter_provider"),
)
"""Module of the SDK, module of the API, and the function that returns the global provider."""


def _opentelemetry() -> Iterator[Flush]:
    """OpenTelemetry: the global providers of spans, logs and metrics, one after the other.

    Without the SDK there is nothing to flush, and asking the API could load a provider that nobody uses.
    """
    for sdk, api, getter in _SIGNALS:
        if sdk in sys.modules and api in sys.modules:
            flush = getattr(getattr(sys.modules[api], getter)(), "force_flush", None)
            if flush is not None:
                yield _with_milliseconds(flush)


def _with_milliseconds(flush: Callable[..., object]) -> Flush:
    return lambda timeout_s: flush(timeout_millis=max(_LEAST_MS, int(timeout_s * 1000)))


TRACERS: Mapping[str, Callable[[], Iterable[Flush]]] = {
    "openai-agents": _openai_agents,
    "opentelemetry": _opentelemetry,
}
"""Name, as in `core.values.DRAINABLE`, to a function that yields the flushes of what is in use."""


# -- flushing ----------------------------------------------------------------------------------


class _Flush:
    """One flush of one tracer, in a thread of its own; several may wait for it."""

    def __init__(
        self, flushes: list[Flush], deadline: float, after: _Flush | None, ended: Callable[[str], None]
    ) -> None:
        self._flushes = flushes
        self._deadline = deadline
        self._after = after
        self._ended = ended
        self._gate = threading.Lock()
        self._gate.acquire()
        self.has_begun = False
        self.is_over = False

    def start(self, name: str) -> None:
        """Start the thread.

        Raises:
            RuntimeError: no thread can be started: there are too many, or the interpreter ends.
        """
        threading.Thread(target=self._run, name=f"waxell-drain-{name}", daemon=True).start()

    def _run(self) -> None:
        if self._after is not None:  # not two at once: one that hangs would get company at each task's end
            self._after.wait(math.inf)
            self._after = None
        self.has_begun = True
        errors = ["it was ended"]  # by a SystemExit, a GreenletExit
        try:
            errors = [error for flush in self._flushes if (error := self._call(flush))]
        finally:
            self.is_over = True
            self._gate.release()
            self._ended("; ".join(errors))

    def _call(self, flush: Flush) -> str:
        try:
            done = flush(max(0.0, self._deadline - time.monotonic()))
        except Exception as error:  # noqa: BLE001  somebody else's code, in a thread that does nothing else
            return f"{type(error).__name__}: {error}"
        return "it says that it was not done" if done is False else ""

    def wait(self, deadline: float) -> bool:
        """Wait for the end, at most until the deadline; True if it has come."""
        while not self.is_over and (left := deadline - time.monotonic()) > 0:
            if self._gate.acquire(timeout=min(left, _SLICE_S)):
                self._gate.release()  # for the next one who waits
        return self.is_over


class _Tracer:
    """One tracer in one process: which of its flushes are under way, and how the others have ended."""

    def __init__(self, name: str, directory: Callable[[], str]) -> None:
        self.name = name
        self._directory = directory
        self.ends = {"flushed": Tally(), "failed": Tally(), "late": Tally()}
        self._under_way: list[_Flush] = []
        self._told: set[str] = set()

    def begin(self, deadline: float) -> _Flush | None:
        """Start a flush, or join one that has not begun yet; None if there is nothing to flush, or no way."""
        try:
            flushes = list(TRACERS[self.name]())
        except Exception as error:  # a provider of the user's own; and interrupts must pass
            if is_interrupt(error):
                raise
            self._count("failed", type(error).__name__)
            return None
        if not flushes:
            return None
        self._under_way = [flush for flush in self._under_way if not flush.is_over]
        if self._under_way and not self._under_way[-1].has_begun:
            return self._under_way[-1]
        after = self._under_way[-1] if self._under_way else None
        flush = _Flush(flushes, deadline, after, self._ended)
        try:
            flush.start(self.name)
        except RuntimeError as error:
            # Python 3.12 starts none at the interpreter's end, where tracers have exit hooks of their own.
            self._count("late", f"no thread can be started for it: {error}", logging.INFO)
            return None
        self._under_way.append(flush)
        return flush

    def wait(self, flush: _Flush, deadline: float) -> None:
        """Wait until a flush is over; count it if the deadline comes first."""
        if not flush.wait(deadline):
            self._count("late", "it goes on for as long as this process lives")

    def _ended(self, error: str) -> None:
        self._count("failed" if error else "flushed", error)

    def _count(self, end: str, reason: str, level: int = logging.WARNING) -> None:
        if reason and end not in self._told:
            self._told.add(end)
            logger.log(level, "drain: %s %s: %s", self.name, _SAID[end], reason)
            if level == logging.WARNING:
                _write_down(self._directory(), self.name, end, reason)
        self.ends[end].add()


_SAID = {"failed": "could not be flushed", "late": "was not flushed in time"}


LOG = "drain.log"
"""Beside the journal: the first failure and the first lateness of each process, a line of JSON each."""
_LOG_BYTES = 256 << 10
_REASON_CHARACTERS = 200


def _write_down(directory: str, name: str, end: str, reason: str) -> None:
    """Leave word for the doctor, who runs in another process."""
    if not directory:
        return
    said = {"at": time.time(), "pid": os.getpid(), "tracer": name, "end": end}
    line = msgspec.json.encode({**said, "reason": reason[:_REASON_CHARACTERS]})
    try:
        append(f"{directory}/{LOG}", line + b"\n", _LOG_BYTES)
    except OSError:  # it was logged
        pass


class Drain:
    """Flushes the tracers of these names, as the core's `OtherTracers`."""

    def __init__(self, names: Iterable[str], directory: Callable[[], str] = str) -> None:
        """Flush these tracers.

        Args:
            names: some of `core.values.DRAINABLE`.
            directory: returns the journal's, or an empty string.
        """
        self._names = tuple(names)
        self._directory = directory
        self._processes: dict[int, list[_Tracer]] = {}

    @property
    def _here(self) -> list[_Tracer]:
        # A forked child begins anew: the flushes of its parent are not under way in it.
        pid = os.getpid()
        return self._processes.get(pid) or self._processes.setdefault(
            pid, [_Tracer(name, self._directory) for name in self._names]
        )

    def begin(self, deadline: float) -> Callable[[], None]:
        """Start flushing what is in use; return what waits for it, at most until the deadline.

        Args:
            deadline: `time.monotonic()` in seconds.
        """
        begun = [(tracer, flush) for tracer in self._here if (flush := tracer.begin(deadline))]

        def wait() -> None:
            for tracer, flush in begun:
                tracer.wait(flush, deadline)

        return wait

    def counts(self) -> dict[str, dict[str, int]]:
        """Return, by name, how many flushes of this process were done, failed, and were late.

        One that was late counts once more when it ends after all.
        """
        return {
            tracer.name: {end: tally.value for end, tally in tracer.ends.items()} for tracer in self._here
        }
