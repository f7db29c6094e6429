"""What tests share: this process's collector, configured anew, what it has recorded, and a local server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from tests.application import Client
from tests.harness import environment
from waxell_workers.core import collector as collecting
from waxell_workers.core.config import Settings
from waxell_workers.core.encoding import decode
from waxell_workers.server import Store, create_app


@pytest.fixture(autouse=True)
def signals_stay_ours():
    """RQ's workers install handlers and leave them; the next Ctrl-C is for pytest."""
    ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in ours.items():
        signal.signal(number, handler)


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Configure this process anew; nobody ships, and nothing waits for that."""

    def with_settings(**more):
        own = {"api_url": "http://127.0.0.1:9", "spool_dir": str(tmp_path), "shipper": "external"}
        settings = Settings(**own | {"shutdown_timeout": 0.0} | more)
        monkeypatch.setattr(collecting, "_collector", collecting.Collector(settings))

    return with_settings


@pytest.fixture
def records(tmp_path, configure):
    """Return what this process has recorded since the test began, by kind."""
    configure(exclude=("*.secret", "secret*"))

    def read(kind):
        lines = [line for path in tmp_path.glob("*/0*.ndjson") for line in path.read_bytes().splitlines()]
        found = [decode(line) for line in lines if line and b'"segment"' not in line]
        return [record for record in found if isinstance(record, kind)]

    return read


@pytest.fixture
def in_a_web_process(tmp_path):
    """Run a program that is configured and is no worker; it leaves no file, and prints the JSON returned."""

    def run(code, *arguments, observe):
        spool = tmp_path / "spool"
        own = {"WAXELL_API_URL": "http://127.0.0.1:9", "WAXELL_SPOOL_DIR": str(spool)}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=environment(**own, WAXELL_OBSERVE=observe),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not spool.exists()
        return json.loads(done.stdout)

    return run


@pytest.fixture
def store(tmp_path):
    """Return an empty store of the local server."""
    with Store(tmp_path / "runs.db") as store:
        yield store


@pytest.fixture
def client(store):
    """Return who sends requests to the local server of that store."""
    return Client(create_app(store))
