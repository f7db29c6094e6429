"""force_flush(): what it says is true, and it never takes longer than it may."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.faulty import FaultyServer
from tests.harness import await_, environment, shippers_of
from waxell_workers.core import foreground
from waxell_workers.core.collector import Collector
from waxell_workers.core.config import Settings
from waxell_workers.core.flush import FlushResult, request_flush, socket_path
from waxell_workers.core.listener import Listener
from waxell_workers.core.records import LLMCall

MARGIN_S = 0.75
"""What a busy machine may add to a deadline; far below the waits that must not happen."""

_SHIPPER = """
import sys
from waxell_workers.core import foreground
from waxell_workers.core.config import Settings
foreground.run(Settings(api_url=sys.argv[1], spool_dir=sys.argv[2]), drain=False)
"""


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(ingest=True) as server:
        yield server


@pytest.fixture
def settings(server: FaultyServer, tmp_path: Path) -> Settings:
    return Settings(api_url=server.url, spool_dir=str(tmp_path / "spool"), shipper="external")


@pytest.fixture
def shipper(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """A real shipper, ready to take requests."""
    command = [sys.executable, "-c", _SHIPPER, settings.api_url, settings.spool_dir]
    process = subprocess.Popen(command, env=environment())
    sock = Path(settings.spool_dir, settings.destination, "ship.sock")
    try:
        await_(sock.exists, "socket", 30)
        yield process
    finally:
        process.kill()
        process.wait()


def timed(collector: Collector, timeout_s: float, **more: Any) -> FlushResult:
    began = time.monotonic()
    result = collector.force_flush(timeout_s, **more)
    assert time.monotonic() - began < max(0.0, timeout_s) + MARGIN_S
    return result


def test_true_means_that_the_server_has_it(
    server: FaultyServer, settings: Settings, shipper: subprocess.Popen[bytes]
) -> None:
    """A true result: every record of this process is at the server at that moment."""
    collector = Collector(settings)
    for number in range(20):
        collector.record(LLMCall, model=f"m{number}")
        result = timed(collector, 20.0)
        assert result
        assert result.delivered >= 1
        assert f"m{number}" in {record.get("model") for record in server.records.values()}
    assert collector.stats().pending == 0
    assert collector.force_flush(0.0) == FlushResult(0, 0, 0)


def test_everybody_s_records_can_be_waited_for(
    server: FaultyServer, settings: Settings, shipper: subprocess.Popen[bytes]
) -> None:
    """A worker's main process waits for what its pool has recorded."""
    collector = Collector(settings)
    collector.journal.open()
    pid = os.fork()
    if pid == 0:
        collector.record(LLMCall, model="child")
        os._exit(0)
    os.waitpid(pid, 0)
    assert timed(collector, 20.0, everybody=True)
    assert "child" in {record.get("model") for record in server.records.values()}


def test_nothing_recorded_is_nothing_to_wait_for(settings: Settings) -> None:
    """Without a record of this process a flush is true at once and creates nothing."""
    assert Collector(settings).force_flush(30.0) == FlushResult(0, 0, 0)
    assert not Path(settings.spool_dir).exists()


def test_without_a_shipper_everything_is_pending(settings: Settings) -> None:
    """Nobody ships: false at the deadline, with what is pending."""
    collector = Collector(settings)
    collector.record(LLMCall, model="m")
    collector.record(LLMCall, model="m")
    assert timed(collector, 0.5) == FlushResult(0, 2, 0)
    assert timed(collector, 0.0) == FlushResult(0, 2, 0)
    assert timed(collector, -5.0) == FlushResult(0, 2, 0)


def test_a_stopped_shipper_is_not_waited_for_longer(
    settings: Settings, shipper: subprocess.Popen[bytes]
) -> None:
    """A shipper that is stopped answers nobody: pending, at the deadline."""
    collector = Collector(settings)
    collector.record(LLMCall, model="m")
    shipper.send_signal(signal.SIGSTOP)
    assert timed(collector, 0.5) == FlushResult(0, 1, 0)
    shipper.send_signal(signal.SIGCONT)
    assert timed(collector, 20.0)


@pytest.mark.parametrize("mode", ["hang", "503", "refuse", "trickle"])
def test_a_sick_server_is_not_waited_for_longer(
    server: FaultyServer, settings: Settings, shipper: subprocess.Popen[bytes], mode: str
) -> None:
    """Whatever the server does: false at the deadline; true once it is well again."""
    collector = Collector(settings)
    server.mode(mode)
    collector.record(LLMCall, model="m")
    result = timed(collector, 1.0)
    assert not result
    assert result.delivered == result.dropped == 0
    server.mode("healthy")
    await_(lambda: timed(collector, 5.0), "delivery", 60)


def test_pending_is_never_negative(
    server: FaultyServer, settings: Settings, shipper: subprocess.Popen[bytes]
) -> None:
    """A shipper too busy to count is answered for with what this process knows."""
    collector = Collector(settings)
    server.mode("hang")
    collector.record(LLMCall, model="m")
    collector.force_flush(0.5)
    collector.record(LLMCall, model="m")
    assert timed(collector, 0.5).pending == 2


def test_a_drain_beside_a_hanging_shipper_is_no_success(
    server: FaultyServer, settings: Settings, shipper: subprocess.Popen[bytes]
) -> None:
    """`ship --drain` beside a shipper that hangs on its server must not say that all is delivered."""
    collector = Collector(settings)
    server.mode("hang")
    collector.record(LLMCall, model="m")
    collector.force_flush(0.5)
    assert not foreground.run(settings, drain=True, timeout=1.0)


def test_a_full_backlog_is_not_waited_for(settings: Settings) -> None:
    """A socket whose backlog is full means pending, within the time."""
    collector = Collector(settings)
    collector.record(LLMCall, model="m")
    waiting = []
    with socket.socket(socket.AF_UNIX) as listener:
        with socket_path(collector.journal.directory) as path:
            listener.bind(path)
        listener.listen(0)
        for _ in range(3):
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            waiting.append(client)
            try:
                with socket_path(collector.journal.directory) as path:
                    client.connect(path)
            except BlockingIOError:
                pass
        assert timed(collector, 0.5) == FlushResult(0, 1, 0)
        for client in waiting:
            client.close()


def test_nonsense_as_an_answer_is_no_answer(settings: Settings) -> None:
    """Whatever comes back that is no answer means pending."""
    collector = Collector(settings)
    collector.record(LLMCall, model="m")
    with socket.socket(socket.AF_UNIX) as listener:
        with socket_path(collector.journal.directory) as path:
            listener.bind(path)
        listener.listen(5)
        pid = os.fork()
        if pid == 0:
            connection, _ = listener.accept()
            connection.recv(4096)
            connection.sendall(b"hello\n")
            os._exit(0)
        assert timed(collector, 2.0) == FlushResult(0, 1, 0)
        os.waitpid(pid, 0)


def test_a_path_longer_than_a_socket_s_is_no_matter(server: FaultyServer, tmp_path: Path) -> None:
    """Unix sockets have short names; a spool may have a long one."""
    long = tmp_path / ("d" * 100) / ("e" * 100)
    settings = Settings(api_url=server.url, spool_dir=str(long), shipper="external")
    process = subprocess.Popen([sys.executable, "-c", _SHIPPER, server.url, str(long)], env=environment())
    try:
        await_((long / settings.destination / "ship.sock").exists, "socket", 30)
        collector = Collector(settings)
        collector.record(LLMCall, model="m")
        assert timed(collector, 20.0)
    finally:
        process.kill()
        process.wait()


def test_what_was_refused_makes_the_next_flush_false(settings: Settings) -> None:
    """Records that the journal refused are told once, by the flush after it."""
    collector = Collector(settings)
    for _ in range(3):
        collector.journal.drop("spool_limit")
    assert collector.force_flush(0.0) == FlushResult(0, 0, 3)
    assert collector.force_flush(0.0) == FlushResult(0, 0, 0)


def test_what_the_server_rejected_makes_the_next_flush_false(
    server: FaultyServer, settings: Settings, shipper: subprocess.Popen[bytes]
) -> None:
    """A record rejected between two flushes is dropped: the next flush says so."""
    server.ingest = False
    server.mode("400", endpoint="llm-calls", marker="poison")
    collector = Collector(settings)
    collector.record(LLMCall, model="poison")
    quarantine = Path(collector.journal.directory, "quarantine.ndjson")
    await_(quarantine.exists, "quarantine", 30)
    assert not timed(collector, 10.0)


def test_the_request_itself_is_bounded(tmp_path: Path) -> None:
    """With no directory at all the request gives up at its deadline."""
    began = time.monotonic()
    assert request_flush(str(tmp_path / "nowhere"), 1, began + 0.3) is None
    assert time.monotonic() - began < 0.3 + MARGIN_S


def test_a_peer_that_hangs_up_is_not_hammered(tmp_path: Path) -> None:
    """Given a shipper that takes each question and hangs up, it is asked again in turns of 50 ms."""
    taken = 0
    with socket.socket(socket.AF_UNIX) as listening, socket_path(str(tmp_path)) as path:
        listening.bind(path)
        listening.listen()
        listening.settimeout(0.05)
        asking = threading.Thread(target=request_flush, args=(str(tmp_path), 0, time.monotonic() + 0.5))
        asking.start()
        while asking.is_alive():
            with suppress(TimeoutError), listening.accept()[0] as connection:
                taken += bool(connection.recv(4096))
        asking.join()
    assert 1 <= taken <= 12


def test_a_listener_that_is_closed_is_forgotten(tmp_path: Path) -> None:
    """A long life with many listeners, one after the other, keeps none of them."""
    listener = Listener(str(tmp_path), lambda: None)
    assert listener.start()
    listener.close()
    gone = weakref.ref(listener)
    del listener
    await_(lambda: gc.collect() >= 0 and gone() is None, "the end of the listener", 10)


def test_a_forked_child_does_not_listen(tmp_path: Path) -> None:
    """Given a child that outlives the shipper which forked it, nobody waits for an answer from it."""
    listener = Listener(str(tmp_path), lambda: None)
    assert listener.start()
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        theirs.send(b"up")
        theirs.recv(1)
        os._exit(0)
    try:
        theirs.close()
        assert ours.recv(2) == b"up"
        listener._socket.close()  # as death would
        with (
            socket.socket(socket.AF_UNIX) as asking,
            socket_path(str(tmp_path)) as path,
            pytest.raises(ConnectionRefusedError),
        ):
            asking.connect(path)
    finally:
        ours.close()
        os.waitpid(pid, 0)
        listener.close()


def test_a_flush_outlives_the_shipper_that_it_waits_for(server: FaultyServer, tmp_path: Path) -> None:
    """Given a shipper that dies while a flush waits for it, then another is started, and answers."""
    spool = tmp_path / "spool"
    collector = Collector(
        Settings(api_url=server.url, spool_dir=str(spool), shipper="process", flush_interval=0.2)
    )
    server.mode("hang")
    results: list[FlushResult] = []
    flush = threading.Thread(target=lambda: results.append(collector.force_flush(40)))
    try:
        collector.record(LLMCall, model="m")
        await_(lambda: server.fired["hang"] > 0, "request", 30)
        [shipper] = shippers_of(spool)
        flush.start()
        shipper.kill()
        shipper.wait(10)
        server.mode("healthy")
        flush.join(50)
        assert results == [FlushResult(1, 0, 0)]
    finally:
        for process in shippers_of(spool):
            process.kill()
