"""Settings: what wins, what is refused and how it is said, and who configures the process."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import waxell_workers
from tests.harness import environment
from waxell_workers.core import collector as collecting
from waxell_workers.core.config import DEFAULT_API_URL, Settings, is_loopback, resolve
from waxell_workers.core.errors import ConfigError, WaxellWorkersError

KEY = "wax_sk_verysecret"
LOOPBACK = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "_collector", None)
    monkeypatch.setattr(collecting, "when_configured", lambda collector: None)
    for name in ("API_KEY", "API_URL", "OBSERVE", "SPOOL_DIR", "SHIPPER", "FLUSH"):
        monkeypatch.delenv(f"WAXELL_{name}", raising=False)


def test_an_argument_beats_the_environment_and_that_the_default() -> None:
    """Given both, the argument counts; without either, the default."""
    env = {"WAXELL_FLUSH": "task", "WAXELL_FLUSH_INTERVAL": "7", "WAXELL_AGENT_NAME": "env"}
    settings = resolve({"flush": "periodic", "agent_name": None}, env)
    assert (settings.flush, settings.flush_interval, settings.agent_name) == ("periodic", 7.0, "env")
    assert settings.flush_max_records == 512


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("WAXELL_OBSERVE", "off", "observe", False),
        ("WAXELL_CAPTURE_CONTENT", "YES", "capture_content", True),
        ("WAXELL_EXCLUDE", "a.*, b", "exclude", ("a.*", "b")),
        ("WAXELL_FLUSH_TIMEOUT", "0", "flush_timeout", 0.0),
        ("WAXELL_SPOOL_LIMIT", "64 MiB", "spool_limit", 64 << 20),
        ("WAXELL_SPOOL_LIMIT", "1048576", "spool_limit", 1 << 20),
        ("WAXELL_SHIPPER", "external", "shipper", "external"),
        ("WAXELL_EXPORTER", "waxell", "exporter", "waxell"),
        ("WAXELL_API_URL", "https://host/prefix/", "api_url", "https://host/prefix"),
        ("WAXELL_FLUSH", "", "flush", "periodic"),
    ],
)
def test_the_environment_says_everything_in_text(variable: str, text: str, name: str, value: object) -> None:
    """Each documented variable is read; an empty one counts as not set."""
    assert getattr(resolve({}, {variable: text}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("api_url", "ftp://host", "http"),
        ("api_url", "http://", "host"),
        ("api_url", "http://[::1", "URL"),
        ("api_url", "http://host:99999", "URL"),
        ("api_url", 7, "string"),
        ("flush", "always", "periodic, task"),
        ("flush", ["task"], "periodic, task"),
        ("shipper", "fork", "thread"),
        ("exporter", "carrier-pigeon", "waxell"),
        ("flush_interval", 0, "above 0"),
        ("flush_interval", "soon", "seconds"),
        ("flush_interval", float("nan"), "seconds"),
        ("flush_timeout", -1, "0 to 3600"),
        ("shutdown_timeout", True, "seconds"),
        ("flush_max_records", 1.5, "whole number"),
        ("flush_max_records", 0, "from 1"),
        ("spool_limit", 1000, "1 MiB"),
        ("spool_limit", "lots", "MiB"),
        ("capture_content", "maybe", "true or false"),
        ("observe", 2, "true or false"),
        ("capture", 3, "names"),
        ("redact", "mask", "function"),
        ("api_key_", "x", "no such setting"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(name: str, value: object, allowed: str) -> None:
    """The error is a ConfigError whose text has the setting, the value and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        resolve({name: value}, {})
    text = str(caught.value)
    assert name in text
    assert repr(value) in text
    assert allowed in text
    assert (caught.value.setting, caught.value.value) == (name, value)
    assert isinstance(caught.value, WaxellWorkersError)


def test_a_wrong_variable_is_named_as_the_variable() -> None:
    """Whoever set the environment finds the name that they set."""
    with pytest.raises(ConfigError, match=r"^WAXELL_FLUSH='always': expected one of"):
        resolve({}, {"WAXELL_FLUSH": "always"})


def test_the_key_is_nowhere_to_be_read() -> None:
    """Neither the settings' repr nor an error about the key shows it."""
    assert KEY not in repr(resolve({"api_key": KEY}, {}))
    with pytest.raises(ConfigError) as caught:
        resolve({"api_key": f"{KEY}\n{KEY}"}, {})
    assert KEY not in f"{caught.value} {caught.value!r} {caught.value.value!r}"


@pytest.mark.parametrize("url", ["https://me:hunter2@host/x", "ftp://me:hunter2@host"])
def test_credentials_in_the_address_are_refused_and_not_repeated(url: str) -> None:
    """A password in the URL is refused, and no part of the message."""
    with pytest.raises(ConfigError) as caught:
        resolve({"api_url": url}, {})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "configured"),
    [
        ({}, False),
        ({"api_key": KEY}, True),
        ({"api_url": "https://waxell.example"}, False),
        ({"api_url": "http://localhost:1"}, True),
        ({"api_url": "http://[::1]:1"}, True),
        ({"api_url": "http://127.9.9.9"}, True),
        ({"api_url": "http://127.0.0.1.example"}, False),
        ({"api_key": KEY, "observe": False}, False),
    ],
)
def test_configured_means_a_key_or_a_loopback_address(arguments: dict[str, Any], configured: bool) -> None:
    """A key, or this machine's loopback; nothing if observing is off."""
    assert resolve(arguments, {}).configured is configured


def test_a_key_alone_goes_to_the_platform() -> None:
    """Without an address the key's own platform is meant."""
    assert resolve({"api_key": KEY}, {}).api_url == DEFAULT_API_URL
    assert resolve({}, {}).api_url == ""
    assert not is_loopback(DEFAULT_API_URL)


def test_destinations_differ_by_exporter_url_key_and_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One account's records never stand in another's directory."""
    one = Settings(api_url=LOOPBACK, api_key="a").destination
    assert one == Settings(api_url=LOOPBACK, api_key="a", flush="task").destination
    assert one != Settings(api_url=LOOPBACK, api_key="b").destination
    assert one != Settings(api_url=f"{LOOPBACK}0", api_key="a").destination
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert one != Settings(api_url=LOOPBACK, api_key="a").destination


def test_equal_settings_again_do_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A second init() with equal settings is no matter."""
    waxell_workers.init(api_url=LOOPBACK)
    first = collecting.current()
    waxell_workers.init(api_url=LOOPBACK)
    assert collecting.current() is first
    assert caplog.records == []


def test_other_settings_warn_and_the_first_stay(caplog: pytest.LogCaptureFixture) -> None:
    """A second init() with other settings is ignored, with one warning."""
    waxell_workers.init(api_url=LOOPBACK)
    first = collecting.current()
    waxell_workers.init(api_url=LOOPBACK, flush="task")
    assert collecting.current() is first
    assert first.settings.flush == "periodic"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_environment_gives_way_to_init(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What configured itself from the environment and has written nothing is replaced by init(), silently."""
    monkeypatch.setenv("WAXELL_API_URL", f"{LOOPBACK}1")
    collecting.current().enter_worker()
    waxell_workers.init(api_url=LOOPBACK)
    assert collecting.current().settings.api_url == LOOPBACK
    assert collecting.current().in_worker
    assert caplog.records == []


def test_the_environment_stays_once_it_has_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Records must not be split over two destinations: after the first one, init() comes too late."""
    monkeypatch.setenv("WAXELL_API_URL", LOOPBACK)
    monkeypatch.setenv("WAXELL_SPOOL_DIR", str(tmp_path))
    monkeypatch.setenv("WAXELL_SHIPPER", "external")
    waxell_workers.record_llm_call(model="m")
    waxell_workers.init(api_url=f"{LOOPBACK}1")
    assert collecting.current().settings.api_url == LOOPBACK
    assert len(caplog.records) == 1


def test_an_unusable_environment_switches_off_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A task never fails for a wrong variable: nothing is recorded, one error is logged."""
    monkeypatch.setenv("WAXELL_API_URL", LOOPBACK)
    monkeypatch.setenv("WAXELL_FLUSH", "always")
    waxell_workers.record_llm_call(model="m")
    waxell_workers.record_llm_call(model="m")
    assert waxell_workers.stats().recorded == 0
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "WAXELL_FLUSH" in caplog.text


def test_init_creates_nothing(tmp_path: Path) -> None:
    """Configuring makes no file and no thread; the first record does."""
    threads = threading.active_count()
    waxell_workers.init(api_url=LOOPBACK, spool_dir=str(tmp_path / "spool"))
    assert not (tmp_path / "spool").exists()
    assert threading.active_count() == threads


_SILENT = """
import os, sys, threading, warnings
warnings.simplefilter("error")
import waxell_workers
with waxell_workers.WaxellContext("a") as run:
    run.record_llm_call(model="m")
    run.set_tag("a", 1)
print(waxell_workers.stats())
print(bool(waxell_workers.force_flush(1.0)), bool(waxell_workers.shutdown(1.0)))
assert threading.active_count() == 1
"""


@pytest.mark.parametrize(
    ("settings", "dropped"),
    [
        ({}, "{'unconfigured': 4}"),
        ({"WAXELL_API_URL": "https://waxell.example"}, "{'unconfigured': 4}"),
        ({"WAXELL_OBSERVE": "false", "WAXELL_API_KEY": KEY}, "{}"),
    ],
)
def test_without_a_destination_nothing_is_created_or_said(
    tmp_path: Path, settings: dict[str, str], dropped: str
) -> None:
    """Not configured, or off: no file, no process, no thread, no output; stats() counts the former."""
    home = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _SILENT],
        env=environment(**home, **settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert f"recorded=0, dropped={dropped}, pending=0, spool='', shipper=''" in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_the_import_is_light() -> None:
    """`import waxell_workers` imports no HTTP client, no OpenTelemetry, no SDK, no framework, no database."""
    heavy = "httpx opentelemetry openai anthropic celery rq dramatiq starlette sqlite3 asyncio ssl click rich"
    code = f"import sys, waxell_workers; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[]"
