"""Where the crash programs are put on: a program, a server, a spool, and a deadline that dumps stacks."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.crash.programs.promises import Promises
from tests.faulty import FaultyServer
from tests.harness import await_, environment

PROGRAMS = Path(__file__).parent / "programs"
DEADLINE_S = 120.0
"""After so long, a program hangs."""
ARRIVAL_S = 30.0
"""How long a shipper that goes on by itself may take for the rest."""


@dataclass
class Stage:
    """One server and one spool, and the programs that share them."""

    server: FaultyServer
    directory: Path
    settings: dict[str, str]

    @property
    def notes(self) -> Path:
        """The file in which programs note what they promise."""
        return self.directory / "notes.txt"

    @property
    def environ(self) -> dict[str, str]:
        """The programs' environment."""
        own = {
            "WAXELL_API_URL": self.server.url,
            "WAXELL_SPOOL_DIR": str(self.directory / "spool"),
            "WAXELL_FLUSH_INTERVAL": "0.2",
            "HOME": str(self.directory),
            "TMPDIR": str(self.directory),
        }
        return environment(**own, **self.settings)

    @contextmanager
    def start(self, name: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
        """Start a program with its standard streams in our hands; it ends with the block."""
        process = subprocess.Popen(
            [sys.executable, str(PROGRAMS / f"{name}.py"), *map(str, arguments)],
            env=self.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def run(self, name: str, *arguments: object, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        """Run a program to its end, which must be silent and in time; return what it reported."""
        with self.start(name, self.notes, *arguments) as process:
            return finish(process, deadline_s)

    def ship_the_rest(self) -> None:
        """Deliver what the program left in the journal, as its next start would."""
        with self.start("shipping", "drain") as shipping:
            finish(shipping)

    def assert_promises_kept(self, *, calls: int) -> Promises:
        """Every call and run that was noted is at the server, once, and there were at least so many calls."""
        self.ship_the_rest()
        promises = self.promises()
        assert len(promises.calls) >= calls, f"only {len(promises.calls)} calls were noted"
        deadline = time.monotonic() + ARRIVAL_S
        while (broken := promises.broken(self.records())) and time.monotonic() < deadline:
            self.server.wait_until(lambda: False, 0.5)  # a shipper that was there already may be at work
        assert broken == {}, f"broken promises: {broken}"
        assert self.server.violations == []
        return promises

    def promises(self) -> Promises:
        """What the programs have noted so far."""
        return Promises.of(self.notes)

    def records(self) -> list[dict[str, Any]]:
        """What has arrived at the server."""
        return list(self.server.records.copy().values())

    def ends(self) -> list[dict[str, Any]]:
        """The ends of runs that have arrived."""
        return [record for record in self.records() if record["kind"] == "run_ended"]


def read_report(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a program reports while it goes on."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
    return json.loads(process.stdout.readline()) if ready else finish(process, 0.0)


def finish(process: subprocess.Popen[str], deadline_s: float = DEADLINE_S) -> dict[str, Any]:
    """Wait for a program's silent end; one that hangs dumps its stacks into the test's failure."""
    try:
        stdout, stderr = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        _, stderr = process.communicate(timeout=10)
        pytest.fail(f"the program hangs:\n{stderr[-6000:]}")
    assert (process.returncode, stderr) == (0, ""), f"ended with {process.returncode}:\n{stderr[-6000:]}"
    return json.loads(stdout.splitlines()[-1]) if stdout.strip() else {}


def await_a_look_at_who_lives(stage: Stage) -> None:
    """Return when a run was ended whose process really died later than what is asked about."""
    with stage.start("witness") as witness:
        finish(witness)

    def told() -> bool:
        witness = {record["run_id"] for record in stage.records() if record.get("agent_name") == "witness"}
        return bool(witness & {record["run_id"] for record in stage.ends()})

    await_(told, "end of the witness")
