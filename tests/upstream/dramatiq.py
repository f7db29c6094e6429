"""Dramatiq's own tests with and without our middleware in every broker: `python -m tests.upstream.dramatiq`.

It gets Dramatiq's source, makes an environment, and runs the suite as it is, then with ours, last and first
in the list, unconfigured and recording to a local server, and prints where the outcomes differ. A test whose
outcome differs is run again, alone, before it counts, and with a middleware that does nothing: what the mere
addition of one breaks is not ours. The tests use Redis on 6379 and RabbitMQ on 5672 of this machine, and
**flush that Redis**, so that one with data in it is refused.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from waxell_workers.cli.processes import Children
from waxell_workers.testing.conformance.stage import environment, start_server

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
SOURCE = "https://github.com/Bogdanp/dramatiq"
VERSION = "848b35f2f960457ff54a72f9edb3af0de754f72f"
"""The commit whose code was released as 2.2.1."""
SERVICES = ("redis>=4,<9", "pika>=1,<2", "gevent", "watchdog", "prometheus-client")
TOOLS = ("pytest", "pytest-benchmark", "pytest-timeout")
TEST_S = 120
REPEATS = 3


@dataclass(frozen=True)
class Variant:
    """One way to run the suite."""

    name: str
    middleware: str = "none"
    place: str = "last"
    recording: bool = False

    @property
    def placebo(self) -> Variant:
        """The same place, for a middleware that does nothing."""
        return Variant("placebo", "placebo", self.place)


PLAIN = Variant("as it is")
OURS = (
    Variant("ours, last, not configured", "ours"),
    Variant("ours, first, not configured", "ours", "first"),
    Variant("ours, last, recording", "ours", recording=True),
    Variant("ours, first, recording", "ours", "first", recording=True),
)


@dataclass
class Suite:
    """A checkout of Dramatiq with an environment in which its tests can run."""

    source: Path
    python: Path
    api_url: str

    def run(self, variant: Variant, log: Path, tests: list[str]) -> dict[str, str]:
        """Run tests and return their outcomes by name; the output goes to `log`."""
        self._forget_queues()
        report = log.with_suffix(".xml")
        command = [str(self.python), "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
        command += ["--timeout", str(TEST_S), "--ignore", "tests/benchmarks", "--junitxml", str(report)]
        with tempfile.TemporaryDirectory() as spool, log.open("wb") as output:
            subprocess.run(
                [*command, *tests],
                cwd=self.source,
                env=self._environ(variant, spool),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        return outcomes(report)

    def _forget_queues(self) -> None:
        """Delete the queues whose arguments differ between tests: RabbitMQ keeps those of who came first."""
        code = (
            "import pika\n"
            "channel = pika.BlockingConnection().channel()\n"
            "for name in ('default', 'default.DQ', 'default.XQ'): channel.queue_delete(name)\n"
        )
        if answers(5672):
            subprocess.run([str(self.python), "-c", code], check=True)

    def _environ(self, variant: Variant, spool: str) -> dict[str, str]:
        inside = [HERE / "dramatiq_inside"]
        if not answers(11211):
            inside.append(HERE / "dramatiq_memcached")
        own = {
            "PYTHONPATH": os.pathsep.join(map(str, inside)),
            # Where Dramatiq reloads, it executes `python`.
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "UPSTREAM_MIDDLEWARE": variant.middleware,
            "UPSTREAM_PLACE": variant.place,
        }
        if variant.recording:
            own |= {"WAXELL_API_URL": self.api_url, "WAXELL_SPOOL_DIR": spool}
        return environment(**own)


def answers(port: int) -> bool:
    """True if something listens on a port of 127.0.0.1."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def redis_holds() -> bool:
    """True if the Redis on its usual port has any key."""
    if not answers(6379):
        return False
    with socket.create_connection(("127.0.0.1", 6379), timeout=5) as connection:
        connection.sendall(b"DBSIZE\r\n")
        return not connection.recv(64).startswith(b":0\r")


def outcomes(report: Path) -> dict[str, str]:
    """Read the outcome of each test, as `passed`, `failed` or `skipped`."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        name = f"{(case.get('classname') or '').replace('.', '/')}.py::{case.get('name')}"
        found[name] = "failed" if found.get(name) == "failed" else outcome
    return found


def prepare(directory: Path, source: str, version: str, api_url: str) -> Suite:
    """Get the source and make the environment, unless they are there from the last time."""
    checkout, home = directory / f"dramatiq-{version}", directory / f"venv-{version}"
    if not checkout.exists():
        subprocess.run(["git", "clone", "-q", source, str(checkout)], check=True)
        subprocess.run(["git", "-C", str(checkout), "checkout", "-q", version], check=True)
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *SERVICES, *TOOLS], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", str(checkout)], check=True)
    subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", "waxell-workers"], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", str(ROOT)], check=True)
    return Suite(checkout, python, api_url)


def compare(suite: Suite, logs: Path, tests: list[str]) -> bool:
    """Run every variant, print what differs from the suite as it is; True if nothing of it is ours."""
    plain = suite.run(PLAIN, logs / "plain.log", tests)
    print(summary(PLAIN.name, plain), flush=True)
    clean = True
    for number, variant in enumerate(OURS):
        found = suite.run(variant, logs / f"variant-{number}.log", tests)
        print(summary(variant.name, found), flush=True)
        for name in sorted(plain.keys() | found.keys()):
            if plain.get(name) == found.get(name):
                continue
            whose = whose_difference(suite, variant, name, logs)
            print(f"    {name}: {plain.get(name)} -> {found.get(name)} ({whose})", flush=True)
            clean = clean and whose != "ours"
    return clean


def whose_difference(suite: Suite, variant: Variant, name: str, logs: Path) -> str:
    """Run a test alone, with and without: `ours` if its outcome keeps being another, and only with ours."""
    for _ in range(REPEATS):
        plain, found = (suite.run(each, logs / "again.log", [name]) for each in (PLAIN, variant))
        if plain == found:
            return "not again"
    placebo = suite.run(variant.placebo, logs / "again.log", [name])
    return "a placebo does it too" if placebo == found else "ours"


def summary(name: str, found: dict[str, str]) -> str:
    """Return one line about a run of the suite."""
    counts = {kind: list(found.values()).count(kind) for kind in ("passed", "failed", "skipped")}
    return f"{name:30} " + "  ".join(f"{count} {kind}" for kind, count in counts.items())


def main() -> int:
    """Run it all; 0 if nothing differs that is ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--version", default=VERSION, help="a tag, branch or commit of Dramatiq")
    parser.add_argument("--source", default=SOURCE, help="where to clone it from")
    parser.add_argument("--directory", type=Path, help="kept between calls; a temporary one otherwise")
    parser.add_argument("tests", nargs="*", help="tests of Dramatiq's; all of them otherwise")
    arguments = parser.parse_args()
    if redis_holds():
        print("the Redis on port 6379 holds data, which Dramatiq's tests would flush")
        return 2
    for port, what in ((6379, "Redis"), (5672, "RabbitMQ")):
        if not answers(port):
            print(f"no {what} on port {port}: Dramatiq skips those tests")
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        logs = directory / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with Children(logs) as children:
            server = start_server(children, Path(temporary))
            suite = prepare(directory, arguments.source, arguments.version, server.url)
            clean = compare(suite, logs, arguments.tests)
            print(f"recorded meanwhile: {len(server.runs())} runs")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
