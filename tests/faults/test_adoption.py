"""A key was changed: what waits for the old one is adopted by name, kept a while, or removed; never mixed.

Each account is a server that takes its own key alone, so that a record that went astray would be seen.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.destination import Destination, call, ended, started, states
from tests.faulty import FaultyServer
from tests.harness import await_, environment
from tests.torture import effort, found
from tests.unit.test_shipping_answers import Running
from waxell_workers.core import abandoned, adoption, liveness
from waxell_workers.core import shipper as shipping
from waxell_workers.core.abandoned import InUse
from waxell_workers.core.config import Settings, resolve
from waxell_workers.core.errors import ConfigError
from waxell_workers.core.inspection import survey
from waxell_workers.core.segments import FIRST_LINE, segment_numbers, segment_path

DAY_S = 86_400.0
COMMAND = [sys.executable, "-m", "waxell_workers.cli.main"]
RUN_S = 120.0


@pytest.fixture(params=["ingest", "rest"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def new(protocol: str) -> Iterator[FaultyServer]:
    """The account of the key that is used now."""
    with FaultyServer(key="new", ingest=protocol == "ingest") as server:
        yield server
        assert server.violations == []


@pytest.fixture
def old(protocol: str) -> Iterator[FaultyServer]:
    """The account of the key that was used before."""
    with FaultyServer(key="old", ingest=protocol == "ingest") as server:
        yield server
        assert server.violations == []


@dataclasses.dataclass
class Keys:
    """One spool, the settings of yesterday, and those of today."""

    spool: Path
    old: Settings
    new: Settings

    @property
    def old_directory(self) -> str:
        return str(self.spool / self.old.destination)

    @property
    def new_directory(self) -> str:
        return str(self.spool / self.new.destination)

    def record(self, settings: Settings, code: str) -> None:
        """Have a process that dies without a word record with one of the two."""
        head = (
            "import os, time, waxell_workers\n"
            "from waxell_workers.core.collector import current\n"
            "from waxell_workers.core.records import *\n"
            f"waxell_workers.init(api_url={settings.api_url!r}, api_key={settings.api_key!r},"
            f" spool_dir={settings.spool_dir!r}, shipper='external', capture=())\n"
            "def run(name, calls, end=True):\n"
            "    here = current()\n"
            "    here.record(RunStarted, run_id=name, agent_name='agent')\n"
            "    for n in range(calls):\n"
            "        here.record(LLMCall, run_id=name, model=f'{name}-{n}')\n"
            "    if end:\n"
            "        here.record(RunEnded, run_id=name)\n"
        )
        tail = "\nos._exit(0)\n"
        done = subprocess.run(
            [sys.executable, "-c", head + code + tail], env=environment(), timeout=60, check=False
        )
        assert done.returncode == 0

    def ship(self, settings: Settings) -> shipping.Shipper:
        """Deliver what waits for one of the two."""
        shipper = shipping.Shipper(settings, str(self.spool / settings.destination), stay=False)
        shipper.stop(time.monotonic() + 30)
        assert shipper.run(0.0)
        return shipper

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command with the settings of today."""
        return subprocess.run(
            [*COMMAND, *arguments],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=RUN_S,
            check=False,
        )

    @property
    def environ(self) -> dict[str, str]:
        return environment(
            WAXELL_API_URL=self.new.api_url,
            WAXELL_API_KEY=self.new.api_key,
            WAXELL_SPOOL_DIR=str(self.spool),
            WAXELL_FLUSH_MAX_RECORDS=str(self.new.flush_max_records),
        )


@pytest.fixture
def keys(new: FaultyServer, old: FaultyServer, tmp_path: Path) -> Keys:
    spool = tmp_path / "spool"
    common: dict[str, Any] = {"spool_dir": str(spool), "shipper": "external", "flush_interval": 0.1}
    return Keys(
        spool,
        Settings(api_url=old.url, api_key="old", **common),
        Settings(api_url=new.url, api_key="new", flush_max_records=20, **common),
    )


def models(server: FaultyServer) -> list[str]:
    return sorted(record["model"] for record in server.calls)


def expected(name: str, count: int) -> list[str]:
    return sorted(f"{name}-{number}" for number in range(count))


# --- adoption --------------------------------------------------------------------------------------


def test_what_waits_for_an_old_key_is_adopted_by_name_and_only_so(
    keys: Keys, old: FaultyServer, new: FaultyServer
) -> None:
    """Given a backlog of an old key, shipping with the new one leaves it alone; `ship --adopt` delivers it,
    ends the runs of the dead, and leaves nothing; what the new key's workers record has its own way."""
    keys.record(keys.old, "run('a', 3)\nrun('b', 2, end=False)")
    keys.record(keys.new, "run('mine', 1)")
    assert keys.ship(keys.new).delivered == 3
    assert models(new) == ["mine-0"]
    name = keys.old.destination
    shown = keys.command("spool", "status")
    assert f"--adopt {name[:8]}" in shown.stdout.replace("\n", " ")
    [status] = [
        line
        for line in map(json.loads, keys.command("spool", "status", "--json").stdout.splitlines())
        if line["unused"]
    ]
    assert (status["destination"], status["pending"]) == (name, 8)
    done = keys.command("ship", "--adopt", name[:6])
    assert (done.returncode, done.stdout) == (0, "delivered 9, pending 0, rejected 0\n"), done.stderr
    assert f"adopting {name}" in done.stderr
    assert models(new) == sorted(["mine-0", *expected("a", 3), *expected("b", 2)])
    assert states(new) == {"mine": "success", "a": "success", "b": "killed"}
    assert old.calls == []
    assert survey(keys.old_directory).pending == 0
    [segment] = segment_numbers(keys.old_directory)
    assert os.path.getsize(segment_path(keys.old_directory, segment)) == len(FIRST_LINE)
    assert keys.command("spool", "verify").returncode == 0


def test_a_run_that_began_at_the_old_account_begins_anew_at_the_new_one(
    keys: Keys, old: FaultyServer, new: FaultyServer
) -> None:
    """Given a run that the old server knows, by an id that means another run at the new one, what is left of
    it arrives at the new one as a run of its own."""
    keys.record(keys.new, "run('stranger', 1)")
    keys.ship(keys.new)
    keys.record(
        keys.old,
        "run('a', 1, end=False)\n"
        "import sys; sys.stdout.flush()\n"
        "from waxell_workers.core import shipper as s\n"
        "import dataclasses\n"
        "c = current()\n"
        "ship = s.Shipper(c.settings, c.journal.directory, stay=True)\n"
        "import threading\n"
        "t = threading.Thread(target=ship.run, daemon=True); t.start()\n"
        "deadline = time.monotonic() + 30\n"
        "while ship.delivered < 2 and time.monotonic() < deadline: time.sleep(0.05)\n"
        "time.sleep(0.3)\n",
    )
    assert models(old) == ["a-0"], "the old account has its beginning"
    keys.record(keys.old, "current().record(LLMCall, run_id='a', model='a-1')")
    done = keys.command("ship", "--adopt", keys.old.destination)
    assert done.returncode == 0, done.stderr
    assert models(new) == ["a-1", "stranger-0"]
    assert states(new) == {"stranger": "success", "a": "killed"}
    run = next(run for run in new.runs.values() if run.client_id == "a")
    assert run.start["agent_name"] == "agent"
    assert [len(run.calls) for run in new.runs.values()] == [1, 1]
    assert models(old) == ["a-0"]


@pytest.mark.parametrize("protocol", ["ingest"], indirect=True)
def test_an_adoption_that_is_killed_again_and_again_delivers_each_record_once(
    keys: Keys, new: FaultyServer
) -> None:
    """Given an adopter that is killed in the middle of its work, the next one goes on; nothing is lost, and
    `ingest` has each record once."""
    runs = effort(30, 200)
    keys.record(keys.old, f"for n in range({runs}): run(f'r{{n}}', 8)")
    killed = 0
    for _ in range(effort(4, 25)):
        seen = len(new.records)
        adopter = subprocess.Popen(
            [*COMMAND, "ship", "--adopt", keys.old.destination],
            env=keys.environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        new.wait_until(partial(has_more, new, seen), 30)
        time.sleep(0.002 * killed)
        if adopter.poll() is None:
            adopter.kill()
            killed += 1
        adopter.wait()
        if len(new.records) == runs * 10:
            break
    arrived = len(new.records)
    assert killed, "no adopter was killed"
    done = keys.command("ship", "--adopt", keys.old.destination)
    assert done.returncode == 0, done.stderr
    found("adoption", killed=killed, **{"arrived before": arrived, "repeats": new.duplicates})
    assert len(new.records) == runs * 10
    assert models(new) == sorted(f"r{run}-{n}" for run in range(runs) for n in range(8))
    assert set(states(new).values()) == {"success"}


def has_more(server: FaultyServer, than: int) -> bool:
    return len(server.records) > than


def test_what_is_recorded_with_the_old_key_meanwhile_is_not_adopted(
    keys: Keys, new: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a process that records with the old key and dies while an adopter is at work, its records do not
    go to the new account, and are not lost."""
    keys.record(keys.old, "run('a', 2)")
    close_off = abandoned.close_off

    def and_then_somebody_comes(directory: str, procs: liveness.Procs) -> int:
        last = close_off(directory, procs)
        keys.record(keys.old, "run('late', 2)")
        return last

    monkeypatch.setattr(shipping, "close_off", and_then_somebody_comes)
    adoption.adopt(keys.new, keys.old_directory, timeout=30)
    assert states(new) == {"a": "success"}
    monkeypatch.undo()
    assert survey(keys.old_directory).pending == 4
    keys.ship(keys.old)
    assert states(new) == {"a": "success"}
    assert survey(keys.old_directory).pending == 0


@pytest.mark.parametrize("protocol", ["ingest"], indirect=True)
def test_what_somebody_uses_cannot_be_adopted(keys: Keys, new: FaultyServer, tmp_path: Path) -> None:
    """A living process, a living shipper, the settings' own destination, a name that is none, a link, and
    another user's directory are refused, with the reason and status; nothing is sent."""
    keys.record(keys.old, "run('a', 1)")
    keys.record(keys.new, "run('mine', 1)")
    taking = (
        "import sys; from waxell_workers.core import liveness as l\n"
        "{}\nprint('ready', flush=True); sys.stdin.read()"
    )
    for what, reason in (
        (f"l.register({keys.old_directory!r})", "a process lives"),
        (f"assert l.ship_lock({keys.old_directory!r}).acquire()", "a shipper works there"),
    ):
        with subprocess.Popen(
            [sys.executable, "-c", taking.format(what)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"ready\n"
            refused(keys.command("ship", "--adopt", keys.old.destination), 1, reason)
            assert not other.poll()
            other.kill()
    refused(keys.command("ship", "--adopt", keys.new.destination), 1, "--drain")
    refused(keys.command("ship", "--adopt", "f" * 16), 2, f"there are {keys.old.destination}")
    refused(keys.command("ship", "--adopt", ""), 2, f"there are {keys.old.destination}")
    elsewhere = tmp_path / "elsewhere"
    os.rename(keys.old_directory, elsewhere)
    os.symlink(elsewhere, keys.old_directory)
    refused(keys.command("ship", "--adopt", keys.old.destination), 1, "not a directory of this user")
    os.unlink(keys.old_directory)
    os.rename(elsewhere, keys.old_directory)
    if os.geteuid() == 0:
        os.chown(keys.old_directory, 12345, 12345)
        refused(keys.command("ship", "--adopt", keys.old.destination), 1, "not a directory of this user")
        os.chown(keys.old_directory, 0, 0)
    assert new.records == {}
    assert keys.command("ship", "--adopt", keys.old.destination).returncode == 0
    assert states(new) == {"a": "success"}


def refused(done: subprocess.CompletedProcess[str], status: int, reason: str) -> None:
    assert done.returncode == status, done.stderr
    assert reason in " ".join(done.stderr.split())


@pytest.mark.parametrize("protocol", ["ingest"], indirect=True)
def test_an_adoption_that_the_server_does_not_take_keeps_everything(
    keys: Keys, new: FaultyServer, old: FaultyServer
) -> None:
    """Given a server that is down, `ship --adopt` says what remains, by its status too; the old key works."""
    keys.record(keys.old, "run('a', 1)")
    new.mode("503")
    done = keys.command("ship", "--adopt", keys.old.destination, "--timeout", "6")
    assert (done.returncode, done.stdout) == (1, "delivered 0, pending 3, rejected 0\n")
    assert new.fired["503"]
    keys.ship(keys.old)
    assert states(old) == {"a": "success"}


# --- spool_max_age ---------------------------------------------------------------------------------


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is unused is noticed, and removed, within a second instead of an hour."""
    monkeypatch.setattr(abandoned, "_EVERY_S", 0.05)
    monkeypatch.setattr(abandoned, "_NOTICE_S", 0.3)
    monkeypatch.setattr(shipping, "_POLL_S", 0.02)


def grow_old(directory: str, days: float) -> None:
    """Have a directory look as if it was used last so many days ago."""
    at = time.time() - days * DAY_S
    for name in os.listdir(directory):
        os.utime(f"{directory}/{name}", (at, at))


def another(destination: Destination, number: int) -> Destination:
    """Return another destination in the same spool, with three records that wait."""
    other = object.__new__(Destination)
    other.settings = dataclasses.replace(destination.settings, api_url=f"http://127.0.0.1:{number}")
    code = (
        "import os; from tests.destination import *\n"
        f"c = Collector(Settings(api_url={other.settings.api_url!r}, "
        f"spool_dir={destination.settings.spool_dir!r}))\n"
        "t = c.journal.token()\n"
        "for r in (started('x', proc=t), call('x', proc=t), ended('x', proc=t)):\n"
        "    assert c.journal.append(encode(r))\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60, check=False)
    assert done.returncode == 0
    other.directory = f"{destination.settings.spool_dir}/{other.settings.destination}"
    return other


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(ingest=True) as server:
        yield server


@pytest.fixture
def destination(server: FaultyServer, tmp_path: Path) -> Destination:
    return Destination(server, tmp_path)


def pending(destination: Destination) -> int:
    return survey(destination.directory).pending


def test_the_backlog_of_an_unused_destination_is_removed_when_it_is_too_old(
    soon: None, server: FaultyServer, destination: Destination, caplog: pytest.LogCaptureFixture
) -> None:
    """Given destinations that were used last eight days ago, and yesterday, a shipper of the same spool
    removes the backlog of the first, says so once with the count, and keeps every other: the one that it
    ships itself, in an outage that lasts longer; one whose process lives; and one that a shipper has."""
    gone, recent, alive, shipped = (another(destination, number) for number in range(1, 5))
    server.mode("503")
    destination.append(started("own"), call("own"), ended("own"))
    with (
        holding(f"liveness.register({alive.directory!r})"),
        holding(f"assert liveness.ship_lock({shipped.directory!r}).acquire()"),
    ):
        for old in (gone, alive, shipped, destination):
            grow_old(old.directory, 8)
        grow_old(recent.directory, 1)
        with Running(destination) as running:
            await_(lambda: pending(gone) == 0, "removal")
            running.goes_round(100)
        assert server.fired["503"], "there was an outage"
        assert [pending(one) for one in (recent, alive, shipped, destination)] == [3, 3, 3, 3]
    said = [record.getMessage() for record in caplog.records if "spool_max_age" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("3 records removed")
    assert gone.settings.destination in said[0]
    sizes = [path.stat().st_size for path in Path(gone.directory).glob("0*.ndjson")]
    assert sizes == [len(FIRST_LINE)]
    assert not Path(gone.directory, "shipper.db").exists()
    server.mode("healthy")
    assert destination.ship().pending == 0
    assert states(server) == {"own": "success"}


class holding:
    """A process that holds something until the block ends."""

    def __init__(self, what: str) -> None:
        code = (
            "import sys; from waxell_workers.core import liveness\n"
            f"{what}\nprint('ready', flush=True); sys.stdin.read()"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        with self._process as process:
            assert process.poll() is None, "it did not hold until the end"
            process.kill()


def test_zero_keeps_everything(soon: None, destination: Destination) -> None:
    """With `spool_max_age` 0, and before it was noticed twice, nothing is removed."""
    other = another(destination, 1)
    grow_old(other.directory, 1000)
    destination.settings = dataclasses.replace(destination.settings, spool_max_age=0.0)
    with Running(destination) as running:
        running.goes_round(100)
    assert pending(other) == 3
    assert not Path(other.directory, "unused").exists()


def test_nothing_is_removed_at_first_sight(
    soon: None, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a holiday, workers do not start all at once: the first shipper makes a note, and waits."""
    monkeypatch.setattr(abandoned, "_NOTICE_S", 3600.0)
    other = another(destination, 1)
    grow_old(other.directory, 8)
    with Running(destination) as running:
        running.goes_round(100)
    assert Path(other.directory, "unused").exists()
    assert pending(other) == 3


@pytest.mark.parametrize("moment", ["before it is closed off", "after it was closed off"])
def test_who_comes_while_a_backlog_is_removed_loses_nothing(
    soon: None,
    server: FaultyServer,
    destination: Destination,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """Given a process that records to an old destination in the very moment in which that is removed, and
    dies, its records are kept."""
    other = another(destination, 1)
    grow_old(other.directory, 8)
    close_off = abandoned.close_off
    came: list[str] = []

    def with_company(directory: str, procs: liveness.Procs) -> int:
        def come() -> None:
            if not came:
                came.append(directory)
                other.append_by_another()

        if moment == "before it is closed off":
            come()
        last = close_off(directory, procs)
        come()
        return last

    other.append_by_another = lambda: another_run(other)  # type: ignore[attr-defined]
    monkeypatch.setattr(abandoned, "close_off", with_company)
    with Running(destination) as running:
        await_(lambda: bool(came), "the removal's moment")
        running.goes_round(50)
    kept = {"before it is closed off": 6, "after it was closed off": 3}
    assert pending(other) == kept[moment]
    settings = dataclasses.replace(other.settings, api_url=server.url)
    adoption.adopt(settings, other.directory, timeout=30)
    assert "y" in states(server)


def another_run(destination: Destination) -> None:
    code = (
        "import os; from tests.destination import *\n"
        f"c = Collector(Settings(api_url={destination.settings.api_url!r}, "
        f"spool_dir={destination.settings.spool_dir!r}))\n"
        "t = c.journal.token()\n"
        "for r in (started('y', proc=t), call('y', proc=t), ended('y', proc=t)):\n"
        "    assert c.journal.append(encode(r))\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("text", "seconds"), [("7d", 604_800.0), ("12h", 43_200.0), ("90", 90.0), ("0", 0.0), (3600, 3600.0)]
)
def test_the_age_is_seconds_or_has_a_unit(text: object, seconds: float) -> None:
    """`WAXELL_SPOOL_MAX_AGE=7d` reads as people write it."""
    assert resolve({"spool_max_age": text}, {}).spool_max_age == seconds


@pytest.mark.parametrize("text", ["", "d", "-1", "nan", "1y", "7 weeks", True, "1e99d"])
def test_what_is_no_age_is_refused(text: object) -> None:
    """A wrong value names the setting."""
    with pytest.raises(ConfigError, match="spool_max_age"):
        resolve({"spool_max_age": text}, {})


def test_an_adoption_is_refused_where_somebody_came_first(
    server: FaultyServer, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a process that begins to record between the question and the work, nothing is sent."""
    other = another(destination, 1)
    why_not: Callable[..., str] = adoption.why_not
    with holding(f"liveness.register({other.directory!r})"):
        with pytest.raises(InUse):
            adoption.adopt(destination.settings, other.directory, timeout=5)
        monkeypatch.setattr(adoption, "why_not", lambda *_: "")
        result = adoption.adopt(destination.settings, other.directory, timeout=5)
    assert why_not
    assert not result
    assert server.records == {}
    assert pending(other) == 3
