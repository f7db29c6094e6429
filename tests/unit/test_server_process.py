"""The server as a process: `python -m waxell_workers.server`, as the demo and the command line start it."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from waxell_workers.core.errors import ConfigError
from waxell_workers.server import serve
from waxell_workers.server.run import _bind

INGEST = "/api/v1/observe/ingest/"
COMMAND = (sys.executable, "-m", "waxell_workers.server")


class Server:
    """One server process and its address."""

    def __init__(self, *arguments: str, key: str = "") -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"WAXELL_SERVER_API_KEY": key},
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal; return exit code, the rest of stdout, and stderr."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


@contextlib.contextmanager
def running(*arguments: str, key: str = "") -> Iterator[Server]:
    server = Server(*arguments, key=key)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


def record(n: int) -> bytes:
    facts = {
        "kind": "run_started",
        "id": f"s{n}",
        "at": 1_790_000_000 + n,
        "run_id": f"r{n}",
        "agent_name": "a",
    }
    return json.dumps(facts).encode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_its_address_serves_and_stops_quietly(tmp_path: Path, number: signal.Signals) -> None:
    """One line on stdout, an answer at once; a stop within a moment, although connections are kept open."""
    with running("--db", str(tmp_path / "db")) as server, httpx.Client(base_url=server.address) as client:
        assert server.address.startswith("http://127.0.0.1:")
        assert client.get("/api/runs").json() == {"runs": []}
        idle = socket.create_connection(("127.0.0.1", int(server.address.rsplit(":", 1)[1])))
        idle.sendall(b"GET / HTTP/1.1\r\nHost: local")  # and never the rest
        begun = time.monotonic()
        code, out, err = server.end(number)
        assert time.monotonic() - begun < 3
        assert (code, out, err) == (0, "", "")
        idle.close()


def test_it_stops_although_a_client_never_finishes_its_body() -> None:
    """A request under way has a second; then the stop goes on."""
    with running() as server:
        port = int(server.address.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(
                b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{" % INGEST.encode()
            )
            assert (
                httpx.get(f"{server.address}/api/runs").status_code == 200
            )  # the request before has arrived
            begun = time.monotonic()
            server.end()
            assert time.monotonic() - begun < 5


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    """200 means stored: after SIGKILL the file has it, and the next server takes the repeat as one."""
    db = str(tmp_path / "db")
    with running("--db", db) as server:
        body = b"\n".join(record(n) for n in range(20))
        answer = httpx.post(
            server.address + INGEST, content=gzip.compress(body), headers={"content-encoding": "gzip"}
        )
        assert answer.json()["accepted"] == 20
        server.process.kill()
        server.process.wait()
    with running("--db", db) as server:
        assert len(httpx.get(f"{server.address}/api/runs").json()["runs"]) == 20
        assert httpx.post(server.address + INGEST, content=body).json()["duplicates"] == 20


def test_many_clients_at_once_lose_nothing(tmp_path: Path) -> None:
    """Concurrent batches, among them repeats of the same one: each record is stored once."""
    with running("--db", str(tmp_path / "db")) as server:

        def send(name: int) -> None:
            with httpx.Client(base_url=server.address) as client:
                for n in range(10):
                    lines = b"\n".join(record(n * 100 + k) for k in range(20))
                    client.post(INGEST, content=lines).raise_for_status()

        threads = [threading.Thread(target=send, args=(name,)) for name in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = httpx.get(f"{server.address}/api/stats").json()
        assert (stats["accepted"], stats["duplicates"]) == (200, 1000)


def test_the_oversized_client_gets_its_answer() -> None:
    """A client in the middle of sending too much reads why, instead of a broken connection."""
    with running() as server:
        answer = httpx.post(server.address + INGEST, content=bytes(40 << 20), timeout=30)
        assert answer.status_code == 413
        assert "larger" in answer.json()["error"]


def test_no_ingest_is_offered_if_it_is_off() -> None:
    """`--no-ingest` leaves a server that speaks the platform's protocol only."""
    with running("--no-ingest") as server:
        assert "ingest_endpoint" not in httpx.get(f"{server.address}/api/v1/observe/config/").json()
        assert httpx.post(server.address + INGEST, content=b"").status_code == 404


def test_a_key_from_the_environment_is_asked_for() -> None:
    """And with it the server may listen beyond loopback."""
    with running("--host", "0.0.0.0", key="s3cret") as server:
        address = server.address.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{address}/api/runs").status_code == 401
        assert httpx.get(f"{address}/api/runs", headers={"X-Wax-Key": "s3cret"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "build-7.example"])
def test_beyond_loopback_a_key_is_needed(host: str) -> None:
    """Nobody opens prompts to a network by accident."""
    with pytest.raises(ConfigError, match="api_key"):
        serve(host=host, port=0, on_ready=print)


def test_a_port_in_use_is_a_message(tmp_path: Path) -> None:
    """On stderr, with exit code 2, and nothing on stdout."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*COMMAND, "--port", str(port), "--db", str(tmp_path / "db")],
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"port={port}" in done.stderr


def test_it_starts_light() -> None:
    """The server loads none of the libraries that it watches, and no HTTP client: ready means at once."""
    heavy = ("httpx", "celery", "openai", "opentelemetry", "rich")
    code = (
        "import sys, waxell_workers.server.run as run\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_store_needs_no_web_framework() -> None:
    """`runs ls --db FILE` works without the extra `server`."""
    code = (
        "import sys, waxell_workers.server as server; server.Store\n"
        "print([name for name in ('starlette', 'uvicorn', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_answers_are_not_held_back(host: str) -> None:
    """asyncio sets TCP_NODELAY only on a socket that names its protocol; without, answers take 40 ms."""
    with _bind(host, 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
