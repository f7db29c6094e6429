"""What the torture found, made small: untrue flushes, runs that nobody closed, repeats that nobody knew."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.destination import Destination, call, ended, started, states
from tests.faulty import FaultyServer
from tests.harness import await_, environment
from waxell_workers import WaxellContext, get_context
from waxell_workers.core import collector, journal, liveness, reader, tasks, window
from waxell_workers.core.flush import request_flush
from waxell_workers.core.reader import Reader
from waxell_workers.core.records import LLMCall
from waxell_workers.core.segments import FIRST_LINE, segment_path
from waxell_workers.core.shipper import Shipper
from waxell_workers.core.tracking import Tracker

SIGNS_OF_LIFE_S = 30.0
TORN = b'\n{"kind":"llm_call","id":"x","at":1.0,"mod'


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(ingest=True) as server:
        yield server


@pytest.fixture
def destination(server: FaultyServer, tmp_path: Path) -> Destination:
    return Destination(server, tmp_path)


@contextmanager
def shipping(destination: Destination) -> Iterator[Shipper]:
    """A shipper in a thread of this process, that takes requests."""
    shipper = Shipper(destination.settings, destination.directory, stay=True)
    thread = threading.Thread(target=shipper.run)
    thread.start()
    try:
        await_(Path(destination.directory, "ship.sock").exists, "socket", SIGNS_OF_LIFE_S)
        yield shipper
    finally:
        shipper.stop(time.monotonic())
        thread.join(SIGNS_OF_LIFE_S)


def test_what_was_not_read_yet_is_not_delivered(
    server: FaultyServer, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a server that is down and a backlog too long to be read, when a flush's time is over, then its
    answer is not that nothing is pending."""
    monkeypatch.setattr(window, "MOST_ENTRIES", 3)
    monkeypatch.setattr(reader, "_CHUNK", 1024)
    server.mode("refuse")
    destination.append(*(call("others", number) for number in range(20)))
    destination.collector.record(LLMCall, model="mine")
    with shipping(destination):
        for _ in range(3):
            assert not destination.collector.force_flush(0.5)
        server.mode("healthy")
        assert await_(lambda: destination.collector.force_flush(5.0), "delivery", SIGNS_OF_LIFE_S)
    assert "mine" in {record.get("model") for record in server.records.values()}


def test_a_torn_line_at_the_journal_s_end_holds_up_no_flush(
    server: FaultyServer, destination: Destination
) -> None:
    """Given a writer that died in mid-write, when another flushes and nobody writes any more, then the answer
    is yes as soon as the server has it, and not what is known at the deadline."""
    destination.collector.record(LLMCall, model="mine")
    with Path(segment_path(destination.directory, 1)).open("ab") as segment:
        segment.write(TORN)
    with shipping(destination):
        began = time.monotonic()
        answer = request_flush(
            destination.directory, destination.collector.journal.token(), began + SIGNS_OF_LIFE_S
        )
        assert answer is not None
        assert answer.pending == 0
        assert time.monotonic() - began < SIGNS_OF_LIFE_S / 2
    assert "mine" in {record.get("model") for record in server.records.values()}


def test_a_run_whose_process_died_in_mid_write_is_closed(
    server: FaultyServer, destination: Destination
) -> None:
    """Given a process that died while it wrote, when nobody writes after it, then its run is `killed`."""
    died = destination.child(
        "from waxell_workers.core.runs import Run\n"
        "run = waxell_workers.WaxellContext('agent')\n"
        "run.start()\n"
        "os.write(current().journal._segment.descriptor, "
        f"{TORN!r})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert died.returncode == -9
    destination.ship(5.0)
    assert list(states(server).values()) == ["killed"]


def test_a_record_that_finds_its_segment_deleted_keeps_its_token(
    destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a writer that was idle while its segment was shipped and deleted, when it records again, then its
    flush waits for that record, and no descriptor is spent on it."""
    collector = destination.collector
    collector.record(LLMCall, model="first")
    token, descriptors = collector.journal.token(), len(os.listdir("/dev/fd"))
    monkeypatch.setattr(journal, "_LOOK_S", 0.0)
    for number in range(20):
        with closing(Reader(destination.directory, None, 0)) as reading:
            reading.rotate()
            os.unlink(segment_path(destination.directory, reading.position.segment))
        assert collector.record(LLMCall, model=f"m{number}")
        with closing(Reader(destination.directory, None, 0)) as reading:
            [entry] = reading.read()
        assert entry.token == token == collector.journal.flush_token()
    assert len(os.listdir("/dev/fd")) <= descriptors + 1


def test_threads_that_record_first_at_the_same_moment_are_one_process(
    destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given two threads that find no token at the same time, when one flushes, then the records of both are
    waited for."""
    together = threading.Barrier(2, timeout=1.0)
    tokens = iter((101, 202))

    def choose(*_: object) -> int:
        with suppress(threading.BrokenBarrierError):  # one that waits for the other is as good
            together.wait()
        return next(tokens)

    journal = destination.collector.journal
    monkeypatch.setattr(liveness.random.SystemRandom, "randrange", choose)
    monkeypatch.setattr(liveness, "_by_pid", {})
    monkeypatch.setattr(journal, "_token_pid", 0)
    monkeypatch.setattr(journal, "_tokens", set())

    def record(name: str) -> None:
        destination.collector.record(LLMCall, model=name)

    threads = [threading.Thread(target=record, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = Reader(destination.directory, None, 0).read()
    assert len(entries) == 2
    assert journal.flush_token() == 0 or {entry.token for entry in entries} == {journal.flush_token()}


def test_the_ledger_forgets_the_ends_that_the_shipper_made(
    server: FaultyServer, destination: Destination
) -> None:
    """Given runs that the shipper ended itself, killed and automatic ones, when all has arrived, then no id
    of them is kept for ever."""
    for _ in range(3):
        destination.child(
            "waxell_workers.record_llm_call(model='loose')\n"
            "waxell_workers.WaxellContext('agent').start()\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        destination.append(call("recovered"), ended("recovered"))
        destination.append(started("a"), ended("a"))
        destination.ship()
    assert sorted(set(states(server).values())) == ["killed", "success"]
    with closing(sqlite3.connect(f"{destination.directory}/shipper.db")) as ledger:
        assert ledger.execute("SELECT id FROM acknowledged").fetchall() == []


def test_a_repeat_is_known_by_the_next_shipper(server: FaultyServer, destination: Destination) -> None:
    """Given records that were written again after a seal, when the shipper that delivered the first of each
    was killed in between, then the next one sends nothing twice, and makes and ends no run for a repeat."""
    repeated = [call(""), started("a"), call("a"), ended("a")]
    destination.append(*repeated)
    with closing(Reader(destination.directory, None, 0)) as reading:
        reading.rotate()
    destination.append(*repeated)
    whole = Path(segment_path(destination.directory, 2)).read_bytes()
    Path(segment_path(destination.directory, 2)).write_bytes(FIRST_LINE)
    killed = Shipper(destination.settings, destination.directory, stay=False)
    killed.stop(time.monotonic() + SIGNS_OF_LIFE_S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "delete_finished_segments", lambda self: None)  # so far it did not come
        assert killed.run(0.0)
    runs, records = dict(states(server)), len(server.records)
    Path(segment_path(destination.directory, 2)).write_bytes(whole)
    destination.ship()
    assert states(server) == runs
    assert (len(server.records), server.duplicates) == (records, 0)


def test_nothing_is_left_of_a_segment_that_was_rotated_last(
    server: FaultyServer, destination: Destination, tmp_path: Path
) -> None:
    """Given a shipper that delivers all and rotates in its last round, when it leaves, then the sealed
    segment is deleted as well."""
    destination.append(started("a"), call("a"), ended("a"))
    nobody_lives_here = tmp_path / "copy"
    shutil.copytree(destination.directory, nobody_lives_here)
    order = {"directory": str(nobody_lives_here), "settings": {"api_url": server.url, "flush_interval": 0.2}}
    code = (
        "from waxell_workers.core import foreground, shipper\n"
        "shipper.SEGMENT_BYTES = 100\n"
        "foreground.main()\n"
    )
    command = [sys.executable, "-c", code]
    subprocess.run(command, input=json.dumps(order), env=environment(), text=True, timeout=60, check=True)
    assert states(server) == {"a": "success"}
    left = [path.read_bytes() for path in nobody_lives_here.glob("*.ndjson")]
    assert left == [FIRST_LINE]


def test_calls_are_grouped_alike_by_a_shipper_that_reads_less_at_once(
    server: FaultyServer, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given calls outside any run whose batch was taken while its answer was lost, when the next shipper's
    window is full before it has read them all, then the rest belongs to the same run."""
    destination.append(*(call("", number, model="loose") for number in range(20)))
    server.mode("reset", endpoint="ingest", processed=True)
    destination.ship(2.0)
    server.mode("healthy")
    monkeypatch.setattr(window, "MOST_ENTRIES", 3)
    monkeypatch.setattr(reader, "_CHUNK", 512)
    destination.ship()
    assert [len(run.calls) for run in server.runs.values()] == [20]
    assert [run.start["metadata"]["call_count"] for run in server.runs.values()] == [20]


def test_a_task_whose_end_was_hit_is_ended_by_the_next_one(destination: Destination) -> None:
    """Given a task's end that an interrupt has kept from doing anything, when the slot takes the next task,
    the first one's run ends, is not the next one's parent, and nothing stays current."""
    with collector.instead(destination.collector):
        first = tasks.prepare(tasks.Task(framework="f", name="n", task_id="1"), tasks.Options())
        tasks.begin(first)
        second = tasks.prepare(tasks.Task(framework="f", name="n", task_id="2"), tasks.Options())
        tasks.begin(second)
        assert not first.run.is_open
        assert second.run.parent_run_id is None
        tasks.task_ended(second, "success")
        assert get_context() is None
        assert destination.collector.open_runs == {}


def test_a_task_leaves_nothing_current_that_an_interrupt_has_left_in_it(destination: Destination) -> None:
    """Given blocks inside a task that were entered and, by an interrupt, never left, when the task ends, no
    run is current; the next task is nobody's child."""
    with collector.instead(destination.collector):
        for number in range(2):
            attempt = tasks.prepare(tasks.Task(framework="f", name="n", task_id=str(number)), tasks.Options())
            tasks.begin(attempt)
            assert attempt.run.parent_run_id is None
            WaxellContext("outer block").enter()
            WaxellContext("inner block").enter()
            tasks.task_ended(attempt, "interrupted")
            assert get_context() is None
