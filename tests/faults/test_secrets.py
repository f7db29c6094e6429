"""Keys, passwords and content: every byte that is written anywhere is looked at for what must not be there.

The key goes through every failure of a server; a password through proxies; content through real tasks of each
framework that end in every way that quotes something. A mark that was in play and is found nowhere proves
nothing unless it was in play: each test shows that too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import waxell_workers
from tests import wild
from tests.destination import Destination, call, end_shipper, ended, start_shipper, started
from tests.faulty import FaultyServer
from tests.harness import START_S, WORK_S, await_, children_in, environment, start_server, start_valkey
from tests.torture import LONG, effort, found
from waxell_workers.core import config, profiles
from waxell_workers.core.collector import Collector
from waxell_workers.core.config import Settings
from waxell_workers.core.encoding import decode
from waxell_workers.core.errors import ConfigError
from waxell_workers.core.flush import request_flush
from waxell_workers.core.inspection import holders
from waxell_workers.core.records import RunEnded
from waxell_workers.export.waxell import WaxellExporter
from waxell_workers.testing.conformance.faults import FaultyHTTP, Request

KEY = "wax_sk_q7xkeyx7q"
PASSWORD = "q7xpasswordx7q"
CONFIDENTIAL = Path(__file__).parent / "confidential"


def files(root: Path) -> dict[Path, bytes]:
    """Read every regular file below a directory that has anything in it.

    The empty ones are locks: who closes such a file loses what this process has locked in it.
    """
    found_: dict[Path, bytes] = {}
    for path in root.rglob("*"):
        try:
            if path.is_file() and not path.is_symlink() and path.stat().st_size:
                found_[path] = path.read_bytes()
        except FileNotFoundError:  # a segment that was delivered meanwhile
            continue
    return found_


def leaks(root: Path, *secrets: str) -> list[str]:
    """Return which file holds which secret, in its name or in its bytes."""
    return [
        f"{secret} in {path.name}"
        for path, content in files(root).items()
        for secret in secrets
        if secret.encode() in content or secret in str(path.relative_to(root))
    ]


def process_leaks(pid: int, *secrets: str) -> list[str]:
    """Return what everybody may read of a process and holds a secret: arguments, environment, open files."""
    process = psutil.Process(pid)
    told = {
        "argv": " ".join(process.cmdline()),
        "environment": str(process.environ()),
        "name": process.name(),
    }
    told["files"] = " ".join(file.path for file in process.open_files())
    told["sockets"] = " ".join(str(connection.laddr) for connection in process.net_connections("unix"))
    return [f"{secret} in {what}" for what, text in told.items() for secret in secrets if secret in text]


# -- the key ---------------------------------------------------------------------------------------


PAUSES = ("wrong key", "413", "echo 401", "echo 307", "echo 422")
BRIEFLY = ("refuse", "reset", "echo 401", "echo 503", "echo 200", "echo a status line", "echo rejected")


def says_it_back(request_key: str) -> dict[str, wild.Play]:
    """Servers that echo the key wherever they can."""
    echo = {"detail": request_key, "run_id": {"key": request_key}}
    reason = [{"id": "k-c0", "reason": f"bad key {request_key}"}]
    more = {"X_Echo": request_key, "Location": f"/{request_key}", "Retry_After": request_key}
    return {
        "401": wild.answers(401, echo, **more),
        "307": wild.answers(307, echo, **more),
        "422": wild.answers(422, echo, **more),
        "503": wild.answers(503, echo, **more),
        "200": wild.answers(200, echo, **more),
        "a page": wild.answers(200, f"<html>{request_key}</html>".encode(), **more),
        "a status line": wild.says(f"HTTP/1.1 500 {request_key}\r\nContent-Length: 0\r\n\r\n".encode()),
        "no HTTP": wild.says(request_key.encode() * 3 + b"\r\n\r\n"),
        "a header": wild.says(f"HTTP/1.1 200 X\r\n{request_key}\r\n\r\n".encode()),
        "rejected": wild.answers(200, {"accepted": 2, "rejected": reason}),
    }


@pytest.fixture(params=["ingest", "rest"])
def keyed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[FaultyServer, Destination]]:
    """A server that wants a key, and a destination that has it."""
    with FaultyServer(key=KEY, ingest=request.param == "ingest") as server:
        destination = Destination(server, tmp_path)
        destination.settings = dataclasses.replace(destination.settings, api_key=KEY)
        destination.collector = Collector(destination.settings)
        destination.directory = destination.collector.journal.open()
        yield server, destination
        end_shipper(destination)


def flush(destination: Destination, timeout_s: float) -> bool:
    answer = request_flush(destination.directory, 0, time.monotonic() + timeout_s)
    return answer is not None and answer.pending == 0


def faults_of(server: FaultyServer) -> dict[str, Callable[[], object]]:
    data = "ingest" if server.ingest else "start"
    modes: dict[str, Callable[[], object]] = {
        "refuse": lambda: server.mode("refuse"),
        "hang": lambda: server.mode("hang"),
        "reset": lambda: server.mode("reset"),
        "wrong key": lambda: setattr(server, "key", "another"),
        "413": lambda: server.mode("413", endpoint=data),
    }
    for name, play in says_it_back(KEY).items():
        modes[f"echo {name}"] = lambda play=play: server.mode("raw", endpoint=data, play=play)  # type: ignore[misc]
    return modes


def test_the_key_is_nowhere_whatever_a_server_does(
    keyed: tuple[FaultyServer, Destination], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a key, and servers that fail or say it back in every way, it is in no file below the spool and in
    nothing that others can read of the shipper; only the header has it."""
    server, destination = keyed
    monkeypatch.setenv("WAXELL_API_KEY", KEY)
    monkeypatch.setenv("MY_OWN_NAME_FOR_IT", f"prefix {KEY}")
    fired = 0
    log = Path(destination.directory, "shipper.log")
    shipper = start_shipper(destination)
    for number, (what, begin) in enumerate(faults_of(server).items()):
        if not LONG and what not in BRIEFLY:
            continue
        assert process_leaks(shipper.pid, KEY) == []
        before = len(server.requests)
        begin()
        run = "k" if what == "echo rejected" else f"r{number}"
        destination.append(started(run), call(run), ended(run))
        if what == "refuse":
            await_(lambda: flush(destination, 0.3) or "ConnectError" in log.read_text(), what)
        else:
            await_(lambda: flush(destination, 0.3) or len(server.requests) > before, what)  # noqa: B023
            assert len(server.requests) > before, f"{what} did not fire"
        if what == "echo rejected" and server.ingest:
            await_(Path(destination.directory, "quarantine.ndjson").exists, what)
        fired += 1
        flush(destination, 0.2)
        assert leaks(tmp_path, KEY) == [], what
        server.key = KEY
        server.mode("healthy")
        if what in PAUSES:  # for a minute; the next one knows nothing of that
            end_shipper(destination)
            shipper = start_shipper(destination)
    await_(lambda: flush(destination, 5.0), "delivery")
    assert leaks(tmp_path, KEY) == []
    sent = [f"{request.path} {request.body!r} {request.raw!r}" for request in server.requests]
    assert not [text for text in sent if KEY in text]
    assert {request.headers.get("x-wax-key") for request in server.requests} == {KEY}
    assert "everything is kept" in log.read_text(), "the log was in play"
    if server.ingest:
        assert "bad key …" in Path(destination.directory, "quarantine.ndjson").read_text()
    found("the key and a server's failures", faults=fired, requests=len(server.requests))


@pytest.mark.parametrize("keyed", ["ingest", "rest"] if LONG else ["rest"], indirect=True)
def test_the_key_is_in_no_output_of_a_command(
    keyed: tuple[FaultyServer, Destination], tmp_path: Path
) -> None:
    """Given a server that refuses, is broken or sends elsewhere, `doctor`, `spool` and `ship` show no key, in
    text and JSON, and no password of a proxy."""
    server, destination = keyed
    environ = environment(
        WAXELL_API_KEY=KEY,
        WAXELL_API_URL=server.url,
        WAXELL_SPOOL_DIR=destination.settings.spool_dir,
        ALL_PROXY=f"http://ann:{PASSWORD}@127.0.0.1:9",
    )
    destination.append(started("a"), call("a"), ended("a"))
    commands = [
        ["doctor", "--timeout", "2"],
        ["doctor", "--json", "--timeout", "2"],
        ["spool", "status"],
        ["spool", "export"],
        ["spool", "verify"],
        ["ship", "--drain", "--timeout", "1"],
    ]
    echo = says_it_back(KEY)
    modes = ["401", "307", "503"] if LONG else ["401"]
    for name in modes:
        server.mode("raw", play=echo[name])
        for command in commands:
            done = run_cli(command, environ)
            assert "Traceback" not in done.stdout + done.stderr
            assert KEY not in done.stdout + done.stderr, command
            assert PASSWORD not in done.stdout + done.stderr, command
            assert done.stdout + done.stderr, command
    assert server.fired["raw"] > 0
    assert leaks(tmp_path, KEY, PASSWORD) == []


def run_cli(command: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "waxell_workers.cli.main", *command]
    return subprocess.run(whole, env=environ, capture_output=True, text=True, timeout=60, check=False)


IN_A_THREAD = """
import logging, sys, time
logging.basicConfig(level=logging.DEBUG, format="%(name)s %(levelname)s %(message)s")
import httpx, waxell_workers
url, spool, key = sys.argv[1], sys.argv[2], sys.stdin.readline().strip()
waxell_workers.init(key, url, spool_dir=spool, shipper="thread", flush_interval=0.1, capture=())
with waxell_workers.WaxellContext("agent"):
    waxell_workers.record_llm_call(model="m")
print(waxell_workers.force_flush(3.0), waxell_workers.stats(), file=sys.stderr)
httpx.get(url + "/the-users-own", trust_env=False)
waxell_workers.shutdown(1.0)
"""


@pytest.mark.parametrize("fault", ["healthy", "401", "no proxy"])
def test_the_key_is_in_no_log_at_debug(tmp_path: Path, fault: str) -> None:
    """Given a script that ships by a thread and logs everything at DEBUG, httpx and httpcore too, then
    neither the key, nor a proxy's password, nor one of our requests is in its log; its own request is."""
    environ = environment(PYTHONWARNINGS="ignore")
    if fault == "no proxy":
        environ["HTTP_PROXY"] = f"http://ann:{PASSWORD}@127.0.0.1:9"
        environ["NO_PROXY"] = ""
    with FaultyServer(key=KEY) as server:
        if fault == "401":
            server.mode("raw", endpoint="config", play=says_it_back(KEY)["401"])
        done = subprocess.run(
            [sys.executable, "-c", IN_A_THREAD, server.url, str(tmp_path / "spool")],
            input=KEY,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        ours = [request for request in server.requests if "the-users-own" not in request.path]
        assert bool(ours) == (fault != "no proxy")
    log = done.stdout + done.stderr
    assert "httpcore.http11 DEBUG send_request_headers.started" in log, "the log was in play"
    assert log.count("httpcore.http11 DEBUG send_request_headers.started") == 1
    assert log.count("httpx INFO HTTP Request:") == 1
    assert log.count("httpcore.connection DEBUG connect_tcp.started") == 1
    assert KEY not in log
    assert PASSWORD not in log
    assert leaks(tmp_path, KEY, PASSWORD) == []


def test_a_proxys_password_is_not_in_the_shippers_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a proxy with a password in the worker's environment, the shipper process uses it, and others can
    read it neither in that process's environment nor in its arguments, log or files."""
    with FaultyServer() as proxy:  # asked for http://… it is its own upstream
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, proxy.url.replace("://", f"://ann:{PASSWORD}@"))
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        destination = Destination(proxy, tmp_path)
        destination.settings = dataclasses.replace(
            destination.settings, api_url="http://waxell.example", api_key=KEY
        )
        destination.append(started("a"), call("a"), ended("a"))
        shipper = start_shipper(destination)
        try:
            await_(lambda: flush(destination, 0.3) or proxy.requests, "a request through the proxy")
            assert proxy.requests[0].headers["proxy-authorization"].startswith("Basic ")
            assert process_leaks(shipper.pid, KEY, PASSWORD) == []
            assert leaks(tmp_path, KEY, PASSWORD) == []
        finally:
            end_shipper(destination)


@pytest.mark.parametrize(
    "url",
    [
        f"https://ann:{PASSWORD}@host/x",
        f"ann:{PASSWORD}@host",
        f"http:/ann:{PASSWORD}@host",
        f"https:ann:{PASSWORD}@host",
        f"//ann:{PASSWORD}@host",
        f"https://ann:{PASSWORD}@host:port",
        f"https://ann:{PASSWORD}@[::1",
        f"ftp://{PASSWORD}@host",
        f"https://host/?token={PASSWORD}",
        f"https://host/#{PASSWORD}",
    ],
)
def test_no_error_quotes_a_url_that_may_hold_a_secret(url: str) -> None:
    """Given an address with a password or a token, it is refused, and neither text nor repr quotes it."""
    with pytest.raises(ConfigError) as caught:
        config.resolve({"api_url": url}, {})
    told = f"{caught.value} {caught.value!r} {caught.value.value!r} {caught.value.args!r}"
    assert PASSWORD not in told
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


def test_no_repr_and_no_count_shows_the_key(tmp_path: Path) -> None:
    """Whatever of ours a debugger, a log or an error reporter writes out, the key is not in it."""
    settings = Settings(
        api_key=KEY, api_url="http://127.0.0.1:9", spool_dir=str(tmp_path), shipper="external"
    )
    collector = Collector(settings)
    exporter = WaxellExporter(settings)
    profile = profiles.Profile("default", {"api_key": KEY})
    with closing(exporter):
        transport = exporter._open()
        things = (settings, collector, exporter, transport, transport._client, profile, collector.stats())
        told = [repr(thing) + str(thing) for thing in things]
    assert not [text for text in told if KEY in text]


def test_what_a_debugger_finds_is_all_that_holds_the_key() -> None:
    """The scan of this module finds a key where there is one."""
    assert leaks(CONFIDENTIAL, "q7xsourcex7q") == ["q7xsourcex7q in work.py"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WAXELL_API_KEY", KEY)
        child = subprocess.Popen([sys.executable, "-c", "input()", KEY], stdin=subprocess.PIPE)
        try:
            await_(lambda: len(process_leaks(child.pid, KEY)) == 2, "argv and environment")
        finally:
            child.kill()
            child.communicate()


def test_the_local_server_keeps_no_key_of_its_clients(tmp_path: Path) -> None:
    """Given clients that send keys, right and wrong, by both protocols, neither database nor log nor page of
    the local server has one."""
    with children_in(tmp_path / "children") as children:
        server = start_server(children, tmp_path)
        settings = Settings(
            api_key=KEY, api_url=server.url, spool_dir=str(tmp_path / "s"), shipper="external"
        )
        collector = Collector(settings)
        directory = collector.journal.open()
        destination = Destination.__new__(Destination)
        destination.settings, destination.collector, destination.directory = settings, collector, directory
        destination.append(started("a"), call("a"), ended("a", "error", error_type="ValueError"))
        assert destination.ship().pending == 0
        with httpx.Client(base_url=server.url, headers={"X-Wax-Key": KEY}, trust_env=False) as client:
            start = {"agent_name": "a", "workflow_name": "w", "inputs": {}, "metadata": {}, "trace_id": ""}
            assert client.post("/api/v1/observe/runs/start/", json=start).status_code < 300
            client.post("/api/v1/observe/runs/nobody/llm-calls/", json={"calls": 5})
            client.post("/api/v1/observe/ingest/", content=b"no gzip")
            client.get("/nothing/here/")
            pages = [client.get("/").text, client.get("/api/v1/observe/config/").text]
        assert len(server.runs()) == 2
        assert not [page for page in pages if KEY in page]
        assert leaks(tmp_path, KEY) == []


# -- content ---------------------------------------------------------------------------------------

MARKS = [
    f"q7x{name}x7q"
    for name in (
        *("prompt", "answer", "ticket", "customer", "local", "deep", "source", "object", "document"),
        *("result", "openaikey"),
    )
]
ENDS = ("good", "long", "object", "encoding", "provider", "wrapped", "repr", "cut")
COMMANDS = {
    "celery": [
        *("-m", "celery", "-A", "celery_app", "worker", "-c", "1", "--loglevel", "DEBUG"),
        *("--without-mingle", "--without-gossip", "-Q"),
    ],
    "rq": [
        *("-m", "rq.cli", "worker", "-c", "rq_app", "--worker-class", "waxell_workers.rq.Worker"),
        *("--logging_level", "DEBUG", "--log-format", "%(name)s %(levelname)s %(message)s"),
    ],
    "dramatiq": ["-m", "dramatiq", "dramatiq_app", "--processes", "1", "--threads", "1", "-v", "-Q"],
}


class Model(FaultyHTTP):
    """A provider that quotes what it was asked, in its answers and in its errors."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = 0
        self.asked: list[str] = []

    def answer(self, request: Request) -> tuple[int, Any]:
        """Answer a chat."""
        question = json.loads(request.body)
        prompt = question["messages"][-1]["content"]
        self.asked.append(prompt)
        if question["model"] == "refused":
            self.refused += 1
            message = f"Invalid prompt: {prompt}"
            return 400, {"error": {"message": message, "type": "invalid_request_error", "code": prompt}}
        said = {"role": "assistant", "content": f"q7xanswerx7q to {prompt}"}
        return 200, {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": question["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": said}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
        }


@dataclasses.dataclass
class Office:
    """A worker of a framework with confidential tasks, and everything around it."""

    framework: str
    broker: str
    model: Model
    server: FaultyServer
    root: Path
    log: Path

    def send(self, how: str) -> None:
        """Enqueue a task."""
        arguments = (how, "q7xticketx7q")
        named = {"customer": "q7xcustomerx7q"}
        if self.framework == "celery":
            from celery import Celery

            with Celery(broker=self.broker, set_as_current=False) as client:
                client.send_task("celery_app.task", arguments, named, queue="office")
        elif self.framework == "rq":
            import redis
            import rq

            queue = rq.Queue("office", connection=redis.Redis.from_url(self.broker))
            queue.enqueue("rq_app.task", *arguments, **named)
        else:
            import dramatiq
            from dramatiq.brokers.redis import RedisBroker

            client_ = RedisBroker(url=self.broker)
            client_.declare_queue("office")
            client_.enqueue(dramatiq.Message("office", "task", arguments, named, {}))

    def ends(self) -> list[RunEnded]:
        """Return the ends of runs that stand in the journal."""
        lines = [
            line
            for path, content in files(self.root / "spool").items()
            if path.name[0] == "0"
            for line in content.splitlines()
            if b'"run_ended"' in line
        ]
        records = {record.id: record for record in map(decode, lines)}
        return [record for record in records.values() if isinstance(record, RunEnded)]

    def leaks(self) -> list[str]:
        """Return what was found of the marks: in the spool, in what was sent, and in what we have logged."""
        ours = [
            line for line in self.log.read_text(errors="replace").splitlines() if "waxell_workers" in line
        ]
        lines = ours + [f"{r.path} {r.body!r}" for r in self.server.requests]
        found_ = [f"{mark} in {line[:300]}" for line in lines for mark in MARKS if mark in line]
        return leaks(self.root / "spool", *MARKS) + found_


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with children_in(tmp_path_factory.mktemp("valkey")) as children:
        yield start_valkey(children)


@pytest.fixture
def open_office(tmp_path: Path, valkey: str) -> Iterator[Callable[..., Office]]:
    with (
        FaultyServer(ingest=True) as server,
        Model() as model,
        children_in(tmp_path / "children") as children,
    ):

        def start(framework: str, **more: str) -> Office:
            server.mode("503")
            environ = environment(
                BROKER_URL=valkey,
                QUEUE="office",
                OPENAI_BASE_URL=model.url,
                PYTHONPATH=str(CONFIDENTIAL),
                WAXELL_API_URL=server.url,
                WAXELL_SPOOL_DIR=str(tmp_path / "spool"),
                WAXELL_FLUSH_INTERVAL="0.2",
                WAXELL_SHUTDOWN_TIMEOUT="0.1",
                **more,
            )
            command = [sys.executable, *COMMANDS[framework], "office"]
            child = children.start(framework, command, environ)
            ready = {"celery": " ready.", "rq": "Listening on", "dramatiq": "is ready for action"}[framework]
            child.wait_for(lambda: ready in child.log.read_text(), "ready", START_S)
            return Office(framework, valkey, model, server, tmp_path, child.log)

        yield start
        for path in (tmp_path / "spool").glob("*/ship.lock"):
            for holder in holders(str(path)):
                os.kill(holder.pid, 9)


@pytest.mark.parametrize("framework", ["celery", "rq", "dramatiq"])
def test_without_being_asked_nothing_of_a_task_is_written(
    open_office: Callable[..., Office], framework: str
) -> None:
    """Given tasks with arguments, results, local variables and errors that quote all of them, a provider that
    quotes the prompt, and a server that fails, takes and rejects, then no byte of it is in journal, ledger,
    quarantine, logs or what was sent: an error is its type and a bounded message."""
    office = open_office(framework)
    ends = [*ENDS, *(["retry"] if framework == "celery" else [])]
    for how in ends:
        office.send(how)
    expected = len(ends) + (framework == "celery")  # the retry is an attempt of its own
    await_(lambda: len(office.ends()) >= expected, f"{expected} ends", WORK_S)
    await_(lambda: office.server.fired["503"], "a server that fails")
    assert office.model.refused >= 4
    assert all("q7xpromptx7q" in prompt and "q7xticketx7q" in prompt for prompt in office.model.asked)
    assert office.leaks() == []
    told = {(end.error_type, end.error_message) for end in office.ends() if end.state != "success"}
    # Celery hands on as a base class what cannot be pickled, as this one.
    assert {kind for kind, text in told if text == "Error code: 400"} & {
        "openai.BadRequestError",
        "openai.OpenAIError",
    }
    assert ("RuntimeError", "triage failed: Error code: 400") in told
    assert [len(message) for kind, message in told if kind == "ValueError"] == [200]
    (encoding,) = (message for kind, message in told if kind == "UnicodeEncodeError")
    assert "ordinal not in range" in encoding
    office.server.mode("reject", marker='"model":"object"')
    await_(lambda: len([r for r in office.server.runs.values() if r.ends]) >= expected, "delivery", WORK_S)
    path = await_(lambda: next((office.root / "spool").glob("*/quarantine.ndjson"), None), "a quarantine")
    assert b'"model":"object"' in path.read_bytes()
    assert office.leaks() == []
    found(f"content of {framework}", ends=expected, prompts=len(office.model.asked))


@pytest.mark.parametrize(
    "redactor", ["good", "raises", "rubbish", "raises at records", "nothing"] if LONG else ["good"]
)
def test_redact_comes_before_the_write(open_office: Callable[..., Office], redactor: str) -> None:
    """Given content that is to be kept, and a redactor that works or fails, each text in the raw bytes of the
    journal, and everything made of it, has gone through it."""
    office = open_office("celery", WAXELL_CAPTURE_CONTENT="true", CONFIDENTIAL_REDACT=redactor)
    for how in ENDS:
        office.send(how)
    await_(lambda: len(office.ends()) >= len(ENDS), "the ends", WORK_S)
    journal = b"".join(files(office.root / "spool").values())
    stands_there = b"[gone]" if redactor == "good" else b"[redaction failed]"
    assert journal.count(stands_there) >= 3 * len(ENDS), "content was in play"
    if redactor == "good":
        for name in ("prompt", "answer", "ticket", "customer", "deep", "source"):
            assert f"[gone]{name}".encode() in journal, name
    assert office.leaks() == []
    office.server.mode("reject", marker='"model":"object"')
    await_(lambda: len([r for r in office.server.runs.values() if r.ends]) >= len(ENDS), "delivery", WORK_S)
    assert office.leaks() == []
    found(f"redactor {redactor}", texts=journal.count(stands_there))


def test_the_package_has_no_other_way_to_print(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Given a context that ends in an error, with a key, nothing is printed by us."""
    with pytest.MonkeyPatch.context() as patch:
        settings = Settings(api_key=KEY, api_url="http://127.0.0.1:9", spool_dir=str(tmp_path))
        patch.setattr(
            "waxell_workers.core.collector._collector",
            Collector(dataclasses.replace(settings, shipper="external")),
        )
        for _ in range(effort(1, 5)):
            with pytest.raises(ValueError, match="boom"), waxell_workers.WaxellContext("agent"):
                raise ValueError("boom")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
