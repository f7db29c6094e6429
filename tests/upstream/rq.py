"""RQ's own tests, with RQ's classes and with ours in their place: what passes there must pass here.

    python -m tests.upstream.rq [--version 3.0.0] [--directory DIR] [pytest's arguments]

It fetches that release of RQ and its tests from PyPI, runs them three times against a Valkey of its own (as
they are; with our classes and nothing configured; with our classes and a destination that does not answer),
and prints every test that does not end as it does without us, nor alone. Exit code 0: there is none.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.harness import ROOT
from waxell_workers.testing.conformance.stage import children_in, environment, free_port, start_valkey

SWAP = Path(__file__).parent / "rq_swap"
NEEDED = ["psutil", "pytest", "pytest-timeout", "sentry-sdk"]
TEST_S = 120
END_S = 15
ALONE = 3


def make_python(directory: Path, version: str) -> Path:
    """Make an environment with this version of RQ, its tests' needs and this package; return its Python."""
    python = directory / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(directory / "venv", with_pip=True)
        packages = [f"rq=={version}", *NEEDED, "-e", str(ROOT)]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def fetch(python: Path, directory: Path, version: str) -> Path:
    """Fetch the release's source; return a directory with its tests and without its package."""
    source = directory / f"rq-{version}"
    if not source.exists():
        command = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "rq"]
        subprocess.run([*command, f"rq=={version}", "-d", directory], check=True)
        with tarfile.open(directory / f"rq-{version}.tar.gz") as archive:
            wanted = [member for member in archive if member.name.startswith(f"rq-{version}/tests/")]
            archive.extractall(directory, wanted, filter="data")
    return source


@dataclass
class Bench:
    """Where the tests run: their source, a Python with that release of RQ, a Valkey."""

    python: Path
    source: Path
    port: int

    def run(self, name: str, more: list[str], **settings: str) -> dict[str, str]:
        """Run the tests, with ours in RQ's place if there are settings; return the outcome of each."""
        report = self.source.parent / f"{name}.xml"
        report.unlink(missing_ok=True)
        command = [str(self.python), "-m", "pytest", "tests", "-q", f"--junitxml={report}"]
        command += [
            "-p",
            "pytest_timeout",
            f"--timeout={TEST_S}",
            *(["-p", "rq_swapped"] if settings else []),
        ]
        path = f"{self.python.parent}:{os.environ['PATH']}"  # for `rqworker`
        own = {"PYTHONPATH": str(SWAP), "RQ_TESTS_REDIS_PORT": str(self.port), "PATH": path}
        own |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        began = time.monotonic()
        with (self.source.parent / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, *more],
                cwd=self.source,
                env=environment(**own | settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while process.poll() is None and not report.exists():
            time.sleep(0.2)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:  # a test of a pool that failed has left workers, for which it waits
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        outcomes = read(report)
        passed = sum(outcome == "passed" for outcome in outcomes.values())
        print(f"{name}: {passed} of {len(outcomes)} passed, in {time.monotonic() - began:.0f} s", flush=True)
        return outcomes


def read(report: Path) -> dict[str, str]:
    """Return what a JUnit report says of each test."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[f"{case.get('classname')}.{case.get('name')}"] = found[0] if found else "passed"
    return outcomes


def main() -> int:
    """Run all three and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--version", default="3.0.0", help="release of RQ")
    parser.add_argument("--directory", type=Path, help="keeps environment, tests and logs for another time")
    arguments, more = parser.parse_known_args()
    directory = (arguments.directory or Path(tempfile.mkdtemp(prefix="rq-tests-"))).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    python = make_python(directory, arguments.version)
    source = fetch(python, directory, arguments.version)
    with children_in(directory) as children:
        port = int(start_valkey(children).rpartition(":")[2].partition("/")[0])
        bench = Bench(python, source, port)
        plain = bench.run("plain", more)
        different = 0
        for name, url in (("nothing configured", ""), ("no answer", f"http://127.0.0.1:{free_port()}")):
            settings = {"WAXELL_API_URL": url, "WAXELL_SPOOL_DIR": str(directory / "spool")}
            for test in differing(plain, bench.run(name, more, **settings)):
                # Many of them count on half a second here and there: alone, with more quiet around it.
                for _ in range(ALONE):
                    alone = ["-k", test.rpartition(".")[2].partition("[")[0]]
                    if not differing({test: plain[test]}, bench.run("alone", alone, **settings)):
                        break
                else:
                    different += 1
                    print(f"{name}: not {plain[test]} as without us: {test}", flush=True)
    print(f"{different} differences; logs in {directory}")
    return 1 if different or not plain else 0


def differing(plain: dict[str, str], ours: dict[str, str]) -> list[str]:
    """Return the tests that passed, or were skipped, and do not so with ours."""
    return [test for test in sorted(plain) if plain[test] != ours.get(test) and ours.get(test) != "passed"]


if __name__ == "__main__":
    sys.exit(main())
