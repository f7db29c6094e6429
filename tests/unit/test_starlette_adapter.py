"""The Starlette adapter in one process: real apps, called by Starlette's own test client.

Real servers are in `tests/acceptance`.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import multiprocessing
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread
import pytest
from fastapi import APIRouter, FastAPI
from fastapi import BackgroundTasks as InjectedTasks
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient

import waxell_workers.fastapi
from tests.harness import await_
from waxell_workers import WaxellContext, get_context, observe, options
from waxell_workers import starlette as adapter
from waxell_workers.core import collector as collecting
from waxell_workers.core import lineage, w3c
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


class Plain(BaseHTTPMiddleware):
    """A user's own middleware of the usual kind."""

    async def dispatch(self, request, call_next):
        return await call_next(request)


BASE = Middleware(Plain)
GZIP = Middleware(GZipMiddleware, minimum_size=1)


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
    """The client's trace id is the run's, else a new one; a client is no run, and so no parent."""

    async def endpoint(request):
        return PlainTextResponse("ok", background=BackgroundTask(tell))

    call(application(endpoint, OURS), traceparent=header)
    [run] = records(RunStarted)
    assert run.trace_id == trace if trace else w3c.is_trace_id(run.trace_id)
    assert run.parent_run_id == ""


def test_all_that_begins_in_a_request_is_one_trace(records):
    """A block in the endpoint, a message outside it, a background task: each request's are of one trace."""

    async def endpoint(request):
        with WaxellContext("block"):
            inside = enqueue()
        return PlainTextResponse(
            f"{inside[lineage.HEADER]['trace']} {enqueue()[lineage.HEADER]['trace']}",
            background=BackgroundTask(tell),
        )

    app = application(endpoint, OURS)
    traces = [set(call(app).text.split()) for _ in range(2)]
    assert [len(of_request) for of_request in traces] == [1, 1]
    assert traces[0] != traces[1]
    runs = records(RunStarted)
    assert [run.agent_name for run in runs] == ["block", "GET /", "tell"] * 2
    assert [run.trace_id for run in runs] == [trace for (trace,) in traces for _ in range(3)]
    with WaxellContext("outside") as run:
        pass
    assert {run.trace_id} not in traces


# -- requests that enqueue ---------------------------------------------------------------------


def enqueue(**headers):
    """Do what each adapter does as a message is enqueued, and return what the message carries."""
    return lineage.outgoing(headers)


def parent_of(message):
    return message[lineage.HEADER].get("run", "")


@pytest.mark.parametrize("framework", [Starlette, FastAPI])
@pytest.mark.parametrize("endpoint", ["sync", "async"])
def test_a_request_that_enqueues_is_a_run(records, endpoint, framework):
    """The first message makes the request a run, which all its messages have as their parent."""
    messages = []

    def sync(request):
        messages.extend((enqueue(), enqueue()))
        assert get_context() is None
        waxell_workers.record_llm_call(model="in the endpoint")
        return PlainTextResponse("ok")

    async def asynchronous(request):
        return sync(request)

    call(application(sync if endpoint == "sync" else asynchronous, OURS, framework=framework))
    [run], [end] = records(RunStarted), records(RunEnded)
    name = framework.__name__.lower()
    assert (run.agent_name, run.workflow_name, run.task_id) == ("GET /", name, "")
    assert (run.parent_run_id, run.root_run_id, run.metadata) == ("", run.run_id, {"framework": name})
    assert (end.run_id, end.state, end.reason) == (run.run_id, "success", "")
    assert [parent_of(message) for message in messages] == [run.run_id] * 2
    assert messages[0][lineage.HEADER]["root"] == run.run_id
    assert messages[0][lineage.HEADER]["trace"] == run.trace_id
    assert messages[0]["traceparent"] == f"00-{run.trace_id}-{run.run_id[:16]}-01"
    assert "metadata" not in messages[0][lineage.HEADER]
    assert [said.run_id for said in records(LLMCall)] == [""], "the request's run is never the current one"
    assert lineage.origin.get() is None


def test_a_request_that_enqueues_nothing_leaves_nothing(records, tmp_path):
    """Neither a run nor a record, with background tasks or without."""
    call(application(lambda request: PlainTextResponse("ok"), OURS))
    assert records(object) == []
    call(application(lambda request: PlainTextResponse("ok", background=BackgroundTask(len, ())), OURS))
    assert [run.agent_name for run in records(RunStarted)] == ["len"]


def test_the_run_has_begun_with_the_request(records):
    """However late the message: start and duration are the request's, up to the app's return."""

    async def endpoint(request):
        await anyio.sleep(0.05)
        enqueue()
        await anyio.sleep(0.05)
        return PlainTextResponse("ok")

    before = time.time()
    call(application(endpoint, OURS))
    [run], [end] = records(RunStarted), records(RunEnded)
    assert before - 0.001 <= run.at <= end.at - 0.1 + 0.001
    assert end.duration_ms >= 100
    assert end.at - run.at == pytest.approx(end.duration_ms / 1000, abs=0.02)


def test_threads_of_one_request_make_one_run(records, monkeypatch):
    """Threads that come for the run at once: one is written, and the others have it whole before it is."""
    found = []
    together = threading.Barrier(8)
    name, start = adapter._request_name, adapter._RequestRun.start

    def name_together(scope):
        together.wait(10)
        return name(scope)

    def start_last(run, ago_s):
        await_(lambda: len(found) == 7, "the other threads", 10)
        start(run, ago_s)

    monkeypatch.setattr(adapter, "_request_name", name_together)
    monkeypatch.setattr(adapter._RequestRun, "start", start_last)

    def endpoint(request):
        def work():
            found.append(enqueue())

        threads = [threading.Thread(target=contextvars.copy_context().run, args=(work,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return PlainTextResponse("ok")

    call(application(endpoint, OURS))
    [run], [end] = records(RunStarted), records(RunEnded)
    assert end.run_id == run.run_id
    assert {parent_of(message) for message in found} == {run.run_id}
    assert {message[lineage.HEADER]["trace"] for message in found} == {run.trace_id}


def answering(status):
    return lambda request: (enqueue(), PlainTextResponse("ok", status))[1]


def raising(error):
    def endpoint(request):
        enqueue()
        raise error

    return endpoint


@pytest.mark.parametrize(
    ("endpoint", "state", "reason", "kind"),
    [
        (answering(201), "success", "", ""),
        (answering(404), "success", "", ""),
        (answering(503), "error", "answered 503", ""),
        (raising(HTTPException(502)), "error", "answered 502", ""),
        (raising(HTTPException(409)), "success", "", ""),
        (raising(ValueError("no")), "error", "", "ValueError"),
        (raising(ClientDisconnect()), "interrupted", "interrupted: the client has gone", "ClientDisconnect"),
    ],
    ids=["created", "not found", "unavailable", "raised 502", "raised 409", "unhandled", "client gone"],
)
def test_how_a_request_ends(records, endpoint, state, reason, kind):
    """An unhandled exception and an answer of 500 or above are errors; what is the client's fault is none."""
    client = TestClient(application(endpoint, OURS), raise_server_exceptions=False)
    client.get("/")
    [end] = records(RunEnded)
    assert (end.state, end.reason, end.error_type.rpartition(".")[2]) == (state, reason, kind)


def test_a_cancelled_request_is_interrupted(records):
    """A server that cancels the app's call: the run ends there, and the cancellation goes on."""

    async def endpoint(request):
        enqueue()
        await asyncio.sleep(60)

    async def cancel():
        request = asyncio.create_task(serve(application(endpoint, OURS)))
        while not records(RunStarted):
            await asyncio.sleep(0.01)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(cancel())
    [end] = records(RunEnded)
    assert (end.state, end.reason) == ("interrupted", "interrupted: the request was cancelled")


def secret_id(request):
    enqueue()
    return PlainTextResponse("ok")


def mounted(path, *routes):
    return Starlette(routes=[Mount(path, routes=[*routes])], middleware=[OURS])


def fastapi_with_routers():
    """A router in a router in an app, as FastAPI joins them: 0.165 only as a request comes."""
    inner, outer, app = APIRouter(prefix="/tickets"), APIRouter(prefix="/{tenant}"), FastAPI()
    inner.add_api_route("/{number}", lambda number: len([enqueue()]))
    outer.include_router(inner)
    app.include_router(outer, prefix="/v1")
    app.add_middleware(WaxellMiddleware)
    return app


def fastapi_mounted():
    app, inner = FastAPI(), FastAPI()
    inner.add_api_route("/tickets/{number}", lambda number: len([enqueue()]))
    app.mount("/tenants/{tenant}", inner)
    app.add_middleware(WaxellMiddleware)
    return app


@pytest.mark.parametrize(
    ("app", "path", "name"),
    [
        (Starlette(routes=[Route("/t/{id:int}", secret_id)], middleware=[OURS]), "/t/42", "GET /t/{id}"),
        (mounted("/api", Route("/t/{id}", secret_id)), "/api/t/s3cret", "GET /api/t/{id}"),
        (
            mounted("/of/{user}", Mount("/x", routes=[Route("/t/{id}", secret_id)])),
            "/of/s3cret/x/t/42",
            "GET /of/{user}/x/t/{id}",
        ),
        (
            mounted("/a", Route("/{one}", secret_id), Route("/{one}/{two}", secret_id)),
            "/a/s3cret/42",
            "GET /a/{one}/{two}",
        ),
        (fastapi_with_routers(), "/v1/s3cret/tickets/42", "GET /v1/{tenant}/tickets/{number}"),
        (fastapi_mounted(), "/tenants/s3cret/tickets/42", "GET /tenants/{tenant}/tickets/{number}"),
    ],
)
def test_a_request_is_named_by_its_route(records, app, path, name):
    """The template of the whole route, in whatever mounts and routers; nothing that a client has sent."""
    assert TestClient(app).get(path).status_code == 200
    [run] = records(RunStarted)
    assert run.agent_name == name


class Enqueues:
    """A user's own middleware that enqueues: before there is a route, and whatever the method."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            enqueue()
        await self.app(scope, receive, send)


@pytest.mark.parametrize(("method", "name"), [("POST", "POST"), ("S3CRET", "HTTP")])
def test_where_no_route_is_known_the_method_is_the_name(records, method, name):
    """In other middleware: never the raw path, nor a method of the client's own making."""
    app = application(secret_id, OURS, Middleware(Enqueues))
    TestClient(app).request(method, "/s3cret")
    [run] = records(RunStarted)
    assert run.agent_name == name


def test_a_proxy_s_prefix_is_no_part_of_the_name(records):
    """`root_path` of the server: where a proxy has put the app is no mount of the app's."""
    app = mounted("/api", Route("/t/{id}", secret_id))
    assert TestClient(app, root_path="/proxy").get("/proxy/api/t/42").status_code == 200
    assert [run.agent_name for run in records(RunStarted)] == ["GET /api/t/{id}"]


@pytest.mark.parametrize("middleware", [[OURS, BASE], [BASE, OURS], [OURS, GZIP], [OURS, BASE, OURS]])
def test_a_request_is_one_run_beside_other_middleware(records, middleware):
    """Whoever stands above or below, and hands the endpoint to a task of its own."""
    seen = []

    async def endpoint(request):
        seen.append(enqueue())
        return PlainTextResponse("ok")

    call(application(endpoint, *middleware))
    [run], [end] = records(RunStarted), records(RunEnded)
    assert (run.agent_name, parent_of(seen[0]), end.state) == ("GET /", run.run_id, "success")


def test_a_stream_that_enqueues(records):
    """The body of a streaming response is part of the request, in a thread as on the loop."""
    seen = []

    def body():
        yield "one"
        seen.append(enqueue())

    async def body_async():
        yield "two"
        seen.append(enqueue())

    for content in (body, body_async):
        call(application(lambda request, content=content: StreamingResponse(content()), OURS))
    assert [parent_of(message) for message in seen] == [run.run_id for run in records(RunStarted)]
    assert [end.state for end in records(RunEnded)] == ["success", "success"]


@pytest.mark.parametrize("is_observed", [True, False])
def test_a_run_in_the_endpoint_is_the_parent_instead(records, is_observed):
    """What is enqueued in a run of the user's is that run's; the request is none then."""
    messages = []

    @observe(agent_name="own")
    def observed():
        messages.append(enqueue())

    async def endpoint(request):
        if is_observed:
            observed()
        else:
            with WaxellContext("own", session_id="s-1"):
                messages.append(enqueue())
        return PlainTextResponse("ok")

    call(application(endpoint, OURS))
    [run] = records(RunStarted)
    assert (run.agent_name, parent_of(messages[0])) == ("own", run.run_id)


def test_a_request_is_in_its_client_s_trace(records):
    """`traceparent` and `tracestate`, in parts too, go from the client through the request to the message."""
    messages = []

    async def endpoint(request):
        messages.append(enqueue())
        return PlainTextResponse("ok", background=BackgroundTask(tell))

    headers = [("traceparent", f"00-{TRACE}-{'1' * 16}-00"), ("tracestate", "a=1"), ("tracestate", "b=2")]
    sent = [(name.encode(), value.encode()) for name, value in headers]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": sent, "query_string": b""}
    asyncio.run(serve(application(endpoint, OURS), scope))
    request, task = records(RunStarted)
    assert (request.trace_id, request.parent_run_id) == (TRACE, "")
    assert messages[0]["traceparent"] == f"00-{TRACE}-{request.run_id[:16]}-00"
    assert messages[0]["tracestate"] == "a=1,b=2"
    assert (task.parent_run_id, task.root_run_id, task.trace_id) == (request.run_id, request.run_id, TRACE)


@pytest.mark.parametrize("endpoint", ["sync", "async"])
def test_a_request_is_in_opentelemetry_s_trace(records, endpoint):
    """Somebody's own instrumentation has a span around the request: the message carries that span."""
    tracer = pytest.importorskip("opentelemetry.sdk.trace").TracerProvider().get_tracer("server's")
    messages, spans = [], []

    class Traced:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            with tracer.start_as_current_span("request") as span:
                spans.append(span.get_span_context())
                await self.app(scope, receive, send)

    def sync(request):
        messages.append(enqueue())
        return PlainTextResponse("ok")

    async def asynchronous(request):
        return sync(request)

    call(application(sync if endpoint == "sync" else asynchronous, Middleware(Traced), OURS))
    [run], [span], [message] = records(RunStarted), spans, messages
    assert run.trace_id == message[lineage.HEADER]["trace"] == f"{span.trace_id:032x}"
    assert message["traceparent"] == f"00-{run.trace_id}-{span.span_id:016x}-{span.trace_flags:02x}"


@pytest.mark.parametrize("endpoint", ["sync", "async"])
@pytest.mark.parametrize("enqueues", ["before", "after"])
def test_a_request_that_enqueues_is_its_tasks_parent(records, endpoint, enqueues):
    """Whether the message or the task comes first; and the request's run ends after its tasks."""
    messages = []

    def answer():
        tasks = BackgroundTasks()
        if enqueues == "before":
            enqueue()
        tasks.add_task(tell)
        tasks.add_task(lambda: messages.append(enqueue()))
        if enqueues == "after":
            enqueue()
        return PlainTextResponse("ok", background=tasks)

    async def asynchronous(request):
        return answer()

    call(application((lambda request: answer()) if endpoint == "sync" else asynchronous, OURS))
    request, *tasks = records(RunStarted)
    assert request.agent_name == "GET /"
    assert [task.parent_run_id for task in tasks] == [request.run_id] * 2
    assert [task.trace_id for task in tasks] == [request.trace_id] * 2
    assert all(task.metadata["wait_s"] >= 0 for task in tasks)
    assert parent_of(messages[0]) == tasks[1].run_id
    assert [end.run_id for end in records(RunEnded)] == [tasks[0].run_id, tasks[1].run_id, request.run_id]


def test_a_task_that_enqueues_makes_no_run_of_its_request(records):
    """The message is the task's own; the task after it has no parent, as ever."""
    messages = []

    async def endpoint(request):
        tasks = BackgroundTasks()
        tasks.add_task(lambda: messages.append(enqueue()))
        tasks.add_task(tell)
        return PlainTextResponse("ok", background=tasks)

    call(application(endpoint, OURS))
    first, second = records(RunStarted)
    assert (parent_of(messages[0]), second.parent_run_id) == (first.run_id, "")


def test_what_an_endpoint_leaves_running_is_its_request_s(records):
    """A task of asyncio's that enqueues after the answer: the request's run begins late, and has ended."""
    messages = []

    async def main():
        answered, left = asyncio.Event(), []

        async def later():
            await answered.wait()
            messages.append(enqueue())
            messages.append(enqueue())

        async def endpoint(request):
            left.append(asyncio.create_task(later()))
            return PlainTextResponse("ok", 500)

        await serve(application(endpoint, OURS))
        assert records(RunStarted) == []
        answered.set()
        await left[0]

    asyncio.run(main())
    [run], [end] = records(RunStarted), records(RunEnded)
    assert [parent_of(message) for message in messages] == [run.run_id] * 2
    assert (end.run_id, end.state, end.reason) == (run.run_id, "error", "answered 500")
    assert collecting.current().open_runs == {}


@pytest.mark.parametrize("is_run", [False, True])
def test_what_an_endpoint_forks_begins_no_run_of_its_request(records, is_run):
    """A pool's process may live for days, and would end nothing; what has begun it may name."""
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()

    def endpoint(request):
        if is_run:
            enqueue()
        process = context.Process(target=lambda: told.put(parent_of(enqueue())))
        process.start()
        process.join()
        return PlainTextResponse("ok")

    call(application(endpoint, OURS))
    assert [told.get()] == ([run.run_id for run in records(RunStarted)] or [""])
    assert len(records(RunStarted)) == len(records(RunEnded)) == is_run


def test_a_request_inside_another_has_a_run_of_its_own(records):
    """An app that is called in-process by another's endpoint; what comes after is the outer one's again."""
    messages = []

    async def inner(request):
        messages.append(enqueue())
        return PlainTextResponse("ok")

    async def outer(request):
        await serve(application(inner, OURS, framework=FastAPI))
        messages.append(enqueue())
        return PlainTextResponse("ok")

    call(application(outer, OURS))
    runs = {run.workflow_name: run.run_id for run in records(RunStarted)}
    assert [parent_of(message) for message in messages] == [runs["fastapi"], runs["starlette"]]


@pytest.mark.parametrize(
    "settings",
    [{"exclude": ("GET /*",)}, {"observe": False}, {"api_url": ""}, {"propagate": "none"}],
    ids=lambda settings: next(iter(settings)),
)
def test_requests_that_are_no_runs(configure, records, settings):
    """Excluded by name, switched off, not configured, or not to be connected: no record, no parent."""
    configure(**settings)
    messages = []

    async def endpoint(request):
        messages.append(enqueue())
        return PlainTextResponse("ok")

    assert call(application(endpoint, OURS)).text == "ok"
    assert records(object) == []
    assert collecting.current().journal.dropped == {}
    assert "run" not in messages[0].get(lineage.HEADER, {})
    assert ("waxell" in messages[0]) == (settings != {"observe": False})


def test_a_request_that_is_linked(configure, records):
    """`propagate="link"`: the message names the request's run, and belongs to a trace of its own."""
    configure(propagate="link")
    messages = []

    async def endpoint(request):
        messages.append(enqueue())
        return PlainTextResponse("ok")

    call(application(endpoint, OURS))
    [run] = records(RunStarted)
    assert (parent_of(messages[0]), messages[0][lineage.HEADER]["mode"]) == (run.run_id, "link")
    assert "traceparent" not in messages[0]


def test_celery_s_and_dramatiq_s_messages(records):
    """Real frameworks with brokers in memory, from a sync endpoint: both messages are of the one request."""
    celery = pytest.importorskip("celery")
    dramatiq = pytest.importorskip("dramatiq")
    stub = pytest.importorskip("dramatiq.brokers.stub")
    import waxell_workers.celery
    import waxell_workers.dramatiq

    broker = stub.StubBroker(middleware=[waxell_workers.dramatiq.WaxellMiddleware()])
    actor = dramatiq.actor(tell, broker=broker)
    task = celery.Celery(broker="memory://", set_as_current=False).task(tell)
    sent = []

    def publish(headers=None, **_):
        sent.append(dict(headers))

    def endpoint(request):
        task.delay()
        sent.append(actor.send().options)
        return PlainTextResponse("ok")

    celery.signals.before_task_publish.connect(publish)
    try:
        call(application(endpoint, OURS))
    finally:
        celery.signals.before_task_publish.disconnect(publish)
    [run] = records(RunStarted)
    assert [parent_of(message) for message in sent] == [run.run_id] * 2


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
