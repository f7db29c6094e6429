"""The killer: starts writers, shippers and the server, and kills them at random instants, by a plan.

The plan follows from the seed: which fault, after which event, how much later. What the system makes of it
does not repeat, but a seed that finds something tends to find it again. A fault counts only when the process
that it was meant for has died of it.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.crash.taps import Disk, Wire
from tests.crash.writer import SMALL_LIMITS
from tests.harness import ROOT, START_S, Server, await_, environment, start_server
from waxell_workers.cli.processes import Children

WRITERS = 3
VICTIM_S = 60.0
"""The longest that the killer looks for somebody to kill."""
EVENT_S = 1.0
"""How long it waits for the event after which it strikes; then it strikes without."""
_SHIP = f"{SMALL_LIMITS}from waxell_workers.cli.main import main\nmain()\n"

FAULTS = {
    "writer": (10, ("start", "write", "write", "flush", "any")),
    "child": (6, ("fork", "write", "any")),
    "group": (6, ("start", "fork", "write", "flush", "any")),
    "shipper": (8, ("request", "request", "rotation", "start", "any")),
    "group and shipper": (3, ("request", "rotation", "write", "any")),
    "server": (2, ("request", "any")),
}
"""Kind of fault to how often it comes, in proportion, and the events after which it strikes."""
DELAYS = {
    "start": 0.4,
    "fork": 0.03,
    "write": 0.004,
    "flush": 0.02,
    "request": 0.03,
    "rotation": 0.01,
    "any": 0.3,
}
"""The longest time from an event to the strike."""
_BYTES = {"write": b"w", "fork": b"f", "flush": b"u"}


@dataclass(frozen=True)
class Fault:
    """One line of the plan."""

    kind: str
    event: str
    delay_s: float
    pause_s: float
    """What passes before the next one."""
    loses_answer: bool
    choice: float
    """Which of several victims."""


def plan(seed: int, count: int) -> list[Fault]:
    """Return the faults that a seed stands for; each kind has its share of them."""
    chance = random.Random(seed)
    kinds = [kind for kind, (share, _) in FAULTS.items() for _ in range(share)]
    wanted = list(itertools.islice(itertools.cycle(kinds), count))
    chance.shuffle(wanted)
    faults = []
    for kind in wanted:
        event = chance.choice(FAULTS[kind][1])
        delay = chance.uniform(0.0, DELAYS[event]) * chance.choice((1.0, 0.1))
        faults.append(
            Fault(kind, event, delay, chance.uniform(0.0, 0.15), chance.random() < 0.15, chance.random())
        )
    return faults


@dataclass
class Writer:
    """A writer's leading process; its forked children are in its process group."""

    name: str
    process: subprocess.Popen[bytes]

    @property
    def id(self) -> str:
        """The process as its notes call it."""
        return f"{self.name}.{self.process.pid}"

    def await_event(self, event: str) -> bool:
        """Wait until this writer or a child of it begins something; false if it does not, in `EVENT_S`."""
        assert self.process.stdout is not None
        pipe, deadline = self.process.stdout.fileno(), time.monotonic() + EVENT_S
        self._drain()
        while (left := deadline - time.monotonic()) > 0:
            if select.select([pipe], [], [], left)[0]:
                told = os.read(pipe, 65536)
                if _BYTES[event] in told:
                    return True
                if not told:  # it has ended
                    return False
        return False

    def _drain(self) -> None:
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        while select.select([pipe], [], [], 0)[0] and os.read(pipe, 65536):
            pass

    def group(self) -> list[int]:
        """Return the living processes of the group."""
        return group(self.process.pid)


@dataclass
class Arena:
    """Everything that runs in one kill loop."""

    directory: Path
    children: Children
    wire: Wire
    disk: Disk
    chance: random.Random
    server: Server
    writers: list[Writer] = field(default_factory=list)
    ship: subprocess.Popen[bytes] | None = None
    fired: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    """After which event they were fired, where that came in time."""
    shipped_by: Counter[str] = field(default_factory=Counter)
    """What those were that had the lock when they were killed: process, thread or external."""
    killed: int = 0
    """Processes that died of a SIGKILL of ours."""
    ended: dict[str, int] = field(default_factory=dict)
    """Exit codes of writers, by process as in their notes."""
    started: Counter[str] = field(default_factory=Counter)

    @property
    def notes(self) -> Path:
        return self.directory / "notes"

    @property
    def spool(self) -> Path:
        return self.directory / "spool"

    @property
    def errors(self) -> Path:
        return self.directory / "errors.txt"

    def settings(self, shipper: str) -> dict[str, str]:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        return environment(
            WAXELL_API_URL=self.wire.url,
            WAXELL_SPOOL_DIR=str(self.spool),
            WAXELL_SHIPPER=shipper,
            WAXELL_FLUSH_INTERVAL="0.2",
            WAXELL_SPOOL_LIMIT="256 MiB",
            HOME=str(self.directory),
            PYTHONPATH=os.pathsep.join(filter(None, paths)),
            PYTHONWARNINGS="ignore::DeprecationWarning",  # to fork beside threads is what is tried here
        )

    # -- what runs -----------------------------------------------------------------------------

    def start_writer(self, shipper: str, *arguments: str) -> Writer:
        name = f"w{sum(self.started.values())}"
        self.started[shipper] += 1
        command = [sys.executable, "-m", "tests.crash.writer", str(self.notes), name, *arguments]
        with self.errors.open("ab") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self.settings(shipper),
                cwd=self.directory,
                start_new_session=True,
            )
        writer = Writer(name, process)
        self.writers.append(writer)
        return writer

    def start_ship(self) -> None:
        """Start `waxell-workers ship`, as a unit does whose service has failed."""
        if self.ship is not None and self.ship.poll() is None:
            return
        command = [sys.executable, "-c", _SHIP, "ship", "--spool-dir", str(self.spool)]
        with (self.directory / "ship.txt").open("ab") as log:
            self.ship = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.settings("external")
            )

    def keep_up(self) -> None:
        """Start again what was killed, or has ended by itself."""
        for writer in list(self.writers):
            if writer.process.poll() is not None:
                self._bury(writer)
        while len(self.writers) < WRITERS:
            self.start_writer(self.chance.choice(("process", "process", "thread", "external")))
        if (self.ship is None or self.ship.poll() is not None) and self.chance.random() < 0.5:
            self.start_ship()
        self.keep_up_server()

    def keep_up_server(self) -> None:
        """Start the server again if it was killed; behind the tap, its clients see the same address."""
        if not self.server.child.alive:
            self.server = start_server(self.children, self.directory / "server")
            self.wire.server_url = self.server.url

    def _bury(self, writer: Writer) -> None:
        self.ended[writer.id] = writer.process.wait(START_S)
        if writer.process.stdout is not None:
            writer.process.stdout.close()
        self.writers.remove(writer)

    # -- faults --------------------------------------------------------------------------------

    def strike(self, fault: Fault) -> None:
        """Fire one fault: find a victim, wait for the event, kill; again until somebody has died of it."""
        if fault.loses_answer:
            self.wire.answer_to_lose.set()
        deadline = time.monotonic() + VICTIM_S
        while True:
            self.keep_up()
            if fault.event == "start":
                self._start_anew(fault)
            if self._victims(fault):
                came = self._await_event(fault)
                time.sleep(fault.delay_s)
                victims = self._victims(fault)
                holder = self._holder()
                kind = shipper_kind(holder)
                hit = self._kill(victims)
                if hit and holder in victims:
                    self.shipped_by[kind] += 1
                if hit:
                    break
            assert time.monotonic() < deadline, f"no {fault.kind} to kill within {VICTIM_S:.0f} s"
            time.sleep(0.02)
        self.fired[fault.kind] += 1
        self.events[fault.event] += came
        time.sleep(fault.pause_s)

    def _victims(self, fault: Fault) -> list[int]:
        if fault.kind == "server":
            return [self.server.child.process.pid]
        if fault.kind == "shipper":
            return self.shippers() if fault.event == "start" else self._shipping(fault)
        writer = self._writer(fault)
        if fault.kind == "writer":
            return [writer.process.pid]
        if fault.kind == "child":
            found = [pid for one in self.writers for pid in one.group() if pid != one.process.pid]
            return found[: 1 + int(fault.choice * 2)]
        shipping = self._shipping(fault) if fault.kind == "group and shipper" else []
        return writer.group() + shipping

    def _await_event(self, fault: Fault) -> bool:
        if fault.event == "request":
            return self.wire.await_request(EVENT_S)
        if fault.event == "rotation":
            return self.disk.await_rotation(EVENT_S)
        return fault.event not in _BYTES or self._writer(fault).await_event(fault.event)

    def _start_anew(self, fault: Fault) -> None:
        """Have the victim be one that has only just been started."""
        if fault.kind == "shipper":
            self._kill(self.shippers())
            self.start_ship()
            return
        old = self._writer(fault)
        place = self.writers.index(old)
        self._kill(old.group())
        self._bury(old)
        new = self.start_writer(self.chance.choice(("process", "thread")))
        self.writers.remove(new)
        self.writers.insert(place, new)

    def _writer(self, fault: Fault) -> Writer:
        return self.writers[int(fault.choice * len(self.writers))]

    def _shipping(self, fault: Fault) -> list[int]:
        """Return who ships: whoever has the lock, be it a writer's thread; at times who waits for it, too."""
        holder = self._holder()
        found = [holder] if holder else []
        return found + [pid for pid in self.shippers() if pid != holder] if fault.choice < 0.3 else found

    def _holder(self) -> int:
        directory = self.disk.directory()
        return lock_holder(directory / "ship.lock") if directory is not None else 0

    def shippers(self) -> list[int]:
        """Return the processes that do nothing but ship from this spool."""
        tags = {f"{self.notes}/shipper", str(self.spool)}
        found = []
        for process in psutil.process_iter():
            try:
                if tags & set(process.cmdline()) and "tests.crash.writer" not in process.cmdline():
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    def _kill(self, pids: list[int]) -> int:
        """Kill processes, all before the first is waited for; return how many died."""
        alive = [pid for pid in dict.fromkeys(pids) if is_alive(pid)]
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        await_(lambda: not any(is_alive(pid) for pid in alive), "death of the killed", START_S)
        self.killed += len(alive)
        return len(alive)

    # -- the end -------------------------------------------------------------------------------

    def kill_shippers(self) -> None:
        """Leave nobody who ships."""
        while pids := [*self.shippers(), *filter(None, [self._holder()])]:
            self._kill(pids)

    def stop_writers(self) -> None:
        """Let all writers end by themselves."""
        (self.notes / "stop").touch()
        for writer in list(self.writers):
            await_(lambda w=writer: not w.group(), f"end of {writer.name}, which was told to stop", 120.0)
            self._bury(writer)
        await_(lambda: not self._orphans(), "end of forked children", 120.0)

    def _orphans(self) -> list[int]:
        """Return children whose writer was killed and buried, and who go on."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.notes) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    def kill_everything(self) -> None:
        """Leave nothing behind, whatever has failed."""
        (self.notes / "stop").touch()
        pids = [*self._orphans(), *self.shippers(), *(writer.process.pid for writer in self.writers)]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for writer in list(self.writers):
            self._bury(writer)
        if self.ship is not None:
            self.ship.wait(START_S)


@contextmanager
def arena(directory: Path, seed: int) -> Iterator[Arena]:
    """Yield a spool, a server behind a tap, and nobody who writes yet."""
    with ExitStack() as stack:
        for name in ("notes", "spool", "server"):
            (directory / name).mkdir(parents=True)
        children = stack.enter_context(Children(directory / "server"))
        wire = stack.enter_context(Wire())
        disk = stack.enter_context(Disk(directory / "spool"))
        server = start_server(children, directory / "server")
        wire.server_url = server.url
        found = Arena(directory, children, wire, disk, random.Random(seed), server)
        found.errors.touch()
        try:
            yield found
        finally:
            found.kill_everything()


def lock_holder(path: Path) -> int:
    """Return the process that holds the first byte of a file, as the kernel tells it; 0 if nobody does."""
    layout = "hhqqi" if sys.platform == "linux" else "qqihh"
    linux = sys.platform == "linux"
    question = (fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0) if linux else (0, 1, 0, fcntl.F_WRLCK, os.SEEK_SET)
    try:
        with path.open("rb+") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(layout, *question))
    except FileNotFoundError:
        return 0
    values = struct.unpack(layout, answer[: struct.calcsize(layout)])
    kind, pid = (values[0], values[4]) if linux else (values[3], values[2])
    return 0 if kind == fcntl.F_UNLCK else int(pid)


def is_alive(pid: int) -> bool:
    """True for a process that is there and no zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def shipper_kind(pid: int) -> str:
    """Return what a process that ships is, as the setting `shipper` calls it; empty if there is none."""
    try:
        command = psutil.Process(pid).cmdline() if pid else []
    except psutil.Error:
        return ""
    if "tests.crash.writer" in command:
        return "thread"
    return "external" if "ship" in command else "process"


def group(leader: int) -> list[int]:
    """Return the living processes of a process group."""
    return [pid for pid in psutil.pids() if _group_of(pid) == leader and is_alive(pid)]


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0
