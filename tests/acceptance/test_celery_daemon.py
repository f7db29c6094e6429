"""Given a worker that Celery makes a daemon of (`-B`, `--detach`, `--uid`), then no call is lost and none
comes twice: whoever closes descriptors, changes the user or cuts the terminal."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.acceptance.test_celery import POOLS, assert_each_once
from tests.harness import APP, ROOT, START_S, Worker, await_, start_valkey

TASKS = 30
TICKS = 5
USER = "nobody"
SUCCEEDED = re.compile(r"Task scenarios\.\w+\[([0-9a-f-]{36})\] succeeded")

# Beat publishes from a process that was forked by the worker's main process and closed all its descriptors.
# The handlers make both record: what the one has opened, the other must not use.
APP_WITH_BEAT = f"""
import os, sys
sys.path.insert(0, {str(APP)!r})
from celery.signals import before_task_publish, celeryd_after_setup
from tasks import app, ask
import waxell_workers

app.conf.beat_schedule = {{
    "each second": {{"task": "scenarios.tick", "schedule": 1.0, "options": {{"queue": os.environ["QUEUE"]}}}}
}}

@app.task(bind=True)
def tick(self):
    ask("Say yes.", model=self.request.id)

@celeryd_after_setup.connect
def starting(**_):
    waxell_workers.record_llm_call(model="main process")

@before_task_publish.connect
def publishing(headers, **_):
    waxell_workers.record_llm_call(model="published-" + headers["id"])
"""

RECORDING_WHEN_IMPORTED = f"""
import sys
sys.path.insert(0, {str(APP)!r})
import waxell_workers
waxell_workers.record_llm_call(model="import")
"""


def assert_succeeded_once(server, log, prefixes=("",)):
    """Each task of which the worker's log says that it succeeded has one run with its own call."""
    succeeded = SUCCEEDED.findall(log)
    assert len(succeeded) == len(set(succeeded)) >= TICKS
    wanted = {prefix + task for task in succeeded for prefix in prefixes}
    await_(lambda: wanted <= server.calls().keys(), "delivery of every call")
    assert {marker: count for marker, count in server.calls().items() if count != 1} == {}
    runs = {run["task_id"]: run for run in server.ended() if run["task_id"]}
    assert {task: runs[task]["markers"] for task in succeeded} == {task: [task] for task in succeeded}


@pytest.mark.parametrize("shipper", ["process", "thread"])
def test_beat_inside_the_worker_loses_nothing(make_worker, server, tmp_path, shipper):
    """`worker -B`: what beat triggers, and what beat's process records, arrives once; SIGTERM ends both."""
    worker = make_worker(server.url, WAXELL_SHIPPER=shipper)
    worker.settings["QUEUE"] = worker.queue
    worker.app = tmp_path / "app"
    worker.app.mkdir()
    (worker.app / "scenarios.py").write_text(APP_WITH_BEAT)
    worker.start(*POOLS["prefork"], "-B", "--schedule", str(tmp_path / "schedule"))
    tree = psutil.Process(worker.process.pid).children(recursive=True)
    worker.await_received_results(TICKS)
    worker.terminate()
    assert worker.process.returncode == 0
    _, left = psutil.wait_procs([child for child in tree if child.is_running()], timeout=30)
    assert [child for child in left if child not in {worker.shipper()}] == []
    assert "Traceback" not in worker.text
    assert_succeeded_once(server, worker.text, prefixes=("", "published-"))
    assert server.calls()["main process"] == 1


class Daemon:
    """A worker that was started with `--detach`, and is known by its pidfile alone."""

    def __init__(self, worker: Worker, directory: Path) -> None:
        self.worker = worker
        self.pidfile = directory / "worker.pid"
        self.log = worker.log = directory / "worker.log"

    def start(self, *arguments: str) -> psutil.Process:
        """Start it as its command line does, and wait until it takes tasks."""
        command = [sys.executable, "-m", "celery", "-A", "scenarios", "worker", "-Q", self.worker.queue]
        command += ["--detach", "--pidfile", str(self.pidfile), "--logfile", str(self.log)]
        command += ["--loglevel", "INFO", "-n", f"{self.worker.queue}@test", *POOLS["prefork"], *arguments]
        started = subprocess.run(
            command,
            env=self.worker.environ(),
            cwd=self.worker.app,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        assert (started.returncode, started.stderr) == (0, "")
        await_(lambda: self.log.exists() and " ready." in self.worker.text, "worker", START_S)
        return psutil.Process(int(self.pidfile.read_text()))

    def stop(self) -> None:
        """Kill what is left of it."""
        if self.pidfile.exists() and psutil.pid_exists(pid := int(self.pidfile.read_text())):
            main = psutil.Process(pid)
            for process in [*main.children(recursive=True), main]:
                process.kill()


@pytest.fixture
def make_daemon():
    made = []

    def make(worker, directory):
        made.append(Daemon(worker, directory))
        return made[-1]

    yield make
    for daemon in made:
        daemon.stop()


def has_ended(process: psutil.Process) -> bool:
    """True if a process is gone, or only waits for an init that does not reap."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("end", ["sigterm", "sigkill"])
def test_a_detached_worker_loses_nothing(make_worker, make_daemon, server, tmp_path, end):
    """`worker --detach`: every run arrives once, the process really ends, and its shipper after it."""
    worker = make_worker(server.url)
    daemon = make_daemon(worker, tmp_path)
    sent = worker.send_many(TASKS)
    main = daemon.start()
    worker.await_received_results(TASKS)
    shipper = await_(worker.shipper, "shipper")
    tree = main.children(recursive=True)
    if end == "sigterm":
        main.terminate()
    else:
        main.suspend()  # so that no new child escapes
        for process in [*main.children(recursive=True), main]:
            process.kill()
    await_(lambda: has_ended(main), "end of the worker")
    await_(lambda: all(has_ended(process) for process in tree), "end of the pool")
    assert_each_once(server, sent)
    await_(lambda: has_ended(shipper), "end of the shipper")


# -- another user ------------------------------------------------------------------------------
# Not together with `--detach`: Celery 5.7 drops the rights, starts itself again with what is left of the
# arguments, and that worker dies of them (`--uid USER`) or of the second change of user (`--uid=USER`).


class UsersWorker(Worker):
    """A worker whose spool may be left to it: `finds_spool`."""

    finds_spool = False

    def environ(self):
        """Return the worker's environment."""
        environ = super().environ()
        if self.finds_spool:
            del environ["WAXELL_SPOOL_DIR"]
        return environ


@pytest.fixture
def everybodys():
    """A directory that another user reaches, which pytest's own are not."""
    if os.geteuid() != 0:
        pytest.skip("only root may change the user")
    directory = Path(tempfile.mkdtemp(prefix="waxell-uid-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def common_python():
    """A Python that every user may execute, and its environment; one in root's home is copied to `/tmp`."""
    if as_user(sys.executable, {}).returncode == 0:
        yield sys.executable, {}
        return
    directory = Path(tempfile.mkdtemp(prefix="waxell-python-"))
    directory.chmod(0o755)
    try:
        yield copy_of_python(directory)
    finally:
        shutil.rmtree(directory)


def copy_of_python(directory: Path) -> tuple[str, dict[str, str]]:
    """Copy this interpreter and its standard library; the packages stay where they are."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = shutil.ignore_patterns("site-packages", "test", "tests", "idlelib", "config-*")
    shutil.copytree(library, directory / "lib" / library.name, ignore=left_out, symlinks=True)
    for shared in library.parent.glob("libpython*.so*"):
        shutil.copy(shared, directory / "lib")
    (directory / "bin").mkdir()
    executable = shutil.copy(Path(sys.executable).resolve(), directory / "bin")
    packages = [str(ROOT), sysconfig.get_path("purelib")]
    return str(executable), {
        "LD_LIBRARY_PATH": str(directory / "lib"),
        "PYTHONPATH": os.pathsep.join(packages),
    }


def as_user(python: str, environ: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    """Import, as that user, what a worker imports."""
    user = pwd.getpwnam(USER)
    return subprocess.run(
        f"exec setpriv --reuid {user.pw_uid} --regid {user.pw_gid} --clear-groups "
        f"{python} -c 'import asyncio, celery, httpx, openai, redis.asyncio, waxell_workers.celery'",
        shell=True,
        cwd=APP,
        env={**os.environ, "HOME": "/"} | environ,
        capture_output=True,
        check=False,
    )


@pytest.fixture
def as_nobody(everybodys, common_python, children, model, request, tmp_path):
    """A worker all of whose surroundings the user `nobody` may use, except its spool: that is the test's."""
    python, environ = common_python
    tried = as_user(python, environ)
    if tried.returncode != 0:
        pytest.skip(f"{USER} may not use this checkout: {tried.stderr.decode()[-200:]}")
    broker = start_valkey(children)
    temporary = everybodys / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    worker = UsersWorker(broker, model, "", everybodys, python=python)
    worker.settings |= {"TMPDIR": str(temporary), "HOME": str(tmp_path), "XDG_STATE_HOME": ""} | environ
    yield worker
    worker.stop()


def owner(path: Path) -> tuple[str, int]:
    """The name of a path's owner, and its mode."""
    status = path.stat()
    return pwd.getpwuid(status.st_uid).pw_name, status.st_mode & 0o777


def test_a_spool_that_belongs_to_the_workers_user_is_used(as_nobody, server):
    """`--uid` with a spool of that user's: everything arrives, and all in the spool is private to it."""
    worker = as_nobody
    worker.api_url = server.url
    worker.spool.mkdir(mode=0o700)
    shutil.chown(worker.spool, USER)
    sent = worker.send_many(TASKS)
    worker.start(*POOLS["prefork"], f"--uid={USER}")
    worker.await_received_results(TASKS)
    worker.terminate()
    assert worker.process.returncode == 0
    assert_each_once(server, sent)
    [destination] = worker.spool.iterdir()
    assert owner(destination) == (USER, 0o700)
    assert {owner(path) for path in destination.iterdir()} <= {(USER, 0o600)}


def test_without_a_spool_of_its_own_the_worker_finds_one(as_nobody, server, tmp_path):
    """`--uid` where `HOME` is still root's: the spool is in the temporary directory, named by the user."""
    worker = as_nobody
    worker.api_url = server.url
    worker.finds_spool = True
    sent = worker.send_many(TASKS)
    worker.start(*POOLS["prefork"], f"--uid={USER}")
    worker.await_received_results(TASKS)
    worker.terminate()
    assert worker.process.returncode == 0
    assert_each_once(server, sent)
    [spool] = Path(worker.settings["TMPDIR"]).glob("waxell-workers-*")
    assert owner(spool) == (USER, 0o700)


def test_what_root_has_opened_is_left_for_what_the_user_may_open(as_nobody, server, everybodys):
    """An app that records when it is imported does so as root; the tasks are recorded all the same."""
    worker = as_nobody
    worker.api_url = server.url
    worker.settings["HOME"] = str(everybodys)
    worker.finds_spool = True
    worker.app = everybodys / "app"
    worker.app.mkdir()
    (worker.app / "scenarios.py").write_text(RECORDING_WHEN_IMPORTED + (APP / "scenarios.py").read_text())
    sent = worker.send_many(TASKS)
    worker.start(*POOLS["prefork"], f"--uid={USER}")
    worker.await_received_results(TASKS)
    worker.terminate()
    assert worker.process.returncode == 0
    await_(lambda: len([run for run in server.ended() if run["task_id"]]) >= TASKS, "delivery")
    markers = {run["task_id"]: run["markers"] for run in server.ended() if run["task_id"]}
    assert markers == {task: [marker] for task, marker in sent.items()}


def test_a_spool_that_the_user_may_not_use_is_said_and_costs_no_task(as_nobody, server):
    """`--uid` with a spool of root's: the worker says so, executes every task, and stops well."""
    worker = as_nobody
    worker.api_url = server.url
    worker.spool.mkdir(mode=0o700)
    sent = worker.send_many(TASKS)
    worker.start(*POOLS["prefork"], f"--uid={USER}")
    worker.await_received_results(len(sent))
    worker.terminate()
    assert worker.process.returncode == 0
    assert f"no usable spool directory ({worker.spool}" in worker.text
    assert "Permission denied" in worker.text
    assert "Traceback" not in worker.text
    assert server.runs() == []
