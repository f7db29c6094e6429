"""`make torture`: every test has its block, with its counts and its outcome, also where it failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.harness import ROOT
from tests.torture import found, table, title

TESTS = """
import pytest
from tests.torture import LONG, effort, found

def test_that_tells():
    found("kills", kills=effort(2, 12345), seed="007")

@pytest.mark.parametrize("way", ["a"])
def test_that_tells_nothing(way):
    assert LONG

def test_that_finds_something():
    found("kills that hurt", kills=7)
    raise AssertionError("3 records are lost\\nand more")

@pytest.fixture
def broken():
    raise OSError("no space")

def test_that_cannot_begin(broken):
    pass

def test_that_is_not_run_here():
    pytest.skip("no such system")

@pytest.fixture
def ends_badly():
    yield
    raise OSError("still there")

def test_whose_end_fails(ends_badly):
    found("leavers", leavers=1)
"""


def torture(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `make torture`'s command."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("WAXELL", "PYTEST"))}
    return subprocess.run(
        [sys.executable, "-m", "tests.torture", *arguments],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def blocks(stdout: str) -> dict[str, list[str]]:
    """Return the rows of the table by their title."""
    _, _, text = stdout.partition("short test summary info")
    parts = [part.splitlines() for part in text.split("\n\n") if "\n  " in part]
    return {title: [" ".join(row.split()) for row in rows] for title, *rows in parts}


def test_every_test_has_its_block_whatever_becomes_of_it(tmp_path: Path) -> None:
    """Given tests that pass, fail, tell something or nothing, the table has each, its counts and its outcome;
    the status is pytest's."""
    path = tmp_path / "test_it.py"
    path.write_text(TESTS)
    done = torture(str(path))
    assert blocks(done.stdout) == {
        "kills": ["kills 12,345", "seed 007", "outcome passed"],
        "that tells nothing (a)": ["outcome passed"],
        "kills that hurt": ["kills 7", "outcome failed: AssertionError: 3 records are lost"],
        "that cannot begin": ["outcome failed: OSError: no space"],
        "that is not run here": ["outcome skipped: Skipped: no such system"],
        "leavers": ["leavers 1", "outcome failed: OSError: still there"],
    }, done.stdout + done.stderr
    assert "\nNOT every test passed, in " in done.stdout
    assert done.returncode == 1


def test_a_clean_run_says_so_and_its_arguments_are_pytests(tmp_path: Path) -> None:
    """Given arguments, they choose the tests; where all passed, the last line and the status say so."""
    path = tmp_path / "test_it.py"
    path.write_text(TESTS)
    done = torture(str(path), "-k", "tells")
    assert sorted(blocks(f"short test summary info{done.stdout}")) == ["kills", "that tells nothing (a)"]
    assert "\nevery test passed, in " in done.stdout
    assert done.returncode == 0


def test_without_a_path_it_runs_the_crash_fault_and_property_tests() -> None:
    """Given no path, every test of these folders would run; and nothing else."""
    done = torture("--collect-only", "-q")
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("*/test_*.py")}
    tried = ("tests/crash/", "tests/faults/", "tests/property/")
    assert files == {path for path in there if path.startswith(tried)}


def test_what_is_found_outside_torture_is_printed_only(capsys, monkeypatch) -> None:
    """In `make test` there is no table: the counts are in the output of a test that fails."""
    monkeypatch.delenv("WAXELL_TORTURE_REPORT", raising=False)
    found("kills", kills=3)
    assert capsys.readouterr().out == "{'what': 'kills', 'kills': 3}\n"


def test_a_test_that_never_ended_is_told() -> None:
    """Given counts without an outcome (pytest itself was killed), the block says so."""
    assert table([{"test": "a::test_x", "what": "kills", "kills": 1}]).split("\n")[-1].split() == [
        "outcome",
        "no",
        "end",
    ]


def test_a_title_is_the_tests_name_as_words() -> None:
    assert title("tests/crash/test_a.py::test_no_kill[thread-a_b]") == "no kill (thread-a_b)"
    assert title("tests/crash/test_a.py::test_no_kill") == "no kill"
