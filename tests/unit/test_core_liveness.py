"""Who lives and who ships: byte locks, seen from real processes."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import await_, environment
from waxell_workers.core import liveness
from waxell_workers.core.liveness import Procs, ShipLock, register

_HOLD = """
import sys, time
from waxell_workers.core.liveness import register, ship_lock
print({expression}, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start() -> Iterator[Callable[[str], tuple[subprocess.Popen[str], str]]]:
    children: list[subprocess.Popen[str]] = []

    def start(expression: str) -> tuple[subprocess.Popen[str], str]:
        child = subprocess.Popen(
            [sys.executable, "-c", _HOLD.format(expression=expression)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        children.append(child)
        assert child.stdout is not None
        return child, child.stdout.readline().strip()

    yield start
    for child in children:
        child.kill()
        child.communicate()


def test_a_killed_process_is_known_to_be_dead(tmp_path: Path, start: Callable[..., object]) -> None:
    """Given a process with a token, it lives until it is killed and no longer: a zombie is dead."""
    child, token = start(f"register({str(tmp_path)!r})")  # type: ignore[misc]
    procs = Procs(str(tmp_path))
    assert procs.is_alive(int(token))
    assert procs.anyone_alive()
    child.send_signal(signal.SIGKILL)
    await_(lambda: not procs.is_alive(int(token)), "death", 10)  # not reaped yet
    assert not procs.anyone_alive()


def test_a_stopped_process_lives(tmp_path: Path, start: Callable[..., object]) -> None:
    """A process that is stopped is not dead."""
    child, token = start(f"register({str(tmp_path)!r})")  # type: ignore[misc]
    child.send_signal(signal.SIGSTOP)
    assert Procs(str(tmp_path)).is_alive(int(token))


def test_the_own_token_lives(tmp_path: Path) -> None:
    """The kernel does not report a process its own locks; it is alive by definition."""
    procs = Procs(str(tmp_path))
    assert not procs.anyone_alive()
    token = register(str(tmp_path))
    assert procs.is_alive(token)
    assert procs.anyone_alive()
    assert not procs.is_alive(token + 1)
    assert not Procs(str(tmp_path.parent)).is_alive(token)


def test_a_forked_child_does_not_inherit_life(tmp_path: Path) -> None:
    """The parent's token is the parent's: a child sees it as another's, and has none until it registers."""
    token = register(str(tmp_path))
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        procs = Procs(str(tmp_path))
        seen = [procs._own() == set(), procs.is_alive(token), register(str(tmp_path)) != token]
        os.write(writing, repr(seen).encode())
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 100) == b"[True, True, True]"
    os.close(reading)
    os.waitpid(pid, 0)
    assert Procs(str(tmp_path)).is_alive(token)


def test_procs_is_private(tmp_path: Path) -> None:
    """The file of locks is ours alone."""
    register(str(tmp_path))
    assert stat.S_IMODE((tmp_path / "procs").stat().st_mode) == 0o600


_TOGETHER = """
import os, sys, threading
from waxell_workers.core import liveness
directory, late_one, registered = sys.argv[1], [], threading.Event()

class Slow:
    def __getattr__(self, name):
        return getattr(os, name)

    def getpid(self):
        if threading.get_ident() in late_one:  # has found that nobody was here before it, and is held up
            registered.wait(10)
        return os.getpid()

def late():
    late_one.append(threading.get_ident())
    liveness.register(directory)

liveness.os = Slow()
thread = threading.Thread(target=late)
thread.start()
while not late_one:
    pass
token = liveness.register(directory)
registered.set()
thread.join()
print(token, flush=True)
sys.stdin.read()
"""


def test_two_threads_that_come_first_leave_each_other_alive(tmp_path: Path) -> None:
    """Given two threads that both find this process new, the later one forgets nothing of the earlier one's:
    the token that it gave away stays locked."""
    child = subprocess.Popen(
        [sys.executable, "-c", _TOGETHER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert child.stdout is not None
        assert Procs(str(tmp_path)).is_alive(int(child.stdout.readline()))
    finally:
        child.kill()
        child.communicate()


def test_an_error_keeps_nobody_from_shipping(tmp_path: Path) -> None:
    """Given a lock file that could not be opened once, the same process can take the lock later."""
    (tmp_path / "ship.lock").mkdir()
    lock = ShipLock(str(tmp_path))
    with pytest.raises(IsADirectoryError):
        lock.acquire()
    (tmp_path / "ship.lock").rmdir()
    assert lock.acquire()
    lock.release()


def test_one_process_ships(tmp_path: Path, start: Callable[..., object]) -> None:
    """While another process holds the ship lock it is taken and cannot be had; after its death it can."""
    child, got = start(f"ship_lock({str(tmp_path)!r}).acquire()")  # type: ignore[misc]
    assert got == "True"
    lock = ShipLock(str(tmp_path))
    assert lock.taken()
    assert not lock.acquire()
    child.kill()
    await_(lambda: not lock.taken(), "free lock", 10)
    assert lock.acquire()
    assert lock.held
    lock.release()
    assert not lock.taken()


def test_one_thread_ships(tmp_path: Path) -> None:
    """The kernel would give a process its own lock twice: the object does not."""
    lock = liveness.ship_lock(str(tmp_path))
    assert liveness.ship_lock(str(tmp_path)) is lock
    got: list[bool] = []
    threads = [threading.Thread(target=lambda: got.append(lock.acquire())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]
    lock.release()
    lock.release()
    assert not lock.taken()


def test_asking_takes_nothing_from_the_holder(tmp_path: Path) -> None:
    """A forked child that asks, opens and exits leaves its parent's lock alone."""
    lock = ShipLock(str(tmp_path))
    assert lock.acquire()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if not lock.held and lock.taken() and not lock.acquire() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    code = f"from waxell_workers.core.liveness import ShipLock as S; print(S({str(tmp_path)!r}).taken())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "True\n"
    lock.release()


def test_a_replaced_procs_file_is_noticed(tmp_path: Path, start: Callable[..., object]) -> None:
    """A cleaner of temporary files may delete `procs`: whoever registers afterwards lives all the same."""
    procs = Procs(str(tmp_path))
    (tmp_path / "procs").unlink()
    _child, token = start(f"register({str(tmp_path)!r})")  # type: ignore[misc]
    assert procs.is_alive(int(token))
