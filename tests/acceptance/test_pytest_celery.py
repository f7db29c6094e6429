"""Celery's own test framework and waxell-workers side by side, in an environment that has no Docker.

Given the tests of `integrations/celery/with_pytest_celery`, when run as their README says, then they pass.
"""

from __future__ import annotations

import re
import signal
import subprocess

import pytest

from tests.environments import INSTALL_S, Environment
from tests.harness import APP, ROOT, environment

FOLDER = APP / "with_pytest_celery"
PYTEST_S = 240
STOP_S = 60


@pytest.mark.timeout(INSTALL_S + PYTEST_S + STOP_S)
def test_pytest_celery_drives_a_worker_without_docker(children, tmp_path):
    """Given nodes that are processes, when pytest-celery drives them, then both of its tests pass."""
    python = Environment("pytest-celery", FOLDER / "requirements.txt", ROOT).python_or_skip()
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "theirs")]
    nowhere = {"DOCKER_HOST": f"unix://{tmp_path}/no-docker", "PYTHONDONTWRITEBYTECODE": "1"}
    run = children.start("pytest", [*command, str(FOLDER)], environment(**nowhere))
    try:
        status = run.process.wait(PYTEST_S)
    except subprocess.TimeoutExpired:
        run.process.send_signal(signal.SIGINT)  # so that it ends what it has started
        status = run.process.wait(STOP_S)
    written = run.log.read_text()
    assert status == 0, written[-6000:]
    assert re.search(r"^=+ 2 passed in ", written, re.M), written[-6000:]
