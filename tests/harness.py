"""What the acceptance tests of Celery's own ways stand on; the rest is the conformance kit's stage.

Every process is started here and ended by its own id; every wait has a deadline.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from waxell_workers.testing.conformance.stage import (
    DELIVERY_S,
    RABBITMQ_URL,
    START_S,
    WORK_S,
    RunningWorker,
    Server,
    await_,
    children_in,
    environment,
    kill_tree,
    rabbitmq_answers,
    shippers_of,
    start_model,
    start_server,
    start_valkey,
)

__all__ = [
    "APP",
    "DELIVERY_S",
    "RABBITMQ_URL",
    "ROOT",
    "START_S",
    "WORK_S",
    "Server",
    "Worker",
    "await_",
    "children_in",
    "environment",
    "names_us",
    "rabbitmq_answers",
    "run_script",
    "shippers_of",
    "start_model",
    "start_server",
    "start_valkey",
]

ROOT = Path(__file__).parent.parent
APP = ROOT / "integrations" / "celery"


def names_us(text: str) -> bool:
    """True if a log or a traceback names us, but for the path of a checkout that bears our name."""
    return "waxell" in text.replace(str(ROOT), "")


def run_script(worker: RunningWorker, code: str) -> str:
    """Run a script in the application's folder, with the worker's environment; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=worker.environ(),
        cwd=worker.folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@dataclass
class Worker:
    """A Celery worker, started by Celery's own command line in the example app's directory."""

    broker: str
    model: str
    api_url: str
    directory: Path
    queue: str = field(default_factory=lambda: f"q-{uuid.uuid4().hex[:12]}")
    settings: dict[str, str] = field(default_factory=dict)
    app: Path = APP
    python: str = sys.executable
    process: subprocess.Popen[bytes] | None = None
    log: Path = Path()
    _starts: int = 0

    @property
    def spool(self) -> Path:
        """The spool of this worker."""
        return self.directory / "spool"

    def environ(self) -> dict[str, str]:
        """Return the worker's environment."""
        own = {
            "BROKER_URL": self.broker,
            "OPENAI_BASE_URL": self.model,
            "WAXELL_API_URL": self.api_url,
            "WAXELL_SPOOL_DIR": str(self.spool),
        }
        return environment(**own, **self.settings)

    def start(self, *arguments: str) -> None:
        """Start the worker and wait until it takes tasks."""
        self._starts += 1
        self.log = self.directory / f"worker-{self._starts}.log"
        command = [self.python, "-m", "celery", "-A", "scenarios", "worker", "-Q", self.queue]
        command += ["--loglevel", "INFO", "--without-mingle", "--without-gossip", "-n", f"{self.queue}@test"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environ(),
                cwd=self.app,
                start_new_session=True,
            )
        self.await_log(" ready.")

    def await_log(self, text: str, count: int = 1, timeout_s: float = START_S) -> None:
        """Wait until the worker has written `text` `count` times."""

        def written() -> bool:
            assert self.process is None or self.process.poll() is None or self.text.count(text) >= count, (
                f"the worker ended ({self.process.returncode}):\n{self.text[-3000:]}"
            )
            return self.text.count(text) >= count

        try:
            await_(written, f"{count} x {text!r}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text[-3000:]}") from None

    @property
    def text(self) -> str:
        """What the worker has written."""
        return self.log.read_text(errors="replace")

    def await_received_results(self, count: int) -> None:
        """Wait until the worker says of `count` tasks that they have succeeded."""
        self.await_log("] succeeded in ", count, WORK_S)

    def send(self, task: str, *arguments: Any, **options: Any) -> str:
        """Enqueue a task of the scenarios and return its id."""
        from celery import Celery

        with Celery(broker=self.broker, set_as_current=False) as client:
            return str(client.send_task(f"scenarios.{task}", arguments, queue=self.queue, **options).id)

    def send_many(self, count: int, task: str = "ask") -> dict[str, str]:
        """Enqueue `count` tasks, each with a marker of its own; return task ids to markers."""
        from celery import Celery

        sent = {}
        with Celery(broker=self.broker, set_as_current=False) as client:
            for number in range(count):
                marker = f"{self.queue}-{number:03d}"
                sent[client.send_task(f"scenarios.{task}", (marker,), queue=self.queue).id] = marker
        return sent

    def send_chain(self, ticket: str) -> None:
        """Enqueue the example's chain of two tasks."""
        from celery import Celery, chain

        with Celery(broker=self.broker, set_as_current=False) as client:
            signatures = [
                client.signature(f"tasks.{name}", args, queue=self.queue)
                for name, args in (("triage", (ticket,)), ("summarise", ()))
            ]
            chain(*signatures, app=client).apply_async()

    def terminate(self, timeout_s: float = 60.0) -> float:
        """Send SIGTERM and wait for the end; return the seconds that it took."""
        assert self.process is not None
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout_s)
        return time.monotonic() - began

    def kill_tree(self) -> None:
        """Kill the worker's main process and every process under it, at once."""
        assert self.process is not None
        kill_tree(self.process)

    def pool_pids(self) -> list[int]:
        """Return the ids of the pool's processes."""
        assert self.process is not None
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def shipper(self) -> psutil.Process | None:
        """Return the shipper of this worker's spool."""
        return next(iter(shippers_of(self.spool)), None)

    def stop(self) -> None:
        """End what is left: the worker's tree and its shipper."""
        if self.process is not None and self.process.poll() is None:
            self.kill_tree()
        for process in shippers_of(self.spool):
            process.kill()
