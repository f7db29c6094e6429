"""What a confidential task does: ask a model, and end in every way that quotes something.

The marks that must not be found anywhere are in `MARKS` of `tests/faults/test_secrets.py`; here they are put
together, so that this file itself holds none, but for the line of source that a traceback would quote.
"""

import os
from functools import cache

from openai import BadRequestError, OpenAI

from waxell_workers import redact_texts

LONG = "this text is within what may be kept. " * 6
"""More than the 200 characters of a message that are kept."""


def mark(name: str) -> str:
    """Return a mark."""
    return f"q7x{name}x7q"


@cache
def client() -> OpenAI:
    """Return this process's client."""
    return OpenAI(api_key=mark("openaikey"), max_retries=0)


def ask(question: str, model: str) -> str:
    """Ask the model one thing."""
    answer = client().chat.completions.create(model=model, messages=[{"role": "user", "content": question}])
    return answer.choices[0].message.content or ""


def handle(how: str, ticket: str, *, customer: str) -> str:
    """Ask the model about a ticket, and end as `how` says."""
    local = f"{mark('local')} {ticket} {customer}"
    answer = ask(f"{mark('prompt')} {local}", how)
    if how == "long":
        raise ValueError(LONG, mark("deep"))  # q7xsourcex7q
    if how == "object":
        raise KeyError({"customer": mark("object")}, [mark("object")])
    if how == "encoding":
        f"{mark('document')} é".encode("ascii")
    return f"{mark('result')} {answer}"


def refused(how: str, ticket: str, *, customer: str) -> str:
    """Have the provider refuse the prompt, in a message that quotes it, and hand that on as `how` says."""
    try:
        return ask(f"{mark('prompt')} {ticket} {customer}", "refused")
    except BadRequestError as error:
        if how == "wrapped":
            raise RuntimeError(f"triage failed: {error}") from error
        if how == "repr":
            raise RuntimeError(f"triage failed: {error!r}") from None
        if how == "cut":
            raise RuntimeError(f"triage failed: {str(error)[:150]}")  # noqa: B904  it is the context that tells
        raise


def end(how: str, ticket: str, customer: str) -> str:
    """Do one task."""
    act = refused if how in ("provider", "wrapped", "repr", "cut") else handle
    return act(how, ticket, customer=customer)


ENDS = ("good", "long", "object", "encoding", "provider", "wrapped", "repr", "cut")
REDACTORS = {
    "": None,
    "good": redact_texts(lambda text: text.replace("q7x", "[gone]")),
    "raises": redact_texts(lambda text: 1 / 0),
    "rubbish": redact_texts(lambda text: {"a": text}),
    "raises at records": lambda record: 1 / 0,
    "nothing": lambda record: None,
}
REDACT = REDACTORS[os.environ.get("CONFIDENTIAL_REDACT", "")]
