"""A storm of soft time limits over a real Celery worker whose tasks do nothing but record."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.faults.storming import arrived, nothing_open, wrong
from tests.faulty import FaultyServer
from tests.harness import Worker, await_
from tests.torture import effort, found
from waxell_workers.testing.conformance.stage import children_in, start_valkey

pytestmark = pytest.mark.timeout(effort(400, 1800))
DEADLINE_S = effort(200, 1200)
ARRIVAL_S = effort(60, 240)

APP = """
import os, time
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
import waxell_workers.celery
from waxell_workers import WaxellContext, get_context, record_llm_call

app = Celery(broker=os.environ["BROKER_URL"])
app.conf.worker_prefetch_multiplier = 1
OURS = os.path.dirname(waxell_workers.__file__)

def note(word, marker):
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(f"{word} {marker}\\n")

@app.task(bind=True)
def storm(self, seconds):
    run, until = get_context(), time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            with WaxellContext("block"):
                record_llm_call(model=self.request.id)
    except SoftTimeLimitExceeded as error:
        trace = error.__traceback__
        while trace.tb_next is not None:
            trace = trace.tb_next
        frames = (trace.tb_frame, trace.tb_frame.f_back)  # the innermost one is the signal handler's
        inside = any(frame and OURS in frame.f_code.co_filename for frame in frames)
        note("inside" if inside else "outside", self.request.id)
        if run is not None and get_context() is not run:
            note("lost", self.request.id)
        raise
"""


def test_soft_time_limits_over_a_worker_that_records(tmp_path: Path) -> None:
    """Given a pool whose tasks record without a pause, when soft time limits strike all over them, then each
    task is one run with one end and no parent, each call is in its own task's, and all arrives; and tasks end
    in no way in which they do not end without us."""
    (tmp_path / "scenarios.py").write_text(APP)
    notes = tmp_path / "notes"
    notes.touch()
    count = effort(60, 400)
    with children_in(tmp_path) as children, FaultyServer(ingest=True) as server:
        settings = {"NOTES": str(notes), "WAXELL_CAPTURE": ""}
        own = (start_valkey(children), "http://127.0.0.1:9", server.url, tmp_path)
        worker = Worker(*own, settings=settings, app=tmp_path)
        alone = {"NOTES": str(tmp_path / "alone"), "WAXELL_OBSERVE": "false"}
        control = Worker(*own, settings=alone, app=tmp_path)
        try:
            sent = execute(worker, count, server)
            await_(lambda: nothing_open(server, sent), "an end of each run", ARRIVAL_S)
            ends = outcomes(worker)
            execute(control, effort(40, 100), None)
        finally:
            worker.stop()
            control.stop()
    assert ends <= outcomes(control)
    hits = notes.read_text().split("\n")
    found(
        "soft time limits over a Celery worker",
        tasks=count,
        surfaced=sum(" " in line for line in hits),
        in_our_code=sum(line.startswith("inside") for line in hits),
    )
    assert sum(line.startswith("inside") for line in hits) > count / 20, "hardly any struck in our code"
    assert not [line for line in hits if line.startswith("lost")], "the user's handler was in another run"
    assert wrong(list(server.records.values()), sent) == []
    assert server.violations == []


def execute(worker: Worker, count: int, server: FaultyServer | None) -> set[str]:
    """Have a worker execute a storm of tasks, and stop it once they are at the server; return the tasks."""
    worker.start("-c", "2")
    sent = {worker.send("storm", 0.06, soft_time_limit=random.uniform(0.01, 0.08)) for _ in range(count)}
    await_(lambda: done(worker) == count, f"the end of {count} tasks", DEADLINE_S)
    if server is not None:  # a shipper without a worker has 30 s
        # A block that was hit as it was entered or left may stay open until its process ends.
        await_(lambda: arrived(server, sent, 1 + count // 100), "an end of each task's run", ARRIVAL_S)
    worker.terminate()
    return sent


def outcomes(worker: Worker) -> set[str]:
    """Return in which ways Celery says that tasks have ended."""
    return set(re.findall(r"\] (succeeded|raised unexpected: \w+|ignored|reject|retry)", worker.text))


def done(worker: Worker) -> int:
    return worker.text.count("] succeeded in ") + worker.text.count("] raised unexpected: ")
