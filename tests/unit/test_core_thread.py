"""Scripts: `init()` and nothing else; a thread ships, the interpreter's exit delivers."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faulty import FaultyServer
from tests.harness import await_, environment, names_us


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(ingest=True) as server:
        yield server
        assert server.violations == []


def run(server: FaultyServer, spool: Path, code: str) -> subprocess.CompletedProcess[str]:
    head = (
        "import os, sys, time, threading, multiprocessing, waxell_workers\n"
        f"waxell_workers.init(api_url={server.url!r}, spool_dir={str(spool)!r}, capture=())\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + code], env=environment(), capture_output=True, text=True, timeout=60
    )


def models(server: FaultyServer) -> Counter[str]:
    return Counter(record["model"] for record in server.records.values() if record["kind"] == "llm_call")


@pytest.mark.parametrize(
    "before",
    ["", "time.sleep(1)\n", "raise ValueError('mine')\n", "sys.exit(3)\n"],
    ids=["at once", "later", "exception", "exit"],
)
def test_a_script_s_records_are_delivered_at_exit(server: FaultyServer, tmp_path: Path, before: str) -> None:
    """However the interpreter comes to its orderly end, what was recorded is at the server then."""
    done = run(server, tmp_path, f"waxell_workers.record_llm_call(model='m')\n{before}")
    assert done.returncode == {"r": 1, "s": 3}.get(before[:1], 0)
    assert models(server) == {"m": 1}
    assert not names_us(done.stderr)
    assert done.stderr == "" or before.startswith("raise")


def test_an_open_run_is_interrupted_at_exit(server: FaultyServer, tmp_path: Path) -> None:
    """A script that leaves with a run open says so."""
    done = run(server, tmp_path, "waxell_workers.WaxellContext('a').__enter__()\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert [run.state for run in server.runs.values()] == ["interrupted"]


def test_a_long_script_ships_while_it_runs(server: FaultyServer, tmp_path: Path) -> None:
    """The thread delivers, a flush is true, and shutdown leaves nothing to do."""
    done = run(
        server,
        tmp_path,
        "waxell_workers.record_llm_call(model='m')\n"
        "print(bool(waxell_workers.force_flush(20)), waxell_workers.stats().shipper)\n"
        "waxell_workers.record_llm_call(model='n')\n"
        "print(bool(waxell_workers.shutdown(20)))\n"
        "waxell_workers.record_llm_call(model='o')\n"
        "os._exit(0 if waxell_workers.shutdown(20) else 1)\n",
    )
    assert (done.stdout, done.returncode) == ("True thread\nTrue\n", 0)
    assert models(server) == {"m": 1, "n": 1, "o": 1}


@pytest.mark.parametrize("mode", ["refuse", "hang", "503"])
def test_a_sick_server_holds_no_exit(server: FaultyServer, tmp_path: Path, mode: str) -> None:
    """The exit takes its three seconds at most, and what was not delivered is there for the next one."""
    server.mode(mode)
    code = (
        "import atexit\nwaxell_workers.record_llm_call(model='m')\nbegan = time.monotonic()\n"
        "import waxell_workers.core.collector as c\n"
        "exit = c.current()._at_exit\natexit.unregister(exit)\nexit()\nprint(time.monotonic() - began)\n"
    )
    done = run(server, tmp_path, code)
    assert float(done.stdout) < 4.0
    server.mode("healthy")
    run(server, tmp_path, "waxell_workers.record_llm_call(model='n')\nwaxell_workers.shutdown(60)\n")
    assert models(server) == {"m": 1, "n": 1}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_children(server: FaultyServer, tmp_path: Path, method: str) -> None:
    """Children end without exit hooks; what they recorded is delivered by the parent's shipper."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, waxell_workers\n"
        "def child(n):\n"
        "    init(); waxell_workers.record_llm_call(model=f'child {n}')\n"
        "def init():\n"
        f"    waxell_workers.init(api_url={server.url!r}, spool_dir={str(tmp_path)!r}, capture=())\n"
        "if __name__ == '__main__':\n"
        "    init(); waxell_workers.record_llm_call(model='parent')\n"
        f"    context = multiprocessing.get_context({method!r})\n"
        "    children = [context.Process(target=child, args=(n,)) for n in range(3)]\n"
        "    for c in children: c.start()\n"
        "    for c in children: c.join()\n"
        "    assert [c.exitcode for c in children] == [0, 0, 0]\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert models(server) == {"parent": 1, "child 0": 1, "child 1": 1, "child 2": 1}


@pytest.mark.parametrize("timeout", ["0", "0.05"])
def test_a_hasty_shutdown_neither_raises_nor_lies(server: FaultyServer, tmp_path: Path, timeout: str) -> None:
    """shutdown() with no time to speak of says that something is pending."""
    server.mode("503")
    code = (
        "waxell_workers.record_llm_call(model='m')\n"
        f"print(bool(waxell_workers.shutdown({timeout})))\nos._exit(0)\n"
    )
    assert run(server, tmp_path, code).stdout == "False\n"


def test_shutdown_tells_of_what_was_refused(server: FaultyServer, tmp_path: Path) -> None:
    """A result is true only if nothing was dropped."""
    code = (
        "from waxell_workers.core.collector import current\n"
        "waxell_workers.record_llm_call(model='m')\n"
        "current().journal.drop('spool_limit')\ncurrent().journal.drop('spool_limit')\n"
        "print(waxell_workers.shutdown(20).dropped)\n"
    )
    assert run(server, tmp_path, code).stdout == "2\n"


def test_a_fork_while_the_shipper_thread_imports_leaves_no_child_hanging(tmp_path: Path) -> None:
    """A child that is forked in the shipper's first moments can import what the shipper imports."""
    code = (
        "import os, sys, time, waxell_workers\n"
        f"waxell_workers.init(api_url='http://127.0.0.1:9', spool_dir={str(tmp_path)!r}, shipper='thread',"
        " shutdown_timeout=0, capture=())\n"
        "waxell_workers.record_llm_call(model='m')\n"
        "while 'pydantic' not in sys.modules: time.sleep(0.001)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    import httpx, pydantic, asyncio, genai_prices\n"
        "    httpx.Client()\n"
        "    os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert run.stdout == "0\n"


def test_a_shipper_imports_nothing_after_its_preload(server: FaultyServer) -> None:
    """What a fork waits for is all that there is to import: the first export finds everything there."""
    code = (
        "import sys, time\n"
        "from waxell_workers.core.config import Settings\n"
        "from waxell_workers.core.exporting import RunBatch, RunState\n"
        "from waxell_workers.core.records import LLMCall, RunEnded, RunStarted\n"
        "from waxell_workers.core.shipper import load_exporter, preload\n"
        f"settings = Settings(api_url={server.url.replace('127.0.0.1', 'localhost')!r})\n"
        "preload(settings)\n"
        "before = set(sys.modules)\n"
        "start = RunStarted(id='s', at=time.time(), run_id='r', agent_name='a')\n"
        "call = LLMCall(id='c', at=time.time(), run_id='r', model='gpt-4o-mini', tokens_in=1)\n"
        "end = RunEnded(id='e', at=time.time(), run_id='r')\n"
        "batch = [RunBatch(RunState(start), [start, call, end])]\n"
        "outcome = load_exporter(settings).export(batch, time.monotonic() + 10)\n"
        "assert len(outcome.acknowledged) == 3, outcome\n"
        "print(sorted(set(sys.modules) - before))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert run.stdout == "[]\n"


def test_a_shutdown_does_not_sleep_through_the_server_s_return(server: FaultyServer, tmp_path: Path) -> None:
    """After a long outage the last flush tries at once, whatever the backoff says."""
    server.mode("503")
    code = (
        "import sys, waxell_workers\n"
        f"waxell_workers.init(api_url={server.url!r}, spool_dir={str(tmp_path)!r}, capture=(),"
        " shipper='thread', flush_interval=0.1)\n"
        "waxell_workers.record_llm_call(model='m')\n"
        "sys.stdin.readline()\n"
        "print(bool(waxell_workers.shutdown(3)))\n"
    )
    script = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        await_(lambda: server.fired["503"] >= 5, "five failures", 60)
        server.mode("healthy")
        output, _ = script.communicate("\n", timeout=30)
    finally:
        script.kill()
    assert output == "True\n"


def test_who_makes_calls_outside_any_run_takes_over_the_shipping(
    server: FaultyServer, tmp_path: Path
) -> None:
    """Given a process whose shipper was another's, when that one dies, its calls arrive while it lives."""
    head = (
        "import itertools, os, sys, time, waxell_workers\n"
        f"waxell_workers.init(api_url={server.url!r}, spool_dir={str(tmp_path)!r}, capture=(),"
        " flush_interval=0.2)\n"
    )
    first = "waxell_workers.record_llm_call(model='first')\nprint('recorded', flush=True)\ntime.sleep(600)\n"
    second = (
        "for number in itertools.count():\n"
        "    waxell_workers.record_llm_call(model=f'second {number}')\n"
        "    time.sleep(0.1)\n"
    )
    pipe, command = subprocess.PIPE, [sys.executable, "-c"]
    with (
        subprocess.Popen([*command, head + first], env=environment(), stdout=pipe) as one,
        subprocess.Popen([*command, head + "input()\n" + second], env=environment(), stdin=pipe) as other,
    ):
        try:
            assert one.stdout is not None
            assert other.stdin is not None
            assert one.stdout.readline() == b"recorded\n"
            await_(lambda: models(server)["first"], "delivery by the first")
            other.stdin.write(b"go\n")
            other.stdin.flush()
            await_(lambda: models(server)["second 0"], "delivery of the second's by the first")
            one.kill()
            one.wait()
            known = set(models(server))
            await_(lambda: models(server).keys() - known, "delivery by the second")
            assert other.poll() is None
        finally:
            one.kill()
            other.kill()


SOMEBODY_WAS_QUICKER = """
from waxell_workers.core import collector

look, looks = collector._is_shipped_elsewhere, []

def look_too_early(directory):
    looks.append(directory)
    if len(looks) > 1:
        return look(directory)
    while not look(directory):
        time.sleep(0.01)
    return False  # what it was a moment ago

collector._is_shipped_elsewhere = look_too_early
if os.fork() == 0:
    waxell_workers.record_llm_call(model="child")  # its shipper is a process of its own
    os._exit(0)
os.wait()
"""


def test_an_exit_waits_for_a_shipper_that_began_a_moment_ago(server: FaultyServer, tmp_path: Path) -> None:
    """Nobody ships, and an instant later a child's shipper does: the parent's exit waits for that."""
    done = run(server, tmp_path, SOMEBODY_WAS_QUICKER)
    assert (done.returncode, done.stderr) == (0, "")
    assert models(server) == {"child": 1}
