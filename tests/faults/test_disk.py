"""The disk under a worker that works: full, read-only, taken away, limited, forbidden, failing at each call.

The worker is a real one, on a file system of its own where one may be mounted. It must execute every task
as if nothing had happened, say what it loses, and go on recording once the disk is well again, without a
restart.
"""

# ruff: noqa: F811  fixtures that are imported
from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.acceptance.conftest import children, make_worker, model, session_children, valkey  # noqa: F401
from tests.faults.disks import SUDO, FailingDisk, Mount, fill, mount  # noqa: F401
from tests.faulty import FaultyServer
from tests.harness import APP, Worker, await_

LOSSES = f"""
import json, os, sys
sys.path.insert(0, {str(APP)!r})
from tasks import app
from tasks import ask as ask_model
import waxell_workers

@app.task
def ask(marker):
    return ask_model("Say yes.", model=marker)

@app.task
def tell(path):
    with open(path + ".part", "w") as file:
        json.dump(waxell_workers.stats().dropped, file)
    os.rename(path + ".part", path)
"""
DISK = 10 << 20
TASKS = 20
RECORDS = 3
"""What a task with one call leaves: its start, its call, its end."""


@pytest.fixture
def failing(disk: Disk) -> Iterator[FailingDisk]:
    failing = FailingDisk(disk.worker.directory / "image", disk.worker.spool)
    yield failing
    disk.worker.stop()
    failing.unmount()


class Disk:
    """A worker's spool on a disk that something happens to."""

    def __init__(self, worker: Worker, server: FaultyServer) -> None:
        self.worker = worker
        self.server = server
        self.done = 0
        worker.app = worker.directory / "app"
        worker.app.mkdir()
        (worker.app / "scenarios.py").write_text(LOSSES)

    def start(self) -> None:
        self.worker.start("--pool", "prefork", "--concurrency", "1")

    def run_tasks(self, name: str, number: int = TASKS) -> set[str]:
        """Have the worker execute tasks; return the markers of their calls."""
        markers = {f"{name}-{one}" for one in range(number)}
        for marker in markers:
            self.worker.send("ask", marker)
        self.done += number
        self.worker.await_received_results(self.done)
        return markers

    def losses(self) -> dict[str, int]:
        """Ask the pool's one process what it has lost, by reason."""
        path = self.worker.directory / f"losses-{self.done}"
        self.worker.send("tell", str(path))
        self.done += 1
        await_(path.exists, "an answer of the worker")
        self.worker.await_received_results(self.done)
        found: dict[str, int] = json.loads(path.read_text())
        return found

    def arrived(self) -> set[str]:
        return {call["model"] for call in self.server.calls}


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(ingest=True) as server:
        yield server
        assert server.violations == []


@pytest.fixture
def disk(make_worker: Any, server: FaultyServer) -> Disk:
    return Disk(make_worker(server.url, WAXELL_FLUSH_INTERVAL="0.2"), server)


def await_healing(disk: Disk, before: set[str]) -> None:
    """Run tasks until their calls arrive, and wait for those of before."""

    def healed() -> bool:
        markers = disk.run_tasks(f"after{disk.done}", 3)
        return disk.server.wait_until(lambda: markers <= disk.arrived(), 5)

    await_(healed, "healing", 90)
    await_(lambda: before <= disk.arrived(), "what was written before")


def assert_said_once(disk: Disk, reason: str) -> None:
    """The pool's one process has warned once of what it lost, and so has the main process at most."""
    said = [line for line in disk.worker.text.splitlines() if "records are dropped" in line]
    assert [line.count(f"({reason})") for line in said if "ForkPoolWorker" in line] == [1], said
    assert "Traceback" not in disk.worker.text


# -- a real worker -----------------------------------------------------------------------------


def test_a_full_disk_costs_records_and_no_task(disk: Disk, server: FaultyServer, mount: Mount) -> None:
    """Given a disk that is full, and a server that is down, tasks go on and their records are counted as
    lost; when both are back, what was written before and what comes after arrives."""
    mount(disk.worker.spool, f"size={DISK}")
    server.mode("503")
    disk.start()
    before = disk.run_tasks("before")
    await_(lambda: server.fired["503"], "an attempt to deliver")
    filler = fill(disk.worker.spool)
    during = disk.run_tasks("during", 3 * TASKS)
    losses = disk.losses()
    assert losses.keys() == {"disk_full"}
    assert (
        2 * TASKS < losses["disk_full"] <= RECORDS * len(during) + 1
    )  # and the start of the task that tells
    filler.unlink()
    server.mode("healthy")
    await_healing(disk, before)
    assert_said_once(disk, "disk_full")


def test_a_directory_that_is_removed_is_made_again(disk: Disk, server: FaultyServer) -> None:
    """Given a spool that is removed under the worker, or moved away, what it records a second later is in a
    new one, and arrives, once, at a server that cannot tell repeats."""
    server.ingest = False
    disk.start()
    await_healing(disk, disk.run_tasks("before"))
    shutil.rmtree(disk.worker.spool)
    await_(lambda: disk.run_tasks(f"removed{disk.done}", 1) and disk.worker.spool.exists(), "a new spool", 20)
    await_healing(disk, set())
    disk.worker.spool.rename(disk.worker.directory / "elsewhere")
    await_(lambda: disk.run_tasks(f"moved{disk.done}", 1) and disk.worker.spool.exists(), "a new spool", 20)
    await_healing(disk, set())
    assert disk.losses() == {}
    calls = [call["model"] for call in server.calls]
    assert len(calls) == len(set(calls))


def test_a_disk_that_fails_becomes_read_only_and_is_mended(
    disk: Disk, server: FaultyServer, failing: FailingDisk
) -> None:
    """Given a file system that makes itself read-only since it met an error, tasks go on; when it was
    repaired and mounted again, what was written before and what comes after arrives."""
    server.mode("503")
    disk.start()
    before = disk.run_tasks("before")
    await_(lambda: server.fired["503"], "an attempt to deliver")
    failing.fail()
    during = disk.run_tasks("during", 3 * TASKS)
    losses = disk.losses()
    assert losses.keys() == {"spool_unavailable"}
    assert losses["spool_unavailable"] >= RECORDS * len(during)
    failing.mend()
    server.mode("healthy")
    await_healing(disk, before)
    assert_said_once(disk, "spool_unavailable")


def test_a_disk_that_was_read_only_from_the_start(disk: Disk, server: FaultyServer, mount: Mount) -> None:
    """Given a worker that starts on a read-only disk, it executes its tasks; once it can be written to, what
    they record arrives."""
    mount(disk.worker.spool, f"size={DISK},ro")
    disk.start()
    during = disk.run_tasks("during")
    assert disk.losses() == {"spool_unavailable": RECORDS * len(during) + 1}
    subprocess.run([*SUDO, "mount", "-o", "remount,rw", str(disk.worker.spool)], check=True)
    await_healing(disk, set())
    assert_said_once(disk, "spool_unavailable")


def test_a_spool_at_its_limit_takes_records_again_when_some_were_delivered(
    disk: Disk, server: FaultyServer
) -> None:
    """Given a server that is down and a spool at its limit, tasks go on and what is refused is counted; when
    the server is back, all that was taken arrives, and so does what comes after."""
    server.mode("503")
    disk.worker.settings["WAXELL_SPOOL_LIMIT"] = "1MiB"
    disk.start()
    before = disk.run_tasks("before")
    neighbour = disk.worker.spool / "neighbour"
    neighbour.mkdir()
    (neighbour / "000001.ndjson").write_bytes(bytes(1 << 20))
    large = disk.run_tasks("large", 3 * TASKS)
    while "spool_limit" not in (losses := disk.losses()):
        large |= disk.run_tasks(f"large{disk.done}", 3 * TASKS)
    assert losses.keys() == {"spool_limit"}
    (neighbour / "000001.ndjson").unlink()
    server.mode("healthy")
    await_healing(disk, before)
    assert_said_once(disk, "spool_limit")
