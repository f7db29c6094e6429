"""The pytest plugin of the kit: finds drivers, makes a cell of each of their modes, prints the table.

    pytest -p waxell_workers.testing.conformance.plugin --integrations integrations \
        --pyargs waxell_workers.testing.conformance.suite

A cell is a framework in one mode, with a server of its own and workers as they are asked for. It counts what
a scenario expected, what was delivered, and what came twice.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .driver import OUTLIVES, Driver, Mode
from .stage import (
    RABBITMQ_URL,
    RunningWorker,
    Server,
    await_,
    children_in,
    make_worker,
    rabbitmq_answers,
    start_model,
    start_server,
    start_valkey,
)

pytest.register_assert_rewrite("waxell_workers.testing.conformance.suite")

_IN_CI = os.environ.get("CI") == "true"
_CELLS = pytest.StashKey["list[Kind]"]()
_ROW = "conformance"
_rows: list[tuple[str, ...]] = []
_COLUMNS = ("framework", "mode", "scenario", "delivered", "duplicated")


@dataclass(frozen=True, slots=True)
class Kind:
    """A driver, the folder it lies in, and one of its modes."""

    driver: Driver
    folder: Path
    mode: Mode

    @property
    def name(self) -> str:
        """The cell's part of a test's id."""
        return f"{self.driver.framework}-{self.mode.name.replace(' ', '_')}"


@dataclass
class Cell:
    """One framework in one mode, for one scenario."""

    kind: Kind
    server: Server
    directory: Path
    settings: dict[str, str]
    """What each worker finds in its environment."""
    workers: list[RunningWorker] = field(default_factory=list)
    expected: int = 0
    delivered: int = 0
    duplicated: int = 0

    @property
    def driver(self) -> Driver:
        """How to drive the framework."""
        return self.kind.driver

    @property
    def mode(self) -> Mode:
        """The mode of the framework's worker."""
        return self.kind.mode

    def can(self, ability: str) -> bool:
        """True if the mode has an ability."""
        return ability in self.mode.abilities

    def worker(self, *, slots: int | None = None, recycle: bool = False, **settings: str) -> RunningWorker:
        """Make a worker, not started yet."""
        directory = self.directory / f"worker-{len(self.workers)}"
        directory.mkdir()
        made = make_worker(
            self.driver,
            self.mode,
            self.kind.folder,
            directory,
            slots=slots,
            recycle=recycle,
            **self.settings | settings,
        )
        self.workers.append(made)
        return made

    def after_kill(self, worker: RunningWorker) -> None:
        """Do what an operator does once a worker was killed together with whoever ships for it."""
        if not self.can(OUTLIVES):
            worker.drain()

    def await_runs(self, markers: list[str], runs_each: int = 1) -> list[dict[str, Any]]:
        """Wait until each marker's runs have ended at the server, make sure that nothing is lost or there
        twice, and return those runs."""
        wanted = len(markers) * runs_each
        self.expected += wanted

        def ended() -> list[dict[str, Any]]:
            ours = set(markers)
            return [run for run in self.server.ended() if ours & set(run["markers"])]

        try:
            await_(lambda: len(ended()) >= wanted, f"{wanted} ended runs")
        except AssertionError as error:
            raise AssertionError(f"{error}, but {len(ended())}; {self._logs()}") from None
        finally:
            runs = ended()
            calls = Counter(marker for run in runs for marker in run["markers"])
            self.delivered += sum(min(calls[marker], runs_each) for marker in markers)
            self.duplicated += sum(max(0, calls[marker] - runs_each) for marker in markers)
            self.duplicated += max(0, len(runs) - wanted)
        assert calls == dict.fromkeys(markers, runs_each)
        assert len(runs) == wanted
        assert all(len(run["markers"]) == 1 for run in runs), "a run has another's call"
        return runs

    def await_calls(self, markers: list[str]) -> None:
        """Wait until each marker's call is at the server."""
        await_(lambda: set(markers) <= self.server.calls().keys(), "delivery")

    def await_run(self, marker: str) -> dict[str, Any]:
        """Wait for the one run with this marker."""
        return self.await_runs([marker])[0]

    def _logs(self) -> str:
        return "\n".join(worker.text[-2000:] for worker in self.workers)


# -- pytest's hooks ----------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the kit."""
    group = parser.getgroup("conformance", "conformance of waxell-workers adapters")
    group.addoption(
        "--integrations",
        default="integrations",
        help="The folder whose subfolders have a driver.py each.",
    )
    group.addoption(
        "--all-modes", action="store_true", help="Run every mode of every driver, as under CI=true."
    )


def pytest_configure(config: pytest.Config) -> None:
    """Say what our marker means."""
    config.addinivalue_line("markers", "quick: one scenario that says whether an adapter works at all")
    config.addinivalue_line("markers", "timed: measures time; to be run alone on the machine")
    config.addinivalue_line("markers", "needs(*abilities): run the scenario only in modes that have them")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each scenario the modes that can play it."""
    if "cell" not in metafunc.fixturenames:  # other tests may have a parameter called `kind`
        return
    needed = {ability for mark in metafunc.definition.iter_markers("needs") for ability in mark.args}
    kinds = [kind for kind in _kinds(metafunc.config) if needed <= kind.mode.abilities]
    metafunc.parametrize("kind", kinds, ids=[kind.name for kind in kinds])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what a scenario has counted; it comes with the report, from another process under xdist."""
    row = dict(report.user_properties).get(_ROW)
    if report.when == "teardown" and isinstance(row, (list, tuple)):
        _rows.append(tuple(str(cell) for cell in row))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a row for each scenario that was played."""
    if not _rows:
        return
    terminalreporter.section("conformance")
    table = [_COLUMNS, *sorted(_rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())


def _kinds(config: pytest.Config) -> list[Kind]:
    """Return every mode of every driver that is to run here."""
    if _CELLS not in config.stash:
        everything = _IN_CI or config.getoption("--all-modes")
        root = config.rootpath / config.getoption("--integrations")
        config.stash[_CELLS] = [
            Kind(driver, path.parent, mode)
            for path in sorted(root.glob("*/driver.py"))
            for driver in [load_driver(path)]
            for mode in driver.modes
            if everything or mode.default
        ]
    return config.stash[_CELLS]


def load_driver(path: Path) -> Driver:
    """Import a `driver.py` by its path, under a name that shadows no framework, and return its `DRIVER`."""
    spec = importlib.util.spec_from_file_location(f"waxell_driver_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    driver: Driver = module.DRIVER
    return driver


# -- fixtures ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def conformance_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The embedded Valkey, for all cells."""
    with children_in(tmp_path_factory.mktemp("valkey")) as children:
        yield start_valkey(children)


@pytest.fixture(scope="session")
def conformance_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The stand-in model, for all cells."""
    with children_in(tmp_path_factory.mktemp("model")) as children:
        yield start_model(children)


@pytest.fixture(scope="session")
def own_stops_s() -> dict[Kind, float]:
    """How long each kind of worker takes to stop where we are switched off, as far as it was measured."""
    return {}


@pytest.fixture
def cell(
    kind: Kind, request: pytest.FixtureRequest, tmp_path: Path, conformance_model: str
) -> Iterator[Cell]:
    """A framework in one mode, with a server of its own."""
    settings = {"OPENAI_BASE_URL": conformance_model, "WAXELL_FLUSH_INTERVAL": "1"}
    if kind.mode.broker == "rabbitmq":
        settings["BROKER_URL"] = _rabbitmq()
    elif kind.mode.broker:
        settings["BROKER_URL"] = request.getfixturevalue("conformance_valkey")
    with children_in(tmp_path / "server") as children:
        server = start_server(children, tmp_path / "server")
        settings |= {"WAXELL_API_URL": server.url, "SERVER_DB": str(server.db)}
        cell = Cell(kind, server, tmp_path, settings)
        yield cell
        for worker in cell.workers:
            worker.stop()
    scenario = request.node.originalname.removeprefix("test_").replace("_", " ")
    if callspec := getattr(request.node, "callspec", None):
        others = [str(value) for name, value in callspec.params.items() if name != "kind"]
        scenario = ", ".join([scenario, *others])
    delivered = f"{cell.delivered} of {cell.expected}"
    row = (cell.driver.framework, cell.mode.name, scenario, delivered, str(cell.duplicated))
    request.node.user_properties.append((_ROW, row))


def _rabbitmq() -> str:
    if rabbitmq_answers():
        return RABBITMQ_URL
    message = "RabbitMQ does not answer on 127.0.0.1:5672"
    if _IN_CI:
        pytest.fail(message)
    return pytest.skip(message)
