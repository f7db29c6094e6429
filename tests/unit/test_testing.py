"""What `waxell_workers.testing` promises to users' own tests."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import dramatiq
import pytest
from celery import Celery
from dramatiq.brokers.stub import StubBroker
from redis import Redis
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

import waxell_workers
import waxell_workers.celery
import waxell_workers.dramatiq
import waxell_workers.rq
import waxell_workers.starlette
from tests.harness import children_in, environment, start_valkey
from waxell_workers import WaxellContext, options, record_llm_call
from waxell_workers.core import collector as collecting
from waxell_workers.testing import record_runs

A_USER_S_TEST = """
import logging
import waxell_workers

def test_it(waxell_runs):
    with waxell_workers.WaxellContext("agent") as run:
        run.record_llm_call(model="m", tokens_in=3)
    assert waxell_runs.one("agent").calls[0].tokens_in == 3

def test_the_next_begins_with_nothing(waxell_runs):
    assert len(waxell_runs) == 0
"""


@pytest.fixture
def app():
    app = Celery("t", broker="memory://", set_as_current=False)
    app.conf.task_always_eager = True
    yield app
    app.close()


def test_an_eager_task_of_celery_is_seen_with_its_calls(app, waxell_runs):
    """`task_always_eager`: the run, its state, its call, its step, its tags."""

    @app.task(name="t.summarise")
    def summarise():
        run = waxell_workers.get_context()
        run.record_llm_call(model="m", tokens_in=5)
        run.record_step("looked", {"found": 2})
        run.set_tag("tenant", "acme")
        run.set_metadata("size", 3)
        run.set_result("short")

    summarise.delay()
    run = waxell_runs.one("t.summarise")
    assert (run.state, run.workflow_name, run.result) == ("success", "celery", "short")
    assert (run.tags, run.metadata["size"], run.metadata["attempt"]) == ({"tenant": "acme"}, 3, 1)
    assert [(call.model, call.tokens_in) for call in run.calls] == [("m", 5)]
    assert [(step.name, step.output) for step in run.steps] == [("looked", {"found": 2})]


def test_a_failure_has_its_type_and_text(app, waxell_runs):
    """What a user asserts of a task that fails."""

    @app.task(name="t.fail")
    def fail():
        raise LookupError("no such ticket")

    fail.delay()
    run = waxell_runs.one()
    assert (run.state, run.error_type, run.error_message) == ("error", "LookupError", "no such ticket")


def test_a_marked_task_waits_for_nobody(app, waxell_runs):
    """`flush="task"` and `force_flush` come back at once: there is nobody to wait for."""

    @app.task(name="t.flushed")
    @options(flush="task")
    def flushed():
        record_llm_call(model="m")

    flushed.delay()
    assert not waxell_workers.force_flush()
    assert waxell_workers.stats().shipper == "external"
    assert waxell_runs.one().state == "success"


def test_calls_outside_any_run_are_seen(waxell_runs):
    """The background collector's calls are in `calls`, and in no run."""
    record_llm_call(model="outside")
    assert [call.model for call in waxell_runs.calls] == ["outside"]
    assert len(waxell_runs) == 0


def test_the_one_that_is_not_the_only_one_is_named():
    """`one()` fails with what there is instead."""
    with record_runs() as runs:
        with WaxellContext("first"):
            pass
        context = WaxellContext("second")
        context.start()
        with pytest.raises(AssertionError, match=r"first \(success\), second \(running\)"):
            runs.one()
        with pytest.raises(AssertionError, match="expected one run of third"):
            runs.one("third")
        context.end()
    assert [run.agent_name for run in runs] == ["first", "second"]


def test_runs_of_other_threads_can_be_waited_for(waxell_runs):
    """A worker in a thread ends its runs when it likes; waiting for more of them fails in the end."""

    def work():
        with WaxellContext("threaded"):
            pass

    thread = threading.Thread(target=work)
    thread.start()
    assert waxell_runs.wait_ended(1)[0].agent_name == "threaded"
    thread.join()
    with pytest.raises(AssertionError, match="1 of 2 runs ended"):
        waxell_runs.wait_ended(2, timeout_s=0.05)


def test_a_forked_child_is_seen_too(waxell_runs):
    """A work-horse of RQ or a pool's process records into the same journal."""
    pid = os.fork()
    if pid == 0:
        try:
            with WaxellContext("child"):
                pass
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert waxell_runs.one().agent_name == "child"


def test_settings_are_those_of_init():
    """Content is asked for as in `init`; a wrong setting is an error."""
    with record_runs(exclude="secret*", capture_content=True) as runs:
        with WaxellContext("secret one"):
            pass
        assert len(runs) == 0
    with pytest.raises(waxell_workers.ConfigError, match="no such setting"), record_runs(colour="red"):
        pass


def test_what_was_configured_before_is_so_again(monkeypatch, tmp_path):
    """The block changes nothing outside itself; an `init` inside it changes nothing inside."""
    monkeypatch.setattr(collecting, "_collector", None)
    monkeypatch.setenv("WAXELL_OBSERVE", "false")
    with record_runs() as runs:
        waxell_workers.init(api_key="k", api_url="https://elsewhere.example", spool_dir=str(tmp_path))
        with WaxellContext("inside"):
            pass
        assert len(runs) == 1
        spool = Path(waxell_workers.stats().spool)
        assert spool.is_dir()
    assert collecting.configured() is None
    assert not spool.exists()
    assert list(tmp_path.iterdir()) == []


def test_pytest_finds_the_fixture_by_itself(tmp_path):
    """The entry point is enough, and costs no import of ours before a test asks for the fixture."""
    (tmp_path / "test_user.py").write_text(A_USER_S_TEST)
    (tmp_path / "conftest.py").write_text(
        "import sys\n"
        "def pytest_sessionstart(session):\n"
        "    ours = ('httpx', 'waxell_workers.testing')\n"
        "    loaded = [name for name in sys.modules if name.startswith(ours)]\n"
        "    assert loaded == []\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env=environment(WAXELL_OBSERVE="false"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


@pytest.fixture
def redis(tmp_path):
    """RQ keeps jobs in Redis also where it executes them in place."""
    with children_in(tmp_path / "valkey") as children, Redis.from_url(start_valkey(children)) as connection:
        yield connection


def job(ticket):
    """What RQ executes: it finds a function by its module."""
    record_llm_call(model="m", tokens_in=len(ticket))


def test_a_job_of_rq_that_runs_in_place_is_seen(redis, waxell_runs):
    """`is_async=False`, with our `Queue`."""
    waxell_workers.rq.Queue("q", is_async=False, connection=redis).enqueue(job, "late")
    run = waxell_runs.one()
    assert (run.state, run.workflow_name, run.calls[0].tokens_in) == ("success", "rq", 4)


@pytest.mark.parametrize("kind", ["SimpleWorker", "Worker"])
def test_jobs_of_a_burst_worker_are_seen(redis, waxell_runs, kind):
    """A worker that a test lets work off its queue, forking or not."""
    waxell_workers.rq.Queue("q", connection=redis).enqueue(job, "late")
    worker = getattr(waxell_workers.rq, kind)(["q"], connection=redis)
    worker.work(burst=True)
    run = waxell_runs.one()
    assert (run.state, run.calls[0].model, run.metadata["queue"]) == ("success", "m", "q")


def test_messages_of_a_stub_broker_are_seen(waxell_runs):
    """Dramatiq's own way to test: a broker in memory, a worker in threads."""
    broker = StubBroker()
    broker.add_middleware(waxell_workers.dramatiq.WaxellMiddleware())

    @dramatiq.actor(broker=broker, max_retries=0)
    def translate(language):
        record_llm_call(model="m")
        if language == "tlh":
            raise ValueError("no desk")

    worker = dramatiq.Worker(broker, worker_timeout=50)
    worker.start()
    try:
        translate.send("de")
        translate.send("tlh")
        states = [run.state for run in waxell_runs.wait_ended(2)]
    finally:
        worker.stop()
    assert sorted(states) == ["error", "success"]
    assert all(len(run.calls) == 1 for run in waxell_runs)


def test_background_tasks_of_an_app_are_seen(waxell_runs):
    """A request of `TestClient` comes back when its tasks have run."""

    def summarise(ticket):
        record_llm_call(model="m", tokens_in=len(ticket))

    def post(request):
        return Response(background=BackgroundTask(summarise, "late"))

    app = Starlette(routes=[Route("/", post, methods=["POST"])])
    app.add_middleware(waxell_workers.starlette.WaxellMiddleware)
    with TestClient(app) as client:
        client.post("/")
    run = waxell_runs.one()
    assert (run.state, run.workflow_name, run.calls[0].tokens_in) == ("success", "starlette", 4)
