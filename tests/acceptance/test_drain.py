"""openai-agents and OpenTelemetry beside us, unchanged, in real workers whose processes end without a word.

Given tasks that make one trace with each, when their processes end, then `drain` decides whether the traces
arrive, and a backend that never answers holds nothing longer than our own flush may.
"""

from __future__ import annotations

import re
import signal
import socket
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from tests.benchmarks.losses import collector
from tests.environments import INSTALL_S, Environment
from tests.harness import ROOT, START_S, WORK_S, Server, await_, environment, shippers_of

HERE = Path(__file__).parent / "drain"
TASKS = 4
BOTH = "openai-agents,opentelemetry"
FLUSH_TIMEOUT_S = 1.0
PROMISED_STOP_S = 3.0
POOL_SHARE_S = 1.25
"""What is left of `shutdown_timeout`, without its margin, to Celery's pool processes: a half."""
OWN_S = 3.0
"""What a framework itself takes between two tasks, or to stop, on a busy machine."""
STOP_S = 60.0
READY = {"celery": " ready.", "rq": "*** Listening on", "dramatiq": "Worker process is ready for action."}

pytestmark = pytest.mark.timeout(INSTALL_S + 300)


@pytest.fixture(scope="module")
def python() -> Path:
    return Environment("drain", HERE / "requirements.txt").python_or_skip()


@pytest.fixture
def collected():
    with collector() as (url, counts):
        yield url, counts


@pytest.fixture
def sick():
    """A backend that lets everybody connect, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"


@dataclass
class Traced:
    """A worker whose tasks are traced by others too."""

    python: Path
    broker: str
    server: Server
    place: Path
    children: object
    settings: dict[str, str]
    queue: str = field(default_factory=lambda: f"q-{uuid.uuid4().hex[:12]}")
    framework: str = ""

    @property
    def spool(self) -> Path:
        return self.place / "spool"

    def environ(self) -> dict[str, str]:
        return environment(
            BROKER_URL=self.broker,
            QUEUE=self.queue,
            WAXELL_API_URL=self.server.url,
            WAXELL_SPOOL_DIR=str(self.spool),
            PYTHONPATH=f"{HERE}:{ROOT}",
            EXPORT_EVERY_S="3600",  # not by their own threads
            **self.settings,
        )

    def start(self, framework: str, *arguments: str) -> None:
        """Start a worker by its framework's own command line, and wait until it takes tasks."""
        self.framework = framework
        celery = ["celery", "-A", "with_celery", "worker", "--loglevel", "INFO"]
        commands = {
            "celery": [*celery, "--without-mingle", "--without-gossip"],
            "rq": ["rq.cli", "worker", "--url", self.broker, self.queue],
            "dramatiq": ["dramatiq", "with_dramatiq", "--processes", "1", "--threads", "2"],
            "dramatiq-gevent": ["with_dramatiq", "--processes", "1", "--threads", "2"],
        }
        script = [str(self.python.with_name(framework))] if framework == "dramatiq-gevent" else ["-m"]
        command = [str(self.python), *script, *commands[framework], *arguments]
        self.worker = self.children.start(f"worker-{framework}", command, self.environ())
        ready = READY[framework.partition("-")[0]]
        self.worker.wait_for(lambda: ready in self.text, "its start", START_S)

    @property
    def text(self) -> str:
        return self.worker.log.read_text(errors="replace")

    def send(self, count: int = TASKS) -> Counter[str]:
        """Have tasks done; return what both tracers are to deliver for them."""
        markers = [f"{self.queue}-{number}" for number in range(count)]
        for marker in markers:
            self._send(marker)
        return Counter(f"{tracer} {marker}" for tracer in ("agents", "opentelemetry") for marker in markers)

    def _send(self, marker: str) -> None:
        if self.framework == "celery":
            from celery import Celery

            with Celery(broker=self.broker, set_as_current=False) as client:
                client.send_task("ask", (marker,), queue=self.queue)
        elif self.framework == "rq":
            import redis
            import rq

            with redis.Redis.from_url(self.broker) as connection:
                rq.Queue(self.queue, connection=connection).enqueue("tracers.ask", marker)
        else:
            import dramatiq
            from dramatiq.brokers.redis import RedisBroker

            broker = RedisBroker(url=self.broker)
            broker.enqueue(dramatiq.Message(self.queue, "ask", (marker,), {}, {}))
            broker.client.close()
            broker.close()

    def await_traced(self, count: int = TASKS) -> None:
        """Wait until tasks have made their traces."""
        self.worker.wait_for(lambda: self.text.count("traced ") >= count, f"{count} traces", WORK_S)

    def await_ended(self, count: int = TASKS) -> None:
        """Wait until the local server has the ends of the tasks' runs: they have nothing left to do."""
        await_(lambda: len(self.ended()) >= count, f"{count} ended runs")

    def ended(self) -> list[dict[str, object]]:
        """Return this worker's runs at the server that have ended."""
        return [run for run in self.server.ended() if run["metadata"].get("queue") == self.queue]

    def begins(self) -> list[float]:
        """Return when each task has begun, by the machine's monotonic clock."""
        return [float(moment) for moment in re.findall(r"begun ([\d.]+)", self.text)]

    def stop(self) -> float:
        """Send SIGTERM; return the seconds until the end."""
        began = time.monotonic()
        self.worker.process.send_signal(signal.SIGTERM)
        self.worker.process.wait(STOP_S)
        return time.monotonic() - began


@pytest.fixture
def make_traced(python, valkey, server, children, tmp_path):
    made = []

    def make(collector_url: str, **settings: str) -> Traced:
        place = tmp_path / f"traced-{len(made)}"
        place.mkdir()
        own = {"COLLECTOR_URL": collector_url, **settings}
        made.append(Traced(python, valkey, server, place, children, own))
        return made[-1]

    yield make
    for traced in made:
        for process in shippers_of(traced.spool):
            process.kill()


WORKERS = {
    "rq": ("rq", "--worker-class", "with_rq.Worker"),
    "celery, recycled": ("celery", "--concurrency", "1", "--max-tasks-per-child", "1"),
    "celery, stopped": ("celery", "--concurrency", "2"),
    "dramatiq, stopped": ("dramatiq",),
}

POOLS = {
    "rq": WORKERS["rq"],
    "celery, prefork": WORKERS["celery, stopped"],
    "celery, threads": ("celery", "--pool", "threads", "--concurrency", "2"),
    "celery, gevent": ("celery", "--pool", "gevent", "--concurrency", "4"),
    "dramatiq": ("dramatiq",),
    "dramatiq, gevent": ("dramatiq-gevent",),
}
ONE_BY_ONE = {
    "rq": WORKERS["rq"],
    "celery, recycled": WORKERS["celery, recycled"],
    "celery, gevent": ("celery", "--pool", "gevent", "--concurrency", "1"),
}


def work_and_stop(worker: Traced, name: str) -> Counter[str]:
    """Have a worker do all tasks, then stop it; return what was to arrive."""
    worker.start(*WORKERS[name])
    expected = worker.send()
    worker.await_traced()
    worker.stop()
    return expected


@pytest.mark.parametrize("name", WORKERS)
def test_with_drain_every_trace_arrives_once(make_traced, collected, name):
    """Given `drain`, when the processes of a worker end, then each trace is there, and none twice."""
    url, arrived = collected
    worker = make_traced(url, WAXELL_DRAIN=BOTH)
    expected = work_and_stop(worker, name)
    assert arrived == expected, worker.text
    assert "drain:" not in worker.text


@pytest.mark.parametrize("name", POOLS)
def test_under_task_every_trace_arrives_while_the_worker_lives(make_traced, collected, name):
    """Given `drain` and the policy `task`, when tasks have ended, then their traces are there, once."""
    url, arrived = collected
    worker = make_traced(url, WAXELL_DRAIN=BOTH, WAXELL_FLUSH="task")
    worker.start(*POOLS[name])
    expected = worker.send()
    await_(lambda: arrived == expected, "all traces", WORK_S)
    worker.await_ended()
    assert arrived == expected
    assert "drain:" not in worker.text


@pytest.mark.parametrize("name", WORKERS)
def test_without_drain_nothing_arrives(make_traced, collected, name):
    """Without it nothing does, with the same tasks: what the test above shows is `drain`'s doing."""
    url, arrived = collected
    work_and_stop(make_traced(url), name)
    assert arrived == Counter()


@pytest.mark.parametrize("tracer", ["openai-agents", "opentelemetry"])
def test_only_what_is_named_is_flushed(make_traced, collected, tracer):
    """Given one name, when the processes of a worker end, then only that tracer's traces are there."""
    url, arrived = collected
    expected = work_and_stop(make_traced(url, WAXELL_DRAIN=tracer), "rq")
    own = "agents" if tracer == "openai-agents" else tracer
    assert arrived == Counter({name: 1 for name in expected if name.startswith(own)})


@pytest.mark.parametrize(
    ("name", "policy", "held_s"),
    [
        ("rq", "periodic", FLUSH_TIMEOUT_S),
        ("rq", "task", FLUSH_TIMEOUT_S),
        ("celery, recycled", "periodic", POOL_SHARE_S),
        ("celery, recycled", "task", FLUSH_TIMEOUT_S + POOL_SHARE_S),
        ("celery, gevent", "task", FLUSH_TIMEOUT_S),
    ],
)
def test_a_backend_that_never_answers_is_left_behind(make_traced, sick, name, policy, held_s):
    """Given a backend that hangs, when a task's process ends, then its slot is free at the deadline.

    The next task begins no later, the log says why traces are missing, and the tasks' runs are all there.
    """
    worker = make_traced(
        sick, WAXELL_DRAIN=BOTH, WAXELL_FLUSH=policy, WAXELL_FLUSH_TIMEOUT=str(FLUSH_TIMEOUT_S)
    )
    worker.start(*ONE_BY_ONE[name])
    worker.send(4)
    worker.await_traced(4)
    worker.await_ended(4)
    waits = [after - before for before, after in pairwise(worker.begins())]
    assert held_s <= min(waits) <= held_s + OWN_S, waits
    for tracer in ("openai-agents", "opentelemetry"):
        worker.worker.wait_for(
            lambda tracer=tracer: f"drain: {tracer} was not flushed in time" in worker.text, tracer, WORK_S
        )


@pytest.mark.parametrize("name", ["rq", "celery, stopped", "dramatiq, stopped"])
def test_a_backend_that_never_answers_does_not_hold_a_stop(make_traced, collected, sick, name):
    """Given a backend that hangs, when the worker is told to stop, then it takes 3 s more, at most.

    That is, more than with a healthy one; noise only adds, so that the quicker of a few pairs counts.
    """
    later_by = []
    while not later_by or (min(later_by) > PROMISED_STOP_S and len(later_by) < 3):
        took = {}
        for url in (collected[0], sick):
            worker = make_traced(url, WAXELL_DRAIN=BOTH)
            worker.start(*WORKERS[name])
            worker.send(4)
            worker.await_traced(4)
            worker.await_ended(4)
            took[url] = worker.stop()
        later_by.append(took[sick] - took[collected[0]])
    assert min(later_by) <= PROMISED_STOP_S, later_by
