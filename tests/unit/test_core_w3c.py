"""W3C Trace Context and OpenTelemetry: what is believed of a header, and whose trace our runs are in.

OpenTelemetry here is its own SDK, never its global provider.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from hypothesis import example, given, settings
from hypothesis import strategies as st

from waxell_workers import WaxellContext, get_context
from waxell_workers.core import lineage, tasks, w3c
from waxell_workers.core.ids import new_id
from waxell_workers.core.records import RunStarted

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"


def header(version: str = "00", trace: str = TRACE, span: str = SPAN, flags: str = "01") -> str:
    return f"{version}-{trace}-{span}-{flags}"


# -- headers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("traceparent", "flags"),
    [
        (header(), "01"),
        (header(flags="00"), "00"),
        (header(flags="02"), "02"),
        (header(flags="ff"), "03"),
        (header(flags="09"), "01"),
        (f" {header()}\t", "01"),
        (header("01"), "01"),
        (header("cc"), "01"),
        (f"{header('cc')}-what-the-future-will-be-like", "01"),
        (f"{header('cc')}-", "01"),
        (f"{header('fe', flags='09')}-.", "01"),
    ],
)
def test_a_place_is_read(traceparent: str, flags: str) -> None:
    """Ours and versions to come, which may say more behind it; of the flags, those that mean something."""
    place = w3c.read(traceparent)
    assert place == w3c.Trace(TRACE, SPAN, flags)
    assert place.headers() == {"traceparent": f"00-{TRACE}-{SPAN}-{flags}"}


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "garbage",
        header("ff"),
        header("0"),
        header("000"),
        header("0x"),
        header("CC"),
        f"{header()}-more",
        f"{header()}-",
        f"{header()}.",
        f"{header('cc')}.what-the-future-will-not-be-like",
        f"{header('cc')}what",
        header(trace="0" * 32),
        header(span="0" * 16),
        header(trace=TRACE.upper()),
        header(span=SPAN.upper()),
        header(flags="0A"),
        header(trace=TRACE[:-1]),
        header(trace=f"{TRACE}0"),
        header(trace=f"{TRACE[:-1]}."),
        header(span=SPAN[:-1]),
        header(span=f"{SPAN}0"),
        header(flags="1"),
        header(flags="001"),
        header(flags="0."),
        header(trace="\N{ARABIC-INDIC DIGIT ZERO}" * 32),
        header().replace("-", "_"),
        header().replace("-", " - "),
        header() * 2,
        f"{header()}\n{header()}",
        f"{header('cc')}-{'x' * 500}",
        header().encode(),
        None,
        7,
        [header()],
    ],
)
def test_a_broken_traceparent_is_none(traceparent: object) -> None:
    """The cases of the specification's own test suite, and what is no string; `tracestate` goes with it."""
    assert w3c.read(traceparent, "a=1") is None


@pytest.mark.parametrize(
    ("tracestate", "kept"),
    [
        ("a=1", "a=1"),
        ("a=1, b@c=2,,", "a=1, b@c=2,,"),
        ("x" * 512, "x" * 512),
        ("x" * 513, ""),
        ("a=ü", ""),
        ("a=1\n", ""),
        ("", ""),
        (b"a=1", ""),
        (7, ""),
        (None, ""),
    ],
)
def test_a_tracestate_goes_on_whole_or_not_at_all(tracestate: object, kept: str) -> None:
    """At most the 512 characters that everybody must pass on, and nothing that would break a header."""
    place = w3c.read(header(), tracestate)
    assert place is not None
    assert place.state == kept
    assert place.headers() == {"traceparent": header()} | ({"tracestate": kept} if kept else {})


class Text(str):
    """Somebody's own kind of text."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError

    __hash__ = str.__hash__


@given(
    st.one_of(st.text(), st.binary(), st.from_regex(r"[0-9a-fA-F.-]{50,60}"), st.integers()),
    st.one_of(st.none(), st.text(), st.binary(), st.floats()),
)
@example(Text(header()), Text("a=1"))
@settings(deadline=None)
def test_nothing_is_raised_and_what_is_read_reads_the_same_again(parent: object, state: object) -> None:
    """Given anything as headers, then a place or none; and a place survives its own headers."""
    place = w3c.read(parent, state)
    if place is not None:
        again = place.headers()
        assert w3c.read(again["traceparent"], again.get("tracestate")) == place


# -- OpenTelemetry -----------------------------------------------------------------------------


@contextmanager
def span(*, sampled: bool = True, parent: str = "", state: str = "") -> Iterator[Any]:
    """A user's span, current in the block; the child of a remote one if `parent` says so."""
    pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer = TracerProvider(sampler=ALWAYS_ON if sampled else ALWAYS_OFF).get_tracer("test")
    context = TraceContextTextMapPropagator().extract({"traceparent": parent, "tracestate": state})
    with tracer.start_as_current_span("user's", context) as current:
        yield current.get_span_context()


def place_of(context: Any) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def execute(message: dict[str, Any], **options: Any) -> None:
    """Execute a task that has come with this message."""
    attempt = tasks.prepare(tasks.Task("celery", "job", "t-1", message=message), tasks.Options(**options))
    tasks.begin(attempt)
    tasks.close(attempt, "success")


@pytest.mark.parametrize("sampled", [True, False])
def test_a_context_in_a_span_is_in_its_trace(records: Any, sampled: bool) -> None:
    """A run of the user's inside a span, and the runs inside that, have the span's trace id."""
    with span(sampled=sampled) as context, WaxellContext("outer"), WaxellContext("inner"):
        pass
    assert [run.trace_id for run in records(RunStarted)] == [f"{context.trace_id:032x}"] * 2
    with WaxellContext("after"):
        pass
    assert records(RunStarted)[-1].trace_id == records(RunStarted)[-1].run_id


@pytest.mark.parametrize("inside", [True, False], ids=["in a run", "in no run"])
@pytest.mark.parametrize("sampled", [True, False])
def test_a_message_from_a_span_carries_that_span(records: Any, sampled: bool, inside: bool) -> None:
    """Both headers are the span's own, an unsampled one stays so; the task is in the trace."""
    with span(sampled=sampled, parent=header(flags=f"0{sampled:d}"), state="a=1,b=2") as context:
        if inside:
            with WaxellContext("enqueues"):
                message = lineage.outgoing({})
        else:
            message = lineage.outgoing({})
    assert message["traceparent"] == place_of(context)
    assert message["traceparent"].startswith(f"00-{TRACE}-")
    assert message["traceparent"].endswith(f"-0{sampled:d}")
    assert message["tracestate"] == "a=1,b=2"
    execute(message)
    assert {run.trace_id for run in records(RunStarted)} == {TRACE}


def test_what_a_task_enqueues_outside_any_span_keeps_state_and_flags(records: Any) -> None:
    """A chain whose middle knows no OpenTelemetry: the next message names the run as the span."""
    attempt = tasks.prepare(
        tasks.Task("celery", "job", "t-1", message={"traceparent": header(flags="00"), "tracestate": "a=1"}),
        tasks.Options(),
    )
    tasks.begin(attempt)
    message = lineage.outgoing({})
    tasks.close(attempt, "success")
    run = attempt.run
    assert message["traceparent"] == f"00-{TRACE}-{run.run_id[:16]}-00"
    assert message["tracestate"] == "a=1"


def test_what_another_tracer_has_written_is_left_alone(records: Any) -> None:
    """A traceparent that stands in the message already is its own, in a span as in a run."""
    theirs = {"traceparent": header(), "tracestate": "their=1"}
    with span(), WaxellContext("enqueues"):
        message = lineage.outgoing(theirs)
    assert set(message) == {"waxell"}


def test_what_is_ours_of_another_message_is_renewed(records: Any) -> None:
    """All headers copied from a task's own message: the place that we had put there is the old message's."""
    with WaxellContext("first"):
        first = lineage.outgoing({})
    with WaxellContext("second") as second:
        message = first | lineage.outgoing(first)
    assert message["waxell"]["run"] == second.run_id
    assert message["traceparent"] == f"00-{second.trace_id}-{second.run_id[:16]}-01"


@pytest.mark.parametrize("propagate", ["link", "none"])
def test_a_task_that_is_no_child_is_in_no_trace_of_the_sender_s(records: Any, propagate: str) -> None:
    """By its own option: a trace of its own, though the message tells one."""
    with span():
        message = lineage.outgoing({})
        execute(message, propagate=propagate)  # in the sender's span, as with OpenTelemetry's instrumentation
    [run] = records(RunStarted)
    theirs = w3c.read(message["traceparent"])
    assert w3c.is_trace_id(run.trace_id)
    assert theirs is not None
    assert run.trace_id != theirs.trace_id


def test_our_header_counts_above_traceparent(records: Any) -> None:
    """A run that is in no span may enqueue inside one: the task is in its parent's trace."""
    with WaxellContext("enqueues") as outer, span():
        message = lineage.outgoing({})
    assert outer.trace_id not in message["traceparent"]
    execute(message)
    assert {run.trace_id for run in records(RunStarted)} == {outer.trace_id}


class Interrupt(BaseException):
    pass


def asking_fails(error: BaseException) -> types.ModuleType:
    def get_current_span() -> None:
        raise error

    module = types.ModuleType("opentelemetry.trace")
    module.get_current_span = get_current_span  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("module", [types.ModuleType("half imported"), asking_fails(ValueError("broken"))])
def test_an_opentelemetry_that_fails_is_none(
    records: Any, monkeypatch: pytest.MonkeyPatch, module: types.ModuleType
) -> None:
    """Another thread is just importing it, or a span of somebody's own raises: a run has its own trace."""
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", module)
    with WaxellContext("a") as run:
        assert run.trace_id == run.run_id
        assert "traceparent" in lineage.outgoing({})


def test_an_interrupt_in_opentelemetry_goes_on(records: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A framework's interrupt that surfaces there is no failure of OpenTelemetry's; some are `Exception`s."""
    for interrupt in (Interrupt(), SoftTimeLimitExceeded()):
        monkeypatch.setitem(sys.modules, "opentelemetry.trace", asking_fails(interrupt))
        with pytest.raises(type(interrupt)):
            lineage.outgoing({})
        with pytest.raises(type(interrupt)), WaxellContext("a"):
            pass
    assert get_context() is None


def test_opentelemetry_is_never_imported() -> None:
    """Runs and messages in a process that does not use it: it is not there afterwards."""
    code = (
        "import sys\n"
        "from waxell_workers import WaxellContext\n"
        "from waxell_workers.core import lineage\n"
        "with WaxellContext('a'): assert 'traceparent' in lineage.outgoing({})\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bits", [64, 56])
def test_the_right_of_an_id_is_as_good_as_the_whole(bits: int) -> None:
    """Systems of 64 bits know a trace by its right half, and samplers compare that, or 56 bits of it, with a
    number: what one process begins is told apart, and kept as its share, not all or nothing."""
    rights = [int(new_id(), 16) & ((1 << bits) - 1) for _ in range(2000)]
    assert len(set(rights)) == len(rights)
    for share in (0.05, 0.5):
        kept = sum(right < share * (1 << bits) for right in rights) / len(rights)
        assert 0.8 * share < kept < 1.2 * share


def test_ids_of_forked_children_differ_in_each_half() -> None:
    """A child takes random bits of its own; what both have in common is the count."""
    new_id()
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, new_id().encode())
        os._exit(0)
    os.wait()
    own, child = new_id(), os.read(reading, 32).decode()
    os.close(reading)
    os.close(writing)
    assert len(own) == len(child) == 32
    assert own[:16] != child[:16]
    assert own[16:] != child[16:]
