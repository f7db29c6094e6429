"""Celery's tasks for a storm in the gevent pool, in the solo pool, and for flushes that an interrupt ends.

With gevent, the interrupt comes where a greenlet waits, and ours waits in the user's `redact` alone.
"""

import os
import random
import signal
import threading

import noting
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

import waxell_workers
import waxell_workers.celery
from waxell_workers import force_flush, options

app = Celery(broker=os.environ["BROKER_URL"])
app.conf.worker_prefetch_multiplier = 1


waxell_workers.init(redact=waxell_workers.redact_texts(noting.redact))


@app.task(bind=True, name="scenarios.timeouts")
def timeouts(self, seconds):
    """For `gevent.Timeout`, which Celery raises itself for a time limit."""
    import gevent

    noting.record(self.request.id, seconds, gevent.Timeout, gevent.sleep)


@app.task(bind=True, name="scenarios.kills")
def kills(self, seconds, within_s):
    """Has its greenlet killed, as a `revoke` with `terminate` does, at random."""
    import gevent

    here = gevent.getcurrent()
    gevent.spawn_later(random.uniform(0, within_s), here.kill, block=False)
    noting.record(self.request.id, seconds, gevent.GreenletExit, gevent.sleep)


@app.task(bind=True, name="scenarios.keys")
def keys(self, seconds, within_s):
    """For a `KeyboardInterrupt` at random, which the task takes for a request to give up."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, within_s))
    try:
        noting.record(self.request.id, seconds, KeyboardInterrupt)
    except KeyboardInterrupt as error:
        raise RuntimeError("given up") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@app.task(bind=True, name="scenarios.flush")
def flush(self, seconds):
    """Wait for a server that hangs."""
    noting.record(self.request.id, 0.01, SoftTimeLimitExceeded)
    noting.note("waits", self.request.id)
    try:
        force_flush(seconds)
    except SoftTimeLimitExceeded as error:
        noting.note(f"task-{noting.place(error)}", self.request.id)
        raise
    noting.note("outlasted", self.request.id)


@app.task(bind=True, name="scenarios.flush_again")
def flush_again(self):
    noting.note(f"flushed-{bool(force_flush(30))}", self.request.id)


@app.task(bind=True, name="scenarios.flush_at_the_end")
@options(flush="task", flush_timeout=120)
def flush_at_the_end(self):
    noting.record(self.request.id, 0.01, SoftTimeLimitExceeded)
    noting.when_waiting(threading.get_ident(), lambda: os.kill(os.getpid(), signal.SIGUSR1))
