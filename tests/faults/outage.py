"""What the tests of outages share: a server that counts, a writer and a shipper in processes of their own.

The server keeps no record, only how far each run is: so a day's records cost it nothing. The two programs
are this file, run as a script; the shipper's has a clock that goes faster than ours.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.harness import ROOT, environment
from waxell_workers.core import shipper as shipping
from waxell_workers.core import window
from waxell_workers.core.config import Settings, resolve
from waxell_workers.core.encoding import encode
from waxell_workers.core.journal import Journal
from waxell_workers.core.records import LLMCall, Record, RunEnded, RunStarted
from waxell_workers.core.segments import FIRST_LINE
from waxell_workers.core.shipper import Shipper
from waxell_workers.core.spool import prepare
from waxell_workers.testing.conformance.faults import FaultyHTTP, Request

RUN_RECORDS = 50
"""Records of a run: its beginning, its calls, its end."""
AT_ONCE = 20
"""Runs that are open at the same time, their records among each other's."""
MIB = 1 << 20
INGEST = "/api/v1/observe/ingest/"


class Counting(FaultyHTTP):
    """A server with ingest that counts, and sees to it that each run comes in order, each record once."""

    def __init__(self) -> None:
        super().__init__()
        self.records = 0
        self.repeats = 0
        self.killed = 0
        self.disorder: list[str] = []
        self._next: Counter[str] = Counter()

    def answer(self, request: Request) -> tuple[int, Any]:
        """Take a batch of records whose ids are `<run>-<number>`."""
        if request.path != INGEST:
            return 200, {"ingest_endpoint": INGEST}
        accepted = duplicates = 0
        for line in request.body.splitlines():
            run, _, number = json.loads(line)["id"].rpartition("-")
            if number == "killed":  # the end that a shipper makes for a run whose process died
                self.killed += 1
                accepted += 1
                continue
            if int(number) < self._next[run]:
                duplicates += 1
                continue
            if int(number) > self._next[run]:
                self.disorder.append(f"{run}: {number} after {self._next[run]}")
            self._next[run] = int(number) + 1
            accepted += 1
        request.body = request.raw = b""  # they are all kept
        with self._changed:
            self.records += accepted
            self.repeats += duplicates
        return 200, {"accepted": accepted, "duplicates": duplicates, "rejected": []}

    @property
    def whole_runs(self) -> int:
        """Runs of which every record has come."""
        return sum(count == RUN_RECORDS for count in self._next.values())


class Spool:
    """A spool with room for all that a test writes, and the programs that work in it."""

    def __init__(self, url: str, root: Path, limit: int = 4 << 30) -> None:
        self.settings = Settings(api_url=url, spool_dir=str(root), spool_limit=limit, shipper="external")
        self.directory = prepare(self.settings)

    def write(self, records: int, size: int = 0) -> dict[str, int]:
        """Write records as another process, which then dies; return how many were written and dropped."""
        with self.start("write", str(records), str(size), "0") as writer:
            return told(writer)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start one of the two programs."""
        own = {
            "WAXELL_API_URL": self.settings.api_url,
            "WAXELL_SPOOL_DIR": self.settings.spool_dir,
            "WAXELL_SPOOL_LIMIT": str(self.settings.spool_limit),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults.outage", *arguments],
            env=environment(**own),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def drain(self) -> dict[str, int]:
        """Deliver everything by a shipper process; return what it says of itself."""
        with self.start("ship", "1", "600") as process:
            return told(process)

    @property
    def bytes(self) -> int:
        """What the segments have."""
        return sum(path.stat().st_size for path in Path(self.directory).glob("0*.ndjson"))

    @property
    def is_empty(self) -> bool:
        """True if there is nothing but one segment's first line."""
        return self.bytes == len(FIRST_LINE)


def told(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """Wait for a program's end, which must be a good one; return what it reports."""
    out, _ = process.communicate(timeout=1200)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


# --- the programs ----------------------------------------------------------------------------------


def write(records: int, size: int, rate: float) -> None:
    """Write records of runs that go on at the same time, then wait until standard input is closed.

    Args:
        records: how many; fewer if the journal takes no more.
        size: characters of each call's prompt.
        rate: records a second, if the machine is fast enough; 0 for as many as it can.
    """
    journal, began, written = Journal(resolve({})), time.monotonic(), 0
    for record in runs(records, journal.token(), os.urandom(size // 2).hex()):
        if not journal.append(encode(record)):
            break
        written += 1
        if written == 1:
            print("begun", flush=True)
        if rate and written % AT_ONCE == 0:
            time.sleep(max(0.0, began + written / rate - time.monotonic()))
    print(json.dumps({"written": written, **journal.dropped}), flush=True)
    sys.stdin.read()


def runs(records: int, token: int, text: str) -> Iterator[Record]:
    """Make runs, `AT_ONCE` of them among each other; their records' ids are `<run>-<number>`."""
    prefix = os.urandom(4).hex()
    for first in range(0, records // RUN_RECORDS, AT_ONCE):
        names = [f"{prefix}r{run}" for run in range(first, min(first + AT_ONCE, records // RUN_RECORDS))]
        for number in range(RUN_RECORDS):
            for name in names:
                common: dict[str, Any] = {"id": f"{name}-{number}", "at": time.time(), "proc": token}
                if number == 0:
                    yield RunStarted(run_id=name, agent_name="agent", **common)
                elif number < RUN_RECORDS - 1:
                    yield LLMCall(run_id=name, model="m", prompt=text, **common)
                else:
                    yield RunEnded(run_id=name, **common)


def ship(pace: float, within_s: float = 0.0) -> None:
    """Ship by a clock that goes `pace` times as fast as ours, until nothing is left, or SIGTERM.

    Args:
        pace: how much faster.
        within_s: if not 0, leave by then at the latest, instead of 30 s after the last writer's end.
    """
    began = time.monotonic()
    fake = SimpleNamespace(
        monotonic=lambda: began + (time.monotonic() - began) * pace, time=time.time, sleep=time.sleep
    )
    if pace != 1:
        shipping.time = window.time = fake  # type: ignore[attr-defined]
        shipping._POLL_S = 2.0 / pace
    shipper = Shipper(resolve({}), prepare(resolve({})), stay=False)
    if within_s:
        shipper.stop(time.monotonic() + within_s)
    signal.signal(signal.SIGTERM, lambda *_: shipper.terminate())
    assert shipper.run()
    spent = resource.getrusage(resource.RUSAGE_SELF)
    peak = spent.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    report = {
        "peak": peak,
        "delivered": shipper.delivered,
        "failures": shipper._server.failures,
        "took_s": time.monotonic() - began,
        "cpu_s": spent.ru_utime + spent.ru_stime,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    program, *rest = sys.argv[1:]
    if program == "write":
        write(int(rest[0]), int(rest[1]), float(rest[2]))
    else:
        ship(*map(float, rest))
