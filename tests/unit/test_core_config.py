"""Settings: what wins, what is refused and how it is said, and who configures the process."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import waxell_workers
from tests.faulty import FaultyServer
from tests.harness import environment
from waxell_workers import _api
from waxell_workers.core import collector as collecting
from waxell_workers.core.config import DEFAULT_API_URL, Settings, is_loopback, origins, resolve
from waxell_workers.core.errors import ConfigError, WaxellWorkersError

KEY = "wax_sk_verysecret"
LOOPBACK = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "_collector", None)
    monkeypatch.setattr(collecting, "_listeners", [])
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


def test_all_who_asked_are_told_of_the_collector_before_it_can_be_had() -> None:
    """Whoever wants to know what is configured is told once, each of them, before anything is recorded."""
    told: list[object] = []
    for _ in range(2):
        collecting.when_configured(lambda collector: told.append((collector, collector.stats().recorded)))
    collector = collecting.configure(Settings(api_url=LOOPBACK))
    collecting.configure(Settings(api_url=LOOPBACK))
    assert told == [(collector, 0)] * 2


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


def test_an_unknown_sdk_in_the_environment_switches_capture_off_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor for a name in `WAXELL_CAPTURE` that nobody knows: tasks are recorded, one error is logged."""
    monkeypatch.setenv("WAXELL_API_URL", LOOPBACK)
    monkeypatch.setenv("WAXELL_SPOOL_DIR", str(tmp_path))
    monkeypatch.setenv("WAXELL_SHIPPER", "external")
    monkeypatch.setenv("WAXELL_CAPTURE", "opnai")
    monkeypatch.setattr(collecting, "_listeners", [_api._listen])
    waxell_workers.record_llm_call(model="m")
    waxell_workers.record_llm_call(model="m")
    assert waxell_workers.stats().recorded == 2
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "capture='opnai'" in caplog.text


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


PROFILES = """
[wax]
profile = active

[first]
api_key = key-of-first

[default]
api_key = key-of-default
api_url = https://default.example/

[active]
api_key = key-of-active
api_url = https://active.example
capture_content = true
otel_endpoint = https://not-ours.example
"""


def home(directory: Path, text: str, **environ: str) -> dict[str, str]:
    """Return the environment of a person whose `~/.waxell/config` has this text."""
    (directory / ".waxell").mkdir()
    (directory / ".waxell" / "config").write_text(text)
    return {"HOME": str(directory), **environ}


def test_a_profile_counts_below_the_environment_and_that_below_an_argument(tmp_path: Path) -> None:
    """Given all three, each setting comes from the strongest that has it, and `origins` says which."""
    env = home(tmp_path, PROFILES, WAXELL_API_URL="https://env.example")
    settings, whence = origins({"agent_name": "mine"}, env)
    assert (settings.api_key, settings.api_url) == ("key-of-active", "https://env.example")
    assert (settings.capture_content, settings.agent_name) == (True, "mine")
    assert whence["api_key"] == whence["capture_content"] == "profile active"
    assert (whence["api_url"], whence["agent_name"]) == ("WAXELL_API_URL", "argument")
    assert whence["flush"] == "default"
    assert whence.keys() == set(Settings.__dataclass_fields__)


@pytest.mark.parametrize(
    ("drop", "wanted", "name"),
    [
        ("", "first", "first"),
        ("", "", "active"),
        ("[wax]\nprofile = active\n", "", "default"),
        ("profile = active\n", "", "default"),
        ("[active]", "", "default"),
    ],
)
def test_the_profile_is_the_named_else_the_active_else_default(
    tmp_path: Path, drop: str, wanted: str, name: str
) -> None:
    """As the platform's own tools choose: `WAX_PROFILE`, `wax config use`, `default`."""
    env = home(tmp_path, PROFILES.replace(drop, "[other]" if drop == "[active]" else ""), WAX_PROFILE=wanted)
    assert resolve({}, env).api_key == f"key-of-{name}"


def test_a_single_profile_of_any_name_is_found(tmp_path: Path) -> None:
    """Without a default, the first profile counts; without a URL of its own it is the platform's."""
    settings = resolve({}, home(tmp_path, "[wax]\nprofile = gone\n[acme]\napi_key = k\n"))
    assert (settings.api_key, settings.api_url) == ("k", DEFAULT_API_URL)


def test_a_profile_that_is_not_there_sends_nothing_to_another_account(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Given a misspelt WAX_PROFILE, no profile is used, and the warning says which there are."""
    settings = resolve({}, home(tmp_path, PROFILES, WAX_PROFILE="prod"))
    assert not settings.configured
    assert "prod" in caplog.text
    assert "first, default, active" in caplog.text


@pytest.mark.parametrize(
    "text", [f"{KEY}\n", f"[a]\napi_key = %({KEY})s", f"[a]\n[a]\napi_key={KEY}", "\udcff\udcfe"]
)
def test_a_file_that_cannot_be_read_is_no_profile_and_is_not_quoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    """Given a damaged file, what the environment says still counts, and no line of the file is shown."""
    env = home(tmp_path, "", WAXELL_API_URL=LOOPBACK)
    (tmp_path / ".waxell" / "config").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert resolve({}, env) == Settings(api_url=LOOPBACK)
    assert KEY not in caplog.text


def test_a_wrong_value_in_a_profile_is_named_with_its_place(tmp_path: Path) -> None:
    """The error says which line of which profile to mend, and never shows a key."""
    with pytest.raises(ConfigError, match="api_url of profile a"):
        resolve({}, home(tmp_path, "[a]\napi_url = ftp://host\n"))
    (tmp_path / ".waxell" / "config").write_text(f"[a]\napi_key = {KEY}ä\n")
    with pytest.raises(ConfigError, match="api_key of profile a") as caught:
        resolve({}, {"HOME": str(tmp_path)})
    assert KEY not in str(caught.value)


def test_the_other_names_of_key_and_url_count_below_ours() -> None:
    """The platform's `WAX_API_KEY` and `WAX_API_URL` are read too."""
    env = {"WAX_API_KEY": "k", "WAX_API_URL": "https://a.example", "WAXELL_API_URL": "https://b.example"}
    settings, whence = origins({}, env)
    assert (settings.api_key, settings.api_url) == ("k", "https://b.example")
    assert (whence["api_key"], whence["api_url"]) == ("WAX_API_KEY", "WAXELL_API_URL")


def test_a_worker_ships_with_the_key_of_its_profile(tmp_path: Path) -> None:
    """Given a profile alone, without a word of code, what a worker records is delivered with the profile's
    key, by a shipper that has it from the worker and from nowhere else."""
    code = (
        "import sys, waxell_workers\n"
        "from waxell_workers.core import tasks\n"
        "from waxell_workers.core.collector import current\n"
        "tasks.worker_booting(); tasks.worker_ready()\n"
        "waxell_workers.record_llm_call(model='m')\n"
        "print(current().settings, bool(waxell_workers.force_flush(30)))\n"
    )
    with FaultyServer(key=KEY, ingest=True) as server:
        (tmp_path / ".waxell").mkdir()
        profile = f"[default]\napi_url = {server.url}\napi_key = {KEY}\n"
        (tmp_path / ".waxell" / "config").write_text(profile)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(HOME=str(tmp_path), WAXELL_SPOOL_DIR=str(tmp_path / "spool")),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stdout.endswith(" True\n"), done.stdout + done.stderr
        assert [call["model"] for call in server.calls] == ["m"]
        assert server.violations == []
    assert server.url in done.stdout
    assert KEY not in done.stdout + done.stderr
    [log] = tmp_path.glob("spool/*/shipper.log")
    assert KEY not in log.read_text()
