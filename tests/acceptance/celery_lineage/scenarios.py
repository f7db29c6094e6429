"""Tasks that lead to other tasks, in each of the ways in which Celery can do that."""

import os
import signal
import time

from celery import Celery, chain, chord, current_task, group
from celery.exceptions import Reject

import waxell_workers.celery  # noqa: F401
from waxell_workers import WaxellContext, get_context, options
from waxell_workers.testing.conformance import witness

app = Celery("scenarios", broker=os.environ["BROKER_URL"], backend=os.environ["BROKER_URL"])
app.conf.task_default_queue = os.environ["QUEUE"]
app.conf.broker_connection_retry_on_startup = True
app.conf.result_expires = 600
app.conf.beat_schedule = {
    f"every {seconds:g} s": {
        "task": "ticking",
        "args": (f"every {seconds:g} s",),
        "schedule": seconds,
        "options": {"headers": {"theirs": "kept"}},
    }
    for seconds in (1.0, 1.5)
}
if "PROTOCOL" in os.environ:
    app.conf.task_protocol = int(os.environ["PROTOCOL"])

_theirs = {"theirs": {"kept": True}}
"""Headers of the user's, used again and again."""


def note_headers():
    """Have the run say what of the user's own headers its task has."""
    theirs = (current_task.request.headers or {}).get("theirs")
    get_context().set_tag("theirs", theirs)


def _leaf(name, after_s=0.0):
    def leaf(*_args):
        note_headers()
        time.sleep(after_s)

    return app.task(leaf, name=name, shared=False)


a, b, c, d = map(_leaf, "abcd")
late = _leaf("late", 1.0)


@app.task(name="ticking")
def ticking(schedule):
    note_headers()
    get_context().set_tag("schedule", schedule)


@app.task(name="errback")
def errback(task_id):
    """Celery sends this one as a message: it takes the id alone."""


@app.task(name="called")
def called(request, error, traceback):
    """Celery calls this one in the process of the failed task."""
    get_context().set_tag("called", type(error).__name__)


@app.task(name="fails")
def fails():
    raise ValueError("no")


@app.task(name="dies")
def dies(number=signal.SIGKILL):
    time.sleep(0.3)
    os.kill(os.getpid(), number)


@app.task(name="dies_once", acks_late=True, reject_on_worker_lost=True)
def dies_once(path):
    if not os.path.exists(path):
        open(path, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="rejects", bind=True, acks_late=True)
def rejects(self, requeue):
    raise Reject("not today", requeue=requeue and not self.request.delivery_info["redelivered"])


@app.task(name="exits")
def exits(code):
    os._exit(code)


@app.task(name="leaves")
def leaves(code):
    raise SystemExit(code)


@app.task(name="hangs", bind=True)
def hangs(self, seconds=60.0):
    witness.note("hangs", self.request.id)
    time.sleep(seconds)


@app.task(name="flaky", bind=True, max_retries=3)
def flaky(self, attempts=3, countdown=0.2):
    """Is retried inside a block of the user's."""
    note_headers()
    if self.request.retries + 1 < attempts:
        with WaxellContext("block"):
            raise self.retry(exc=KeyError("gone"), countdown=countdown)


@app.task(name="replaced", bind=True)
def replaced(self, by):
    return self.replace(CANVASES[by]())


@app.task(name="eager")
def eager():
    a.apply(headers=_theirs)
    b.delay()


@app.task(name="linked")
@options(propagate="link")
def linked():
    c.delay()


@app.task(name="alone")
@options(propagate="none")
def alone():
    d.delay()


@app.task(name="headers", bind=True)
def headers(self):
    """Send the same dict twice; then all headers as they came to this task."""
    for task in (a, b):
        task.apply_async(headers=_theirs)
    c.apply_async(headers=self.request.headers)
    get_context().set_tag("unchanged", _theirs == {"theirs": {"kept": True}})


CANVASES = {
    "one": lambda: a.si(),
    "by name": lambda: app.signature("a"),
    "link": lambda: a.si().set(link=b.si()),
    "chain": lambda: chain(a.si(), b.si(), c.si()),
    "group": lambda: group(a.si(), b.si()),
    "chord": lambda: chord([a.si(), late.si()], c.si()),
    "chain of groups": lambda: chain(group(a.si(), late.si()), group(c.si(), d.si())),
    "chord in chain": lambda: chain(a.si(), group(b.si(), late.si()), d.si()),
    "group of chains": lambda: group(chain(a.si(), b.si()), chain(c.si(), d.si())),
    "error": lambda: fails.si().set(link_error=[errback.s(), called.s()]),
    "lost": lambda: dies.si().set(link_error=errback.s()),
    "late": lambda: hangs.si().set(time_limit=1, link_error=errback.s()),
    "retry": lambda: flaky.si().set(headers=_theirs),
    "replaced": lambda: replaced.si("one"),
    "replaced by chain": lambda: replaced.si("chain"),
    "replaced by group": lambda: replaced.si("group"),
    "replaced in chain": lambda: chain(replaced.si("one"), c.si()),
    "eager": lambda: eager.si(),
    "linked": lambda: linked.si(),
    "alone": lambda: alone.si(),
    "headers": lambda: headers.si(),
}


@app.task(name="root")
def root(kind):
    run = get_context()
    run.set_tag("customer", "acme")
    CANVASES[kind]().apply_async()
