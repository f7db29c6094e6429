"""`waxell-workers ship --drain`: a bar for who watches, lines for who reads, the same last line for both."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from dataclasses import dataclass

import pytest

from tests.faulty import FaultyServer
from tests.harness import environment
from waxell_workers.core.config import resolve
from waxell_workers.core.encoding import encode
from waxell_workers.core.journal import Journal
from waxell_workers.core.records import LLMCall, RunEnded, RunStarted

RUN_S = 120.0
COMMAND = [sys.executable, "-m", "waxell_workers.cli.main", "ship", "--drain"]
RECORDS = 6000
"""More than the shipper reads ahead (4096): it cannot know them all at the beginning."""
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class Drained:
    """What a drain wrote where."""

    status: int
    out: str
    err: str


@pytest.fixture
def faulty():
    """A strict server with ingest."""
    with FaultyServer(ingest=True) as server:
        yield server


@pytest.fixture
def spool(tmp_path, faulty):
    """The environment of a spool in which records wait."""
    own = {"WAXELL_API_URL": faulty.url, "WAXELL_SPOOL_DIR": str(tmp_path / "spool")}
    journal = Journal(resolve({}, {**own, "HOME": str(tmp_path)}))
    for number in range(RECORDS // 100):
        run_id = f"r{number}"
        calls = [LLMCall(id=f"{run_id}-{call}", at=1.0, run_id=run_id, model="m") for call in range(98)]
        started = RunStarted(id=run_id, at=1.0, run_id=run_id, agent_name="a")
        for record in (started, *calls, RunEnded(id=f"{run_id}-end", at=1.0, run_id=run_id)):
            assert journal.append(encode(record))
    return environment(**own, HOME=str(tmp_path), TERM="xterm-256color", WAXELL_FLUSH_MAX_RECORDS="200")


def drain_in_a_terminal(environ: dict[str, str], *options: str, columns: int = 80) -> Drained:
    """Run it with stderr on a terminal and stdout in a pipe."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [*COMMAND, *options]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=end, stdin=end)
    os.close(end)
    seen: list[bytes] = []

    def watch() -> None:
        while True:
            try:
                chunk = os.read(terminal, 65536)
            except OSError:  # the other end is closed
                return
            if not chunk:
                return
            seen.append(chunk)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = process.communicate(timeout=RUN_S)
    watcher.join(30)
    os.close(terminal)
    return Drained(process.returncode, out.decode(), b"".join(seen).decode())


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_a_bar_shows_how_far_it_is(spool, faulty, columns):
    """Given more than the shipper reads ahead, the bar knows the whole from its first frame to its last."""
    done = drain_in_a_terminal(spool, columns=columns)
    assert done.status == 0
    assert done.out == f"delivered {RECORDS}, pending 0, rejected 0\n"
    counts = [tuple(map(int, found)) for found in re.findall(r"(\d+)/(\d+)", ESCAPE.sub("", done.err))]
    assert counts[0] == (0, RECORDS)
    assert counts[-1] == (RECORDS, RECORDS)
    assert {total for _, total in counts} == {RECORDS}
    drawn = ESCAPE.sub("", done.err)
    assert re.search(r"[\d,]+/s", drawn)
    assert "━" in drawn
    assert max(len(line) for line in re.split(r"[\r\n]+", drawn)) <= columns
    assert "delivered 200, pending" not in drawn
    assert len(faulty.records) == RECORDS


def test_on_a_terminal_a_failure_is_said_above_the_bar(spool, faulty):
    """Given a server that fails, the reason is on the terminal, the count on stdout, and the status 1."""
    faulty.mode("503")
    done = drain_in_a_terminal(spool, "--timeout", "2")
    assert faulty.fired["503"]
    assert done.status == 1
    assert re.fullmatch(r"delivered 0, pending \d+, rejected 0\n", done.out)
    assert "503; everything is kept" in " ".join(ESCAPE.sub("", done.err).split())


def test_without_a_terminal_there_are_lines(spool):
    """Logs get a line for each step, without any escape; stdout is the same."""
    done = subprocess.run(COMMAND, env=spool, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert (done.returncode, done.stdout) == (0, f"delivered {RECORDS}, pending 0, rejected 0\n")
    lines = done.stderr.splitlines()
    assert len(lines) >= RECORDS / 200  # each batch is told
    assert all(re.fullmatch(r"delivered \d+, pending \d+", line) for line in lines)
    assert lines[-1] == f"delivered {RECORDS}, pending 0"


def test_where_nothing_waits_the_bar_ends_at_once(tmp_path, faulty):
    """Given no spool at all, a terminal sees no error."""
    environ = environment(
        WAXELL_API_URL=faulty.url,
        WAXELL_SPOOL_DIR=str(tmp_path / "none"),
        HOME=str(tmp_path),
        TERM="xterm-256color",
    )
    done = drain_in_a_terminal(environ)
    assert (done.status, done.out) == (0, "delivered 0, pending 0, rejected 0\n")
