"""A user's own prices, by a file or a function: what they say counts; what is wrong costs only the price."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.destination import Destination, end_shipper, ended, start_shipper, started
from tests.destination import call as made
from tests.export_cases import call
from tests.faulty import FaultyServer
from tests.harness import await_, environment
from waxell_workers.core.config import Settings, resolve
from waxell_workers.core.errors import ConfigError
from waxell_workers.export import own_prices
from waxell_workers.export.prices import price, pricing
from waxell_workers.export.waxell import preload


@pytest.fixture(autouse=True)
def _no_memory_of_others() -> Iterator[None]:
    own_prices.own_prices.cache_clear()
    yield
    own_prices.own_prices.cache_clear()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module of the user's, importable here; return its function `f` as the setting names it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(code: str) -> str:
        name = f"their_prices_{time.monotonic_ns()}"
        (tmp_path / f"{name}.py").write_text(code)
        return f"{name}:f"

    return write


def file(tmp_path: Path, *entries: Any) -> str:
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(entries))
    return str(path)


def usd(setting: str, **fields: Any) -> float | None:
    return pricing(setting)(call(**fields)).cost_usd


class TestSetting:
    @pytest.mark.parametrize("value", ["prices", "a.b.f", "a:b:c", ":f", "a:", "1a:f", 3, b"x.json", len])
    def test_a_wrong_value_names_the_setting_and_what_is_allowed(self, value: Any) -> None:
        """Before anything runs: later nobody would look."""
        with pytest.raises(
            ConfigError, match=r"prices=.*expected the path of a \.json file, or module:function"
        ):
            resolve({"prices": value}, {})

    def test_a_relative_path_is_that_of_the_configuring_process(self, tmp_path: Path) -> None:
        """The shipper works in `/`."""
        assert resolve({"prices": "p.json"}, {}).prices == f"{os.getcwd()}/p.json"
        assert resolve({"prices": tmp_path / "p.json"}, {}).prices == f"{tmp_path}/p.json"
        assert resolve({}, {"WAXELL_PRICES": "billing.prices:usd"}).prices == "billing.prices:usd"


class TestFile:
    def test_the_first_entry_that_fits_counts(self, tmp_path: Path) -> None:
        """By model and provider, both patterns; a million tokens cost what the entry says."""
        setting = file(
            tmp_path,
            {"model": "our-llama-*", "provider": "ollama", "input": 1, "output": 2},
            {"model": "our-*", "input": 3, "output": 4},
        )
        sizes = {"tokens_in": 1_000_000, "tokens_out": 1_000_000}
        assert usd(setting, model="our-llama-3", provider="ollama", **sizes) == 3.0
        assert usd(setting, model="our-llama-3", provider="vllm", **sizes) == 7.0
        assert usd(setting, model="asked-for", response_model="our-model", **sizes) == 7.0

    def test_each_kind_of_token_has_its_price(self, tmp_path: Path) -> None:
        """Cached ones are part of the input; without a price of their own they cost as it does."""
        entry = {"model": "m", "input": 10, "output": 100}
        sizes = {"tokens_in": 10, "tokens_out": 1, "tokens_cached": 5, "tokens_cache_written": 2}
        whole = file(tmp_path, {**entry, "cached": 1, "cache_written": 20})
        assert usd(whole, model="m", **sizes) == pytest.approx((3 * 10 + 5 * 1 + 2 * 20 + 100) / 1e6)
        (other := tmp_path / "other.json").write_text(json.dumps([entry]))
        assert usd(str(other), model="m", **sizes) == pytest.approx((10 * 10 + 100) / 1e6)

    def test_what_no_entry_fits_is_left_to_the_list(self, tmp_path: Path) -> None:
        """Own prices need not be complete."""
        setting = file(tmp_path, {"model": "mine", "input": 1, "output": 1})
        assert usd(setting) == price(call())

    @pytest.mark.parametrize(
        "fields",
        [{"tokens_in": None}, {"tokens_out": None}, {"tokens_cached": 99_999}, {"model": "no-output"}],
    )
    def test_an_entry_makes_no_price_of_what_is_not_known(
        self, tmp_path: Path, fields: dict[str, Any]
    ) -> None:
        """Unknown tokens, or no price for the output: None, and no list price instead."""
        setting = file(
            tmp_path, {"model": "gpt-4o", "input": 1, "output": 1}, {"model": "no-output", "input": 1}
        )
        assert usd(setting, **fields) is None

    def test_embeddings_need_no_price_for_an_output(self, tmp_path: Path) -> None:
        """Neither a count nor a price of what there is none of."""
        setting = file(tmp_path, {"model": "e", "input": 2})
        assert usd(setting, model="e", operation="embeddings", tokens_in=500_000, tokens_out=None) == 1.0

    def test_a_model_that_costs_nothing_costs_nothing(self, tmp_path: Path) -> None:
        """0 is a price, if somebody says so."""
        assert usd(file(tmp_path, {"model": "*", "input": 0, "output": 0})) == 0.0

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "{}",
            '[{"model": "m"}]',
            '[{"model": "m", "input": 1, "ouput": 1}]',
            '[{"model": "m", "input": -1}]',
            '[{"model": "m", "input": "1"}]',
            "\xff",
            None,
        ],
    )
    def test_a_broken_file_is_said_once_and_costs_the_prices(
        self,
        tmp_path: Path,
        text: str | None,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """No call is priced from a list that the user has replaced."""
        monkeypatch.setattr(own_prices, "LOOK_AGAIN_S", 0.0)
        path = tmp_path / "prices.json"
        if text is not None:
            path.write_bytes(text.encode("latin-1"))
        priced = pricing(str(path))
        with caplog.at_level(logging.WARNING, "waxell_workers"):
            assert [priced(call(number=n)).cost_usd for n in range(3)] == [None] * 3
        assert len(caplog.messages) == 1
        assert str(path) in caplog.text

    def test_a_file_that_changes_is_read_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A shipper lives for long. What is broken meanwhile leaves the prices from before."""
        monkeypatch.setattr(own_prices, "LOOK_AGAIN_S", 0.0)
        sizes = {"model": "m", "tokens_in": 1_000_000, "tokens_out": 0}
        setting = file(tmp_path, {"model": "m", "input": 1, "output": 0})
        assert usd(setting, **sizes) == 1.0
        file(tmp_path, {"model": "m", "input": 22, "output": 0})
        assert usd(setting, **sizes) == 22.0
        (tmp_path / "prices.json").write_text("[")
        assert usd(setting, **sizes) == 22.0
        assert "the prices from before stay" in caplog.text


class TestFunction:
    def test_it_is_asked_with_the_call_and_none_is_left_to_the_list(
        self, module: Callable[[str], str]
    ) -> None:
        """It sees all that the record has."""
        setting = module(
            "from decimal import Decimal\n"
            "def f(call):\n"
            "    return Decimal(call.tokens_in) / 4 if call.model == 'mine' else None\n"
        )
        assert usd(setting, model="mine", tokens_in=3) == 0.75
        assert usd(setting, number=1) == price(call())

    def test_a_call_is_asked_about_once(self, module: Callable[[str], str]) -> None:
        """What is sent again, after an outage, has the price that it had."""
        priced = pricing(module("n = 0\ndef f(call):\n    global n\n    n += 1\n    return n\n"))
        assert [priced(call()).cost_usd for _ in range(3)] == [1.0] * 3
        assert priced(call(number=1)).cost_usd == 2.0

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ("raise KeyError(call.prompt)", "raised KeyError at"),
            ("raise SystemExit", "raised SystemExit at"),
            ("return 'secret text'", "but str"),
            ("return float('nan')", "but float"),
            ("return -1", "but int"),
            ("return True", "but bool"),
            ("return [call.prompt]", "but list"),
        ],
    )
    def test_one_that_fails_is_said_once_and_costs_the_price_of_that_call(
        self, module: Callable[[str], str], body: str, said: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The others keep theirs; what it said or was given is in no log."""
        setting = module(f"def f(call):\n    if call.model == 'good':\n        return 1\n    {body}\n")
        priced = pricing(setting)
        bad = [priced(call(number=n, prompt="secret text")).cost_usd for n in range(3)]
        assert bad == [None] * 3
        assert priced(call(number=9, model="good")).cost_usd == 1.0
        assert len(caplog.messages) == 1
        assert said in caplog.text
        assert setting in caplog.text
        assert "secret" not in caplog.text

    @pytest.mark.parametrize(
        "setting", ["no_such_module_here:f", "json:no_such_function", "json:__name__", "tests.nowhere:f"]
    )
    def test_one_that_cannot_be_imported_is_said_once(
        self, setting: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """And tried once: importing may be slow, and have effects."""
        priced = pricing(setting)
        assert [priced(call(number=n)).cost_usd for n in range(3)] == [None] * 3
        assert len(caplog.messages) == 1
        assert "cannot be imported" in caplog.text

    def test_one_that_hangs_holds_nothing_up(
        self, module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """After a while it is not asked any more; it hangs where nobody waits for it."""
        monkeypatch.setattr(own_prices, "ANSWER_S", 0.2)
        setting = module(
            "import threading\nended = threading.Event()\n"
            "def f(call):\n    return 1 if call.model == 'good' else ended.wait()\n"
        )
        priced = pricing(setting)
        assert priced(call(model="good")).cost_usd == 1.0
        assert priced(call(number=1)).cost_usd is None
        began = time.monotonic()
        assert [priced(call(number=n, model="good")).cost_usd for n in range(2, 50)] == [None] * 48
        assert time.monotonic() - began < 48 * 0.2 / 2  # nobody has waited for it
        assert len(caplog.messages) == 1
        assert "not asked any more" in caplog.text
        hanging = [thread for thread in threading.enumerate() if thread.name == "waxell-workers-prices"]
        assert all(thread.daemon for thread in hanging)
        sys.modules[setting[:-2]].ended.set()

    def test_a_forked_child_asks_it_too(self, module: Callable[[str], str]) -> None:
        """The parent's thread is not there: the child has one of its own."""
        priced = pricing(module("def f(call):\n    return 5\n"))
        assert priced(call()).cost_usd == 5.0
        pid = os.fork()
        if pid == 0:
            os._exit(0 if priced(call(number=1)).cost_usd == 5.0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class TestPage:
    """The examples of docs/prices.md do what is said beside them."""

    PAGE = (Path(__file__).parents[2] / "docs" / "prices.md").read_text()

    def test_the_file(self, tmp_path: Path) -> None:
        """It is read, and its prices count."""
        (path := tmp_path / "prices.json").write_text(self.PAGE.split("```json\n")[1].split("```")[0])
        sizes = {"tokens_in": 1_000_000, "tokens_cached": 500_000, "tokens_out": 1_000_000}
        assert usd(str(path), model="gpt-4o-mini-2024-07-18", **sizes) == pytest.approx(0.06 + 0.03 + 0.48)
        assert usd(str(path), model="our-llama-3", provider="ollama", **sizes) == pytest.approx(0.15)

    def test_the_function(self, module: Callable[[str], str]) -> None:
        """It prices what it says, and leaves the rest."""
        setting = module(self.PAGE.split("```python\n")[1].split("```")[0]).replace(":f", ":usd")
        sizes = {"tokens_in": 1_000_000, "tokens_out": 0}
        assert usd(setting, provider="azure.ai.openai", **sizes) == pytest.approx(2.0)
        assert usd(setting, number=1) == price(call())


THEIRS = "def usd(call):\n    return 7.5 if call.model == 'ours' else None\n"


@pytest.fixture
def destination(server: FaultyServer, tmp_path: Path) -> Destination:
    made_there = Destination(server, tmp_path)
    made_there.append(started("r"), made("r", 1, model="ours", tokens_in=1, tokens_out=1), ended("r"))
    return made_there


@pytest.fixture(params=["rest", "ingest"])
def server(request: pytest.FixtureRequest) -> Iterator[FaultyServer]:
    with FaultyServer(ingest=request.param == "ingest") as server:
        yield server


def costs(server: FaultyServer) -> list[float]:
    return [each.get("cost", each.get("cost_usd")) for run in server.runs.values() for each in run.calls]


def settings_with(destination: Destination, prices: str) -> Settings:
    given = {name: getattr(destination.settings, name) for name in ("api_url", "spool_dir", "flush_interval")}
    return Settings(**given, prices=prices)


class TestWhereItRuns:
    def test_a_shipper_process_imports_it_from_the_workers_places(
        self, server: FaultyServer, destination: Destination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It starts in `/` with a path of its own: what the worker can import, it can import for this."""
        (tmp_path / "app").mkdir()
        (tmp_path / "app" / "their_money.py").write_text(f"import pyclbr\n{THEIRS}")
        (tmp_path / "app" / "pyclbr.py").write_text("raise SystemExit('not the library of Python')")
        monkeypatch.syspath_prepend(str(tmp_path / "app"))
        destination.settings = settings_with(destination, "their_money:usd")
        start_shipper(destination)
        try:
            assert await_(lambda: costs(server), "the call") == [7.5]
        finally:
            end_shipper(destination)

    def test_ship_finds_it_in_the_current_directory(
        self, server: FaultyServer, destination: Destination, tmp_path: Path
    ) -> None:
        """As `python -m` would."""
        (tmp_path / "their_money.py").write_text(THEIRS)
        command = "from waxell_workers.cli.main import main; import sys; sys.path.remove(''); main()"
        shown = subprocess.run(
            [sys.executable, "-c", command, "ship", "--drain"],
            env=environment(
                WAXELL_PRICES="their_money:usd",
                WAXELL_API_URL=server.url,
                WAXELL_SPOOL_DIR=destination.settings.spool_dir,
            ),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert shown.returncode == 0, shown.stderr
        assert costs(server) == [7.5]

    def test_a_shipper_thread_asks_it_in_its_own_process(
        self, server: FaultyServer, destination: Destination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """There, the import path is the program's."""
        (tmp_path / "their_money_too.py").write_text(THEIRS)
        monkeypatch.syspath_prepend(str(tmp_path))
        destination.settings = settings_with(destination, "their_money_too:usd")
        destination.ship()
        assert costs(server) == [7.5]

    def test_it_is_imported_with_all_else_before_it_is_needed(self, module: Callable[[str], str]) -> None:
        """A fork waits for a shipper thread's imports once, when it begins: this one must be among them."""
        setting = module(THEIRS.replace("usd", "f"))
        preload(Settings(prices=setting))
        assert setting[:-2] in sys.modules

    def test_one_that_fails_costs_no_record(
        self, server: FaultyServer, destination: Destination, caplog: pytest.LogCaptureFixture
    ) -> None:
        """All is delivered; the price is not known."""
        destination.settings = settings_with(destination, "nowhere:usd")
        shipper = destination.ship()
        assert (shipper.delivered, shipper.rejected) == (3, 0)
        assert costs(server) in ([0.0], [None])
        assert "nowhere:usd cannot be imported" in caplog.text
