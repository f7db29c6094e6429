"""What hearing a call costs: µs per call of an SDK, bare, with OpenTelemetry's instrumentors, and with us.

    python -m tests.benchmarks.capture

`make bench-capture` runs it. The SDKs are real; their answers come from an HTTP transport in memory, so that
neither a network nor a server is in the numbers. In each round every contender has a fresh process, one after
the other; what it adds to the bare call is taken within a round. Nothing fails for a number.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from tests.benchmarks.recording import Spread, _expect, environment, journal_lines
from tests.providers import anthropic_wire, gemini_wire, openai_wire

ROUNDS = 7
CALLS = 60
WARM_UP_CALLS = 20
"""Made before the clock starts: imports, first files and first threads are not a call's everyday cost."""

BARE = "bare"
OTEL = "OpenTelemetry"
OTEL_CONTENT = "OpenTelemetry, content"
OURS = "waxell-workers"
OURS_CONTENT = "waxell-workers, content"
OTEL_CONTENT_VARIABLE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
ENVIRON = {OTEL_CONTENT: {OTEL_CONTENT_VARIABLE: "span_only"}}

PACKAGES = (
    "waxell-workers",
    "openai",
    "anthropic",
    "google-genai",
    "opentelemetry-instrumentation-genai-openai",
    "opentelemetry-sdk",
)
SIZES = (2, 100)
"""How many messages, or texts, a request has."""
MODEL = "plain"
TEXT = "The quick brown fox jumps over the lazy dog, and then does it again. " * 3


@dataclass(frozen=True)
class Sample:
    """One contender's calls of one case, in one round."""

    typical_us: float
    """The median call by the clock."""
    cpu_us: float
    """What the process computes per call, all threads, until the last record or span is handed over."""


# -- the calls ---------------------------------------------------------------------------------


def _answering(http: Any, content_type: str, body: str) -> Any:
    """Return a client of httpx, or of its successor, that gets the same answer to each request."""
    content, headers = body.encode(), {"content-type": content_type}
    return http.Client(
        transport=http.MockTransport(lambda _: http.Response(200, headers=headers, content=content))
    )


def _http_of(client: type[Any]) -> Any:
    """Return the HTTP library whose client an SDK's default client extends: `httpx`, or `httpx2`."""
    return importlib.import_module(client.__mro__[1].__module__.partition(".")[0])


def _whole(http: Any, answer: Any) -> Any:
    return _answering(http, "application/json", json.dumps(answer))


def _streamed(http: Any, events: Iterable[str]) -> Any:
    return _answering(http, "text/event-stream", "".join(events))


def _messages(size: int) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": TEXT} for number in range(size - 1)] + [
        {"role": "user", "content": TEXT}
    ]


Call = Callable[[], object]


def chat(size: int) -> Call:
    """OpenAI's chat completions."""
    import openai

    http_client = _whole(_http_of(openai.DefaultHttpxClient), openai_wire.chat(MODEL, {}))
    client, messages = openai.OpenAI(api_key="none", http_client=http_client), _messages(size)
    return lambda: client.chat.completions.create(model=MODEL, messages=messages)  # type: ignore[arg-type]


def chat_streamed(size: int) -> Call:
    """The same as a stream that is read to its end, with tokens."""
    import openai

    more: Any = {"stream": True, "stream_options": {"include_usage": True}}
    events = openai_wire.chat_events(MODEL, more)
    client = openai.OpenAI(api_key="none", http_client=_streamed(_http_of(openai.DefaultHttpxClient), events))
    messages: Any = _messages(size)

    def call() -> None:
        for _ in client.chat.completions.create(model=MODEL, messages=messages, **more):
            pass

    return call


def embeddings(size: int) -> Call:
    """OpenAI's embeddings."""
    import openai

    texts = size * [TEXT]
    answer = openai_wire.embeddings(MODEL, {"input": texts})
    client = openai.OpenAI(api_key="none", http_client=_whole(_http_of(openai.DefaultHttpxClient), answer))
    return lambda: client.embeddings.create(model=MODEL, input=texts)


def messages(size: int) -> Call:
    """Anthropic's messages."""
    import anthropic

    http_client = _whole(_http_of(anthropic.DefaultHttpxClient), anthropic_wire.messages(MODEL, {}))
    client, said = anthropic.Anthropic(api_key="none", http_client=http_client), _messages(size)
    return lambda: client.messages.create(model=MODEL, max_tokens=100, messages=said)  # type: ignore[arg-type]


def generate_content(size: int) -> Call:
    """Google's `generate_content`."""
    from google import genai
    from google.genai import types

    try:
        http = importlib.import_module("httpx2")
    except ImportError:
        http = importlib.import_module("httpx")
    options = types.HttpOptions(httpx_client=_whole(http, gemini_wire.generate(MODEL, {})))
    client = genai.Client(api_key="none", http_options=options)
    contents: Any = [
        {"role": ("user", "model")[message["role"] == "assistant"], "parts": [{"text": TEXT}]}
        for message in _messages(size)
    ]
    return lambda: client.models.generate_content(model=MODEL, contents=contents)


CASES: dict[str, tuple[Callable[[int], Call], int]] = {
    f"{name}, {size}": (make, size)
    for name, make in {
        "openai chat": chat,
        "openai chat, streamed": chat_streamed,
        "openai embeddings": embeddings,
        "anthropic messages": messages,
        "google-genai generate_content": generate_content,
    }.items()
    for size in SIZES
}


# -- the contenders ----------------------------------------------------------------------------


class Contender(Protocol):
    """One way to hear calls. Made before the SDKs are imported, in a process of its own."""

    def around(self) -> AbstractContextManager[object]:
        """Return what stands around the calls of a case."""

    def settle(self) -> None:
        """Hand everything over that is still in memory."""

    def check(self, calls: int) -> None:
        """Make sure that `calls` calls, warm-ups included, were all heard; `SystemExit` if not."""


class Bare:
    """Nobody listens."""

    def __init__(self, directory: Path, spans: int) -> None:
        pass

    def around(self) -> AbstractContextManager[object]:
        return nullcontext()

    def settle(self) -> None:
        pass

    def check(self, calls: int) -> None:
        loaded = ("waxell_workers.capture.layers", "opentelemetry.instrumentation")
        heard = [name for name in sys.modules if name.startswith(loaded)]
        _expect(heard, [], "instrumentors")


class OpenTelemetry:
    """The official instrumentors, with a `BatchSpanProcessor` whose exporter counts and drops."""

    content_expected = False

    def __init__(self, directory: Path, spans: int) -> None:
        from opentelemetry.instrumentation.genai.anthropic import AnthropicInstrumentor
        from opentelemetry.instrumentation.genai.openai import OpenAIInstrumentor
        from opentelemetry.instrumentation.google_genai import GoogleGenAiSdkInstrumentor
        from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

        class Counting(SpanExporter):
            received = 0
            with_content = 0

            def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
                self.received += len(spans)
                self.with_content += sum("gen_ai.input.messages" in (span.attributes or {}) for span in spans)
                return SpanExportResult.SUCCESS

        self._exporter = Counting()
        self._processor = BatchSpanProcessor(self._exporter, max_queue_size=max(2_048, spans))
        provider = TracerProvider()
        provider.add_span_processor(self._processor)
        for instrumentor in (OpenAIInstrumentor, AnthropicInstrumentor, GoogleGenAiSdkInstrumentor):
            # unchecked, since google-genai 3 is more than its instrumentor claims
            instrumentor().instrument(tracer_provider=provider, skip_dep_check=True)

    def around(self) -> AbstractContextManager[object]:
        return nullcontext()

    def settle(self) -> None:
        self._processor.force_flush()

    def check(self, calls: int) -> None:
        _expect(self._exporter.received, calls, "spans at the exporter")
        _expect(self._exporter.with_content > 0, self.content_expected, "spans with content")


class OpenTelemetryContent(OpenTelemetry):
    """The same, with messages as attributes of the spans."""

    content_expected = True


class Waxell:
    """Ours: each call is a record in a journal on disk, in a run; nobody ships meanwhile."""

    capture_content = False

    def __init__(self, directory: Path, spans: int) -> None:
        import waxell_workers

        self._directory = directory
        self._package = waxell_workers
        self._runs = 0
        # An address that is never asked: with an external shipper this process only writes.
        waxell_workers.init(
            api_url="http://127.0.0.1:9",
            spool_dir=str(directory),
            shipper="external",
            capture_content=self.capture_content,
        )

    def around(self) -> AbstractContextManager[object]:
        self._runs += 1
        return self._package.WaxellContext("benchmark")

    def settle(self) -> None:
        pass

    def check(self, calls: int) -> None:
        stats = self._package.stats()
        _expect(stats.recorded, calls + 2 * self._runs, "records in the journal")
        _expect(sum(stats.dropped.values()), 0, "dropped records")
        has_content = any(b'"messages":[' in line for line in journal_lines(self._directory))
        _expect(has_content, self.capture_content, "records with content")


class WaxellContent(Waxell):
    """The same, with `capture_content=True`."""

    capture_content = True


CONTENDERS: dict[str, Callable[[Path, int], Contender]] = {
    BARE: Bare,
    OTEL: OpenTelemetry,
    OURS: Waxell,
    OTEL_CONTENT: OpenTelemetryContent,
    OURS_CONTENT: WaxellContent,
}


def measure(contender: Contender, make: Callable[[int], Call], size: int, calls: int) -> Sample:
    """Time `calls` calls after the warm-up, the garbage collector as it always is."""
    call = make(size)
    with contender.around():
        for _ in range(WARM_UP_CALLS):
            call()
        contender.settle()
        gc.collect()
        clock = time.perf_counter
        cpu = time.process_time()
        times = [clock()]
        for _ in range(calls):
            call()
            times.append(clock())
        contender.settle()
        cpu = time.process_time() - cpu
    return Sample(
        statistics.median(after - before for before, after in pairwise(times)) * 1e6, cpu / calls * 1e6
    )


# -- rounds ------------------------------------------------------------------------------------

Samples = dict[str, dict[str, list[Sample]]]
"""By case, by contender, one a round."""


def measure_here(name: str, cases: Sequence[str], calls: int, directory: Path) -> dict[str, Sample]:
    """Measure a contender's cases in this process, which is to be a fresh one."""
    each = calls + WARM_UP_CALLS
    contender = CONTENDERS[name](directory, each * len(cases))
    samples = {case: measure(contender, *CASES[case], calls) for case in cases}
    contender.check(each * len(cases))
    return samples


def measure_apart(name: str, cases: Sequence[str], calls: int) -> dict[str, Sample]:
    """Measure a contender's cases in a new process."""
    command = [sys.executable, "-m", "tests.benchmarks.capture", "--contender", name, "--calls", str(calls)]
    for case in cases:
        command += ["--case", case]
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [*command, "--directory", directory],
            env=environment(**ENVIRON.get(name, {})),
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        sys.exit(f"{name} failed ({done.returncode})")
    return {case: Sample(**sample) for case, sample in json.loads(done.stdout).items()}


def play(names: Sequence[str], cases: Sequence[str], rounds: int, calls: int) -> Samples:
    """Play all rounds; each begins with another contender than the one before."""
    samples: Samples = {case: {name: [] for name in names} for case in cases}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            for case, sample in measure_apart(name, cases, calls).items():
                samples[case][name].append(sample)
    return samples


# -- the answer --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One contender on one case, over all rounds."""

    typical_us: Spread
    cpu_us: Spread
    added_typical_us: Spread
    """More than the bare call of the same round."""
    added_cpu_us: Spread


def summarise(samples: Samples) -> dict[str, dict[str, Row]]:
    """Return a row for each case and contender."""
    return {
        case: {name: _row(contenders[BARE], theirs) for name, theirs in contenders.items()}
        for case, contenders in samples.items()
    }


def _row(bare: Sequence[Sample], theirs: Sequence[Sample]) -> Row:
    pairs = list(zip(bare, theirs, strict=True))
    return Row(
        typical_us=Spread.of([sample.typical_us for sample in theirs]),
        cpu_us=Spread.of([sample.cpu_us for sample in theirs]),
        added_typical_us=Spread.of([sample.typical_us - before.typical_us for before, sample in pairs]),
        added_cpu_us=Spread.of([sample.cpu_us - before.cpu_us for before, sample in pairs]),
    )


def setting(rounds: int, calls: int) -> dict[str, Any]:
    """Return what was measured, and on what."""
    return {
        "rounds": rounds,
        "calls": calls,
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def print_table(about: Mapping[str, Any], rows: Mapping[str, Mapping[str, Row]]) -> None:
    """Print two tables for people: by the clock, and by what is computed."""
    print(
        f"One call of an SDK: median of {about['rounds']} rounds (min to max), {about['calls']} calls each."
    )
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    machine = f"{about['machine']}, {about['cores']} cores, load {about['load']:.1f}"
    print(f"{versions}; Python {about['python']}; {machine}")
    _print_measure("µs by the clock, typical call", rows, "typical_us")
    _print_measure("µs of CPU, with every thread's", rows, "cpu_us")


def _print_measure(title: str, rows: Mapping[str, Mapping[str, Row]], measure: str) -> None:
    names = [name for name in next(iter(rows.values())) if name != BARE]
    table = [[title, BARE, *(f"+ {name}" for name in names)]]
    for case, contenders in rows.items():
        cells = [_cell(getattr(contenders[BARE], measure))]
        cells += [_cell(getattr(contenders[name], f"added_{measure}")) for name in names]
        table.append([case, *cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(spread: Spread) -> str:
    """Return a spread, of which both ends may be negative."""
    return f"{spread.median:.0f} ({spread.min:.0f} to {spread.max:.0f})"


def main() -> None:
    """Measure, and print what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--calls", type=int, default=CALLS, help=f"timed calls a round ({CALLS})")
    parser.add_argument(
        "--case", action="append", choices=CASES, metavar="CASE", help="this only; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, with every sample")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = options.case or list(CASES)
    if options.contender:
        samples = measure_here(options.contender, cases, options.calls, Path(options.directory))
        print(json.dumps({case: asdict(sample) for case, sample in samples.items()}))
        return
    played = play(list(CONTENDERS), cases, options.rounds, options.calls)
    about, rows = setting(options.rounds, options.calls), summarise(played)
    if not options.json:
        print_table(about, rows)
        return
    found = {
        case: {
            name: asdict(row) | {"samples": [asdict(sample) for sample in played[case][name]]}
            for name, row in contenders.items()
        }
        for case, contenders in rows.items()
    }
    print(json.dumps(about | {"cases": found}, indent=2))


if __name__ == "__main__":
    main()
