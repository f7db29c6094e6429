"""Scripts as somebody without a worker framework runs them: real processes with a home of their own.

The programs are in `scripts/`. What a script prints, what it leaves on its host and what has arrived at the
server are all that a test looks at. Every process is ended by its own id.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.harness import ROOT, Server, await_, environment, shippers_of

PROGRAMS = Path(__file__).parent / "scripts"
EXAMPLE = ROOT / "integrations" / "scripts" / "script.py"
SCRIPT_S = 120.0
"""The longest that a script may take on a busy machine; beyond, it hangs."""


@dataclass
class Told:
    """A program that answers each line of its stdin with one line."""

    process: subprocess.Popen[bytes]
    log: Path
    _read: bytes = b""

    def tell(self, line: str) -> str:
        """Send a line and return the answer."""
        self.send(line)
        return self.answer()

    def send(self, line: str) -> None:
        """Send a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """Wait for a line of the program and return it."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + SCRIPT_S
        while b"\n" not in self._read:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no answer within {SCRIPT_S:.0f} s\n{self.stderr}"
            chunk = os.read(self.process.stdout.fileno(), 65536)
            assert chunk, f"the script has ended\n{self.stderr}"
            self._read += chunk
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()

    @property
    def stderr(self) -> str:
        """What the program wrote to stderr."""
        return self.log.read_text(errors="replace")

    def end(self) -> int:
        """Let the program come to its normal end and return its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(SCRIPT_S)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the program by a signal."""
        self.process.send_signal(number)
        self.process.wait(SCRIPT_S)


@dataclass
class Host:
    """Where scripts run: directories of their own, and the settings that all of them have."""

    directory: Path
    settings: dict[str, str]
    python: str = sys.executable
    temporary: Path = field(init=False)
    """The temporary directory, with a short path: `multiprocessing` makes Unix sockets in it."""
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for path in (self.home, self.state):
            path.mkdir(parents=True)
        self.temporary = Path(tempfile.mkdtemp(prefix="host-"))
        weakref.finalize(self, shutil.rmtree, self.temporary, ignore_errors=True)

    @property
    def home(self) -> Path:
        """The user's home."""
        return self.directory / "home"

    @property
    def state(self) -> Path:
        """The user's state directory, in which the spool is by default."""
        return self.directory / "state"

    def left_behind(self) -> list[str]:
        """Return every file and directory that scripts have made."""
        roots = {"home": self.home, "state": self.state, "tmp": self.temporary}
        return sorted(
            f"{name}/{path.relative_to(root)}" for name, root in roots.items() for path in root.rglob("*")
        )

    def environ(self, **settings: str) -> dict[str, str]:
        """Return a script's environment."""
        own = {"HOME": self.home, "XDG_STATE_HOME": self.state, "TMPDIR": self.temporary}
        quiet = {"PYTHONDONTWRITEBYTECODE": "1", "STATE_DIRECTORY": ""}
        paths = {name: str(path) for name, path in own.items()}
        return environment(**paths, **quiet, PYTHONPATH=str(ROOT)) | self.settings | settings

    def run(self, program: str | Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        return subprocess.run(
            [self.python, str(PROGRAMS / program), *arguments],
            env=self.environ(**settings),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SCRIPT_S,
            check=False,
        )

    def start(self, program: str = "told.py", *arguments: str, **settings: str) -> Told:
        """Start a program that is told what to do."""
        log = self.directory / f"stderr-{len(self._started)}.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [self.python, str(PROGRAMS / program), *arguments],
                env=self.environ(**settings),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        self._started.append(process)
        return Told(process, log)

    def drain(self) -> subprocess.CompletedProcess[str]:
        """Run `waxell-workers ship --drain`."""
        return subprocess.run(
            [self.python, "-m", "waxell_workers.cli.main", "ship", "--drain"],
            env=self.environ(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SCRIPT_S,
            check=False,
        )

    def close(self) -> None:
        """End what is left: programs, and the shippers that their children have started."""
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None and not pipe.closed:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        pass
        for shipper in shippers_of(self.state):
            shipper.kill()


def clean(done: subprocess.CompletedProcess[str]) -> str:
    """Make sure that a script has ended well and has nothing on its stderr; return its stdout."""
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def run_of(server: Server, agent_name: str) -> dict[str, Any]:
    """Return the one run of this name that is at the server."""
    (run,) = [run for run in server.runs() if run["agent_name"] == agent_name]
    return run


def by_run(server: Server) -> dict[str, list[str]]:
    """Return the models of the calls at the server, sorted, by the name of their run."""
    found: dict[str, list[str]] = {}
    for run in server.runs():
        found.setdefault(run["agent_name"], []).extend(run["markers"])
    return {name: sorted(models) for name, models in found.items()}


def await_calls(server: Server, *models: str) -> None:
    """Wait until the call of each model is at the server, and make sure that it is there once."""
    await_(lambda: set(models) <= set(server.calls()), f"calls {models}")
    assert [server.calls()[model] for model in models] == [1] * len(models)
