"""SDKs and frameworks at their newest, heard in processes of an environment with all of them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.environments import Environment
from tests.harness import environment

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SUITE_S = 180


@pytest.fixture(scope="session")
def python() -> Path:
    return Environment("frameworks", HERE / "requirements.txt").python_or_skip()


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in the environment, with our source tree on its path and none of ours installed."""
    return subprocess.run(
        [str(python), *arguments],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SUITE_S,
        check=False,
    )


@pytest.mark.parametrize("suite", ["sdks", "litellm", "langchain", "llama_index"])
def test_what_is_heard(suite: str, python: Path) -> None:
    """Every claim of the suite holds, in one process."""
    options = ["-q", "-p", "no:cacheprovider", "--noconftest", "-o", "addopts=", "-W", "ignore"]
    done = run(python, "-m", "pytest", *options, f"{HERE.relative_to(ROOT)}/inside_{suite}.py")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(scope="session")
def alone(python: Path) -> dict[str, Any]:
    return coexisting(python, "alone")


def coexisting(python: Path, order: str) -> dict[str, Any]:
    """Return a user's spans, and the calls that were heard, with us or without."""
    done = run(python, "-W", "ignore", "-m", "tests.capture_frameworks.coexistence", order)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_users_instrumentors_notice_nothing(order: str, python: Path, alone: dict[str, Any]) -> None:
    """Whoever comes first: the user's spans are the same as without us, and each call is heard once."""
    with_us = coexisting(python, order)
    assert with_us["spans"] == alone["spans"]
    assert not alone["calls"]
    assert len(with_us["calls"]) == 26
    assert len(with_us["spans"]) > 26
