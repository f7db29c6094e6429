"""Support tickets, read by a model after the answer: one line records every background task with its calls.

Run it:  uvicorn app:app        (README.md has the rest)
"""

import os
from functools import cache
from typing import Annotated

from fastapi import BackgroundTasks, Body, FastAPI
from openai import AsyncOpenAI, OpenAI
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse, Response

from waxell_workers import observe, options
from waxell_workers.fastapi import WaxellMiddleware

app = FastAPI(title="Support desk")
app.add_middleware(WaxellMiddleware)  # records every background task of this app

MODEL = os.environ.get("OPENAI_MODEL", "gpt-4o-mini")
API_KEY = os.environ.get("OPENAI_API_KEY", "unset")
Ticket = Annotated[str, Body(embed=True)]


@cache
def client() -> OpenAI:
    """Return this process's client."""
    return OpenAI(api_key=API_KEY)


@cache
def async_client() -> AsyncOpenAI:
    """Return this process's client for coroutines."""
    return AsyncOpenAI(api_key=API_KEY)


def ask(question: str, model: str = MODEL) -> str:
    """Ask the model one thing."""
    answer = client().chat.completions.create(model=model, messages=[{"role": "user", "content": question}])
    return answer.choices[0].message.content or ""


async def ask_async(question: str, model: str = MODEL) -> str:
    """Ask the model one thing, and let others work meanwhile."""
    answer = await async_client().chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}]
    )
    return answer.choices[0].message.content or ""


@app.post("/tickets", status_code=202)
@observe(workflow_name="support desk")
async def receive_ticket(ticket: Ticket, background_tasks: BackgroundTasks) -> dict[str, str]:
    """Answer at once; what the desk does with the ticket comes later, as children of this call's run."""
    background_tasks.add_task(triage, ticket, background_tasks)
    background_tasks.add_task(update_crm, ticket)
    background_tasks.add_task(escalate, ticket)
    return {"ticket": "received"}


@app.post("/translations", status_code=202)
def request_translation(ticket: Ticket, language: Annotated[str, Body()]) -> Response:
    """The same with a sync endpoint, and the one task as an argument of the response."""
    task = BackgroundTask(translate, ticket, language)
    return JSONResponse({"translation": "requested"}, 202, background=task)


async def triage(ticket: str, background_tasks: BackgroundTasks) -> None:
    """Sort a ticket into a queue of the support desk; a summary follows."""
    queue = await ask_async(f"Which queue: billing, login or other? {ticket}")
    background_tasks.add_task(summarise, ticket, queue)


async def summarise(ticket: str, queue: str) -> str:
    """Write the line that the support desk reads."""
    return await ask_async(f"Summarise for the {queue} queue: {ticket}")


def update_crm(ticket: str) -> str:
    """Note a ticket in the CRM, whose client is sync: Starlette runs this in a thread."""
    return ask(f"Write a CRM note: {ticket}")


@options(flush="task")
async def escalate(ticket: str) -> str:
    """Wake somebody up: the request ends, long after its answer, only when this is delivered."""
    return await ask_async(f"Is this an emergency? {ticket}")


def translate(ticket: str, language: str) -> str:
    """Translate a ticket; fails for a language that the desk does not have."""
    detected = ask(f"In which language is this? {ticket}")
    if language not in ("de", "en", "fr"):
        raise ValueError(f"no desk for {language}; the ticket is in {detected[:20]!r}")
    return ask(f"Translate into {language}: {ticket}")
