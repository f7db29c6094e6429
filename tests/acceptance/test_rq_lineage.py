"""Of an RQ job's story: who has enqueued it and for whom, how long it has waited, which attempt it was, and
why it has ended; with real workers, real kills, and what has arrived at the server.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import rq
from redis import Redis
from rq.command import send_stop_job_command
from rq.job import Retry
from rq.registry import StartedJobRegistry

from tests.harness import ROOT, await_, run_script
from waxell_workers.testing.conformance import stage
from waxell_workers.testing.conformance.plugin import load_driver

APP = ROOT / "integrations" / "rq"
DRIVER = load_driver(APP / "driver.py")
MODES = {mode.name: mode for mode in DRIVER.modes}
WAYS = ["enqueue", "depends", "enqueue_call", "enqueue_many", "enqueue_in", "enqueue_at", "enqueue_job"]
WAYS += ["pipeline", "plain"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:rq")  # RQ 1.16 uses what it deprecates


@pytest.fixture
def make_rq_worker(valkey, model, server, tmp_path):
    """Make a worker of one of the driver's modes that finds our jobs, too; `more` ends its command line."""
    made = []

    def make(*more, mode="worker"):
        class Told(type(DRIVER)):
            def command(self, *args, **kwargs):
                return [*super().command(*args, **kwargs), *more]

        own = {"BROKER_URL": valkey, "OPENAI_BASE_URL": model, "WAXELL_API_URL": server.url}
        own["PYTHONPATH"] = str(Path(__file__).parent)
        directory = tmp_path / f"worker-{len(made)}"
        directory.mkdir()
        worker = stage.make_worker(Told(), MODES[mode], APP, directory, slots=None, **own)
        made.append(worker)
        return worker

    yield make
    for worker in made:
        worker.stop()


def queue_of(worker):
    return rq.Queue(worker.site.queue, connection=Redis.from_url(worker.site.broker_url))


def ended_runs(server, marker, count=1):
    """Wait for so many ended runs with a call of this marker; return them as they began."""
    runs = await_(
        lambda: (found := [run for run in server.ended() if marker in run["markers"]])[count - 1 :] and found,
        f"{count} ended runs of {marker}",
    )
    assert len(runs) == count
    return sorted(runs, key=lambda run: run["at"])


def test_every_way_to_enqueue_is_one_story(make_rq_worker, server):
    """Given a request that enqueues a job, which enqueues others in every way: they are one trace, each is
    the child of the one that enqueued it, knows for whom, and has waited since it was due."""
    worker = make_rq_worker("--with-scheduler")
    run_script(
        worker,
        "import tasks, rq_jobs\n"
        "from waxell_workers import WaxellContext\n"
        "about = dict(session_id='s-1', user_id='u-1', metadata={'tenant': 'acme'})\n"
        "with WaxellContext('web', **about) as run:\n"
        "    run.set_tag('plan', 'pro')\n"
        "    tasks.queue.enqueue(rq_jobs.fan_out, 'fan')\n",
    )
    worker.start()
    [parent] = ended_runs(server, "fan")
    children = {way: ended_runs(server, f"fan-{way}")[0] for way in WAYS}
    retried = ended_runs(server, "fan-retried", 2)
    [unknown] = ended_runs(server, "fan-unknown")
    [web] = [run for run in server.runs() if run["agent_name"] == "web"]
    assert parent["parent"] == web["run_id"]
    story = [*children.values(), *retried]
    assert {run["parent"] for run in story} == {parent["run_id"]}
    assert {run["root"] for run in [parent, *story]} == {web["run_id"]}
    assert {run["trace"] for run in [parent, *story]} == {web["trace"]}
    assert {(run["session"], run["user"]) for run in [parent, *story]} == {("s-1", "u-1")}
    for run in [parent, *story]:
        assert run["tags"]["plan"] == "pro"
        assert run["metadata"]["tenant"] == "acme"
        assert run["metadata"]["wait_s"] >= 0
        assert "clock_skew_s" not in run["metadata"]
    for way in ("enqueue_in", "enqueue_at"):
        facts = children[way]["metadata"]
        assert facts["eta"] == pytest.approx(facts["enqueued_at"] + 2, abs=1.1)  # RQ's are whole seconds
    depends = children["depends"]["metadata"]
    assert depends["depends_on"] == [children["enqueue"]["task_id"]]
    assert depends["enqueued_at"] >= children["enqueue"]["metadata"]["enqueued_at"]
    first, second = (run["metadata"] for run in retried)
    assert (first["attempt"], second["attempt"]) == (1, 2)
    assert second["previous_run_id"] == retried[0]["run_id"]
    assert second["eta"] == pytest.approx(second["enqueued_at"] + 2, abs=1.1)
    assert retried[0]["reason"] == "retry: 1 of 1 in 2 s"
    # RQ's own queue says nothing of who enqueues: a story of its own.
    assert (unknown["parent"], unknown["session"]) == ("", "")


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("SIGKILL", "killed", "killed: signal 9, probably out of memory"),
        ("SIGSEGV", "killed", "killed: signal 11 (SIGSEGV), a crash in native code"),
        ("SIGTERM", "killed", "killed: signal 15 (SIGTERM)"),
        ("exit", "killed", "killed: the work-horse ended with status 3"),
        ("late", "error", "error: time limit of 2 s"),
        ("fails", "error", ""),
    ],
)
def test_an_end_in_words(make_rq_worker, server, how, status, reason):
    """However a job ends, its run says why, in words, and has its call."""
    worker = make_rq_worker()
    queue_of(worker).enqueue("rq_jobs.end_by", how, how, job_timeout=2 if how == "late" else 60)
    worker.start()
    [run] = ended_runs(server, how)
    assert (run["status"], run["reason"]) == (status, reason)


def test_a_job_beyond_its_time_limit_is_killed_with_a_reason(make_rq_worker, server):
    """A work-horse that does not hear its time limit is killed by RQ 60 s later; the run says so."""
    worker = make_rq_worker("--job-monitoring-interval", "2")
    queue_of(worker).enqueue("rq_jobs.end_by", "hung", "hung", job_timeout=2)
    worker.start()
    worker.wait_noted("body")
    [run] = await_(
        lambda: [run for run in server.ended() if "hung" in run["markers"]], "killed run", timeout_s=120
    )
    assert (run["status"], run["reason"]) == ("killed", "killed: 60 s past its time limit of 2 s")


def test_a_dead_work_horse_s_job_is_tried_again(make_rq_worker, server):
    """Given a work-horse that is killed, when RQ tries its job again, then that is the second attempt of the
    same story, though nobody is left who could say which run was the first."""
    worker = make_rq_worker()
    run_script(
        worker,
        "import tasks, rq_jobs, rq\n"
        "from waxell_workers import WaxellContext\n"
        "with WaxellContext('web'):\n"
        "    tasks.queue.enqueue(rq_jobs.end_by, 'again', 'SIGKILL', retry=rq.Retry(max=1))\n",
    )
    worker.start()
    first, second = ended_runs(server, "again", 2)
    assert [run["metadata"]["attempt"] for run in (first, second)] == [1, 2]
    assert {run["reason"] for run in (first, second)} == {"killed: signal 9, probably out of memory"}
    assert first["parent"] == second["parent"] != ""
    assert first["trace"] == second["trace"]
    assert "previous_run_id" not in second["metadata"]


@pytest.mark.parametrize("retries", [0, 1])
def test_an_abandoned_job(make_rq_worker, server, retries):
    """Given a worker that dies with its work-horse, when another finds the job abandoned: its run is killed;
    RQ fails the job, or puts it back where a retry is left, which nobody can follow: its next run is the same
    attempt once more."""
    worker = make_rq_worker()
    queue = queue_of(worker)
    retry = {"retry": Retry(max=retries)} if retries else {}
    job = queue.enqueue("scenarios.ask_then_sleep", "abandoned", 600 if not retries else 5, **retry)
    worker.start()
    worker.wait_noted("body")
    worker.kill_tree()
    registry = StartedJobRegistry(queue.name, connection=queue.connection)
    for entry in queue.connection.zrange(registry.key, 0, -1):
        queue.connection.zadd(registry.key, {entry: 1})  # what its heartbeats would have put off is over
    worker.start()
    runs = ended_runs(server, "abandoned", 1 + retries)
    assert runs[0]["status"] == "killed"
    assert runs[0]["reason"].startswith("killed: the process died")
    if retries:
        assert runs[1]["status"] == "success"
        assert [run["metadata"]["attempt"] for run in runs] == [1, 1]
        assert {run["task_id"] for run in runs} == {job.id}
    else:
        await_(lambda: job.get_status() == "failed", "job that RQ calls failed")


@pytest.mark.parametrize(("how", "hook"), [("ask", "on_success"), ("fail", "on_failure")])
def test_a_callback_is_part_of_the_run(make_rq_worker, server, how, hook):
    """Success and failure callbacks run in the work-horse, and what they call belongs to the job's run."""
    worker = make_rq_worker()
    run_script(
        worker,
        "import tasks, rq_jobs, scenarios\n"
        f"tasks.queue.enqueue(scenarios.{how}, 'm', {hook}=rq_jobs.CALL_BACK)\n",
    )
    worker.start()
    [run] = ended_runs(server, "m-callback")
    assert sorted(run["markers"]) == ["m", "m-callback"]


def test_a_stopped_job_s_callback_is_not(make_rq_worker, server):
    """A stopped callback runs in the worker, once the work-horse is gone: its call is outside any run."""
    worker = make_rq_worker()
    job_id = f"job-of-{worker.site.queue}"
    run_script(
        worker,
        "import tasks, rq_jobs, scenarios\n"
        "how = dict(job_id='job-of-' + tasks.queue.name, on_stopped=rq_jobs.CALL_BACK)\n"
        "tasks.queue.enqueue(scenarios.ask_then_sleep, 'm', 60, **how)\n",
    )
    worker.start()
    worker.wait_noted("body")
    send_stop_job_command(Redis.from_url(worker.site.broker_url), job_id)
    [stopped] = ended_runs(server, "m")
    assert stopped["reason"] == "killed: stopped by user"
    assert stopped["markers"] == ["m"]
    worker.wait_noted("called")
    [outside] = ended_runs(server, "m-callback")
    assert (outside["workflow_name"], outside["task_id"]) == ("auto", "")


@pytest.mark.skipif(not hasattr(rq, "Repeat"), reason="RQ 2.2 has it first")
def test_a_job_that_repeats(make_rq_worker, server):
    """Each repetition is a run of the same job, numbered from 0, at its first attempt, and due when its
    interval was over."""
    worker = make_rq_worker("--with-scheduler")
    repeat = rq.Repeat(times=2, interval=[0, 2] if rq.__version__ >= "3" else [2, 0])
    job = queue_of(worker).enqueue("scenarios.ask", "repeated", repeat=repeat)
    worker.start()
    runs = ended_runs(server, "repeated", 3)
    assert {run["task_id"] for run in runs} == {job.id}
    facts = [run["metadata"] for run in runs]
    assert [(each["repeat"], each["attempt"]) for each in facts] == [(0, 1), (1, 1), (2, 1)]
    assert ["eta" in each for each in facts] == [False, False, True]
    assert facts[2]["eta"] == pytest.approx(facts[2]["enqueued_at"] + 2, abs=1.1)
    assert all(each["wait_s"] >= 0 for each in facts)
