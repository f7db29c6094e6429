"""How the conformance suite drives an RQ worker: commands, jobs, and RQ's own account of them in Redis."""

import re
import sys
from functools import cache

import rq
from redis import Redis
from rq.job import Job, JobStatus, Retry

from waxell_workers.testing.conformance import Expected, Mode, Site, Worker
from waxell_workers.testing.conformance.driver import (
    CHILD,
    ENQUEUE,
    OUTLIVES,
    RECYCLE,
    RETRY,
    SOFT_LIMIT,
    WAITS,
)

EVERYWHERE = frozenset({RETRY, ENQUEUE, WAITS, OUTLIVES, SOFT_LIMIT})
HORSES = EVERYWHERE | {CHILD, RECYCLE}
STARTED = re.compile(r"Worker (?:rq:worker:)?([\w-]+):? started with PID")
CLASSES = {"worker": "Worker", "pool": "Worker", "simple": "SimpleWorker", "spawn": "SpawnWorker"}
IMPORTS_S = 10
"""A spawned work-horse imports the application within the job's own time limit."""


@cache
def connect(url: str) -> Redis:
    """Return this process's connection to a broker."""
    return Redis.from_url(url)


class RQDriver:
    """RQ's workers: one that forks for each job, one that does not, one that spawns, and a pool."""

    framework = "rq"
    modes = (
        Mode("worker", HORSES, slots=1, default=True),
        Mode("simple", EVERYWHERE, slots=1),
        *([Mode("spawn", HORSES, slots=1)] if hasattr(rq, "SpawnWorker") else []),
        Mode("pool", HORSES),
    )
    controls = {
        "JobTimeoutException": Expected("error", "failed: rq.timeouts.JobTimeoutException: not today"),
        "SystemExit": Expected("interrupted", "failed: SystemExit: not today", "interrupted: SystemExit "),
    }
    soft_limit_error = "rq.timeouts.JobTimeoutException"
    failed = "failed: ValueError: the answer has 30 characters"

    def command(self, mode: Mode, site: Site, *, slots: int, recycle: bool = False) -> list[str]:
        """Return `rq worker` or `rq worker-pool`; all but SimpleWorker take a process for each job anyway."""
        command = [sys.executable, "-m", "rq.cli"]
        command += ["worker-pool", "-n", str(slots)] if mode.name == "pool" else ["worker"]
        command += ["-c", "settings", "--worker-class", f"waxell_workers.rq.{CLASSES[mode.name]}"]
        return [*command, "--queue-class", "waxell_workers.rq.Queue", site.queue]

    def ready(self, worker: Worker) -> bool:
        """True once each worker listens."""
        return worker.text.count("*** Listening on") >= (worker.slots if worker.mode.name == "pool" else 1)

    def send(
        self,
        worker: Worker,
        scenario: str,
        *arguments: object,
        soft_limit_s: float | None = None,
        hard_limit_s: float | None = None,
    ) -> str:
        """Enqueue by name; return RQ's job id."""
        options = {}
        if soft_limit_s is not None:
            options["job_timeout"] = int(soft_limit_s) + (IMPORTS_S if worker.mode.name == "spawn" else 0)
        if scenario == "flaky":
            options["retry"] = Retry(max=arguments[2] - 1)
        queue = rq.Queue(worker.site.queue, connection=connect(worker.site.broker_url))
        return str(queue.enqueue(f"scenarios.{scenario}", *arguments, **options).id)

    def done(self, worker: Worker) -> int:
        """Add up what each worker has counted, less the job of one that is not idle again.

        A work-horse counts its job a moment before it ends; its worker is idle a moment after that.
        """
        done = 0
        for name in STARTED.findall(worker.text):
            fields = ("successful_job_count", "failed_job_count", "state")
            good, bad, state = connect(worker.site.broker_url).hmget(f"rq:worker:{name}", fields)
            counted = int(good or 0) + int(bad or 0)
            done += max(0, counted - (state == b"busy"))
        return done

    def outcome(self, worker: Worker, handle: str) -> str:
        """Return a job's status, and the last line of what RQ has kept of its exception."""
        job = Job.fetch(handle, connection=connect(worker.site.broker_url))
        status = JobStatus(job.get_status()).value
        result = job.latest_result()
        if status not in ("finished", "failed", "stopped") or result is None:
            return ""
        text = (result.exc_string or "").strip()
        return f"{status}: {text.splitlines()[-1]}" if text else status


DRIVER = RQDriver()
