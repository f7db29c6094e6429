"""A full disk, under the writers and under the shipper: what is there is delivered, and that makes room.

On a file system of a few MiB where one may be mounted; what needs none has a limit on the size of files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.destination import Destination, call, ended, started
from tests.faults.disks import fill
from tests.faulty import FaultyServer
from tests.harness import await_, environment
from waxell_workers.core import reserve
from waxell_workers.core import shipper as shipping
from waxell_workers.core.collector import Collector
from waxell_workers.core.liveness import ship_lock
from waxell_workers.core.reader import Reader
from waxell_workers.core.records import LLMCall
from waxell_workers.core.segments import create_segment, segment_numbers, segment_path
from waxell_workers.core.shipper import Shipper

_DISK = 10 << 20


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(ingest=True) as server:
        yield server
        assert server.violations == []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 10 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(path)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)  # this process keeps `procs` open


def destination_on(disk: Path, server: FaultyServer) -> Destination:
    """A destination that may take as much of the disk as it likes."""
    destination = Destination(server, disk)
    destination.settings = replace(destination.settings, spool_limit=8 * _DISK)
    destination.collector = Collector(destination.settings)
    return destination


def record_runs(destination: Destination, count: int) -> None:
    for number in range(count):
        name = f"r{number}"
        destination.append(started(name), call(name), ended(name))


@contextmanager
def running(destination: Destination) -> Iterator[Shipper]:
    """A shipper at work in a thread."""
    shipper = Shipper(destination.settings, destination.directory, stay=True)
    thread = threading.Thread(target=shipper.run)
    thread.start()
    try:
        yield shipper
    finally:
        shipper.stop(time.monotonic() + 10)
        thread.join()


def test_what_fills_the_disk_is_delivered_and_gives_it_back(
    server: FaultyServer, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a full disk and no ledger yet, when a shipper starts, then thousands of records are delivered
    once each, their segment is deleted, records are taken again, and there is a reserve again."""
    destination = destination_on(disk, server)
    record_runs(destination, 4_000)
    fill(disk)
    collector = destination.collector
    late = partial(collector.record, LLMCall, run_id="r0", model="late")
    await_(lambda: not late(), "a refusal")  # after what the segment's last page takes
    taken = 12_000 + collector.stats().recorded
    monkeypatch.setattr(shipping, "SEGMENT_BYTES", os.path.getsize(segment_path(destination.directory, 1)))
    monkeypatch.setattr(shipping, "_TIDY_S", 0.1)
    with running(destination) as shipper:
        await_(lambda: shipper.delivered >= taken, "delivery", 60)
        await_(late, "room for a record", 20)
        await_(lambda: late() and 1 not in segment_numbers(destination.directory), "the segment's end", 20)
        await_(lambda: reserve.is_kept(destination.directory), "the reserve", 20)
        await_(lambda: shipper.pending == 0, "delivery", 20)
    # Or more: one that met a seal, and then no room, may have been read before it was counted as lost.
    assert len(server.calls) >= 4_000 + collector.stats().recorded
    assert server.duplicates == 0


def test_a_disk_that_fills_up_under_the_shipper_costs_no_repeat(server: FaultyServer, disk: Path) -> None:
    """Given a shipper at work whose disk is full when it commits, then the commit succeeds all the same: a
    server that could not tell repeats gets none."""
    server.ingest = False
    server.mode("503")
    destination = destination_on(disk, server)
    record_runs(destination, 300)
    with running(destination) as shipper:
        await_(lambda: server.fired["503"], "an attempt", 20)
        fill(disk)
        server.mode("healthy")
        await_(lambda: shipper.pending == 0, "delivery", 60)
    assert destination.ship().delivered == 0
    assert len(server.calls) == len(server.runs) == 300


_WAITS = """
import resource, threading
from waxell_workers.core import reserve, shipper as shipping
from waxell_workers.core.config import Settings
looks, keep = threading.Semaphore(0), reserve.keep

def look(directory):
    looks.release()
    return keep(directory)

reserve.keep, shipping._ROOM_S = look, 0.05
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
shipper = shipping.Shipper(Settings(api_url={url!r}, flush_interval=0.2), {directory!r}, stay={stay})
thread = threading.Thread(target=shipper.run)
thread.start()
alive = all(looks.acquire(timeout=20) for _ in range(5))
print(alive and thread.is_alive(), shipper.delivered, flush=True)
input()
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
thread.join()
"""


@pytest.mark.parametrize("stay", [False, True])
def test_a_shipper_without_room_waits_for_it(server: FaultyServer, tmp_path: Path, stay: bool) -> None:
    """Given no room at all, and no reserve that helps, a shipper keeps its place, sends nothing of which it
    could not write down that it has arrived, and goes on when there is room."""
    destination = Destination(server, tmp_path)
    record_runs(destination, 3)
    child = subprocess.Popen(
        [sys.executable, "-c", _WAITS.format(url=server.url, directory=destination.directory, stay=stay)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "True 0\n"
        assert server.requests == []
        assert not ship_lock(destination.directory).acquire()
        child.stdin.write("\n")
        child.stdin.flush()
        assert server.wait_until(lambda: len(server.records) == 9, 20)
    finally:
        child.kill()
        child.communicate()
    assert reserve.is_kept(destination.directory)


def limited(size: int, act: str, directory: str) -> str:
    """Do something in a process whose files may not grow beyond a size; return what it says."""
    code = (
        "import resource\n"
        "from waxell_workers.core.reader import Reader\n"
        "from waxell_workers.core.segments import create_segment\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        f"try: {act.format(repr(directory))}\n"
        "except OSError as error: print(type(error).__name__, error.errno)\n"
    )
    return run(code)


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    ).stdout


def test_a_segment_without_its_first_line_is_an_error(tmp_path: Path) -> None:
    """A first line that the disk took in part makes no segment, and says so."""
    assert limited(20, "create_segment({}, 1)", str(tmp_path)) == "OSError 28\n"
    assert os.listdir(tmp_path) == []


def test_the_highest_segment_is_never_sealed(tmp_path: Path) -> None:
    """Given a disk that takes no new segment, the old one stays open: there is nowhere else to write."""
    create_segment(str(tmp_path), 1)
    before = Path(segment_path(str(tmp_path), 1)).read_bytes()
    assert limited(20, "Reader({}, None, 0).rotate()", str(tmp_path)) == "OSError 28\n"
    assert Path(segment_path(str(tmp_path), 1)).read_bytes() == before
    Reader(str(tmp_path), None, 0).rotate()
    assert segment_numbers(str(tmp_path)) == [1, 2]


def test_the_reserve_is_there_from_the_first_record_on(server: FaultyServer, tmp_path: Path) -> None:
    """Whoever makes the first segment makes it, with real room behind it; a spool of before gets one when a
    shipper starts."""
    destination = Destination(server, tmp_path)
    destination.append(started("a"))
    path = Path(destination.directory, "reserve")
    assert path.stat().st_blocks * 512 >= reserve.RESERVE_BYTES
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    destination.ship()
    assert path.exists()


def test_where_there_is_no_room_for_a_reserve_records_are_written(tmp_path: Path) -> None:
    """A reserve is worth having, and no condition."""
    code = (
        "import resource\n"
        "from waxell_workers.core.collector import Collector\n"
        "from waxell_workers.core.config import Settings\n"
        "from waxell_workers.core.records import LLMCall\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"settings = Settings(api_url='http://127.0.0.1:9', spool_dir={str(tmp_path)!r})\n"
        "print(Collector(settings, in_worker=True).record(LLMCall, model='m'))\n"
    )
    assert run(code) == "True\n"
    [directory] = tmp_path.iterdir()
    assert sorted(path.name for path in directory.iterdir()) == ["000001.ndjson", "procs"]
