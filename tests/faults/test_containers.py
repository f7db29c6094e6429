"""Containers, as far as a kernel makes them: a process 1 with which everything dies, a shipper in other
namespaces, a volume between the two, a memory limit.

`unshare` makes the namespaces. Where it may not, the tests are skipped; in CI they fail.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import psutil
import pytest
import yaml
from celery import Celery

from tests.acceptance.conftest import children, make_worker, model, session_children, valkey  # noqa: F401
from tests.faults.test_shipper_process import a_copy_of_the_package, assert_each_once, models
from tests.faulty import FaultyServer
from tests.harness import APP, ROOT, Worker, await_, environment
from tests.torture import LONG, effort
from waxell_workers.cli.commands import cli
from waxell_workers.core.config import Settings
from waxell_workers.core.inspection import survey

pytestmark = pytest.mark.timeout(180)

PREFORK = ("--pool", "prefork", "--concurrency", "2")
PID = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")
"""A process 1 of its own, as `docker run` makes it."""
CONTAINER = (*PID, "--mount", "--uts", "--ipc")
SLACK_S = 5.0
"""What a busy machine may add."""
GRACE_S = 10.0
"""What `docker stop` waits for between SIGTERM and SIGKILL."""
OTHER_UID = 65534


@pytest.fixture(scope="module")
def namespaces() -> None:
    made = shutil.which("unshare") and subprocess.run([*CONTAINER, "true"], capture_output=True, check=False)
    if not made or made.returncode:
        pytest.skip("no namespaces can be made here")


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(ingest=True) as server:
        yield server
        assert server.violations == []


# --- a worker that is process 1 ---------------------------------------------------------------------


@pytest.fixture
def contained(namespaces: None, tmp_path: Path) -> Path:
    """A Python that is process 1 of a container."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {" ".join(PID)} {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def process_1(worker: Worker) -> psutil.Process:
    """Return the worker as the host sees it: the child of `unshare`."""
    assert worker.process is not None
    [first] = psutil.Process(worker.process.pid).children()
    return first


def inside(process: psutil.Process) -> list[psutil.Process]:
    """Return the process 1 of a container and everything in it, adopted orphans included."""
    return [process, *process.children(recursive=True)]


def test_what_dies_with_process_1_is_delivered_by_the_next_start(make_worker, server, contained) -> None:  # noqa: F811
    """Given a worker that is process 1, when it is killed, then everything in the container dies with it, the
    shipper too; the spool is on a volume, and the next start delivers all, once, and ends what was open."""
    worker = make_worker(server.url, WAXELL_FLUSH_INTERVAL="3600")
    worker.python = str(contained)
    worker.start(*PREFORK)
    sent = worker.send_many(10)
    worker.await_received_results(10)
    open_task = worker.send("ask_then_sleep", "in the middle", 60)
    shipper = await_(worker.shipper, "shipper")
    everything = inside(process_1(worker))
    assert shipper in everything  # it was adopted: it is of the container
    await_(lambda: sum(each.records for each in surveys(worker.spool)) == 32, "the open run's call")
    process_1(worker).kill()
    worker.process.wait(30)
    _, alive = psutil.wait_procs(everything, timeout=30)
    assert alive == []
    assert server.calls == []
    worker.settings["WAXELL_FLUSH_INTERVAL"] = "1"
    worker.start(*PREFORK)
    assert_each_once(server, sent | {open_task: "in the middle"})
    states = Counter(run.state for run in server.runs.values())
    assert states == {"success": 10, "killed": 1}
    process_1(worker).kill()


def surveys(spool: Path):
    return [survey(str(path)) for path in spool.iterdir() if path.is_dir()]


def test_docker_stop_delivers_in_its_grace(make_worker, server, contained) -> None:  # noqa: F811
    """Given SIGTERM to process 1, and SIGKILL after 10 s to what is left, all was delivered before."""
    worker = make_worker(server.url, WAXELL_FLUSH_INTERVAL="3600")
    worker.python = str(contained)
    worker.start(*PREFORK)
    sent = worker.send_many(10)
    worker.await_received_results(10)
    first = process_1(worker)
    assert server.calls == []
    first.terminate()
    worker.process.wait(GRACE_S)
    assert_each_once(server, sent)
    assert sum(each.pending for each in surveys(worker.spool)) == 0
    assert server.duplicates == 0


def test_process_1_leaves_no_zombie(make_worker, server, contained) -> None:  # noqa: F811
    """Given a worker that is process 1, and so inherits each shipper, when these die one after the other,
    whoever had started them, then none of them stays as a zombie."""
    worker = make_worker(server.url)
    worker.python = str(contained)
    worker.start(*PREFORK)
    first = process_1(worker)
    for _ in range(effort(1, 3)):
        shipper = await_(worker.shipper, "shipper")
        shipper.kill()
        await_(lambda: (found := worker.shipper()) and found.pid != shipper.pid, "another shipper")  # noqa: B023
        await_(lambda: zombies(first) == [], "the end of the zombie", 30)
        assert not psutil.pid_exists(shipper.pid)
    first.kill()


def zombies(process: psutil.Process) -> list[psutil.Process]:
    return [each for each in inside(process) if each.status() == psutil.STATUS_ZOMBIE]


# --- a sidecar --------------------------------------------------------------------------------------

RECORDING = """
import os, signal, sys, time, waxell_workers
assert os.getpid() == 1
print("up", flush=True)
for line in sys.stdin:
    word, _, name = line.strip().partition(" ")
    if word == "call":
        waxell_workers.record_llm_call(model=name)
    elif word == "open":
        waxell_workers.WaxellContext(name).__enter__().record_llm_call(model=name)
    print(waxell_workers.force_flush(float(name)) if word == "flush" else "done", flush=True)
"""
"""A worker's container: told what to do over its stdin."""


class Pod:
    """Two containers with one volume: a worker that only records, and `waxell-workers ship`."""

    def __init__(self, server: FaultyServer, directory: Path) -> None:
        self.volume = directory / "volume"
        self.volume.mkdir()
        self.settings = {
            "WAXELL_API_URL": server.url,
            "WAXELL_SPOOL_DIR": str(self.volume),
            "WAXELL_SHIPPER": "external",
            "WAXELL_FLUSH_INTERVAL": "0.2",
            "WAXELL_CAPTURE": "",
            "PYTHONPATH": str(ROOT),
        }
        self._started: list[subprocess.Popen[str]] = []
        self._log = directory / "sidecar.log"

    def worker(self, *wrapped: str) -> subprocess.Popen[str]:
        """Start the worker's container and wait until it is up; it has no network."""
        worker = self._start([*CONTAINER, "--net", *wrapped, sys.executable, "-c", RECORDING])
        assert worker.stdout is not None
        assert worker.stdout.readline() == "up\n"
        return worker

    def sidecar(self, *wrapped: str) -> subprocess.Popen[str]:
        """Start the shipper's container."""
        ship = [sys.executable, "-m", "waxell_workers.cli.main", "ship"]
        return self._start([*CONTAINER, *wrapped, *ship])

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        with self._log.open("a") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(**self.settings),
            )
        self._started.append(process)
        return process

    @property
    def said(self) -> str:
        """What the containers have written to stderr."""
        return self._log.read_text()

    def survey(self):
        """Look into the volume, from the host."""
        [directory] = [path for path in self.volume.iterdir() if path.is_dir()]
        return survey(str(directory))

    def close(self) -> None:
        """Kill every container."""
        for process in self._started:
            kill_container(process)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def kill_container(container: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    """Send a signal to process 1 of a container, and wait for the container's end."""
    if container.poll() is None:
        for first in psutil.Process(container.pid).children():
            first.send_signal(number)
        container.wait(30)


@pytest.fixture
def pod(namespaces: None, server: FaultyServer, tmp_path: Path) -> Iterator[Pod]:
    pod = Pod(server, tmp_path)
    yield pod
    pod.close()


def tell(container: subprocess.Popen[str], line: str) -> str:
    assert container.stdin is not None
    assert container.stdout is not None
    container.stdin.write(f"{line}\n")
    container.stdin.flush()
    return container.stdout.readline().strip()


def test_a_sidecar_in_another_pid_namespace_delivers(pod: Pod, server: FaultyServer, tmp_path: Path) -> None:
    """Given workers and a shipper with nothing in common but a volume, their records are delivered, a
    flush is answered across the border, and of two the one that was killed is taken for dead."""
    grace = ("_REASON_GRACE_S = 8.0", "_REASON_GRACE_S = 0.1")
    pod.settings["PYTHONPATH"] = str(a_copy_of_the_package(tmp_path / "site", tracking=grace))
    worker, other, _sidecar = pod.worker(), pod.worker(), pod.sidecar()
    tell(worker, "open the run")
    assert "pending=0" in tell(worker, "flush 20")
    assert models(server) == {"the run": 1}
    tell(worker, "call another")
    assert server.wait_until(lambda: models(server)["another"] == 1, 60)
    found = pod.survey()
    assert [holder.pid > 0 for holder in (found.shipper, *found.writers)] == [True, True]
    tell(other, "open another run")
    kill_container(other)
    assert server.wait_until(lambda: "killed" in states(server).values(), 60)
    assert states(server) == {"the run": "", "another run": "killed"}


def states(server: FaultyServer) -> dict[str, str]:
    return {run.start["agent_name"]: run.state for run in server.runs.copy().values()}


def test_without_its_sidecar_a_flush_says_pending(pod: Pod, server: FaultyServer) -> None:
    """Given no shipper at all, a flush waits for its time and says that something is pending; the sidecar
    that comes later delivers it."""
    worker = pod.worker()
    tell(worker, "call early")
    began = time.monotonic()
    assert "pending=1" in tell(worker, "flush 1")
    assert time.monotonic() - began < 1 + SLACK_S
    pod.sidecar()
    assert server.wait_until(lambda: models(server)["early"] == 1, 60)


def test_a_worker_container_that_is_killed_leaves_a_killed_run(pod: Pod, server: FaultyServer) -> None:
    """Given SIGKILL to the worker's container, the sidecar knows it by the lock alone, and ends its open run
    as killed, with its calls."""
    worker, _sidecar = pod.worker(), pod.sidecar()
    tell(worker, "open the run")
    kill_container(worker)
    assert server.wait_until(lambda: [run.state for run in server.runs.values()] == ["killed"], 60)
    assert models(server) == {"the run": 1}


def test_a_sidecar_that_is_started_again_goes_on(pod: Pod, server: FaultyServer) -> None:
    """Given SIGKILL to the sidecar's container, as by a restart of it, the next one delivers what was
    recorded in between, and nothing twice; by SIGTERM it leaves in order."""
    worker, sidecar = pod.worker(), pod.sidecar()
    tell(worker, "call one")
    assert server.wait_until(lambda: models(server)["one"] == 1, 60)
    kill_container(sidecar)
    tell(worker, "call two")
    sidecar = pod.sidecar()
    assert server.wait_until(lambda: models(server)["two"] == 1, 60)
    kill_container(sidecar, signal.SIGTERM)
    assert sidecar.returncode == 0
    assert set(models(server).values()) == {1}
    tell(worker, "call three")
    pod.sidecar()
    assert server.wait_until(lambda: models(server)["three"] == 1, 60)


@pytest.mark.parametrize("shared", ["private", "shared by a group"])
def test_another_uid_is_refused_with_a_reason(pod: Pod, server: FaultyServer, shared: str) -> None:
    """Given a spool of another user, also one that a group may write to, as `fsGroup` makes it, the sidecar
    says so, delivers nothing and touches nothing; once it is the sidecar's own, it delivers."""
    if os.geteuid():
        pytest.skip("only root can give a directory away")
    tell(pod.worker(), "call mine")
    [directory] = pod.volume.iterdir()
    for path in [directory, *directory.iterdir()]:
        os.chown(path, OTHER_UID, -1)
        if shared != "private":
            path.chmod(path.stat().st_mode | 0o070)
    before = everything_in(pod.volume)
    sidecar = pod.sidecar()
    assert sidecar.wait(60) == 1
    assert "belongs to another user" in pod.said
    assert everything_in(pod.volume) == before
    assert server.requests == []
    for path in [directory, *directory.iterdir()]:
        os.chown(path, os.geteuid(), -1)
    pod.sidecar()
    assert server.wait_until(lambda: models(server)["mine"] == 1, 60)


def everything_in(volume: Path) -> list[tuple[str, int, int]]:
    found = [(path, path.stat()) for path in volume.rglob("*")]
    return sorted((path.name, status.st_mode, status.st_uid) for path, status in found)


# --- a memory limit ---------------------------------------------------------------------------------

CGROUP = Path("/sys/fs/cgroup")
LIMIT_MIB = 400
HUNGRY = f"""
import sys
sys.path.insert(0, {str(APP)!r})
from tasks import app
from scenarios import ask, call

@app.task
def ask_then_eat(marker):
    call(marker)
    eaten = []
    for _ in range({4 * LIMIT_MIB} // 8):  # where there is no limit after all, the machine survives
        eaten.append(bytearray(b"x" * (8 << 20)))
"""


@pytest.fixture
def memory_limited() -> Iterator[Path]:
    """A control group with a limit on its memory, of version 2 or 1."""
    group = make_memory_limit(CGROUP, "memory.max") or make_memory_limit(
        CGROUP / "memory", "memory.limit_in_bytes"
    )
    if group is None:
        pytest.skip("no control group with a memory limit can be made here")
    yield group
    await_(lambda: not (group / "cgroup.procs").read_text().split(), "the end of all in the group", 60)
    group.rmdir()


def make_memory_limit(parent: Path, limit: str) -> Path | None:
    if not (parent / "cgroup.procs").exists():  # no control groups, but the directory above their trees
        return None
    group = parent / f"waxell-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
    except OSError:
        return None
    try:
        (group / limit).write_text(str(LIMIT_MIB << 20))
    except OSError:  # no memory controller there
        group.rmdir()
        return None
    return group


def oom_kills(group: Path) -> int:
    """Return how many processes of the group the kernel has killed for their memory."""
    for name in ("memory.events", "memory.oom_control"):
        if (group / name).exists():
            found = re.search(r"^oom_kill (\d+)", (group / name).read_text(), re.MULTILINE)
            return int(found[1]) if found else 0
    return 0


@pytest.mark.skipif(not LONG, reason="only at length")
def test_a_memory_kill_leaves_a_killed_run(make_worker, server, tmp_path, memory_limited) -> None:  # noqa: F811
    """Given a task that eats more than its control group may have, the kernel kills its process alone: the
    run is killed, with its call and the reason, the worker goes on, and what it does later arrives."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho $$ > {memory_limited}/cgroup.procs && exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    worker = make_worker(server.url)
    worker.python = str(python)
    worker.app = tmp_path / "app"
    worker.app.mkdir()
    for module in ("tasks", "scenarios"):
        shutil.copy(APP / f"{module}.py", worker.app)
    (worker.app / "hungry.py").write_text(HUNGRY)
    worker.start(*PREFORK, "--include", "hungry")
    assert str(worker.process.pid) in (memory_limited / "cgroup.procs").read_text().split()
    eating = send(worker, "hungry.ask_then_eat", "eats")
    await_(lambda: [run for run in server.runs.values() if run.ends], "ended run")
    assert oom_kills(memory_limited) == 1
    [run] = server.runs.values()
    assert (run.start["task_id"], run.state) == (eating, "killed")
    assert [call["model"] for call in run.calls] == ["eats"]
    assert "SIGKILL" in run.ends[0]["error_message"]
    assert worker.process.poll() is None
    later = worker.send("ask", "later")
    assert server.wait_until(lambda: models(server)["later"] == 1, 60)
    assert later in {run.start["task_id"] for run in server.runs.values()}
    worker.terminate()
    if shipper := worker.shipper():
        shipper.wait(60)


def send(worker: Worker, task: str, *arguments: object) -> str:
    with Celery(broker=worker.broker, set_as_current=False) as client:
        return str(client.send_task(task, arguments, queue=worker.queue).id)


# --- what the pages tell people to write ------------------------------------------------------------

DEPLOY = ROOT / "docs" / "deploy"
MANIFESTS = sorted(DEPLOY.glob("*.yaml"))
UNITS = sorted(DEPLOY.glob("*.service"))
PAGES = [ROOT / "docs" / "kubernetes.md", ROOT / "docs" / "systemd.md"]
SETTINGS = {f"WAXELL_{setting.name.upper()}" for setting in fields(Settings)}


def assert_is_a_command(words: list[str]) -> None:
    """What follows `waxell-workers` is a command of its, with options that it has."""
    command: click.Command = cli
    for word in words:
        if word.startswith("-"):
            assert any(word in option.opts for option in command.params), words
        elif isinstance(command, click.Group):
            assert word in command.commands, words
            command = command.commands[word]
    assert not isinstance(command, click.Group), words


@pytest.mark.parametrize("path", [*MANIFESTS, *UNITS, *PAGES], ids=lambda path: path.name)
def test_what_is_deployed_exists(path: Path) -> None:
    """Each command of ours that a manifest, a unit or a page names exists, and so does each setting."""
    text = path.read_text()
    named = [re.findall(r"[\w-]+", found) for found in re.findall(r"waxell-workers((?: [\w-]+)+)", text)]
    named += [json.loads(found)[1:] for found in re.findall(r'command: (\["waxell-workers".*\])', text)]
    commands = [words for words in named if words[0] in cli.commands]
    assert commands or path.name in ("worker.yaml", "celery.service")
    for words in commands:
        assert_is_a_command(words)
    assert set(re.findall(r"\bWAXELL_[A-Z_]*[A-Z]\b", text)) <= SETTINGS


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_whole(path: Path) -> None:
    """It parses; each container has the volume, at the place that it is told; the
    user is the pod's; and the containers of a pod agree on what makes the destination."""
    text = path.read_text()
    containers = len(re.findall(r"^ +image:", text, re.MULTILINE))
    assert text.count("name: WAXELL_SPOOL_DIR\n              value: /var/spool/waxell\n") == containers
    assert text.count("- {name: spool, mountPath: /var/spool/waxell}") == containers
    assert text.count("secretKeyRef: {name: waxell, key: api-key}") == containers
    assert text.count("runAsUser") == 1
    assert text.index("runAsUser") < text.index("ontainers:")
    if containers > 1:
        assert text.index("restartPolicy: Always") < text.index("\n      containers:")
        assert text.count("name: WAXELL_SHIPPER\n              value: external\n") == 1
    pod = yaml.safe_load(text)["spec"]["template"]["spec"]
    mounts = [mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]]
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_is_one(path: Path, tmp_path: Path) -> None:
    """systemd finds nothing to say against it, but for what the reader has and we have not: the program."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze here")
    text, count = re.subn(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", path.read_text())
    assert count == 1
    unit = tmp_path / path.name
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
