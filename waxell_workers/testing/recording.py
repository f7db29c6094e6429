"""Runs as a user's test sees them: recorded by the real road, into a journal of the test's, and read back.

Nothing is shipped, no server is asked, no environment variable counts. Whatever runs in this process, or is
forked from it, while the block lasts is recorded: Celery's eager mode, RQ's `is_async=False`, workers that a
test starts in threads.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.collector import Collector, instead
from ..core.config import resolve
from ..core.inspection import SegmentScan, destinations
from ..core.records import LLMCall, Record, RunEnded, RunStarted, RunUpdated, Step
from ..core.segments import segment_numbers

_NOWHERE = "http://127.0.0.1:9"
"""Loopback, so that recording is on; the port of the discard protocol, and nothing is sent anyway."""
_POLL_S = 0.01

RUNNING = "running"
"""The state of a run that has not ended."""


@dataclass(slots=True)
class RecordedRun:
    """One run, with what belongs to it."""

    run_id: str
    agent_name: str = ""
    workflow_name: str = ""
    """The framework, for a task."""
    state: str = RUNNING
    """One of `success`, `error`, `retry`, `ignored`, `rejected`, `revoked`, `killed`, `interrupted`, or
    `running`."""
    task_id: str = ""
    parent_run_id: str = ""
    root_run_id: str = ""
    trace_id: str = ""
    session_id: str = ""
    user_id: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    """`attempt`, `queue`, `task`, … and what `set_metadata` has set."""
    tags: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    reason: str = ""
    """How it ended, in words, where no error says it."""
    error_type: str = ""
    error_message: str = ""
    traceback: str = ""
    duration_ms: float | None = None
    calls: list[LLMCall] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


class RecordedRuns:
    """What was recorded so far; each look reads it anew, until the recording is over."""

    def __init__(self, spool: str) -> None:
        self._spool = spool
        self._kept: list[Record] | None = None

    def __iter__(self) -> Iterator[RecordedRun]:
        return iter(self.all())

    def __len__(self) -> int:
        return len(self.all())

    def all(self) -> list[RecordedRun]:
        """Return the runs, in the order in which they began."""
        runs: dict[str, RecordedRun] = {}
        for record in self._records():
            if isinstance(record, RunStarted):
                _begin(runs.setdefault(record.run_id, RecordedRun(record.run_id)), record)
            elif isinstance(record, (LLMCall, Step, RunUpdated, RunEnded)) and record.run_id:
                _add(runs.setdefault(record.run_id, RecordedRun(record.run_id)), record)
        return list(runs.values())

    def one(self, agent_name: str | None = None) -> RecordedRun:
        """Return the only run, or the only one of this agent.

        Raises:
            AssertionError: there is none, or more than one.
        """
        runs = [run for run in self.all() if agent_name in (None, run.agent_name)]
        found = ", ".join(f"{run.agent_name} ({run.state})" for run in self.all()) or "none"
        assert len(runs) == 1, (
            f"expected one run{f' of {agent_name}' if agent_name else ''}; there are: {found}"
        )
        return runs[0]

    @property
    def calls(self) -> list[LLMCall]:
        """Every call, those outside any run included."""
        return [record for record in self._records() if isinstance(record, LLMCall)]

    def wait_ended(self, count: int, timeout_s: float = 5.0) -> list[RecordedRun]:
        """Wait until `count` runs have ended, for workers in other threads or processes, and return those.

        Raises:
            AssertionError: `timeout_s` seconds have passed.
        """
        deadline = time.monotonic() + timeout_s
        while len(ended := [run for run in self.all() if run.state != RUNNING]) < count:
            assert time.monotonic() < deadline, f"{len(ended)} of {count} runs ended within {timeout_s:g} s"
            time.sleep(_POLL_S)
        return ended

    def keep(self) -> None:
        """Take what is there into memory: the journal is about to go."""
        self._kept = list(self._read())

    def _records(self) -> Iterable[Record]:
        return self._read() if self._kept is None else self._kept

    def _read(self) -> Iterator[Record]:
        for directory in (f"{self._spool}/{name}" for name in destinations(self._spool)):
            for number in segment_numbers(directory):
                with SegmentScan(directory, number) as segment:
                    yield from (line.record for line in segment.lines())


@contextmanager
def record_runs(**settings: Any) -> Iterator[RecordedRuns]:
    """Record what happens in this process while the block lasts, whatever was configured before.

        with record_runs() as runs:
            summarise.delay("…")            # Celery, with task_always_eager
        assert runs.one().state == "success"
        assert runs.calls[0].tokens_in > 0

    Args:
        settings: as for `init`: `capture_content`, `redact`, `exclude`, `agent_name`, …

    Yields:
        What was recorded so far.

    Raises:
        ConfigError: a setting that cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="waxell-testing-") as spool:
        chosen = {"api_url": _NOWHERE, "spool_dir": spool} | settings
        # Nobody ships: nothing may wait for that, neither a flush nor the stop of a worker.
        hermetic = replace(
            resolve(chosen, environ={"HOME": spool}),
            shipper="external",
            flush="periodic",
            flush_timeout=0.0,
            shutdown_timeout=0.0,
        )
        runs = RecordedRuns(spool)
        try:
            with instead(Collector(hermetic)):
                yield runs
        finally:
            runs.keep()


def _begin(run: RecordedRun, record: RunStarted) -> None:
    for name in (
        "agent_name",
        "workflow_name",
        "task_id",
        "parent_run_id",
        "root_run_id",
        "trace_id",
        "session_id",
        "user_id",
        "inputs",
    ):
        setattr(run, name, getattr(record, name))
    run.metadata = record.ambient | record.metadata | run.metadata
    run.tags = record.tags | run.tags


def _add(run: RecordedRun, record: LLMCall | Step | RunUpdated | RunEnded) -> None:
    if isinstance(record, LLMCall):
        run.calls.append(record)
    elif isinstance(record, Step):
        run.steps.append(record)
    elif isinstance(record, RunUpdated):
        run.tags |= record.tags
        run.metadata |= record.metadata
    elif run.state == RUNNING:  # the first end counts
        for name in ("state", "reason", "result", "error_type", "error_message", "traceback", "duration_ms"):
            setattr(run, name, getattr(record, name))
