"""What the demo's three apps share: the support desk's tickets, the model, and the tally of what they did.

An app says before each attempt that it begins and after each answer that it has come, by Redis and by nothing
of waxell-workers.
"""

from __future__ import annotations

import os
from functools import cache

from openai import OpenAI
from redis import Redis

from .demo_tally import Attempt, Call, Tally

VALKEY_SOCKET = os.environ.get("DEMO_VALKEY_SOCKET", "")
VALKEY_URL = f"unix://{VALKEY_SOCKET}"
MODEL = os.environ.get("DEMO_MODEL", "gpt-4o-mini")
EMBEDDING_MODEL = os.environ.get("DEMO_EMBEDDING_MODEL", "text-embedding-3-small")
HANG_S = 60.0
"""How long a task hangs that a time limit is to end: much longer than the limit."""

TICKETS = (
    "I was charged twice for November.",
    "The link in the password mail has expired.",
    "My parcel is at a neighbour whom I do not know.",
    "Please cancel the second licence, not the first.",
    "The export has been at 99 % since this morning.",
    "Your invoice names a company that I left years ago.",
    "After the update the app asks for a code that never comes.",
)


@cache
def tally() -> Tally:
    """Return this process's tally (redis-py reconnects after a fork)."""
    return Tally(Redis(unix_socket_path=VALKEY_SOCKET, socket_timeout=5.0))


@cache
def client() -> OpenAI:
    """Return this process's client; only processes that execute tasks ask for it."""
    return OpenAI(max_retries=0, timeout=20.0)


def ask(attempt: Attempt, question: str) -> str:
    """Ask the model, and note that it has answered."""
    answer = client().chat.completions.create(model=MODEL, messages=[{"role": "user", "content": question}])
    tally().call_returned(Call(attempt, MODEL, answer.id))
    return answer.choices[0].message.content or ""


def embed(attempt: Attempt, text: str) -> list[float]:
    """Have the model embed a text, and note that it has answered."""
    answer = client().embeddings.create(model=EMBEDDING_MODEL, input=text)
    tally().call_returned(Call(attempt, EMBEDDING_MODEL, ""))
    return answer.data[0].embedding


def ticket(number: int) -> str:
    """Return a ticket."""
    return TICKETS[number % len(TICKETS)]
