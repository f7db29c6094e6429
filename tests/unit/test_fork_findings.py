"""What the tests of forks and of closed descriptors have found, each ruled out by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.destination import Destination, ended, started
from tests.faulty import FaultyServer
from tests.harness import await_, environment
from waxell_workers.core import foreground, liveness, tracking
from waxell_workers.core.liveness import Procs, ship_lock
from waxell_workers.core.shipper import Shipper


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(ingest=True) as server:
        yield server


@pytest.fixture
def destination(server: FaultyServer, tmp_path: Path) -> Destination:
    return Destination(server, tmp_path)


def seems_alive(destination: Destination, token: int) -> bool:
    """Ask another process."""
    code = (
        "from waxell_workers.core.liveness import Procs\n"
        f"sys.exit(0 if Procs({destination.directory!r}).is_alive({token}) else 1)\n"
    )
    return destination.child(code).returncode == 0


def test_a_shipper_in_the_same_process_does_not_make_it_seem_dead(destination: Destination) -> None:
    """Asking who lives opens `procs`, and closing any descriptor of it would free the process's own byte."""
    token = destination.collector.journal.token()
    assert seems_alive(destination, token)
    Procs(destination.directory)
    assert seems_alive(destination, token)


def test_threads_that_register_at_once_all_seem_alive(tmp_path: Path) -> None:
    """Each thread's registration leaves the others' bytes locked."""
    with FaultyServer() as server:
        for attempt in range(5):
            destination = Destination(server, tmp_path / str(attempt))
            directory = f"{destination.directory}/fresh"
            os.mkdir(directory)
            barrier = threading.Barrier(8)

            def register(_: int, directory: str = directory, barrier: threading.Barrier = barrier) -> int:
                barrier.wait()
                return liveness.register(directory)

            with ThreadPoolExecutor(8) as pool:
                tokens = list(pool.map(register, range(8)))
            code = f"from waxell_workers.core.liveness import Procs\np = Procs({directory!r})\n"
            alive = f"sys.exit(0 if all(p.is_alive(t) for t in {tokens!r}) else 1)\n"
            assert destination.child(code + alive).returncode == 0


def test_a_closed_descriptor_is_opened_again_under_the_same_token(destination: Destination) -> None:
    """A process whose descriptors were closed takes its own byte again: its open runs are not dead."""
    journal = destination.collector.journal
    token = journal.token()
    for descriptor in liveness._held().opened.values():
        if os.path.samestat(os.fstat(descriptor), os.stat(f"{destination.directory}/procs")):
            os.close(descriptor)
    assert not seems_alive(destination, token)
    journal._token_pid = 0  # what the journal does when it finds its descriptor gone
    journal.open()
    assert journal.token() == token
    assert seems_alive(destination, token)


def test_the_right_to_ship_is_not_asked_of_a_stranger_s_descriptor(
    destination: Destination, tmp_path: Path
) -> None:
    """Where the lock's descriptor was closed and its number given away, the file is opened again."""
    lock = ship_lock(destination.directory)
    assert not lock.taken()
    with (tmp_path / "stranger").open("w") as stranger:
        os.dup2(stranger.fileno(), lock._descriptor)
    code = f"import waxell_workers.core.liveness as l\nl.ship_lock({destination.directory!r}).acquire()\n"
    holder = threading.Thread(target=destination.child, args=(f"{code}time.sleep(3)\n",))
    holder.start()
    try:
        deadline = time.monotonic() + 30
        while not lock.taken():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        holder.join()


def test_a_drain_takes_over_from_a_shipper_that_is_leaving(
    server: FaultyServer, destination: Destination
) -> None:
    """A drain that finds the lock taken, and nobody who takes requests, does not ask until its time is up."""
    destination.append(started("a"), ended("a"))
    leaving = f"import waxell_workers.core.liveness as l\nl.ship_lock({destination.directory!r}).acquire()\n"
    holder = threading.Thread(target=destination.child, args=(f"{leaving}time.sleep(2)\n",))
    holder.start()
    while not ship_lock(destination.directory).taken():
        time.sleep(0.01)
    began = time.monotonic()
    assert foreground.run(destination.settings, drain=True, timeout=300.0)
    assert time.monotonic() - began < 150
    holder.join()
    assert len(server.records) == 2


def test_a_forked_child_lives_and_dies_under_a_token_of_its_own(destination: Destination) -> None:
    """A child that went on under its parent's token would seem to live as long as the parent does."""
    code = (
        "journal = current().journal\n"
        "token = journal.token()\n"
        "reading, writing = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.write(writing, str(journal.token()).encode())\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "child = int(os.read(reading, 100))\n"
        "from waxell_workers.core.liveness import Procs\n"
        "procs = Procs(journal.directory)\n"
        "sys.exit(not (procs.is_alive(token) and child != token and not procs.is_alive(child)))\n"
    )
    assert destination.child(code).returncode == 0


def test_one_that_lives_again_is_not_ended(
    server: FaultyServer, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a process whose descriptors are closed for a while, when the shipper has taken it for dead, then
    its next record makes it live again, and its run goes on."""
    code = (
        "with waxell_workers.WaxellContext('a') as run:\n"
        "    os.closerange(3, 4096)\n"
        "    print('closed', flush=True); sys.stdin.readline()\n"
        "    run.record_llm_call(model='m')\n"
        "    print('back', flush=True); sys.stdin.readline()\n"
    )
    shipper = Shipper(destination.settings, destination.directory, stay=True)
    shipping = threading.Thread(target=shipper.run)
    shipping.start()
    settings = {"WAXELL_API_URL": server.url, "WAXELL_SPOOL_DIR": destination.settings.spool_dir}
    with subprocess.Popen(
        [sys.executable, "-c", f"import os, sys, waxell_workers\nwaxell_workers.init(capture=())\n{code}"],
        env=environment(WAXELL_SHIPPER="external", **settings),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == "closed\n"
            tracker = await_(lambda: getattr(shipper, "_tracker", None), "tracker")
            await_(lambda: tracker._dead, "death")
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "back\n"
            monkeypatch.setattr(tracking, "_REASON_GRACE_S", 0.0)
            looked_at = tracker._looked_at
            await_(lambda: tracker._looked_at > looked_at + 1, "looks")
            process.communicate("\n", timeout=60)
        finally:
            process.kill()
            shipper.stop(time.monotonic() + 30)
            shipping.join()
    ends = [record for record in server.records.values() if record["kind"] == "run_ended"]
    assert [end.get("state", "success") for end in ends] == ["success"]


TASKS = (
    "from waxell_workers.core import tasks\n"
    "from waxell_workers.core.runs import get_context\n"
    "def begin(name):\n"
    "    attempt = tasks.prepare(tasks.Task('test', name, name), tasks.Options())\n"
    "    tasks.begin(attempt)\n"
    "    return attempt\n"
    "first = begin('first')\n"
    "waxell_workers.WaxellContext('left').__enter__()  # an interrupt came as its block ended\n"
)


@pytest.mark.parametrize("end", ["tasks.task_ended(first, 'error')\n", ""], ids=["ended", "interrupted"])
def test_a_block_that_was_never_left_is_no_parent_of_the_next_task(
    destination: Destination, end: str
) -> None:
    """What an interrupt left current inside a task is over when the task is, or when the next one begins."""
    code = f"{TASKS}{end}second = begin('second')\nparent = second.run.parent_run_id\n"
    code += "tasks.task_ended(second, 'success')\nsys.exit(parent is not None or get_context() is not None)\n"
    assert destination.child(code).returncode == 0
