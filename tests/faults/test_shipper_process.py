"""The shipper's process under every treatment: stopped, killed, doubled, crashing, upgraded, signalled.

Workers, shippers, signals, sessions and terminals are real; each test sees its fault happen.
"""

from __future__ import annotations

import itertools
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.acceptance.conftest import children, make_worker, model, session_children, valkey  # noqa: F401
from tests.destination import Destination, call, started
from tests.faulty import FaultyServer
from tests.harness import ROOT, Worker, await_, environment, shippers_of
from tests.torture import LONG, effort, found
from waxell_workers.core import caution, launch
from waxell_workers.core import collector as collecting
from waxell_workers.core.collector import Collector
from waxell_workers.core.config import Settings
from waxell_workers.core.inspection import holders, survey
from waxell_workers.core.ledger import Ledger

pytestmark = pytest.mark.timeout(600 if LONG else 180)

PREFORK = ("--pool", "prefork", "--concurrency", "2")
FLUSH_S = 1.0
SLACK_S = 5.0
"""What a busy machine may add; without a deadline, a flush waits for ever."""
STOP_S = 3.0
"""`shutdown_timeout`: the longest that a worker's stop may wait for the shipper."""
WORKER = """
import os, sys, time, waxell_workers
from waxell_workers.core import tasks
tasks.worker_booting(); tasks.worker_ready()
print("up", flush=True)
for line in sys.stdin:
    waxell_workers.record_llm_call(model=line.strip())
    for _ in range(int(os.environ.get("LOOKS", "0"))):
        tasks.worker_ready(); time.sleep(0.1)
    print("recorded", flush=True)
"""
"""A worker without a framework, that records a call for each line of its stdin."""


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(ingest=True) as server:
        yield server
        assert server.violations == []


@pytest.fixture
def destination(server: FaultyServer, tmp_path: Path) -> Iterator[Destination]:
    yield Destination(server, tmp_path)
    end_shippers(tmp_path / "spool")


def end_shippers(spool: Path) -> None:
    for shipper in shippers_of(spool):
        shipper.kill()


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(server: FaultyServer, tmp_path: Path) -> Iterator[Start]:
    """Start a program of a test's beside a spool of the test's, with its stdin and stdout in our hands."""
    processes: list[subprocess.Popen[str]] = []

    def start_program(code: str = WORKER, *, site: Path = ROOT, **more: str) -> subprocess.Popen[str]:
        own = {
            "WAXELL_API_URL": server.url,
            "WAXELL_SPOOL_DIR": str(tmp_path / "spool"),
            "WAXELL_FLUSH_INTERVAL": "0.2",
            "WAXELL_CAPTURE": "",
            "PYTHONPATH": str(site),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment(**own, **more),
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start_program
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
    end_shippers(tmp_path / "spool")


def tell(worker: subprocess.Popen[str], line: str) -> None:
    """Have a worker record a call, and wait until it has."""
    assert worker.stdin is not None
    worker.stdin.write(f"{line}\n")
    worker.stdin.flush()
    assert hear(worker) == "recorded"


def hear(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


def the_shipper(spool: Path) -> psutil.Process:
    """Wait for the one that has the right to ship; a second one may be waiting for it."""

    def find() -> psutil.Process | None:
        locks = [lock for path in spool.glob("*/ship.lock") for lock in holders(str(path))]
        return psutil.Process(locks[0].pid) if locks else None

    return await_(find, "shipper", 60)


def models(server: FaultyServer) -> Counter[str]:
    """Return how often the call of each model arrived."""
    return Counter(call["model"] for call in server.calls)


def assert_each_once(server: FaultyServer, sent: dict[str, str]) -> None:
    """Every task of a worker's has one run, ended, with exactly its own call."""

    def arrived() -> dict[str, list[str]]:
        runs = [run for run in server.runs.copy().values() if run.ends]
        return {run.start["task_id"]: [call["model"] for call in run.calls] for run in runs}

    await_(lambda: len(arrived()) >= len(sent), f"{len(sent)} ended runs")
    assert arrived() == {task: [marker] for task, marker in sent.items()}
    assert [run.ends for run in server.runs.values() if len(run.ends) != 1] == []


# --- stopped ----------------------------------------------------------------------------------------


def test_a_shipper_that_is_stopped_holds_up_nothing(make_worker, server) -> None:  # noqa: F811
    """Given SIGSTOP, tasks go on, each flush and the worker's stop keep to their deadlines, and doctor says
    what is the matter; given SIGCONT, everything arrives, once."""
    worker = make_worker(server.url, WAXELL_FLUSH="task", WAXELL_FLUSH_TIMEOUT=str(FLUSH_S))
    worker.start(*PREFORK)
    shipper = the_shipper(worker.spool)
    await_((next(worker.spool.iterdir()) / "ship.sock").exists, "socket", 30)  # it takes requests
    shipper.suspend()
    began = time.monotonic()
    sent = worker.send_many(4)
    worker.await_received_results(4)
    assert time.monotonic() - began <= 4 * FLUSH_S + SLACK_S
    assert doctor(worker) == ["fail"]
    took = worker.terminate()
    assert shipper.status() == psutil.STATUS_STOPPED
    assert server.calls == []
    assert took <= STOP_S + SLACK_S
    shipper.resume()
    assert_each_once(server, sent)
    shipper.wait(60)


def doctor(worker: Worker) -> list[str]:
    """Return what doctor finds of the shipper that is said to be stopped."""
    done = subprocess.run(
        [sys.executable, "-m", "waxell_workers.cli.main", "doctor", "--no-send", "--json"],
        env=worker.environ(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    findings = [json.loads(line) for line in done.stdout.splitlines()]
    return [each["status"] for each in findings if each["area"] == "shipper" and "stopped" in each["text"]]


# --- killed -----------------------------------------------------------------------------------------


def test_each_shipper_that_is_killed_is_replaced(server: FaultyServer, start: Start, tmp_path: Path) -> None:
    """Given SIGKILL again and again while the worker lives, each time another one takes over, and no record
    is lost or comes twice."""
    worker = start(LOOKS="1")
    assert hear(worker) == "up"
    killed, times = [], effort(2, 4)
    for name in "abcd"[:times]:
        shipper = the_shipper(tmp_path / "spool")
        shipper.kill()
        killed.append(shipper.pid)
        await_(partial(tell_until_shipped, worker, name, server), "delivery", 60)
    assert len(set(killed)) == times
    assert set(models(server).values()) == {1}


def tell_until_shipped(worker: subprocess.Popen[str], name: str, server: FaultyServer) -> bool:
    """Record a call every time; True once one of them has arrived."""
    tell(worker, f"{name}-{time.monotonic()}")
    return any(each.startswith(name) for each in models(server))


def test_a_pool_process_replaces_it_at_the_end_of_a_run(make_worker, server) -> None:  # noqa: F811
    """Given a main process that is stopped, so that it looks after nothing, when the shipper is killed, then
    the pool process that ends a run starts another, and the run arrives."""
    worker = make_worker(server.url)
    worker.start(*PREFORK)
    task = worker.send("ask_then_sleep", "slow", 6)
    server.wait_until(lambda: bool(server.calls), 30)
    os.kill(worker.process.pid, signal.SIGSTOP)
    try:
        first = the_shipper(worker.spool)
        first.kill()
        assert_each_once(server, {task: "slow"})
        assert psutil.Process(worker.process.pid).status() == psutil.STATUS_STOPPED
        assert the_shipper(worker.spool).pid != first.pid
    finally:
        os.kill(worker.process.pid, signal.SIGCONT)


class Clock:
    """`time`, for a module that asks it how late it is."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        return self.now


def test_one_that_never_stays_is_started_ever_more_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Given shippers that die at once, the worker starts five, at intervals that double; it says so, once,
    and from then on tries each ten minutes: what keeps them from staying may have been mended."""
    clock, starts = Clock(), []
    monkeypatch.setattr(collecting, "time", clock)
    monkeypatch.setattr(launch, "start", lambda *_, **__: starts.append(clock.now))
    settings = Settings(api_url="http://127.0.0.1:9", spool_dir=str(tmp_path), shipper="process")
    collector = Collector(settings, in_worker=True)
    for _ in range(3600):
        collector.ensure_shipper()
        clock.now += 1
    gaps = [round(after - before) for before, after in itertools.pairwise(starts)]
    assert gaps[: launch.MOST_STARTS] == [4, 8, 16, 32, 64]
    assert set(gaps[launch.MOST_STARTS :]) == {600}
    assert len(gaps) > launch.MOST_STARTS
    assert caplog.text.count("no shipper stays") == 1


# --- doubled ----------------------------------------------------------------------------------------


def test_of_ten_that_are_started_at_once_one_ships(destination: Destination, server: FaultyServer) -> None:
    """Given ten shippers at the same moment (at length; else four), one has the lock, the others leave by
    themselves and in peace, and no record is sent twice."""
    many = effort(4, 10)
    for number in range(200):
        destination.append(call("", number))
    order = {"directory": destination.directory, "settings": {"api_url": server.url, "flush_interval": 0.1}}
    shippers = [start_shipper(order) for _ in range(many)]
    try:
        assert server.wait_until(lambda: len(server.calls) == 200, 60)
        await_(lambda: sum(shipper.poll() is None for shipper in shippers) == 1, "others that leave", 60)
        assert sorted(shipper.poll() for shipper in shippers if shipper.poll() is not None) == [0] * (
            many - 1
        )
        assert server.duplicates == 0
    finally:
        for shipper in shippers:
            shipper.kill()
            shipper.wait()


def start_shipper(order: dict[str, Any], **more: str) -> subprocess.Popen[bytes]:
    """Start a shipper as a worker does, but as our own child."""
    shipper = subprocess.Popen(
        [sys.executable, "-m", "waxell_workers.core.foreground"],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=environment(**{"PYTHONPATH": str(ROOT)} | more),
    )
    assert shipper.stdin is not None
    shipper.stdin.write(json.dumps(order).encode() + b"\n")
    shipper.stdin.close()
    return shipper


# --- crashing on one record -------------------------------------------------------------------------

CRASHES = {
    "exit": "os._exit(77)",
    "segfault": "os.kill(os.getpid(), signal.SIGSEGV)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",  # as the kernel's memory killer does
    "exception": "raise RuntimeError('a bug')",
}
SOONER = ("_CALM_S = 5.0", "_CALM_S = 0.5")
DEADLY_SITE = """
import os, signal, sys
if any("waxell_workers.core.foreground" in word for word in sys.orig_argv):
    from waxell_workers.export import waxell
    export = waxell.WaxellExporter.export
    def dying(self, batch, deadline):
        for run in batch:
            for record in run.records:
                if getattr(record, "model", "") == "poison" or getattr(record, "agent_name", "") == "poison":
                    with open(os.environ["DEATHS"], "a") as notes:
                        print(sum(len(each.records) for each in batch), file=notes)
                    CRASH
        return export(self, batch, deadline)
    waxell.WaxellExporter.export = dying
"""
"""What has the shipper, and it alone, crash at one record; found by Python before anything else."""


def a_copy_of_the_package(place: Path, site: str = "", **changes: tuple[str, str]) -> Path:
    """Copy the package to a place of its own, changed; processes that import from there have their shippers
    do so too.

    Args:
        place: where to.
        site: a `sitecustomize` for every process.
        changes: module of `core` to a text in it and what is to stand there.
    """
    shutil.copytree(ROOT / "waxell_workers", place / "waxell_workers", ignore=shutil.ignore_patterns("*.pyc"))
    for module, (old, new) in changes.items():
        path = place / "waxell_workers" / "core" / f"{module}.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    if site:
        (place / "sitecustomize.py").write_text(site)
    return place


def run_shippers(destination: Destination, server: FaultyServer, site: Path, deaths: Path) -> list[int]:
    """Start shipper after shipper, as a worker does, until one leaves by itself; return how they ended."""
    order = {"directory": destination.directory, "settings": {"api_url": server.url, "flush_interval": 0.1}}
    ends: list[int] = []
    while len(ends) < 12 and ends[-1:] != [0]:
        own = {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "DEATHS": str(deaths)}
        shipper = start_shipper(order, **own)
        try:
            await_(partial(has_done_all, shipper, destination.directory), "end", 60)
        finally:  # not by itself: this process has written, and lives
            for _ in range(2):
                shipper.send_signal(signal.SIGTERM)
                time.sleep(0.5)
            ends.append(shipper.wait(30))
    return ends


def has_done_all(shipper: subprocess.Popen[bytes], directory: str) -> bool:
    return shipper.poll() is not None or not survey(directory).pending


def quarantined(directory: str) -> list[tuple[str, str]]:
    """Return id and reason of what is in quarantine."""
    path = Path(directory, "quarantine.ndjson")
    lines = path.read_text().splitlines() if path.exists() else []
    return [(each["record"]["id"], each["reason"]) for each in map(json.loads, lines)]


@pytest.mark.parametrize("crash", CRASHES if LONG else ["segfault"])
def test_a_record_that_kills_shippers_goes_to_quarantine(
    server: FaultyServer, destination: Destination, tmp_path: Path, crash: str
) -> None:
    """Given one record among many at which each shipper dies, it is found, kept in quarantine with the reason
    and counted; every other record of its run and of all others arrives, once."""
    deadly = DEADLY_SITE.replace("CRASH", CRASHES[crash])
    site = a_copy_of_the_package(tmp_path / "site", deadly, caution=SOONER)
    child = "\n".join(
        [
            "for number in range(40):",
            "    with waxell_workers.WaxellContext(f'agent-{number}') as run:",
            "        run.record_llm_call(model=f'before-{number}')",
            "        if number == 17: run.record_llm_call(model='poison')",
            "        run.record_llm_call(model=f'after-{number}')",
        ]
    )
    destination.child(child)
    ends = run_shippers(destination, server, site, deaths := tmp_path / "deaths")
    found(f"a shipper that dies of a record ({crash})", deaths=len(ends) - 1)
    in_hand = [int(line) for line in deaths.read_text().split()]
    assert len(in_hand) == len(ends) - 1  # each death was the record's
    assert in_hand[0] > caution._FEW >= in_hand[1] > 1
    assert in_hand[2:] == [1] * caution.DEATHS
    assert [reason for _, reason in quarantined(destination.directory)] == [caution.REASON]
    assert models(server) == Counter({f"{when}-{n}": 1 for when in ("before", "after") for n in range(40)})
    assert [run.state for run in server.runs.values()] == ["success"] * 40
    assert server.duplicates == 0
    assert survey(destination.directory).quarantined == 1
    with closing(Ledger(destination.directory)) as ledger:
        assert ledger.deaths() == {}


@pytest.mark.skipif(not LONG, reason="takes half a minute: only at length")
def test_a_beginning_that_kills_shippers_costs_the_run_no_call(
    server: FaultyServer, destination: Destination, tmp_path: Path
) -> None:
    """Given a run whose beginning is the deadly record, over REST, which needs it for every other record of
    the run, then the run begins under another name and has its calls."""
    server.ingest = False
    site = a_copy_of_the_package(
        tmp_path / "site",
        DEADLY_SITE.replace(
            "for record in run.records:", "for record in [*run.records, run.run.started]:"
        ).replace("CRASH", CRASHES["exit"]),
    )
    destination.child("with waxell_workers.WaxellContext('poison') as run: run.record_llm_call(model='m')")
    ends = run_shippers(destination, server, site, tmp_path / "deaths")
    assert ends == [77] * (len(ends) - 1) + [0]
    assert [reason for _, reason in quarantined(destination.directory)] == [caution.REASON]
    assert [run.start["agent_name"] for run in server.runs.values()] == ["unknown"]
    assert models(server) == Counter(["m"])


@pytest.mark.skipif(not LONG, reason="takes a minute: only at length")
def test_a_worker_gets_rid_of_a_record_that_kills_its_shippers(
    server: FaultyServer, start: Start, tmp_path: Path
) -> None:
    """Given a worker that lives, its own restarts come to the end of it, and what is recorded meanwhile
    arrives before that."""
    site = a_copy_of_the_package(tmp_path / "site", DEADLY_SITE.replace("CRASH", CRASHES["segfault"]))
    worker = start(site=site, LOOKS="1", DEATHS=str(tmp_path / "deaths"))
    assert hear(worker) == "up"
    began = time.monotonic()
    for model_name in ("first", "poison", "last"):
        tell(worker, model_name)
    directory = await_(lambda: next(iter((tmp_path / "spool").iterdir()), None), "destination")
    number = 0
    while not quarantined(str(directory)) and time.monotonic() - began < 300:
        tell(worker, f"meanwhile-{number}")
        number += 1
    took = time.monotonic() - began
    found("a worker's own restarts come to the end of a deadly record", seconds=round(took))
    assert [reason for _, reason in quarantined(str(directory))] == [caution.REASON]
    tell(worker, "afterwards")
    await_(lambda: models(server)["afterwards"] and models(server)[f"meanwhile-{number - 1}"], "the rest")
    assert models(server)["first"] == models(server)["last"] == 1


def test_shippers_that_are_killed_while_a_server_hangs_blame_no_record(
    server: FaultyServer, destination: Destination
) -> None:
    """Given one record, a server that hangs, and a shipper that is killed each time while it waits, then the
    record is not to blame, however often that happens, and arrives at last."""
    destination.append(started("a"))
    server.mode("hang", endpoint="ingest")
    order = {"directory": destination.directory, "settings": {"api_url": server.url, "flush_interval": 0.1}}
    note = Path(destination.directory, "in_hand")
    for number in range(caution.DEATHS + 1):
        shipper = start_shipper(order)
        await_(lambda: server.fired["hang"] > number, "request", 60)  # noqa: B023
        await_(lambda: note.read_text() == "", "a moment", 10)
        shipper.kill()
        shipper.wait()
    server.mode("healthy")
    destination.ship()
    assert [run.client_id for run in server.runs.values()] == ["a"]
    assert quarantined(destination.directory) == []


def test_two_kills_at_a_record_prove_nothing(
    server: FaultyServer, destination: Destination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given two shippers that are killed a moment after they took a record in hand, alone, the record arrives
    when they are left in peace."""
    destination.append(started("a"))
    server.mode("hang", endpoint="ingest")
    order = {"directory": destination.directory, "settings": {"api_url": server.url, "flush_interval": 0.1}}
    note = Path(destination.directory, "in_hand")
    site = a_copy_of_the_package(tmp_path / "site", caution=SOONER)
    monkeypatch.setattr(caution, "_CALM_S", 0.5)
    deaths = 0
    for _ in range(12):  # on a busy machine the moment may pass before the signal comes
        before = server.fired["hang"]
        shipper = start_shipper(order, PYTHONPATH=str(site))
        await_(lambda: server.fired["hang"] > before, "request", 60)  # noqa: B023
        shipper.kill()
        shipper.wait()
        deaths += note.read_text() == "a-s\n"
        if deaths == 2:
            break
    assert deaths == 2
    server.mode("healthy")
    destination.ship()
    assert [run.client_id for run in server.runs.values()] == ["a"]
    with closing(Ledger(destination.directory)) as ledger:
        assert ledger.deaths() == {}


# --- upgraded ---------------------------------------------------------------------------------------

NEWER = {
    "records": ("FORMAT_VERSION = 1", "FORMAT_VERSION = 2"),
    "ledger": ("user_version = 1;", "user_version = 2;"),
}
NEWER_WORKER = f"""
from waxell_workers.core import ledger, segments
from waxell_workers.core.collector import current
assert segments.FORMAT_VERSION == 2 and ledger._VERSION == 2
directory = current().journal.open()
segments.create_segment(directory, (segments.segment_numbers(directory) or [0])[-1] + 1)
{WORKER}
"""
"""A worker of a version that changes the format: its records go into a segment of their own."""


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """A newer version of the package."""
    place = a_copy_of_the_package(tmp_path / "newer", **NEWER)
    ledger = place / "waxell_workers" / "core" / "ledger.py"
    ledger.write_text(ledger.read_text().replace("_VERSION = 1", "_VERSION = 2"))
    return place


def belongs_to(shipper: psutil.Process, site: Path) -> bool:
    return str(site) in shipper.environ().get("PYTHONPATH", "").split(os.pathsep)


def test_an_older_shipper_leaves_its_place_to_a_newer_one(
    server: FaultyServer, start: Start, tmp_path: Path, newer: Path
) -> None:
    """Given a worker with its shipper, when one of a newer version starts beside it, then the old shipper
    leaves, the newer one ships for both, and the old worker's attempts to have its own change nothing."""
    old = start(LOOKS="1")
    assert hear(old) == "up"
    tell(old, "old-1")
    first = the_shipper(tmp_path / "spool")
    assert server.wait_until(lambda: models(server)["old-1"] == 1, 60)
    new = start(NEWER_WORKER, site=newer, LOOKS="1")
    assert hear(new) == "up"
    first.wait(60)
    numbers = itertools.count(2)

    def shipped_by_the_newer() -> bool:
        tell(new, f"new-{next(numbers)}")
        tell(old, f"old-{next(numbers)}")
        locks = [lock for path in (tmp_path / "spool").glob("*/ship.lock") for lock in holders(str(path))]
        return bool(locks) and belongs_to(psutil.Process(locks[0].pid), newer)

    await_(shipped_by_the_newer, "newer shipper", 60)
    tell(new, "new-last")
    tell(old, "old-last")
    sent = next(numbers)
    assert server.wait_until(lambda: len(models(server)) == sent + 1, 60)
    assert set(models(server).values()) == {1}
    assert belongs_to(the_shipper(tmp_path / "spool"), newer)


def test_an_older_worker_records_beside_a_newer_shipper(
    server: FaultyServer, start: Start, tmp_path: Path, newer: Path
) -> None:
    """Given a newer version's worker and shipper, what an older worker records beside them arrives; nobody of
    the older version touches the ledger, also when the newer ones have gone."""
    new = start(NEWER_WORKER, site=newer)
    assert hear(new) == "up"
    tell(new, "new")
    assert server.wait_until(lambda: models(server)["new"] == 1, 60)
    shipper = the_shipper(tmp_path / "spool")
    old = start(LOOKS="1")
    assert hear(old) == "up"
    tell(old, "old")
    assert server.wait_until(lambda: models(server)["old"] == 1, 60)
    assert the_shipper(tmp_path / "spool") == shipper
    new.kill()
    shipper.kill()
    shipper.wait(30)
    log = next((tmp_path / "spool").glob("*/shipper.log"))
    await_(lambda: tell(old, f"later-{time.monotonic()}") or "newer" in log.read_text(), "older shipper", 60)
    assert len(models(server)) == 2
    back = start(NEWER_WORKER, site=newer, LOOKS="1")
    assert hear(back) == "up"
    await_(lambda: tell(back, f"back-{time.monotonic()}") or len(models(server)) > 3, "newer shipper", 60)


def test_a_shipper_outlives_the_files_that_it_was_started_from(
    server: FaultyServer, start: Start, tmp_path: Path
) -> None:
    """Given a release that is removed under a running worker, then its shipper needs none of its files: what
    is recorded arrives, also after an outage, and it leaves in peace."""
    site = a_copy_of_the_package(tmp_path / "release")
    worker = start(site=site)
    assert hear(worker) == "up"
    shipper = the_shipper(tmp_path / "spool")
    assert belongs_to(shipper, site)
    socket_file = next((tmp_path / "spool").iterdir()) / "ship.sock"
    await_(socket_file.exists, "socket", 30)
    shutil.rmtree(site)
    server.mode("503")
    tell(worker, "during the outage")
    await_(lambda: server.fired["503"], "request", 60)
    server.mode("healthy")
    assert server.wait_until(lambda: models(server)["during the outage"] == 1, 60)
    worker.kill()
    shipper.wait(60)
    log = next((tmp_path / "spool").glob("*/shipper.log")).read_text()
    assert "Traceback" not in log


def test_an_order_of_another_version_is_understood(server: FaultyServer, destination: Destination) -> None:
    """Given a worker that is older or newer than the package on the disk, the shipper passes over settings
    that it does not know, and has defaults for those that it is not told."""
    destination.append(call("", 1))
    settings = {"api_url": server.url, "flush_interval": 0.1, "colour": "blue"}
    shipper = start_shipper({"directory": destination.directory, "settings": settings})
    try:
        assert server.wait_until(lambda: len(server.calls) == 1, 60)
    finally:
        shipper.kill()
        shipper.wait()


# --- manners ----------------------------------------------------------------------------------------

GREEDY = f"""
import os, socket, sys
listening = socket.socket(); listening.bind(("127.0.0.1", int(os.environ["PORT"]))); listening.listen()
broker = socket.create_connection(("127.0.0.1", int(os.environ["PORT"])))
reading, writing = os.pipe()
os.dup2(writing, 7000)
for descriptor in (listening.fileno(), broker.fileno(), reading, writing, 7000, 0, 1):
    os.set_inheritable(descriptor, True)
{WORKER}
"""
"""A worker with a port, a connection, pipes and a high descriptor, all of them for children to inherit."""


def test_it_holds_nothing_of_the_worker_s(server: FaultyServer, start: Start, tmp_path: Path) -> None:
    """Given a worker with inheritable pipes, sockets and descriptors, when it has died and its shipper is
    still at work, then pipes end, its port is free, and the shipper has only what is its own: no terminal, no
    directory, no session of the worker's."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server.mode("503")
    worker = start(GREEDY, PORT=str(port))
    assert hear(worker) == "up"
    tell(worker, "pending")
    await_(lambda: server.fired["503"], "request", 60)
    shipper = the_shipper(tmp_path / "spool")
    worker.kill()
    assert worker.stdout is not None
    assert worker.stdout.read() == ""  # the end of the pipe: nobody else holds it
    worker.wait()
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", port))
    assert shipper.is_running()
    spool = str(tmp_path / "spool")

    def others() -> list[str]:
        return [name for name in descriptors(shipper.pid) if not is_own(name, spool)]

    # Its libraries open files in passing (the certificates of a TLS context); what is inherited stays open.
    await_(lambda: not others(), f"end of {others()}", 10)
    assert terminal_of(shipper.pid) == 0
    assert shipper.cwd() == "/"
    assert os.getsid(shipper.pid) not in (os.getsid(0), worker.pid, shipper.pid)  # and it leads none
    server.mode("healthy")
    assert server.wait_until(lambda: models(server)["pending"] == 1, 60)
    shipper.wait(60)


def descriptors(pid: int) -> list[str]:
    """Return what the descriptors of a process stand for, by name."""
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{number}"))
        except FileNotFoundError:  # closed since the listing
            continue
    return found


def is_own(name: str, spool: str) -> bool:
    """True for the shipper's files, its socket and connections, `/dev/null` and what wakes its threads."""
    return name.startswith((spool, "socket:", "anon_inode:")) or name == os.devnull


def test_a_pipe_behind_the_worker_ends_with_it(server: FaultyServer, start: Start, tmp_path: Path) -> None:
    """Given `worker | cat`, when the worker is stopped while the server is down, then `cat` ends with the
    worker, though the shipper goes on."""
    server.mode("503")
    (tmp_path / "worker.py").write_text(WORKER)
    pipeline = (
        f"import subprocess; subprocess.run('{sys.executable} worker.py | cat', shell=True, check=True)"
    )
    shell = start(pipeline, WAXELL_SHUTDOWN_TIMEOUT="1")
    assert hear(shell) == "up"
    tell(shell, "pending")
    shipper = the_shipper(tmp_path / "spool")
    assert shell.stdin is not None
    shell.stdin.close()  # the worker's normal end
    assert shell.wait(20) == 0
    assert shipper.is_running()
    server.mode("healthy")
    assert server.wait_until(lambda: models(server)["pending"] == 1, 60)
    shipper.wait(60)


# --- signalled along --------------------------------------------------------------------------------


def family(worker: Worker) -> list[psutil.Process]:
    """Return all that systemd would find in the worker's control group: its tree, and its shipper."""
    assert worker.process is not None
    main = psutil.Process(worker.process.pid)
    return [main, *main.children(recursive=True), the_shipper(worker.spool)]


def test_systemd_signals_worker_and_shipper_at_once(make_worker, server) -> None:  # noqa: F811
    """Given SIGTERM to every process of the control group, and once more to what is left when the main
    process has ended, as systemd's `KillMode=control-group` does it, then the shipper still delivers, once,
    what it can in 3 s, and nobody stays."""
    worker = make_worker(server.url, WAXELL_FLUSH_INTERVAL="3600")
    worker.start("--pool", "prefork", "--concurrency", "1")
    sent = worker.send_many(5)
    worker.await_received_results(5)
    group = family(worker)
    shipper = group[-1]
    assert server.calls == []
    server.mode("503")  # so that the shipper is not through before the worker is
    for process in group:
        process.terminate()
    worker.process.wait(30)
    assert server.fired["503"] > 0
    server.mode("healthy")
    assert shipper.is_running()
    shipper.terminate()
    shipper.wait(60)
    assert_each_once(server, sent)
    assert pending_in(worker.spool) == 0
    assert server.duplicates == 0
    assert not any(process.is_running() for process in group)


def pending_in(spool: Path) -> int:
    return sum(survey(str(path)).pending for path in spool.iterdir() if path.is_dir())


def test_a_reload_of_the_whole_tree_does_not_end_it(
    server: FaultyServer, start: Start, tmp_path: Path
) -> None:
    """Given SIGHUP, as supervisors send it to have a tree reload, the shipper goes on."""
    worker = start()
    assert hear(worker) == "up"
    shipper = the_shipper(tmp_path / "spool")
    socket_file = next((tmp_path / "spool").iterdir()) / "ship.sock"
    await_(socket_file.exists, "socket", 30)
    shipper.send_signal(signal.SIGHUP)
    tell(worker, "after")
    assert server.wait_until(lambda: models(server)["after"] == 1, 60)
    assert the_shipper(tmp_path / "spool") == shipper


def test_ctrl_c_in_a_terminal_is_the_worker_s_alone(make_worker, server) -> None:  # noqa: F811
    """Given a worker in the foreground of a terminal, when Ctrl-C is typed and the terminal is closed, then
    the worker stops as it should, the shipper, which has no terminal, delivers, and leaves."""
    worker = make_worker(server.url, WAXELL_FLUSH_INTERVAL="3600")
    terminal = Terminal(worker)
    sent = worker.send_many(3)
    worker.await_received_results(3)
    shipper = the_shipper(worker.spool)
    assert terminal_of(worker.process.pid) != 0
    assert terminal_of(shipper.pid) == 0
    terminal.type_ctrl_c()
    worker.process.wait(60)
    shown = terminal.close()
    assert "Warm shutdown" in shown
    assert_each_once(server, sent)
    shipper.wait(60)


def terminal_of(pid: int) -> int:
    """Return the device of a process's controlling terminal (proc(5), `tty_nr`); 0 for none."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[4])


class Terminal:
    """A pseudo-terminal with a worker in its foreground."""

    def __init__(self, worker: Worker) -> None:
        self._ours, theirs = pty.openpty()
        worker.log = worker.directory / "worker-1.log"
        command = [sys.executable, "-m", "celery", "-A", "scenarios", "worker", "-Q", worker.queue]
        command += ["--loglevel", "INFO", "--logfile", str(worker.log), *PREFORK]
        worker.log.touch()
        take_terminal = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        take_terminal += "os.execv(sys.argv[1], sys.argv[1:])"
        worker.process = subprocess.Popen(
            [sys.executable, "-c", take_terminal, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=worker.environ(),
            cwd=worker.app,
            start_new_session=True,
        )
        os.close(theirs)
        worker.await_log(" ready.")

    def type_ctrl_c(self) -> None:
        os.write(self._ours, b"\x03")

    def close(self) -> str:
        """Close the terminal; return what it has shown."""
        shown = os.read(self._ours, 1 << 16).decode(errors="replace")
        os.close(self._ours)
        return shown


@pytest.mark.skipif(not LONG, reason="only at length")
def test_a_worker_that_executes_itself_anew_loses_nothing(make_worker, server, tmp_path) -> None:  # noqa: F811
    """Given SIGHUP to Celery's main process, which then begins again under the same id, its runs before and
    after arrive once, and one shipper is left."""
    worker = make_worker(server.url)
    python = tmp_path / "celery"  # Celery cannot execute `python -m celery` again
    python.write_text(f'#!/bin/sh\nshift 2\nexec {Path(sys.executable).parent}/celery "$@"\n')
    python.chmod(0o755)
    worker.python = str(python)
    worker.start(*PREFORK)
    sent = worker.send_many(3)
    worker.await_received_results(3)
    worker.process.send_signal(signal.SIGHUP)
    worker.await_log(" ready.", 2)
    assert worker.process.poll() is None
    sent |= worker.send_many(3)
    worker.await_received_results(6)
    assert_each_once(server, sent)
    assert len(holders(str(next(worker.spool.iterdir()) / "ship.lock"))) == 1
    worker.terminate()
    await_(lambda: worker.shipper() is None, "end of the shipper", 60)
