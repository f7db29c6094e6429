"""What can happen to a background task, one task each. The tests run them: `uvicorn scenarios:app`.

A scenario makes one call, to a model that is called `marker`, so that the call can be found again at the
server; then it ends as its name says. What it notes as a witness goes to a file of the test's, by a road of
its own. Change one, and it is a bug report.

`POST /scenarios/{name}` with `{"arguments": […]}` answers 202 at once. Some tasks are coroutines, some are
functions; some endpoints are sync.
"""

import asyncio
import itertools
import os
import signal
from typing import Annotated, Any

import app as desk
from fastapi import BackgroundTasks, Body, HTTPException
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from waxell_workers import options
from waxell_workers.testing.conformance import witness

QUESTION = "Say yes."
Arguments = Annotated[list[Any], Body(embed=True)]
turns = itertools.count()


def call(marker: str) -> str:
    """Call the model; note the beginning and the end of what a task does."""
    witness.note("began", marker)
    answer = desk.ask(QUESTION, model=marker)
    witness.note("body", marker)
    return answer


async def call_async(marker: str) -> str:
    """The same, in a coroutine."""
    witness.note("began", marker)
    answer = await desk.ask_async(QUESTION, model=marker)
    witness.note("body", marker)
    return answer


# -- tasks -------------------------------------------------------------------------------------


def ask(marker: str) -> None:
    """Call the model, and succeed."""
    call(marker)


async def async_ask(marker: str) -> None:
    """The same, in a coroutine; every other `ask` is one."""
    await call_async(marker)


async def ask_then_sleep(marker: str, seconds: float) -> None:
    """Call the model, then be slow: for stops in mid-task."""
    await call_async(marker)
    await asyncio.sleep(seconds)


def ask_then_die(marker: str) -> None:
    """Call the model, then die as the kernel's memory killer would have it: nothing runs after it."""
    call(marker)
    os.kill(os.getpid(), signal.SIGKILL)


def fail(marker: str) -> None:
    """Call the model, then fail."""
    answer = call(marker)
    raise ValueError(f"the answer has {len(answer)} characters")


async def control(marker: str, name: str) -> None:
    """Call the model, then leave by an exception that Starlette or asyncio gives a meaning."""
    await call_async(marker)
    raise {
        "HTTPException": HTTPException(418, "too late for an answer"),
        "CancelledError": asyncio.CancelledError("not today"),
    }[name]


def look_then_ask(marker: str) -> None:
    """Note how many runs have ended at the server, then call the model."""
    witness.note("saw", witness.runs_ended_at_server())
    call(marker)


@options(flush="task")
async def look_then_ask_and_flush(marker: str) -> None:
    """The same, in a coroutine; its records are at the server before the request ends."""
    witness.note("saw", witness.runs_ended_at_server())
    await call_async(marker)


def enqueue(marker: str, child_marker: str, background_tasks: BackgroundTasks) -> None:
    """Call the model, then add another task to the same request."""
    call(marker)
    background_tasks.add_task(ask, child_marker)


def enqueue_for(marker: str, child_marker: str, background_tasks: BackgroundTasks) -> None:
    """The same, on behalf of somebody."""
    call(marker)
    with witness.on_behalf(marker):
        background_tasks.add_task(ask, child_marker)


# -- the app -----------------------------------------------------------------------------------


@desk.app.post("/scenarios/ask", status_code=202)
async def post_ask(arguments: Arguments, background_tasks: BackgroundTasks) -> None:
    """Add a function and a coroutine in turns."""
    background_tasks.add_task(ask if next(turns) % 2 else async_ask, *arguments)


@desk.app.post("/scenarios/enqueue", status_code=202)
def post_enqueue(arguments: Arguments, background_tasks: BackgroundTasks) -> None:
    """Add a task that adds another, in a sync endpoint."""
    background_tasks.add_task(enqueue, *arguments, background_tasks)


@desk.app.post("/scenarios/enqueue_for", status_code=202)
def post_enqueue_for(arguments: Arguments, background_tasks: BackgroundTasks) -> None:
    """The same, on behalf of somebody."""
    background_tasks.add_task(enqueue_for, *arguments, background_tasks)


@desk.app.post("/scenarios/{name}")
def post(name: str, arguments: Arguments) -> Response:
    """Give the task to the response, in a sync endpoint."""
    tasks = (ask_then_sleep, ask_then_die, fail, control, look_then_ask, look_then_ask_and_flush)
    task = {task.__name__: task for task in tasks}[name]
    return JSONResponse(None, 202, background=BackgroundTask(task, *arguments))


class Witnessed:
    """Notes, outside of everything else, when a request's call has begun, and how it has come back."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        handle = dict(scope["headers"]).get(b"x-handle", b"").decode()
        witness.note("arrived", handle)
        outcome = "returned"
        try:
            await self.app(scope, receive, send)
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
            raise
        finally:
            witness.note("outcome", f"{handle} {outcome}")
            witness.note("returned", handle)


app = Witnessed(desk.app)
