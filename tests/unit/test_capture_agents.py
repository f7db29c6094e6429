"""The tests of openai-agents, in environments with the newest one and with the oldest that is heard."""

from __future__ import annotations

import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.environments import Environment
from waxell_workers.capture.sdks import SUPPORTED

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "tests" / "agents"
SUITE_S = 360
AT_LEAST = 90


@pytest.mark.parametrize("which", ["newest", "oldest"])
def test_agents_are_heard(which: str, tmp_path: Path) -> None:
    """What a run has of agents holds with the newest openai-agents, and with the oldest that is heard."""
    python = Environment(f"agents-{which}", SUITE / f"{which}.txt").python_or_skip()
    report = tmp_path / "report.xml"
    # 0.2 leaves the connections of requests that fail or are cancelled to the garbage collector.
    command = [python, "-m", "pytest", "-q", "-W", "ignore::ResourceWarning", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--junit-xml={report}", "tests/agents"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SUITE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert len([case for case in cases if case.find("skipped") is None]) >= AT_LEAST


def test_the_oldest_is_the_one_that_the_table_names() -> None:
    """The version that the doctor asks for is the oldest that is tested."""
    (ours,) = SUPPORTED["openai-agents"].instrumentors
    lines = (SUITE / "oldest.txt").read_text().splitlines()
    (tested,) = (line.partition("==")[2] for line in lines if line.startswith("openai-agents=="))
    assert ours.requires == (f"openai-agents >= {tested.removesuffix('.0')}",)
