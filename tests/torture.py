"""How hard the crash and property tests try, and what they found: briefly by `make test`, at length here.

Run as a script, this file is `make torture`: it runs those tests in their long mode and prints how many
faults each of them fired and what it saw. Its arguments go to pytest: `-k kill`, a path, `-x`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LONG = os.environ.get("WAXELL_TORTURE") == "long"
TESTS = ("tests/crash", "tests/property")
LONGEST_S = 7200
_REPORT = "WAXELL_TORTURE_REPORT"


def effort(short: int, long: int) -> int:
    """Return how often to try: `short` in `make test`, `long` in `make torture`."""
    return long if LONG else short


def found(what: str, **counts: int | str) -> None:
    """Print what a test did and saw, and leave it for the table of `make torture`."""
    line = {"what": what, **counts}
    print(line)
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
    """Return what was found as text: a block a test, a line a count."""
    blocks = []
    for line in lines:
        rows = [(name, value) for name, value in line.items() if name != "what"]
        width = max((len(name) for name, _ in rows), default=0)
        shown = [
            f"  {name:<{width}}  {f'{value:,}' if isinstance(value, int) else value:>12}"
            for name, value in rows
        ]
        blocks.append("\n".join([f"\n{line['what']}", *shown]))
    return "\n".join(blocks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
