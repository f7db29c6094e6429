"""What the tests of a hostile world stand on: the real `waxell-workers serve`, raw sockets, measured memory.

The server is a process of its own, started by the command line; its peak of memory is the kernel's figure.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from tests.harness import START_S, await_, environment
from waxell_workers.server import Store, create_app

API = "/api/v1/observe"
INGEST = f"{API}/ingest/"
KEY = "correct-horse-battery"
NOW = 1_790_000_000.0
CLI = (sys.executable, "-m", "waxell_workers.cli.main")
ANSWER_S = 60.0
"""The longest that an answer may take, on a busy machine."""


NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Handed to clients that need none: each would make its own, and read all certificates for it."""

CLIENT = httpx.Client(
    timeout=ANSWER_S, trust_env=False, verify=NO_TLS, limits=httpx.Limits(max_keepalive_connections=0)
)
"""A connection for each request, as from as many clients."""


@dataclass
class Server:
    """A server process; what it says goes to a file."""

    db: Path
    log: Path
    process: subprocess.Popen[str]
    url: str
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def port(self) -> int:
        """The port that it listens at."""
        return int(self.url.rsplit(":", 1)[1])

    @property
    def said(self) -> str:
        """What it has written to stderr."""
        return self.log.read_text(errors="replace")

    def get(self, path: str, **options: Any) -> httpx.Response:
        """Ask for a path."""
        return CLIENT.get(self.url + path, **{"headers": self.headers} | options)

    def post(self, path: str, body: object = None, **options: Any) -> httpx.Response:
        """Post bytes as they are, anything else as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        options = {"headers": self.headers} | options
        return CLIENT.post(self.url + path, content=content, **options)

    def send(self, *records: dict[str, Any]) -> dict[str, Any]:
        """Post records to ingest, which takes them all."""
        answer = self.post(INGEST, ndjson(records))
        assert answer.status_code == 200, answer.text
        reply: dict[str, Any] = answer.json()
        assert reply["rejected"] == []
        return reply

    def raw(self, data: bytes, *, to_end: bool = True) -> bytes:
        """Send bytes; return what comes back until the server closes, or its first bytes."""
        with socket.create_connection(("127.0.0.1", self.port), ANSWER_S) as connection:
            found = b""
            with suppress(ConnectionError):  # it has heard enough
                connection.sendall(data)
            with suppress(ConnectionError):
                while part := connection.recv(65_536):
                    found += part
                    if not to_end:
                        break
            return found

    def status(self, data: bytes) -> int:
        """Send bytes; return the status of the first answer, 0 if the connection was closed without one."""
        found = self.raw(data, to_end=False)
        return int(found.split(b" ", 2)[1]) if found.startswith(b"HTTP/1.1 ") else 0

    def memory_mib(self) -> int:
        """Return the most memory that was resident since `forget_memory`, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) // 1024  # type: ignore[index]

    def forget_memory(self) -> None:
        """Begin to measure anew."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def lives(self) -> None:
        """Fail unless the process still serves."""
        assert self.process.poll() is None, self.said
        assert self.get("/api/stats").status_code == 200

    def end(self) -> int:
        """Stop it and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(ANSWER_S)


def start(
    directory: Path, *arguments: str, db: Path | None = None, key: str = "", before: str = "", **environ: str
) -> Server:
    """Start `waxell-workers serve` and wait for its address.

    Args:
        directory: where its log goes, and its database unless `db` says otherwise.
        arguments: for the command line.
        db: the database file.
        key: the key that it asks for.
        before: Python that the process runs first: shorter deadlines, say.
        environ: more of its environment.
    """
    db = db or directory / "runs.db"
    log = directory / f"serve-{time.monotonic_ns()}.log"
    code = f"{before}\nfrom waxell_workers.cli.main import main\nmain()"
    command = [sys.executable, "-c", code] if before else [*CLI]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, "serve", "--port", "0", "--db", str(db), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(WAXELL_SERVER_API_KEY=key, **environ),
        )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    server = Server(db, log, process, url, {"X-Wax-Key": key} if key else {})
    if not url:
        process.wait(START_S)
    return server


@contextmanager
def serving(directory: Path, *arguments: str, **options: Any) -> Iterator[Server]:
    """Start a server that is ended with the block."""
    server = start(directory, *arguments, **options)
    try:
        assert server.url.startswith("http://"), server.said
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


def cli(*arguments: object, timeout_s: float = 120.0, **environ: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command line to its end."""
    return subprocess.run(
        [*CLI, *map(str, arguments)],
        env=environment(**environ),
        capture_output=True,
        timeout=timeout_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def routes(**options: Any) -> list[Route]:
    """Return every route of the server but the static files'."""
    with Store() as store:
        return [route for route in create_app(store, **options).routes if isinstance(route, Route)]


def paths(method: str, run_id: str = "r") -> list[str]:
    """Return the path of every route that takes `method`, with names filled in."""
    found = [route.path for route in routes() if method in (route.methods or ())]
    assert found
    return [re.sub(r"\{[^}]+\}", "x", path.replace("{run_id}", run_id)) for path in found]


STATIC = ("/static/style.css", "/static/live.js", "/static/icon.svg")


def ndjson(records: Iterable[dict[str, Any]]) -> bytes:
    """Write records one a line."""
    return b"\n".join(json.dumps(record).encode() for record in records)


def request(
    method: str,
    target: str,
    headers: Iterable[tuple[str, str]] = (),
    body: bytes = b"",
    host: str = "127.0.0.1",
) -> bytes:
    """Write a request by hand, with `Connection: close`, the body's length, and Host unless it is empty."""
    lines = [f"{method} {target} HTTP/1.1", *([f"Host: {host}"] if host else []), "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape") + body


def started(run_id: str, **more: Any) -> dict[str, Any]:
    """Return the record of a run's start."""
    record = {"kind": "run_started", "id": f"s-{run_id}", "at": NOW, "run_id": run_id, "agent_name": "triage"}
    return record | {"workflow_name": "celery"} | more


def call(run_id: str, record_id: str, **more: Any) -> dict[str, Any]:
    """Return the record of a call."""
    record = {"kind": "llm_call", "id": record_id, "at": NOW, "run_id": run_id, "model": "gpt-4o-mini"}
    return record | {"tokens_in": 10, "tokens_out": 5} | more


def ended(run_id: str, **more: Any) -> dict[str, Any]:
    """Return the record of a run's end."""
    return {"kind": "run_ended", "id": f"e-{run_id}", "at": NOW + 1, "run_id": run_id} | more


def needs_root() -> None:
    """Skip what only root may do."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[Path]:
    """Mount a file system of a few MiB in memory; skipped where the kernel forbids it."""
    needs_root()
    directory.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no mount here: {done.stderr.decode().strip()}")
    try:
        yield directory
    finally:
        await_(
            lambda: (
                subprocess.run(["umount", str(directory)], capture_output=True, check=False).returncode == 0
            ),
            "unmounted disk",
        )
