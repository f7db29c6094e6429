"""`drain`: other tracers are flushed by the deadline or left behind; nothing is imported, made or hidden.

OpenTelemetry's SDK is the real one, with an exporter that waits for an event; openai-agents, which must not
be in our environment, has its acceptance tests.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from tests.harness import await_, environment
from waxell_workers import drain
from waxell_workers.cli.doctor import drain as doctor
from waxell_workers.cli.doctor.situation import Situation
from waxell_workers.core import tasks
from waxell_workers.core.collector import Collector, instead
from waxell_workers.core.config import Settings, resolve
from waxell_workers.core.errors import ConfigError
from waxell_workers.core.values import DRAINABLE

OTEL = "opentelemetry"
SOON_S = 0.3
LONG_S = 60.0
SLACK_S = 1.0
TRACED = """
import os, sys, threading
import waxell_workers
before = set(sys.modules), threading.active_count()
waxell_workers.init(drain=["openai-agents", "opentelemetry"])
waxell_workers.force_flush(1)
waxell_workers.shutdown(1)
loaded = set(sys.modules) - before[0]
print([name for name in loaded if name.split(".")[0] in ("agents", "opentelemetry")])
print(threading.active_count() - before[1])
print(waxell_workers.stats().drained)
"""
UNUSED = {name: {"flushed": 0, "failed": 0, "late": 0} for name in DRAINABLE}


class Gated(SpanExporter):
    """Exports when it may."""

    def __init__(self):
        self.may = threading.Event()
        self.names = []
        self.begun = 0
        self.error = None

    def export(self, spans):
        self.begun += 1
        self.may.wait(LONG_S)
        if self.error is not None:
            raise self.error
        self.names += [span.name for span in spans]
        return SpanExportResult.SUCCESS

    def force_flush(self, timeout_millis=30_000):
        return True


@pytest.fixture
def exporter(monkeypatch):
    """The exporter of a global provider, which exports only when it is flushed."""
    made = Gated()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(made, schedule_delay_millis=LONG_S * 1000))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield made
    made.may.set()
    provider.shutdown()


def span(name):
    trace.get_tracer(__name__).start_span(name).end()


def flush(flushing, timeout_s):
    """Do what a flush point does; return the seconds that it took."""
    began = time.monotonic()
    flushing.begin(began + timeout_s)()
    return time.monotonic() - began


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("waxell-drain-")]


def test_every_name_can_be_flushed():
    """What the settings allow is what can be flushed."""
    assert set(drain.TRACERS) == set(DRAINABLE)


@pytest.mark.parametrize("value", ["opentelemetry,sentry", ["opentelemetry", "sentry"]])
def test_an_unknown_name_is_refused_with_those_that_there_are(value):
    """A name that nobody knows is a `ConfigError`, wherever it was given."""
    with pytest.raises(ConfigError, match=r"drain.*'sentry'.*openai-agents, opentelemetry"):
        resolve({"drain": value}, {})


def test_names_come_from_the_environment():
    """`WAXELL_DRAIN` has names separated by commas; without it there are none."""
    assert resolve({}, {"WAXELL_DRAIN": "opentelemetry, openai-agents"}).drain == (
        "opentelemetry",
        "openai-agents",
    )
    assert resolve({}, {}).drain == ()


def test_what_the_process_does_not_use_is_neither_imported_nor_flushed(tmp_path):
    """Given tracers that are named and not used, when flushed, then no module, thread or count is there."""
    done = subprocess.run(
        [sys.executable, "-c", TRACED],
        env=environment(HOME=str(tmp_path), TMPDIR=str(tmp_path), WAXELL_CAPTURE=","),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == ["[]", "0", str(UNUSED)]


def test_a_flush_delivers_and_is_counted(exporter):
    """Given ended spans, when the flush is over, then the exporter has had them."""
    exporter.may.set()
    flushing = drain.Drain([OTEL])
    span("done")
    assert flush(flushing, LONG_S) < LONG_S / 2
    assert exporter.names == ["done"]
    await_(lambda: flushing.counts() == {OTEL: {"flushed": 1, "failed": 0, "late": 0}}, "count")


def test_a_flush_that_hangs_is_left_behind_at_the_deadline(exporter, caplog):
    """Given an exporter that hangs, then the wait ends by the deadline, is counted, and said once."""
    flushing = drain.Drain([OTEL])
    span("late")
    with caplog.at_level(logging.WARNING, "waxell_workers"):
        for _ in range(2):
            assert SOON_S <= flush(flushing, SOON_S) < SOON_S + SLACK_S
    assert flushing.counts()[OTEL]["late"] == 2
    [record] = caplog.records
    assert record.getMessage().startswith("drain: opentelemetry was not flushed in time")
    assert all(thread.daemon for thread in threads())
    exporter.may.set()
    await_(lambda: exporter.names == ["late"], "what was left behind")


def test_many_flush_points_do_not_start_many_threads(exporter):
    """Given an exporter that hangs, when tasks go on ending, then one flush hangs and one waits for it."""
    flushing = drain.Drain([OTEL])
    span("hangs")
    for _ in range(10):
        flushing.begin(time.monotonic() + 0.01)()
    assert len(threads()) <= 2
    assert exporter.begun == 1
    exporter.may.set()
    await_(lambda: not threads(), "end of the threads")


def test_a_flush_that_waits_takes_what_came_later(exporter):
    """Given a flush under way, when another task's spans come, then its flush begins after they ended."""
    flushing = drain.Drain([OTEL])
    span("first")
    flushing.begin(time.monotonic() + LONG_S)
    await_(lambda: exporter.begun, "first export")
    span("second")
    waiting = flushing.begin(time.monotonic() + LONG_S)
    span("third")
    shared = flushing.begin(time.monotonic() + LONG_S)
    exporter.may.set()
    shared()
    waiting()
    assert exporter.names == ["first", "second", "third"]


def test_a_flush_that_fails_is_counted_with_its_reason(monkeypatch, caplog):
    """Given a tracer whose flush raises, or says no, then that is counted, and the first reason said."""
    answers = iter([LookupError("no backend"), False])

    def force_flush(timeout_millis):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(trace, "_TRACER_PROVIDER", SimpleNamespace(force_flush=force_flush))
    flushing = drain.Drain([OTEL])
    with caplog.at_level(logging.WARNING, "waxell_workers"):
        for times in (1, 2):
            flush(flushing, LONG_S)
            await_(lambda times=times: flushing.counts()[OTEL]["failed"] == times, "count")
    assert [record.getMessage() for record in caplog.records] == [
        "drain: opentelemetry could not be flushed: LookupError: no backend"
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_flush_that_exits_does_not_hold_the_next(monkeypatch):
    """Given a tracer whose flush raises SystemExit, then that is a failure, and the next one is not late."""
    monkeypatch.setattr(
        trace, "_TRACER_PROVIDER", SimpleNamespace(force_flush=lambda timeout_millis: sys.exit())
    )
    flushing = drain.Drain([OTEL])
    for times in (1, 2):
        assert flush(flushing, LONG_S) < LONG_S / 2
        await_(lambda times=times: flushing.counts()[OTEL]["failed"] == times, "count")
        await_(lambda: not threads(), "end of the thread, and what is said of it")


def test_where_no_thread_can_be_started_nothing_is_waited_for(exporter, monkeypatch, caplog):
    """Given an interpreter that ends, as Python 3.12's, then the flush is late, and that is said."""

    def start(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    flushing = drain.Drain([OTEL])
    with caplog.at_level(logging.INFO, "waxell_workers"):
        assert flush(flushing, LONG_S) < SLACK_S
    assert flushing.counts()[OTEL]["late"] == 1
    assert "no thread can be started" in caplog.text


def test_an_interrupt_goes_through_and_breaks_nothing(exporter):
    """Given a time limit that strikes while we wait, then it surfaces at once, and the next flush works."""

    class TimeLimit(Exception):
        pass

    def strike(signum, frame):
        raise TimeLimit

    flushing = drain.Drain([OTEL])
    span("interrupted")
    previous = signal.signal(signal.SIGALRM, strike)
    began = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, SOON_S)
        with pytest.raises(TimeLimit):
            flush(flushing, LONG_S)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert time.monotonic() - began < SOON_S + SLACK_S
    exporter.may.set()
    span("next")
    flush(flushing, LONG_S)
    assert set(exporter.names) == {"interrupted", "next"}


def test_a_forked_child_flushes_for_itself(exporter):
    """Given a parent whose flush hangs, when it forks, then its child flushes and counts for itself."""
    flushing = drain.Drain([OTEL])
    span("of the parent")
    flush(flushing, SOON_S)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            exporter.may = threading.Event()
            exporter.may.set()
            exporter.names = []
            span("of the child")
            flush(flushing, 10)
            late = flushing.counts()[OTEL]["late"]
            os.write(writing, f"{exporter.names} {late}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as answer:
        assert answer.read() == "['of the child'] 0"


@pytest.mark.parametrize("own", [True, False])
def test_an_older_openai_agents_is_flushed_too(monkeypatch, own):
    """Given a provider that has no flush of its own (0.0.7), then its processors are flushed; else itself."""
    flushed = []
    flushes = SimpleNamespace(force_flush=lambda: flushed.append(True))
    setup = ModuleType("agents.tracing.setup")
    setup.GLOBAL_TRACE_PROVIDER = flushes if own else SimpleNamespace(_multi_processor=flushes)
    monkeypatch.setitem(sys.modules, "agents.tracing.setup", setup)
    flush(drain.Drain(["openai-agents"]), LONG_S)
    assert flushed == [True]


@pytest.mark.parametrize("provider", [None, SimpleNamespace()])
def test_a_provider_that_nobody_knows_costs_nothing(monkeypatch, provider, caplog):
    """Given none yet, or one of the user's own without a flush, then nothing is raised into the task."""
    setup = ModuleType("agents.tracing.setup")
    setup.GLOBAL_TRACE_PROVIDER = provider
    monkeypatch.setitem(sys.modules, "agents.tracing.setup", setup)
    flushing = drain.Drain(["openai-agents"])
    assert flush(flushing, LONG_S) < SLACK_S
    assert flushing.counts()["openai-agents"]["failed"] == (provider is not None)


# -- the flush points --------------------------------------------------------------------------


class Counted:
    """Stands for the other tracers, and counts the flush points."""

    def __init__(self):
        self.within_s = []

    def begin(self, deadline):
        self.within_s.append(round(deadline - time.monotonic(), 1))
        return lambda: None

    def counts(self):
        return {}


@pytest.fixture
def make_collector(tmp_path):
    def make(**settings):
        collector = Collector(
            Settings(
                api_url="http://127.0.0.1:9",
                spool_dir=str(tmp_path),
                shipper="external",
                flush_timeout=0.5,
                **settings,
            ),
            in_worker=True,
        )
        collector.others = Counted()
        return collector

    return make


@pytest.mark.parametrize(
    ("policy", "ends_process", "within_s"),
    [("periodic", False, []), ("periodic", True, [0.5]), ("task", False, [0.5]), ("task", True, [0.5])],
)
def test_a_task_s_end(make_collector, policy, ends_process, within_s):
    """Under `periodic` a task's end is no flush point, but where its process ends too; never twice."""
    collector = make_collector(flush=policy)
    with instead(collector):
        attempt = tasks.prepare(tasks.Task("rq", "ask", "1"), tasks.Options())
        tasks.begin(attempt)
        tasks.close(attempt, "success")
        tasks.flush(attempt, ends_process=ends_process)
    assert collector.others.within_s == within_s


def test_the_end_of_a_task_that_is_not_recorded(make_collector):
    """What others have of a task does not depend on whether we record it."""
    collector = make_collector(exclude=("ask",))
    with instead(collector):
        attempt = tasks.prepare(tasks.Task("rq", "ask", "1"), tasks.Options())
        tasks.flush(attempt, ends_process=True)
    assert collector.others.within_s == [0.5]


def test_the_stop_of_a_pool_s_process_and_of_its_worker_share_the_time(make_collector):
    """A pool's processes have half of `shutdown_timeout`, less its margin; the worker has the rest."""
    collector = make_collector(shutdown_timeout=3.0)
    with instead(collector):
        tasks.pool_process_stopping()
        tasks.worker_stopping(tasks.pool_share_s())
    assert collector.others.within_s == [1.2, 1.2]


def test_without_drain_a_pool_s_process_has_no_share(make_collector):
    """Who drains nothing stops as before."""
    collector = make_collector()
    collector.others = None
    with instead(collector):
        tasks.pool_process_stopping()
        assert tasks.pool_share_s() == 0.0
        assert not tasks.drains()


# -- the doctor --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "present", "said"),
    [
        ((), (), []),
        ((), ("openai-agents",), [("info", "not flushed")]),
        (("openai-agents",), ("openai-agents",), [("ok", "flushed where")]),
        (("openai-agents",), (), [("warn", "not installed here")]),
    ],
)
def test_the_doctor_says_who_is_flushed(monkeypatch, names, present, said):
    """Of each tracer that could be flushed, if it is installed or named."""
    monkeypatch.setattr(doctor, "installed", lambda name: "1.0" if name in present else "")
    found = list(doctor.check(Situation(Settings(drain=names), {})))
    assert [finding.status for finding in found] == [status for status, _ in said]
    assert all(text in finding.text for finding, (_, text) in zip(found, said, strict=True))
    assert all(finding.advice for finding in found if finding.status == "warn")


# -- the doctor --------------------------------------------------------------------------------


def test_the_doctor_tells_of_what_went_wrong_in_workers(monkeypatch, tmp_path):
    """Given a flush that is late and one that fails in another process, the doctor names both, with the last
    reason; not what is older than a day, nor half a line."""
    settings = Settings(api_url="http://127.0.0.1:9", spool_dir=str(tmp_path), drain=(OTEL,))
    situation = Situation(settings, {})
    os.makedirs(situation.directory)
    late = drain.Drain([OTEL], lambda: situation.directory)
    gate = threading.Event()
    monkeypatch.setattr(drain, "TRACERS", {OTEL: lambda: [lambda _: gate.wait(LONG_S)]})
    late.begin(time.monotonic() + 0.01)()
    late.begin(time.monotonic() + 0.01)()  # told once for a process
    gate.set()
    failing = drain.Drain([OTEL], lambda: situation.directory)
    monkeypatch.setattr(drain, "TRACERS", {OTEL: lambda: [lambda _: 1 / 0]})
    failing.begin(time.monotonic() + LONG_S)()
    log = Path(situation.directory, drain.LOG)
    await_(lambda: "failed" in log.read_text(), "word of the failure", LONG_S)
    with log.open("a") as file:
        file.write('{"at":1.0,"pid":1,"tracer":"openai-agents","end":"late","reason":"old"}\n{"at":')
    texts = [finding.text for finding in doctor.check(situation) if finding.status == "warn"]
    assert len(texts) == 2
    assert texts[0].startswith(f"{OTEL}: flushes failed in 1 processes of the last day, ")
    assert texts[0].endswith("ZeroDivisionError: division by zero")
    assert texts[1].startswith(f"{OTEL}: flushes were late in 1 processes of the last day")


def test_word_that_cannot_be_left_fails_nobody(monkeypatch, tmp_path):
    """Given a spool that has gone, a flush that fails is counted all the same."""
    flushing = drain.Drain([OTEL], lambda: str(tmp_path / "gone"))
    monkeypatch.setattr(drain, "TRACERS", {OTEL: lambda: [lambda _: 1 / 0]})
    flushing.begin(time.monotonic() + LONG_S)()
    await_(lambda: flushing.counts()[OTEL]["failed"] == 1, "count of the failure", LONG_S)
