"""Scripts, cron jobs and library code: `waxell_workers.init()` and nothing else, as real processes.

The calls are made by the real OpenAI SDK against a stand-in, and arrive at the real local server.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.acceptance.running import EXAMPLE, Host, await_calls, by_run, clean, run_of
from tests.environments import Environment, find_interpreter
from tests.faulty import FaultyServer
from tests.harness import await_, names_us, shippers_of

INTERVAL_S = 3600
"""A `flush_interval` that never comes, where something else has to deliver."""
SHUTDOWN_S = 3.0


@pytest.fixture
def host(tmp_path, model, server):
    patient = {"WAXELL_SHUTDOWN_TIMEOUT": "60"}  # on a busy machine three seconds are soon over
    host = Host(tmp_path / "host", {"OPENAI_BASE_URL": model, "WAXELL_API_URL": server.url} | patient)
    yield host
    host.close()


@pytest.fixture
def protocol():
    """Most tests are about the script, for which the protocol makes no difference."""
    return "ingest"


both_protocols = pytest.mark.parametrize("protocol", ["ingest", "rest"])


def automatic(server):
    """Return the runs of calls outside any run, as the server has them."""
    with contextlib.closing(sqlite3.connect(f"file:{server.db}?mode=ro", uri=True)) as connection:
        rows = connection.execute(
            "SELECT agent_name, workflow_name, status, metadata FROM runs WHERE agent_name LIKE 'auto:%'"
        ).fetchall()
    return [(*row, json.loads(metadata)) for *row, metadata in sorted(rows)]


def spool_of(host):
    (directory,) = (host.state / "waxell-workers").iterdir()
    return directory


# --- exported while it runs --------------------------------------------------------------------------


def test_a_call_outside_any_run_is_exported_while_the_script_goes_on(host, server):
    """Given `init()` and nothing else, when calls are made, then a daemon thread delivers them in time."""
    script = host.start()
    for model in ("a", "b"):
        script.tell(f"ask({model!r})")
        await_calls(server, model)
    assert (
        script.tell("[t.daemon for t in waxell_threads()].count(False), bool(waxell_threads())")
        == "(0, True)"
    )
    assert script.tell("stats().shipper") == "'thread'"
    assert shippers_of(host.state) == []
    assert script.end() == 0
    assert script.stderr == ""


@both_protocols
def test_a_flush_makes_one_run_a_model(host, server):
    """Given calls of two models, when they are flushed together, then each has a run with their number."""
    script = host.start(WAXELL_FLUSH_INTERVAL=str(INTERVAL_S))
    for model in ("m", "n", "m", "m"):
        script.tell(f"ask({model!r})")
    assert script.tell("bool(shutdown(60))") == "True"
    runs = automatic(server)
    assert [(name, workflow, status) for name, workflow, status, _ in runs] == [
        ("auto:m", "auto", "success"),
        ("auto:n", "auto", "success"),
    ]
    assert [(data["auto_collected"], data["call_count"]) for *_, data in runs] == [(True, 3), (True, 1)]
    assert by_run(server) == {"auto:m": ["m", "m", "m"], "auto:n": ["n"]}
    script.tell("ask('m')")
    assert script.end() == 0
    assert [data["call_count"] for name, _, _, data in automatic(server) if name == "auto:m"] == [1, 3]


def test_many_calls_are_exported_before_the_interval(host, server):
    """Given an hour's interval, when there are `flush_max_records` calls, then they are delivered at once."""
    script = host.start(WAXELL_FLUSH_INTERVAL=str(INTERVAL_S), WAXELL_FLUSH_MAX_RECORDS="20")
    script.tell("[ask('m') for _ in range(20)][0]")
    await_(lambda: server.calls()["m"] == 20, "20 calls")


def test_a_call_inside_a_context_goes_to_its_run_and_the_next_one_outside_to_the_collector(host, server):
    """Given a context between two calls, then each call is where it was made."""
    script = host.start()
    script.tell("ask('before')")
    script.tell("with WaxellContext('named'): ask('inside')")
    script.tell("ask('after')")
    assert script.tell("bool(shutdown(60))") == "True"
    assert by_run(server) == {"auto:before": ["before"], "named": ["inside"], "auto:after": ["after"]}
    assert "auto_collected" not in run_of(server, "named")["metadata"]


def test_shutdown_exports_what_remains_at_once(host, server):
    """Given an hour's interval, when `shutdown()` has returned, then everything is at the server."""
    script = host.start(WAXELL_FLUSH_INTERVAL=str(INTERVAL_S))
    script.tell("ask('first')")
    assert script.tell("bool(shutdown(60))") == "True"
    assert server.calls() == Counter(["first"])
    assert script.tell("waxell_threads()") == "[]"
    script.tell("ask('second')")
    assert script.tell("bool(shutdown(60))") == "True"
    assert server.calls() == Counter(["first", "second"])


# --- its end -----------------------------------------------------------------------------------------


@both_protocols
def test_the_example_is_delivered_when_it_has_ended(host, server):
    """Given the documented script, when it has ended, then all its calls are at the server."""
    printed = clean(host.run(EXAMPLE))
    assert len(printed.splitlines()) == 4
    assert by_run(server) == {"auto:gpt-4o-mini": ["gpt-4o-mini"] * 3, "digest": ["gpt-4o-mini"]}
    assert run_of(server, "digest")["status"] == "success"
    assert run_of(server, "auto:gpt-4o-mini")["metadata"]["call_count"] == 3


ENDS = {
    "return": (0, ""),
    "exit 3": (3, ""),
    "exception": (1, "ValueError: mine"),
    "ctrl-c": (-signal.SIGINT, "KeyboardInterrupt"),
    "thread": (0, ""),
    "open run": (0, ""),
}
EXTRA = {"thread": "in a thread", "open run": "in the open run"}


@pytest.mark.parametrize("way", ENDS)
def test_an_orderly_end_delivers_and_stays_what_it_was(host, server, way):
    """However the interpreter comes to its end, everything is delivered; exit code and stderr are its own."""
    done = host.run("ending.py", way)
    code, last_line = ENDS[way]
    assert (done.returncode, done.stderr.strip().rpartition("\n")[2]) == (code, last_line)
    assert not names_us(done.stderr)
    unconfigured = host.run("ending.py", way, WAXELL_API_URL="")
    assert (unconfigured.returncode, unconfigured.stderr) == (done.returncode, done.stderr)
    assert server.calls() == Counter({"loose", "inside", EXTRA.get(way, "inside")})
    assert run_of(server, "named")["status"] == "success"
    if way == "open run":
        assert run_of(server, "left open")["status"] == "interrupted"


@both_protocols
@pytest.mark.parametrize("way", ["threads refused", "threads refused, nobody ships"])
def test_the_last_flush_needs_no_new_thread(host, server, way):
    """Given an exit at which no thread starts, then the thread that ships delivers, or else the exit."""
    assert clean(host.run("ending.py", way)) == "no thread starts\n"
    late = {"late"} if "nobody ships" in way else set()
    assert server.calls() == Counter({"loose", "inside"} | late)


@both_protocols
def test_python_3_12_delivers_at_its_exit(host, server):
    """Given a real Python that starts no thread at its exit, when nobody ships, then the exit delivers."""
    host.python = str(newer_python())
    assert clean(host.run("ending.py", "threads, nobody ships")) == "no thread starts\n"
    assert server.calls() == Counter(["loose", "inside", "late"])


def newer_python():
    """Return a Python from 3.12 on that can run the scripts."""
    if sys.version_info >= (3, 12):
        return sys.executable
    interpreter = find_interpreter("3.12", "3.13")
    if not interpreter:
        pytest.skip("there is no Python 3.12 or 3.13 on the PATH, or of pyenv's")
    requirements = Path(__file__).parent / "newer_python" / "requirements.txt"
    return Environment("newer-python", requirements, interpreter=interpreter).python_or_skip()


@pytest.mark.parametrize("mode", ["refuse", "hang", "503"])
def test_a_dead_server_holds_the_exit_for_its_time_and_no_longer(tmp_path, model, mode):
    """Given a server that is down, then the script ends well and silently; the next one delivers."""
    with FaultyServer(ingest=True) as faulty:
        host = Host(tmp_path / "host", {"OPENAI_BASE_URL": model, "WAXELL_API_URL": faulty.url})
        faulty.mode(mode)
        waited = float(clean(host.run("ending.py", "timed")))
        assert 1 < waited < SHUTDOWN_S + 7, "it waits, and not for an export's own deadline of 15 s"
        assert mode == "refuse" or faulty.fired[mode]
        assert faulty.calls == []
        faulty.mode("healthy")
        clean(host.run("ending.py", "return", WAXELL_SHUTDOWN_TIMEOUT="60"))
        assert Counter(call["model"] for call in faulty.calls) == {"loose": 2, "inside": 2}
        assert faulty.violations == []


def test_a_server_that_refuses_is_worth_a_word(tmp_path, model):
    """Given a key that the server does not take, then Python says so once, and all else is as ever."""
    with FaultyServer(ingest=True) as faulty:
        faulty.mode("401")
        settings = {"WAXELL_API_URL": faulty.url, "WAXELL_API_KEY": "wax_sk_secret"}
        host = Host(tmp_path / "host", {"OPENAI_BASE_URL": model} | settings)
        done = host.run("ending.py", "return")
        assert done.returncode == 0
        assert done.stderr.count("\n") == 1
        assert "everything is kept" in done.stderr
        assert "secret" not in done.stderr
        faulty.mode("healthy")
        clean(host.run("ending.py", "return", WAXELL_SHUTDOWN_TIMEOUT="60"))
        assert Counter(call["model"] for call in faulty.calls) == {"loose": 2, "inside": 2}


def test_a_process_may_ship_in_place_of_the_thread(host, server):
    """Given `WAXELL_SHIPPER=process`, then the script has no thread of ours, and its end delivers."""
    script = host.start(WAXELL_SHIPPER="process")
    script.tell("ask('m')")
    assert script.tell("len(threading.enumerate()), stats().shipper") == "(1, 'process')"
    assert script.end() == 0
    assert script.stderr == ""
    assert server.calls() == Counter(["m"])
    await_(lambda: shippers_of(host.state) == [], "end of the shipper")


# --- that which must not be noticed ------------------------------------------------------------------


def test_a_script_that_never_calls_a_model_leaves_no_trace(host, server):
    """Given a configured script without a call, then there is no file, no thread and no process of ours."""
    report = json.loads(
        clean(host.run("audited.py", str(EXAMPLE.parents[2] / "tests/acceptance/scripts/silent.py")))
    )
    assert report == {"done": [], "threads": ["MainThread"], "dropped": {}}
    assert host.left_behind() == []
    assert server.runs() == []


@pytest.mark.parametrize(
    "settings", [{"WAXELL_API_URL": ""}, {"WAXELL_OBSERVE": "false"}], ids=["none", "off"]
)
def test_an_unconfigured_script_is_unaffected(host, server, model, settings):
    """Given nowhere to send to, then the script works, and nothing but its own connection was made."""
    audited = host.run("audited.py", str(EXAMPLE), **settings)
    *printed, last = clean(audited).splitlines()
    assert len(printed) == 4
    assert all("[stand-in]" in line for line in printed)
    report = json.loads(last)
    # The OpenAI SDK asks `uname` what to say in its headers.
    done = [(kind, what) for kind, what in report["done"] if not (kind == "process" and "uname" in what)]
    port = model.rpartition(":")[2].removesuffix("/v1")
    assert {kind for kind, _ in done} == {"connection"}
    assert all(port in address for _, address in done)
    assert report["threads"] == ["MainThread"]
    assert host.left_behind() == []
    assert shippers_of(host.directory) == []
    assert server.runs() == []


def test_what_an_unconfigured_script_records_is_counted(host):
    """Given nowhere to send to, when records are made, then `stats()` counts them as dropped."""
    script = host.start(WAXELL_API_URL="")
    script.tell("record_llm_call(model='m')")
    script.tell("with WaxellContext('a'): record_llm_call(model='m')")
    assert script.tell("stats().dropped") == "{'unconfigured': 4}"
    assert script.tell("bool(shutdown())") == "False"
    assert script.tell("len(threading.enumerate())") == "1"
    assert psutil.Process(script.process.pid).children() == []
    assert script.end() == 0
    assert (script.stderr, host.left_behind()) == ("", [])


def test_the_audit_sees_what_it_looks_for(host, server):
    """Given the same script configured, then the same audit finds files, a thread and connections."""
    report = json.loads(clean(host.run("audited.py", str(EXAMPLE))).splitlines()[-1])
    assert {"written", "thread", "connection"} <= {kind for kind, _ in report["done"]}
    assert host.left_behind() != []


def test_a_home_that_cannot_be_written_to_is_no_hindrance(host, server):
    """Given neither a home nor a state directory, as in many containers, then everything is delivered."""
    nowhere = {"HOME": "/dev/null/home", "XDG_STATE_HOME": ""}
    clean(host.run("ending.py", "return", **nowhere))
    assert server.calls() == Counter(["loose", "inside"])
    assert any(path.startswith("tmp/waxell-workers-") for path in host.left_behind())


# --- killed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["SIGKILL", "SIGTERM", "os._exit", "execv"])
@pytest.mark.parametrize("rescue", ["next start", "drain"])
def test_a_script_that_was_killed_is_delivered_later(host, server, way, rescue):
    """Given a script that died without an exit hook, then the next, or `ship --drain`, delivers its calls.

    And its run is closed as killed.
    """
    killed = host.run("killed.py", way)
    assert killed.returncode == (-getattr(signal, way) if way.startswith("SIG") else 0)
    assert server.runs() == []
    if rescue == "drain":
        assert host.drain().returncode == 0
    else:
        clean(host.run(EXAMPLE))
    assert (server.calls()["loose"], server.calls()["inside"]) == (1, 1)
    victim = run_of(server, "victim")
    assert (victim["status"], victim["markers"]) == ("killed", ["inside"])


def test_a_script_that_is_killed_while_it_ships_loses_nothing(host, server):
    """Given a script killed at any moment of its deliveries, then all its calls arrive, once each."""
    script = host.start(WAXELL_FLUSH_INTERVAL="0.05")
    for number in range(30):
        script.tell(f"ask('m{number}')")
    script.kill()
    clean(host.run("ending.py", "return"))
    assert server.calls() == Counter([*(f"m{number}" for number in range(30)), "loose", "inside"])


# --- more than one script ----------------------------------------------------------------------------


def test_a_script_ships_on_when_the_one_that_shipped_for_it_has_ended(host, server):
    """Given two scripts and one shipper, when the script that ships ends, then the other one takes over."""
    first, second = host.start(), host.start()
    first.tell("ask('first')")
    await_calls(server, "first")
    second.tell("with WaxellContext('second'): ask('early')")
    await_calls(server, "early")
    assert second.tell("waxell_threads()") == "[]"
    assert first.end() == 0
    second.tell("run = WaxellContext('long').__enter__()")

    def shipped():
        second.tell("record_llm_call(model='late')")
        return server.calls()["late"]

    await_(shipped, "a call of a run that goes on")
    assert second.end() == 0


@pytest.mark.parametrize("death", ["killed", "frozen, then killed"])
def test_the_end_of_a_script_does_not_rely_on_another_one(host, server, death):
    """Given another script that ships, when that dies while ours waits for it, then ours delivers itself."""
    first, second = host.start(WAXELL_FLUSH_INTERVAL=str(INTERVAL_S)), host.start()
    first.tell("ask('first')")
    await_(lambda: (spool_of(host) / "ship.sock").exists(), "shipper")
    os.kill(first.process.pid, signal.SIGSTOP)
    second.tell("ask('second')")
    second.send("bool(shutdown(60))")
    if death == "frozen, then killed":
        thread = psutil.Process(second.process.pid)
        await_(lambda: any(c.family == 1 for c in thread.net_connections("unix")), "a flush that waits")
    first.kill()
    assert second.answer() == "True"
    assert server.calls() == Counter(["first", "second"])
    assert second.end() == 0


# --- frozen between invocations ----------------------------------------------------------------------


@both_protocols
def test_a_frozen_function_has_delivered_before(host, server):
    """Given a freeze after each invocation, then its records are at the server before it, each time."""
    function = host.start("function.py")
    for number in range(3):
        assert function.tell(f"event {number}") == "True"
        os.kill(function.process.pid, signal.SIGSTOP)
        assert server.calls() == Counter(f"event {n}" for n in range(number + 1))
        if number == 1:  # long enough for the server to hang up
            await_(lambda: not connected(server, function), "end of the idle connection")
        os.kill(function.process.pid, signal.SIGCONT)
    function.kill()
    assert function.stderr == ""


def connected(server, function):
    """True while the server keeps a connection to the process open."""
    ports = {
        connection.laddr.port
        for connection in psutil.Process(function.process.pid).net_connections("tcp")
        if connection.raddr and connection.raddr.port == int(server.url.rpartition(":")[2])
    }
    server_side = psutil.Process(server.child.process.pid).net_connections("tcp")
    return any(c.raddr and c.raddr.port in ports and c.status == "ESTABLISHED" for c in server_side)


# --- asyncio -----------------------------------------------------------------------------------------


def test_an_asyncio_program_has_each_call_once_and_where_it_belongs(host, server):
    """Given tasks, sync blocks, threads and a cancellation in one loop, then no call strays or repeats."""
    assert clean(host.run("loops.py")) == "True\n"
    assert by_run(server) == {
        **{f"job {n}": [f"first of {n}", f"second of {n}"] for n in range(3)},
        "observed": ["observed"],
        "sync block": ["async in a sync block", "sync in a sync block"],
        "cancelled": ["before the cancellation"],
        "threads": ["to_thread"],
        "auto:executor": ["executor"],
        "auto:loose": ["loose"],
    }
    states = {run["agent_name"]: run["status"] for run in server.runs()}
    assert {name for name, state in states.items() if state != "success"} == {"cancelled"}
    assert states["cancelled"] == "interrupted"
