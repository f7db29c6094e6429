"""Each call that writers and the shipper make to the operating system fails, one after the other, with each
error that a disk knows: nothing is raised, what was lost is counted, and the next record is safe.

The calls are those of our own modules; what SQLite does by itself meets real disks of a few pages.
"""

# ruff: noqa: F811  fixtures that are imported
from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.destination import Destination, call, ended, started
from tests.faults.disks import SUDO, Mount, fill, mount  # noqa: F401  fixtures
from tests.faulty import FaultyServer
from tests.harness import await_, environment
from tests.torture import effort, found
from waxell_workers.core import journal as journals
from waxell_workers.core import liveness, spool
from waxell_workers.core import shipper as shipping
from waxell_workers.core.collector import Collector
from waxell_workers.core.config import Settings
from waxell_workers.core.exporting import Outcome
from waxell_workers.core.reader import Reader
from waxell_workers.core.records import LLMCall
from waxell_workers.core.segments import segment_path
from waxell_workers.core.shipper import Shipper

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE, errno.EDQUOT, errno.ENOMEM)
CALLS = {
    os: (
        *(
            "open",
            "write",
            "lseek",
            "pread",
            "pwrite",
            "fstat",
            "stat",
            "lstat",
            "listdir",
            "scandir",
            "close",
        ),
        *("link", "unlink", "mkdir", "statvfs", "chmod", "access", "posix_fallocate", "utime", "replace"),
    ),
    fcntl: ("lockf", "fcntl"),
}
OURS = "waxell_workers.core."


class Fault:
    """Fails one call of ours to the operating system: the one with this number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fired = ""
        self._calls = 0
        self._at = 0
        self._error = 0
        for module, names in CALLS.items():
            for name in names:
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, self._failing(name, getattr(module, name)))

    def _failing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call_it(*args: Any, **kwargs: Any) -> Any:
            if self._at and self._is_ours():
                self._calls += 1
                if self._calls == self._at:
                    self.fired = f"{name} fails with {errno.errorcode[self._error]}"
                    if name == "close":  # Linux closes, and then tells
                        real(*args, **kwargs)
                    if name == "access":
                        return False
                    raise OSError(self._error, os.strerror(self._error))
            return real(*args, **kwargs)

        return call_it

    @staticmethod
    def _is_ours() -> bool:
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_globals["__name__"] == "os":
            frame = frame.f_back
        return str(frame.f_globals["__name__"]).startswith(OURS)

    @contextmanager
    def at(self, number: int, error: int) -> Iterator[None]:
        """Fail that call while the block lasts."""
        self.fired, self._calls, self._error, self._at = "", 0, error, number
        yield
        self._at = 0


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    monkeypatch.setattr(journals, "_PAUSE_S", 0.0)
    monkeypatch.setattr(journals, "_LOOK_S", 0.0)
    monkeypatch.setattr(shipping, "_ROOM_S", 0.001)
    return Fault(monkeypatch)


def forget(directory: Path) -> None:
    """Close what this process keeps open of a spool for its life, and delete it: there are many."""
    held = liveness._held()
    for name in ("procs", "ship.lock"):
        with suppress(FileNotFoundError):
            status = (directory / name).stat()
            descriptor = held.opened.pop((status.st_dev, status.st_ino), None)
            held.tokens.pop((status.st_dev, status.st_ino), None)
            if descriptor is not None:
                os.close(descriptor)
    lock = liveness._ship_locks.pop(str(directory), None)
    if lock is not None and lock._descriptor >= 0:
        with suppress(OSError):
            os.close(lock._descriptor)
    shutil.rmtree(directory.parent)


def models(directory: str) -> list[str]:
    reader, read = Reader(directory, None, 0), []
    while entries := reader.read():
        read += [entry.record.model for entry in entries if isinstance(entry.record, LLMCall)]
    reader.close()
    return read


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.__getitem__)
def test_each_call_of_a_writer_may_fail(
    tmp_path: Path, fault: Fault, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever call fails, each record is in the journal or counted, and the next one is in the journal."""
    caplog.set_level(logging.CRITICAL)
    fired = []
    for number in count(1):
        settings = Settings(
            api_url="http://127.0.0.1:9", spool_dir=str(tmp_path / f"{number}"), shipper="external"
        )
        collector = Collector(settings)
        with fault.at(number, error):
            taken = ["a"] if collector.record(LLMCall, model="a") else []
            collector.stats()
            if directory := collector.journal.directory:
                with suppress(OSError):  # not a writer's, but the shipper's
                    Reader(directory, None, 0).rotate()
            taken += ["b"] if collector.record(LLMCall, model="b") else []
        taken += ["c"] if collector.record(LLMCall, model="c") else []
        assert "c" in taken, fault.fired
        directory = collector.journal.directory
        assert set(taken) <= set(models(directory)), fault.fired
        assert collector.stats().recorded == len(taken)
        assert sum(collector.stats().dropped.values()) == 3 - len(taken), fault.fired
        forget(Path(directory))
        if not fault.fired:
            break
        fired.append(fault.fired)
    found("each call of a writer fails", error=errno.errorcode[error], faults=len(fired))
    assert len(fired) > 30


class Memory:
    """An exporter to a list."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def export(self, batch: Any, deadline: float) -> Outcome:
        ids = {record.id for run in batch for record in run.records}
        self.ids += ids
        return Outcome(acknowledged=ids)

    def close(self) -> None:
        pass


def test_each_call_of_a_shipper_may_fail(
    tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever call fails, a shipper that stays, or the one that follows it, delivers everything."""
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(shipping, "SEGMENT_BYTES", 500)
    monkeypatch.setattr(shipping, "_TIDY_S", 0.0)
    monkeypatch.setattr(shipping, "_POLL_S", 0.001)
    fired, left, repeated = [], 0, 0
    errors = effort(1, len(ERRORS))
    for turn in count():
        number, error = 1 + turn // errors, ERRORS[turn % len(ERRORS)]
        exporter = Memory()
        monkeypatch.setattr(shipping, "load_exporter", lambda settings, to=exporter: to)
        directory, settings = journal_of_two_runs(tmp_path / f"{turn}")
        with fault.at(number, error):
            left += not delivers_while_it_stays(Shipper(settings, directory, stay=True))
        shipper = Shipper(settings, directory, stay=False)
        shipper.stop(time.monotonic() + 10)
        assert shipper.run(0.0)
        assert (shipper.pending, shipper.unreadable) == (0, False), fault.fired
        assert set(exporter.ids) == {f"{run}-{kind}" for run in "ab" for kind in ("s", "c0", "e")}, (
            fault.fired
        )
        repeated += len(exporter.ids) > 6
        forget(Path(directory))
        if not fault.fired:
            break
        fired.append(fault.fired)
    found("each call of a shipper fails", faults=len(fired), left=left, repeated=repeated)
    assert len(fired) > 50
    assert repeated == 0
    assert left <= len(fired) // 8  # most are waited for; without the lock, or the directory, one has to go


def journal_of_two_runs(spool_dir: Path) -> tuple[str, Settings]:
    settings = Settings(
        api_url="http://127.0.0.1:9", spool_dir=str(spool_dir), shipper="external", flush_interval=0.001
    )
    collector = Collector(settings)
    for run in "ab":
        for record in (started(run), call(run), ended(run)):
            assert collector.write(msgspec.structs.replace(record, proc=collector.token()))
    return collector.journal.directory, settings


def delivers_while_it_stays(shipper: Shipper) -> bool:
    """Have a shipper work until it has delivered all and rotated, or has left; true if it did not leave."""
    thread = threading.Thread(target=shipper.run)
    thread.start()
    deadline = time.monotonic() + 20
    while thread.is_alive() and not has_rotated(shipper) and time.monotonic() < deadline:
        time.sleep(0.002)
    stayed = thread.is_alive()
    shipper.stop(time.monotonic() + 10)
    thread.join(20)
    assert not thread.is_alive()
    return stayed


def has_rotated(shipper: Shipper) -> bool:
    return shipper.pending == 0 and os.path.exists(segment_path(shipper._directory, 2))


# -- real disks that have next to nothing left -------------------------------------------------


@pytest.mark.parametrize("kept", [True, False], ids=["with a reserve", "without a reserve"])
def test_a_disk_with_a_few_pages_left(tmp_path: Path, mount: Mount, kept: bool) -> None:
    """Given a disk on which so many pages are left, a shipper either delivers or waits for room, and all has
    arrived once there is some; with a reserve at once, and without a repeat."""
    waited = 0
    pages = range(0, 48, effort(8, 1))
    for number in pages:
        disk = mount(tmp_path / f"{number}", "size=8m")
        with FaultyServer() as server:
            waited += not ships_from_a_full_disk(server, disk, number, kept=kept)
    found("a disk with a few pages left", disks=len(pages), waited=waited)
    assert (waited > 0) is not kept


def ships_from_a_full_disk(server: FaultyServer, disk: Path, pages: int, *, kept: bool) -> bool:
    """Ship from a disk with so many pages left, then with room; true if all had arrived before there was."""
    destination = Destination(server, disk)
    destination.settings = replace(destination.settings, spool_limit=1 << 30)
    destination.collector = Collector(destination.settings)
    for number in range(40):
        destination.append(started(f"{number}"), call(f"{number}"), ended(f"{number}"))
    if not kept:
        Path(destination.directory, "reserve").unlink()
    filler = fill(disk)
    os.truncate(filler, filler.stat().st_size - pages * 4096)
    shipper = Shipper(destination.settings, destination.directory, stay=True)
    thread = threading.Thread(target=shipper.run)
    thread.start()
    try:
        await_(lambda: len(server.calls) >= 40 or shipper._waits_for, "delivery, or a wait for room", 30)
        at_once = not shipper._waits_for
        assert thread.is_alive()
        filler.unlink()
        await_(lambda: shipper.pending == 0, "delivery", 30)
    finally:
        shipper.stop(time.monotonic() + 10)
        thread.join()
    assert {call["model"] for call in server.calls} == {f"{number}-0" for number in range(40)}
    assert len(server.calls) == 40 if kept else len(server.calls) <= 80  # one batch that could not be noted
    assert server.violations == []
    forget(Path(destination.directory))
    return at_once


def test_a_disk_with_a_few_inodes_left(tmp_path: Path, mount: Mount) -> None:
    """Given a disk on which so many files can be made, then as many as one likes, everything arrives."""
    missing = 0
    for number in range(0, 12, effort(3, 1)):
        disk = mount(tmp_path / f"{number}", f"size=16m,nr_inodes={number + 2}")
        with FaultyServer() as server:
            missing += not ships_with_few_inodes(server, disk)
    assert missing >= 2


def ships_with_few_inodes(server: FaultyServer, disk: Path) -> bool:
    """Record and ship where few files can be made, then where many can; true if all arrived before."""
    settings = Settings(
        api_url=server.url, spool_dir=str(disk / "spool"), shipper="thread", flush_interval=0.05
    )
    collector = Collector(settings)
    taken = [model for model in "abc" if collector.record(LLMCall, model=model)]
    assert len(taken) + sum(collector.stats().dropped.values()) == 3
    collector.force_flush(1.0)
    at_once = len(server.calls) == 3
    subprocess.run([*SUDO, "mount", "-o", "remount,nr_inodes=1000", str(disk)], check=True)

    def healed() -> bool:
        collector.ensure_shipper()
        return collector.record(LLMCall, model="d")

    await_(healed, "room for a record", 20)
    await_(lambda: collector.force_flush(1.0).pending == 0, "a flush", 30)
    assert set(taken) | {"d"} <= {call["model"] for call in server.calls}
    collector.shutdown(5)
    return at_once


# -- another directory in its place ------------------------------------------------------------


@pytest.mark.parametrize("level", ["destination", "root"])
def test_a_link_in_the_place_of_a_spool_that_was_removed_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """Given a worker whose spool is removed, and a link to somebody else's directory planted there, nothing
    is written behind the link, and records are counted as lost, until the link has gone."""
    monkeypatch.setattr(journals, "_PAUSE_S", 0.0)
    monkeypatch.setattr(journals, "_LOOK_S", 0.0)
    monkeypatch.setattr(spool, "candidates", lambda settings: [str(tmp_path / "state" / "waxell-workers")])
    collector = Collector(Settings(api_url="http://127.0.0.1:9", shipper="external"))
    assert collector.record(LLMCall, model="a")
    directory = Path(collector.journal.directory)
    place = directory if level == "destination" else directory.parent
    theirs = tmp_path / "theirs"
    shutil.copytree(place, theirs)
    before = sorted((path, path.stat().st_size) for path in theirs.rglob("*"))
    shutil.rmtree(place)
    place.symlink_to(theirs)
    assert not collector.record(LLMCall, model="b")
    assert collector.stats().dropped == {"spool_unavailable": 1}
    assert sorted((path, path.stat().st_size) for path in theirs.rglob("*")) == before
    place.unlink()
    assert collector.record(LLMCall, model="c")
    assert models(collector.journal.directory) == ["c"]


def test_a_shipper_whose_directory_was_replaced_leaves_it_to_another(tmp_path: Path) -> None:
    """Given a spool that is moved away and made anew at once, the old shipper leaves, and lets go."""
    with FaultyServer() as server:
        destination = Destination(server, tmp_path)
        shipper = Shipper(destination.settings, destination.directory, stay=True)
        thread = threading.Thread(target=shipper.run)
        thread.start()
        try:
            lock = liveness.ship_lock(destination.directory)
            await_(lambda: lock.held, "the lock")
            os.rename(tmp_path / "spool", tmp_path / "elsewhere")
            assert lock.is_in_place() is False
            assert destination.collector.journal.open() == destination.directory
            thread.join(20)
            assert not thread.is_alive()
        finally:
            shipper.stop(time.monotonic())
            thread.join(20)
        assert not lock.held
        assert not lock.taken()


# -- limits and rights -------------------------------------------------------------------------

OUT_OF_DESCRIPTORS = """
import os, resource, sys, time, waxell_workers
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
waxell_workers.init(
    api_url=sys.argv[1], spool_dir=sys.argv[2], shipper="thread", flush_interval=0.1, capture=()
)
if sys.argv[3] == "opened":
    waxell_workers.record_llm_call(model="before")
    waxell_workers.force_flush(10)
taken = []
try:
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
for number in range(20):
    waxell_workers.record_llm_call(model=f"during-{number}")
print(waxell_workers.stats().dropped.get("no_descriptor", 0), flush=True)
time.sleep(1.5)
for descriptor in taken:
    os.close(descriptor)
deadline = time.monotonic() + 60
while waxell_workers.force_flush(1).pending or "after" not in sys.argv:
    waxell_workers.record_llm_call(model="after")
    sys.argv.append("after")
    assert time.monotonic() < deadline
"""


@pytest.mark.parametrize("when", ["opened", "not opened"])
def test_a_process_without_descriptors(tmp_path: Path, when: str) -> None:
    """Given a process that may open nothing more, what it cannot write is counted; once it may, all that it
    records arrives, by its own thread."""
    with FaultyServer(ingest=True) as server:
        command = [sys.executable, "-c", OUT_OF_DESCRIPTORS, server.url, str(tmp_path / "spool"), when]
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        arrived = {call["model"] for call in server.calls}
    assert "after" in arrived
    assert len([model for model in arrived if model.startswith("during")]) == 20 - int(done.stdout)
    assert int(done.stdout) == (0 if when == "opened" else 20)


FORBIDDEN = """
import os, sys, time, waxell_workers
if os.geteuid() == 0:
    import waxell_workers.core.shipper, waxell_workers.core.foreground
    from waxell_workers.core.shipper import preload
    from waxell_workers.core.config import Settings
    preload(Settings())
    os.setgroups([]), os.setegid(65534), os.seteuid(65534)
waxell_workers.init(
    api_url=sys.argv[1], spool_dir=sys.argv[2], shipper="thread", flush_interval=0.1, capture=()
)
waxell_workers.record_llm_call(model="before")
waxell_workers.force_flush(10)
spool = waxell_workers.stats().spool
os.chmod(spool, 0)
for number in range(4):
    waxell_workers.record_llm_call(model=f"during-{number}")
    time.sleep(0.5)
thread = [thread for thread in __import__("threading").enumerate() if thread.name == "waxell-shipper"]
print(len(thread), flush=True)
os.chmod(spool, 0o700)
deadline = time.monotonic() + 60
waxell_workers.record_llm_call(model="after")
while waxell_workers.force_flush(1).pending:
    waxell_workers.record_llm_call(model="after")
    assert time.monotonic() < deadline
lost = waxell_workers.stats().dropped
assert set(lost) <= {"spool_unavailable"}, lost
"""


def test_a_directory_whose_rights_are_taken_away(everybodys: Path) -> None:
    """Given a user who may not enter the spool for a while, nothing is raised, the shipper waits where it is,
    and what is recorded afterwards arrives."""
    with FaultyServer(ingest=True) as server:
        command = [sys.executable, "-c", FORBIDDEN, server.url, str(everybodys / "spool")]
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == "1\n"
        assert {"before", "after"} <= {call["model"] for call in server.calls}


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """A directory that another user reaches, which pytest's own are not."""
    directory = Path(tempfile.mkdtemp(prefix="waxell-rights-"))
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)
