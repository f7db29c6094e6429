"""Lines torn by a real SIGKILL: processes write large records as fast as they can, and die meanwhile."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from tests.crash.killing import group
from tests.harness import ROOT, START_S, await_, environment
from tests.torture import effort, found
from waxell_workers.core.collector import Collector
from waxell_workers.core.config import Settings
from waxell_workers.core.reader import Reader
from waxell_workers.core.records import LLMCall

KILLS = effort(25, 300)
WRITERS = 3
_WRITER = """
import os, sys, time
import waxell_workers
waxell_workers.init(capture=(), shipper="external")
names = [sys.argv[1] + name for name in "abc"]
name = names[0] if os.fork() else names[1] if os.fork() else names[2]
text = "é" * 60_000
log = os.open(f"{sys.argv[2]}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
number, end = 0, time.monotonic() + 60  # should nobody be left to kill us
while time.monotonic() < end:
    number += 1
    waxell_workers.record_llm_call(model=f"{name}-{number}", prompt_preview=text)
    os.write(log, f"{name}-{number}\\n".encode())
"""


@pytest.mark.timeout(effort(300, 3600))
def test_a_line_torn_by_a_kill_is_counted_and_spoils_nothing(tmp_path: Path) -> None:
    """Given writers that are killed in mid-write, when another process records after them, then all that had
    been taken is read, what was torn is counted, and both are the same as the bytes on the disk say."""
    seed = int(os.environ.get("WAXELL_TORTURE_SEED") or random.SystemRandom().randrange(1 << 32))
    chance = random.Random(seed)
    seen = Counter(kills=0, taken=0, torn=0)
    try:
        while seen["kills"] < KILLS or (not seen["torn"] and seen["kills"] < 20 * KILLS):
            seen["kills"] += 1
            taken, torn = _kill_and_compare(tmp_path / str(seen["kills"]), chance.uniform(0.0, 0.01), seed)
            seen["taken"], seen["torn"] = seen["taken"] + taken, seen["torn"] + torn
    finally:
        found(
            "torn lines",
            seed=str(seed),
            kills=seen["kills"],
            **{"records taken": seen["taken"], "lines torn": seen["torn"]},
        )
    assert seen["torn"] > 0
    assert seen["taken"] > seen["kills"]


def _kill_and_compare(place: Path, delay_s: float, seed: int) -> tuple[int, int]:
    """Return how many records were taken before the kill, and how many lines it has torn."""
    taken = _write_and_die(place, place.name, delay_s)
    directory = _record_after_them(place)
    torn, complete = _on_the_disk(directory)
    assert (taken | {"last"}) - complete == set(), f"seed {seed}"
    models, counted = _as_it_is_read(directory)
    assert models == sorted(complete), f"seed {seed}"
    assert counted == torn, f"seed {seed}"
    for path in [*directory.iterdir(), *(place / "taken").iterdir()]:
        path.unlink()  # some megabytes each
    return len(taken), torn


def _write_and_die(place: Path, name: str, delay_s: float) -> set[str]:
    """Return what was taken, of three writers that died at the same moment."""
    log = place / "taken"
    log.mkdir(parents=True)
    settings = environment(
        WAXELL_API_URL="http://127.0.0.1:9", WAXELL_SPOOL_DIR=str(place / "spool"), HOME=str(place),
        PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, name, str(log)], env=settings, start_new_session=True
    )
    try:
        await_(lambda: len(list(log.iterdir())) == WRITERS, "writers at work", START_S)
        time.sleep(delay_s)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        await_(lambda: not group(process.pid), "death of the writers", START_S)
    lines = [line for path in log.iterdir() for line in path.read_text().split("\n")[:-1]]
    return set(lines)


def _record_after_them(place: Path) -> Path:
    collector = Collector(
        Settings(api_url="http://127.0.0.1:9", spool_dir=str(place / "spool"), shipper="external")
    )
    assert collector.record(LLMCall, model="last")
    return Path(collector.journal.directory)


def _on_the_disk(directory: Path) -> tuple[int, set[str]]:
    """Return the number of torn lines, and the models of the whole ones."""
    torn, models = 0, set()
    [segment] = directory.glob("*.ndjson")
    for line in filter(None, segment.read_bytes().split(b"\n")):
        try:
            record = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            torn += 1
            continue
        models.add(record.get("model"))
    return torn, models - {None}


def _as_it_is_read(directory: Path) -> tuple[list[str], int]:
    """Return the models that the shipper reads, sorted, and the torn lines that it counts."""
    models: list[str] = []
    with closing(Reader(str(directory), None, 0)) as reader:
        while entries := reader.read():
            models += [entry.record.model for entry in entries if isinstance(entry.record, LLMCall)]
        return sorted(models), reader.torn
