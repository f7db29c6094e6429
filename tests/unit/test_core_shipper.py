"""From the journal to the server: cursor, repeats, ends, the dead, the damaged, and what is left behind."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from tests.destination import Destination, call, ended, started, states, the_run
from tests.faulty import FaultyServer
from tests.harness import await_, environment
from waxell_workers.core import foreground, launch, tracking, window
from waxell_workers.core import shipper as shipping
from waxell_workers.core.collector import Collector
from waxell_workers.core.config import Settings
from waxell_workers.core.encoding import encode
from waxell_workers.core.exporting import OUT_OF_TIME, Outcome, RunBatch
from waxell_workers.core.ledger import Ledger
from waxell_workers.core.reader import NewerJournal, Reader
from waxell_workers.core.records import RunEnded, RunStarted, Step, TaskLost
from waxell_workers.core.segments import FIRST_LINE, Position, create_segment, segment_numbers, segment_path
from waxell_workers.core.shipper import Shipper
from waxell_workers.core.window import Backoff


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(ingest=True) as server:
        yield server
        assert server.violations == []


@pytest.fixture
def destination(server: FaultyServer, tmp_path: Path) -> Destination:
    return Destination(server, tmp_path)


# --- the cursor ------------------------------------------------------------------------------------


def test_what_was_delivered_is_not_sent_again(server: FaultyServer, destination: Destination) -> None:
    """A new shipper goes on where the last one stopped."""
    destination.append(started("a"), call("a"))
    assert destination.ship().delivered == 2
    destination.append(ended("a"))
    assert destination.ship().delivered == 1
    assert len(server.records) == 3
    assert server.duplicates == 0


def test_a_shipper_without_its_ledger_repeats_and_loses_nothing(
    server: FaultyServer, destination: Destination
) -> None:
    """The ledger may be deleted: the journal is delivered again, and the repeats are known by id."""
    destination.append(started("a"), call("a"))
    destination.ship()
    for path in Path(destination.directory).glob("shipper.db*"):
        path.unlink()
    destination.append(call("a", 1), ended("a"))
    destination.ship()
    assert Counter(kind["kind"] for kind in server.records.values()) == Counter(
        run_started=1, llm_call=2, run_ended=1
    )


def test_one_failing_run_holds_up_no_other(server: FaultyServer, destination: Destination) -> None:
    """A run whose records are refused for now stays; all others arrive, and are not sent again later."""
    server.ingest = False
    server.mode("500", endpoint="llm-calls", marker="bad-")
    for run in ("bad", "good", "fine"):
        destination.append(started(run), call(run), ended(run))
    shipper = destination.ship(timeout_s=3.0)
    assert (states(server)["good"], states(server)["fine"]) == ("success", "success")
    assert shipper.pending > 0
    sent = len(server.requests)
    server.mode("healthy")
    assert destination.ship().pending == 0
    assert states(server)["bad"] == "success"
    assert not any(b"good" in request.body or b"fine" in request.body for request in server.requests[sent:])
    assert sorted(len(run.calls) for run in server.runs.values()) == [1, 1, 1]


def test_a_repeat_is_dropped(server: FaultyServer, destination: Destination) -> None:
    """A record that stands twice in the journal, also over a rotation and a restart, is sent once."""
    server.ingest = False  # a server that could not tell
    destination.append(started("a"), call("a"), call("a"))
    reader = Reader(destination.directory, None, 0)
    reader.rotate()
    destination.append(call("a"))
    destination.ship()
    destination.append(call("a"), ended("a"), ended("a"))
    destination.ship()
    run = the_run(server)
    assert len(run.calls) == 1
    assert len(run.ends) == 1


def test_the_first_end_wins(server: FaultyServer, destination: Destination) -> None:
    """A second end of a run, with an id of its own, is dropped."""
    destination.append(started("a"), ended("a", "error"), ended("a", "success", id="other"))
    destination.ship()
    assert [end["state"] for end in the_run(server).ends] == ["error"]


def test_a_call_after_the_end_still_belongs_to_the_run(
    server: FaultyServer, destination: Destination
) -> None:
    """A stream may end when its run is long delivered."""
    destination.append(started("a"), ended("a"))
    destination.ship()
    destination.append(call("a"))
    destination.ship()
    assert len(the_run(server).calls) == 1


def test_a_run_without_its_beginning_is_recovered(server: FaultyServer, destination: Destination) -> None:
    """If the start was torn or refused, the calls are delivered all the same, in a run that says so."""
    destination.append(call("a"), ended("a"))
    destination.ship()
    run = the_run(server)
    assert run.start["metadata"] == {"recovered": True}
    assert (len(run.calls), run.state) == (1, "success")


def test_small_segments_under_writers(server: FaultyServer, destination: Destination) -> None:
    """Given writers in several processes and a shipper that rotates all the time, everything arrives once."""
    code = (
        "with waxell_workers.WaxellContext('w') as run:\n"
        "    for i in range(300): run.record_llm_call(model=f'{os.getpid()}-{i}', prompt_preview='x' * 500)\n"
    )
    shipper = Shipper(destination.settings, destination.directory, stay=True)
    thread = threading.Thread(target=shipper.run)
    tiny = 20_000
    original = Shipper._open

    def open_tiny(self: Shipper) -> None:
        original(self)
        self._segment_bytes = tiny

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shipper, "_open", open_tiny)
        patch.setattr("waxell_workers.core.shipper._POLL_S", 0.005)
        thread.start()
        writers = [threading.Thread(target=destination.child, args=(code,)) for _ in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        shipper.stop(time.monotonic() + 30)
        thread.join()
    assert segment_numbers(destination.directory)[-1] >= 2, "nothing was rotated"
    models = Counter(record["model"] for record in server.records.values() if record["kind"] == "llm_call")
    assert len(models) == 900
    assert set(models.values()) == {1}
    assert set(states(server).values()) == {"success"}


def test_nothing_is_left_after_leaving(server: FaultyServer, destination: Destination) -> None:
    """When nobody lives and all is delivered, no record stays on the disk, and no socket."""
    assert destination.child("with waxell_workers.WaxellContext('a') as r: r.record_llm_call(model='secret')")
    shipper = Shipper(destination.settings, destination.directory, stay=False)
    # This very process holds a token of the directory: let a process do it that does not.
    order = json.dumps(
        {"directory": destination.directory, "settings": {"api_url": server.url, "flush_interval": 0.2}}
    )
    del shipper
    copy = destination.directory + "-other"
    shutil.copytree(destination.directory, copy)
    done = subprocess.run(
        [sys.executable, "-m", "waxell_workers.core.foreground"],
        input=order.replace(destination.directory, copy),
        env=environment(),
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert len(server.records) == 3
    left = b"".join(path.read_bytes() for path in Path(copy).glob("*.ndjson"))
    assert left == FIRST_LINE
    assert not Path(copy, "ship.sock").exists()


def test_a_shipper_starts_though_somebody_holds_its_pipe(
    server: FaultyServer, destination: Destination
) -> None:
    """Given a child that was forked while the shipper was started, and so has the pipe's end for writing,
    the shipper takes its one line and works."""
    destination.child("waxell_workers.record_llm_call(model='m')")
    order = {"directory": destination.directory, "settings": {"api_url": server.url, "flush_interval": 0.2}}
    with subprocess.Popen(
        [sys.executable, "-m", "waxell_workers.core.foreground"], stdin=subprocess.PIPE, env=environment()
    ) as shipper:
        assert shipper.stdin is not None
        shipper.stdin.write(json.dumps(order).encode() + b"\n")
        shipper.stdin.flush()
        try:
            assert server.wait_until(lambda: bool(server.calls), 60)
        finally:
            shipper.kill()


# --- the dead ---------------------------------------------------------------------------------------

_DIES = """
run = waxell_workers.WaxellContext("dies")
run.task_id = "t1"
run.__enter__()
run.record_llm_call(model="m")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_dead_run_becomes_killed_with_its_calls(
    server: FaultyServer, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose process is gone is closed as killed, without a reason if nobody gave one."""
    monkeypatch.setattr(tracking, "_REASON_GRACE_S", -1.0)
    destination.child(_DIES)
    destination.ship()
    run = the_run(server)
    assert (run.state, len(run.calls)) == ("killed", 1)
    assert run.ends[0]["error_type"] == "ProcessDied"
    assert run.order == ["run_started", "llm_call", "run_ended"]


def test_the_supervisor_s_reason_is_given(server: FaultyServer, destination: Destination) -> None:
    """A TaskLost from the parent names the reason; the first one counts."""
    destination.child(_DIES)
    for number, reason in enumerate(("hard time limit (30s) exceeded", "killed by signal 9")):
        destination.append(
            TaskLost(
                id=f"l{number}", at=time.time(), task_id="t1", reason=reason, error_type="TimeLimitExceeded"
            )
        )
    destination.ship()
    (end,) = the_run(server).ends
    assert (end["state"], end["error_type"]) == ("killed", "TimeLimitExceeded")
    assert end["error_message"] == "hard time limit (30s) exceeded"


def test_a_supervisor_has_time_to_say_why(server: FaultyServer, destination: Destination) -> None:
    """While another process lives, a dead run is not closed at once: the reason may come seconds later."""
    destination.child(_DIES)
    code = (
        "import sys\n"
        "from waxell_workers.core import liveness\n"
        f"print(liveness.register({destination.directory!r}), flush=True)\n"
        "sys.stdin.read()\n"
    )
    supervisor = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with supervisor:
        assert supervisor.stdout is not None
        supervisor.stdout.readline()
        destination.ship()
        assert the_run(server).state == ""
        assert supervisor.stdin is not None
        supervisor.stdin.close()


def test_nobody_who_stops_has_a_reason_left_to_give(server: FaultyServer, destination: Destination) -> None:
    """Given a script killed before, when a short one ships and ends, then the killed run is closed."""
    destination.child(_DIES)
    destination.collector.journal.open()
    destination.ship()
    assert the_run(server).state == "killed"


def test_interrupted_after_task_lost_is_killed(server: FaultyServer, destination: Destination) -> None:
    """A task that unwinds because it is being killed for good was killed."""
    token = destination.collector.journal.token()
    destination.append(
        started("a", task_id="t1", proc=token),
        TaskLost(
            id="l", at=time.time(), task_id="t1", reason="hard time limit", error_type="TimeLimitExceeded"
        ),
        ended("a", "interrupted"),
    )
    destination.ship()
    assert the_run(server).ends[0]["state"] == "killed"
    assert the_run(server).ends[0]["error_message"] == "hard time limit"


@pytest.mark.parametrize(
    ("told_after_s", "state"), [(0.1, "revoked"), (60.0, "interrupted")], ids=["at once", "much later"]
)
def test_an_interruption_that_is_explained_before_it_was_sent_has_the_reason(
    server: FaultyServer, destination: Destination, told_after_s: float, state: str
) -> None:
    """Who supervises may speak a moment after the task's own end; much later, of another attempt."""
    end = ended("a", "interrupted")
    lost = TaskLost(
        id="l",
        at=end.at + told_after_s,
        task_id="t1",
        reason="revoked, and terminated by SIGTERM",
        error_type="Terminated",
        state="revoked",
    )
    destination.append(started("a", task_id="t1"), end, lost)
    destination.ship()
    assert the_run(server).state == state
    assert (the_run(server).ends[0].get("error_type") == "Terminated") is (state == "revoked")


def test_a_living_run_stays_open(
    server: FaultyServer, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose process lives is nobody's to close."""
    monkeypatch.setattr(tracking, "_REASON_GRACE_S", -1.0)
    destination.append(started("a", proc=destination.collector.journal.token()), call("a"))
    destination.ship()
    assert the_run(server).state == ""


def test_a_drain_closes_the_dead_behind_a_long_backlog(
    server: FaultyServer, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More records than fit into the window: the runs of the dead are closed after the last of them, and
    before the drain leaves."""
    monkeypatch.setattr(tracking, "_REASON_GRACE_S", -1.0)
    monkeypatch.setattr(tracking, "_LOOK_FOR_DEAD_S", 60.0)
    many = _DIES.replace("run.record", "for i in range(4500): run.record")
    destination.child(many.replace('model="m"', 'model="m", prompt_preview="x" * 300'))
    assert destination.ship().pending == 0
    assert the_run(server).state == "killed"
    assert the_run(server).order == ["run_started", *["llm_call"] * 4500, "run_ended"]


def test_a_reason_that_is_read_before_its_run_is_kept(server: FaultyServer, destination: Destination) -> None:
    """Who supervises may write to an older segment than the task's own process; of another attempt, begun
    later, it says nothing."""
    at = time.time()
    lost = TaskLost(
        id="l", at=at + 60, task_id="t1", reason="hard time limit", error_type="TimeLimitExceeded"
    )
    destination.append(lost)
    destination.child(_DIES)
    destination.append(msgspec.structs.replace(lost, id="n", task_id="t2", at=at - 60))
    destination.child(_DIES.replace("t1", "t2"))
    destination.ship()
    reasons = {run.start["task_id"]: run.ends[0]["error_type"] for run in server.runs.values()}
    assert reasons == {"t1": "TimeLimitExceeded", "t2": "ProcessDied"}


def test_a_reason_outlives_the_shipper_that_read_it(server: FaultyServer, destination: Destination) -> None:
    """Given a killed run whose end could not be delivered, the next shipper still knows the reason, though
    the cursor has passed it."""
    server.ingest = False
    destination.child(_DIES)
    destination.append(
        TaskLost(id="l", at=time.time(), task_id="t1", reason="killed by signal 9", error_type="WorkerLost")
    )
    server.mode("500", endpoint="complete")
    assert destination.ship(timeout_s=1.0).pending == 1
    assert server.fired["500"]
    server.mode("healthy")
    assert destination.ship().pending == 0
    (end,) = the_run(server).ends
    assert (end["error_type"], end["error"]) == ("WorkerLost", "killed by signal 9")


# --- calls outside any run --------------------------------------------------------------------------


def test_a_group_stays_the_same_for_the_next_shipper(server: FaultyServer, destination: Destination) -> None:
    """Given a group whose delivery broke off unanswered, the next shipper sends the same run and no other."""
    destination.append(call("", 1, model="mini"), call("", 2, model="mini"))
    server.mode("reset", endpoint="ingest", processed=True)
    assert destination.ship(timeout_s=1.0).pending > 0
    assert server.fired["reset"]
    server.mode("healthy")
    assert destination.ship().pending == 0
    assert [len(run.calls) for run in server.runs.values()] == [2]
    assert server.duplicates > 0


@pytest.mark.parametrize("ingest", [False, True], ids=["rest", "ingest"])
def test_loose_calls_are_grouped_by_model(
    server: FaultyServer, destination: Destination, ingest: bool
) -> None:
    """Calls outside any run become one run a model and batch, named, counted and closed."""
    server.ingest = ingest
    destination.append(*(call("", n, model="mini" if n % 3 else "maxi") for n in range(9)))
    destination.ship()
    runs = {run.start["agent_name"]: run for run in server.runs.values()}
    assert {name: len(run.calls) for name, run in runs.items()} == {"auto:mini": 6, "auto:maxi": 3}
    assert runs["auto:mini"].start["workflow_name"] == "auto"
    metadata = runs["auto:mini"].start["metadata"]
    assert (metadata["auto_collected"], metadata["call_count"]) == (True, 6)
    assert {run.state for run in runs.values()} == {"success"}


def test_memory_is_bounded_by_the_batch_and_not_by_the_backlog(
    server: FaultyServer, destination: Destination
) -> None:
    """Calls outside any run count as those of runs do: where enough waits, reading stops until it is sent."""
    backlog, chunk = 12_000, 4_000  # of such calls, somewhat fewer stand in what is read at once
    destination.append(*(call("", number, model="m", prompt="x" * 200) for number in range(backlog)))
    known: list[int] = []
    shipper = Shipper(
        destination.settings,
        destination.directory,
        stay=False,
        progress=lambda delivered, pending: known.append(pending),
    )
    shipper.stop(time.monotonic() + 60)
    assert shipper.run(0.0)
    assert len(server.calls) == backlog
    assert max(known) <= window.MOST_ENTRIES + chunk
    assert max(run.start["metadata"]["call_count"] for run in server.runs.values()) <= (
        window.MOST_ENTRIES + chunk
    )


def test_loose_calls_are_grouped_alike_by_the_next_shipper(
    server: FaultyServer, destination: Destination
) -> None:
    """Given a delivery of unknown outcome and a new shipper, the calls get the same run again."""
    destination.append(*(call("", n, model="m") for n in range(3)))
    server.mode("500", endpoint="ingest", processed=True)
    assert destination.ship(timeout_s=1.5).pending > 0
    server.mode("healthy")
    destination.append(call("", 3, model="m"))
    assert destination.ship().pending == 0
    runs = sorted(server.runs.values(), key=lambda run: -len(run.calls))
    assert [len(run.calls) for run in runs] == [3, 1]
    assert [run.start["metadata"]["call_count"] for run in runs] == [3, 1]
    assert {run.state for run in runs} == {"success"}


# --- the server's no --------------------------------------------------------------------------------


def test_a_rejected_record_goes_to_quarantine(server: FaultyServer, destination: Destination) -> None:
    """The record that the server will never take is kept aside, private; its neighbours are delivered."""
    server.ingest = False
    server.mode("400", endpoint="llm-calls", marker="poison")
    destination.append(started("a"), call("a", 0), call("a", 1, model="poison"), call("a", 2), ended("a"))
    shipper = destination.ship()
    assert (shipper.delivered, shipper.rejected, shipper.pending) == (4, 1, 0)
    path = Path(destination.directory, "quarantine.ndjson")
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["record"]["model"] == "poison"
    assert "400" in json.loads(line)["reason"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_wrong_key_keeps_everything(
    server: FaultyServer, destination: Destination, caplog: pytest.LogCaptureFixture
) -> None:
    """401 is no reason to lose or to hammer: everything is kept, said once, and not tried again at once."""
    server.mode("401")
    destination.append(started("a"), call("a"), ended("a"))
    assert destination.ship(timeout_s=2.0).pending == 3
    assert len(server.requests) <= 2
    assert caplog.text.count("everything is kept") == 1
    server.mode("healthy")
    assert destination.ship().delivered == 3


def test_a_lack_of_time_does_not_hide_what_the_server_has_said(
    server: FaultyServer,
    destination: Destination,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server's answer stays the last complaint, though later batches found no time at all."""
    load, outcomes = shipping.load_exporter, []

    class Hurried:
        """The real exporter, with time for its first batch alone."""

        def __init__(self, settings: Settings) -> None:
            self._exporter = load(settings)
            self.close = self._exporter.close

        def export(self, batch: Sequence[RunBatch], deadline: float) -> Outcome:
            outcome = self._exporter.export(batch, time.monotonic() if outcomes else deadline)
            outcomes.append(outcome.error)
            return outcome

    monkeypatch.setattr(shipping, "load_exporter", Hurried)
    server.mode("503")
    destination.append(started("a"), call("a"), ended("a"))
    assert destination.ship(timeout_s=3.0).pending == 3
    assert set(outcomes[1:]) == {OUT_OF_TIME}
    [complaint] = [record.message for record in caplog.records if "everything is kept" in record.message]
    assert "503" in complaint


def test_backoff_grows_and_keeps_to_what_the_server_asked() -> None:
    """Full jitter below a bound that grows; a Retry-After is waited for whatever the jitter says."""
    backoff = Backoff()
    for failures in range(1, 40):
        backoff.fail()
        assert 0 <= backoff.until - time.monotonic() <= min(15.0, 0.5 * 2 ** (failures - 1))
    backoff.fail(60.0)
    assert backoff.until - time.monotonic() > 59
    backoff.clear()
    assert backoff == Backoff()


def test_a_failing_run_costs_no_processor_time(server: FaultyServer, destination: Destination) -> None:
    """Given a run in backoff with more records than a batch, the shipper sleeps until something is due."""
    server.ingest = False
    server.mode("500", endpoint="llm-calls", marker="bad-")
    destination.append(started("bad"), *(call("bad", n) for n in range(600)))
    shipper = Shipper(destination.settings, destination.directory, stay=True)
    rounds = 0
    original = shipper._round

    def count() -> None:
        nonlocal rounds
        rounds += 1
        original()

    shipper._round = count  # type: ignore[method-assign]
    thread = threading.Thread(target=shipper.run)
    thread.start()
    try:
        for number in range(8):
            destination.append(started(f"g{number}"), ended(f"g{number}"))
            await_(lambda n=number: states(server).get(f"g{n}"), "delivery", 30)
    finally:
        shipper.stop(time.monotonic())
        thread.join(30)
    assert rounds < 200


# --- damage -----------------------------------------------------------------------------------------


def test_a_file_that_is_no_ledger_is_moved_aside(server: FaultyServer, destination: Destination) -> None:
    """A ledger that cannot be read costs repeats, not records."""
    Path(destination.directory, "shipper.db").write_bytes(b"this is no database" * 500)
    destination.append(started("a"), ended("a"))
    assert destination.ship().delivered == 2
    assert Path(destination.directory, "shipper.db.damaged").exists()


def test_a_ledger_damaged_inside_is_moved_aside(server: FaultyServer, destination: Destination) -> None:
    """A ledger whose first page is good and the rest is not, likewise."""
    ledger = Ledger(destination.directory)
    ledger.commit(Position(1, 0), 1, done_above=[f"{n:032}" for n in range(2000)], passed=[], runs=[])
    ledger.close()
    path = Path(destination.directory, "shipper.db")
    path.write_bytes(path.read_bytes()[:4096].ljust(path.stat().st_size, b"Z"))
    destination.append(started("a"), ended("a"))
    shipper = Shipper(destination.settings, destination.directory, stay=False)
    shipper.stop(time.monotonic() + 20)
    shipper.run(0.0)
    assert shipper.delivered == 2


def test_a_ledger_that_cannot_be_opened_just_now_is_left_alone(tmp_path: Path) -> None:
    """No room on the disk is no damage: the ledger is still there when there is room again."""
    ledger = Ledger(str(tmp_path))
    ledger.commit(Position(3, 44), 7, done_above=["a"], passed=[], runs=[])
    ledger.close()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            Ledger(str(tmp_path))
        except sqlite3.Error:
            pass
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert not Path(tmp_path, "shipper.db.damaged").exists()
    with closing(Ledger(str(tmp_path))) as ledger:
        assert ledger.cursor() == (Position(3, 44), 7)


def test_a_segment_of_a_newer_version_is_left_to_its_own(
    server: FaultyServer, destination: Destination, caplog: pytest.LogCaptureFixture
) -> None:
    """A shipper that meets a newer version touches nothing and makes room for a newer shipper."""
    directory = destination.directory
    create_segment(directory, 1)
    path = Path(segment_path(directory, 1))
    path.write_bytes(b'{"kind":"segment","version":2}\n' + encode(started("a")))
    with pytest.raises(NewerJournal):
        Reader(directory, None, 0).read()
    shipper = Shipper(destination.settings, directory, stay=False)
    assert shipper.run(0.0)
    assert "newer" in caplog.text
    assert path.exists()
    assert server.records == {}


def test_damage_without_a_newline_is_passed_over(server: FaultyServer, destination: Destination) -> None:
    """Megabytes that are no lines are counted and passed over; the records behind them arrive."""
    destination.append(started("a"))
    with Path(segment_path(destination.directory, 1)).open("ab") as file:
        file.write(b"\0" * (3 << 20))
    destination.append(ended("a"))
    destination.ship()
    assert states(server) == {"a": "success"}


@pytest.mark.parametrize(
    "fields",
    [
        {"user_id": 42},
        {"session_id": 7},
        {"metadata": [1]},
        {"agent_name": None},
    ],
)
def test_what_record_took_is_what_arrives_for_runs(
    server: FaultyServer, destination: Destination, fields: dict[str, Any]
) -> None:
    """A value of another type than documented is made to fit: record() has said that the record is safe."""
    assert destination.collector.record(RunStarted, **{"run_id": "a", "agent_name": "agent", **fields})
    assert destination.collector.record(RunEnded, run_id="a")
    destination.ship()
    assert the_run(server).start.get("metadata") != {"recovered": True}


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens_in": None},
        {"cost_usd": __import__("decimal").Decimal("0.5")},
        {"model": None},
        {"tokens_out": 1.5},
    ],
)
def test_what_record_took_is_what_arrives_for_calls(
    server: FaultyServer, destination: Destination, fields: dict[str, Any]
) -> None:
    """The same for a call: no usage from the provider is the plainest case."""
    destination.collector.record_call(**{"run_id": "", "model": "m", **fields})
    assert destination.ship().delivered == 3


# --- life -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [ImportError("no httpx"), RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_shipper_that_cannot_begin_leaves_the_right_to_ship_to_others(
    destination: Destination, monkeypatch: pytest.MonkeyPatch, trouble: BaseException
) -> None:
    """Whatever goes wrong while it opens what it needs, the lock is free, and so is what was opened."""

    def fail(settings: Settings) -> None:
        raise trouble

    monkeypatch.setattr(shipping, "load_exporter", fail)
    open_before = len(os.listdir("/dev/fd"))
    shipper = Shipper(destination.settings, destination.directory, stay=True)
    with nullcontext() if isinstance(trouble, ImportError) else pytest.raises(type(trouble)):
        assert shipper.run(0.0)
        assert shipper.unreadable
    assert len(os.listdir("/dev/fd")) <= open_before + 1  # the lock's, which stays open
    monkeypatch.undo()
    assert destination.ship().pending == 0


def test_a_right_to_ship_that_cannot_be_asked_for_is_an_answer(destination: Destination) -> None:
    """Given a lock that cannot be opened, a shipper says that it cannot ship; later it can."""
    path = Path(destination.directory, "ship.lock")
    path.mkdir()
    shipper = Shipper(destination.settings, destination.directory, stay=True)
    assert shipper.run(0.0)
    assert shipper.unreadable
    path.rmdir()
    assert destination.ship().pending == 0


def test_a_second_shipper_gives_way(destination: Destination) -> None:
    """While one ships, another returns without having touched anything."""
    code = (
        "from waxell_workers.core.liveness import ship_lock\n"
        f"ship_lock({destination.directory!r}).acquire(); print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", f"import sys\n{code}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        assert Shipper(destination.settings, destination.directory, stay=True).run(0.2) is False
    finally:
        child.kill()
        child.communicate()
    assert not Path(destination.directory, "shipper.db").exists()


def test_a_spool_that_vanishes_ends_the_shipper(destination: Destination) -> None:
    """A directory removed under the shipper is said once and ends it; nothing is raised, the lock is free."""
    destination.append(started("a"))
    shipper = Shipper(destination.settings, destination.directory, stay=True)
    thread = threading.Thread(target=shipper.run)
    thread.start()
    await_(lambda: shipper.delivered, "delivery", 20)
    shutil.rmtree(destination.directory)
    thread.join(20)
    assert not thread.is_alive()


def start_worker(destination: Destination, code: str, **more: str) -> subprocess.Popen[str]:
    head = (
        "import os, sys, time, waxell_workers\nfrom waxell_workers.core import tasks\n"
        f"waxell_workers.init(api_key='', api_url={destination.settings.api_url!r},"
        f" spool_dir={destination.settings.spool_dir!r}, capture=(), flush_interval=0.2)\n"
        "tasks.worker_booting(); tasks.worker_ready()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(**more),
    )


def detached(directory: str) -> psutil.Process | None:
    for process in psutil.process_iter():
        try:
            if "waxell_workers.core.foreground" in process.cmdline() and any(
                directory in file.path for file in process.open_files()
            ):
                return process
        except psutil.Error:
            continue
    return None


def test_the_detached_shipper_outlives_the_worker_and_has_manners(
    server: FaultyServer, destination: Destination
) -> None:
    """It has its own session, `/` as its directory, no key in its environment; it delivers what
    a killed worker left, closes its runs as killed, and leaves by itself with nothing behind it."""
    code = (
        "with waxell_workers.WaxellContext('w') as run:\n"
        "    run.record_llm_call(model='m'); print('ok', flush=True); sys.stdin.read()\n"
    )
    worker = start_worker(destination, code, WAX_API_KEY="wax_sk_other", WAXELL_API_KEY="wax_sk_other")
    try:
        shipper = await_(lambda: detached(destination.directory), "shipper", 30)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ok\n"
        assert os.getsid(shipper.pid) != os.getsid(worker.pid)
        assert shipper.cwd() == "/"
        assert not [name for name in shipper.environ() if name.startswith(("WAXELL_API", "WAX_"))]
    finally:
        worker.kill()
        worker.communicate()
    # This process's own token keeps a shipper waiting for the reason: longer than a worker's death alone.
    await_(lambda: list(states(server).values()) == ["killed"], "the killed run", 60)
    # For the same reason one SIGTERM is not enough: a worker lives. After another it leaves, in order.
    await_(lambda: has_ended_after_one_more_sigterm(shipper), "the shipper's end", 30)
    assert not Path(destination.directory, "ship.sock").exists()


def test_the_process_is_one_module_once() -> None:
    """What a worker starts is not imported a second time, under its own name, by what it imports."""
    [module] = re.findall(r"'-m', '([\w.]+)'", launch._BOOT)
    code = (
        "import runpy, sys, msgspec\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        f"except msgspec.DecodeError: print({module!r} in sys.modules)\n"  # nobody has told it what to ship
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "False\n"


def has_ended_after_one_more_sigterm(process: psutil.Process) -> bool:
    try:
        process.terminate()
        process.wait(1)
    except psutil.TimeoutExpired:
        return False
    except psutil.NoSuchProcess:
        pass
    return True


def test_after_the_last_writer_s_death_the_server_is_asked_each_second(
    server: FaultyServer, tmp_path: Path
) -> None:
    """A shipper that will leave after 30 s does not sleep through the server's return."""
    server.mode("503")
    init = f"waxell_workers.init(api_url={server.url!r}, spool_dir={str(tmp_path)!r}, shipper='external')"
    code = f"import waxell_workers; {init}; waxell_workers.record_llm_call(model='m')"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
    [directory] = tmp_path.iterdir()
    shipper = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from waxell_workers.core.config import Settings\n"
            "from waxell_workers.core.shipper import Shipper\n"
            f"Shipper(Settings(api_url={server.url!r}), {str(directory)!r}, stay=False).run()\n",
        ],
        env=environment(),
    )
    try:
        await_(lambda: server.fired["503"] >= 8, "eight attempts", 20)
        server.mode("healthy")
        assert server.wait_until(lambda: len(server.calls) == 1, 10)
    finally:
        shipper.kill()
        shipper.wait()


def test_starting_the_shipper_leaves_no_zombie(server: FaultyServer, destination: Destination) -> None:
    """A worker that lives has no dead children of ours."""
    worker = start_worker(
        destination,
        "print('up', flush=True)\n"
        "for _ in range(60):\n"
        "    tasks.worker_ready(); time.sleep(0.1)\n"
        "print('looked', flush=True); sys.stdin.read()\n",
    )
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "up\n"
        shipper = await_(lambda: detached(destination.directory), "shipper", 30)
        assert worker.stdout.readline() == "looked\n"
        children = psutil.Process(worker.pid).children()
        shipper.kill()
        assert [child.status() for child in children] == []
    finally:
        worker.kill()
        worker.communicate()


def test_the_last_shipper_is_replaced(server: FaultyServer, destination: Destination) -> None:
    """A worker whose shipper was killed starts another one, and everything arrives."""
    worker = start_worker(
        destination,
        "while True:\n"
        "    line = sys.stdin.readline()\n"
        "    if not line: break\n"
        "    waxell_workers.record_llm_call(model=line.strip())\n"
        "    for _ in range(100): tasks.worker_ready(); time.sleep(0.1)\n",
    )
    try:
        first = await_(lambda: detached(destination.directory), "shipper", 30)
        first.kill()
        assert worker.stdin is not None
        worker.stdin.write("after the kill\n")
        worker.stdin.flush()
        await_(
            lambda: any(record.get("model") == "after the kill" for record in server.records.values()),
            "delivery",
            40,
        )
    finally:
        worker.kill()
        worker.communicate()
        if last := detached(destination.directory):
            last.kill()


def test_a_drain_in_the_foreground_says_what_it_did(server: FaultyServer, destination: Destination) -> None:
    """`ship --drain` delivers and counts; with a server that is away it says that something remains."""
    settings = destination.settings
    assert foreground.run(settings, drain=True, timeout=5.0)
    destination.append(started("a"), ended("a"))
    server.mode("503")
    assert not foreground.run(settings, drain=True, timeout=1.0)
    server.mode("healthy")
    result = foreground.run(settings, drain=True, timeout=20.0)
    assert (result.delivered, result.pending, bool(result)) == (2, 0, True)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    import signal

    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_drain_that_could_not_read_is_no_success(server: FaultyServer, destination: Destination) -> None:
    """A journal that was left to a newer version is not delivered."""
    create_segment(destination.directory, 1)
    path = Path(segment_path(destination.directory, 1))
    path.write_bytes(b'{"kind":"segment","version":2}\n' + encode(started("a")))
    assert not foreground.run(destination.settings, drain=True, timeout=5.0)


def test_the_log_is_quiet_about_keys_and_content(
    server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a delivery nor a failure writes the key or a text of the user's to a log."""
    caplog.set_level(logging.DEBUG)
    settings = Settings(
        api_url=server.url, api_key="wax_sk_secret", spool_dir=str(tmp_path), shipper="external"
    )
    collector = Collector(settings)
    collector.record(Step, run_id="a", name="s", output="private matter")
    server.mode("503", times=3)
    shipper = Shipper(settings, collector.journal.open(), stay=False)
    shipper.stop(time.monotonic() + 20)
    shipper.run(0.0)
    assert "secret" not in caplog.text
    assert "private" not in caplog.text
