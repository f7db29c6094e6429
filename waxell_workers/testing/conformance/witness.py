"""What a scenario notes by itself, by a road that shares nothing with the journal.

`scenarios.py` of an application imports this; each note is one line in the file that `WITNESS` names, in one
`write`, so that it is there whatever happens to the process next.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from waxell_workers import WaxellContext


class Note(NamedTuple):
    """Something that a task did."""

    event: str
    at: float
    """Unix time in seconds."""
    marker: str


def note(event: str, marker: object) -> None:
    """Note that something has happened in the task with this marker."""
    path = os.environ.get("WITNESS")
    if not path:
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, f"{event} {time.time():.6f} {marker}\n".encode())
    finally:
        os.close(descriptor)


def notes(path: Path, event: str) -> list[Note]:
    """Return what was noted with this event, in order."""
    if not path.exists():
        return []
    lines = (line.split(" ", 2) for line in path.read_text().splitlines())
    return [Note(name, float(at), marker) for name, at, marker in lines if name == event]


@contextmanager
def on_behalf(marker: str) -> Iterator[None]:
    """Be in a context in which it is known for whom is worked."""
    context = WaxellContext(
        "on behalf", session_id=f"s-{marker}", user_id=f"u-{marker}", metadata={"plan": "gold"}
    )
    with context as run:
        run.set_tag("tenant", "acme")
        yield


def runs_ended_at_server() -> int:
    """Return how many runs have ended in the database that `SERVER_DB` names."""
    connection = sqlite3.connect(f"file:{os.environ['SERVER_DB']}?mode=ro", uri=True)
    try:
        [[ended]] = connection.execute("SELECT count(*) FROM runs WHERE status <> 'running'")
    finally:
        connection.close()
    return int(ended)
