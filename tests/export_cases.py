"""Runs with records, as the shipper hands them to an exporter."""

from __future__ import annotations

import time
from typing import Any

from waxell_workers.core.config import Settings
from waxell_workers.core.exporting import Exporter, Outcome, RunBatch, RunState
from waxell_workers.core.records import LLMCall, Record, RunEnded, RunStarted, Step
from waxell_workers.export.waxell import WaxellExporter

AT = 1_750_000_000.0
KEY = "wax_sk_secret"


def started(name: str = "r", **fields: Any) -> RunStarted:
    given: dict[str, Any] = {"agent_name": "triage", "workflow_name": "celery", "metadata": {"queue": "q"}}
    return RunStarted(id=f"{name}.start", at=AT, run_id=name, **(given | fields))


def call(name: str = "r", number: int = 0, **fields: Any) -> LLMCall:
    given: dict[str, Any] = {
        "model": "gpt-4o",
        "provider": "openai",
        "tokens_in": 1000,
        "tokens_out": 100,
        "duration_ms": 250.4,
    }
    return LLMCall(id=f"{name}.call{number}", at=AT + 1 + number, run_id=name, **(given | fields))


def step(name: str = "r", number: int = 0, **fields: Any) -> Step:
    return Step(id=f"{name}.step{number}", at=AT + 2, run_id=name, name="plan", position=number, **fields)


def ended(name: str = "r", **fields: Any) -> RunEnded:
    return RunEnded(id=f"{name}.end", at=AT + 9, run_id=name, **({"duration_ms": 9000.0} | fields))


def batch(name: str = "r", *records: Record) -> RunBatch:
    """A run with the given records, or with a start, a call, a step and an end."""
    first = next((record for record in records if isinstance(record, RunStarted)), started(name))
    return RunBatch(RunState(first), records or (first, call(name), step(name), ended(name)))


def ids(*batches: RunBatch) -> set[str]:
    return {record.id for one in batches for record in one.records}


def exporter(url: str, *, key: str = KEY, parallel: int = 8) -> WaxellExporter:
    return WaxellExporter(Settings(api_key=key, api_url=url), parallel=parallel)


def export(exporter: Exporter, *batches: RunBatch, timeout_s: float = 20.0) -> Outcome:
    return exporter.export(batches, time.monotonic() + timeout_s)


def left(outcome: Outcome, *batches: RunBatch) -> list[RunBatch]:
    """What the shipper will hand in next time: the same run states, without the records that are settled."""
    settled = outcome.acknowledged | outcome.rejected.keys()
    return [
        RunBatch(one.run, [record for record in one.records if record.id not in settled]) for one in batches
    ]
