"""Against power loss: the journal is really written through, if that is asked for, and on nobody's time."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.destination import Destination, call, ended, started
from tests.faulty import FaultyServer
from tests.harness import await_
from tests.unit.test_shipping_answers import Running
from waxell_workers.core import launch


@pytest.fixture
def destination(tmp_path: Path) -> Iterator[Destination]:
    with FaultyServer(ingest=True) as server:
        server.mode("503")  # what is delivered at once needs no disk
        yield Destination(server, tmp_path)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str, int]]:
    """What was written through, really: by which thread, which file, and how much of it."""
    seen: Counter[tuple[str, str, int]] = Counter()
    fsync = os.fsync

    def counting(descriptor: int) -> None:
        status = os.fstat(descriptor)
        name = next(
            (
                path.name
                for path in [*directory.glob("0*.ndjson"), directory]
                if path.stat().st_ino == status.st_ino
            ),
            "?",
        )
        fsync(descriptor)
        seen[threading.current_thread().name, name, status.st_size] += 1

    directory = Path()

    def watch(where: str) -> None:
        nonlocal directory
        directory = Path(where)

    monkeypatch.setattr(os, "fsync", counting)
    seen.watch = watch  # type: ignore[attr-defined]
    return seen


def test_the_journal_is_written_through_by_a_thread_of_its_own(
    destination: Destination, synced: Counter[tuple[str, str, int]]
) -> None:
    """With `fsync_interval`, what was recorded is on the disk soon after, and so is the directory that names
    the segment; a segment that has not grown is left alone, and whoever records never waits for it."""
    synced.watch(destination.directory)  # type: ignore[attr-defined]
    destination.settings = dataclasses.replace(destination.settings, fsync_interval=0.02)
    destination.append(started("a"), call("a"))
    segment = Path(destination.directory, "000001.ndjson")
    with Running(destination) as running:
        await_(lambda: ("waxell-sync", segment.name, segment.stat().st_size) in synced, "the first records")
        await_(lambda: any(name == segment.parent.name for _, name, _ in synced), "the directory")
        running.goes_round(20)
        assert synced["waxell-sync", segment.name, segment.stat().st_size] == 1
        destination.append(ended("a"))
        await_(lambda: ("waxell-sync", segment.name, segment.stat().st_size) in synced, "the last record")
    assert {thread for thread, _, _ in synced} == {"waxell-sync"}


def test_nothing_is_written_through_unasked(
    destination: Destination, synced: Counter[tuple[str, str, int]]
) -> None:
    """By default nobody calls `fsync`: a process's death loses nothing without it."""
    synced.watch(destination.directory)  # type: ignore[attr-defined]
    with Running(destination) as running:
        destination.append(started("a"), call("a"), ended("a"))
        running.goes_round(40)
    assert synced == Counter()


def test_a_worker_s_shipper_is_told_to(destination: Destination) -> None:
    """The setting goes the way of the others, over the pipe to the detached process."""
    assert {"fsync_interval", "spool_max_age"} <= set(launch._NEEDED)
