"""How hard the crash, fault and property tests try, and what they found: brief in `make test`, long here.

Run as a script, this file is `make torture`: it runs those tests in their long mode, as a plugin of pytest's,
and prints how many faults each of them fired and what it saw. Its arguments go to pytest: `-k kill`, a path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

LONG = os.environ.get("WAXELL_TORTURE") == "long"
TESTS = ("tests/crash", "tests/faults", "tests/property")
LONGEST_S = 7200
OUTCOME = "outcome"
_REPORT = "WAXELL_TORTURE_REPORT"


def effort(short: int, long: int) -> int:
    """Return how often to try: `short` in `make test`, `long` in `make torture`."""
    return long if LONG else short


def found(what: str, **counts: int | str) -> None:
    """Print what a test did and saw, and leave it for the table of `make torture`.

    Call it before what may fail: the block of a test that finds something is the one to be read.
    """
    line = {"what": what, **counts}
    print(line)
    _note({"test": os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0], **line})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Leave each test's outcome for the table, so that one that told nothing has its block as well."""
    if report.when == "call" or not report.passed:
        _note({"test": report.nodeid, OUTCOME: report.outcome, "why": _reason(report)})


def _reason(report: pytest.TestReport) -> str:
    """Return the first line of what a test has found."""
    told = report.longrepr
    if isinstance(told, tuple):  # skipped: file, line, reason
        return told[2]
    crash = getattr(told, "reprcrash", None)
    text = crash.message if crash is not None else str(told or "")
    return text.strip().partition("\n")[0]


def _note(line: dict[str, int | str]) -> None:
    path = os.environ.get(_REPORT)
    if path:
        with open(path, "a", encoding="utf-8") as report:
            report.write(json.dumps(line) + "\n")


def main(arguments: list[str]) -> int:
    """Run the tests in their long mode, print the table, and return pytest's exit code."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as directory:
        report = Path(directory, "report")
        report.touch()
        environ = os.environ | {"WAXELL_TORTURE": "long", _REPORT: str(report)}
        # A test that asks for more says so itself; the default is for `make test`.
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.torture",
            "-o",
            f"timeout={LONGEST_S}",
            *_paths(arguments),
            *arguments,
        ]
        status = subprocess.run(command, env=environ, cwd=Path(__file__).parents[1], check=False).returncode
        lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    print(table(lines))
    verdict = "every test passed" if status == 0 else "NOT every test passed"
    print(f"\n{verdict}, in {time.monotonic() - began:.0f} s")
    return status


def _paths(arguments: list[str]) -> tuple[str, ...]:
    """Return what to run unless the arguments name it."""
    return () if any(Path(argument.partition("::")[0]).exists() for argument in arguments) else TESTS


def table(lines: list[dict[str, int | str]]) -> str:
    """Return what was found as text: a block a test, a line a count, and what went wrong."""
    tests: dict[int | str, dict[str, int | str]] = {}
    for line in lines:
        rows = tests.setdefault(line["test"], {"what": title(str(line["test"]))})
        if OUTCOME not in line:
            rows.update({name: value for name, value in line.items() if name != "test"})
        elif rows.get(OUTCOME, "passed") == "passed":  # what its end says of a test that failed is no news
            rows[OUTCOME] = line[OUTCOME] if line[OUTCOME] == "passed" else f"{line[OUTCOME]}: {line['why']}"
    return "\n".join(map(_block, tests.values()))


def title(test: str) -> str:
    """Return a test's name as words, with its parameters."""
    name, _, parameters = test.rpartition("::")[2].partition("[")
    words = name.removeprefix("test_").replace("_", " ")
    return f"{words} ({parameters.removesuffix(']')})" if parameters else words


def _block(rows: dict[str, int | str]) -> str:
    counts = [(name, value) for name, value in rows.items() if name not in ("what", OUTCOME)]
    width = max(len(name) for name, _ in [*counts, (OUTCOME, "")])
    shown = [
        f"  {name:<{width}}  {f'{value:,}' if isinstance(value, int) else value:>12}"
        for name, value in [*counts, (OUTCOME, rows.get(OUTCOME, "no end"))]
    ]
    return "\n".join([f"\n{rows['what']}", *shown])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
