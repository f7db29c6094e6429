"""The journal's writers: real files, real processes, and everything that may happen to a descriptor."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.harness import await_, environment
from waxell_workers.core import journal as module
from waxell_workers.core import spool
from waxell_workers.core.collector import Collector
from waxell_workers.core.config import Settings
from waxell_workers.core.journal import Journal
from waxell_workers.core.liveness import Procs
from waxell_workers.core.reader import Reader
from waxell_workers.core.records import LLMCall, Record
from waxell_workers.core.segments import create_segment, segment_numbers, segment_path

LINE = b'\n{"kind":"llm_call","id":"%d","at":1.0,"model":"m"}\n'


def settings(spool_dir: Path, **more: Any) -> Settings:
    return Settings(api_url="http://127.0.0.1:9", spool_dir=str(spool_dir), shipper="external", **more)


@pytest.fixture
def collector(tmp_path: Path) -> Collector:
    return Collector(settings(tmp_path / "spool"))


def read_all(directory: str) -> tuple[list[Record], int]:
    """Everything in a journal, in order, and how many lines were torn."""
    reader = Reader(directory, None, 0)
    records = []
    while entries := reader.read():
        records += [entry.record for entry in entries if entry.record is not None]
    reader.close()
    return records, reader.torn


def models(directory: str) -> list[str]:
    return [record.model for record in read_all(directory)[0] if isinstance(record, LLMCall)]


def fork(child: Any) -> int:
    """Run `child` in a forked process and return its exit code: 0 if it returned, 1 if it raised."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- what a write promises ------------------------------------------------------------------------


def test_a_record_survives_the_kill_that_follows_it(tmp_path: Path) -> None:
    """Given a process that is killed right after record() has returned, the record is in the journal."""
    code = """
import os, signal, sys, waxell_workers
waxell_workers.init(api_url="http://127.0.0.1:9", spool_dir=sys.argv[1], shipper="external", capture=())
waxell_workers.record_llm_call(model="last words")
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment(), timeout=60)
    assert done.returncode == -signal.SIGKILL
    (directory,) = tmp_path.iterdir()
    assert models(str(directory)) == ["last words"]


def test_everything_is_private(collector: Collector) -> None:
    """The directory is 0700 and its files are 0600, whatever the umask."""
    before = os.umask(0)
    try:
        collector.record(LLMCall, model="m")
    finally:
        os.umask(before)
    directory = Path(collector.journal.directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}


def test_a_directory_that_others_may_enter_is_closed_to_them(tmp_path: Path) -> None:
    """An existing directory of ours that is too open is made private."""
    chosen = settings(tmp_path)
    directory = tmp_path / chosen.destination
    directory.mkdir(mode=0o777)
    directory.chmod(0o777)
    assert Journal(chosen).open() == str(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_planted_symlink_is_refused(tmp_path: Path) -> None:
    """A symlink where the destination's directory should be is refused; records are dropped and counted."""
    chosen = settings(tmp_path / "spool")
    (tmp_path / "spool").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "spool" / chosen.destination).symlink_to(tmp_path / "elsewhere")
    collector = Collector(chosen)
    assert not collector.record(LLMCall, model="m")
    assert collector.journal.dropped.keys() == {"spool_unavailable"}
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    """What belongs to somebody else is not written to."""
    chosen = settings(tmp_path)
    directory = tmp_path / chosen.destination
    directory.mkdir()
    os.chown(directory, 65534, 65534)
    with pytest.raises(OSError, match="another user"):
        Journal(chosen).open()


def test_a_planted_segment_is_not_followed(tmp_path: Path) -> None:
    """A symlink in the place of a segment is refused: nothing is written through it."""
    collector = Collector(settings(tmp_path))
    directory = collector.journal.open()
    (tmp_path / "victim").write_bytes(b"")
    os.symlink(tmp_path / "victim", segment_path(directory, 1))
    assert not collector.record(LLMCall, model="m")
    assert (tmp_path / "victim").read_bytes() == b""


# --- forks and descriptors ------------------------------------------------------------------------


def test_a_forked_child_writes_for_itself(collector: Collector) -> None:
    """A child has a token of its own and ids of its own, and its records stand beside its parent's."""
    collector.record(LLMCall, model="before")
    for number in range(3):
        assert fork(lambda n=number: collector.record(LLMCall, model=f"child {n}")) == 0
    collector.record(LLMCall, model="after")
    records, torn = read_all(collector.journal.directory)
    assert torn == 0
    assert [r.model for r in records if isinstance(r, LLMCall)] == [
        "before", "child 0", "child 1", "child 2", "after"
    ]  # fmt: skip
    assert len({record.id for record in records}) == 5
    assert len({record.proc for record in records}) == 4
    procs = Procs(collector.journal.directory)
    assert [procs.is_alive(record.proc) for record in records] == [True, False, False, False, True]


def test_nothing_is_written_into_a_stranger_s_descriptor(collector: Collector, tmp_path: Path) -> None:
    """A child whose descriptors were closed and given to a socket and a file writes to the journal alone."""
    collector.record(LLMCall, model="parent")
    segment = collector.journal._segment
    assert segment is not None
    number = segment.descriptor

    def child() -> None:
        os.closerange(3, 4096)
        left, right = socket.socketpair()
        os.dup2(left.fileno(), number)
        stranger = os.open(tmp_path / "stranger", os.O_WRONLY | os.O_CREAT)
        for descriptor in range(number - 5, number + 5):
            if descriptor != number and descriptor not in (left.fileno(), right.fileno(), stranger):
                os.dup2(stranger, descriptor)
        assert collector.record(LLMCall, model="child")
        right.setblocking(False)
        try:
            assert right.recv(1) is None
        except BlockingIOError:
            pass
        os.fstat(number)  # and nothing was closed that is not ours

    assert fork(child) == 0
    assert (tmp_path / "stranger").read_bytes() == b""
    assert models(collector.journal.directory) == ["parent", "child"]


@pytest.mark.parametrize("given_to", ["nobody", "file"])
def test_a_descriptor_closed_under_the_process_is_noticed(
    collector: Collector, tmp_path: Path, given_to: str
) -> None:
    """The same in one process: closed by others, or closed and reused; the next record opens anew."""
    collector.record(LLMCall, model="a")
    segment = collector.journal._segment
    assert segment is not None
    os.close(segment.descriptor)
    stranger = os.open(tmp_path / "stranger", os.O_RDWR | os.O_CREAT)
    if given_to == "file":
        os.dup2(stranger, segment.descriptor)
    number = segment.descriptor
    del segment
    assert collector.record(LLMCall, model="b")
    assert models(collector.journal.directory) == ["a", "b"]
    assert os.read(stranger, 10) == b""
    if given_to == "file":
        os.close(number)
    os.close(stranger)


def test_no_descriptor_is_leaked(collector: Collector) -> None:
    """However often segments are sealed, a writer has one of them open."""
    collector.record(LLMCall, model="m")

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"))

    before = open_files()
    reader = Reader(collector.journal.directory, None, 0)
    for _ in range(20):
        reader.rotate()
        collector.record(LLMCall, model="m")
    assert open_files() == before


def test_many_threads_and_processes_write_at_once(collector: Collector) -> None:
    """Eight threads in each of three processes: no line is torn, none is missing, none stands twice."""

    def work(name: str) -> None:
        threads = [
            threading.Thread(
                target=lambda t=t: [collector.record(LLMCall, model=f"{name}-{t}-{i}") for i in range(50)]
            )
            for t in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    collector.journal.open()
    pids = []
    for number in range(2):
        pid = os.fork()
        if pid == 0:
            work(f"c{number}")
            os._exit(0)
        pids.append(pid)
    work("parent")
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    assert Counter(models(collector.journal.directory)) == Counter(
        f"{name}-{t}-{i}" for name in ("parent", "c0", "c1") for t in range(8) for i in range(50)
    )
    assert read_all(collector.journal.directory)[1] == 0


def test_a_record_after_the_seal_is_in_the_next_segment(collector: Collector) -> None:
    """A sealed segment takes no more records; the writer goes on in the highest one."""
    collector.record(LLMCall, model="old")
    reader = Reader(collector.journal.directory, None, 0)
    reader.rotate()
    collector.record(LLMCall, model="new")
    directory = collector.journal.directory
    assert segment_numbers(directory) == [1, 2]
    assert b'"new"' in Path(segment_path(directory, 2)).read_bytes()
    collector.record(LLMCall, model="newer")
    assert b'"newer"' not in Path(segment_path(directory, 1)).read_bytes()
    assert list(dict.fromkeys(models(directory))) == ["old", "new", "newer"]


def test_a_record_that_met_the_seal_is_repeated_in_the_next(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that may have come after the shipper's last read is made again, with the same id."""
    collector.record(LLMCall, model="old")
    directory = collector.journal.directory
    reader = Reader(directory, None, 0)

    def write(descriptor: int, line: bytes) -> int:
        monkeypatch.undo()
        reader.rotate()
        return os.write(descriptor, line)

    sealing_os = SimpleNamespace(**{name: getattr(os, name) for name in dir(os)} | {"write": write})
    monkeypatch.setattr(module, "os", sealing_os)
    assert collector.record(LLMCall, model="racer")
    records = [r for r in read_all(directory)[0] if isinstance(r, LLMCall)]
    assert [record.model for record in records] == ["old", "racer", "racer"]
    assert records[1].id == records[2].id
    assert b"racer" in Path(segment_path(directory, 2)).read_bytes()


def test_a_segment_appears_complete(tmp_path: Path) -> None:
    """Whoever makes a segment second changes nothing, and no temporary file stays."""
    create_segment(str(tmp_path), 1)
    Path(segment_path(str(tmp_path), 1)).write_bytes(b'{"kind":"segment","version":1}\nmore')
    create_segment(str(tmp_path), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["000001.ndjson"]
    assert Path(segment_path(str(tmp_path), 1)).read_bytes().endswith(b"more")


def test_a_directory_that_vanishes_is_made_again(collector: Collector) -> None:
    """Given a directory removed under a writer, records are soon safe in a new one, with a new token."""
    collector.record(LLMCall, model="gone")
    directory = collector.journal.directory
    shutil.rmtree(directory)

    def here() -> list[str]:
        assert collector.record(LLMCall, model="here")
        return models(directory) if Path(directory).exists() else []

    assert set(await_(here, "record", 10)) == {"here"}
    collector.record(LLMCall, model="next")
    records, _ = read_all(directory)
    assert Procs(directory).is_alive(records[-1].proc)


# --- what cannot be written -----------------------------------------------------------------------


def test_a_torn_line_spoils_no_neighbour(collector: Collector) -> None:
    """What a dying writer left is counted once something follows it, and the records around it are whole."""
    collector.record(LLMCall, model="a")
    directory = collector.journal.directory
    with Path(segment_path(directory, 1)).open("ab") as file:
        file.write(b'\n{"kind":"llm_call","id":"x","at":1.0,"mod')
    assert read_all(directory)[1] == 0
    collector.record(LLMCall, model="b")
    assert models(directory) == ["a", "b"]
    assert read_all(directory)[1] == 1


def test_a_torn_line_at_the_end_of_a_sealed_segment_is_counted(collector: Collector) -> None:
    """Nothing can follow it there: it is passed over, and reading goes on in the next segment."""
    collector.record(LLMCall, model="a")
    directory = collector.journal.directory
    with Path(segment_path(directory, 1)).open("ab") as file:
        file.write(b'\n{"kind":"llm_ca')
    Reader(directory, None, 0).rotate()
    collector.record(LLMCall, model="b")
    assert list(dict.fromkeys(models(directory))) == ["a", "b"]
    assert read_all(directory)[1] == 1


def test_a_short_write_is_counted_and_isolated(tmp_path: Path) -> None:
    """Where the file may not grow, a record written in part is dropped; when there is room again it heals."""
    collector = Collector(settings(tmp_path))
    collector.record(LLMCall, model="a")
    size = Path(segment_path(collector.journal.directory, 1)).stat().st_size

    def child() -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
        assert collector.record(LLMCall, model="b") is False
        assert collector.record(LLMCall, model="c") is False
        assert collector.journal.dropped == {"disk_full": 2}
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        await_(lambda: collector.record(LLMCall, model="d"), "healing", 20)

    assert fork(child) == 0
    assert models(collector.journal.directory) == ["a", "d"]
    assert read_all(collector.journal.directory)[1] == 1


def fill(collector: Collector, size: int) -> Path:
    filler = Path(collector.settings.spool_dir) / "another destination"
    filler.mkdir(parents=True, exist_ok=True)
    (filler / "000001.ndjson").write_bytes(b"x" * size)
    return filler / "000001.ndjson"


def test_the_limit_holds_for_the_whole_spool_and_heals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Past spool_limit records are refused, with one warning; once something is deleted they are taken."""
    collector = Collector(settings(tmp_path, spool_limit=1 << 20))
    assert collector.record(LLMCall, model="a")
    collector = Collector(settings(tmp_path, spool_limit=1 << 20))
    filler = fill(collector, 1 << 20)
    assert not any(collector.record(LLMCall, model="b") for _ in range(5))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    filler.unlink()
    await_(lambda: collector.record(LLMCall, model="c"), "healing", 20)
    assert models(collector.journal.directory)[:2] == ["a", "c"]


def test_each_refused_record_is_counted_once(tmp_path: Path) -> None:
    """Ten records refused are ten dropped."""
    collector = Collector(settings(tmp_path, spool_limit=1 << 20))
    fill(collector, 1 << 20)
    for _ in range(10):
        assert not collector.record(LLMCall, model="m")
    assert collector.journal.dropped == {"spool_limit": 10}


@pytest.mark.parametrize("configured", [True, False])
def test_a_forked_child_has_lost_nothing_of_its_parent_s(tmp_path: Path, configured: bool) -> None:
    """A child's losses are its own, and so is what its first flush says."""
    loopback = "http://127.0.0.1:9" if configured else ""
    collector = Collector(Settings(api_url=loopback, spool_dir=str(tmp_path / "file"), shipper="external"))
    (tmp_path / "file").write_text("")
    for _ in range(3):
        assert not collector.record(LLMCall, model="m")
    [(reason, lost)] = collector.stats().dropped.items()

    def child() -> None:
        assert collector.stats().dropped == {}
        assert collector.force_flush(0).dropped == 0
        collector.record(LLMCall, model="m")
        assert collector.stats().dropped == {reason: 1}
        assert collector.force_flush(0).dropped == 1

    assert fork(child) == 0
    assert (lost, collector.stats().dropped) == (3, {reason: 3})
    assert collector.force_flush(0).dropped == 3


def test_without_a_spool_nothing_is_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A spool that cannot be made costs the records, never the task."""
    (tmp_path / "file").write_text("")
    collector = Collector(settings(tmp_path / "file"))
    for _ in range(3):
        assert not collector.record(LLMCall, model="m")
    collector.boot()
    assert set(collector.journal.dropped) == {"spool_unavailable"}
    assert caplog.text.count("records are dropped") == 1


def test_a_network_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Locks and appends mean little there: refused, with a warning, once."""
    monkeypatch.setattr(spool, "file_system", lambda path: "nfs4")
    monkeypatch.setattr(spool, "_refused", set())
    for _ in range(2):
        with pytest.raises(spool.SpoolUnavailable, match="network file system"):
            spool.prepare(settings(tmp_path))
    assert caplog.text.count("nfs4") == 1


def test_candidates_come_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The unit's state directory, the user's, the temporary one, and memory last; a configured one alone."""
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/a:/var/lib/b")
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    found = spool.candidates(Settings())
    assert found[:2] == ["/var/lib/a/waxell-workers", "/xdg/waxell-workers"]
    assert found[-1] == f"/dev/shm/waxell-workers-{os.geteuid()}"
    assert spool.candidates(settings(tmp_path)) == [str(tmp_path)]


def test_memory_is_used_where_there_is_no_temporary_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only container has no temporary directory: the other candidates are still tried."""

    def none_usable() -> str:
        raise FileNotFoundError("no usable temporary directory found")

    monkeypatch.setattr(spool.tempfile, "gettempdir", none_usable)
    assert spool.candidates(Settings())[-1].startswith("/dev/shm/")
