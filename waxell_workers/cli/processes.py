"""Child processes with a log each, which are ended by their own id whatever happens in between.

Every child leads a session of its own: a Ctrl-C in the terminal reaches only the command, which then ends its
children in order. Nothing here waits without a deadline.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.05


class ChildError(Exception):
    """A child process ended, or did not do in time what was waited for."""


@dataclass(slots=True)
class Child:
    """A process that was started here, and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def alive(self) -> bool:
        """True until the process has ended."""
        return self.process.poll() is None

    def tail(self, lines: int = 25) -> str:
        """Return the last lines of what the process wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Wait until `condition` holds.

        Raises:
            ChildError: the process has ended, or `timeout_s` seconds have passed.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self.alive:
                raise ChildError(
                    f"{self.name} ended ({self.process.returncode}) before {what}\n{self.tail()}"
                )
            if time.monotonic() > deadline:
                raise ChildError(f"{self.name}: no {what} within {timeout_s:.0f} s\n{self.tail()}")
            time.sleep(POLL_S)

    def wait_for_line(self, prefix: str, timeout_s: float) -> str:
        """Wait for a complete line of the log that begins with `prefix`, and return it."""
        found: list[str] = []

        def written() -> bool:
            lines = self.log.read_text(errors="replace").splitlines(keepends=True)
            found.extend(line.strip() for line in lines if line.startswith(prefix) and line.endswith("\n"))
            return bool(found)

        self.wait_for(written, f"line {prefix}…", timeout_s)
        return found[0]

    def wait(self, timeout_s: float) -> None:
        """Wait until the process has done its work.

        Raises:
            ChildError: it failed, or `timeout_s` seconds have passed.
        """
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ChildError(f"{self.name} has not ended within {timeout_s:.0f} s\n{self.tail()}") from None
        if status != 0:
            raise ChildError(f"{self.name} failed ({status})\n{self.tail()}")

    def stop(self, timeout_s: float) -> None:
        """End the process: SIGTERM, `timeout_s` seconds of patience, then SIGKILL to its whole group."""
        if not self.alive:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            # not reaped yet, so the id of the group is still ours
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Children:
    """The children of one command; leaving the `with` block ends them, the last one first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[Child] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *exc_info: object) -> None:
        impatience = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave some behind
        try:
            while self._started:
                self._started.pop().stop(timeout_s=5.0)
        finally:
            signal.signal(signal.SIGINT, impatience)

    def check(self) -> None:
        """Make sure that no child has failed.

        Raises:
            ChildError: one has; the message has the end of its log.
        """
        for child in self._started:
            if child.process.poll():
                raise ChildError(f"{child.name} has ended ({child.process.returncode})\n{child.tail()}")

    def start(self, name: str, command: Sequence[str], environ: Mapping[str, str]) -> Child:
        """Start a process, with stdout and stderr in `<directory>/<name>.log`."""
        log = self._directory / f"{name.replace(' ', '-')}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environ),
                cwd=self._directory,
                start_new_session=True,
            )
        child = Child(name, process, log)
        self._started.append(child)
        return child
