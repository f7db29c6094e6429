"""What the property tests share: a spool of their own, records of every kind, and a shipper that ends.

Everything that is exercised here is the real thing; only the exporter's far end is a model.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.property.modelserver import ModelExporter, ModelServer
from waxell_workers.core import liveness
from waxell_workers.core import shipper as shipper_module
from waxell_workers.core.config import Settings
from waxell_workers.core.records import LLMCall, Record, RunEnded, RunStarted, RunUpdated, Step, TaskLost
from waxell_workers.core.shipper import Shipper

TEXT = "Grüße, 世界 🦊 "
"""Two, three and four bytes a character."""
_numbers = itertools.count(1)


def new_server() -> ModelServer:
    """Return a model server that settings with its URL will find; `forget_server` ends it."""
    server = ModelServer()
    server.url = f"http://127.0.0.1:{next(_numbers)}"
    ModelServer.here[server.url] = server
    return server


def forget_server(server: ModelServer) -> None:
    """End a server."""
    del ModelServer.here[server.url]


def settings_for(server: ModelServer, root: str, **more: Any) -> Settings:
    """Return settings whose journal is below `root` and whose shipper delivers to `server`."""
    return Settings(api_url=server.url, spool_dir=root, shipper="external", **more)


@contextlib.contextmanager
def model_exporter() -> Iterator[pytest.MonkeyPatch]:
    """Have shippers export to the model server that their settings name."""
    held = liveness._held()
    before = set(held.opened)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipper_module, "load_exporter", ModelExporter)
        yield patch
    for file in held.opened.keys() - before:  # a process keeps them until its death
        os.close(held.opened.pop(file))
        held.tokens.pop(file, None)


def close_as_the_kernel_would(shipper: Shipper) -> None:
    """Close what a shipper has open that died, or never closes, end its threads, and let go of its lock."""
    shipper._close()
    liveness.ship_lock(shipper._directory).release()


def forget_directory(directory: str) -> None:
    """Close the lock of a directory, which a process keeps open until its death."""
    lock = liveness._ship_locks.pop(directory, None)
    if lock is not None and lock._descriptor >= 0:
        os.close(lock._descriptor)


# --- records ---------------------------------------------------------------------------------------


def started(run_id: str, at: float, text: str = TEXT, **more: Any) -> RunStarted:
    """Return a run's start: its id is the run's."""
    return RunStarted(id=run_id, at=at, run_id=run_id, agent_name="agent", inputs={"text": text}, **more)


def call(run_id: str, record_id: str, at: float, text: str = TEXT, **more: Any) -> LLMCall:
    """Return a call; outside any run if `run_id` is empty."""
    return LLMCall(**{"id": record_id, "at": at, "run_id": run_id, "model": "model", "prompt": text, **more})


def step(run_id: str, record_id: str, at: float, text: str = TEXT) -> Step:
    """Return a step."""
    return Step(id=record_id, at=at, run_id=run_id, name="step", output={"text": text, "list": [1, None]})


def updated(run_id: str, record_id: str, at: float, text: str = TEXT) -> RunUpdated:
    """Return tags and metadata that were set while the run ran."""
    return RunUpdated(id=record_id, at=at, run_id=run_id, tags={"tag": text}, metadata={"n": 1})


def ended(run_id: str, at: float, text: str = TEXT, **more: Any) -> RunEnded:
    """Return a run's end, whose id is the run's and `-end`."""
    return RunEnded(id=f"{run_id}-end", at=at, run_id=run_id, result={"text": text}, **more)


def lost(task_id: str, record_id: str, at: float) -> TaskLost:
    """Return what a supervisor says of a task whose process is gone."""
    return TaskLost(
        id=record_id, at=at, task_id=task_id, reason="killed by signal 9", error_type="WorkerLostError"
    )


def by_id(records: list[Record]) -> dict[str, Record]:
    """Return records by their ids."""
    return {record.id: record for record in records}
