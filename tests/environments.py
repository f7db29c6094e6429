"""Virtual environments for what must not be in ours: made once, kept under `.venv`, used by path.

Each is named after all that decides its contents, so that other requirements or another Python get another
one. It is built under a name of its own and renamed when it is complete: several test processes may build at
once, the first one wins, and one that is killed leaves nothing that would be taken for an environment.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

PARENT = Path(__file__).parents[1] / ".venv"
INSTALL_S = 300
ASK_S = 30


class NotAvailable(Exception):
    """The environment cannot be made: most likely, no package index answers."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment that may not exist yet."""

    name: str
    requirements: Path
    project: Path | None = None
    """The directory of a project that is installed as well, as it lies there."""
    parent: Path = PARENT
    interpreter: str = sys.executable
    """The Python that it is made of."""

    @property
    def place(self) -> Path:
        """Where the environment for these requirements and this Python is, or will be."""
        decides = identity(self.interpreter).encode() + self.requirements.read_bytes()
        if self.project is not None:
            decides += f"{self.project}\n".encode() + (self.project / "pyproject.toml").read_bytes()
        return self.parent / f"{self.name}-{hashlib.sha256(decides).hexdigest()[:12]}"

    def python(self) -> Path:
        """Return the Python of the environment, which is made if there is none.

        Raises:
            NotAvailable: pip could not install what is needed; the message has its last words.
        """
        place = self.place
        python = place / "bin" / "python"
        if not python.exists():
            self.parent.mkdir(exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=self.parent))
            try:
                self._build(unfinished)
                os.rename(unfinished, place)  # the scripts in bin/ name the old place: only python is used
            except OSError:
                if not python.exists():  # else somebody else was first
                    raise
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        return python

    def python_or_skip(self) -> Path:
        """Return the Python of the environment; where it cannot be made, skip the test, or fail it in CI."""
        try:
            return self.python()
        except NotAvailable as error:
            message = f"{self.name} cannot be installed: {error}"
            if os.environ.get("CI") == "true":
                pytest.fail(message)
            return pytest.skip(message)

    def _build(self, directory: Path) -> None:
        # Our own pip will do, which saves seconds.
        venv = [self.interpreter, "-m", "venv", "--without-pip", str(directory)]
        pip = [sys.executable, "-m", "pip", "--python", str(directory / "bin" / "python"), "install"]
        options = ["--quiet", "--no-input", "--disable-pip-version-check", "--only-binary", ":all:"]
        wanted = ["--requirement", str(self.requirements)]
        if self.project is not None:
            wanted += ["--editable", str(self.project)]
        for command in (venv, [*pip, *options, *wanted]):
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=INSTALL_S
                )
            except subprocess.TimeoutExpired:
                raise NotAvailable(f"{command[2]}: not done within {INSTALL_S} s") from None
            if done.returncode != 0:
                last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
                raise NotAvailable(f"{command[2]}: {' / '.join(last)}")


def identity(interpreter: str) -> str:
    """Return an interpreter's full version and its place; an empty string if it does not run."""
    command = [interpreter, "-c", "import sys; print(sys.version, sys.base_prefix)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def find_interpreter(*versions: str) -> str:
    """Return a Python of one of these versions, on the PATH or pyenv's; an empty string if there is none."""
    home = pwd.getpwuid(os.geteuid()).pw_dir  # HOME is an empty one: see tests/conftest.py
    pyenv = Path(os.environ.get("PYENV_ROOT", f"{home}/.pyenv"), "versions")
    for version in versions:
        name = f"python{version}"
        places = [shutil.which(name) or name, *map(str, pyenv.glob(f"{version}*/bin/{name}"))]
        for place in places:
            if identity(place).startswith(f"{version}."):  # a shim of pyenv's may lead nowhere
                return place
    return ""
