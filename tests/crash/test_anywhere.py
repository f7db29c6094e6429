"""Torture: recording from signal handlers, finalisers, exit hooks, crowds of threads, greenlets, and under
exceptions that come from outside at any instruction.

Whatever the place: no deadlock, nothing on stderr, exit code 0, and each record that was taken arrives once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.stage import Stage, await_a_look_at_who_lives, finish, read_report
from tests.faulty import FaultyServer
from tests.torture import effort, found

pytestmark = pytest.mark.timeout(effort(400, 1800))
SHIPPERS = pytest.mark.parametrize("shipper", ["thread", "process"])
DEADLINE_S = effort(120, 1200)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with FaultyServer(ingest=True) as server:
        yield Stage(server, tmp_path, {})


@SHIPPERS
def test_a_signal_handler_records_at_any_instruction(stage: Stage, shipper: str) -> None:
    """Given a handler that records, when its signal interrupts recording and itself, then all arrives."""
    stage.settings["WAXELL_SHIPPER"] = shipper
    signals = effort(1500, 50_000)
    told = stage.run("signals", signals, deadline_s=DEADLINE_S)
    found(f"signal handlers, shipper {shipper}", signals=told["handled"], in_our_code=told["inside"])
    assert (told["mixed"], told["dropped"], told["flushed"]) == (0, {}, True)
    assert told["inside"] > signals / 20, "hardly any signal came in the middle of recording"
    assert told["deepest"] > 1
    stage.assert_promises_kept(calls=2 * signals)


@SHIPPERS
def test_a_finaliser_records_during_garbage_collection(stage: Stage, shipper: str) -> None:
    """Given finalisers that record, when the collector runs them inside our own code, then all arrive."""
    stage.settings["WAXELL_SHIPPER"] = shipper
    finalisers = effort(1500, 50_000)
    told = stage.run("finalisers", finalisers, deadline_s=DEADLINE_S)
    found(f"finalisers, shipper {shipper}", finalisers=told["finalised"], in_our_code=told["inside"])
    assert (told["mixed"], told["dropped"], told["flushed"]) == (0, {}, True)
    assert told["inside"] > finalisers / 20, "hardly any finaliser ran in the middle of recording"
    stage.assert_promises_kept(calls=finalisers)


@SHIPPERS
@pytest.mark.parametrize("arguments", [(), ("daemon",)], ids=["teardown", "daemon thread"])
def test_an_interpreter_that_ends_takes_records_to_the_last(
    stage: Stage, shipper: str, arguments: tuple[str, ...]
) -> None:
    """Given threads, exit hooks and a module's last object, when the interpreter ends, then what they record
    is taken and delivered: at once, or by the next start."""
    stage.settings["WAXELL_SHIPPER"] = shipper
    stage.run("leaving", *arguments)
    how = "beside a daemon thread" if arguments else "to its teardown"
    found(f"an interpreter that ends, {how}, shipper {shipper}", calls_noted=len(stage.promises().calls))
    promises = stage.assert_promises_kept(calls=100)
    places = {"registered-before", "registered-after-init", "registered-last", "main", "thread-49"}
    places.add("daemon-1" if arguments else "module-teardown-run")
    assert places <= {marker.removesuffix("-run") for marker in promises.calls} | promises.calls.keys()


def test_hooks_that_were_registered_after_init_are_delivered_at_exit(stage: Stage) -> None:
    """Given a shipper thread, when exit hooks younger than `init` record, then the exit itself delivers."""
    stage.settings["WAXELL_SHIPPER"] = "thread"
    stage.run("leaving")
    arrived = {record["model"] for record in stage.records() if record["kind"] == "llm_call"}
    found("exit hooks", calls_noted=len(stage.promises().calls), delivered_by_the_exit=len(arrived))
    assert {"main-run", "thread-49-run", "registered-last-run", "registered-after-init-run"} <= arrived


def test_sixty_four_threads_begin_at_once(stage: Stage) -> None:
    """Given threads whose first records come at the same moment, then all of them count as living, and all
    that they record arrives."""
    stage.settings["WAXELL_SHIPPER"] = "external"
    rounds = effort(40, 1000)
    with stage.start("shipping"), stage.start("crowd", stage.notes, 64, rounds, 60) as crowd:
        assert read_report(crowd) == {"flushed": True}
        await_a_look_at_who_lives(stage)
        told = finish(crowd, DEADLINE_S)
        found("a crowd of threads", threads=64, records=told["recorded"])
        assert told == {"flushed": True, "recorded": 64 * (rounds + 2), "dropped": {}}
    stage.assert_promises_kept(calls=64 * rounds)


def test_what_threads_could_not_record_is_counted_to_the_last(stage: Stage) -> None:
    """Given a full spool, when 64 threads record, then taken and refused add up to what was tried."""
    stage.settings |= {"WAXELL_SHIPPER": "external", "WAXELL_SPOOL_LIMIT": "1 MiB"}
    rounds = effort(100, 1000)
    with stage.start("crowd", stage.notes, 64, rounds, 0) as crowd:
        read_report(crowd)
        stdout, stderr = crowd.communicate("\n", timeout=DEADLINE_S)
    told = json.loads(stdout)
    found(
        "a crowd before a full spool",
        threads=64,
        taken=told["recorded"],
        refused=sum(told["dropped"].values()),
    )
    assert stderr.splitlines() == ["records are dropped (spool_limit): the spool has reached its limit"]
    assert set(told["dropped"]) == {"spool_limit"}
    assert told["recorded"] + told["dropped"]["spool_limit"] == 64 * (rounds + 2)


@SHIPPERS
def test_greenlets_keep_their_runs_apart(stage: Stage, shipper: str) -> None:
    """Given a process that gevent patched, when greenlets switch inside their runs, then each call belongs to
    the run of its own greenlet, a `gevent.Timeout` ends its run alone, and all arrives."""
    stage.settings["WAXELL_SHIPPER"] = shipper
    greenlets = effort(200, 2000)
    told = stage.run("greenlets", greenlets, deadline_s=DEADLINE_S)
    found(f"greenlets, shipper {shipper}", switches=told["switches"], timeouts=told["timeouts"])
    assert told["switches"] == greenlets * 8
    assert (told["mixed"], told["timeouts"], told["flushed"]) == (0, greenlets // 10, greenlets // 10)
    assert (told["all flushed"], told["dropped"]) == (True, {})
    stage.assert_promises_kept(calls=greenlets * 6 + greenlets // 10)
    calls = [record for record in stage.records() if record["kind"] == "llm_call"]
    assert [call for call in calls if call["model"].rsplit("-", 1)[1] != call["run_id"]] == []


@SHIPPERS
@pytest.mark.parametrize("style", ["plain", "tasks"])
def test_exceptions_from_outside_break_nothing(stage: Stage, shipper: str, style: str) -> None:
    """Given exceptions raised into a thread at any instruction of recording, then each reaches the thread's
    own code, a task's run stays neither open nor current once the next task has begun, hardly a block of the
    user's does, and what is recorded afterwards is as good as ever."""
    stage.settings["WAXELL_SHIPPER"] = shipper
    interrupts = effort(300, 3000)
    told = stage.run("interrupts", interrupts, style, deadline_s=DEADLINE_S)
    found(
        f"exceptions from outside, {style}, shipper {shipper}",
        raised=told["arrived"],
        **{what.replace("_", " "): told[what] for what in ("left_current", "blocks_left_open")},
        in_our_code=told["inside"],
    )
    assert told["arrived"] == interrupts
    assert told["inside"] > interrupts / 20, "hardly any exception came in the middle of recording"
    assert (told["dropped"], told["flushed"]) == ({}, True)
    assert told["adopted"] == 0
    assert told["tasks_left_open"] == 0
    assert told["left_current"] <= interrupts / 100
    assert not told["current_to_the_end"] or style == "plain"
    assert told["blocks_left_open"] <= interrupts / 100
    promises = stage.assert_promises_kept(calls=1)
    assert "afterwards" in promises.calls
