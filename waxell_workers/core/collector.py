"""The buffered collector: this process's way into the journal, and its word with the shipper.

There is one per process (`current`), inherited by forked children, configured by `init` or, at the first
need, from the environment. `write` is the only road a record takes. What cannot be recorded is counted,
with its reason, and never raised.
"""

from __future__ import annotations

import atexit
import fnmatch
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from . import launch, redaction, runs, spool
from .config import Settings, observes, resolve
from .encoding import encode, key_text
from .errors import ConfigError
from .flush import FlushResult, request_flush
from .ids import new_id
from .journal import Journal
from .limits import limit_call, limit_step, oldest_kept
from .liveness import ship_lock
from .others import OtherTracers
from .records import LLMCall, Record, RunEnded, RunStarted, RunUpdated, Step, TaskLost
from .runs import MUTED, Run
from .tally import Tally
from .values import Redactor

logger = logging.getLogger("waxell_workers")

_LOOK_FOR_SHIPPER_S = 5.0
_START_EVERY_S = 4.0
_SELDOM_S = 600.0
"""How often a shipper is tried once `launch.MOST_STARTS` have not stayed: the reason may go away."""
_TURN_S = 0.5
"""How long a script that ends waits for another one's shipper before it looks whether that still lives."""
_EXIT_MARGIN_S = 0.5
"""What an exit costs beside the wait itself; the promise is about both."""
_PAUSE_S = 0.02
_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Stats:
    """What this process has recorded and lost, since it began."""

    recorded: int = 0
    """Records that are safe in the journal."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Records that are lost, by reason."""
    pending: int = 0
    """Records written here of which no flush has said that they were delivered; the shipper may know more."""
    spool: str = ""
    """The directory of the journal; empty as long as nothing was written."""
    shipper: str = ""
    """How records are shipped from this process: `process`, `thread`, `external`, or empty."""
    drained: dict[str, dict[str, int]] = field(default_factory=dict)
    """By tracer that `drain` names: how often it was `flushed`, how often that `failed` or was `late`."""


@dataclass(eq=False, slots=True)
class _Process:
    """What is known of one process; a forked child begins with a new one."""

    recorded: Tally = field(default_factory=Tally)
    """Records that are safe in the journal."""
    confirmed: int = 0
    """How many of them a flush has said to be delivered."""
    told_drops: int = 0
    """How many losses a flush has told of."""
    recorded_at_stop: int = -1
    """How many records there were when it was last waited for their delivery at the exit."""
    has_begun: bool = False
    """True once its first record, or a worker's boot, has seen to a shipper."""
    leads_worker: bool = False
    """True for a worker's main process, where a shipper may live as a thread."""
    flushes_at_exit: bool = False
    """True if the interpreter's exit is to wait for delivery."""


class Collector:
    """Writes records, sees to it that somebody ships them, and asks for flushes."""

    def __init__(self, settings: Settings, *, implicit: bool = False, in_worker: bool = False) -> None:
        self.settings = settings
        self.implicit = implicit
        """True if the settings came from the environment at the first need, not from `init`."""
        self.active = settings.configured
        self.journal = Journal(settings)
        self.open_runs: dict[str, Run] = {}
        self.others: OtherTracers | None = None
        self.warned = False
        self.in_worker = in_worker
        self._processes: dict[int, _Process] = {}
        self._made_by = os.getpid()
        """The process that was configured; others with this collector were forked from it."""
        self._forked_at = 0.0
        self._looked_at = _NEVER
        self._starts = 0
        self._start_after = _NEVER
        self._written_bare = ""
        """The last record that was written without its content, since an interrupt hit its redaction."""

    @property
    def _here(self) -> _Process:
        pid = os.getpid()
        return self._processes.get(pid) or self._processes.setdefault(pid, _Process())

    # -- recording -----------------------------------------------------------------------------

    def token(self) -> int:
        """Return what a record of this process carries as `proc`; the first step of each record."""
        if not self.active:
            return 0
        if not self._here.has_begun:
            self._first_record_here()
        return self.journal.token()

    def write(self, record: Record, limit: Callable[[Record], Record] | None = None) -> bool:
        """Write a record, redacted; True if it is safe, False if it is lost and counted.

        Args:
            record: what has happened.
            limit: cuts what is too long in it, once it is redacted.

        Raises:
            BaseException: an interrupt of the task, which surfaced here; if in the user's `redact`, then the
                record is written without its content. Written again, it stays so.
        """
        if not self.active:
            if self.settings.observe:
                self.journal.drop("unconfigured")
            return False
        if self.settings.redact is not None:
            if record.id == self._written_bare:
                return True
            record = self._redacted(self.settings.redact, record)
        if limit is not None:
            record = limit(record)
        if not self.journal.append(encode(record)):
            return False
        self._here.recorded.add()
        if not self.in_worker:  # a script may be one long run, and who shipped for it may end
            self.look_for_shipper()
        return True

    def _redacted(self, redact: Redactor, record: Record) -> Record:
        try:
            return redaction.redacted(redact, record)
        except BaseException:  # an interrupt's: it goes on, and the record is there before it
            if self.journal.append(encode(redaction.without_content(record))):
                self._written_bare = record.id
                self._here.recorded.add()
            raise

    def record(
        self,
        kind: type[RunStarted | LLMCall | Step | RunUpdated | RunEnded | TaskLost],
        *,
        at: float | None = None,
        **fields: Any,
    ) -> bool:
        """Make a record and write it; what is written for every task is made by hand instead.

        Args:
            kind: the record's class.
            at: Unix time in seconds; now unless given.
            fields: the record's own fields; `id`, a new one unless given.
        """
        moment = time.time() if at is None else at
        if "id" not in fields:
            fields["id"] = new_id()
        return self.write(kind(at=moment, proc=self.token(), **fields))

    def record_call(self, **fields: Any) -> None:
        """Write an `LLMCall` that was captured, redacted, and then cut; nothing for a call of a muted run.

        Args:
            fields: those of `LLMCall` except `proc`, whole: the texts are redacted and cut here.
        """
        if fields.get("run_id") == MUTED:
            return
        settings = self.settings
        left_out = 0
        if settings.redact is not None and (messages := fields.get("messages")):
            left_out = oldest_kept(messages)
            fields["messages"] = messages[left_out:]
        fields.setdefault("id", new_id())
        fields.setdefault("at", time.time())
        call = LLMCall(proc=self.token(), **fields)
        self.write(call, lambda redacted: limit_call(redacted, settings.content_limit, left_out))

    def record_step(self, **fields: Any) -> None:
        """Write a `Step` that was captured, redacted, and then cut.

        Args:
            fields: those of `Step` except `proc`, whole.
        """
        step = Step(proc=self.token(), **fields)
        self.write(step, lambda redacted: limit_step(redacted, self.settings.content_limit))

    def excluded(self, name: str) -> bool:
        """True if a task or agent of this name is not to be recorded."""
        patterns = self.settings.exclude
        return bool(patterns) and any(fnmatch.fnmatchcase(key_text(name), pattern) for pattern in patterns)

    def look_for_shipper(self) -> None:
        """Look whether anybody ships, if that was not done of late; if not, start somebody.

        Called at the end of a worker's run and after each record of a script: who shipped may have died.
        """
        now = time.monotonic()
        if now - self._looked_at < _LOOK_FOR_SHIPPER_S:
            return
        self._looked_at = now
        self.ensure_shipper()

    def close_open_runs(self) -> None:
        """End the runs that this process began and never ended, as `interrupted`."""
        for run in list(self.open_runs.values()):
            run.end("interrupted", reason="interrupted: its process ended before it did")
        self.open_runs.clear()

    def _first_record_here(self) -> None:
        """In a script, or a process forked by one: see to a shipper and to the exit."""
        self._here.has_begun = True
        if self._made_by != os.getpid():
            self.open_runs = {key: run for key, run in list(self.open_runs.items()) if run.is_open}
        if self.in_worker:
            return
        self._looked_at = time.monotonic()
        self.ensure_shipper()
        self.flush_at_exit()

    def has_forked(self) -> None:
        """In a script: have its exit wait for what its children record, also if it records nothing itself."""
        if self.active and not self.in_worker:
            self._forked_at = self._forked_at or time.time()
            self.flush_at_exit()

    # -- shipping ------------------------------------------------------------------------------

    def enter_worker(self) -> None:
        """Say that this process, and those forked from it, belong to a worker that starts the shipper."""
        self.in_worker = True
        self._looked_at = time.monotonic()

    def boot(self) -> None:
        """Open the journal in a worker's main process and start the shipper's; harmless if repeated."""
        if not self.active:
            return
        self.enter_worker()
        self._here.has_begun = self._here.leads_worker = True
        try:
            self.journal.open()
        except OSError as error:
            logger.warning("no spool, so nothing will be recorded: %s", error)
            return
        if self.shipper_kind() == "process":
            self.ensure_shipper()

    def ensure_shipper(self) -> None:
        """Start a shipper if nobody ships; returns at once."""
        launch.reap()
        kind = self.shipper_kind()
        if not self.active or kind == "external":
            return
        if kind == "thread" and self.in_worker and not self._here.leads_worker:
            return  # the thread lives in the worker's main process; a task's must not start one
        try:
            directory = self.journal.open()
            if ship_lock(directory).taken():
                self._starts = 0
                if os.getpid() == 1:  # of a container: every orphan becomes our child
                    launch.adopt(ship_lock(directory).shipper_pid())
                return
            if not spool.is_writable(directory):  # a shipper could do nothing there; looked at again soon
                return
        except OSError:
            return
        now = time.monotonic()
        if now < self._start_after:
            return
        if self._starts == launch.MOST_STARTS:
            logger.error("no shipper stays: see shipper.log in %s; records are kept there", directory)
        # One that was just started has not taken the lock yet.
        quick = self._starts < launch.MOST_STARTS
        self._start_after = now + (_START_EVERY_S * 2**self._starts if quick else _SELDOM_S)
        self._starts += 1
        launch.start(self.settings, directory, thread=kind == "thread")

    def shipper_kind(self) -> str:
        """Return `process`, `thread` or `external`, as configured, or as fits this process."""
        kind = self.settings.shipper
        if kind == "auto":
            kind = "process" if self.in_worker or self._is_child() else "thread"
        if kind == "process" and not launch.can_start_process(self.settings):
            kind = "thread"
        return kind

    def _is_child(self) -> bool:
        """True in a forked process or one of `multiprocessing`'s: it may end without any exit hook."""
        parent_process = getattr(sys.modules.get("multiprocessing.process"), "parent_process", None)
        return self._made_by != os.getpid() or (parent_process is not None and parent_process() is not None)

    def flush_at_exit(self) -> None:
        """Have what remains exported when the interpreter exits normally."""
        self._here.flushes_at_exit = True

    def _at_exit(self) -> None:
        if self._here.flushes_at_exit:
            self.stop()
            _keep_interrupt()

    def stop(self, spent_s: float = 0.0) -> None:
        """End what is open and have everything exported, within one `shutdown_timeout` for the whole exit.

        A framework's own exit hook comes first, and `atexit` after it, which then finds nothing to do.

        Args:
            spent_s: seconds that the exit has waited already.
        """
        self.close_open_runs()
        recorded = self._here.recorded.value
        if recorded == self._here.recorded_at_stop:
            return
        self._here.recorded_at_stop = recorded
        self.shutdown(max(0.0, self.settings.shutdown_timeout - _EXIT_MARGIN_S - spent_s))

    # -- flushing ------------------------------------------------------------------------------

    def force_flush(self, timeout: float | None = None, *, everybody: bool = False) -> FlushResult:
        """Wait until what this process has recorded is at the server, or the timeout is over.

        Args:
            timeout: seconds; `flush_timeout` unless given.
            everybody: wait for the records of all processes that share the journal.

        Returns:
            True as a truth value only if nothing is pending and nothing was dropped.
        """
        timeout = self.settings.flush_timeout if timeout is None else max(0.0, timeout)
        deadline = time.monotonic() + timeout
        here = self._here
        told = here.told_drops
        try:
            wait_for_others = self._flush_others(deadline)
            result = self._flush(deadline, everybody)
            wait_for_others()
            return result
        except BaseException:  # an interrupt's: nobody has been told of what was lost
            here.told_drops = told
            raise

    def drain(self, timeout: float) -> None:
        """Flush the other tracers of this process that `drain` names, and nothing of ours."""
        self._flush_others(time.monotonic() + timeout)()

    def _flush_others(self, deadline: float) -> Callable[[], None]:
        """Begin to flush other tracers, if asked to; return what waits for them, until the deadline."""
        if self.others is None or deadline <= time.monotonic():
            return _nothing
        return self.others.begin(deadline)

    @property
    def pool_share_s(self) -> float:
        """The seconds of `shutdown_timeout` in which a pool's processes flush other tracers, if they do.

        The other half is the main process's, which stops after them.
        """
        return 0.0 if self.others is None else max(0.0, self.settings.shutdown_timeout - _EXIT_MARGIN_S) / 2

    def _flush(self, deadline: float, everybody: bool) -> FlushResult:
        dropped = self._new_drops()
        here = self._here
        recorded = here.recorded.value
        directory = self.journal.directory
        if not self.active or not directory or (recorded == here.confirmed and not everybody):
            return FlushResult(0, 0, dropped)
        if not _is_shipped(directory):
            self.ensure_shipper()
        token = 0 if everybody else self.journal.flush_token()
        answer = request_flush(directory, token, deadline, patience_s=_TURN_S)
        while answer is None and time.monotonic() < deadline:
            if not _is_shipped(directory):
                self.ensure_shipper()  # who was there, or was started, has not stayed
            time.sleep(_PAUSE_S)
            answer = request_flush(directory, token, deadline, patience_s=_TURN_S)
        unconfirmed = max(1, recorded - here.confirmed)
        if answer is None:
            return FlushResult(0, unconfirmed, dropped)
        if answer.pending == 0:
            here.confirmed = max(here.confirmed, recorded)
        pending = unconfirmed if answer.pending < 0 else answer.pending
        return FlushResult(answer.delivered, pending, dropped + answer.dropped)

    def _new_drops(self) -> int:
        here, drops = self._here, sum(self.journal.dropped.values())
        dropped, here.told_drops = drops - here.told_drops, drops
        return dropped

    def shutdown(self, timeout: float) -> FlushResult:
        """Have everything exported that is there, for at most `timeout` seconds, and stop shipping from here.

        A shipper that is a process of its own goes on by itself with what remains.
        """
        deadline = time.monotonic() + timeout
        here = self._here
        told = here.told_drops
        try:
            wait_for_others = self._flush_others(deadline)
            result = self._shutdown(deadline)
            wait_for_others()
            return result
        except BaseException:  # as above
            here.told_drops = told
            raise

    def _shutdown(self, deadline: float) -> FlushResult:
        everybody = self.in_worker or self._forked_at > 0
        directory = self._find_directory()
        if not self.active or not directory:
            return self._flush(0, False)
        if self.shipper_kind() != "thread":
            return self._flush(deadline, everybody)
        delivered = dropped = 0
        while True:
            if not _is_shipped_elsewhere(directory):
                own = launch.drain_here(self.settings, directory, deadline)
                if own is not None:
                    dropped += own.dropped + self._new_drops()
                    return FlushResult(delivered + own.delivered, own.pending, dropped)
            # In turns: another script, whose thread ships for us too, may end or die meanwhile.
            result = self._flush(min(time.monotonic() + _TURN_S, deadline), everybody)
            delivered, dropped = delivered + result.delivered, dropped + result.dropped
            if result.pending == 0 or time.monotonic() >= deadline:
                return FlushResult(delivered, result.pending, dropped)
            time.sleep(_PAUSE_S)

    def _find_directory(self) -> str:
        """Return the journal's directory, if this process wrote there or, it seems, a child of it."""
        if self.journal.directory or not self.active or not self._forked_at:
            return self.journal.directory
        try:
            return self.journal.open() if spool.written_since(self.settings, self._forked_at) else ""
        except OSError:
            return ""

    def stats(self) -> Stats:
        """Return what this process has recorded and lost."""
        recorded = self._here.recorded.value
        return Stats(
            recorded=recorded,
            dropped=self.journal.dropped,
            pending=recorded - self._here.confirmed,
            spool=self.journal.directory,
            shipper=self.shipper_kind() if self.active else "",
            drained=self.others.counts() if self.others is not None else {},
        )


def _keep_interrupt() -> None:
    """Let a script that Ctrl-C has ended die of SIGINT, as a shell that runs it in a loop expects.

    CPython remembers that it has to, until the next `exec` or `eval` of a text; and what is imported for the
    last delivery does those (`namedtuple`, `dataclass`).
    """
    if getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1"):
        try:
            exec("raise KeyboardInterrupt")
        except KeyboardInterrupt:
            pass


def _nothing() -> None:
    pass


def _is_shipped(directory: str) -> bool:
    try:
        return ship_lock(directory).taken()
    except OSError:
        return False


def _is_shipped_elsewhere(directory: str) -> bool:
    return not ship_lock(directory).held and _is_shipped(directory)


_collector: Collector | None = None
_configuring = threading.RLock()


_listeners: list[Callable[[Collector], None]] = []


def when_configured(listener: Callable[[Collector], None]) -> None:
    """Have a function called with each collector that is configured, before its first record."""
    _listeners.append(listener)


def _tell(collector: Collector) -> None:
    for listener in _listeners:
        listener(collector)


def current() -> Collector:
    """Return this process's collector, configured from the environment if `init` was not called.

    An environment that cannot be used switches everything off, and is logged: no task fails for it.
    """
    if _collector is not None:
        return _collector
    try:
        settings = resolve({})
    except ConfigError as error:
        logger.error("nothing will be recorded: %s", error)
        settings = Settings(observe=False)
    return _install(Collector(settings, implicit=True))


def configured() -> Collector | None:
    """Return this process's collector, or None as long as nobody has configured one."""
    return _collector


def _wants_content() -> bool:
    return _collector is not None and _collector.settings.capture_content


runs.set_content_setting(_wants_content)


def is_off() -> bool:
    """True if everything is switched off here; configures nothing, so that a web process stays as it is."""
    if _collector is not None:
        return not _collector.settings.observe
    return not observes(os.environ)


def configure(settings: Settings) -> Collector:
    """Make the collector for these settings; the first `init` wins.

    A collector that made itself from the environment and has written nothing yet gives way.
    """
    existing = _collector
    if existing is None:
        return _install(Collector(settings))
    if existing.settings == settings:
        return existing
    if existing.implicit and not existing.journal.directory:
        return _install(Collector(settings, in_worker=existing.in_worker), instead_of=existing)
    if not existing.warned:
        existing.warned = True
        logger.warning("waxell_workers is configured already: an init() with other settings is ignored")
    return existing


@contextmanager
def instead(collector: Collector) -> Iterator[None]:
    """Have this process record through another collector while the block lasts: for tests."""
    global _collector
    previous, _collector = _collector, collector
    collector.warned = True  # an `init` of the application under test: the test's settings stay
    _tell(collector)
    try:
        yield
    finally:
        collector.close_open_runs()
        _collector = previous
        # Without one from before, back to nothing: an inactive collector has no capture.
        _tell(previous or Collector(Settings(observe=False)))


def _note_fork() -> None:
    if _collector is not None:
        _collector.has_forked()


os.register_at_fork(after_in_parent=_note_fork)


def _install(collector: Collector, instead_of: Collector | None = None) -> Collector:
    global _collector
    with _configuring:
        if _collector is not instead_of:  # another thread was first
            return _collector or collector
        _collector = collector
        # Now, not at the first record: exit hooks run youngest first, and the application's may record.
        atexit.register(collector._at_exit)
        _tell(collector)
    return collector
