"""How the conformance suite drives a Dramatiq worker: commands, messages, what Dramatiq tells its hooks."""

import os
import re
import sys
import sysconfig
from functools import cache

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker

from waxell_workers.testing.conformance import Expected, Mode, Site, Worker
from waxell_workers.testing.conformance.driver import (
    ENQUEUE,
    OUTLIVES,
    RETRY,
    SOFT_LIMIT,
    THREADS,
    WAITS,
)

EVERYWHERE = frozenset({RETRY, SOFT_LIMIT, ENQUEUE, WAITS, OUTLIVES, THREADS})
ENDED = re.compile(r"^(?:acknowledged|rejected) (?P<id>[0-9a-f-]+) (?P<end>.*)$", re.MULTILINE)
READY = "Worker process is ready for action."
PROCESSES = 2
GEVENT = os.path.join(sysconfig.get_path("scripts"), "dramatiq-gevent")


@cache
def client(broker_url: str) -> dramatiq.Broker:
    """Return who enqueues: a broker without actors or middleware."""
    if broker_url.startswith("amqp"):
        return RabbitmqBroker(url=broker_url.rstrip("/"), middleware=[], confirm_delivery=True)
    return RedisBroker(url=broker_url, middleware=[])


class DramatiqDriver:
    """Dramatiq's worker: threads, processes, greenlets, and both brokers."""

    framework = "dramatiq"
    modes = (
        Mode("threads", EVERYWHERE, slots=4, default=True),
        Mode("threads over RabbitMQ", EVERYWHERE, slots=4, broker="rabbitmq"),
        Mode("processes", EVERYWHERE, slots=4),
        Mode("spawn", EVERYWHERE, slots=4),
        Mode("gevent", EVERYWHERE, slots=4),
    )
    controls = {
        "Retry": Expected("retry", "raised Retry: not today", "retry: attempt 2 in "),
        "RateLimitExceeded": Expected("retry", "raised RateLimitExceeded: not today", "retry: attempt 2 in "),
        "SkipMessage": Expected("ignored", "skipped", "ignored: skipped by its actor"),
        "Shutdown": Expected(
            "interrupted", "raised Shutdown: not today", "interrupted: the worker was told to stop"
        ),
        "TimeLimitExceeded": Expected("error", "raised TimeLimitExceeded: not today"),
        "SystemExit": Expected("interrupted", "raised SystemExit: not today", "interrupted: SystemExit "),
    }
    failed = "raised ValueError: the answer has 30 characters"
    soft_limit_error = "TimeLimitExceeded"

    def command(self, mode: Mode, site: Site, *, slots: int, recycle: bool = False) -> list[str]:
        """Return `dramatiq scenarios`, or `dramatiq-gevent scenarios`, as its script does it."""
        processes = PROCESSES if mode.name == "processes" and slots >= PROCESSES else 1
        command = [sys.executable, *([GEVENT] if mode.name == "gevent" else ["-m", "dramatiq"])]
        command += ["scenarios", "--processes", str(processes), "--threads", str(slots // processes)]
        return [*command, *(["--use-spawn"] if mode.name == "spawn" else [])]

    def ready(self, worker: Worker) -> bool:
        """True once each process says so."""
        processes = PROCESSES if worker.mode.name == "processes" and worker.slots >= PROCESSES else 1
        return worker.text.count(READY) == processes

    def send(
        self,
        worker: Worker,
        scenario: str,
        *arguments: object,
        soft_limit_s: float | None = None,
        hard_limit_s: float | None = None,
    ) -> str:
        """Enqueue by name; return the message's id."""
        options: dict[str, object] = {}
        if soft_limit_s is not None:
            options["time_limit"] = int(soft_limit_s * 1000)
        if scenario == "flaky":
            options["max_retries"] = int(str(arguments[-1])) - 1
        broker = client(worker.site.broker_url)
        broker.declare_queue(worker.site.queue)
        message = dramatiq.Message(worker.site.queue, scenario, arguments, {}, options)
        return str(broker.enqueue(message).message_id)

    def done(self, worker: Worker) -> int:
        """Count the attempts of which Dramatiq has said, after all other hooks, that the broker knows."""
        return len(ENDED.findall(worker.text))

    def outcome(self, worker: Worker, handle: str) -> str:
        """Return how the last attempt of a message ended, as Dramatiq told its middleware."""
        ends = [found["end"] for found in ENDED.finditer(worker.text) if found["id"] == handle]
        return ends[-1] if ends else ""


DRIVER = DramatiqDriver()
