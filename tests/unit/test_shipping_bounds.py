"""What one failing run may do: hold up no other, however much waits behind it, and cost no memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.destination import Destination, call, ended, started, states
from tests.faulty import FaultyServer
from tests.harness import await_
from tests.unit.test_shipping_answers import Running
from waxell_workers.core import parking, reader, window
from waxell_workers.core import shipper as shipping

BEHIND = 60
OWN = 40
A_CHUNK = 4096
"""Bytes that are read at once: some dozen records."""
IN_A_CHUNK = 40


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server
        assert server.violations == []


@pytest.fixture
def destination(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Destination:
    """A destination with small limits, and a server that takes no call of the run `bad`."""
    monkeypatch.setattr(window, "_BACKOFF_MOST_S", 0.1)
    monkeypatch.setattr(parking, "_PACE_S", 0.2)
    monkeypatch.setattr(shipping, "_POLL_S", 0.01)
    monkeypatch.setattr(reader, "_CHUNK", A_CHUNK)
    server.mode("500", endpoint="llm-calls", marker="bad-")
    return Destination(server, tmp_path)


def arrived(server: FaultyServer) -> set[str]:
    return {record["model"] for record in server.calls}


def test_what_is_recorded_behind_a_failing_run_arrives_however_much_it_is(
    server: FaultyServer, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a run that fails for ever, and more behind it than is held in memory, all of that arrives, and
    its segments are deleted; the run is tried again, and arrives when the server takes it."""
    monkeypatch.setattr(window, "_MOST_PASSED", BEHIND)
    runs = [f"run-{number}" for number in range(4 * BEHIND)]
    destination.append(started("bad"), call("bad"), ended("bad"))
    for name in runs:
        destination.append(started(name), call(name), ended(name))
    with Running(destination) as running:
        await_(lambda: arrived(server) == {f"{name}-0" for name in runs}, "delivery of the others")
        before = server.fired["500"]
        await_(lambda: server.fired["500"] > before, "another attempt")
        await_(lambda: running.shipper.pending == parked(destination), "nothing but the failing run pending")
        server.mode("healthy")
        await_(lambda: arrived(server) == {f"{name}-0" for name in ["bad", *runs]}, "delivery of all")
    assert len(server.calls) == len(runs) + 1
    assert states(server)["bad"] == "success"
    assert parked(destination) == 0


def test_of_a_failing_run_no_more_is_held_in_memory_than_the_limit(
    server: FaultyServer, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a run that fails for ever and goes on, its records wait in a file, and what is behind arrives;
    when the server takes them, all of them arrive once, and in order."""
    monkeypatch.setattr(window, "MOST_ENTRIES", OWN)
    destination.settings = dataclasses.replace(destination.settings, flush_max_records=25)
    destination.append(started("bad"), *(call("bad", number) for number in range(4 * OWN)), ended("bad"))
    destination.append(started("next"), call("next"), ended("next"))
    with Running(destination) as running:
        await_(lambda: arrived(server) == {"next-0"}, "what is behind it")
        running.goes_round(20)
        assert running.shipper._window.pending <= OWN + IN_A_CHUNK
        assert running.shipper.pending == 4 * OWN + 1, "its start has arrived"
        server.mode("healthy")
        await_(lambda: len(arrived(server)) == 4 * OWN + 1, "delivery of all")
        await_(lambda: states(server)["bad"] == "success", "its end")
    assert [record["model"] for record in server.calls if record["model"] != "next-0"] == [
        f"bad-{number}" for number in range(4 * OWN)
    ]
    assert parked(destination) == 0


def parked(destination: Destination) -> int:
    """Return how many records wait in files of their own."""
    return sum(len(path.read_bytes().splitlines()) for path in Path(destination.directory).glob("parked/*"))
