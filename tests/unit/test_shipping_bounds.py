"""What one failing run may do: hold up no other, until so much waits behind it that reading has to stop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.destination import Destination, call, ended, started
from tests.faulty import FaultyServer
from tests.harness import ROOT, await_
from tests.unit.test_shipping_answers import Running
from waxell_workers.core import reader, window
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
    monkeypatch.setattr(shipping, "_POLL_S", 0.01)
    monkeypatch.setattr(reader, "_CHUNK", A_CHUNK)
    server.mode("500", endpoint="llm-calls", marker="bad-")
    return Destination(server, tmp_path)


def arrived(server: FaultyServer) -> set[str]:
    return {record["model"] for record in server.calls}


def test_no_more_is_read_behind_a_failing_run_than_the_limit(
    server: FaultyServer, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a run that fails for ever, what is recorded behind it arrives, up to the limit; the rest waits in
    the journal, and arrives when the run has gone."""
    monkeypatch.setattr(window, "_MOST_PASSED", BEHIND)
    runs = [f"run-{number}" for number in range(2 * BEHIND)]
    destination.append(started("bad"), call("bad"), ended("bad"))
    for name in runs:
        destination.append(started(name), call(name), ended(name))
    with Running(destination) as running:
        await_(lambda: len(arrived(server)) >= (BEHIND - IN_A_CHUNK) // 3, "what is within the limit")
        await_(lambda: running.shipper.pending <= 3, "all that was read but the failing run's")
        running.goes_round(40)
        read = running.shipper.delivered + running.shipper.pending
        assert BEHIND <= read <= BEHIND + IN_A_CHUNK
        assert server.fired["500"] > 1, "it is tried again"
        server.mode("healthy")
        await_(lambda: arrived(server) == {f"{name}-0" for name in ["bad", *runs]}, "delivery of all")
    assert len(server.calls) == len(runs) + 1


def test_a_failing_run_holds_no_more_of_its_own_than_the_limit(
    server: FaultyServer, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a run that fails for ever and goes on, no more of it is held in memory than the limit."""
    monkeypatch.setattr(window, "MOST_ENTRIES", OWN)
    destination.append(started("bad"), *(call("bad", number) for number in range(4 * OWN)), ended("bad"))
    destination.append(started("next"), call("next"), ended("next"))
    with Running(destination) as running:
        await_(lambda: server.fired["500"] > 1, "a second attempt")
        running.goes_round(40)
        assert OWN <= running.shipper.pending <= OWN + IN_A_CHUNK
        assert arrived(server) == set()
        server.mode("healthy")
        await_(lambda: len(arrived(server)) == 4 * OWN + 1, "delivery of all")


def test_the_limits_are_those_that_are_promised() -> None:
    """docs/guarantees.md says how much may wait behind a failing run, and of its own."""
    page = (ROOT / "docs" / "guarantees.md").read_text().replace("\n", " ")
    assert f"After {window._MOST_PASSED:,} records behind it, or {window.MOST_ENTRIES:,} of its own" in page
