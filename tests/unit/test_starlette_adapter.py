"""The Starlette adapter in one process: real apps, called by Starlette's own test client.

Real servers are in `tests/acceptance`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import subprocess
import sys
import threading
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread
import pytest
from fastapi import BackgroundTasks as InjectedTasks
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient

import waxell_workers.fastapi
from waxell_workers import WaxellContext, get_context, observe, options
from waxell_workers.core import collector as collecting
from waxell_workers.core.flush import FlushResult
from waxell_workers.core.records import LLMCall, RunEnded, RunStarted
from waxell_workers.starlette import WaxellMiddleware

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def flushes(monkeypatch):
    """Note each flush: its thread and its timeout."""
    seen = []

    def force_flush(self, timeout=None, **_):
        seen.append((threading.get_ident(), timeout))
        return FlushResult(0, 0, 0)

    monkeypatch.setattr(collecting.Collector, "force_flush", force_flush)
    return seen


def application(endpoint, *middleware, framework=Starlette):
    """Return an app with one endpoint at `/`, and our middleware between others."""
    return framework(routes=[Route("/", endpoint)], middleware=[*middleware])


def call(app, **headers):
    """Call the app once and return its answer; what a task raises is raised here."""
    return TestClient(app).get("/", headers=headers)


OURS = Middleware(WaxellMiddleware)


def tell(model="m"):
    get_context().record_llm_call(model=model)


async def tell_async(model="m"):
    await anyio.sleep(0)
    get_context().record_llm_call(model=model)


def by_name(records):
    return {record.agent_name: record for record in records(RunStarted)}


# -- tasks are runs ----------------------------------------------------------------------------


@pytest.mark.parametrize("task", [tell, tell_async])
@pytest.mark.parametrize("endpoint", ["sync", "async"])
def test_a_response_s_task_is_a_run(records, task, endpoint):
    """A `BackgroundTask` given to the response, of a function or coroutine, from either kind of endpoint."""

    def sync(request):
        return PlainTextResponse("ok", background=BackgroundTask(task))

    async def asynchronous(request):
        return sync(request)

    assert call(application(sync if endpoint == "sync" else asynchronous, OURS)).text == "ok"
    [run], [said], [end] = records(RunStarted), records(LLMCall), records(RunEnded)
    assert (run.agent_name, run.workflow_name) == (task.__qualname__, "starlette")
    assert (said.run_id, end.run_id, end.state) == (run.run_id, run.run_id, "success")
    assert run.metadata["framework"] == "starlette"
    assert run.metadata["task"] == task.__qualname__
    assert (run.metadata["attempt"], run.metadata["task_id"]) == (1, run.task_id)
    assert run.metadata["wait_s"] >= 0
    assert (run.parent_run_id, run.root_run_id) == ("", run.run_id)


def test_each_task_of_a_request_is_a_run_of_its_own(records):
    """`BackgroundTasks` of functions and coroutines: a run each, none the parent of another."""

    async def endpoint(request):
        tasks = BackgroundTasks()
        tasks.add_task(tell, "one")
        tasks.add_task(tell_async, model="two")
        tasks.add_task(functools.partial(tell, "three"))
        return PlainTextResponse("ok", background=tasks)

    call(application(endpoint, OURS))
    runs = records(RunStarted)
    calls = {said.run_id: said.model for said in records(LLMCall)}
    assert [calls[run.run_id] for run in runs] == ["one", "two", "three"]
    assert [run.agent_name for run in runs] == ["tell", "tell_async", "tell"]
    assert [run.parent_run_id for run in runs] == ["", "", ""]
    assert len({run.task_id for run in runs}) == 3


@pytest.mark.parametrize("middleware", [WaxellMiddleware, waxell_workers.fastapi.WaxellMiddleware])
@pytest.mark.parametrize("endpoint", ["sync", "async"])
def test_fastapi_s_injected_tasks_are_runs_of_fastapi(records, middleware, endpoint):
    """The framework is the app's, whichever name the middleware was imported by."""
    app = FastAPI()
    app.add_middleware(middleware)
    if endpoint == "sync":

        @app.get("/")
        def add(tasks: InjectedTasks):
            tasks.add_task(tell)

    else:

        @app.get("/")
        async def add_async(tasks: InjectedTasks):
            tasks.add_task(tell)

    assert call(app).status_code == 200
    [run] = records(RunStarted)
    assert (run.workflow_name, run.metadata["framework"]) == ("fastapi", "fastapi")
    assert len(records(LLMCall)) == 1


def test_the_app_may_be_wrapped_from_outside(records):
    """`WaxellMiddleware(app)` is as good as `add_middleware`."""
    app = application(
        lambda request: PlainTextResponse("ok", background=BackgroundTask(tell)), framework=FastAPI
    )
    call(WaxellMiddleware(app))
    assert [run.workflow_name for run in records(RunStarted)] == ["fastapi"]


def test_a_task_may_add_another(records):
    """A task that adds one to its own request is the new one's parent."""

    def second():
        pass

    async def endpoint(request):
        tasks = BackgroundTasks()
        tasks.add_task(lambda: tasks.add_task(second))
        return PlainTextResponse("ok", background=tasks)

    call(application(endpoint, OURS))
    first, second_run = records(RunStarted)
    assert second_run.agent_name.endswith("second")
    assert (second_run.parent_run_id, second_run.root_run_id) == (first.run_id, first.run_id)


# -- lineage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["response", "added"])
@pytest.mark.parametrize("endpoint", ["sync", "async"])
def test_the_endpoint_s_run_is_the_parent(records, endpoint, way):
    """An observed endpoint's run is its tasks' parent, although it has ended, and a sync one had a thread."""

    def answer():
        if way == "response":
            return PlainTextResponse("ok", background=BackgroundTask(tell))
        tasks = BackgroundTasks()
        tasks.add_task(tell)
        return PlainTextResponse("ok", background=tasks)

    @observe(agent_name="endpoint")
    def sync(request):
        return answer()

    @observe(agent_name="endpoint")
    async def asynchronous(request):
        return answer()

    call(
        application(sync if endpoint == "sync" else asynchronous, OURS),
        traceparent=f"00-{TRACE}-{'1' * 16}-01",
    )
    runs = by_name(records)
    outer, task = runs["endpoint"], runs["tell"]
    assert (task.parent_run_id, task.root_run_id, task.trace_id) == (
        outer.run_id,
        outer.run_id,
        outer.trace_id,
    )
    assert [said.run_id for said in records(LLMCall)] == [task.run_id]
    assert get_context() is None


def test_a_run_that_is_open_around_the_whole_request_is_the_parent(records):
    """Somebody's middleware may hold a run open until the tasks are done: current again after each."""
    current = []

    class Around:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            async with WaxellContext("around"):
                await self.app(scope, receive, send)
                current.append(get_context().agent_name)

    async def endpoint(request):
        return PlainTextResponse("ok", background=BackgroundTask(tell))

    call(application(endpoint, Middleware(Around), OURS))
    runs = by_name(records)
    assert runs["tell"].parent_run_id == runs["around"].run_id
    assert current == ["around"]


@pytest.mark.parametrize(
    ("header", "trace"), [(f"00-{TRACE}-{'1' * 16}-01", TRACE), ("00-nonsense", None), ("", None)]
)
def test_an_incoming_traceparent_gives_the_trace(records, header, trace):
    """The client's trace id is the run's; the client is no run, so that there is no parent."""

    async def endpoint(request):
        return PlainTextResponse("ok", background=BackgroundTask(tell))

    call(application(endpoint, OURS), traceparent=header)
    [run] = records(RunStarted)
    assert run.trace_id == (trace or run.run_id)
    assert run.parent_run_id == ""


# -- options -----------------------------------------------------------------------------------


def test_options_and_exclusion(records):
    """A task is named and left out by its own options, below a partial too, and left out by its name."""

    @options(agent_name="chosen")
    def named():
        pass

    @options(record=False)
    def unrecorded():
        get_context().record_llm_call(model="unseen")

    def secret():
        pass

    secret.__qualname__ = "secret"

    async def endpoint(request):
        tasks = BackgroundTasks()
        for function in (named, functools.partial(named), unrecorded, secret):
            tasks.add_task(function)
        return PlainTextResponse("ok", background=tasks)

    call(application(endpoint, OURS))
    assert [run.agent_name for run in records(RunStarted)] == ["chosen", "chosen"]
    assert records(LLMCall) == []


@pytest.mark.parametrize("content", [True, False])
def test_arguments_are_content(configure, records, content):
    """Arguments are recorded with `capture_content` alone; what is no plain data is named."""
    configure(capture_content=content)

    async def endpoint(request):
        background = BackgroundTask(lambda *args, **kwargs: None, "text", other=object())
        return PlainTextResponse("ok", background=background)

    call(application(endpoint, OURS))
    [run] = records(RunStarted)
    assert run.inputs == ({"args": ["text"], "kwargs": {"other": "<builtins.object>"}} if content else {})


@pytest.mark.parametrize("setting", [True, False])
def test_a_task_chooses_its_content(configure, records, setting):
    """`@options(capture_content=…)` on a task's function beats the setting."""
    configure(capture_content=setting)

    @options(capture_content=not setting)
    def chosen(text):
        pass

    async def endpoint(request):
        tasks = BackgroundTasks()
        tasks.add_task(chosen, "text")
        tasks.add_task(lambda text: None, "text")
        return PlainTextResponse("ok", background=tasks)

    call(application(endpoint, OURS))
    assert [bool(run.inputs) for run in records(RunStarted)] == [not setting, setting]


def test_a_request_is_flushed_once_and_after_its_last_task(configure, records, flushes):
    """One flush for the request, off the loop's thread, for as long as the most patient task says."""
    configure(flush="task", flush_timeout=2.0)
    seen = []

    @options(flush_timeout=7.0)
    async def patient():
        seen.append((threading.get_ident(), len(flushes)))

    async def endpoint(request):
        tasks = BackgroundTasks()
        tasks.add_task(patient)
        tasks.add_task(patient)
        tasks.add_task(tell_async)
        return PlainTextResponse("ok", background=tasks)

    call(application(endpoint, OURS))
    [(thread, timeout)] = flushes
    assert [count for _, count in seen] == [0, 0]
    assert thread not in {ident for ident, _ in seen}
    assert 6.0 < timeout <= 7.0


@pytest.mark.parametrize(("policy", "expected"), [("periodic", 0), ("task", 1)])
def test_only_a_task_that_asks_is_flushed(configure, records, flushes, policy, expected):
    """Globally `periodic` does nothing; a request without a task is not flushed under `task` either."""
    configure(flush=policy)

    def answer(background):
        return application(lambda request: PlainTextResponse("ok", background=background), OURS)

    call(answer(None))
    assert flushes == []
    call(answer(BackgroundTask(tell)))
    assert len(flushes) == expected
    call(answer(BackgroundTask(options(flush="task")(lambda: None))))
    assert len(flushes) == expected + 1


def test_a_failed_task_is_flushed_too(configure, records, flushes):
    """Under `task` the records of a task that raised are delivered before the server hears of it."""
    configure(flush="task")

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        call(application(lambda request: PlainTextResponse("ok", background=BackgroundTask(fail)), OURS))
    assert len(flushes) == 1


def test_without_threads_all_goes_on(configure, records, monkeypatch, caplog):
    """Where no thread can be started, requests and the app's life are as ever; it is said in the log."""
    configure(flush="task")
    run_sync = anyio.to_thread.run_sync

    async def no_thread(function, *args, limiter=None):
        if limiter is not None:  # ours
            raise RuntimeError("can't start new thread")
        return await run_sync(function, *args)

    monkeypatch.setattr(anyio.to_thread, "run_sync", no_thread)
    app = application(lambda request: PlainTextResponse("ok", background=BackgroundTask(tell)), OURS)
    with caplog.at_level(logging.WARNING, "waxell_workers"), TestClient(app) as client:
        assert client.get("/").text == "ok"
    assert [end.state for end in records(RunEnded)] == ["success"]
    assert caplog.text.count("can't start new thread") == 3


# -- how tasks end -----------------------------------------------------------------------------


@pytest.mark.parametrize("sync", [True, False])
def test_a_task_that_raises_ends_its_run_and_skips_the_later_ones(records, sync):
    """The very exception reaches the server; its run is an error, the tasks after it have none."""
    error = ValueError("no")

    def fail():
        raise error

    async def fail_async():
        raise error

    async def endpoint(request):
        tasks = BackgroundTasks()
        for function in (tell, fail if sync else fail_async, tell_async):
            tasks.add_task(function)
        return PlainTextResponse("ok", background=tasks)

    with pytest.raises(ValueError, match="no") as caught:
        call(application(endpoint, OURS))
    assert caught.value is error
    assert (error.__context__, error.__cause__) == (None, None)
    assert [end.state for end in records(RunEnded)] == ["success", "error"]
    end = records(RunEnded)[-1]
    assert (end.error_type, end.error_message) == ("ValueError", "no")
    assert "in fail" in end.traceback


def test_a_cancelled_task_is_interrupted(records):
    """A task that is cancelled while it waits: `interrupted`, and the cancellation goes on."""

    async def wait():
        await asyncio.sleep(60)

    async def endpoint(request):
        return PlainTextResponse("ok", background=BackgroundTask(wait))

    async def cancel():
        task = asyncio.create_task(serve(application(endpoint, OURS)))
        while not records(RunStarted):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    [end] = records(RunEnded)
    assert (end.state, end.error_type) == ("interrupted", "asyncio.exceptions.CancelledError")


async def serve(app, scope=None):
    """Call the app as a server does, with one request, and return what it sent."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = scope or {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    await app(scope, receive, send)
    return sent


def test_tasks_on_one_loop_do_not_disturb_each_other(records):
    """Coroutines of several requests that alternate on the loop's thread keep their own runs and calls."""

    async def talk(number):
        for _ in range(3):
            await asyncio.sleep(0)
            tell(f"model-{number}")

    numbers = iter(range(8))

    async def endpoint(request):
        return PlainTextResponse("ok", background=BackgroundTask(talk, next(numbers)))

    async def many():
        app = application(endpoint, OURS)
        await asyncio.gather(*(serve(app) for _ in range(8)))

    asyncio.run(many())
    said = {}
    for record in records(LLMCall):
        said.setdefault(record.run_id, []).append(record.model)
    assert sorted(said.values()) == [[f"model-{number}"] * 3 for number in range(8)]
    assert [end.state for end in records(RunEnded)] == ["success"] * 8


class Stubborn(BackgroundTask):
    """A user's own: it tries again."""

    async def __call__(self):
        try:
            await super().__call__()
        except ConnectionError:
            await super().__call__()


def test_a_subclass_that_tries_again_has_a_run_an_attempt(records):
    """A subclass of Starlette's class is seen each time it has Starlette run the function: two attempts."""
    attempts = []

    def flaky():
        attempts.append(1)
        if len(attempts) == 1:
            raise ConnectionError("gone")

    call(application(lambda request: PlainTextResponse("ok", background=Stubborn(flaky)), OURS))
    first, second = records(RunStarted)
    assert (first.metadata["attempt"], second.metadata["attempt"]) == (1, 2)
    assert first.task_id == second.task_id
    assert [end.state for end in records(RunEnded)] == ["error", "success"]


def test_a_task_made_outside_of_any_request_is_a_run_each_time(records):
    """One `BackgroundTask` of a module's, given to every response: each time a task of its own."""
    shared = BackgroundTask(tell)
    app = application(lambda request: PlainTextResponse("ok", background=shared), OURS)
    call(app)
    call(app)
    assert len({run.task_id for run in records(RunStarted)}) == 2
    assert [run.metadata["attempt"] for run in records(RunStarted)] == [1, 1]


# -- what it leaves alone ----------------------------------------------------------------------


def test_tasks_outside_an_app_with_the_middleware_are_not_runs(records):
    """Neither those of another app of the process, nor those that are called by hand, not even afterwards."""
    WaxellMiddleware(application(None))
    assert list(inspect.signature(BackgroundTask).parameters) == ["func", "args", "kwargs"]
    seen = []
    task = BackgroundTask(lambda: seen.append(get_context()))
    call(application(lambda request: PlainTextResponse("ok", background=task)))
    asyncio.run(task())
    assert seen == [None, None]
    assert vars(task).keys() == {"func", "args", "kwargs", "is_async"}
    assert records(RunStarted) == []


def test_the_request_itself_is_no_run(records):
    """A call in the endpoint, outside any run, is not in a run of ours: it is collected as in a script."""

    async def endpoint(request):
        waxell_workers.record_llm_call(model="in the endpoint")
        assert get_context() is None
        return PlainTextResponse("ok", background=BackgroundTask(tell))

    call(application(endpoint, OURS))
    assert [said.run_id for said in records(LLMCall) if said.model == "in the endpoint"] == [""]
    assert [run.agent_name for run in records(RunStarted)] == ["tell"]


class Plain(BaseHTTPMiddleware):
    """A user's own middleware of the usual kind."""

    async def dispatch(self, request, call_next):
        return await call_next(request)


BASE = Middleware(Plain)
GZIP = Middleware(GZipMiddleware, minimum_size=1)


@pytest.mark.parametrize(
    "middleware",
    [
        [OURS, OURS],
        [BASE, OURS],
        [OURS, BASE],
        [BASE, OURS, BASE, OURS],
        [OURS, GZIP],
        [GZIP, OURS, BASE],
    ],
    ids=["twice", "base above", "base below", "all twice", "gzip below", "gzip above"],
)
def test_other_middleware_makes_no_difference(configure, records, flushes, middleware):
    """Our middleware twice, others above and below: one run a task, one flush, the same answer."""
    configure(flush="task")

    async def endpoint(request):
        return PlainTextResponse("answer " * 100, background=BackgroundTask(tell_async))

    assert call(application(endpoint, *middleware)).text == "answer " * 100
    assert [run.agent_name for run in records(RunStarted)] == ["tell_async"]
    assert [end.state for end in records(RunEnded)] == ["success"]
    assert len(flushes) == 1


def test_a_mounted_app_with_the_middleware_too(records):
    """An app within an app, both with the middleware: one run a task, of the outer one's framework."""
    inner = application(
        lambda request: PlainTextResponse("ok", background=BackgroundTask(tell)), OURS, framework=FastAPI
    )
    outer = Starlette(routes=[Mount("/inner", inner)], middleware=[OURS])
    assert TestClient(outer).get("/inner/").text == "ok"
    assert [run.workflow_name for run in records(RunStarted)] == ["starlette"]


def test_an_app_that_is_called_inside_another_s_request_is_its_own(configure, records, flushes):
    """In-process calls of an app from an endpoint: each request flushes its own tasks."""
    configure(flush="task")
    inner = application(lambda request: PlainTextResponse("ok", background=BackgroundTask(tell)), OURS)

    async def endpoint(request):
        await serve(inner)
        assert len(flushes) == 1
        return PlainTextResponse("ok", background=BackgroundTask(tell_async))

    call(application(endpoint, OURS))
    assert [run.agent_name for run in records(RunStarted)] == ["tell", "tell_async"]
    assert len(flushes) == 2


def test_websockets_pass_through_untouched(records):
    """A websocket's scope is what the server gave, and a task that it calls by hand is no run."""
    scopes = []

    async def endpoint(websocket):
        scopes.append(set(websocket.scope))
        await websocket.accept()
        await BackgroundTask(lambda: scopes.append(get_context()))()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/", endpoint)], middleware=[OURS])
    with TestClient(app).websocket_connect("/") as websocket:
        websocket.send_text("hello")
        assert websocket.receive_text() == "hello"
    assert not any(key.startswith("waxell") for key in scopes[0])
    assert scopes[1] is None
    assert records(RunStarted) == []


# -- startup and shutdown ----------------------------------------------------------------------


@pytest.fixture
def life(monkeypatch):
    """Note what the middleware has the core do, and in which thread."""
    seen = []
    for name in ("app_booting", "worker_stopping"):
        monkeypatch.setattr(
            waxell_workers.core.tasks, name, lambda *_, name=name: seen.append((name, threading.get_ident()))
        )
    return seen


def lifespan_of(seen, fail=None):
    async def lifespan(app):
        seen.append(("app startup", threading.get_ident()))
        yield
        seen.append(("app shutdown", threading.get_ident()))
        if fail is not None:
            raise fail

    return lifespan


def test_boot_after_the_app_s_startup_and_stop_after_its_shutdown(life):
    """The app may call `init` at startup and record at shutdown; neither of ours is on the loop's thread."""
    app = Starlette(lifespan=asynccontextmanager(lifespan_of(life)), middleware=[OURS, OURS])
    with TestClient(app):
        pass
    assert [name for name, _ in life] == ["app startup", "app_booting", "app shutdown", "worker_stopping"]
    (_, loop), (_, booting), _, (_, stopping) = life
    assert loop not in (booting, stopping)


def test_a_failing_shutdown_still_delivers(life):
    """The app's shutdown fails: what is there is delivered, and the failure is the app's own."""
    app = Starlette(lifespan=asynccontextmanager(lifespan_of(life, OSError("no"))), middleware=[OURS])
    with pytest.raises(OSError, match="no"), TestClient(app):
        pass
    assert [name for name, _ in life][-1] == "worker_stopping"


def test_without_lifespan_the_first_request_boots(life):
    """A server that sends no lifespan events: boot once, at the first request."""
    app = application(lambda request: PlainTextResponse("ok"), OURS)
    call(app)
    assert [name for name, _ in life] == ["app_booting"]


def test_shutdown_waits_for_cancelled_requests_to_unwind(records, life):
    """A server that cancels and goes on to shut down: the run has ended before anything is delivered."""

    async def slow():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            tell("last words")

    async def endpoint(request):
        return PlainTextResponse("ok", background=BackgroundTask(slow))

    app = application(endpoint, OURS)
    events = asyncio.Queue()
    ended = []

    async def shut_down():
        async def send(message):
            if message["type"] == "lifespan.shutdown.complete":
                ended.extend(records(RunEnded))

        lifespan = asyncio.create_task(app({"type": "lifespan", "state": {}}, events.get, send))
        await events.put({"type": "lifespan.startup"})
        request = asyncio.create_task(serve(app))
        while not records(RunStarted):
            await asyncio.sleep(0.01)
        request.cancel()
        await events.put({"type": "lifespan.shutdown"})
        await lifespan
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(shut_down())
    assert [end.state for end in ended] == ["interrupted"]
    assert [said.model for said in records(LLMCall)] == ["last words"]


def test_nothing_is_done_at_import(tmp_path):
    """Importing the adapter and adding the middleware creates no file, no thread, and configures nothing."""
    code = (
        "import threading, openai, waxell_workers.starlette\n"
        "from starlette.applications import Starlette\n"
        "from waxell_workers.core import collector\n"
        "Starlette().add_middleware(waxell_workers.starlette.WaxellMiddleware)\n"
        "waxell_workers.starlette.WaxellMiddleware(None)\n"
        "assert collector.configured() is None and threading.active_count() == 1\n"
    )
    environ = {"WAXELL_API_URL": "http://127.0.0.1:9", "WAXELL_SPOOL_DIR": str(tmp_path / "spool")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**environ, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "spool").exists()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_either_event_loop(configure, records, flushes, backend):
    """asyncio and trio alike, as Starlette has it."""
    if backend == "trio":
        pytest.importorskip("trio")
    configure(flush="task")
    app = application(lambda request: PlainTextResponse("ok", background=BackgroundTask(tell_async)), OURS)
    with TestClient(app, backend=backend) as client:
        assert client.get("/").text == "ok"
    assert [end.state for end in records(RunEnded)] == ["success"]
    assert len(flushes) >= 1


def test_the_response_is_the_same(records):
    """What the client gets is, byte by byte, what it gets without us."""

    async def endpoint(request):
        background = BackgroundTask(lambda: None)
        return PlainTextResponse("answer", headers={"X-Own": "1"}, background=background)

    with_us = asyncio.run(serve(application(endpoint, OURS)))
    without = asyncio.run(serve(application(endpoint)))
    assert with_us == without
