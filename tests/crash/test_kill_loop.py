"""Torture: writers and shippers are killed at random instants, and nothing that was promised may be missing.

A writer prints a marker when `record()` has returned; what was printed was promised. Segments are tiny, so
that rotation, seals and repeats happen all the time. `WAXELL_TORTURE_KILLS` sets the number of kills.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from tests.harness import Server, await_, children_in, environment, start_server

KILLS = int(os.environ.get("WAXELL_TORTURE_KILLS", "60"))
WRITERS = 3

_WRITER = """
import os, sys, time
import waxell_workers
from waxell_workers.core.collector import current
waxell_workers.init(capture=())
name = sys.argv[1]
number = 0
while True:
    with waxell_workers.WaxellContext("writer", metadata={"name": name}) as run:
        for _ in range(20):
            number += 1
            marker = f"{name}-{number}"
            before = current().stats().recorded
            run.record_llm_call(model=marker, prompt_preview="x" * (number * 37 % 3000))
            if current().stats().recorded > before:
                os.write(1, marker.encode() + b"\\n")
            time.sleep(0.001)
"""

_SHIPPER = """
import sys
from waxell_workers.core import foreground, shipper
from waxell_workers.core.config import resolve
shipper.SEGMENT_BYTES = 64 << 10
foreground.run(resolve({}), drain=False)
"""


def promised(logs: list[Path]) -> set[str]:
    """The markers whose line is complete."""
    return {line.decode() for log in logs for line in log.read_bytes().split(b"\n")[:-1]}


def issued(marker: str, names: set[str]) -> bool:
    return marker.rsplit("-", 1)[0] in names


def test_no_kill_loses_or_doubles_what_was_promised(tmp_path: Path) -> None:
    """Given random kills of writers and shippers, each printed marker arrives exactly once, nothing that
    was not issued arrives, and every run of a killed writer is closed."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with children_in(tmp_path / "server") as children:
        server = start_server(children, tmp_path / "server")
        settings = environment(
            WAXELL_API_URL=server.url,
            WAXELL_SPOOL_DIR=str(tmp_path / "spool"),
            WAXELL_SHIPPER="external",
            WAXELL_FLUSH_INTERVAL="0.2",
        )
        logs, running, errors = _torture(chance, tmp_path, settings)
        try:
            _drain(server, settings, promised(logs))
        finally:
            for process in running:
                process.kill()
                process.wait()
        calls = server.calls()
        wanted = promised(logs)
        names = {log.stem for log in logs}
        assert len(wanted) > KILLS * 10
        assert wanted - calls.keys() == set()
        assert {marker: count for marker, count in calls.items() if count != 1} == {}
        assert {marker for marker in calls if not issued(marker, names)} == set()
        assert {run["status"] for run in server.runs()} <= {"success", "killed"}
        assert errors.read_text() == ""


def _torture(
    chance: random.Random, tmp_path: Path, settings: dict[str, str]
) -> tuple[list[Path], list[subprocess.Popen[bytes]], Path]:
    logs: list[Path] = []
    errors = tmp_path / "errors.txt"

    def start(code: str, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out, errors.open("ab") as err:
            return subprocess.Popen(
                [sys.executable, "-c", code, *arguments], stdout=out, stderr=err, env=settings
            )

    def start_writer() -> subprocess.Popen[bytes]:
        logs.append(tmp_path / f"w{len(logs)}.txt")
        return start(_WRITER, logs[-1].stem, log=logs[-1])

    writers = [start_writer() for _ in range(WRITERS)]
    shipper = start(_SHIPPER, log=tmp_path / "shipper.txt")
    try:
        for kill in range(KILLS):
            time.sleep(chance.uniform(0.0, 0.25))
            if kill % 3 == 0:
                shipper.kill()
                shipper.wait()
                shipper = start(_SHIPPER, log=tmp_path / "shipper.txt")
                continue
            victim = chance.randrange(WRITERS)
            # It has got as far as its first promise, and is somewhere behind it.
            await_(lambda v=victim: logs_of(writers, logs, v).stat().st_size, "first promise", 60)
            writers[victim].kill()
            writers[victim].wait()
            writers[victim] = start_writer()
            _place[writers[victim].pid] = logs[-1]
        for writer in writers:
            writer.kill()
            writer.wait()
    except BaseException:
        for process in [*writers, shipper]:
            process.kill()
            process.wait()
        raise
    return logs, [shipper], errors


_place: dict[int, Path] = {}


def logs_of(writers: list[subprocess.Popen[bytes]], logs: list[Path], victim: int) -> Path:
    """The file to which a writer prints its promises."""
    return _place.get(writers[victim].pid, logs[victim])


def _drain(server: Server, settings: dict[str, str], wanted: set[str]) -> None:
    """Wait for the shipper that runs to deliver what is left and to close the runs of the dead."""

    def done() -> bool:
        return wanted <= server.calls().keys() and all(run["status"] != "running" for run in server.runs())

    await_(done, "delivery of everything that was promised", 120)
