"""What three tracers deliver of a Celery worker's LLM calls, by how the worker or the task ends.

`make losses` runs it, in about 15 minutes; one tracer comes twice, without `drain` and with it. Each trial
has a real worker of its own on the embedded Valkey, the tasks of `losses_app` and the stand-in model. A call
counts as delivered when a process outside the worker has it: for waxell-workers the local server, for the
others an HTTP server in this process, to which their exporters POST.
Nothing here fails for a number: it prints what it found, and exits 1 only if a trial could not be made.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

from tests.harness import Worker, children_in, start_model, start_server, start_valkey

APP = Path(__file__).parent / "losses_app"
TASKS = 100
LEFT_S = 15.0
"""How long a worker is left running, and how long anything may take to arrive after an end."""
TIME_LIMIT_S = 2
END_S = 60.0
"""The longest that Celery may take to notice the end of a process: it looks every 5 s."""

WAXELL = "waxell-workers"
MODULES = {
    "openai-agents": "openai_agents",
    "openai-agents with drain": "drain",
    "opentelemetry": "opentelemetry",
    WAXELL: "waxell_workers",
}
POOLS = {
    "prefork": ("--pool", "prefork", "--concurrency", "2"),
    "threads": ("--pool", "threads", "--concurrency", "4"),
}
PACKAGES = ("waxell-workers", "openai-agents", "opentelemetry-sdk", "celery", "openai")


@dataclass(frozen=True)
class Backends:
    """What every trial needs, started once."""

    broker: str
    model: str
    server: str
    collector: str
    arrived: Callable[[], Counter[str]]
    """How often the call of each marker is there, at the local server or at the collector."""


@dataclass
class Trial:
    """One worker with one tracer, from its start to its end."""

    worker: Worker
    pool: str
    arrived: Callable[[], Counter[str]]
    markers: list[str] = field(default_factory=list)
    work_s: float = 0.0

    def work(self, *arguments: str) -> None:
        """Have the worker do all tasks, which wait for it; return when it says that the last is done."""
        self.markers = list(self.worker.send_many(TASKS).values())
        self.worker.start(*POOLS[self.pool], *arguments)
        began = time.monotonic()
        self.worker.await_received_results(TASKS)
        self.work_s = time.monotonic() - began

    def send(self, task: str, *arguments: object, **options: object) -> None:
        """Start the worker, then have it do one task."""
        self.markers = [f"{self.worker.queue}-only"]
        self.worker.start(*POOLS[self.pool])
        self.worker.send(task, *self.markers, *arguments, **options)

    def delivered(self) -> int:
        """Return how many calls are there."""
        return len(self.arrived().keys() & set(self.markers))

    def repeated(self) -> int:
        """Return how many calls are there more than once."""
        arrived = self.arrived()
        return sum(arrived[marker] > 1 for marker in self.markers)

    def check(self) -> None:
        """Make sure that every call was made: what a task did not do, nobody can lose."""
        made = sum(f"called {marker}" in self.worker.text for marker in self.markers)
        assert made == len(self.markers), f"only {made} of {len(self.markers)} calls were made"

    def await_delivery(self) -> None:
        """Wait until everything is there, or for as long as a worker is left running."""
        deadline = time.monotonic() + LEFT_S
        while self.delivered() < len(self.markers) and time.monotonic() < deadline:
            time.sleep(0.1)


# -- the ends ----------------------------------------------------------------------------------


def left_running(trial: Trial) -> None:
    """The worker idles after the last task."""
    trial.work()
    time.sleep(LEFT_S)


def sigterm(trial: Trial) -> None:
    """SIGTERM to the worker's main process right after the last task: Celery's warm shutdown."""
    trial.work()
    trial.worker.terminate()
    trial.await_delivery()


def sigkill(trial: Trial) -> None:
    """SIGKILL to the worker's main process and all its descendants right after the last task."""
    trial.work()
    trial.worker.kill_tree()
    trial.await_delivery()


def recycled(trial: Trial) -> None:
    """Every pool process is replaced after 10 tasks; the worker idles after the last task."""
    trial.work("--max-tasks-per-child", "10")
    time.sleep(LEFT_S)


def time_limit(trial: Trial) -> None:
    """The hard time limit kills the pool process in mid-task, after the call; the worker idles."""
    trial.send("ask_then_sleep", 60, time_limit=TIME_LIMIT_S)
    trial.worker.await_log("TimeLimitExceeded", timeout_s=END_S)
    trial.await_delivery()


def killed(trial: Trial) -> None:
    """SIGKILL to the process that runs the task, in mid-task, after the call; the worker, if alive, idles."""
    trial.send("ask_then_die")
    if trial.pool == "threads":
        assert trial.worker.process is not None
        trial.worker.process.wait(END_S)
    else:
        trial.worker.await_log("WorkerLostError", timeout_s=END_S)
    trial.await_delivery()


ENDS: Mapping[str, Callable[[Trial], None]] = {
    "left running": left_running,
    "SIGTERM": sigterm,
    "SIGKILL": sigkill,
    "recycled": recycled,
    "time limit": time_limit,
    "task killed": killed,
}
PREFORK_ONLY = ("recycled", "time limit")
"""Celery's thread pool can do neither."""


# -- trials ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What one trial found."""

    tracer: str
    pool: str
    end: str
    calls: int
    delivered: int
    repeated: int
    """Calls that arrived more than once."""
    work_s: float
    """From the worker's `ready` to its last task's end; 0 where there is one task only."""


def play(tracer: str, pool: str, end: str, backends: Backends, directory: Path) -> Result:
    """Make one trial; whatever happens, its worker is gone afterwards."""
    settings = {"TRACER": MODULES[tracer], "COLLECTOR_URL": backends.collector}
    worker = Worker(backends.broker, backends.model, backends.server, directory, settings=settings, app=APP)
    trial = Trial(worker, pool, backends.arrived)
    try:
        ENDS[end](trial)
        trial.check()
        return Result(
            tracer, pool, end, len(trial.markers), trial.delivered(), trial.repeated(), trial.work_s
        )
    finally:
        worker.stop()


def play_all(plan: Sequence[tuple[str, str, str]]) -> Iterator[Result | None]:
    """Make the trials of a plan one after the other; None stands for one that could not be made."""
    with tempfile.TemporaryDirectory() as place, start_backends(Path(place)) as backends:
        for number, (tracer, pool, end) in enumerate(plan, 1):
            print(f"{number} of {len(plan)}: {tracer}, {pool}, {end}", end="", file=sys.stderr, flush=True)
            directory = Path(place) / str(number)
            directory.mkdir()
            try:
                result = play(tracer, pool, end, backends, directory)
            except AssertionError as error:
                print(f": failed\n{error}", file=sys.stderr)
                yield None
            else:
                print(f": {result.delivered} of {result.calls}", file=sys.stderr)
                yield result


@contextmanager
def start_backends(directory: Path) -> Iterator[Backends]:
    """Run the broker, the model, the local server and the collector."""
    with children_in(directory / "backends") as children, collector() as (url, collected):
        broker = start_valkey(children)
        server = start_server(children, directory)
        yield Backends(
            broker, start_model(children), server.url, url, arrived=lambda: server.calls() + collected
        )


@contextmanager
def collector() -> Iterator[tuple[str, Counter[str]]]:
    """Run an HTTP server that counts the markers that are POSTed to it; yield its address and the counts."""
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                counts.update(calls)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", counts
        server.shutdown()


# -- the answer --------------------------------------------------------------------------------


def setting() -> dict[str, object]:
    """Return what was measured, and on what."""
    return {
        "tasks": TASKS,
        "left_s": LEFT_S,
        "time_limit_s": TIME_LIMIT_S,
        "pools": {name: " ".join(arguments) for name, arguments in POOLS.items()},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in PACKAGES},
    }


def print_table(about: Mapping[str, object], results: Sequence[Result], ends: Sequence[str]) -> None:
    """Print everything for people, as a Markdown table."""
    versions = about["versions"]
    assert isinstance(versions, dict)
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    print(f"Python {about['python']}; {about['machine']}\n")
    rows = [("tracer, pool", *ends, f"{TASKS} tasks took")]
    for tracer, pool in dict.fromkeys((result.tracer, result.pool) for result in results):
        found = {each.end: each for each in results if (each.tracer, each.pool) == (tracer, pool)}
        cells = (f"{found[end].delivered} of {found[end].calls}" if end in found else "-" for end in ends)
        # with recycling, most of it is the wait for new pool processes
        took = [each.work_s for each in found.values() if each.work_s and each.end != "recycled"]
        rows.append((f"{tracer}, {pool}", *cells, f"{min(took):.1f} to {max(took):.1f} s" if took else "-"))
    rows.insert(1, tuple("---" for _ in rows[0]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |")
    repeated = sum(result.repeated for result in results)
    print(f"\nCalls that arrived more than once: {repeated}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.losses", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tracers", nargs="+", choices=MODULES, default=list(MODULES), metavar="TRACER")
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=list(POOLS), metavar="POOL")
    parser.add_argument("--ends", nargs="+", choices=ENDS, default=list(ENDS), metavar="END")
    parser.add_argument("--json", action="store_true", help="one JSON object, with every trial")
    options = parser.parse_args()
    plan = [
        (tracer, pool, end)
        for tracer in options.tracers
        for pool in options.pools
        for end in options.ends
        if pool == "prefork" or end not in PREFORK_ONLY
    ]
    about = setting()
    found = list(play_all(plan))
    results = [result for result in found if result is not None]
    if options.json:
        print(json.dumps(about | {"trials": [asdict(result) for result in results]}, indent=2))
    else:
        print_table(about, results, options.ends)
    if len(results) < len(plan):
        sys.exit(f"{len(plan) - len(results)} of {len(plan)} trials could not be made")


if __name__ == "__main__":
    main()
