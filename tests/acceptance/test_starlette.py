"""A FastAPI app under uvicorn: what no other framework has, so that the shared suite cannot say it.

Real servers, started by uvicorn's own command line; every process is ended by its own id.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT, await_
from waxell_workers.testing.conformance import Expected, Mode, Site, Worker
from waxell_workers.testing.conformance.faults import FaultyProxy
from waxell_workers.testing.conformance.stage import RunningWorker, make_worker, shippers_of

DESK = ROOT / "integrations" / "fastapi"
STARTED = "Application startup complete."
ANSWER_S = 60.0
NEVER_S = "3600"
"""A flush interval that is over after the test: what arrives was delivered for another reason."""
APP = """
import asyncio, os, threading, time
from contextlib import asynccontextmanager

from openai import AsyncOpenAI, OpenAI
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from waxell_workers.starlette import WaxellMiddleware
from waxell_workers.testing.conformance import witness


def question(marker):
    return {"model": marker, "messages": [{"role": "user", "content": "Say yes."}]}


def ask(marker):
    OpenAI().chat.completions.create(**question(marker))
    witness.note("asked", marker)


async def ask_and_sleep(marker):
    await AsyncOpenAI().chat.completions.create(**question(marker))
    witness.note("asked", marker)
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.05)
        witness.note("unwound", marker)


def ask_and_block(marker):
    ask(marker)
    time.sleep(20)


def fail(marker):
    ask(marker)
    raise ValueError("no such desk")


TASKS = {task.__name__: task for task in (ask, ask_and_sleep, ask_and_block, fail)}


async def post(request):
    tasks = BackgroundTasks()
    for name, marker in await request.json():
        tasks.add_task(TASKS[name], marker)
    return PlainTextResponse(str(os.getpid()), background=tasks)


async def ping(request):
    return PlainTextResponse("pong")


async def tick():
    while True:
        witness.note("tick", "loop")
        await asyncio.sleep(0.02)


@asynccontextmanager
async def lifespan(app):
    ticking = asyncio.create_task(tick())
    yield
    witness.note("shutdown", "app")
    app.state.ticking = ticking  # goes on


desk = Starlette(routes=[Route("/", post, methods=["POST"]), Route("/ping", ping)], lifespan=lifespan)
desk.add_middleware(WaxellMiddleware)


async def app(scope, receive, send):
    try:
        await desk(scope, receive, send)
    finally:
        if scope["type"] == "http" and scope["method"] == "POST":
            witness.note("returned", scope["path"])
"""


@dataclass
class Uvicorn:
    """How to start uvicorn, for the conformance kit's worker."""

    app: str
    arguments: Sequence[str] = ()
    processes: int = 1
    lifespan: bool = True
    framework: str = "starlette"
    modes: Sequence[Mode] = ()
    controls: Mapping[str, Expected] = field(default_factory=dict)
    failed: str = ""
    soft_limit_error: str = ""

    def command(self, mode: Mode, site: Site, *, slots: int, recycle: bool = False) -> list[str]:
        """Return uvicorn's command line."""
        return [sys.executable, "-m", "uvicorn", self.app, "--port", str(site.port), *self.arguments]

    def ready(self, worker: Worker) -> bool:
        """True once each process has started the app, and somebody listens, which comes after that."""
        if self.lifespan and worker.text.count(STARTED) < self.processes:
            return False
        try:
            socket.create_connection(("127.0.0.1", worker.site.port), timeout=ANSWER_S).close()
        except ConnectionError:
            return False
        return True

    def send(self, worker: Worker, scenario: str, *arguments: object, **_: Any) -> str:
        """Post to a path, and return the answer."""
        [body] = arguments
        return request(worker, "POST", scenario, body)

    def done(self, worker: Worker) -> int:
        """Not asked here."""
        raise NotImplementedError

    def outcome(self, worker: Worker, handle: str) -> str:
        """Not asked here."""
        raise NotImplementedError


def request(worker: Worker, method: str, path: str, body: object = None, **headers: str) -> str:
    """Send one request on a connection of its own and return the answer's text."""
    data = json.dumps(body).encode() if method == "POST" else None
    own = {"Content-Type": "application/json", "Connection": "close"} | headers
    url = f"http://127.0.0.1:{worker.site.port}{path}"
    question = urllib.request.Request(url, data, own, method=method)
    with urllib.request.urlopen(question, timeout=ANSWER_S) as response:
        return str(response.read().decode())


@pytest.fixture
def protocol():
    """All of this is about the app, for which the protocol makes no difference."""
    return "ingest"


@pytest.fixture
def serve(model, server, tmp_path):
    """Start uvicorn with the app above, or the one of the integration."""
    started = []

    def start(
        *arguments, folder: Path | None = None, processes=1, lifespan=True, **settings
    ) -> RunningWorker:
        if folder is None:
            folder = tmp_path / "app"
            folder.mkdir(exist_ok=True)
            (folder / "served.py").write_text(APP)
        directory = tmp_path / f"worker-{len(started)}"
        directory.mkdir()
        name = "app:app" if folder == DESK else "served:app"
        driver = Uvicorn(name, arguments, processes, lifespan)
        own = {"OPENAI_BASE_URL": model, "WAXELL_API_URL": server.url, "WAXELL_FLUSH_INTERVAL": "0.5"}
        worker = make_worker(
            driver, Mode("test", frozenset(), broker=""), folder, directory, **own | settings
        )
        started.append(worker)
        worker.start()
        return worker

    yield start
    for worker in started:
        worker.stop()


def post(worker, *tasks):
    """Have one request carry out tasks, each a name and a marker; return the process that does."""
    return int(worker.send("/", tasks))


def run_with(server, marker):
    """Return the one run that has the call of this marker, once it has ended."""
    [run] = await_(lambda: [run for run in server.ended() if marker in run["markers"]], f"run of {marker}")
    return run


# -- a request and its tasks -------------------------------------------------------------------


def test_a_ticket_is_one_story(serve, server):
    """The integration's support desk: tasks, and a task's task, are children of the observed endpoint."""
    worker = serve(folder=DESK, WAXELL_FLUSH_INTERVAL=NEVER_S, OPENAI_MODEL="m")
    assert worker.send("/tickets", {"ticket": "I was charged twice."}) == '{"ticket":"received"}'
    await_(lambda: worker.text.count("POST /tickets"), "answer in the log")
    worker.terminate()
    runs = {run["agent_name"]: run for run in server.ended()}
    assert set(runs) == {"receive_ticket", "triage", "update_crm", "escalate", "summarise"}
    top = runs.pop("receive_ticket")
    parents = {name: run["parent"] for name, run in runs.items()}
    assert parents.pop("summarise") == runs["triage"]["run_id"]
    assert set(parents.values()) == {top["run_id"]}
    assert {run["root"] for run in runs.values()} == {top["run_id"]}
    assert {run["workflow_name"] for run in runs.values()} == {"fastapi"}
    assert top["workflow_name"] == "support desk"
    assert [run["markers"] for run in runs.values()] == [["m"]] * 4


def test_a_failed_task_reaches_the_server_and_ends_the_request_s_tasks(serve, server):
    """uvicorn logs the very exception, the client has its answer, later tasks are not begun."""
    worker = serve()
    post(worker, ("ask", "before"), ("fail", "failing"), ("ask", "after"))
    run = run_with(server, "failing")
    assert (run["status"], run["error"]) == ("error", "ValueError: no such desk")
    assert run_with(server, "before")["status"] == "success"
    await_(lambda: "ValueError: no such desk" in worker.text, "exception in the log")
    assert [note.marker for note in worker.notes("asked")] == ["before", "failing"]


def test_an_incoming_trace_is_continued(serve, server):
    """Given a client that sends a `traceparent`, then its trace id is the run's."""
    worker = serve()
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    request(worker, "POST", "/", [("ask", "traced")], traceparent=f"00-{trace}-00f067aa0ba902b7-01")
    assert run_with(server, "traced")["trace"] == trace


# -- the event loop ----------------------------------------------------------------------------


def test_the_loop_serves_others_while_a_request_waits_for_its_flush(serve, server):
    """Given a server that hangs, then a flush holds up its own request's end and nobody else's."""
    with FaultyProxy(server.url) as faulty:
        faulty.mode("hang")
        worker = serve(WAXELL_API_URL=faulty.url, WAXELL_FLUSH="task", WAXELL_FLUSH_TIMEOUT="8")
        post(worker, ("ask", "waiting"))
        worker.wait_noted("asked")
        answers = [request(worker, "GET", "/ping") for _ in range(10)]
        assert answers == ["pong"] * 10
        assert worker.notes("returned") == [], "the flush was over before anybody could be held up"
        worker.wait_noted("returned")
        began, ended = worker.notes("asked")[0].at, worker.notes("returned")[0].at
        assert longest_pause(worker, began, ended) < (ended - began) / 4
        faulty.mode("healthy")
        run_with(server, "waiting")


def test_the_loop_runs_while_a_stopping_app_waits(serve, server):
    """Given a server that hangs, then the app's own coroutines run on while its end waits for deliveries."""
    with FaultyProxy(server.url) as faulty:
        faulty.mode("hang")
        worker = serve(WAXELL_API_URL=faulty.url)
        post(worker, ("ask", "late"))
        worker.wait_noted("returned")
        worker.terminate()
        began, ended = worker.notes("shutdown")[0].at, time.time()
        last = worker.notes("tick")[-1].at
        assert last - began > 1.5, "nothing was waited for"
        assert longest_pause(worker, began, last) < (last - began) / 4
        assert ended - began < 3 + 2
        faulty.mode("healthy")
        worker.drain()
        run_with(server, "late")


def longest_pause(worker, began, ended):
    """Return the longest time between two ticks of the app's loop."""
    ticks = [note.at for note in worker.notes("tick") if began <= note.at <= ended]
    return max(after - earlier for earlier, after in pairwise([began, *ticks, ended]))


# -- ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "processes"), [((), 1), (("--workers", "2"), 2)], ids=["1 worker", "2 workers"]
)
def test_sigterm_delivers_before_the_end(serve, server, arguments, processes):
    """Given an interval of an hour, when uvicorn gets SIGTERM, then all is at the server as it ends.

    uvicorn lets itself be killed by the signal again once it is done: no `atexit` handler is run.
    """
    worker = serve(
        *arguments,
        processes=processes,
        WAXELL_FLUSH_INTERVAL=NEVER_S,
        WAXELL_SHUTDOWN_TIMEOUT="60",
    )
    pids, sent = set(), []
    while len(sent) < 40 or len(pids) < processes:  # the kernel chooses the process
        assert len(sent) < 1000, "one process has got everything"
        sent.append(f"call-{len(sent)}")
        pids.add(post(worker, ("ask", sent[-1])))
    worker.wait_noted("returned", len(sent))
    assert server.calls() == {}
    # Both processes may have started one: the second waits for the lock for a while, and leaves.
    await_(lambda: len(shippers_of(worker.spool)) == (processes > 1), "single shipper", 30)
    worker.terminate()
    assert sorted(server.calls().elements()) == sorted(sent)
    assert {run["status"] for run in server.runs()} == {"success"}
    assert {run["metadata"]["pid"] for run in server.runs()} == pids


@pytest.mark.parametrize("task", ["ask_and_sleep", "ask_and_block"])
def test_a_task_that_is_cancelled_at_shutdown_is_interrupted(serve, server, task):
    """With `timeout_graceful_shutdown`, uvicorn shuts down before a cancelled task has unwound.

    A coroutine is cancelled, a thread cannot be: its run is ended for it. Either way nobody waits for the
    next start to hear of it.
    """
    worker = serve("--timeout-graceful-shutdown", "1", WAXELL_FLUSH_INTERVAL=NEVER_S)
    post(worker, (task, "cancelled"))
    worker.wait_noted("asked")
    worker.terminate(15)
    [run] = server.runs()
    assert (run["status"], run["markers"]) == ("interrupted", ["cancelled"])
    if task == "ask_and_sleep":
        assert "CancelledError" in run["error"]
        assert worker.notes("unwound")
        assert worker.notes("unwound")[0].at > worker.notes("shutdown")[0].at, "not what this is about"


def test_ctrl_c_delivers_too(serve, server):
    """SIGINT ends uvicorn the same way."""
    worker = serve(WAXELL_FLUSH_INTERVAL=NEVER_S)
    post(worker, ("ask", "interrupted"))
    worker.wait_noted("returned")
    worker.signal(signal.SIGINT)
    worker.wait_ended()
    assert dict(server.calls()) == {"interrupted": 1}


def test_a_second_ctrl_c_delivers_by_the_interpreter_s_own_exit(serve, server):
    """A second SIGINT makes uvicorn skip the app's shutdown: what `atexit` is the net for."""
    worker = serve(WAXELL_FLUSH_INTERVAL=NEVER_S)
    post(worker, ("ask_and_sleep", "interrupted"))
    worker.wait_noted("asked")
    worker.signal(signal.SIGINT)
    worker.wait(lambda: "Waiting for background tasks" in worker.text, "the first to have an effect")
    worker.signal(signal.SIGINT)
    worker.wait_ended()
    assert worker.notes("shutdown") == []
    [run] = server.runs()
    assert (run["status"], run["markers"]) == ("interrupted", ["interrupted"])


def test_without_lifespan_the_next_start_delivers(serve, server):
    """`--lifespan off` leaves no hook before SIGTERM kills: what was recorded waits in the spool."""
    worker = serve("--lifespan", "off", lifespan=False, WAXELL_FLUSH_INTERVAL=NEVER_S)
    post(worker, ("ask", "kept"))
    worker.wait_noted("returned")
    worker.terminate()
    assert server.calls() == {}
    worker.start(WAXELL_FLUSH_INTERVAL="0.5")
    post(worker, ("ask", "next"))
    assert run_with(server, "kept")["status"] == "success"


def test_a_start_delivers_what_a_killed_one_has_left(serve, server):
    """SIGKILL in mid-task: the next start delivers, before its first request, and calls the run killed."""
    worker = serve(WAXELL_FLUSH_INTERVAL=NEVER_S)
    post(worker, ("ask_and_sleep", "killed"))
    worker.wait_noted("asked")
    worker.kill_tree()
    assert server.calls() == {}
    worker.start(WAXELL_FLUSH_INTERVAL="0.5")
    run = run_with(server, "killed")
    assert (run["status"], run["markers"]) == ("killed", ["killed"])


def test_a_killed_worker_process_is_told_by_the_shipper(serve, server):
    """With 2 workers, one that is SIGKILLed in mid-task: its run is `killed`, while uvicorn goes on."""
    worker = serve("--workers", "2", processes=2)
    pid = post(worker, ("ask_and_sleep", "killed"))
    worker.wait_noted("asked")
    os.kill(pid, signal.SIGKILL)
    run = run_with(server, "killed")
    assert (run["status"], run["metadata"]["pid"]) == ("killed", pid)
    await_(lambda: worker.text.count(STARTED) == 3, "replacement")
    post(worker, ("ask", "survivor"))
    assert run_with(server, "survivor")["status"] == "success"


def test_many_requests_at_once(serve, server):
    """Given 60 requests at once with two tasks each, flushed, then each run has its own call."""
    worker = serve(WAXELL_FLUSH="task", WAXELL_FLUSH_TIMEOUT="30")
    threads = [
        threading.Thread(target=post, args=(worker, ("ask", f"a-{number}"), ("ask", f"b-{number}")))
        for number in range(60)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worker.wait_noted("returned", 60)
    assert sorted(run["markers"] for run in server.ended()) == sorted(
        [f"{letter}-{number}"] for letter in "ab" for number in range(60)
    )
