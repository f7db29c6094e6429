"""The table of shapes, once more, in an environment with the oldest SDKs."""

from __future__ import annotations

import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.environments import Environment

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SUITE_S = 380
AT_LEAST = 400
"""So many of the tests can be made with them."""


def test_the_oldest_sdks(tmp_path: Path) -> None:
    """The table holds with the oldest version of each SDK that its instrumentor claims to take."""
    python = Environment("oldest-sdks", HERE / "oldest.txt").python_or_skip()
    report = tmp_path / "report.xml"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
    suite = str((HERE / "test_shapes.py").relative_to(ROOT))
    done = subprocess.run(
        [*command, suite], cwd=ROOT, capture_output=True, text=True, timeout=SUITE_S, check=False
    )
    assert report.exists(), done.stdout + done.stderr
    cases = list(ElementTree.parse(report).iter("testcase"))
    red = [
        case.get("name")
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    assert not red, done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    made = [case for case in cases if case.find("skipped") is None]
    assert len(made) >= AT_LEAST
