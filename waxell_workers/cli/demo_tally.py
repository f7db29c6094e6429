"""What really happened in the demo, counted in Valkey by the tasks themselves.

This is the other side of the comparison, so nothing of waxell-workers has a hand in it: a task notes the
start of each attempt and each answer of the model with its own Redis client, the moment it has it. What a
SIGKILL then does to the process changes nothing about what is noted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from redis import Redis

_ATTEMPTS = "tally:attempts"
_CALLS = "tally:calls"
_TASKS = "tally:tasks"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of one task."""

    task_id: str
    number: int
    """1 for the first."""
    framework: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """One answer of a model, in the attempt that asked for it."""

    attempt: Attempt
    model: str
    response_id: str
    """Empty where the API gives no id (embeddings)."""


class Tally:
    """The demo's own account of attempts, calls and the ends of tasks."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    @property
    def connection(self) -> Redis:
        """Where it is kept; RQ's own account is there too."""
        return self._client

    def attempt_started(self, attempt: Attempt) -> None:
        """Note the start of an attempt; a second start of the same one counts again."""
        self._client.rpush(_ATTEMPTS, msgspec.json.encode(attempt))

    def call_returned(self, call: Call) -> None:
        """Note a model's answer."""
        self._client.rpush(_CALLS, msgspec.json.encode(call))

    def task_ended(self, task_id: str, state: str, framework: str) -> None:
        """Note that a task will not be attempted again; the first note counts."""
        self._client.hsetnx(f"{_TASKS}:{framework}", task_id, state)

    def attempts(self) -> list[Attempt]:
        """Return every start of an attempt."""
        lines: list[bytes] = self._client.lrange(_ATTEMPTS, 0, -1)  # type: ignore[assignment]  # no decoding
        return [msgspec.json.decode(line, type=Attempt) for line in lines]

    def calls(self) -> list[Call]:
        """Return every answer of a model."""
        lines: list[bytes] = self._client.lrange(_CALLS, 0, -1)  # type: ignore[assignment]  # no decoding
        return [msgspec.json.decode(line, type=Call) for line in lines]

    def ended(self, framework: str) -> int:
        """Return how many of a framework's tasks have ended."""
        ended: int = self._client.hlen(f"{_TASKS}:{framework}")
        return ended


@contextmanager
def connect(socket_path: str) -> Iterator[Tally]:
    """Open the tally in the Valkey that listens at a Unix socket."""
    from redis import Redis

    client = Redis(unix_socket_path=socket_path, socket_timeout=5.0)
    try:
        yield Tally(client)
    finally:
        client.close()
