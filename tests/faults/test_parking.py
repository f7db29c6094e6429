"""A run that always fails is moved aside, and comes back; also where shippers die, or lose the ledger.

By REST alone: to `ingest` go whole batches, so that there is no run that fails while others do not.

The limits are small, so that it really happens. The shipper is judged by a server that knows every id.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.destination import Destination, call, ended, started, states
from tests.faulty import FaultyServer
from tests.harness import ROOT, await_, environment
from tests.torture import effort, found
from tests.unit.test_shipping_answers import Running
from waxell_workers.core import abandoned, parking, window
from waxell_workers.core import shipper as shipping
from waxell_workers.core.flush import request_flush
from waxell_workers.core.inspection import read_ledger, survey

BAD = ("bad-1", "bad-2", "bad-3")
OWN = 120
PROGRAM = """
import os, signal
from waxell_workers.core import parking, shipper, window
from waxell_workers.core.config import Settings
from waxell_workers.core.ledger import Ledger
window.MOST_ENTRIES, window._BACKOFF_MOST_S, parking._PACE_S, shipper._POLL_S = 40, 0.05, 0.05, 0.005
shipper.SEGMENT_BYTES = 8192
moment, times = {moment!r}

def dying(owner, name, is_it=lambda **_: True):
    real, seen = getattr(owner, name), [0]
    def call(*arguments, **named):
        result = real(*arguments, **named)
        seen[0] += moment == name and bool(is_it(**named))
        if seen[0] == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)

dying(parking, "_write")
dying(Ledger, "commit", lambda parked, **_: parked)
dying(parking.Parking, "arrived")
dying(parking.Parking, "take")
shipping = shipper.Shipper(Settings(**{settings!r}), {directory!r}, stay=True)
assert shipping.run()
"""
MOVING_ASIDE = [("_write", 1), ("commit", 1), ("_write", 2), ("commit", 2), ("take", 3)]
COMING_BACK = [("arrived", 1), ("arrived", 2), ("commit", 1), ("arrived", 4), ("commit", 3), ("take", 2)]


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server
        assert server.violations == []


@pytest.fixture
def destination(server: FaultyServer, tmp_path: Path) -> Destination:
    return Destination(server, tmp_path)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (window, "MOST_ENTRIES", 40),
        (window, "_BACKOFF_MOST_S", 0.05),
        (parking, "_PACE_S", 0.05),
        (shipping, "_POLL_S", 0.005),
    ):
        monkeypatch.setattr(module, name, value)


def record(destination: Destination, good: int) -> None:
    """Record three runs that will fail, their records among those of `good` others."""
    destination.append(*(started(name) for name in BAD))
    for number in range(OWN):
        destination.append(*(call(name, number) for name in BAD))
        if number < good:
            name = f"good-{number}"
            destination.append(started(name), call(name), ended(name))
    destination.append(*(ended(name) for name in BAD))


def files(destination: Destination) -> list[Path]:
    return sorted(Path(destination.directory, "parked").glob("*"))


def calls_of(server: FaultyServer, name: str) -> list[str]:
    return [model for record in server.calls if (model := record["model"]).startswith(f"{name}-")]


def everything_arrived(server: FaultyServer, good: int) -> bool:
    names = [*BAD, *(f"good-{number}" for number in range(good))]
    return states(server) == dict.fromkeys(names, "success")


def test_parked_runs_survive_shippers_that_are_killed(server: FaultyServer, destination: Destination) -> None:
    """Given runs that always fail, and shippers that are killed between any two steps while they move them
    aside, retry them, and take them back, nothing is lost and each run stays in order; a record is there a
    second time only where the kill came between the server's answer and the commit."""
    good = 30
    server.mode("500", endpoint="llm-calls", marker="bad-")
    record(destination, good)
    for moment in MOVING_ASIDE:
        die_at(destination, moment)
    for path in files(destination):
        ids = [json.loads(line)["id"] for line in path.read_bytes().splitlines()]
        assert len(ids) == len(set(ids)), "what was moved aside is not read again"
    assert files(destination), "runs were moved aside"
    server.mode("healthy")
    for moment in COMING_BACK * effort(1, 3):
        if not files(destination):
            break
        die_at(destination, moment)
    last = destination.ship(60)
    repeats = len(server.calls) - len({record["model"] for record in server.calls})
    found("parked runs", kills=len(MOVING_ASIDE) + len(COMING_BACK), repeats=repeats)
    assert (last.pending, last.rejected) == (0, 0)
    assert everything_arrived(server, good)
    for name in BAD:
        models = calls_of(server, name)
        assert list(dict.fromkeys(models)) == [f"{name}-{number}" for number in range(OWN)]
    assert files(destination) == []
    assert survey(destination.directory).pending == 0
    assert read_ledger(destination.directory).acknowledged == frozenset(), "nothing is noted for ever"


def die_at(destination: Destination, moment: tuple[str, int]) -> None:
    """Ship until a moment at which the shipper kills itself."""
    settings = dataclasses.asdict(destination.settings) | {"flush_max_records": 20}
    program = PROGRAM.format(settings=settings, directory=destination.directory, moment=moment)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, f"it did not come to {moment}"


def test_parked_runs_wait_for_the_next_shipper(
    small: None, server: FaultyServer, destination: Destination
) -> None:
    """Given runs that were moved aside, `spool status` counts them, a flush does not say yes, the segments
    are gone, and the next shipper delivers them once, in order, and ends no run a second time."""
    good = 30
    record(destination, good)
    server.mode("500", endpoint="llm-calls", marker="bad-")
    with Running(destination):
        await_(lambda: sum(name.startswith("good") for name in states(server)) == good, "the others")
        await_(lambda: len(files(destination)) == len(BAD), "parking")
        answer = request_flush(destination.directory, 0, time.monotonic() + 0.5)
        assert answer is not None
        assert answer.pending
    waiting = survey(destination.directory)
    assert waiting.pending == len(BAD) * (OWN + 1), "their starts have arrived"
    server.mode("healthy")
    destination.ship()
    assert everything_arrived(server, good)
    for name in BAD:
        assert calls_of(server, name) == [f"{name}-{number}" for number in range(OWN)]
    assert all(len(run.ends) == 1 for run in server.runs.values())
    assert survey(destination.directory).pending == 0
    assert files(destination) == []


def test_parked_runs_survive_their_ledger(
    small: None, server: FaultyServer, destination: Destination
) -> None:
    """Given a ledger that is lost, what was moved aside is delivered again from its beginning."""
    record(destination, 30)
    server.mode("500", endpoint="llm-calls", marker="bad-")
    with Running(destination):
        await_(lambda: len(files(destination)) == len(BAD), "parking")
        await_(lambda: len(list(Path(destination.directory).glob("0*.ndjson"))) == 1, "the segments' end")
    for path in Path(destination.directory).glob("shipper.db*"):
        path.unlink()
    server.mode("healthy")
    assert destination.ship().pending == 0
    for name in BAD:
        assert set(calls_of(server, name)) == {f"{name}-{number}" for number in range(OWN)}
    assert files(destination) == []


def test_parked_runs_of_an_unused_destination_go_with_it(
    small: None, server: FaultyServer, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was moved aside is part of a backlog: `spool_max_age` removes it too."""
    record(destination, 0)
    server.mode("500", endpoint="llm-calls", marker="bad-")
    with Running(destination):
        await_(lambda: len(files(destination)) == len(BAD), "parking")
    for name in os.listdir(destination.directory):
        os.utime(f"{destination.directory}/{name}", (1, 1))
    monkeypatch.setattr(abandoned, "_NOTICE_S", 0.0)
    monkeypatch.setattr(abandoned.Procs, "anyone_alive", lambda self: False)  # it is we who live
    sweeper = abandoned.Sweeper(f"{destination.settings.spool_dir}/another", 1000.0)
    monkeypatch.setattr(abandoned, "_EVERY_S", 0.0)

    def swept() -> bool:
        sweeper.go_on()
        return not files(destination)

    await_(swept, "removal")
    assert survey(destination.directory).pending == 0


def test_a_parked_line_that_is_damaged_is_passed_over(
    small: None, server: FaultyServer, destination: Destination
) -> None:
    """A file is like a segment: what is no record in it holds up nothing."""
    record(destination, 0)
    server.mode("500", endpoint="llm-calls", marker="bad-")
    with Running(destination):
        await_(lambda: len(files(destination)) == len(BAD), "parking")
        await_(lambda: all(path.read_bytes().count(b"\n") > 5 for path in files(destination)), "some lines")
    for path in files(destination):
        lines = path.read_bytes().splitlines(keepends=True)
        assert json.loads(lines[2])["kind"] == "llm_call"
        lines[2] = b"x" * (len(lines[2]) - 1) + b"\n"
        path.write_bytes(b"".join(lines))
    server.mode("healthy")
    destination.ship()
    for name in BAD:
        assert len(calls_of(server, name)) == OWN - 1
    assert files(destination) == []
