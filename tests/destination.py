"""One spool and what ships from it, with records quickly made: for tests of the whole way in one process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil

from tests.faulty import FaultyServer, Run
from tests.harness import await_, environment
from waxell_workers.core import launch
from waxell_workers.core.collector import Collector
from waxell_workers.core.config import Settings
from waxell_workers.core.encoding import encode
from waxell_workers.core.inspection import holders
from waxell_workers.core.records import LLMCall, RunEnded, RunStarted
from waxell_workers.core.shipper import Shipper


class Destination:
    """One spool and what ships from it."""

    def __init__(self, server: FaultyServer, root: Path) -> None:
        self.settings = Settings(
            api_url=server.url, spool_dir=str(root / "spool"), shipper="external", flush_interval=0.2
        )
        self.collector = Collector(self.settings)
        self.directory = self.collector.journal.open()

    def append(self, *records: Any) -> None:
        """Write records, as this process's own where they name no other."""
        for record in records:
            proc = record.proc or self.collector.journal.token()
            assert self.collector.journal.append(encode(msgspec.structs.replace(record, proc=proc)))

    def ship(self, timeout_s: float = 30.0, **settings: Any) -> Shipper:
        """Ship everything that is there, in this process."""
        shipper = Shipper(self.settings, self.directory, stay=False)
        shipper.stop(time.monotonic() + timeout_s)
        assert shipper.run(0.0)
        return shipper

    def child(self, code: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run code in another process that records to the same spool."""
        head = (
            "import os, signal, sys, time, waxell_workers\n"
            "from waxell_workers.core.collector import current\n"
            "from waxell_workers.core.records import *\n"
            f"waxell_workers.init(api_url={self.settings.api_url!r}, spool_dir={self.settings.spool_dir!r},"
            " shipper='external', capture=())\n"
        )
        return subprocess.run(
            [sys.executable, "-c", head + code], env=environment(**more), text=True, timeout=60, check=False
        )


def started(run_id: str, **fields: Any) -> RunStarted:
    return RunStarted(id=f"{run_id}-s", at=time.time(), run_id=run_id, agent_name="agent", **fields)


def call(run_id: str, number: int = 0, **fields: Any) -> LLMCall:
    fields = {"model": f"{run_id}-{number}", **fields}
    return LLMCall(id=f"{run_id}-c{number}", at=time.time(), run_id=run_id, **fields)


def ended(run_id: str, state: str = "success", **fields: Any) -> RunEnded:
    return RunEnded(**{"id": f"{run_id}-e", "at": time.time(), "run_id": run_id, "state": state, **fields})


def states(server: FaultyServer) -> dict[str, str]:
    return {run.client_id: run.state for run in server.runs.values()}


def the_run(server: FaultyServer) -> Run:
    (run,) = server.runs.values()
    return run


def start_shipper(destination: Destination) -> psutil.Process:
    """Start a process that ships, as a worker does; return it once it has the lock."""
    launch.start(destination.settings, destination.directory, thread=False)
    return await_(lambda: shipper_of(destination), "a shipper")


def shipper_of(destination: Destination) -> psutil.Process | None:
    """Return the process that ships, if there is one."""
    holder = next(iter(holders(f"{destination.directory}/ship.lock")), None)
    return psutil.Process(holder.pid) if holder is not None else None


def end_shipper(destination: Destination) -> None:
    """Kill the process that ships, and wait for its end."""
    shipper = shipper_of(destination)
    if shipper is not None:
        shipper.kill()
        psutil.wait_procs([shipper], 10)
