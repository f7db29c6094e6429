"""RQ's workers with a time limit below a second; what `rq worker -c rq_storm` reads, too."""

import os
import random
import signal
import threading

import noting
import rq
from rq.timeouts import JobTimeoutException, UnixSignalDeathPenalty

import waxell_workers.rq
from waxell_workers import force_flush, options

REDIS_URL = os.environ["BROKER_URL"]
RANDOM_S = 3
"""A job with this time limit, in seconds, has a random one."""


class Limit(UnixSignalDeathPenalty):
    """RQ's own, which takes whole seconds only."""

    def setup_death_penalty(self):
        super().setup_death_penalty()
        if self._exception is JobTimeoutException and self._timeout == RANDOM_S:
            # half of them while the run begins
            seconds = random.choice((random.uniform(1e-5, 2e-3), random.uniform(2e-3, 2e-2)))
            signal.setitimer(signal.ITIMER_REAL, seconds)


class _Noting:
    death_penalty_class = Limit

    def handle_exception(self, job, *exc_info):
        noting.note(f"framework-{noting.place(exc_info[1])}", job.id)
        super().handle_exception(job, *exc_info)


class Worker(_Noting, waxell_workers.rq.Worker):
    pass


class SimpleWorker(_Noting, waxell_workers.rq.SimpleWorker):
    pass


def storm(seconds):
    noting.record(rq.get_current_job().id, seconds, JobTimeoutException)


def flush(seconds):
    """Wait for a server that hangs."""
    job_id = rq.get_current_job().id
    noting.record(job_id, 0.01, JobTimeoutException)
    noting.note("waits", job_id)
    try:
        force_flush(seconds)
    except JobTimeoutException as error:
        noting.note(f"task-{noting.place(error)}", job_id)
        raise
    noting.note("outlasted", job_id)


def flush_again():
    """Say whether all is at the server."""
    noting.note(f"flushed-{bool(force_flush(30))}", rq.get_current_job().id)


@options(flush="task", flush_timeout=120)
def flush_at_the_end():
    noting.record(rq.get_current_job().id, 0.01, JobTimeoutException)
    job_id = rq.get_current_job().id
    noting.when_waiting(threading.get_ident(), lambda: noting.note("waits", job_id))
