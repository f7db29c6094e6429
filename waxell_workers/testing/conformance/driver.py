"""What an adapter's driver tells the suite: how to start, feed and look at one framework's worker.

A driver is small and stupid. It starts nothing itself, waits for nothing and asserts nothing: the suite
starts the command that the driver names, sends signals, and judges by what the server has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

RETRY = "retry"
"""`flaky` is tried again."""
SOFT_LIMIT = "soft-limit"
"""`soft_limit_s` raises inside the task."""
HARD_LIMIT = "hard-limit"
"""`hard_limit_s` kills the process that executes the task; the worker says so."""
CHILD = "child"
"""Tasks are executed in processes that can be killed alone, and the worker then says why."""
REPLACED = "replaced"
"""Likewise, but nobody says why: the framework starts another process without a word to us."""
RECYCLE = "recycle"
"""`command(…, recycle=True)` has each process execute one task."""
THREADS = "threads"
"""Several tasks share one process: threads or greenlets."""
ENQUEUE = "enqueue"
"""A task can enqueue another."""
WAITS = "waits"
"""Tasks wait in a broker for a worker that has not been started yet."""
OUTLIVES = "outlives"
"""The shipper is a process of its own: it delivers after a SIGKILL of the worker's whole tree."""


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to run a framework's worker: a pool, a worker class, a number of processes."""

    name: str
    abilities: frozenset[str]
    """Constants of this module; a scenario that needs another one is left out."""
    slots: int = 2
    """How many tasks the worker executes at once, unless a scenario asks for another number."""
    default: bool = False
    """True for the mode that runs everywhere; the others run under `CI=true` and with `--all-modes`."""
    broker: str = "valkey"
    """`valkey`, `rabbitmq`, or empty for a framework that needs none."""


@dataclass(frozen=True, slots=True)
class Site:
    """The place in which a worker runs: what its application finds in its environment."""

    broker_url: str
    """`redis://127.0.0.1:<port>/0` or `amqp://…`; empty if the mode needs none."""
    queue: str
    """A name that nobody else uses: the queue, and a prefix for whatever else the framework names."""
    port: int
    """A free port of 127.0.0.1, for a framework whose tasks come by HTTP."""
    directory: Path
    """A directory of the test's own."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """The worker's environment beyond the suite's own: `WAXELL_…`, `OPENAI_…`, `BROKER_URL`, `QUEUE`, …"""


class Worker(Protocol):
    """A worker that the suite has started, as a driver may look at it."""

    @property
    def site(self) -> Site:
        """Where it runs."""

    @property
    def mode(self) -> Mode:
        """How it runs."""

    @property
    def slots(self) -> int:
        """How many tasks it executes at once."""

    @property
    def text(self) -> str:
        """What it has written to stdout and stderr."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What must have become of a task: in our run, and in the framework's own account of it."""

    state: str
    """One of `records.STATES`."""
    outcome: str
    """What `Driver.outcome` returns for it."""
    reason: str = ""
    """What our run says of why it ended so, in words, or how that begins."""


class Driver(Protocol):
    """One framework, as the suite drives it."""

    framework: str
    """The folder's name, and `workflow_name` of the runs."""
    modes: Sequence[Mode]
    controls: Mapping[str, Expected]
    """Names that the scenario `control` takes, each for one control-flow exception of the framework."""
    failed: str
    """What `outcome` returns for a task that failed."""
    soft_limit_error: str
    """The type of the exception that `soft_limit_s` raises; empty if no mode has `SOFT_LIMIT`."""

    def command(self, mode: Mode, site: Site, *, slots: int, recycle: bool = False) -> Sequence[str]:
        """Return the framework's own command line for a worker of this mode; run in the driver's folder.

        Args:
            mode: one of `modes`.
            site: where it runs.
            slots: how many tasks it is to execute at once, where the mode allows to choose.
            recycle: have each process execute one task (`RECYCLE`).
        """

    def ready(self, worker: Worker) -> bool:
        """True once the worker takes tasks."""

    def send(
        self,
        worker: Worker,
        scenario: str,
        *arguments: object,
        soft_limit_s: float | None = None,
        hard_limit_s: float | None = None,
    ) -> str:
        """Hand the worker a task of `scenarios.py`; return a handle on it that `outcome` understands.

        Called before the worker is started too, except for a mode without a broker.
        """

    def done(self, worker: Worker) -> int:
        """Return how many attempts the worker has finished, hooks and all, by its own account.

        An attempt counts once nothing of the framework's remains to be done in the slot for it: after this,
        a SIGKILL finds the slot idle.
        """

    def outcome(self, worker: Worker, handle: str) -> str:
        """Return what the framework itself says became of a task; empty as long as it says nothing."""
