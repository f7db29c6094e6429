"""The tasks of the comparison, the same for every tracer: `TRACER=openai_agents celery -A scenarios worker`.

A tracer is a module here, `with_<name>.py`, with two context managers: `trace(name)` around what a task does,
`call(model)` around its call. Each call is to a model that is called `marker`, by which it is found again.
"""

import os
import signal
import time
from functools import cache
from importlib import import_module

from celery import Celery
from openai import OpenAI

tracer = import_module(f"with_{os.environ['TRACER']}")

app = Celery("losses", broker=os.environ["BROKER_URL"])
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True


@cache
def client() -> OpenAI:
    """Return this process's client. Made after the fork: connections must not be shared by pool processes."""
    return OpenAI()


def ask_model(marker: str) -> None:
    """Call the model, and say so: the comparison makes sure that there was a call to lose."""
    with tracer.call(marker):
        client().chat.completions.create(model=marker, messages=[{"role": "user", "content": "Say yes."}])
    print(f"called {marker}")


@app.task
def ask(marker: str) -> None:
    """Call the model, and succeed."""
    with tracer.trace("ask"):
        ask_model(marker)


@app.task
def ask_then_sleep(marker: str, seconds: float) -> None:
    """Call the model, then be slow, until the hard time limit."""
    with tracer.trace("ask_then_sleep"):
        ask_model(marker)
        time.sleep(seconds)


@app.task
def ask_then_die(marker: str) -> None:
    """Call the model, then die as the kernel's memory killer would have it: nothing runs after it."""
    with tracer.trace("ask_then_die"):
        ask_model(marker)
        os.kill(os.getpid(), signal.SIGKILL)
