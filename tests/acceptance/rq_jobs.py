"""Jobs of `test_rq_lineage.py`; a worker finds them by its PYTHONPATH, and the example's in its folder."""

from __future__ import annotations

import datetime
import os
import signal
import time

import rq
import scenarios
import tasks
from rq.job import Callback, Job, Retry

from waxell_workers.rq import Queue, meta
from waxell_workers.testing.conformance import witness


def fan_out(marker: str) -> None:
    """Call the model, then enqueue a job in every way that there is."""
    scenarios.call(marker)
    queue = tasks.queue
    ask = scenarios.ask
    soon = datetime.timedelta(seconds=2)
    first = queue.enqueue(ask, f"{marker}-enqueue")
    queue.enqueue(ask, f"{marker}-depends", depends_on=first)
    queue.enqueue_call(ask, args=(f"{marker}-enqueue_call",))
    queue.enqueue_many([Queue.prepare_data(ask, args=(f"{marker}-enqueue_many",))])
    queue.enqueue_in(soon, ask, f"{marker}-enqueue_in")
    queue.enqueue_at(datetime.datetime.now(datetime.timezone.utc) + soon, ask, f"{marker}-enqueue_at")
    made = Job.create(ask, args=(f"{marker}-enqueue_job",), connection=queue.connection, timeout=60)
    queue.enqueue_job(made)
    with queue.connection.pipeline() as pipeline:
        queue.enqueue(ask, f"{marker}-pipeline", pipeline=pipeline)
        pipeline.execute()
    queue.enqueue(scenarios.flaky, f"{marker}-retried", 2, 2, retry=Retry(max=1, interval=2))
    plain = rq.Queue(queue.name, connection=queue.connection)
    plain.enqueue(ask, f"{marker}-plain", meta=meta({"own": 1}))
    plain.enqueue(ask, f"{marker}-unknown")


def end_by(marker: str, how: str) -> None:
    """Call the model, then end as it says."""
    scenarios.call(marker)
    if how == "exit":
        os._exit(3)
    elif how == "late":
        time.sleep(60)
    elif how == "hung":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(300)
    elif how == "fails":
        raise ConnectionError("no")
    else:
        os.kill(os.getpid(), signal.Signals[how])
        time.sleep(60)


def call_back(job: Job, connection: object, *result: object) -> None:
    """Call the model, from whichever process calls back."""
    tasks.ask(scenarios.QUESTION, model=f"{job.args[0]}-callback")
    witness.note("called", job.args[0])


CALL_BACK = Callback(call_back)
