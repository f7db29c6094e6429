"""`waxell-workers doctor`: each thing that can be wrong, really wrong, is found, named, and has an advice.

The command runs as a process of its own, as a person would run it; servers are real, faults are real. Where a
fault cannot be made without privileges (an overlay or network file system), the kernel's answer is replaced.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
from importlib.metadata import distributions, version
from pathlib import Path

import packaging.requirements  # noqa: F401  # imported while it can be found: see `packages`
import pytest

from tests.faulty import FaultyServer
from tests.harness import ROOT, START_S, await_, children_in, environment, shippers_of, start_server
from waxell_workers._version import __version__
from waxell_workers.capture.sdks import SDKS, Instrumentor, Sdk
from waxell_workers.cli.doctor import capture, claims, settings, shipping, versions
from waxell_workers.cli.doctor import spool as check_spool
from waxell_workers.cli.doctor.findings import Finding
from waxell_workers.cli.doctor.situation import Situation
from waxell_workers.core import config, inspection, spool
from waxell_workers.core.config import Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

KEY = "wax_sk_0123456789secret"
RUN_S = 90.0
RECORD = """
import os, sys, waxell_workers
for _ in range(int(sys.argv[1])):
    with waxell_workers.WaxellContext("script") as run:
        run.record_llm_call(model="gpt-4o-mini", tokens_in=3, tokens_out=4)
os._exit(0)
"""
FIELDS = ["area", "status", "text", "advice"]


class Report:
    """What the doctor said."""

    def __init__(self, status: int, findings: list[dict[str, str]]) -> None:
        self.status = status
        self.findings = findings

    def of(self, area: str, *statuses: str) -> list[str]:
        """Return what was found in an area, as text and advice."""
        return [
            f"{found['text']} → {found['advice']}"
            for found in self.findings
            if found["area"] == area and (not statuses or found["status"] in statuses)
        ]

    def failures(self) -> dict[str, str]:
        """Return the failures by area."""
        return {
            found["area"]: f"{found['text']} → {found['advice']}"
            for found in self.findings
            if found["status"] == "fail"
        }


@pytest.fixture
def place(tmp_path):
    """A home, a spool, and the environment of a worker there, without any setting of ours but the spool."""

    class Place:
        home = tmp_path / "home"
        spool = tmp_path / "spool"

        def environ(self, **more: str) -> dict[str, str]:
            own = {"HOME": str(self.home), "WAXELL_SPOOL_DIR": str(self.spool), "COLUMNS": "80"}
            proxies = [name for name in os.environ if name.lower().endswith("_proxy")]
            clean = {name: value for name, value in environment().items() if name not in proxies}
            for name in ("XDG_STATE_HOME", "STATE_DIRECTORY"):
                clean.pop(name, None)
            return {**clean, **own, **more}

        def run(self, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "waxell_workers.cli.main", "doctor", *options]
            done = subprocess.run(
                command, env=self.environ(**more), capture_output=True, text=True, timeout=RUN_S, check=False
            )
            assert "Traceback" not in done.stderr, done.stderr
            for secret in (KEY, "pr0xy-passw0rd"):
                assert secret not in done.stdout + done.stderr
            return done

        def report(self, *options: str, **more: str) -> Report:
            done = self.run("--json", *options, **more)
            found = [json.loads(line) for line in done.stdout.splitlines()]
            assert found, done.stderr
            for finding in found:
                assert list(finding) == FIELDS
                assert finding["status"] in ("ok", "info", "warn", "fail")
                assert finding["text"]
                assert finding["advice"] or finding["status"] in ("ok", "info"), finding
            failed = any(finding["status"] == "fail" for finding in found)
            assert done.returncode == int(failed), done.stderr
            return Report(done.returncode, found)

        def record(self, runs: int, **more: str) -> None:
            environ = self.environ(**{"WAXELL_SHIPPER": "external", **more})
            subprocess.run([sys.executable, "-c", RECORD, str(runs)], env=environ, check=True, timeout=RUN_S)

    Place.home.mkdir()
    return Place()


@pytest.fixture
def faulty():
    """A strict server that misbehaves on request."""
    with FaultyServer(ingest=True) as server:
        yield server


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Return every file below a directory with its size and its time."""
    found = sorted(root.rglob("*")) if root.exists() else []
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


# -- all is well -------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [False, True], ids=["ingest", "REST"])
def test_where_all_is_well_a_synthetic_run_arrives_marked_as_such(place, tmp_path, rest):
    """Given a server that works, the doctor ends with 0 and its run is there, whole, with its mark."""
    with children_in(tmp_path / "server") as children:
        server = start_server(children, tmp_path / "server", rest=rest)
        report = place.report(WAXELL_API_URL=server.url)
        runs = server.runs()
    assert report.status == 0
    assert report.failures() == {}
    assert "was delivered from here" in report.of("end to end", "ok")[0]
    assert ("ingest" in report.of("server")[-1]) is True
    assert ("REST" in report.of("server")[-1]) is rest
    assert [(run["agent_name"], run["status"], run["markers"]) for run in runs] == [
        ("waxell-workers.doctor", "success", ["synthetic"])
    ]
    assert runs[0]["metadata"]["synthetic"] is True


def test_a_running_shipper_is_asked_and_stays(place, faulty, tmp_path):
    """Given a shipper at work, it delivers the doctor's run, keeps its lock, and goes on."""
    environ = place.environ(WAXELL_API_URL=faulty.url, WAXELL_FLUSH_INTERVAL="1")
    with children_in(tmp_path / "shipper") as children:
        shipper = children.start("ship", [sys.executable, "-m", "waxell_workers.cli.main", "ship"], environ)
        destination = await_(lambda: list(place.spool.glob("*/ship.sock")), "socket", START_S)[0].parent
        report = place.report(WAXELL_API_URL=faulty.url)
        assert inspection.holders(f"{destination}/ship.lock")[0].pid == shipper.process.pid
        place.record(1, WAXELL_API_URL=faulty.url)
        assert faulty.wait_until(lambda: len(faulty.runs) == 2, 60)
        assert shipper.alive
    assert report.failures() == {}
    assert report.of("shipper", "ok") == [f"alive, process {shipper.process.pid} → "]
    assert "was delivered by the running shipper" in report.of("end to end", "ok")[0]
    assert faulty.violations == []


def test_what_waits_is_delivered_before_the_synthetic_run(place, faulty):
    """Given a backlog and no shipper, the doctor's run does not overtake it."""
    place.record(2, WAXELL_API_URL=faulty.url)
    report = place.report(WAXELL_API_URL=faulty.url)
    assert "6 records wait" in report.of("backlog", "ok")[0]
    assert [run.start["agent_name"] for run in faulty.runs.values()] == [
        "script",
        "script",
        "waxell-workers.doctor",
    ]
    assert report.failures() == {}


def test_without_sending_nothing_is_touched(place, faulty):
    """`--no-send` writes no record, delivers none, and leaves every file as it was."""
    place.report("--no-send", WAXELL_API_URL=faulty.url)
    assert not place.spool.exists()
    place.record(2, WAXELL_API_URL=faulty.url)
    before = tree(place.spool)
    assert before
    report = place.report("--no-send", WAXELL_API_URL=faulty.url)
    assert tree(place.spool) == before
    assert "as you asked" in report.of("end to end", "info")[0]
    assert faulty.runs == {}


# -- server and key ----------------------------------------------------------------------------


def test_a_wrong_key_is_named_and_leaves_no_record_behind(place, tmp_path):
    """Given the local server with a key: another key fails, none fails, and the right one works."""
    with children_in(tmp_path / "server") as children:
        command = [sys.executable, "-m", "waxell_workers.server", "--port", "0", "--db"]
        child = children.start(
            "server", [*command, str(tmp_path / "db")], environment(WAXELL_SERVER_API_KEY="the-right-key")
        )
        url = child.wait_for_line("http://", START_S)
        wrong = place.report(WAXELL_API_URL=url, WAXELL_API_KEY=KEY)
        assert "refuses this key (401) → set WAXELL_API_KEY" in wrong.failures()["server"]
        assert wrong.of("end to end") == ["no synthetic run was sent: server failed → "]
        assert not place.spool.exists()
        none = place.report(WAXELL_API_URL=url)
        assert "refuses requests without a key (401)" in none.failures()["server"]
        right = place.report(WAXELL_API_URL=url, WAXELL_API_KEY="the-right-key")
        assert right.failures() == {}


@pytest.mark.parametrize(
    ("mode", "options", "expected"),
    [
        ("403", {}, "refuses requests without a key (403) → set WAXELL_API_KEY"),
        ("402", {}, "not paid for"),
        ("404", {}, "not a Waxell server"),
        ("503", {}, "in trouble (503)"),
        ("redirect", {}, "redirect, 307"),
        ("invalid_json", {}, "no JSON → a login page"),
        ("hang", {}, "did not answer within 1 s"),
        ("trickle", {"where": "headers", "interval": 0.5}, "did not answer within 1 s"),
        ("reset", {"where": "request"}, "broke off"),
    ],
)
def test_a_server_that_misbehaves_is_told_by_what_it_does(place, faulty, mode, options, expected):
    """Given each fault of a server, the report names it and says what to do; no record is written."""
    faulty.mode(mode, **options)
    report = place.report("--timeout", "1" if "1 s" in expected else "20", WAXELL_API_URL=faulty.url)
    assert faulty.fired[mode] == 1
    assert expected in report.failures()["server"]
    assert "no synthetic run was sent" in report.of("end to end")[0]
    assert not place.spool.exists()


def test_a_closed_port_is_named(place, faulty):
    """Given a port at which nobody listens, the report says so, with the address."""
    faulty.mode("refuse")
    report = place.report(WAXELL_API_URL=faulty.url)
    assert f"nobody takes a connection at {faulty.url.removeprefix('http://')}" in report.failures()["server"]


def test_a_listener_that_takes_no_more_connections_ends_in_time(place):
    """Given a full backlog, where a connection neither comes nor fails, the check ends by its timeout."""
    with socket.socket() as listener, socket.socket() as filler:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        filler.connect(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        report = place.report("--timeout", "1", WAXELL_API_URL=url)
    assert "within 1 s" in report.failures()["server"]


def test_a_host_that_nobody_knows_is_named(place):
    """Given a name that does not exist (RFC 2606), the report blames the name, not the key."""
    report = place.report("--timeout", "3", WAXELL_API_URL="https://waxell.invalid", WAXELL_API_KEY=KEY)
    assert re.search(r"waxell\.invalid (is not known|was not resolved)", report.failures()["server"])


def test_https_where_http_is_spoken_is_a_tls_failure(place, faulty):
    """Given https:// for a server without TLS, the report says certificate or TLS, and which way to look."""
    report = place.report(WAXELL_API_URL=faulty.url.replace("http:", "https:"))
    assert "does not speak TLS" in report.failures()["server"]
    assert "SSL" in report.failures()["server"]


def test_a_proxy_that_is_not_there_is_blamed(place, faulty):
    """Given a proxy at a closed port, not the server is blamed; the proxy's password is masked."""
    faulty.mode("refuse")
    proxy = faulty.url.replace("http://", "http://ann:pr0xy-passw0rd@")
    report = place.report(
        WAXELL_API_URL="http://server.example", WAXELL_API_KEY=KEY, HTTP_PROXY=proxy, NO_PROXY=""
    )
    assert "the proxy cannot be reached" in report.failures()["server"]
    assert any("HTTP_PROXY=http://…@127.0.0.1" in text for text in report.of("settings"))


def test_a_record_that_does_not_arrive_is_told_with_the_reason(place, faulty):
    """Given a server that says who it is and then fails, the synthetic run is pending, and it says why."""
    faulty.mode("503", endpoint="ingest")
    report = place.report("--timeout", "5", WAXELL_API_URL=faulty.url)
    assert faulty.fired["503"] > 0
    assert "ingest: 503" in report.failures()["end to end"]
    assert "everything stays in the journal" in report.failures()["end to end"]
    faulty.mode("healthy")
    again = place.report(WAXELL_API_URL=faulty.url)
    assert again.failures() == {}
    assert len(faulty.runs) == 2


def test_a_shipper_that_complains_is_quoted(place, faulty):
    """Given a shipper whose server fails, the report names its process and its last complaint."""
    faulty.mode("503", endpoint="ingest")
    place.record(1, WAXELL_API_URL=faulty.url, WAXELL_SHIPPER="process")

    def complained() -> bool:
        return any("WARNING" in log.read_text() for log in place.spool.glob("*/shipper.log"))

    try:
        await_(complained, "complaint")
        (shipper,) = shippers_of(place.spool)
        report = place.report("--timeout", "2", WAXELL_API_URL=faulty.url)
        faulty.mode("healthy")
        assert faulty.wait_until(lambda: len(faulty.runs) == 2, 60)  # the script's and the doctor's
    finally:
        for process in shippers_of(place.spool):
            process.terminate()
    assert report.of("shipper", "ok") == [f"alive, process {shipper.pid} → "]
    assert any("ingest: 503" in text for text in report.of("shipper", "warn"))
    assert "ingest: 503" in report.failures()["end to end"]


def test_a_complaint_that_is_over_is_not_repeated(tmp_path):
    """Given a log in which the shipper says that it delivers again, nothing is complained of."""
    log = tmp_path / "shipper.log"
    complaint = "2026-01-01 00:00:00,000 7 WARNING http://x: config: 503; everything is kept"
    log.write_text(f"{complaint}\n")
    assert shipping.last_complaint(str(log)) == complaint
    log.write_text(f"{complaint}\n2026-01-01 00:00:09,000 7 INFO http://x: delivering again\n")
    assert shipping.last_complaint(str(log)) == ""
    assert shipping.last_complaint(str(tmp_path / "none")) == ""


# -- settings ----------------------------------------------------------------------------------


def test_not_configured_says_what_to_set(place):
    """Given no setting at all, it fails and names the two variables."""
    report = place.report()
    assert "WAXELL_API_KEY" in report.failures()["settings"]
    assert "WAXELL_API_URL" in report.failures()["settings"]
    assert not place.spool.exists()


def test_a_remote_server_needs_a_key(place):
    """Given a URL that is not this machine's and no key, nothing is asked of that server, and it fails."""
    report = place.report(WAXELL_API_URL="https://api.example.com")
    assert "no key for https://api.example.com" in report.failures()["settings"]
    assert report.of("server") == []


def test_what_is_switched_off_is_a_warning(place, faulty):
    """`WAXELL_OBSERVE=false` is somebody's decision: said, and status 0."""
    report = place.report(WAXELL_API_URL=faulty.url, WAXELL_OBSERVE="false")
    assert report.status == 0
    assert "switched off" in report.of("settings", "warn")[0]
    assert faulty.requests == []


def test_every_setting_is_told_with_its_origin(place, faulty):
    """Environment, argument, the platform's profile and default are told apart; the key is only `set`."""
    (place.home / ".waxell").mkdir()
    (place.home / ".waxell" / "config").write_text(f"[default]\napi_key = {KEY}\n")
    report = place.report("--no-send", "--url", faulty.url, WAXELL_FLUSH="task")
    told = report.of("settings", "info")
    assert "api_key = set (profile default) → " in told
    assert f"api_url = {faulty.url} (argument) → " in told
    assert "flush = task (WAXELL_FLUSH) → " in told
    assert "flush_interval = 5.0 (default) → " in told
    assert [line.split(" = ")[0] for line in told] == list(Settings.__dataclass_fields__)


def test_a_wrong_value_is_a_finding_and_the_rest_goes_on(place):
    """Given a value that cannot be used, it fails with the setting's name, and other areas are told."""
    report = place.report(WAXELL_FLUSH_INTERVAL="soon")
    assert "WAXELL_FLUSH_INTERVAL='soon'" in report.failures()["settings"]
    assert report.of("versions")
    assert report.of("capture")


def test_a_misspelt_variable_is_noticed(place):
    """`WAXELL_API_KYE` configures nothing; the report asks whether another was meant, and shows no value."""
    report = place.report(WAXELL_API_KYE=KEY)
    assert "WAXELL_API_KYE is set, and is no setting → did you mean WAXELL_API_KEY?" in report.of("settings")


def test_a_key_in_plain_text_is_a_warning(place):
    """http:// to another machine: said before anything is sent there."""
    found = settings.check(
        Situation(*config.origins({"api_key": KEY, "api_url": "http://server.example"}, {"HOME": "/nowhere"}))
    )
    first = next(found)
    assert (first.status, "plain text" in first.text) == ("warn", True)


@pytest.mark.parametrize(
    ("proxy", "shown"),
    [
        ("http://proxy:3128", "http://proxy:3128"),
        ("http://ann:p@ss:w@proxy:3128", "http://…@proxy:3128"),
        ("ann:secret@proxy:3128", "…@proxy:3128"),
        ("socks5h://ann@proxy", "socks5h://…@proxy"),
    ],
)
def test_credentials_of_a_proxy_are_masked(proxy, shown):
    """Whatever stands before the last @ is nobody's business."""
    assert settings.without_credentials(proxy) == shown


def test_a_query_in_the_url_is_not_shown():
    """Some put tokens there."""
    assert settings.shown_url("https://x.example/path?token=secret") == "https://x.example/path?…"


def test_whatever_quotes_the_key_is_cut():
    """Given a finding that holds the key, it is shown without it."""
    situation = Situation(Settings(api_key=KEY), {})
    found = situation.without_key(Finding("a", "fail", f"said {KEY}", f"not {KEY}"))
    assert (found.text, found.advice) == ("said …", "not …")


# -- spool and backlog -------------------------------------------------------------------------


def test_a_file_in_the_spools_place_fails(place, faulty):
    """Given a file where the spool should be, records would be dropped: it fails, and nothing is sent."""
    place.spool.write_text("")
    report = place.report(WAXELL_API_URL=faulty.url)
    assert "no directory can hold the journal" in report.failures()["spool"]
    assert f"{place.spool} is not used: not a directory" in report.of("spool", "warn")[0]
    assert report.of("end to end") == ["no synthetic run was sent: spool failed → "]


def test_the_doctor_and_the_journal_agree_on_the_place(place, faulty):
    """Given a home that is a file, the next candidate is told, and that is where the record goes."""
    shutil.rmtree(place.home)
    place.home.write_text("")
    with tempfile.TemporaryDirectory() as temporary:
        environ = {"WAXELL_SPOOL_DIR": "", "TMPDIR": temporary, "WAXELL_API_URL": faulty.url}
        report = place.report(**environ)
        assert list(Path(temporary).glob("waxell-workers-*/*/000001.ndjson"))
    assert "is not a directory" in report.of("spool", "warn")[0]
    assert report.of("spool", "ok")[0].startswith(f"{temporary}/waxell-workers-{os.geteuid()} ")
    assert report.failures() == {}


def test_a_full_spool_fails(place, faulty):
    """Given a spool at its limit, records are dropped at this moment: it fails, and says what to do."""
    place.record(1, WAXELL_API_URL=faulty.url)
    (segment,) = place.spool.glob("*/000001.ndjson")
    with segment.open("ab") as file:
        file.write(b"\n" + b" " * (1 << 20) + b"\n")
    report = place.report(WAXELL_API_URL=faulty.url, WAXELL_SPOOL_LIMIT="1MiB")
    assert "full, records are dropped" in report.failures()["spool"]


def test_a_destination_that_has_all_that_it_may_fails(place, faulty):
    """Given room in the spool that is kept for other destinations, this one is full all the same."""
    place.record(1, WAXELL_API_URL=faulty.url)
    (segment,) = place.spool.glob("*/000001.ndjson")
    with segment.open("ab") as file:
        file.write(b"\n" + b" " * (950 << 10) + b"\n")
    report = place.report(WAXELL_API_URL=faulty.url, WAXELL_SPOOL_LIMIT="1MiB")
    assert "full, records are dropped" in report.failures()["spool"]
    nearly = place.report(WAXELL_API_URL=faulty.url, WAXELL_SPOOL_LIMIT=str((1 << 20) * 11 // 10))
    assert "used of 1.1 MiB" in nearly.of("spool", "warn")[0]


class FileSystem:
    """What `statvfs` says of a file system."""

    f_frsize = 4096

    def __init__(self, *, free: int, inodes: int, most_inodes: int = 1 << 20) -> None:
        self.f_bavail, self.f_favail, self.f_files = free // self.f_frsize, inodes, most_inodes


@pytest.mark.parametrize(
    ("told", "status", "text"),
    [
        (FileSystem(free=100 << 20, inodes=1000), "ok", "100.0 MiB and 1,000 inodes free"),
        (FileSystem(free=(100 << 20) - 4096, inodes=1000), "warn", "100.0 MiB and 1,000 inodes free"),
        (FileSystem(free=5 << 30, inodes=999), "warn", "5.0 GiB and 999 inodes free"),
        (FileSystem(free=1 << 20, inodes=0, most_inodes=0), "warn", "1.0 MiB and inodes without limit free"),
        (FileSystem(free=5 << 30, inodes=0, most_inodes=0), "ok", "5.0 GiB and inodes without limit free"),
    ],
    ids=["enough", "little space", "few inodes", "little space, no inodes", "no inodes"],
)
def test_little_space_and_few_inodes_are_warnings(tmp_path, monkeypatch, told, status, text):
    """Given a disk that is nearly full, the report says how much is free, and what will happen."""
    asked = []
    monkeypatch.setattr(os, "statvfs", lambda path: asked.append(path) or told)
    configured = Settings(api_url="http://127.0.0.1:1", spool_dir=str(tmp_path / "not" / "yet" / "made"))
    found = [finding for finding in check_spool.check(Situation(configured, {})) if "free" in finding.text]
    assert set(asked) == {str(tmp_path)}, "the nearest directory that exists"
    (space,) = found
    warned = (f"{text}: records are dropped when it is full", "free some space")
    assert (space.status, (space.text, space.advice)) == (status, warned if status == "warn" else (text, ""))


def test_the_space_of_the_spool_is_told(place, faulty):
    """Given a spool on a disk of which something is free, the report has a line with the figures."""
    report = place.report("--no-send", WAXELL_API_URL=faulty.url)
    (space,) = [text for text in report.of("spool") if " free" in text]
    assert re.match(r"[\d,.]+ (B|[KMGT]iB) and ([\d,]+ inodes|inodes without limit) free", space), space


@pytest.mark.skipif(
    spool.file_system("/dev/shm") != "tmpfs", reason="no memory is mounted at /dev/shm on this system"
)
def test_memory_is_a_warning(place, faulty):
    """Given a spool in /dev/shm, it works, and the report says what is at stake."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        report = place.report("--no-send", WAXELL_API_URL=faulty.url, WAXELL_SPOOL_DIR=memory)
    assert report.status == 0
    assert "it is memory (tmpfs)" in report.of("spool", "warn")[0]


@pytest.mark.parametrize(
    ("kind", "status", "expected"),
    [
        ("overlay", "warn", "inside the container"),
        ("nfs4", "fail", "no directory can hold the journal"),
        ("ext4", "ok", "ext4"),
    ],
)
def test_the_file_system_is_judged(tmp_path, monkeypatch, kind, status, expected):
    """Given a file system that dies with the container, or a network's, the report warns or fails."""
    monkeypatch.setattr(spool, "file_system", lambda path: kind)
    configured = Settings(api_url="http://127.0.0.1:1", spool_dir=str(tmp_path))
    found = list(check_spool.check(Situation(configured, {})))
    assert [finding for finding in found if finding.status == status and expected in finding.text], found


def test_a_directory_that_others_can_read_is_a_warning(place, faulty):
    """Given a destination's directory with mode 755, the report says chmod."""
    place.record(1, WAXELL_API_URL=faulty.url)
    (segment,) = place.spool.glob("*/000001.ndjson")
    segment.parent.chmod(0o755)
    report = place.report("--no-send", WAXELL_API_URL=faulty.url)
    assert any("mode 755" in text and "chmod 700" in text for text in report.of("spool", "warn"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_spool_of_another_user_is_told(place, faulty):
    """Given a destination that belongs to the workers' user, whoever else runs this is sent to that user."""
    place.record(1, WAXELL_API_URL=faulty.url)
    (segment,) = place.spool.glob("*/000001.ndjson")
    os.chown(segment.parent, 12345, 12345)
    report = place.report(WAXELL_API_URL=faulty.url)
    assert (
        "belongs to another user (uid 12345) → run this as the workers' user" in report.of("spool", "warn")[0]
    )
    assert "no directory can hold the journal" in report.failures()["spool"]


def test_every_area_is_explained_in_the_docs(place):
    """docs/doctor.md has rows for each area that the report can have."""
    page = (ROOT / "docs" / "doctor.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "waxell_workers/cli/doctor").glob("*.py"))
    areas = set(re.findall(r'^(?:\w*AREA|BACKLOG|SHIPPER) = "([^"]+)"$', sources, re.MULTILINE))
    assert len(areas) == 10
    assert {area for area in areas if f"| {area} |" not in page} == set()


def test_another_destinations_backlog_is_named_by_its_hash(place, faulty):
    """Given records for a key that was changed since, the report names their directory, and not the key."""
    place.record(2, WAXELL_API_URL=faulty.url, WAXELL_API_KEY=KEY)
    (old,) = place.spool.iterdir()
    report = place.report("--no-send", WAXELL_API_URL=faulty.url, WAXELL_API_KEY="wax_sk_new")
    (text,) = report.of("backlog", "warn")
    assert "6 records wait" in text
    assert old.name in text


def test_a_late_backlog_without_a_shipper_is_a_warning(place, faulty):
    """Given records that have waited for long, the report says so, and how to deliver them."""
    place.record(1, WAXELL_API_URL=faulty.url)
    (segment,) = place.spool.glob("*/000001.ndjson")
    segment.write_bytes(re.sub(rb'"at":\d+', b'"at":1000000000', segment.read_bytes()))
    report = place.report("--no-send", WAXELL_API_URL=faulty.url)
    assert any("3 records wait" in text and "ship --drain" in text for text in report.of("backlog", "warn"))
    assert any("none runs, and records wait" in text for text in report.of("shipper", "warn"))


def test_a_damaged_ledger_fails_and_heals_by_the_next_shipper(place, faulty):
    """Given a shipper.db that is none, it fails; the synthetic run is delivered, and then it is well."""
    place.record(1, WAXELL_API_URL=faulty.url)
    (segment,) = place.spool.glob("*/000001.ndjson")
    (segment.parent / "shipper.db").write_bytes(b"this is no database" * 1000)
    report = place.report(WAXELL_API_URL=faulty.url)
    assert "shipper.db is damaged" in report.failures()["backlog"]
    assert "was delivered" in report.of("end to end", "ok")[0]
    assert place.report(WAXELL_API_URL=faulty.url).failures() == {}


def test_what_the_server_refused_is_told(place, faulty):
    """Given a record in quarantine, the report says where to read the reason."""
    faulty.mode("reject", marker="gpt-4o-mini", endpoint="ingest")
    place.record(1, WAXELL_API_URL=faulty.url)
    place.report(WAXELL_API_URL=faulty.url)
    assert faulty.fired["reject"]
    report = place.report(WAXELL_API_URL=faulty.url)
    assert any("refused 1 records for good" in text for text in report.of("backlog", "warn"))


def test_torn_lines_are_told(place, faulty):
    """Given a line that a dying writer left, the report points to `spool verify`."""
    place.record(1, WAXELL_API_URL=faulty.url)
    (segment,) = place.spool.glob("*/000001.ndjson")
    with segment.open("ab") as file:
        file.write(b'\n{"kind":"llm_call","id":"to\n')
    report = place.report("--no-send", WAXELL_API_URL=faulty.url)
    assert any("1 torn or damaged" in text and "spool verify" in text for text in report.of("backlog"))


# -- packages ----------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Have nothing installed but these, by their metadata alone: there is nothing to import."""

    def install(versions: dict[str, str], **claims: list[str]) -> None:
        site = tmp_path / "site-packages"
        for name, number in versions.items():
            information = site / f"{name.replace('-', '_')}-{number}.dist-info"
            information.mkdir(parents=True)
            lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {number}"]
            lines += [f"Requires-Dist: {claim}" for claim in claims.get(name.replace("-", "_"), [])]
            (information / "METADATA").write_text("\n".join(lines) + "\n")
        monkeypatch.setattr(sys, "path", [str(site)])

    return install


def examined(chosen: tuple[str, ...] | None = None) -> list[Finding]:
    return list(capture.check_sdks(Situation(Settings(capture=chosen), {})))


def suits(sdk: Sdk) -> str:
    """Return a version that each instrumentor of an SDK takes, as far as our own table says."""
    bounds = [
        bound for one in sdk.instrumentors for bound in re.findall(r">=? ?([0-9.]+)", str(one.requires))
    ]
    return max(bounds, default="7.1", key=versions._numbers)


HEARD = [(sdk, one) for sdk in SDKS for one in sdk.instrumentors]
"""Each SDK with each instrumentor that can hear it."""
by_name = [f"{sdk.name}-{one.distribution}" for sdk, one in HEARD]


def test_an_sdk_with_its_instrumentor_is_heard(place):
    """Given openai and its instrumentor, as they are installed here, the report names both versions."""
    heard = place.report("--no-send").of("capture", "ok")
    instrumentor = "opentelemetry-instrumentation-genai-openai"
    assert f"openai {version('openai')}: heard, by {instrumentor} {version(instrumentor)} → " in heard


@pytest.mark.parametrize(("sdk", "instrumentor"), HEARD, ids=by_name)
def test_every_sdk_is_heard_by_each_of_its_instrumentors(packages, sdk, instrumentor):
    """Given any SDK of the table and any instrumentor of it, the report says `heard`, with both versions."""
    number = suits(sdk)
    packages(
        {sdk.distributions[0]: number}
        | {one.distribution: "8.2" for one in (instrumentor, *sdk.beside) if one.distribution}
    )
    by = f"{instrumentor.distribution} 8.2" if instrumentor.distribution else "an instrumentor of ours"
    for chosen in (None, (sdk.name,)):
        (found,) = (finding for finding in examined(chosen) if finding.text.startswith(sdk.distributions[0]))
        assert found.status == "ok"
        assert found.text.startswith(f"{sdk.distributions[0]} {number}: heard, by {by}")


@pytest.mark.parametrize("sdk", SDKS, ids=lambda sdk: sdk.name)
def test_an_sdk_without_its_instrumentor_comes_with_the_command_that_installs_it(packages, sdk):
    """Given an SDK alone, the report says what is missing and how to get it; of a framework, whose calls may
    be heard beneath it, and of what many use for something else, for information."""
    packages({sdk.distributions[0]: "7.1"})
    (found,) = examined()
    if sdk.instrumentor() is not None:
        assert found.status == "ok"  # ours, and always there
        return
    assert found.status == ("info" if sdk.is_framework or sdk.is_common else "warn")
    assert f"{sdk.instrumentors[0].distribution} is missing" in found.text
    assert found.advice == sdk.install_command


@pytest.mark.parametrize("sdk", [sdk for sdk in SDKS if sdk.extra], ids=lambda sdk: sdk.name)
def test_the_command_brings_what_it_promises(sdk):
    """The extra that is named exists, and brings the preferred instrumentor."""
    names = ("openai", "anthropic")
    assert sdk.name not in names or sdk.install_command == f'pip install "waxell-workers[{sdk.name}]"'
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brought = {re.match(r"[A-Za-z0-9._-]+", requirement)[0] for requirement in extras[sdk.extra]}
    preferred = sdk.instrumentors[0]
    assert preferred.entry_point or preferred.distribution in brought


CLAIM = ["openai<4,>=1.26.0; extra == 'instruments'", "tox; extra == 'test'"]
GENAI = "opentelemetry-instrumentation-genai-openai"


def test_a_version_that_the_instrumentor_does_not_take_is_a_warning(packages):
    """Given an SDK older than what its instrumentor claims, the report has the claim and the command."""
    packages({"openai": "0.28.1", GENAI: "1.3b0"}, opentelemetry_instrumentation_genai_openai=CLAIM)
    (found,) = examined()
    assert found.status == "warn"
    assert found.text.startswith("openai 0.28.1: its calls may not be heard")
    assert found.text.endswith(f"{GENAI} 1.3b0 is made for openai<4,>=1.26.0")
    assert f'pip install --upgrade {GENAI}, or pip install "openai<4,>=1.26.0"' in found.advice


def test_what_we_know_to_work_outweighs_the_claim(packages):
    """Given google-genai 3, which its instrumentor does not claim and our table does, it is heard."""
    instrumentor = "opentelemetry-instrumentation-google-genai"
    claim = ["google-genai<3,>=1.32.0; extra == 'instruments'"]
    packages(
        {"google-genai": "3.6.1", instrumentor: "1.3b0"}, opentelemetry_instrumentation_google_genai=claim
    )
    assert [found.status for found in examined()] == ["ok"]


def test_what_not_even_we_know_to_work_is_told(packages):
    """Given a google-genai that is newer than what was tried, the report warns with our own limit."""
    packages({"google-genai": "4.0", "opentelemetry-instrumentation-google-genai": "1.3b0"})
    (found,) = examined()
    assert (found.status, "google-genai >= 1.32.0, < 4" in found.text) == ("warn", True)


def test_what_our_own_instrumentor_does_not_take_is_told(packages):
    """Given an SDK that we hear ourselves, older than what was tried, the report warns with our limit."""
    (sdk,) = (sdk for sdk in SDKS if sdk.name == "openai-agents")
    packages({sdk.distributions[0]: "0.0.1"})
    (found,) = examined()
    (limit,) = sdk.instrumentors[0].requires
    assert (found.status, found.text.endswith(f"our instrumentor is made for {limit}")) == ("warn", True)
    assert "pip install --upgrade waxell-workers" in found.advice


@pytest.mark.parametrize(
    ("present", "taken"),
    [
        ({"one": "1.0"}, True),
        ({"two": "2.0", "one": "0.1"}, True),
        ({"one": "0.1"}, True),  # two is absent, and what is absent is not wrong
        ({"one": "0.1", "two": "0.1"}, False),
    ],
)
def test_of_alternatives_one_suffices(packages, present, taken):
    """An instrumentor that is made for one of several packages is content with any."""
    either = ["one>=1; extra == 'instruments-any'", "two>=1; extra == 'instruments-any'"]
    packages({**present, "hears": "1.0"}, hears=either)
    assert claims.unmet(Instrumentor("hears", "hears")) == (() if taken else ("one>=1", "two>=1"))


def test_an_sdk_that_is_not_among_those_to_capture_is_told(packages):
    """Given `capture=()` or `("anthropic",)`, openai is installed, and on purpose not heard."""
    packages({"openai": "3.54.0"})
    for chosen in ((), ("anthropic",)):
        (found,) = examined(chosen)
        assert (found.status, "openai is not among" in found.text) == ("info", True)


def test_a_name_that_capture_does_not_know_fails(place):
    """Given a misspelt SDK in WAXELL_CAPTURE, the report fails and has the names that there are."""
    report = place.report("--no-send", WAXELL_API_URL="http://127.0.0.1:9", WAXELL_CAPTURE="openai,antropic")
    assert "known here: antropic → use some of anthropic, " in report.failures()["capture"]


def test_what_nobody_can_hear_is_recorded_by_hand(packages):
    """Given an SDK without any instrumentor, the report says how to record its calls, and where to read on;
    one that may be there for something else is no warning."""
    packages({"google-generativeai": "0.8", "huggingface-hub": "1.0", "dspy": "3.0"})
    found = {finding.text.split()[0]: finding for finding in examined()}
    assert found["google-generativeai"].status == "warn"
    assert found["google-generativeai"].advice.endswith(capture.BY_HAND)
    assert [found[name].status for name in ("huggingface-hub", "dspy")] == ["info", "info"]
    page = capture.BY_HAND.rpartition("/blob/main/")[2]
    assert (ROOT / page).is_file()


def test_what_can_be_heard_is_not_listed_as_unheard():
    """There is one table of what is heard; whoever adds an SDK to it takes it out of the others."""
    known = {name for sdk in SDKS for name in sdk.distributions}
    assert known & {*capture.UNHEARD, *capture.FRAMEWORKS} == set()


def test_nothing_to_hear_is_told(packages):
    """Given no SDK at all, the report says so."""
    packages({})
    assert [(found.status, found.text) for found in examined()] == [
        ("info", "no LLM SDK that is known here is installed")
    ]


def test_other_tracers_are_told_with_a_sentence(monkeypatch):
    """Each that is installed, and no other."""
    monkeypatch.setattr(capture, "installed", lambda name: "1.0" if name == "waxell-observe" else "")
    (found,) = capture.check_tracers(Situation(Settings(), {}))
    assert found.text.startswith("waxell-observe 1.0: where it is initialised in the same process")


def test_the_versions_are_named(place):
    """Given what is installed here, the report has our version, Python's and the system's; and those of the
    frameworks, SDKs and libraries that matter, and of nothing that is missing."""
    ours, others = (text.removesuffix(" → ") for text in place.report("--no-send").of("versions", "ok"))
    python = f"Python {platform.python_version()} ({sys.executable})"
    assert ours == f"waxell-workers {__version__}, {python}, {platform.platform(terse=True)}"
    present = {found.metadata["Name"].lower(): found.version for found in distributions()}
    matter = ("celery", "rq", "dramatiq", "starlette", "fastapi", "openai", "anthropic", "httpx", "msgspec")
    matter += ("opentelemetry-api", "opentelemetry-sdk")
    assert others.split(", ") == [f"{name} {present[name]}" for name in matter if name in present]


def test_what_is_too_old_is_a_warning_by_our_own_metadata(monkeypatch):
    """Given Celery 5.2, the report says 5.3 and how to upgrade; what is new enough is not named."""
    monkeypatch.setattr(versions, "installed", lambda name: {"celery": "5.2.7", "rq": "1.16.0"}.get(name, ""))
    warnings = [found for found in versions.check(Situation(Settings(), {})) if found.status == "warn"]
    assert [found.text for found in warnings] == ["celery 5.2.7 is older than what is supported (5.3)"]
    assert warnings[0].advice == 'pip install --upgrade "waxell-workers[celery]"'


@pytest.mark.parametrize(
    ("older", "newer"), [("0.9", "0.10"), ("1.3b0", "1.4"), ("5", "5.0.1"), ("5.3rc1", "5.10")]
)
def test_versions_are_compared_by_number(older, newer):
    """`0.9` is older than `0.10`, and `5.0` is `5`."""
    assert versions._numbers(older) < versions._numbers(newer)
    assert versions._numbers("5.0") == versions._numbers("5")


def test_the_doctor_imports_none_of_what_it_looks_at(place, faulty):
    """An SDK's or framework's import has effects; the report is made from metadata alone."""
    code = (
        "import sys\n"
        "from waxell_workers.cli.commands import cli\n"
        "try:\n    cli(['doctor'])\n"
        "finally:\n"
        "    print('LOADED', [m for m in ('openai', 'celery', 'opentelemetry') if m in sys.modules])"
    )
    environ = place.environ(WAXELL_API_URL=faulty.url)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=RUN_S, check=True
    )
    assert "LOADED []" in done.stdout
    assert len(faulty.runs) == 1


# -- how it looks ------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_the_report_fits_the_terminal(place, faulty, columns):
    """No line is wider than the terminal, every area has its heading, and the last line sums up."""
    done = place.run("--no-send", WAXELL_API_URL=faulty.url, COLUMNS=columns)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert {"versions", "settings", "spool", "backlog", "server", "capture", "end to end"} <= set(lines)
    assert re.fullmatch(r"everything is as it should be|0 failed, \d+ warnings?", lines[-1])


def test_the_report_can_be_written_where_there_is_only_ascii(place):
    """A terminal without Unicode gets other marks, and no traceback."""
    done = place.run(PYTHONIOENCODING="ascii", WAXELL_API_KYE="x")
    assert done.returncode == 1
    assert "  x not configured" in done.stdout
    assert "    -> set WAXELL_API_KEY" in done.stdout


def test_a_spool_that_is_just_being_used_is_not_disturbed(place, faulty):
    """Given a ledger that is open with a transaction under way, the report is made all the same."""
    place.record(1, WAXELL_API_URL=faulty.url)
    place.report(WAXELL_API_URL=faulty.url)
    (ledger,) = place.spool.glob("*/shipper.db")
    db = sqlite3.connect(ledger, isolation_level=None)
    try:
        db.execute("BEGIN IMMEDIATE")
        db.execute("DELETE FROM recent")
        report = place.report("--no-send", WAXELL_API_URL=faulty.url)
        db.execute("COMMIT")
    finally:
        db.close()
    assert report.failures() == {}
