"""What recording costs a task: µs per run with one LLM call, beside two other tracers and the bare writes.

`make bench` runs it. In each round every contender has a fresh process of its own, one after the other, so
that a slow minute of the machine falls on all of them and no background thread disturbs a neighbour; ratios
are taken within a round. Nothing here fails for a number: it prints whether the aim is met, and exits 0.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from waxell_workers.cli.processes import Children
from waxell_workers.core.segments import FIRST_LINE

ROUNDS = 15
RUNS = 2_000
WARM_UP_RUNS = 200
"""Recorded before the clock starts: imports, first files and first threads are not a task's everyday cost."""
START_S = 30.0
DELIVERY_S = 120.0

WAXELL = "waxell-workers"
SHIPPING = "waxell-workers, shipper exporting"
AGENTS = "openai-agents"
OTEL = "opentelemetry"
BARE = "bare writes"
AIMS = {AGENTS: 0.5, OTEL: 0.3}
"""The most that recording may cost, as a share of what it costs the other."""
PACKAGES = ("waxell-workers", "openai-agents", "opentelemetry-sdk")

MODEL = "gpt-4o-mini"
TOKENS_IN = 412
TOKENS_OUT = 96


@dataclass(frozen=True)
class Sample:
    """One contender in one round."""

    typical_us: float
    """What a task waits for its run, by the clock: the median run. Neither other programs that take the
    processor away nor the contender's own batch thread and garbage collections are in many runs."""
    mean_us: float
    """The same, as the mean: all of these are in it, in proportion."""
    cpu_us: float
    """What the process computes, per run: batch thread and collections, but no other program. It is taken
    when the exporter has the last item: a task's process pays for all its threads, by way of the GIL."""


class Contender(Protocol):
    """One way to record. Made, used and checked in a process of its own."""

    def record(self) -> None:
        """Record one run with one call, by the tracer's public interface."""

    def settle(self) -> None:
        """Have done what the warm-up left behind."""

    def drain(self) -> None:
        """Hand everything over that is still in memory."""

    def check(self, runs: int) -> None:
        """Make sure that `runs` runs, warm-up included, were all recorded; `SystemExit` if not."""


def measure(contender: Contender, runs: int) -> Sample:
    """Time `runs` runs of a contender, after the warm-up, the garbage collector as it always is."""
    for _ in range(WARM_UP_RUNS):
        contender.record()
    contender.settle()
    gc.collect()
    record, clock = contender.record, time.perf_counter
    cpu = time.process_time()
    times = [clock()]
    for _ in range(runs):
        record()
        times.append(clock())
    contender.drain()
    cpu = time.process_time() - cpu
    waits = [after - before for before, after in pairwise(times)]
    return Sample(statistics.median(waits) * 1e6, statistics.fmean(waits) * 1e6, cpu / runs * 1e6)


# -- the contenders ----------------------------------------------------------------------------


class Waxell:
    """Three records in a journal on disk; nobody ships meanwhile."""

    def __init__(self, directory: Path, runs: int) -> None:
        import waxell_workers
        from waxell_workers import WaxellContext

        # An address that is never asked: with an external shipper this process only writes.
        url = os.environ.get("WAXELL_API_URL", "http://127.0.0.1:9")
        waxell_workers.init(
            api_url=url, spool_dir=str(directory), shipper="external", flush="periodic", capture=()
        )
        self._context = WaxellContext
        self._package = waxell_workers

    def record(self) -> None:
        with self._context("support-agent", "answer") as run:
            run.record_llm_call(model=MODEL, tokens_in=TOKENS_IN, tokens_out=TOKENS_OUT)

    def settle(self) -> None:
        pass

    def drain(self) -> None:
        pass

    def check(self, runs: int) -> None:
        stats = self._package.stats()
        _expect(stats.recorded, 3 * runs, "records in the journal")
        _expect(sum(stats.dropped.values()), 0, "dropped records")


class WaxellShipping(Waxell):
    """The same, while a shipper process with a backlog exports to the local server."""

    _backlog = 0

    def settle(self) -> None:
        pending = 0
        while not pending:
            for _ in range(5_000):
                self.record()
            self._backlog += 5_000
            pending = self._package.force_flush(0.3).pending

    def check(self, runs: int) -> None:
        super().check(runs + self._backlog)
        _expect(bool(self._package.force_flush(DELIVERY_S)), True, "delivered")


class Agents:
    """A trace and a generation span through openai-agents' `BatchTraceProcessor`."""

    def __init__(self, directory: Path, runs: int) -> None:
        from agents.tracing import generation_span, set_trace_processors, trace
        from agents.tracing.processor_interface import TracingExporter
        from agents.tracing.processors import BatchTraceProcessor

        class Counting(TracingExporter):
            received = 0

            def export(self, items: Sequence[Any]) -> None:
                self.received += len(items)

        self._exporter = Counting()
        self._processor = BatchTraceProcessor(self._exporter, max_queue_size=_queue_size(runs, 8_192))
        set_trace_processors([self._processor])
        self._trace, self._generation_span = trace, generation_span

    def record(self) -> None:
        with (
            self._trace("support-agent"),
            self._generation_span(
                model=MODEL, usage={"input_tokens": TOKENS_IN, "output_tokens": TOKENS_OUT}
            ),
        ):
            pass

    def settle(self) -> None:
        self._processor.force_flush()

    drain = settle

    def check(self, runs: int) -> None:
        _expect(self._exporter.received, 2 * runs, "items at the exporter")


class OpenTelemetry:
    """A root span and a child with the GenAI attributes through OpenTelemetry's `BatchSpanProcessor`."""

    def __init__(self, directory: Path, runs: int) -> None:
        from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
        from opentelemetry.trace import SpanKind

        class Counting(SpanExporter):
            received = 0

            def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
                self.received += len(spans)
                return SpanExportResult.SUCCESS

        self._exporter = Counting()
        self._processor = BatchSpanProcessor(self._exporter, max_queue_size=_queue_size(runs, 2_048))
        provider = TracerProvider()
        provider.add_span_processor(self._processor)
        self._start = provider.get_tracer("tests.benchmarks").start_as_current_span
        self._client = SpanKind.CLIENT

    def record(self) -> None:
        agent = {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "support-agent"}
        call = {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": MODEL,
            "gen_ai.usage.input_tokens": TOKENS_IN,
            "gen_ai.usage.output_tokens": TOKENS_OUT,
        }
        with (
            self._start("invoke_agent support-agent", attributes=agent),
            self._start(f"chat {MODEL}", kind=self._client, attributes=call),
        ):
            pass

    def settle(self) -> None:
        self._processor.force_flush()

    drain = settle

    def check(self, runs: int) -> None:
        _expect(self._exporter.received, 2 * runs, "spans at the exporter")


class BareWrites:
    """The bytes that `Waxell` has just written, again: three writes a run and nothing else."""

    def __init__(self, directory: Path, runs: int) -> None:
        lines = journal_lines(directory)
        self._bytes = sum(map(len, lines))
        self._runs: Iterator[Sequence[bytes]] = zip(lines[::3], lines[1::3], lines[2::3], strict=True)
        self._path = directory / "bare"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o600)

    def record(self) -> None:
        started, call, ended = next(self._runs)
        os.write(self._descriptor, started)
        os.write(self._descriptor, call)
        os.write(self._descriptor, ended)

    def settle(self) -> None:
        pass

    def drain(self) -> None:
        pass

    def check(self, runs: int) -> None:
        _expect(self._path.stat().st_size, self._bytes, "bytes")


CONTENDERS: dict[str, Callable[[Path, int], Contender]] = {
    WAXELL: Waxell,
    AGENTS: Agents,
    OTEL: OpenTelemetry,
    BARE: BareWrites,
    SHIPPING: WaxellShipping,
}
"""In the order of a round: `BARE` writes what `WAXELL` has written, the one with a backlog comes last."""


def journal_lines(spool: Path) -> list[bytes]:
    r"""Return the records of the journal in a spool as they were written: `\n`, JSON, `\n`."""
    (segment,) = spool.glob("*/*.ndjson")
    text = segment.read_bytes().removeprefix(FIRST_LINE)
    return [b"\n" + line + b"\n" for line in text.split(b"\n") if line]


def _queue_size(runs: int, default: int) -> int:
    """Return a queue's size with which nothing is dropped: what would be, would cost nothing."""
    return max(default, 2 * (runs + WARM_UP_RUNS))


def _expect(found: object, expected: object, what: str) -> None:
    if found != expected:
        sys.exit(f"{what}: {found}, not {expected}")


# -- rounds ------------------------------------------------------------------------------------


def play_round(names: Sequence[str], runs: int, directory: Path, server: str) -> dict[str, Sample]:
    """Measure each contender once, each in a process of its own."""
    samples = {}
    for name in names:
        spool = directory / ("shipping" if name == SHIPPING else "spool")
        spool.mkdir(exist_ok=True)
        if name == SHIPPING:
            with shipper(spool, server):
                samples[name] = measure_apart(name, runs, spool, WAXELL_API_URL=server)
        else:
            samples[name] = measure_apart(name, runs, spool)
    return samples


def measure_apart(name: str, runs: int, directory: Path, **environ: str) -> Sample:
    """Measure a contender in a new process."""
    command = [
        sys.executable,
        __file__,
        "--contender",
        name,
        "--runs",
        str(runs),
        "--directory",
        str(directory),
    ]
    done = subprocess.run(command, env=environment(**environ), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{name} failed ({done.returncode})")
    return Sample(**json.loads(done.stdout))


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what would configure a contender."""
    foreign = ("WAXELL_", "OPENAI_", "OTEL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {"NO_PROXY": "127.0.0.1,localhost"} | more


@contextmanager
def local_server(directory: Path) -> Iterator[str]:
    """Run the local server and yield its address."""
    with Children(directory) as children:
        serve = [sys.executable, "-m", "waxell_workers.server", "--port", "0"]
        command = [*serve, "--db", str(directory / "runs.db")]
        yield children.start("server", command, environment()).wait_for_line("http://", START_S)


@contextmanager
def shipper(spool: Path, url: str) -> Iterator[None]:
    """Run a shipper process for a spool."""
    with Children(spool) as children:
        ship = [sys.executable, "-m", "waxell_workers.cli.main", "ship"]
        command = [*ship, "--spool-dir", str(spool), "--url", url]
        child = children.start("shipper", command, environment())
        child.wait_for(lambda: any(spool.glob("*/ship.lock")), "its lock", START_S)
        yield


def play(names: Sequence[str], rounds: int, runs: int, parent: str | None = None) -> dict[str, list[Sample]]:
    """Play all rounds; return each contender's samples, in the order of the rounds."""
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=parent) as place, local_server(Path(place)) as server:
        for number in range(1, rounds + 1):
            print(f"round {number} of {rounds}", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=place) as directory:
                for name, sample in play_round(names, runs, Path(directory), server).items():
                    samples[name].append(sample)
    return samples


# -- the answer --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, and between what they lay."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of one value a round."""
        return cls(statistics.median(values), min(values), max(values))

    def format(self, digits: int) -> str:
        """Return it as a cell of the table."""
        return f"{self.median:.{digits}f} ({self.min:.{digits}f}-{self.max:.{digits}f})"


@dataclass(frozen=True)
class Row:
    """One contender over all rounds."""

    typical_us: Spread
    mean_us: Spread
    cpu_us: Spread
    typical_ratio: Spread
    """waxell-workers divided by this one, within each round."""
    mean_ratio: Spread
    cpu_ratio: Spread


@dataclass(frozen=True)
class Verdict:
    """Whether an aim is met, by one measure."""

    than: str
    by: str
    at_most: float
    ratio: float
    met: bool


def summarise(samples: Mapping[str, Sequence[Sample]]) -> dict[str, Row]:
    """Return a row for each contender."""
    rows = {}
    for name, theirs in samples.items():
        pairs = list(zip(samples[WAXELL], theirs, strict=True))
        rows[name] = Row(
            typical_us=Spread.of([sample.typical_us for sample in theirs]),
            mean_us=Spread.of([sample.mean_us for sample in theirs]),
            cpu_us=Spread.of([sample.cpu_us for sample in theirs]),
            typical_ratio=Spread.of([ours.typical_us / other.typical_us for ours, other in pairs]),
            mean_ratio=Spread.of([ours.mean_us / other.mean_us for ours, other in pairs]),
            cpu_ratio=Spread.of([ours.cpu_us / other.cpu_us for ours, other in pairs]),
        )
    return rows


def verdicts(rows: Mapping[str, Row]) -> list[Verdict]:
    """Say of each aim whether it is met, by each measure."""
    return [
        Verdict(name, measure, at_most, ratio.median, ratio.median <= at_most)
        for name, at_most in AIMS.items()
        if name in rows
        for measure, ratio in (
            ("typical", rows[name].typical_ratio),
            ("mean", rows[name].mean_ratio),
            ("CPU", rows[name].cpu_ratio),
        )
    ]


def setting(rounds: int, runs: int) -> dict[str, Any]:
    """Return what was measured, and on what."""
    return {
        "rounds": rounds,
        "runs": runs,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in PACKAGES},
    }


def print_table(about: Mapping[str, Any], rows: Mapping[str, Row]) -> None:
    """Print everything for people."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    print(
        f"A run with one LLM call: median of {about['rounds']} rounds (min-max), {about['runs']} runs each.\n"
        f"{versions}; Python {about['python']}; {about['machine']}, load {about['load']:.1f}\n"
    )
    times = [("µs per run", "typical", "mean", "CPU")]
    ratios = [(f"{WAXELL} ÷", "typical", "mean", "CPU")]
    for name, row in rows.items():
        times.append((name, *(cell.format(1) for cell in (row.typical_us, row.mean_us, row.cpu_us))))
        if name != WAXELL:
            found = (row.typical_ratio, row.mean_ratio, row.cpu_ratio)
            ratios.append((name, *(cell.format(2) for cell in found)))
    _print_columns(times)
    _print_columns(ratios)
    for verdict in verdicts(rows):
        print(
            f"aim: at most {verdict.at_most} of {verdict.than}; {verdict.by}: {verdict.ratio:.2f},"
            f" {'met' if verdict.met else 'NOT met'}"
        )


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    print()


def main() -> None:
    """Measure and print; with `--contender`, be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--runs", type=int, default=RUNS, help="runs per contender and round")
    parser.add_argument(
        "--directory", help="where files are written; the system's temporary one unless given"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, with every sample")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        contender = CONTENDERS[options.contender](Path(options.directory), options.runs)
        sample = measure(contender, options.runs)
        contender.check(options.runs + WARM_UP_RUNS)
        print(json.dumps(asdict(sample)))
        return
    samples = play(list(CONTENDERS), options.rounds, options.runs, options.directory)
    rows = summarise(samples)
    about = setting(options.rounds, options.runs)
    if not options.json:
        print_table(about, rows)
        return
    contenders = {
        name: asdict(row) | {"samples": [asdict(sample) for sample in samples[name]]}
        for name, row in rows.items()
    }
    print(
        json.dumps(
            about | {"contenders": contenders, "aims": [asdict(verdict) for verdict in verdicts(rows)]},
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
