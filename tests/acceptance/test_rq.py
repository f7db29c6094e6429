"""What only RQ does to a job: it is stopped by request, taken down with its worker, spawned, executed by a
worker class of somebody's own or by none; and the example, as somebody runs it.

What every framework does is in the conformance suite.
"""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from redis import Redis
from rq.command import send_stop_job_command
from rq.job import Job

from tests.harness import ROOT, await_, run_script, shippers_of
from waxell_workers.testing.conformance import stage
from waxell_workers.testing.conformance.plugin import load_driver

APP = ROOT / "integrations" / "rq"
DRIVER = load_driver(APP / "driver.py")
MODES = {mode.name: mode for mode in DRIVER.modes}
OWN_CLASS = """
import rq
import waxell_workers.rq


class Own({bases}):
    def perform_job(self, job, queue, *args, **kwargs):
        print("this is ours", flush=True)
        return super().perform_job(job, queue, *args, **kwargs)
"""

spawning = pytest.mark.skipif("spawn" not in MODES, reason="RQ 2.2 has SpawnWorker first")


@pytest.fixture
def protocol():
    return "ingest"


@pytest.fixture
def make_rq_worker(valkey, model, server, tmp_path):
    """Make a worker of one of the driver's modes; `more` goes to the end of its command line."""
    made = []

    def make(mode="worker", *more, slots=None, **settings):
        class Told(type(DRIVER)):
            def command(self, *args, **kwargs):
                return [*super().command(*args, **kwargs), *more]

        own = {"BROKER_URL": valkey, "OPENAI_BASE_URL": model, "WAXELL_API_URL": server.url}
        directory = tmp_path / f"worker-{len(made)}"
        directory.mkdir()
        worker = stage.make_worker(Told(), MODES[mode], APP, directory, slots=slots, **own | settings)
        made.append(worker)
        return worker

    yield make
    for worker in made:
        worker.stop()


def await_run(server, marker):
    """Wait for the one run with this call, and its end."""
    [run] = await_(
        lambda: [run for run in server.ended() if marker in run["markers"]], f"ended run of {marker}"
    )
    return run


def fetch(worker, job_id):
    return Job.fetch(job_id, connection=Redis.from_url(worker.site.broker_url))


def test_a_job_that_is_stopped_says_so(make_rq_worker, server):
    """RQ's stop-job command kills the work-horse: the run is killed, by request, and has its call."""
    worker = make_rq_worker()
    worker.start()
    job_id = worker.send("ask_then_sleep", "stopped", 60)
    worker.wait_noted("body")
    send_stop_job_command(Redis.from_url(worker.site.broker_url), job_id)
    run = await_run(server, "stopped")
    assert (run["status"], run["error"]) == ("killed", "JobStopped: stopped by user")
    assert run["reason"] == "killed: stopped by user"
    await_(lambda: fetch(worker, job_id).get_status() == "stopped", "job that RQ calls stopped")
    worker.send("ask", "next")
    assert await_run(server, "next")["status"] == "success"


def test_a_second_sigterm_is_the_reason(make_rq_worker, server):
    """A worker that is told twice to stop takes its work-horse down: the run says so, and nothing hangs."""
    worker = make_rq_worker()
    worker.start()
    worker.send("ask_then_sleep", "cold", 60)
    worker.wait_noted("body")
    worker.signal(signal.SIGTERM)
    await_(lambda: "warm shut down requested" in worker.text.lower(), "warm shutdown")
    with pytest.raises(AssertionError):
        worker.wait_ended(1.5)  # RQ takes two signals within a second for one
    worker.signal(signal.SIGTERM)
    worker.wait_ended()
    run = await_run(server, "cold")
    assert (run["status"], run["error"]) == ("killed", "ColdShutdown: the worker was told twice to stop")
    assert run["reason"] == "killed: the worker was told twice to stop"


def test_a_pool_is_several_workers(make_rq_worker, server):
    """Each worker of a pool records by itself; what they have done arrives after the pool's SIGTERM."""
    worker = make_rq_worker("pool", slots=2)
    worker.start()
    for marker in ("first", "second"):
        worker.send("ask_then_sleep", marker, 3)
    worker.wait_noted("body", 2)
    worker.terminate()
    runs = [await_run(server, marker) for marker in ("first", "second")]
    assert {run["status"] for run in runs} == {"success"}
    assert len({run["metadata"]["worker"] for run in runs}) == 2


@spawning
@pytest.mark.parametrize("own", [False, True])
def test_a_spawned_work_horse_records(make_rq_worker, server, tmp_path, own):
    """A SpawnWorker's class counts in the Python that it spawns, also where RQ 2 would take its own."""
    (tmp_path / "own.py").write_text(OWN_CLASS.format(bases="waxell_workers.rq.SpawnWorker"))
    more = ["--worker-class", "own.Own"] if own else []
    worker = make_rq_worker("spawn", *more, PYTHONPATH=str(tmp_path))
    worker.start()
    job_id = worker.send("ask", "spawned")
    run = await_run(server, "spawned")
    assert (run["status"], run["task_id"]) == ("success", job_id)
    assert run["metadata"]["pid"] != worker.process.pid
    assert worker.text.count("this is ours") == own
    worker.wait_done(1)
    assert DRIVER.outcome(worker, job_id) == "finished"


def test_a_worker_class_of_one_s_own(make_rq_worker, server, tmp_path):
    """`WorkerMixin` in front of a worker class of one's own records, by RQ's command line too."""
    (tmp_path / "own.py").write_text(OWN_CLASS.format(bases="waxell_workers.rq.WorkerMixin, rq.Worker"))
    worker = make_rq_worker("worker", "--worker-class", "own.Own", PYTHONPATH=str(tmp_path))
    worker.start()
    worker.send("ask", "owned")
    assert await_run(server, "owned")["status"] == "success"
    assert "this is ours" in worker.text


def test_a_killed_shipper_is_started_again_by_an_idle_worker(make_rq_worker):
    """The worker looks after its shipper as often as it sends a heartbeat, also where no job comes."""
    worker = make_rq_worker("worker", "--worker-ttl", "17")  # idle, RQ sends one 15 s before that is over
    worker.start()
    [first] = await_(lambda: shippers_of(worker.spool), "shipper")
    first.kill()
    await_(lambda: {process.pid for process in shippers_of(worker.spool)} - {first.pid}, "another shipper")


def test_a_job_of_a_plain_queue_is_a_child_by_the_helper(make_rq_worker, server):
    """`meta()` names the run that enqueues, for a queue that is RQ's own."""
    worker = make_rq_worker()
    run_script(
        worker,
        "import rq, tasks, waxell_workers.rq\n"
        "from waxell_workers import WaxellContext\n"
        "with WaxellContext('web') as run:\n"
        "    queue = rq.Queue(tasks.queue.name, connection=tasks.queue.connection)\n"
        "    queue.enqueue('scenarios.ask', 'helped', meta=waxell_workers.rq.meta())\n",
    )
    worker.start()
    run = await_run(server, "helped")
    [web] = [other for other in server.runs() if other["agent_name"] == "web"]
    assert (run["parent"], run["root"]) == (web["run_id"], web["run_id"])
    assert run["metadata"]["wait_s"] >= 0


def test_without_a_worker_a_job_is_a_run_of_the_script(make_rq_worker, server):
    """With `is_async=False`, what a script enqueues is executed and recorded there, and arrives."""
    worker = make_rq_worker()
    finished = run_script(
        worker,
        "import tasks\n"
        "queue = tasks.Queue(tasks.queue.name, connection=tasks.queue.connection, is_async=False)\n"
        "print(queue.enqueue('scenarios.ask', 'at once').is_finished)\n",
    )
    assert finished == "True"
    run = await_run(server, "at once")
    assert (run["status"], run["workflow_name"]) == ("success", "rq")


def test_the_example(make_rq_worker, server):
    """One ticket: five jobs, six runs; the summary is the child of the triage that enqueued it."""
    worker = make_rq_worker()
    worker.start()
    sent = subprocess.run(
        [sys.executable, "send.py"], env=worker.environ(), cwd=APP, capture_output=True, check=False
    )
    assert sent.returncode == 0, sent.stderr
    await_(lambda: len(server.ended()) == 6, "six ended runs")
    runs = {(run["agent_name"], run["metadata"]["attempt"]): run for run in server.runs()}
    assert {name: run["status"] for name, run in runs.items()} == {
        ("tasks.triage", 1): "success",
        ("tasks.summarise", 1): "success",
        ("tasks.translate", 1): "error",
        ("tasks.update_crm", 1): "retry",
        ("tasks.update_crm", 2): "success",
        ("tasks.escalate", 1): "success",
    }
    assert runs["tasks.summarise", 1]["parent"] == runs["tasks.triage", 1]["run_id"]
