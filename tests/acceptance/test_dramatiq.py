"""Given a Dramatiq worker: async actors, pipelines, time limits, abandoned threads, stops.

What every framework must do is in the conformance suite; here is what only Dramatiq has.
"""

from __future__ import annotations

import subprocess
import sys

import dramatiq
import pytest
from dramatiq.results.backends import RedisBackend

from tests.harness import ROOT, await_, shippers_of
from waxell_workers.testing.conformance import stage
from waxell_workers.testing.conformance.faults import FaultyProxy
from waxell_workers.testing.conformance.plugin import load_driver

FOLDER = ROOT / "integrations" / "dramatiq"
TICKET = "I was charged twice and now I cannot log in."
APP = """
import os, time, threading
import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AsyncIO, Middleware
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from openai import AsyncOpenAI, OpenAI
from waxell_workers import options
from waxell_workers.dramatiq import WaxellMiddleware

QUEUE = os.environ["QUEUE"]
broker = RedisBroker(url=os.environ["BROKER_URL"])
broker.add_middleware(AsyncIO())
broker.add_middleware(Results(backend=RedisBackend(url=os.environ["BROKER_URL"])))
first = os.environ.get("PLACE") == "first"
broker.add_middleware(WaxellMiddleware(), before=type(broker.middleware[0]) if first else None)
dramatiq.set_broker(broker)
say = [{"role": "user", "content": "hello"}]
ours = AsyncOpenAI()

@dramatiq.actor(queue_name=QUEUE, max_retries=0)
def ask(marker):
    OpenAI().chat.completions.create(model=marker, messages=say)

@dramatiq.actor(queue_name=QUEUE, max_retries=0)
async def ask_async(marker):
    await ours.chat.completions.create(model=marker, messages=say)

@dramatiq.actor(queue_name=QUEUE, max_retries=0)
def ask_then_wait(marker):
    ask.fn(marker)
    print("it waits", flush=True)
    threading.Event().wait(600)

@dramatiq.actor(queue_name=QUEUE, max_retries=0, time_limit=2500, store_results=True)
@options(flush="task", flush_timeout=5)
def ask_and_flush(marker):
    ask.fn(marker)
    return "an answer"

@dramatiq.actor(queue_name=QUEUE, max_retries=1, min_backoff=5000, max_backoff=5000, notify_shutdown=True)
def ask_until_shutdown(marker):
    ask.fn(marker)
    if not os.environ.get("STARTED_AGAIN"):
        print("it waits", flush=True)
        while True:
            time.sleep(0.05)
"""


DRIVER = load_driver(FOLDER / "driver.py")
MODES = {mode.name: mode for mode in DRIVER.modes}


class Variation:
    """The driver, with other arguments on the command line."""

    def __init__(self, app, arguments):
        self._app, self._arguments = app, arguments

    def __getattr__(self, name):
        return getattr(DRIVER, name)

    def command(self, mode, site, *, slots, recycle=False):
        command = DRIVER.command(mode, site, slots=slots, recycle=recycle)
        return [self._app if word == "scenarios" else word for word in command] + self._arguments


@pytest.fixture
def protocol():
    return "ingest"


@pytest.fixture
def start(server, valkey, model, tmp_path):
    """Start a worker with an app of this module's, or of the example's folder."""
    app = tmp_path / "app"
    app.mkdir()
    (app / "app.py").write_text(APP)
    started = []

    def begin(name="app", mode="threads", slots=2, arguments=(), **settings):
        own = {"BROKER_URL": valkey, "OPENAI_BASE_URL": model, "WAXELL_API_URL": server.url} | settings
        driver, folder = Variation(name, list(arguments)), app if name == "app" else FOLDER
        worker = stage.make_worker(driver, MODES[mode], folder, tmp_path, slots=slots, **own)
        started.append(worker)
        worker.start()
        return worker

    yield begin
    for worker in started:
        worker.stop()


def ended(server, count):
    """Wait for so many ended runs and return them."""
    return await_(lambda: len(found := server.ended()) >= count and found, f"{count} ended runs")


@pytest.mark.parametrize("mode", ["threads", "spawn"])
def test_each_call_of_async_actors_is_in_its_own_run(start, server, mode):
    """Async actors share one event loop; their calls are told apart."""
    worker = start(mode=mode, slots=8)
    sent = {worker.send("ask_async", f"{worker.site.queue}-{number}"): number for number in range(60)}
    runs = ended(server, 60)
    expected = {task: [f"{worker.site.queue}-{number}"] for task, number in sent.items()}
    assert {run["task_id"]: run["markers"] for run in runs} == expected
    assert {run["status"] for run in runs} == {"success"}


def test_the_example_is_one_story_a_ticket(start, server):
    """The example's pipeline, group and retry: who caused what is known of each."""
    worker = start("tasks")
    sent = subprocess.run(
        [sys.executable, "tasks.py"], cwd=FOLDER, env=worker.environ(), check=False, capture_output=True
    )
    assert sent.returncode == 0, sent.stderr
    runs = ended(server, 7)
    states = sorted((run["agent_name"], run["status"], run["metadata"]["attempt"]) for run in runs)
    assert states == [
        ("escalate", "success", 1),
        ("summarise", "success", 1),
        ("translate", "error", 1),
        ("translate", "success", 1),
        ("triage", "success", 1),
        ("update_crm", "retry", 1),
        ("update_crm", "success", 2),
    ]
    by_name = {run["agent_name"]: run for run in runs}
    triage, summary = by_name["triage"], by_name["summarise"]
    assert (summary["parent"], summary["root"]) == (triage["run_id"], triage["run_id"])
    assert summary["metadata"]["parent_task_id"] == triage["task_id"]
    assert summary["trace"] == triage["trace"]
    asked = {run["agent_name"]: len(run["markers"]) for run in runs if run["status"] == "success"}
    assert asked == {"escalate": 1, "summarise": 1, "translate": 2, "triage": 1, "update_crm": 1}


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_flush_that_waits_past_the_time_limit_fails_nothing(start, server, valkey, place):
    """While the server hangs, a flush outlasts the actor's time limit: the message succeeds nevertheless."""
    with FaultyProxy(server.url) as faulty:
        faulty.mode("hang")
        worker = start(slots=1, WAXELL_API_URL=faulty.url, PLACE=place)
        task = worker.send("ask_and_flush", "slowly")
        message = dramatiq.Message(worker.site.queue, "ask_and_flush", (), {}, {}, message_id=task)
        backend = RedisBackend(url=valkey)
        assert message.get_result(backend=backend, block=True, timeout=60_000) == "an answer"
        worker.send("ask", "next")  # one thread: taken when the flush has given up
        faulty.wait_until(lambda: False, 6.0)
        faulty.mode("healthy")
        runs = {run["markers"][0]: run for run in ended(server, 2)}
    assert (runs["slowly"]["status"], runs["next"]["status"]) == ("success", "success")
    assert runs["slowly"]["metadata"]["attempt"] == 1
    assert "Time limit exceeded" not in worker.text


def test_a_thread_that_outlasts_the_worker_leaves_an_interrupted_run(start, server):
    """A task that `--worker-shutdown-timeout` abandons is shown as interrupted, with its call."""
    worker = start(arguments=["--worker-shutdown-timeout", "500"])
    worker.send("ask_then_wait", "abandoned")
    worker.wait(lambda: "it waits" in worker.text, "the task")
    worker.terminate()
    [run] = ended(server, 1)
    assert (run["status"], run["markers"]) == ("interrupted", ["abandoned"])


def test_a_task_that_was_told_of_the_shutdown_goes_on_in_the_next_worker(start, server):
    """`notify_shutdown`: the interrupted attempt is a retry, and the next worker has the next attempt."""
    worker = start()
    task = worker.send("ask_until_shutdown", "told")
    worker.wait(lambda: "it waits" in worker.text, "the task")
    worker.terminate()
    worker.start(STARTED_AGAIN="1")
    runs = {run["metadata"]["attempt"]: run for run in ended(server, 2)}
    assert {number: run["status"] for number, run in runs.items()} == {1: "retry", 2: "success"}
    assert {run["task_id"] for run in runs.values()} == {task}
    assert runs[1]["error"].startswith("dramatiq.middleware.shutdown.Shutdown")


def test_an_idle_worker_starts_another_shipper(start, server):
    """A shipper that was killed is replaced although no task ends."""
    worker = start()
    first = await_(lambda: shippers_of(worker.spool), "shipper")[0]
    first.kill()
    first.wait(10)
    [second] = await_(lambda: shippers_of(worker.spool), "another shipper")
    assert second.pid != first.pid
    worker.send("ask", "afterwards")
    ended(server, 1)


def test_processes_share_one_shipper(start, server):
    """Each worker process boots for itself; the host has one shipper, and it leaves after all of them."""
    worker = start(mode="processes", slots=4)
    for number in range(20):
        worker.send("ask", f"{worker.site.queue}-{number}")
    assert len({run["metadata"]["pid"] for run in ended(server, 20)}) == 2
    # One that was started beside it waits for the lock for a moment, and leaves.
    [shipper] = await_(lambda: len(found := shippers_of(worker.spool)) == 1 and found, "one shipper alone")
    worker.terminate()
    await_(lambda: not shipper.is_running(), "end of the shipper")


def test_without_a_shipper_process_each_worker_process_has_a_thread(start, server):
    """With `WAXELL_SHIPPER=thread` one of the processes ships for all, and stopping loses nothing."""
    worker = start(mode="processes", slots=4, WAXELL_SHIPPER="thread", WAXELL_FLUSH_INTERVAL="3600")
    for number in range(20):
        worker.send("ask", f"{worker.site.queue}-{number}")
    worker.wait(lambda: worker.text.count("200 OK") >= 20, "20 calls")
    worker.terminate()
    assert len(ended(server, 20)) == 20
    assert shippers_of(worker.spool) == []
