"""Prints, as JSON, which span of OpenTelemetry's Celery instrumentation is whose child, and our runs' traces.

Celery's messages go through its broker in memory, to a worker in a thread. The argument says whether we are
imported: `none`, `before` or `after` the instrumentation.
"""

import json
import sys
import time
from contextlib import nullcontext

from celery import Celery, chain
from celery.contrib.testing.worker import start_worker
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

when = sys.argv[1]
if when == "before":
    import waxell_workers.celery

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
CeleryInstrumentor().instrument()
if when == "after":
    import waxell_workers.celery

app = Celery("spans", broker="memory://", backend="cache+memory://")
SPANS = 2 * (1 + 2 * 5) + 2 * 2
"""Of a request: itself, and two for each execution; a last task is sent outside any span, twice."""


@app.task(name="a")
def a():
    b.delay()


@app.task(name="b")
def b():
    pass


@app.task(name="c")
def c():
    pass


@app.task(name="flaky", bind=True)
def flaky(self):
    if self.request.retries == 0:
        raise self.retry(countdown=0)


def block(wanted):
    """Return a run of ours, if we are there and it is wanted."""
    return waxell_workers.WaxellContext("block") if wanted and when != "none" else nullcontext()


def send():
    """Enqueue from within a request's span, with a run of ours around it and without, and outside any."""
    tracer = trace.get_tracer("spans")
    for wanted in (True, False):
        with tracer.start_as_current_span("request"), block(wanted):
            chain(a.si(), c.si()).delay()
            flaky.delay()
        c.delay()


def traces_of_runs():
    """Return the trace of each of our runs of a task."""
    if when == "none":
        return []
    return sorted((run.agent_name, run.trace_id) for run in recorded if run.task_id)


if when == "none":
    recording = nullcontext()
else:
    from waxell_workers.testing import record_runs

    recording = record_runs()
with recording as recorded, start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=60):
    send()
    deadline = time.monotonic() + 60
    while len(exporter.get_finished_spans()) < SPANS and time.monotonic() < deadline:
        time.sleep(0.05)
    traces = traces_of_runs()

spans = exporter.get_finished_spans()
names = {span.context.span_id: span.name for span in spans}
parents = [(span.name, names.get(span.parent.span_id, "unknown") if span.parent else "") for span in spans]
executed = [(span.name.removeprefix("run/"), f"{span.context.trace_id:032x}") for span in spans]
executed = [(name, trace_id) for name, trace_id in executed if name in ("a", "b", "c", "flaky")]
print(json.dumps({"parents": sorted(parents), "executed": sorted(executed), "runs": traces}))
