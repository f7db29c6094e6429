"""How the conformance suite drives a Celery worker: commands, tasks, and Celery's own account of them."""

import re
import sys
from functools import cache

from celery import Celery

from waxell_workers.core import lineage
from waxell_workers.testing.conformance import Expected, Mode, Site, Worker, witness
from waxell_workers.testing.conformance.driver import (
    CHILD,
    ENQUEUE,
    HARD_LIMIT,
    OUTLIVES,
    RECYCLE,
    RETRY,
    SOFT_LIMIT,
    THREADS,
    WAITS,
)

EVERYWHERE = frozenset({RETRY, ENQUEUE, WAITS, OUTLIVES})
PROCESSES = EVERYWHERE | {CHILD, SOFT_LIMIT, HARD_LIMIT, RECYCLE}
ENDED = re.compile(r"Task scenarios\.\w+\[(?P<id>[0-9a-f-]+)\] (?P<end>(?!received).*)")
OUTCOME = re.compile(r"(succeeded|raised unexpected: .*|retry: .*|ignored|reject .*|Soft time limit.*)")


@cache
def client(broker_url: str) -> Celery:
    """Return who enqueues: an app that knows nothing but the broker."""
    return Celery(broker=broker_url, set_as_current=False)


class CeleryDriver:
    """Celery's worker, with each of its pools."""

    framework = "celery"
    modes = (
        Mode("prefork", PROCESSES, default=True),
        Mode("prefork over RabbitMQ", PROCESSES, broker="rabbitmq"),
        Mode("spawn", PROCESSES),
        Mode("threads", EVERYWHERE | {THREADS}, slots=4),
        Mode("gevent", EVERYWHERE | {THREADS}, slots=4),
        Mode("solo", EVERYWHERE, slots=1),
    )
    controls = {
        "Ignore": Expected("ignored", "ignored", "ignored: the task asked for it"),
        "Reject": Expected("rejected", "reject requeue=False: not today", "rejected, dropped"),
    }
    soft_limit_error = "SoftTimeLimitExceeded"
    failed = "raised unexpected: ValueError('the answer has 30 characters')"

    def command(self, mode: Mode, site: Site, *, slots: int, recycle: bool = False) -> list[str]:
        """Return `celery worker`, alone on its broker."""
        pool = mode.name if mode.name in ("threads", "gevent", "solo") else "prefork"
        module = "spawned" if mode.name == "spawn" else "scenarios"
        command = [sys.executable, "-m", "celery", "-A", module, "worker", "-Q", site.queue]
        command += ["--pool", pool, "--concurrency", str(slots), "--loglevel", "INFO"]
        command += ["--without-mingle", "--without-gossip", "-n", f"{site.queue}@test"]
        return [*command, *(["--max-tasks-per-child", "1"] if recycle else [])]

    def ready(self, worker: Worker) -> bool:
        """True once the worker says so."""
        return " ready." in worker.text

    def send(
        self,
        worker: Worker,
        scenario: str,
        *arguments: object,
        soft_limit_s: float | None = None,
        hard_limit_s: float | None = None,
    ) -> str:
        """Enqueue by name; return Celery's task id."""
        limits = {"soft_time_limit": soft_limit_s, "time_limit": hard_limit_s}
        # Celery's messages do not say when they were sent: so does the adapter, where it is imported.
        headers = lineage.outgoing({})
        result = client(worker.site.broker_url).send_task(
            f"scenarios.{scenario}",
            arguments,
            queue=worker.site.queue,
            headers=headers,
            **{name: limit for name, limit in limits.items() if limit is not None},
        )
        return str(result.id)

    def done(self, worker: Worker) -> int:
        """Count the ends that the last of all `task_postrun` handlers has noted."""
        return len(witness.notes(worker.site.directory / "witness", "over"))

    def outcome(self, worker: Worker, handle: str) -> str:
        """Return what the log says last of a task, without times and results."""
        ends = [found["end"] for found in ENDED.finditer(worker.text) if found["id"] == handle]
        found = [match for match in map(OUTCOME.match, ends) if match]
        return found[-1][1] if found else ""


DRIVER = CeleryDriver()
