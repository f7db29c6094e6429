"""Scripts that are more than one process, and those that others run: pools, forks, gunicorn, notebooks.

Real processes, the real OpenAI SDK against a stand-in, the real local server.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter

import psutil
import pytest

from tests.acceptance.running import PROGRAMS, SCRIPT_S, Host, await_calls, by_run, clean, run_of
from tests.harness import START_S, await_, names_us, shippers_of


@pytest.fixture
def protocol():
    """All of this is about processes, for which the protocol makes no difference."""
    return "ingest"


@pytest.fixture
def host(tmp_path, model, server):
    quick = {"WAXELL_FLUSH_INTERVAL": "0.5", "WAXELL_SHUTDOWN_TIMEOUT": "60"}
    host = Host(tmp_path / "host", {"OPENAI_BASE_URL": model, "WAXELL_API_URL": server.url} | quick)
    yield host
    host.close()


# --- children ----------------------------------------------------------------------------------------

WAYS = [(way, method) for way in ("process", "pool", "futures") for method in ("fork", "spawn", "forkserver")]


@pytest.mark.parametrize(("way", "method"), [*WAYS, ("threads", "fork")], ids=lambda value: value)
def test_the_calls_of_children_are_delivered(host, server, way, method):
    """Given a parent that only starts others, when its children have called and are gone, then all arrives.

    Children of `multiprocessing` end by `os._exit`, those of a `Pool` by SIGTERM; before 3.13 none of them
    runs an `atexit` handler.
    """
    assert clean(host.run("family.py", way, method)) == "[0, 1, 2, 3]\n"
    if method == "fork":  # the parent's own exit has waited for them
        assert server.calls() == Counter(f"call {n}" for n in range(4))
    await_calls(server, *(f"call {n}" for n in range(4)))
    assert {run["agent_name"] for run in server.runs()} == {f"auto:call {n}" for n in range(4)}
    await_(lambda: shippers_of(host.state) == [], "end of the shipper")


@pytest.mark.parametrize("shipper", ["thread", "process"])
def test_a_child_inherits_the_run(host, server, shipper):
    """Given a fork inside a run, then the child's calls are the run's, and its own runs are its children.

    From Python 3.12 on, a fork beside the shipper's thread is worth a warning; beside a process it is not.
    """
    quiet = {"PYTHONWARNINGS": "ignore::DeprecationWarning"} if shipper == "thread" else {}
    assert clean(host.run("heirs.py", WAXELL_SHIPPER=shipper, **quiet)) == "0 9\n"
    ways = ("by os._exit", "by a signal")
    family = run_of(server, "family")
    children = [f"child {way}" for way in ways]
    assert sorted(family["markers"]) == sorted(["parent before", *children, "parent after"])
    assert family["status"] == "success"
    own = run_of(server, "run of the child by os._exit")
    assert (own["parent"], own["root"]) == (family["run_id"], family["run_id"])
    assert own["markers"] == ["own by os._exit"]
    assert server.calls() == Counter([*family["markers"], *own["markers"]])


def test_a_child_works_on_when_its_parent_has_ended(host, server):
    """Given a script that went into the background, then its calls are delivered all the same."""
    parent = host.start("orphan.py", WAXELL_FLUSH_INTERVAL="0.1")
    assert parent.answer() == "background"
    assert parent.process.wait(SCRIPT_S) == 0
    await_calls(server, "parent", "child, first")

    def shipped():
        assert parent.tell("later") == "asked"
        return server.calls()["later"]

    await_(shipped, "a call of the child")
    parent.tell("last")
    parent.process.stdin.close()  # and the child ends by os._exit
    await_calls(server, "last")


# --- gunicorn ----------------------------------------------------------------------------------------


class Gunicorn:
    """A gunicorn with two workers, started as a user does."""

    def __init__(self, host, *arguments):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.log = host.directory / "gunicorn.log"
        command = [host.python, "-m", "gunicorn", "--bind", self.address, "--workers", "2", *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "web:application"],
                cwd=PROGRAMS,
                env=host.environ(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        await_(lambda: self.log.read_text().count("Booting worker") >= 2, "workers", START_S)

    def get(self, path):
        """Send a request and return the answer."""
        with urllib.request.urlopen(f"http://{self.address}/{path}", timeout=SCRIPT_S) as answer:
            return answer.read().decode()

    def workers(self):
        return psutil.Process(self.process.pid).children()

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def gunicorn(host):
    started = []

    def start(*arguments):
        started.append(Gunicorn(host, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.mark.parametrize(
    ("kind", "preload"),
    [("sync", True), ("gthread", True), ("gevent", True), ("sync", False), ("gevent", False)],
    ids=lambda value: {True: "preload", False: "each worker"}.get(value, value),
)
def test_gunicorn_workers_deliver(host, server, gunicorn, kind, preload):
    """Given gunicorn with two workers, when it serves and is stopped, then each call is there and once."""
    web = gunicorn("--worker-class", kind, *(["--preload"] if preload else []))
    for number in range(6):
        assert "[stand-in]" in web.get(f"ask/loose-{number}")
        web.get(f"run/inside-{number}")
    await_calls(server, "loose-0", "inside-0")  # while it serves
    web.get("ask/last")
    web.process.send_signal(signal.SIGTERM)
    assert web.process.wait(SCRIPT_S) == 0
    loose = [f"loose-{n}" for n in range(6)]
    await_calls(server, *loose, *(f"inside-{n}" for n in range(6)), "last")
    assert by_run(server) == {
        "request": [f"inside-{n}" for n in range(6)],
        **{f"auto:{model}": [model] for model in [*loose, "last"]},
    }
    assert "Traceback" not in web.log.read_text()
    assert not names_us(web.log.read_text())


def test_a_gunicorn_worker_that_is_killed_loses_nothing(host, server, gunicorn):
    """Given preloading, when every worker is killed, then their calls arrive, and new workers' as well."""
    web = gunicorn("--preload")
    for number in range(4):
        web.get(f"ask/before-{number}")
    killed = web.workers()
    for worker in killed:
        worker.kill()
    await_(lambda: not any(worker.is_running() for worker in killed), "end of the workers")
    web.get("ask/after")
    await_calls(server, *(f"before-{n}" for n in range(4)), "after")


# --- notebooks ---------------------------------------------------------------------------------------

FIRST_CELL = f"""
import sys
sys.path.insert(0, {str(PROGRAMS)!r})
import waxell_workers
from waxell_workers import WaxellContext
from asking import ask, ask_async
waxell_workers.init()
"""


class Notebook:
    """A kernel, as a notebook's server runs it."""

    def __init__(self, host):
        from jupyter_client.manager import KernelManager

        self.manager = KernelManager(kernel_name="python3")
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        self.manager.kernel_spec.argv = command
        self.environ = host.environ()
        self.log = (host.directory / "kernel.log").open("wb")
        self.manager.start_kernel(env=self.environ, stderr=self.log, cwd=str(host.directory))
        self._connect()

    def _connect(self):
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=START_S)

    def cell(self, code):
        """Run a cell and return the name of the error that ended it, or an empty string."""
        return self.wait(self.client.execute(code))

    def wait(self, message):
        deadline = time.monotonic() + SCRIPT_S
        while True:
            reply = self.client.get_shell_msg(timeout=max(0.1, deadline - time.monotonic()))
            if reply["parent_header"].get("msg_id") == message:
                return reply["content"].get("ename", "")

    def restart(self, now):
        """Restart the kernel: by a request that it obeys or, `now`, by SIGKILL."""
        self.client.stop_channels()
        self.manager.restart_kernel(now=now)
        self._connect()

    def close(self):
        with contextlib.suppress(RuntimeError):
            self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.log.close()


@pytest.fixture
def notebook(host, monkeypatch):
    for name in ("HOME", "TMPDIR"):
        monkeypatch.setenv(name, host.environ()[name])
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(host.temporary))
    notebook = Notebook(host)
    yield notebook
    notebook.close()


def test_cells_are_delivered_while_the_kernel_waits(host, server, notebook):
    """Given calls in cells, inside and outside runs, plain and awaited, then each is where it belongs."""
    assert notebook.cell(FIRST_CELL + "ask('first cell')") == ""
    await_calls(server, "first cell")  # while the kernel waits for the next one
    assert notebook.cell("ask('second cell')\nwith WaxellContext('named'): ask('inside')") == ""
    assert notebook.cell("async with WaxellContext('awaited'): await ask_async('awaited')") == ""
    assert notebook.cell("ask('last cell')\nassert waxell_workers.get_context() is None") == ""
    await_calls(server, "second cell", "inside", "awaited", "last cell")
    assert by_run(server) == {
        "named": ["inside"],
        "awaited": ["awaited"],
        **{f"auto:{model}": [model] for model in ("first cell", "second cell", "last cell")},
    }


@pytest.mark.parametrize("now", [False, True], ids=["restarted", "killed"])
def test_a_kernel_that_goes_is_delivered(host, server, notebook, now):
    """Given undelivered calls, when the kernel is restarted or killed, then all arrives."""
    hour = FIRST_CELL.replace("init()", "init(flush_interval=3600)")
    assert notebook.cell(hour + "ask('before')\nrun = WaxellContext('open').__enter__()\nask('inside')") == ""
    notebook.restart(now=now)
    if not now:  # the old kernel's exit has delivered
        await_calls(server, "before", "inside")
        assert run_of(server, "open")["status"] == "interrupted"
    assert notebook.cell(hour + "ask('after')\nassert waxell_workers.shutdown(60)") == ""
    await_calls(server, "before", "inside", "after")
    assert run_of(server, "open")["status"] == ("killed" if now else "interrupted")


def test_an_interrupted_cell_ends_its_run_and_the_kernel_goes_on(host, server, notebook):
    """Given a call that takes long, when the user interrupts the kernel, then call and run have ended so."""
    assert notebook.cell(FIRST_CELL) == ""
    cell = "with WaxellContext('long'):\n    ask('quick')\n    ask('slow-60000-m')"
    message = notebook.client.execute(cell)
    await_calls(server, "quick")  # so that the second one has begun
    notebook.manager.interrupt_kernel()
    assert notebook.wait(message) == "KeyboardInterrupt"
    assert notebook.cell("ask('next')\nassert waxell_workers.force_flush(60)") == ""
    long = run_of(server, "long")
    assert (long["status"], long["markers"]) == ("interrupted", ["quick", "slow-60000-m"])
    assert run_of(server, "auto:next")["markers"] == ["next"]
