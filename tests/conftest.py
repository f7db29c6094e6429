"""What holds for every test."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest

from waxell_workers.core.collector import Collector

# A shell that starts us in its background has us, and all that we start, ignore Ctrl-C; some tests send one.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Neither our tests nor what they start read the profile of whoever runs them, or leave a spool in their home.
os.environ["HOME"] = tempfile.mkdtemp(prefix="waxell-home-")
atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def no_collector_outlives_its_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """At pytest's own end, each would wait for a server that is long gone."""
    collectors: list[Collector] = []
    flush_at_exit = Collector.flush_at_exit

    def noted(self: Collector) -> None:
        collectors.append(self)
        flush_at_exit(self)

    monkeypatch.setattr(Collector, "flush_at_exit", noted)
    yield
    for collector in collectors:
        atexit.unregister(collector._at_exit)
