"""Write, rotate, seal, ship, acknowledge, crash, fork and delete, in any order: nothing promised is missing.

The machine drives the real journal, reader, window, tracker, ledger and shipper on a real directory through
tiny segments, with forked writers that really die, and shippers that are thrown away at every place where
they touch the disk. Time is the machine's own. The model knows only what was written, what `append` said,
and which files it deleted itself; it is compared with what the server was sent.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.property.model import EPOCH, LOOK_S, Clock, Model, Run, Seams, Text, fake_os
from tests.property.modelserver import MOODS, Crash
from tests.property.shipping import (
    call,
    close_as_the_kernel_would,
    ended,
    forget_directory,
    forget_server,
    lost,
    model_exporter,
    new_server,
    settings_for,
    started,
    step,
    updated,
)
from tests.torture import effort, found
from waxell_workers.core import caution, liveness, parking, reader, shipper, tracking, window
from waxell_workers.core import journal as journal_module
from waxell_workers.core import ledger as ledger_module
from waxell_workers.core.collector import Collector
from waxell_workers.core.encoding import encode
from waxell_workers.core.ids import new_id
from waxell_workers.core.records import LLMCall, Record, RunEnded, RunStarted, TaskLost
from waxell_workers.core.segments import segment_numbers, segment_path

SEGMENT_BYTES = 1200
"""Four or five small records, or less than one large one."""
MOST_ENTRIES = 12
BATCH = 5
SETTLING_ROUNDS = 400
PAUSE_S = 1.0
"""For so long after a refusal nothing new is opened."""
SEAMS = ("create", "seal", "commit", "in commit", "group", "remember", "unlink", "quarantine")


class JournalMachine(RuleBasedStateMachine):
    """Each rule is something that happens; the invariants hold after each; the end is in `_check`."""

    runs = Bundle("runs")
    seen: ClassVar[Counter[str]] = Counter()
    """What all machines together have done."""

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp(prefix="waxell-machine-")
        self.clock = Clock()
        self.seams = Seams()
        self.model = Model()
        self.server = new_server()
        self.shipper: shipper.Shipper | None = None
        self.shippers: list[shipper.Shipper] = []
        self.torn = 0
        self.tokens = itertools.count(10**14)
        self.moments = itertools.count()
        self.during_write: tuple[str, Callable[[], None]] | None = None
        self.short_write: int | None = None
        self.whole_writes = 0
        self.into_a_sealed_one = False
        self.directory_deleted_at = -LOOK_S
        self.open_files: list[int] = []
        self.refused_at = -PAUSE_S
        self.highest = 0
        self.numbers_deleted = False
        self._exporting = model_exporter()
        self.patch = self._exporting.__enter__()
        self._patch()
        self.collector = Collector(
            settings_for(self.server, self.root, flush_interval=0.2, flush_max_records=BATCH)
        )
        self.collector.enter_worker()
        self.directory = self.collector.journal.open()

    def _patch(self) -> None:
        for module in (caution, journal_module, ledger_module, parking, shipper, tracking, window):
            self.patch.setattr(module, "time", self.clock)
        self.patch.setattr(caution, "_MOMENT_S", 3600.0)  # a thread's own time is not the clock's
        self.patch.setattr(shipper, "SEGMENT_BYTES", SEGMENT_BYTES)
        self.patch.setattr(window, "MOST_ENTRIES", MOST_ENTRIES)
        self.patch.setattr(window, "random", SimpleNamespace(uniform=lambda low, high: high))
        # As wide as a random token nearly always is: the sizes of segments are to depend on the rules alone.
        token = SimpleNamespace(randrange=lambda low, high: next(self.tokens))
        self.patch.setattr(liveness, "random", SimpleNamespace(SystemRandom=lambda: token))
        self.patch.setattr(journal_module, "os", fake_os(write=self._write))
        around = self.seams.around
        self.patch.setattr(reader, "create_segment", around("create", reader.create_segment))
        self.patch.setattr(reader, "seal", around("seal", reader.seal))
        self.patch.setattr(reader, "os", fake_os(unlink=around("unlink", os.unlink)))
        ledger = ledger_module.Ledger
        self.patch.setattr(ledger, "_save_run", around("in commit", ledger._save_run))
        self.patch.setattr(ledger, "group", around("group", ledger.group))
        self.patch.setattr(ledger, "remember", around("remember", ledger.remember))
        commit = ledger.commit

        def committed(*args: Any, **kwargs: Any) -> None:
            commit(*args, **kwargs)
            self.server.in_flight.clear()

        self.patch.setattr(ledger, "commit", around("commit", committed))
        quarantine = shipper.Shipper._quarantine
        self.patch.setattr(shipper.Shipper, "_quarantine", around("quarantine", quarantine))

    # -- writing -------------------------------------------------------------------------------------

    def _write(self, descriptor: int, line: bytes) -> int:
        """The journal's `os.write`: something may come before it, after it, or cut it short."""
        when, action = self.during_write or ("", lambda: None)
        self.during_write = None
        if when == "before":
            action()
        cut, self.short_write = self.short_write, None
        self.into_a_sealed_one = b'"sealed":1' in os.pread(descriptor, 60, 0)
        written = os.write(descriptor, line if cut is None else line[:cut])
        self.whole_writes += written == len(line)
        if when == "after":
            action()
        return written

    def _at(self) -> float:
        return EPOCH + 0.5 + next(self.moments)

    def _new(self, record: Record) -> Record:
        """Take a record that is about to be written into the model."""
        self.model.records[record.id] = record
        run = self.model.runs.get(getattr(record, "run_id", ""))
        if run is not None:
            run.order.append(record.id)
        return record

    def _append(self, record: Record) -> bool:
        """Write a record in this process and believe what is said."""
        record = self._new(msgspec.structs.replace(record, proc=self.collector.token()))
        size = len(encode(record))
        cut = None if self.short_write is None else self.short_write % size
        self.short_write = cut
        dropped = sum(self.collector.journal.dropped.values())
        self.whole_writes = 0
        just_deleted = self.clock.now < self.model.deleted_at + LOOK_S
        safe = self.collector.write(record)
        if self.short_write is not None:  # refused before anything was written
            self.short_write = cut = None
        if self.whole_writes > 1:
            self.model.twice.add(record.id)
        if safe:
            assert cut is None or self.model.wiped, "a record that was written in part was promised"
            self.model.promised.add(record.id)
            if just_deleted:
                self.model.deleted.add(record.id)
        else:
            self.model.refused += 1
            self.refused_at = self.clock.now
            assert sum(self.collector.journal.dropped.values()) == dropped + 1
            if self.whole_writes:  # into a segment that was sealed; and the next was out of reach
                self.model.unpromised.add(record.id)
            elif cut is not None:
                self._tore(record, cut, size)
        return safe

    def _tore(self, record: Record, cut: int, size: int) -> None:
        """A line of which the first `cut` bytes were written."""
        if cut >= size - 1:
            self.model.unpromised.add(record.id)
        elif cut > 1 and not self.into_a_sealed_one:  # which nobody may read to its end again
            self.model.torn += 1
            if self.clock.now < self.model.deleted_at + LOOK_S:
                self.model.torn_deleted = True

    def _begin(self) -> RunStarted:
        run = Run(new_id(), task_id=new_id(), token_gone=self.clock.now < self.directory_deleted_at + LOOK_S)
        self.model.runs[run.run_id] = run
        return started(run.run_id, self._at(), task_id=run.task_id)

    texts = st.sampled_from([0, 0, 0, 5, 40, 120]).map(Text)
    kinds = st.sampled_from(["call", "step", "updated"])

    def _inside(self, run_id: str, kind: str, text: Text) -> Record:
        made = {"call": call, "step": step, "updated": updated}[kind]
        return made(run_id, new_id(), self._at(), str(text))

    @rule(target=runs)
    def start_run(self) -> Any:
        record = self._begin()
        self._append(record)
        return record.run_id

    @rule(run=runs, kind=kinds, text=texts)
    def write_in_run(self, run: str, kind: str, text: Text) -> None:
        self._append(self._inside(run, kind, text))

    @rule(model=st.sampled_from(["mini", "maxi"]), text=texts, times=st.integers(1, 4))
    def write_outside_any_run(self, model: str, text: Text, times: int) -> None:
        for _ in range(times):
            self._append(call("", new_id(), self._at(), str(text), model=model))

    @rule(run=consumes(runs), state=st.sampled_from(["success", "error", "interrupted"]))
    def end_run(self, run: str, state: str) -> None:
        self.model.runs[run].ended = self._append(ended(run, self._at(), state=state))

    @rule(cut=st.integers(1, 2000), near_the_end=st.booleans(), text=texts)
    def write_on_a_full_disk(self, cut: int, near_the_end: bool, text: Text) -> None:
        record = call("", new_id(), self._at(), str(text))
        self.short_write = -1 - cut % 3 if near_the_end else cut
        if near_the_end:
            size = len(encode(msgspec.structs.replace(record, proc=self.collector.token())))
            self.short_write = size - 1 - cut % 3
        self._append(record)

    @rule(
        when=st.sampled_from(["before", "after"]),
        actions=st.lists(
            st.sampled_from(["rotate", "ship", "ship", "kill", "leave"]), min_size=1, max_size=6
        ),
        text=texts,
    )
    def write_while_the_shipper_works(self, when: str, actions: list[str], text: Text) -> None:
        """The shipper acts between a writer's look at its segment and its write, or after the write."""
        self.during_write = (when, lambda: self._act_all(actions))
        self._append(call("", new_id(), self._at(), str(text)))
        self.during_write = None

    @rule(
        run=runs,
        when=st.sampled_from(["before", "after"]),
        actions=st.lists(
            st.sampled_from(["rotate", "ship", "ship", "kill", "leave"]), min_size=1, max_size=6
        ),
        end=st.booleans(),
    )
    def write_in_run_while_the_shipper_works(
        self, run: str, when: str, actions: list[str], end: bool
    ) -> None:
        self.during_write = (when, lambda: self._act_all(actions))
        self._append(self._inside(run, "step", Text(0)))
        self.during_write = None

    @rule(
        target=runs,
        when=st.sampled_from(["before", "after"]),
        actions=st.lists(
            st.sampled_from(["rotate", "ship", "ship", "kill", "leave"]), min_size=1, max_size=6
        ),
    )
    def start_run_while_the_shipper_works(self, when: str, actions: list[str]) -> Any:
        begin = self._begin()
        self.during_write = (when, lambda: self._act_all(actions))
        self._append(begin)
        self.during_write = None
        return begin.run_id

    def _act_all(self, actions: list[str]) -> None:
        for action in actions:
            self._act(action)

    def _act(self, action: str) -> None:
        if action == "rotate":
            self.rotate()
        elif action == "ship":
            self._round()
        elif action == "leave":
            self.shipper_leaves()
        else:
            self._bury()

    # -- forked writers ----------------------------------------------------------------------------------

    @rule(
        count=st.integers(1, 6),
        text=texts,
        end=st.booleans(),
        cut=st.none() | st.integers(0, 2500),
        supervised=st.booleans(),
    )
    def fork_a_writer(self, count: int, text: Text, end: bool, cut: int | None, supervised: bool) -> None:
        """A child writes a run through what it inherited and is gone: by `os._exit`, or killed in a line."""
        begin = self._begin()
        run = self.model.runs[begin.run_id]
        kinds = itertools.cycle(["call", "step", "updated"])
        records: list[Record] = [self._new(begin)]
        records += [self._new(self._inside(run.run_id, next(kinds), text)) for _ in range(count)]
        if end:
            records.append(self._new(ended(run.run_id, self._at())))
        records.append(self._new(call("", new_id(), self._at(), model="child")))
        said, sizes, token = self._in_a_child(records, cut)
        self.into_a_sealed_one = False
        for record, size, word in zip(records, sizes, [*said, b"dead"], strict=False):
            self.model.records[record.id] = msgspec.structs.replace(record, proc=token)
            if word == b"safe":
                self.model.promised.add(record.id)
            elif word == b"dead" and cut is not None:
                self._tore(record, cut % (size + 1), size)
        run.ended = records[-2].id in self.model.promised and end
        run.dead = not run.ended
        if supervised:
            record = lost(run.task_id, new_id(), self._at())
            if self._append(record):
                run.lost = begin.id in self.model.promised

    def _in_a_child(self, records: list[Record], cut: int | None) -> tuple[list[bytes], list[int], int]:
        """Write in a forked child; what it was told of each record, the size of each line, and its token."""
        for _ in range(1000):  # its tokens are its own
            next(self.tokens)
        self.model.forks += 1
        read_end, write_end = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # a runner's own thread is no concern of the child's
            pid = os.fork()
        if pid == 0:
            try:
                self._write_as_a_child(records, cut, write_end)
            finally:
                os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            words = pipe.read().split()
        _, status = os.waitpid(pid, 0)
        token, *sizes = (int(word) for word in words if word.isdigit())
        said = [word for word in words if not word.isdigit()]
        if b"failed" in said:  # a child inherits the moment's pause that its parent makes after a full disk
            assert self.clock.now < self.refused_at + PAUSE_S
        else:
            assert os.WIFSIGNALED(status) == (cut is not None)
        assert len(said) == len(records) - os.WIFSIGNALED(status)
        return said, sizes, token

    def _write_as_a_child(self, records: list[Record], cut: int | None, pipe: int) -> None:
        token = self.collector.token()
        os.write(pipe, b"%d " % token)
        for record in records:
            line = encode(msgspec.structs.replace(record, proc=token))
            os.write(pipe, b"%d " % len(line))
            if cut is not None and record is records[-1]:

                def die(descriptor: int, line: bytes) -> int:
                    os.write(descriptor, line[: cut % (len(line) + 1)])
                    os.kill(os.getpid(), signal.SIGKILL)
                    return 0

                journal_module.os = fake_os(write=die)  # type: ignore[attr-defined]
            os.write(pipe, b"safe " if self.collector.journal.append(line) else b"failed ")

    # -- shipping --------------------------------------------------------------------------------------

    def _new_shipper(self) -> shipper.Shipper:
        made = shipper.Shipper(self.collector.settings, self.directory, stay=True)
        made._wake = self.clock  # type: ignore[assignment]
        assert made._take_lock(0.0)
        self.shippers.append(made)
        return made

    def _open_shipper(self) -> shipper.Shipper | None:
        if self.shipper is None and Path(self.directory).is_dir():
            made = self._new_shipper()
            try:
                made._open()
            except Crash:
                self._bury(made)
                return None
            self.shipper = made
        return self.shipper

    def _bury(self, dead: shipper.Shipper | None = None, *, left: bool = False) -> None:
        """Throw the shipper away as SIGKILL does: nothing of it runs, the kernel closes what it had open."""
        dead = dead or self.shipper
        self.shipper = None
        self.seams.disarm()
        if dead is None:
            return
        self.model.kills += not left
        self.server.forget_flight()
        self._count(dead)
        close_as_the_kernel_would(dead)

    def _count(self, one: shipper.Shipper) -> None:
        if one._opened:
            self.torn += one._reader.torn
        if (
            one.delivered + one.rejected < self.server.acknowledged + self.server.rejected
        ):  # it died between the answer and its own count
            assert self.model.kills
        else:
            assert (one.delivered, one.rejected) == (self.server.acknowledged, self.server.rejected)
        self.server.acknowledged = self.server.rejected = 0

    def _round(self) -> None:
        one = self._open_shipper()
        if one is None:
            return
        self.clock.now += 0.25
        try:
            one._round()
        except Crash:
            self._bury()
        except (OSError, sqlite3.Error):
            # As `run` would: it gives up where the spool was deleted under it, and only there.
            if not self.model.wiped:
                raise
            self._bury()

    @rule(mood=st.sampled_from(MOODS), part=st.integers(1, 4), rounds=st.integers(1, 3))
    def ship(self, mood: str, part: int, rounds: int) -> None:
        self.server.mood, self.server.part = mood, part
        for _ in range(rounds):
            self._round()
        self.server.mood = "healthy"

    @rule(rounds=st.integers(1, 3))
    def ship_all(self, rounds: int) -> None:
        for _ in range(rounds):
            self._round()

    @rule(seam=st.sampled_from(SEAMS), when=st.sampled_from(["before", "after"]), skip=st.integers(0, 2))
    def kill_the_shipper_at(self, seam: str, when: str, skip: int) -> None:
        """It dies at this place as soon as it comes there."""
        self.seams.arm(seam, when, skip)
        for _ in range(3):
            self._round()
        self.seams.disarm()

    @rule()
    def kill_the_shipper(self) -> None:
        self._bury()

    @rule()
    def shipper_leaves(self) -> None:
        if (one := self._open_shipper()) is None:
            return
        try:
            one._leave(True)
            one._close()
        except (OSError, sqlite3.Error):
            if not self.model.wiped:
                raise
        self._bury(left=True)

    @rule()
    def rotate(self) -> None:
        if (one := self._open_shipper()) is None:
            return
        try:
            one._reader.rotate()
        except Crash:
            self._bury()
        except OSError:
            if not self.model.wiped:
                raise

    @rule(seam=st.sampled_from(["create", "seal"]), when=st.sampled_from(["before", "after"]))
    def kill_the_shipper_while_it_rotates(self, seam: str, when: str) -> None:
        self.seams.arm(seam, when, 0)
        self.rotate()
        self.seams.disarm()

    @rule(seconds=st.sampled_from([0.3, 1.1, 9.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(which=st.integers(0, 9))
    def server_refuses_a_record_for_good(self, which: int) -> None:
        """One that has not come yet, and is none of those that frame a run."""
        open_to = [
            record.id
            for record in self.model.records.values()
            if record.id not in self.server.run_of
            and not isinstance(record, (RunStarted, RunEnded, TaskLost))
        ]
        if open_to:
            self.server.poison.add(open_to[which % len(open_to)])

    # -- deleting ----------------------------------------------------------------------------------------

    def segments(self) -> dict[int, bytes]:
        if not Path(self.directory).is_dir():
            return {}
        return {
            number: Path(segment_path(self.directory, number)).read_bytes()
            for number in segment_numbers(self.directory)
        }

    def _gone(self, content: bytes) -> None:
        self.model.deleted |= {i for i in self.model.records if b'"' + i.encode() + b'"' in content}
        self.model.deleted_at = self.clock.now
        self.model.wiped = True
        self.model.torn_deleted = True
        self.model.deletions += 1

    @rule(which=st.integers(0, 3))
    def delete_a_segment(self, which: int) -> None:
        segments = self.segments()
        if not segments:
            return
        number = sorted(segments)[which % len(segments)]
        self._gone(segments[number])
        # A file system may give the number of a deleted file to the next one; one that is open keeps it.
        self.open_files.append(os.open(segment_path(self.directory, number), os.O_RDONLY))
        os.unlink(segment_path(self.directory, number))
        self.numbers_deleted = True

    @rule()
    def delete_the_directory(self) -> None:
        for content in self.segments().values():
            self._gone(content)
        self.model.deleted_at = self.clock.now
        self.model.wiped = True
        self.directory_deleted_at = self.clock.now
        for run in self.model.runs.values():
            run.token_gone = True
        shutil.rmtree(self.directory, ignore_errors=True)
        self.numbers_deleted = True

    # -- what must hold ----------------------------------------------------------------------------------

    def _processed(self, record_id: str) -> bool:
        return record_id in self.server.records or record_id in self.server.refused

    def _is_not_sent(self, record_id: str) -> bool:
        """True for what a shipper keeps to itself: a reason, and the end of a run that it had to end."""
        record = self.model.records[record_id]
        if isinstance(record, RunEnded):
            return self.model.runs[record.run_id].token_gone
        return isinstance(record, TaskLost)

    @invariant()
    def nothing_promised_is_nowhere(self) -> None:
        """A record is at the server, or in a segment, or in one that a rule deleted."""
        content = b"".join(self.segments().values())
        for record_id in self.model.promised - self.model.deleted:
            if self._processed(record_id) or self._is_not_sent(record_id):
                continue
            assert b'"' + record_id.encode() + b'"' in content, f"{record_id} is nowhere"

    @invariant()
    def the_highest_segment_stays(self) -> None:
        """Only a rule deletes it."""
        highest = max(self.segments(), default=0)
        if not self.numbers_deleted:
            assert highest >= self.highest
        self.highest, self.numbers_deleted = highest, False

    @invariant()
    def the_cursor_passes_what_has_arrived_and_nothing_else(self) -> None:
        """What the ledger says is done is done: whatever dies now, nobody will read it again.

        A record that met a seal stands above the cursor once more.
        """
        segments = self.segments()
        done = self._done(segments)
        above = dict(segments)
        for number, content in done:
            above[number] = segments[number][len(content) :]
        below = b"".join(content for _, content in done)
        rest = b"".join(above.values())
        for record_id in self.model.promised - self.model.deleted:
            place = b'"' + record_id.encode() + b'"'
            if place in below and place not in rest and not self._is_not_sent(record_id):
                assert self._processed(record_id), f"{record_id}, below the cursor, has not arrived"

    def _done(self, segments: dict[int, bytes]) -> list[tuple[int, bytes]]:
        """What lies before the ledger's cursor, by the ledger's own file."""
        path = Path(self.directory, "shipper.db")
        if not path.exists():
            return []
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            try:
                row = db.execute("SELECT segment, offset, inode FROM cursor").fetchone()
            except sqlite3.OperationalError:  # it has just been made
                return []
        if (
            row is None
            or row[0] not in segments
            or os.stat(segment_path(self.directory, row[0])).st_ino != row[2]
        ):
            return []
        done = [(number, content) for number, content in segments.items() if number < row[0]]
        return [*done, (row[0], segments[row[0]][: row[1]])]

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:  # else a step has failed already
                self.settle_and_check()
        finally:
            self.clean()

    def settle_and_check(self) -> None:
        """End the story well, and compare what came of it with the model."""
        self._settle()
        self._check()
        self._tell()

    def _settle(self) -> None:
        """The server is well, the last writers speak, and a healthy shipper does all that there is to do."""
        self.seams.disarm()
        self.server.mood = "healthy"
        self.clock.now += 62.0
        assert self._append(call("", new_id(), self._at(), model="last words"))
        self._round()
        self._bury()
        for number in range(SETTLING_ROUNDS):  # what was in hand at a death goes record by record
            self._round()
            self.clock.now += 1.0
            if number >= 40 and self.shipper is not None and not self.shipper.pending:
                break
        assert self.shipper is not None
        self._count(self.shipper)
        assert self.shipper.pending == 0
        open_runs = {i for i, run in self.shipper._tracker._runs.items() if not run.ended}
        in_process = {i for i, run in self.model.runs.items() if not run.ended and not run.dead}
        assert open_runs <= in_process or self.model.wiped, "a run stays open that has ended"
        self.shipper._leave(True)
        self.shipper._close()
        liveness.ship_lock(self.directory).release()
        self.shipper = None
        last = self._new_shipper()
        last.stop(self.clock.now + 30.0)
        liveness.ship_lock(self.directory).release()
        assert last.run(0.0)
        assert last.pending == 0
        assert not last.unreadable

    def _check(self) -> None:
        model, server = self.model, self.server
        missing = {
            i for i in model.promised - model.deleted if not self._processed(i) and not self._is_not_sent(i)
        }
        assert missing == set(), "promised and missing"
        assert server.changed == []
        for record in server.records.values():
            self._check_arrived(record)
        repeats = {i: n for i, n in server.repeats.items() if n > server.uncertain[i]}
        assert repeats == {} or model.wiped, "repeats that nothing explains"
        for run in model.runs.values():
            self._check_run(run)
        self._check_counts()
        if not model.wiped:
            self._check_quarantine()
        self._check_disk()

    def _check_arrived(self, record: Record) -> None:
        """It was issued as it is, or the shipper had a reason to make it."""
        model = self.model
        issued = model.records.get(record.id)
        if issued is None:
            return self._check_made(record)
        assert record.id in model.promised | model.unpromised, "arrived, though never written whole"
        if isinstance(issued, LLMCall) and not issued.run_id:
            issued = msgspec.structs.replace(issued, run_id=self.server.run_of[record.id])
        if isinstance(record, RunEnded) and record.state == "killed":
            assert model.runs[record.run_id].lost
            return None
        assert record == issued
        return None

    def _check_made(self, record: Record) -> None:
        assert not isinstance(record, TaskLost)
        run = self.model.runs.get(record.run_id)
        if run is None:  # of calls outside any run
            grouped = [
                i
                for i, run_id in self.server.run_of.items()
                if run_id == record.run_id and i in self.model.records
            ]
            # Without its ledger, a shipper groups calls anew that had arrived in another run.
            assert grouped or self.model.wiped, "a run of nothing"
            return
        if isinstance(record, RunStarted):
            assert record.metadata == {"recovered": True}
            safe = run.run_id in self.model.promised - self.model.deleted and not run.token_gone
            assert not safe, "recovered, though its start was safe"
            return
        assert isinstance(record, RunEnded)
        assert record.state == "killed"
        end_is_gone = f"{run.run_id}-end" in self.model.deleted
        assert run.dead or run.token_gone or end_is_gone, "killed, though its process lives"

    def _check_run(self, run: Run) -> None:
        model, server = self.model, self.server
        arrived = [i for i in server.records if server.run_of[i] == run.run_id and i in model.records]
        places = {i: n for n, i in enumerate(run.order)}
        sure = [i for i in arrived if i in model.promised]
        assert sure == sorted(sure, key=places.__getitem__), "out of order"
        ends = server.ends().get(run.run_id, [])
        if run.run_id in model.deleted or model.wiped:
            return
        assert len(ends) <= 1, "a run that ended twice"
        if run.dead and (arrived or run.run_id in model.promised):
            assert [end.state for end in ends] == ["killed"]
            reasons = {"WorkerLostError"} if run.lost else {"ProcessDied"}
            if model.kills:  # the reason may have been read before the run, and forgotten with the shipper
                reasons.add("ProcessDied")
            assert ends[0].error_type in reasons
            assert server.run_of[ends[0].id] == run.run_id
            assert [i for i in server.records if server.run_of[i] == run.run_id][-1] == ends[0].id

    def _check_counts(self) -> None:
        model = self.model
        assert sum(self.collector.journal.dropped.values()) == model.refused
        if not model.torn_deleted:
            assert self.torn >= model.torn
            if self.shippers[:-2] == []:  # one, and the last one, which has nothing to read
                assert self.torn == model.torn

    def _check_quarantine(self) -> None:
        path = Path(self.directory, "quarantine.ndjson")
        lines = path.read_bytes().splitlines() if path.exists() else []
        kept = [msgspec.json.decode(line)["record"]["id"] for line in lines]
        assert set(kept) == self.server.refused
        assert len(kept) == len(set(kept)) or self.model.kills or self.server.uncertain

    def _check_disk(self) -> None:
        segments = self.segments()
        [(number, _)] = self._done(segments)
        assert number == min(segments), "segments below the cursor are left"

    def _tell(self) -> None:
        model, server = self.model, self.server
        self.seen.update(
            stories=1,
            records=len(model.records),
            arrived=len(server.records),
            dropped=model.refused,
            torn=model.torn,
            twice=len(model.twice),
            repeats=server.repeats.total(),
            refused=len(server.refused),
            kills=model.kills,
            in_seams=sum(self.seams.fired.values()),
            forks=model.forks,
            deletions=model.deletions,
        )

    def clean(self) -> None:
        if self.shipper is not None:
            self._bury()
        for one in self.shippers:
            if one._opened:
                close_as_the_kernel_would(one)
        for descriptor in self.open_files:
            os.close(descriptor)
        forget_directory(self.directory)
        self._exporting.__exit__(None, None, None)
        forget_server(self.server)
        shutil.rmtree(self.root, ignore_errors=True)


def test_no_order_of_events_loses_or_doubles_a_record() -> None:
    """Given any order of writes, forks, deaths, deletions and a server's moods, what was promised and not
    deleted arrives once, in its run's order, and what cannot arrive is counted."""
    JournalMachine.seen.clear()
    run_state_machine_as_test(
        JournalMachine,
        settings=settings(
            max_examples=effort(50, 600),
            stateful_step_count=effort(30, 60),
            deadline=None,
            print_blob=True,
            # A step may fork and wait, and sync a database: seconds for a whole example on a busy machine.
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    seen = JournalMachine.seen
    found("journal machine", **{what: seen[what] for what in sorted(seen)})
    for what in ("records", "forks", "torn", "twice", "kills", "in_seams", "deletions", "repeats", "refused"):
        assert seen[what] > 0, f"no {what}: nothing was tried"
