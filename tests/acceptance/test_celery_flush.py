"""Given `flush="task"`, then the records of a task are at the server before its slot takes the next one: with
the thread as shipper, and wherever Celery's decorator stands. (The rest is in the conformance suite.)"""

from __future__ import annotations

from pathlib import Path

import pytest

TASKS = 12
APP = """
import os, sqlite3
from celery import Celery
from openai import OpenAI
import waxell_workers
import waxell_workers.celery

app = Celery("flushing", broker=os.environ["BROKER_URL"])


def work(marker):
    db = sqlite3.connect(f"file:{os.environ['SERVER_DB']}?mode=ro", uri=True)
    [[ended]] = db.execute("SELECT count(*) FROM runs WHERE status <> 'running'")
    with open(os.environ["SEEN"], "a") as seen:
        seen.write(f"{ended}\\n")
    OpenAI().chat.completions.create(model=marker, messages=[{"role": "user", "content": "hello"}])

@app.task
def ask(marker):
    work(marker)

@app.task
@waxell_workers.options(flush="task")
def marked_below(marker):
    work(marker)

@waxell_workers.options(flush="task")
@app.task
def marked_above(marker):
    work(marker)
"""


@pytest.fixture
def counting_worker(make_worker, server, tmp_path):
    """A worker whose tasks look, when they begin, at how many runs have ended at the server."""
    app = tmp_path / "app"
    app.mkdir()
    (app / "scenarios.py").write_text(APP)

    def make(**settings):
        worker = make_worker(server.url, WAXELL_FLUSH_INTERVAL="3600", **settings)
        worker.settings |= {"SERVER_DB": str(server.db), "SEEN": str(tmp_path / "seen")}
        worker.app = app
        return worker

    return make


def seen(worker):
    return [int(line) for line in Path(worker.settings["SEEN"]).read_text().split()]


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_each_task_finds_all_earlier_ones_at_the_server(counting_worker, pool):
    """With one slot, the k-th task sees k ended runs: each flush was over before the slot was free."""
    worker = counting_worker(WAXELL_FLUSH="task", WAXELL_FLUSH_TIMEOUT="20", WAXELL_SHIPPER="thread")
    worker.start("--pool", pool, "--concurrency", "1")
    worker.send_many(TASKS)
    worker.await_received_results(TASKS)
    assert seen(worker) == list(range(TASKS))


def test_periodic_does_not_wait(counting_worker):
    """The same tasks under `periodic`, with an interval of an hour, see nothing: the test above can fail."""
    worker = counting_worker()
    worker.start("--pool", "prefork", "--concurrency", "1")
    worker.send_many(TASKS)
    worker.await_received_results(TASKS)
    assert seen(worker) == [0] * TASKS


@pytest.mark.parametrize("task", ["marked_below", "marked_above"])
def test_options_mark_one_task(counting_worker, task):
    """`@options(flush="task")` does it for one task, above or below Celery's decorator."""
    worker = counting_worker(WAXELL_FLUSH_TIMEOUT="20")
    worker.start("--pool", "prefork", "--concurrency", "1")
    worker.send_many(TASKS, task)
    worker.await_received_results(TASKS)
    assert seen(worker) == list(range(TASKS))
