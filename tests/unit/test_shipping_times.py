"""When records are sent: by a clock that the test puts forward, so that no minute has to be waited for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.destination import Destination, call, ended, started
from tests.faulty import FaultyServer
from tests.harness import await_
from tests.unit.test_shipping_answers import Running
from waxell_workers.core import shipper as shipping
from waxell_workers.core import window

INTERVAL_S = 1000.0
MINUTE_S = 60.0
SOON_S = 20.0
A_MOMENT_S = 100.0
"""What the real clock, which goes on beneath, may add to a test."""


class Clock:
    """A clock that goes like the real one, and may be put forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake = SimpleNamespace(monotonic=clock.monotonic, time=time.time, sleep=time.sleep)
    for module in (shipping, window):
        monkeypatch.setattr(module, "time", fake)
    monkeypatch.setattr(shipping, "_POLL_S", 0.01)
    return clock


@pytest.fixture(params=["ingest", "rest"])
def server(request: pytest.FixtureRequest) -> Iterator[FaultyServer]:
    with FaultyServer(ingest=request.param == "ingest") as server:
        yield server
        assert server.violations == []


@pytest.fixture
def destination(server: FaultyServer, tmp_path: Path) -> Destination:
    return Destination(server, tmp_path)


def test_what_is_recorded_is_sent_each_flush_interval(
    server: FaultyServer, destination: Destination, clock: Clock
) -> None:
    """Given records that come one by one, nothing is sent before `flush_interval` is over, and then all is;
    and so again for what comes afterwards."""
    destination.settings = dataclasses.replace(destination.settings, flush_interval=INTERVAL_S)
    arrived = 0
    with Running(destination) as running:
        running.goes_round(2)
        for number in range(3):
            destination.append(call("", number))
            running.goes_round(5)
            clock.ahead_s += INTERVAL_S - A_MOMENT_S
            destination.append(call("", 10 + number))
            running.goes_round(10)
            assert len(server.calls) == arrived, "sent before the interval is over"
            arrived += 2
            clock.ahead_s += A_MOMENT_S
            await_(partial(has, server, arrived), "delivery after the interval", SOON_S)


def has(server: FaultyServer, calls: int) -> bool:
    return len(server.calls) == calls


@pytest.mark.parametrize("fault", ["401", "redirect"])
def test_a_server_that_refuses_is_asked_each_minute(
    server: FaultyServer, destination: Destination, clock: Clock, fault: str
) -> None:
    """Given a wrong key, nothing is sent for a minute, then one request, and so on; once it is taken, all
    arrives."""
    slack_s = 20.0
    server.mode(fault)
    destination.append(started("a"), call("a"), ended("a"))
    with Running(destination) as running:
        for number in range(1, 4):
            await_(partial(has_refused, server, number), f"request {number}", SOON_S)
            running.goes_round(3)
            clock.ahead_s += MINUTE_S - slack_s
            running.goes_round(20)
            assert has_refused(server, number), "asked before the minute is over"
            if number == 3:
                server.mode("healthy")
            clock.ahead_s += slack_s
        await_(partial(has, server, 1), "delivery after the last minute", SOON_S)


def has_refused(server: FaultyServer, requests: int) -> bool:
    return server.fired.total() == requests
