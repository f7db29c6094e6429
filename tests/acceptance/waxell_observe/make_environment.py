"""The virtual environment in which the platform's own SDK runs: made once, kept under `.venv`, used by path.

It is named after all that decides its contents, so that another version or another Python gets another one.
It is built under a name of its own and renamed when it is complete: several test processes may build at once,
the first one wins, and one that is killed leaves nothing that would be taken for an environment.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
PARENT = HERE.parents[2] / ".venv"
INSTALL_S = 300


class NotAvailable(Exception):
    """The environment cannot be made: most likely, no package index answers."""


def python_of_the_sdk(parent: Path = PARENT, requirements: Path = REQUIREMENTS) -> Path:
    """Return the Python of the environment, which is made if there is none.

    Raises:
        NotAvailable: pip could not install what is needed; the message has its last words.
    """
    environment = place_of(parent, requirements)
    python = environment / "bin" / "python"
    if not python.exists():
        parent.mkdir(exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{environment.name}.", dir=parent))
        try:
            _build(unfinished, requirements)
            os.rename(unfinished, environment)  # the scripts in bin/ name the old place: only python is used
        except OSError:
            if not python.exists():  # else somebody else was first
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return python


def place_of(parent: Path, requirements: Path) -> Path:
    """Return where the environment for these requirements and this Python is, or will be."""
    decides = f"{sys.version} {sys.base_prefix}\n".encode() + requirements.read_bytes()
    return parent / f"waxell-observe-{hashlib.sha256(decides).hexdigest()[:12]}"


def _build(directory: Path, requirements: Path) -> None:
    venv = [sys.executable, "-m", "venv", "--without-pip", str(directory)]  # ours will do, and saves seconds
    pip = [sys.executable, "-m", "pip", "--python", str(directory / "bin" / "python"), "install", "--quiet"]
    options = ["--no-input", "--disable-pip-version-check", "--only-binary", ":all:"]
    for command in (venv, [*pip, *options, "--requirement", str(requirements)]):
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=INSTALL_S
            )
        except subprocess.TimeoutExpired:
            raise NotAvailable(f"{command[2]}: not done within {INSTALL_S} s") from None
        if done.returncode != 0:
            last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
            raise NotAvailable(f"{command[2]}: {' / '.join(last)}")
