"""The shipper: reads the journal, exports batches, moves its cursor after the acknowledgement.

One per destination and host, whoever holds `ship.lock`: a process of its own beside a worker, a daemon
thread in a script, or `waxell-workers ship`. It relies on nothing but the directory, and may be killed at any
instruction: what was not committed is read again. It never runs in a task's path.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

from . import quarantine, reserve, spool
from .abandoned import Sweeper, close_off
from .caution import REASON, Caution
from .config import Settings
from .exporting import OUT_OF_TIME, Exporter, Outcome, RunBatch
from .ledger import Ledger
from .listener import Listener, Waiter
from .liveness import Procs, ship_lock
from .parking import Parking
from .reader import Entry, NewerJournal, Reader
from .records import Record, RunStarted
from .room import is_lack_of_room, is_passing, with_room
from .segments import FIRST_LINE
from .syncing import Syncer
from .tracking import Tracker, unknown
from .values import EXPORTERS
from .window import Backoff, Window

logger = logging.getLogger("waxell_workers.shipper")
_retries = logging.getLogger("waxell_workers.shipper.retries")
# Nothing is lost by a retry: a script that has not set up logging, a cron job, keeps its stderr to itself.
_retries.addHandler(logging.NullHandler())

BATCH_BYTES = 1 << 20
SEGMENT_BYTES = 4 << 20
_SMALL_SEGMENT_BYTES = 256 << 10
_POLL_S = 0.2
_EXPORT_S = 15.0
"""The longest that one batch may take."""
LOCK_WAIT_S = 5.0
"""How long a new shipper waits for one that is leaving."""
_PAUSE_S = 60.0
DRAIN_S = 30.0
"""How long a shipper goes on after the last writer's death."""
_TERM_DRAIN_S = 3.0
_HURRY_S = 1.0
_ROOM_S = 1.0
"""How often one that waits for room on the disk looks for it."""
_LISTEN_S = 5.0
"""How often one that cannot take flush requests, as where no file can be made, tries to."""
_TIDY_S = 60.0
_NO_RECORD_S_FAULT = (OSError, sqlite3.Error, ImportError, NewerJournal, KeyboardInterrupt, SystemExit)
"""What may end a shipper whatever it has in hand; anything else may be a bug that a record has hit."""


class Shipper:
    """Ships one destination's journal until told to stop, or until nothing is left to do."""

    def __init__(
        self,
        settings: Settings,
        directory: str,
        *,
        stay: bool,
        progress: Callable[[int, int], None] | None = None,
        adopts: bool = False,
    ) -> None:
        """Prepare; nothing is opened before `run`.

        Args:
            settings: where to and how often.
            directory: the destination's directory.
            stay: True to go on while nobody writes, until `stop`.
            progress: called after each batch, with the records delivered and those known to be pending.
            adopts: True to deliver what was recorded for another destination, up to now (`adoption`).
        """
        self._settings = settings
        self._directory = directory
        self._stay = stay
        self._progress = progress
        self._adopts = adopts
        self._sweeper = Sweeper(directory, settings.spool_max_age)
        self._syncer = Syncer(directory, settings.fsync_interval)
        self._wake = threading.Event()
        self._stop_by: float | None = None
        self._terminated = False
        self._asked = False
        self._named_time = False
        self._opened = False
        self._read_all = False
        self._torn = 0
        self._progressed = False
        self._untold: dict[int, int] = {}
        self._listener: Listener | None = None
        self._listened_at = 0.0
        self._closing = ExitStack()
        self._pending_since = time.monotonic()
        self._server = Backoff()
        self._last_attempt = 0.0
        self._tidied_at = time.monotonic()
        self._warned = ""
        self._waits_for = ""
        self.delivered = 0
        self.rejected = 0
        self.unreadable = False
        """True if the journal could not be read, so that nobody knows what is pending."""

    # -- life ----------------------------------------------------------------------------------

    def run(self, lock_wait_s: float = LOCK_WAIT_S) -> bool:
        """Ship; returns when there is nothing left to do, or somebody else ships (then False)."""
        try:
            if not self._take_lock(lock_wait_s):
                return False
            try:
                self._ship()
            finally:
                ship_lock(self._directory).release()
        except NewerJournal as error:
            logger.warning("%s: leaving the journal to a newer shipper", error)
            self.unreadable = True
        except FileNotFoundError as error:
            logger.warning("the spool is gone: %s", error)
            self.unreadable = True
        except (OSError, ImportError, sqlite3.Error) as error:
            logger.error("cannot ship from %s: %s", self._directory, error)
            self.unreadable = True
        return True

    def _ship(self) -> None:
        """Ship from here; a disk that is full or read-only is waited for, with the lock held: another shipper
        could do no more.
        """
        while True:
            try:
                self._ship_while_there_is_room()
            except (OSError, sqlite3.Error) as error:
                if not is_passing(error) or not self._wait_for_room(error):
                    raise
            else:
                return

    def _ship_while_there_is_room(self) -> None:
        try:
            self._open()
            self._listen()
            time_is_up = self._live()
            while not self._leave(time_is_up):
                self._listen()
                time_is_up = self._live()
        except _NO_RECORD_S_FAULT:
            if self._opened:
                self._caution.put_down()
            raise
        finally:
            self._close()

    def _wait_for_room(self, error: Exception) -> bool:
        """Wait until there is a reserve again; false if we are to leave before that.

        Without one, what is delivered could not be written down, and would be delivered again.
        """
        if str(error) != self._waits_for:  # looked for once a second: told once
            logger.error("no room to ship from %s (%s): everything is kept", self._directory, error)
        self._waits_for = str(error)
        last_alive = time.monotonic()
        while self._stop_by is None and not (self._stay and self._terminated):
            if self._sees_anyone_alive() or self._stay:  # asked first: the spool may be gone
                last_alive = time.monotonic()
            elif time.monotonic() - last_alive > (_TERM_DRAIN_S if self._terminated else DRAIN_S):
                return False
            self._wake.wait(_ROOM_S)
            self._wake.clear()
            if reserve.keep(self._directory):
                logger.info("there is room again in %s", self._directory)
                return True
        return False

    def _sees_anyone_alive(self) -> bool:
        try:
            return Procs(self._directory).anyone_alive()
        except OSError as error:
            if not is_passing(error):
                raise
            return False

    def stop(self, deadline: float) -> None:
        """Ask the shipper to deliver what is there and to leave, at `deadline` at the latest."""
        self._stop_by = deadline
        self._wake.set()

    def terminate(self) -> None:
        """Ask the shipper, from a signal handler, to leave.

        It does once the workers are gone and all is delivered, at most 3 s after their end; one that was to
        stay while nobody writes does not wait for their end, and leaves within 3 s. So does one that is
        asked again.
        """
        if self._terminated and self._stop_by is None:
            self._stop_by = time.monotonic() + _TERM_DRAIN_S  # no `_wake`: its lock may be held just now
        self._terminated = True

    def _take_lock(self, wait_s: float) -> bool:
        lock = ship_lock(self._directory)
        deadline = time.monotonic() + wait_s
        while not lock.acquire():
            if time.monotonic() >= deadline or self._stop_by is not None:
                return False
            time.sleep(0.05)
        return True

    def _open(self) -> None:
        self._read_all = False
        self._torn = 0
        self._procs = Procs(self._directory)
        reserve.keep(self._directory)
        self._ledger = Ledger(self._directory)
        self._closing.callback(self._ledger.close)
        last = close_off(self._directory, self._procs) if self._adopts else None
        owner = self._settings.destination if self._adopts else os.path.basename(self._directory)
        at_home = self._ledger.belongs_to(owner)
        self._reader = Reader(self._directory, *self._ledger.cursor(), last=last)
        self._closing.callback(self._reader.close)
        self._closing.callback(self._sweeper.close)
        self._closing.callback(self._syncer.close)
        self._syncer.start()
        self._window = Window(self._ledger.failing())
        self._parking = Parking(self._directory, self._ledger)
        self._tracker = Tracker(
            *(self._ledger, self._window, self._reader, self._procs, self._parking), adopted=not at_home
        )
        self._caution = Caution(self._directory, self._ledger)
        self._closing.callback(self._caution.close)
        self._exporter = load_exporter(self._settings)
        self._closing.callback(self._exporter.close)
        self._opened = True
        self._segment_bytes = min(SEGMENT_BYTES, (self._settings.spool_limit or SEGMENT_BYTES * 8) // 8)

    def _listen(self) -> None:
        if self._stop_by is not None:  # nobody has the time to ask; an ending interpreter starts no thread
            return
        self._listened_at = time.monotonic()
        listener = Listener(self._directory, self._wake.set)
        self._listener = listener if listener.start() else None

    def _leave(self, time_is_up: bool) -> bool:
        """Take no more requests, look once more; true if there is really nothing left for us to do."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._read()
        if time_is_up:
            return True
        someone_alive = self._procs.anyone_alive()
        if not self._is_drained() or (self._stop_by is None and someone_alive):
            return False
        if not someone_alive:
            self._leave_no_content()
        return True

    def _leave_no_content(self) -> None:
        if self._adopts:
            self._reader.leave_last()
        elif self._reader.end().offset > len(FIRST_LINE):
            self._rotate()
            self._read()
        # Also where the last round has rotated: the cursor is still behind what is delivered and sealed.
        self._tracker.commit([])
        self._tracker.delete_finished_segments()

    def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._closing.close()

    def _live(self) -> bool:
        """Go round until there is nothing left to do; true if time is up before that."""
        last_alive = time.monotonic()
        while True:
            self._round()
            now = time.monotonic()
            if self._stop_by is not None:
                if self._is_drained() and not self._owes_an_end():
                    return False
                if now >= self._stop_by:
                    return True
            elif self._procs.anyone_alive() or self._stay:
                last_alive = now
            elif self._is_finished():
                return False
            elif now - last_alive > (_TERM_DRAIN_S if self._terminated else DRAIN_S):
                return True
            if self._stay and self._terminated and self._stop_by is None:
                self.stop(now + _TERM_DRAIN_S)
            self._sleep()

    def _sleep(self) -> None:
        if self._progressed and (not self._read_all or self._known >= self._settings.flush_max_records):
            return
        wait = _POLL_S
        if self._stop_by is not None:
            wait = max(0.0, min(wait, self._stop_by - time.monotonic(), 0.05))
        self._wake.wait(wait)
        self._wake.clear()

    def _is_drained(self) -> bool:
        return self._read_all and not self._known and not self._parking.count()

    def _is_finished(self) -> bool:
        return self._is_drained() and not self._tracker.any_open()

    def _owes_an_end(self) -> bool:
        return self._tracker.any_open() and not self._procs.anyone_alive()

    # -- one round -----------------------------------------------------------------------------

    def _round(self) -> None:
        if not ship_lock(self._directory).is_in_place():
            raise FileNotFoundError(errno.ENOENT, "the directory was deleted or moved", self._directory)
        self._read()
        if self._listener is None and time.monotonic() - self._listened_at >= _LISTEN_S:
            self._listen()
        self._tracker.end_dead_runs(leaving=self._stop_by is not None)
        waiters = self._listener.waiters() if self._listener is not None else []
        self._asked = bool(waiters)
        self._answer(waiters)
        self._progressed = False
        if self._is_due(waiters):
            before = self.delivered + self.rejected
            self._export()
            self._progressed = self.delivered + self.rejected > before
            self._answer(waiters)
        if self._segment_is_full():
            self._rotate()
        self._tidy()
        if self._stop_by is None:
            self._sweeper.go_on()
        self._report()

    def _segment_is_full(self) -> bool:
        """True if it is time for another one: only a segment that is finished gives room back, of which there
        is little where much of the spool is others'.
        """
        size = self._reader.end().offset
        if size >= self._segment_bytes:
            return True
        return size >= _SMALL_SEGMENT_BYTES and size >= spool.share(self._settings, self._directory) // 4

    def _rotate(self) -> None:
        try:
            with_room(self._directory, self._reader.rotate)
        except OSError as error:
            if not is_lack_of_room(error):
                raise  # else in a later round: delivering goes on without

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self.delivered, self._known)

    def _read(self) -> None:
        self._reader.follow()
        self._read_all = False
        while not self._window.is_full(self._tracker.loose, self._tracker.loose_bytes) or self._park():
            entries = self._reader.read()
            if not entries:
                self._read_all = True
                break
            for entry in entries:
                self._tracker.admit(entry)
        if self._reader.torn > self._torn:
            logger.warning("%d torn or damaged lines were passed over", self._reader.torn - self._torn)
            self._torn = self._reader.torn
        if not self._known:
            self._pending_since = time.monotonic()

    def _park(self) -> bool:
        """Move runs that fail aside, so that reading goes on; false if there are none, or no room."""
        parked: list[str] = []
        for run_id in self._window.failing(self._parking):
            if run_id not in self._parking and self._parking.is_full:
                continue
            try:
                entries = self._window.entries(run_id)
                self._parking.park(run_id, entries, ended=self._tracker.has_ended(run_id))
            except OSError as error:
                if not is_lack_of_room(error):
                    raise
                break
            self._window.withdraw(run_id)
            parked += [entry.id for entry in entries]
        if parked:
            self._tracker.commit(parked)
            self._tracker.delete_finished_segments()
        return bool(parked)

    @property
    def pending(self) -> int:
        """Records that have not arrived, as far as they were read; at least 1 where some were not."""
        if self.unreadable or not self._opened:
            return 1
        return max(int(not self._read_all), self._known + self._parking.count())

    @property
    def _known(self) -> int:
        return self._window.pending + self._tracker.loose

    def _is_due(self, waiters: list[Waiter]) -> bool:
        parked_is_due = self._parking.is_due()
        if not (self._known or parked_is_due) or not self._may_send():
            return False
        if waiters or self._stop_by is not None or not self._procs_alive_or_stay():
            return True
        return (
            self._known >= self._settings.flush_max_records
            or parked_is_due
            or self._window.pending_bytes >= BATCH_BYTES
            or time.monotonic() - self._pending_since >= self._settings.flush_interval
        )

    def _procs_alive_or_stay(self) -> bool:
        return self._stay or self._procs.anyone_alive()

    def _in_a_hurry(self) -> bool:
        """True if somebody waits, or if we shall leave soon: told to, or since nobody writes any more."""
        return self._asked or self._stop_by is not None or not self._procs_alive_or_stay()

    def _may_send(self) -> bool:
        now = time.monotonic()
        if self._server.until > now:
            # One attempt a second is allowed then, unless the server named a time.
            return self._in_a_hurry() and not self._named_time and now - self._last_attempt >= _HURRY_S
        return True

    def _export(self) -> None:
        self._pending_since = time.monotonic()
        self._tracker.group_loose()
        if self._in_a_hurry():
            self._window.ignore_backoff()
        self._export_from(lambda most: self._window.take(most, self._parking))
        if self._stop_by is not None or not self._procs_alive_or_stay():
            self._parking.ignore_backoff(_HURRY_S)
        if self._may_send():
            self._export_from(self._take_parked)

    def _take_parked(self, most: int) -> dict[str, list[Entry]]:
        taken = self._parking.take(most)
        return {run_id: self._tracker.resume(run_id, entries) for run_id, entries in taken.items()}

    def _export_from(self, take: Callable[[int], dict[str, list[Entry]]]) -> None:
        while True:
            taken = take(self._settings.flush_max_records)
            if fatal := self._caution.given_up(taken):
                self._give_up(fatal)
                continue
            taken = self._caution.choose(taken)
            if not taken:
                return
            self._caution.take_in_hand(taken)
            outcome = self._send(taken)
            goes_on = self._settle(taken, outcome)
            self._report()  # a round may take minutes, if much waits for a slow server
            if not goes_on:
                return

    def _send(self, taken: dict[str, list[Entry]]) -> Outcome:
        batch = [
            RunBatch(self._tracker.state(run_id), [cast(Record, entry.record) for entry in entries])
            for run_id, entries in taken.items()
        ]
        self._last_attempt = time.monotonic()
        deadline = self._last_attempt + _EXPORT_S
        if self._terminated and not self._procs.anyone_alive():
            deadline = min(deadline, self._last_attempt + _TERM_DRAIN_S)
        if self._stop_by is not None:
            deadline = min(deadline, self._stop_by)
        return self._exporter.export(batch, deadline)

    def _settle(self, taken: dict[str, list[Entry]], outcome: Outcome) -> bool:
        """Take the outcome to heart; true if it is worth going on at once."""
        only_failing = all(run_id in self._parking or self._window.has_failed(run_id) for run_id in taken)
        done, left = self._book(taken, outcome)
        # What fails alone, while the server takes the rest, says nothing of the server.
        server_fails = bool(outcome.error) and not done and (self._server.failures > 0 or not only_failing)
        if not server_fails:
            for run_id in left:
                self._keeper(run_id).failed(run_id, outcome.retry_after_s)
        self._note(outcome, server_fails=server_fails)
        return bool(done) and not outcome.paused and not outcome.error

    def _give_up(self, fatal: dict[str, list[Entry]]) -> None:
        """Put records into quarantine that shippers have died at."""
        for run_id, entries in fatal.items():
            for record in [entry.record for entry in entries]:
                if isinstance(record, RunStarted):  # an exporter may need it for each record of the run
                    self._tracker.state(run_id).started = unknown(run_id, record)
        rejected = {entry.id: REASON for entries in fatal.values() for entry in entries}
        self._book(fatal, Outcome(rejected=rejected))

    def _book(self, taken: dict[str, list[Entry]], outcome: Outcome) -> tuple[list[str], list[str]]:
        """Write down what has arrived or was given up; return those ids, and the runs with something left."""
        done: list[str] = []
        from_journal: list[str] = []
        left: list[str] = []
        waiters = self._listener.waiters() if self._listener is not None else []
        for run_id, entries in taken.items():
            settled = [
                entry for entry in entries if entry.id in outcome.acknowledged | outcome.rejected.keys()
            ]
            for entry in settled:
                record = cast(Record, entry.record)
                if entry.id in outcome.rejected:
                    self._quarantine(record, outcome.rejected[entry.id])
                    self._untold[entry.token] = self._untold.get(entry.token, 0) + 1
                    self.rejected += 1
                else:
                    _credit(waiters, entry)
                    self.delivered += 1
                self._tracker.delivered(run_id, record)
            ids = {entry.id for entry in settled}
            if run_id not in self._parking:
                from_journal += ids
            self._keeper(run_id).arrived(run_id, ids)
            done += ids
            if len(ids) < len(entries):
                self._tracker.changed(run_id)
                left.append(run_id)
        self._tracker.commit(from_journal)
        self._tracker.delete_finished_segments()
        self._caution.put_down()
        self._caution.survived(done)
        return done, left

    def _keeper(self, run_id: str) -> Window | Parking:
        return self._parking if run_id in self._parking else self._window

    def _note(self, outcome: Outcome, *, server_fails: bool) -> None:
        self._named_time = outcome.retry_after_s is not None or bool(outcome.paused)
        if outcome.paused:
            self._server.until = time.monotonic() + _PAUSE_S
        elif server_fails:
            self._server.fail(outcome.retry_after_s)
        else:
            self._server.clear()
        trouble = outcome.paused or outcome.error
        if trouble == OUT_OF_TIME and self._warned:
            return  # what was said before says more
        if trouble and trouble != self._warned:
            speaker = logger if outcome.paused else _retries
            speaker.warning("%s: %s; everything is kept", self._settings.api_url, trouble)
        elif self._warned and not trouble:
            logger.info("%s: delivering again", self._settings.api_url)
        self._warned = trouble

    def _quarantine(self, record: Record, reason: str) -> None:
        try:
            path = quarantine.keep(self._directory, record, reason)
        except OSError as error:
            logger.error("a rejected record (%s) could not be kept: %s", record.id, error)
            return
        # The reason may be the server's own text, which may quote content: it stays in the file.
        whose = "no shipper survives" if reason == REASON else "the server rejected"
        logger.warning("%s a record (%s); it is in %s", whose, record.id, path)

    # -- flush requests ------------------------------------------------------------------------

    def _answer(self, waiters: list[Waiter]) -> None:
        for waiter in waiters:
            if waiter.upto is None:
                waiter.upto = self._reader.end()
            waiter.dropped += self._tell(waiter.token)
            # What was not read yet is not known: at the deadline, 0 would be taken for "delivered".
            has_read = self._reader.position >= waiter.upto
            known = self._window.count(waiter.token, waiter.upto) + self._parking.count(waiter.token)
            waiter.pending = known if has_read else -1
            if waiter.pending == 0 and self._listener is not None:
                self._listener.fulfil(waiter)

    def _tell(self, token: int) -> int:
        """Return how many records of a process (0: of all) were rejected since it was last told."""
        if token:
            return self._untold.pop(token, 0)
        told = sum(self._untold.values())
        self._untold.clear()
        return told

    # -- housekeeping --------------------------------------------------------------------------

    def _tidy(self) -> None:
        now = time.monotonic()
        if now - self._tidied_at < _TIDY_S:
            return
        self._tidied_at = now
        reserve.keep(self._directory)
        for name in ("procs", "ship.lock"):  # cleaners of temporary directories take what looks old
            try:
                os.utime(f"{self._directory}/{name}")
            except FileNotFoundError:
                continue
        self._ledger.forget_ended_runs()


def _credit(waiters: list[Waiter], entry: Entry) -> None:
    for waiter in waiters:
        if not waiter.token or entry.token == waiter.token:
            waiter.delivered += 1


def load_exporter(settings: Settings) -> Exporter:
    """Import and make the exporter that the settings name."""
    module, _, name = EXPORTERS[settings.exporter].partition(":")
    factory: Any = getattr(importlib.import_module(module), name)
    return cast(Exporter, factory(settings))


def preload(settings: Settings) -> None:
    """Import all that shipping will need, by the `preload` of the exporter's module."""
    module, _, _ = EXPORTERS[settings.exporter].partition(":")
    importlib.import_module(module).preload(settings)
