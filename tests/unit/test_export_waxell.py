"""The exporter as a whole: which shape it takes, how long it takes, and what it gives away (nothing)."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.export_cases import KEY, batch, call, export, exporter, ids, started
from tests.faulty import FaultyServer
from waxell_workers._version import __version__
from waxell_workers.core.config import Settings
from waxell_workers.core.exporting import OUT_OF_TIME, Outcome, RunBatch, RunState
from waxell_workers.export import waxell as module
from waxell_workers.export.transport import Transport
from waxell_workers.export.waxell import WaxellExporter


@pytest.fixture(params=[False, True], ids=["rest", "ingest"])
def server(request: pytest.FixtureRequest) -> Iterator[FaultyServer]:
    with FaultyServer(ingest=request.param) as server:
        yield server
        assert server.violations == []


@pytest.fixture
def waxell(server: FaultyServer) -> Iterator[WaxellExporter]:
    waxell = exporter(server.url)
    yield waxell
    waxell.close()


# --- which shape ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["400", "404", "405", "410", "422"])
def test_a_server_without_a_configuration_gets_rest(
    server: FaultyServer, waxell: WaxellExporter, status: str
) -> None:
    server.mode(status, endpoint="config")
    run = batch()
    assert export(waxell, run).acknowledged == ids(run)
    assert server.count("complete") == 1


@pytest.mark.parametrize("status", ["401", "402", "403", "407", "301"])
def test_a_refused_configuration_pauses(server: FaultyServer, waxell: WaxellExporter, status: str) -> None:
    server.mode(status, endpoint="config")
    outcome = export(waxell, batch())
    assert (outcome.paused, outcome.error) == (f"config: {status}", "")
    assert server.count("start") == server.count("ingest") == 0


@pytest.mark.parametrize("fault", ["500", "503", "429", "408", "invalid_json", "reset"])
def test_an_unreadable_configuration_is_asked_for_again(
    server: FaultyServer, waxell: WaxellExporter, fault: str
) -> None:
    server.mode(fault, endpoint="config", times=1)
    run = batch()
    outcome = export(waxell, run)
    assert outcome.error.startswith("config: ")
    assert (outcome.acknowledged, outcome.rejected, outcome.paused) == (set(), {}, "")
    assert export(waxell, run).acknowledged == ids(run)


def test_the_answer_is_remembered_for_a_while(
    server: FaultyServer, waxell: WaxellExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(waxell, batch("a"))
    export(waxell, batch("b"))
    assert server.count("config") == 1
    monkeypatch.setattr(module, "CONFIG_MAX_AGE_S", -1.0)
    export(waxell, batch("c"))
    assert server.count("config") == 2
    server.mode("500", endpoint="config")
    run = batch("d")
    assert export(waxell, run).acknowledged == ids(run), "what is known stays good"


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://evil.example/ingest/",
        "//evil.example/ingest/",
        "http://127.0.0.1:1/ingest/",
        "http://user@{host}/ingest/",
        "ingest/",
        "/in gest/",
        "/in\\gest/",
        "ftp://{host}/ingest/",
        "http://[::1",
        17,
    ],
)
def test_the_key_is_never_sent_to_another_origin(endpoint: object) -> None:
    with FaultyServer(ingest=True) as server:
        host = server.url.removeprefix("http://")
        server.ingest_endpoint = endpoint.replace("{host}", host) if isinstance(endpoint, str) else endpoint  # type: ignore[assignment]
        waxell = exporter(server.url)
        run = batch()
        assert export(waxell, run).acknowledged == ids(run)
        waxell.close()
        assert server.count("ingest") == 0
        assert server.count("complete") == 1


def test_an_absolute_address_of_the_same_origin_is_taken() -> None:
    with FaultyServer(ingest=True) as server:
        server.ingest_endpoint = f"{server.url}/other/ingest/"
        waxell = exporter(server.url)
        run = batch()
        assert export(waxell, run).acknowledged == ids(run)
        waxell.close()
        assert {r.path for r in server.requests if r.endpoint == "ingest"} == {"/other/ingest/"}


# --- what is sent, and what is not -----------------------------------------------------------------


def test_requests_carry_the_key_and_our_name(server: FaultyServer, waxell: WaxellExporter) -> None:
    export(waxell, batch())
    assert {request.headers["x-wax-key"] for request in server.requests} == {KEY}
    assert {r.headers["user-agent"] for r in server.requests} == {f"waxell-workers/{__version__}"}


def test_without_a_key_there_is_no_key_header(server: FaultyServer) -> None:
    waxell = exporter(server.url, key="")
    export(waxell, batch())
    waxell.close()
    assert not any("x-wax-key" in request.headers for request in server.requests)


def test_a_wrong_key_pauses() -> None:
    with FaultyServer(key="another") as server:
        waxell = exporter(server.url)
        outcome = export(waxell, batch())
        waxell.close()
    assert outcome.paused == "config: 401"


def test_redirects_are_not_followed(server: FaultyServer, waxell: WaxellExporter) -> None:
    with FaultyServer() as elsewhere:
        server.mode("redirect", location=f"{elsewhere.url}/api/v1/observe/config/")
        assert export(waxell, batch()).paused == "config: 307"
        assert elsewhere.requests == []


@pytest.mark.parametrize("fault", ["500", "422", "403", "404", "reset", "invalid_json", "refuse"])
def test_neither_the_key_nor_content_gets_into_reasons_or_logs(
    server: FaultyServer, waxell: WaxellExporter, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "waxell_workers")
    secret = batch("r", started(inputs={"q": "CONTENT"}), call(prompt="CONTENT", error_message="CONTENT"))
    export(waxell, batch("first"))
    server.mode(fault)
    outcome = export(waxell, secret)
    text = f"{outcome} {caplog.text}"
    assert KEY not in text
    assert "CONTENT" not in text


def test_our_requests_are_not_in_the_users_log(
    server: FaultyServer, waxell: WaxellExporter, caplog: pytest.LogCaptureFixture
) -> None:
    """httpx logs every request at INFO: the user's own are still logged, ours never were wanted."""
    caplog.set_level(logging.INFO)
    export(waxell, batch())
    assert "HTTP Request" not in caplog.text
    httpx.get(f"{server.url}/api/v1/observe/config/")
    assert "HTTP Request" in caplog.text


def test_the_users_opentelemetry_does_not_see_our_requests(
    server: FaultyServer, waxell: WaxellExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked as instrumentations check it: by the suppressing keys in the context of the request."""
    utils = pytest.importorskip("opentelemetry.instrumentation.utils")
    context = pytest.importorskip("opentelemetry.context")
    seen: set[tuple[object, ...]] = set()
    handle = httpx.HTTPTransport.handle_request

    def spy(self: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        seen.add(
            (
                utils.is_instrumentation_enabled(),
                utils.is_http_instrumentation_enabled(),
                context.get_value("suppress_instrumentation"),
                context.get_value(context._SUPPRESS_INSTRUMENTATION_KEY),
                context.get_value(context._SUPPRESS_HTTP_INSTRUMENTATION_KEY),
            )
        )
        return handle(self, request)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", spy)
    export(waxell, batch())
    assert seen == {(False, False, True, True, True)}
    assert utils.is_http_instrumentation_enabled()


def test_opentelemetry_is_not_imported_for_it() -> None:
    code = """
        import sys, time
        from tests.export_cases import batch, export, exporter, ids
        from tests.faulty import FaultyServer
        sys.modules["genai_prices"] = None
        with FaultyServer() as server:
            waxell, run = exporter(server.url), batch()
            assert export(waxell, run).acknowledged == ids(run)
            waxell.close()
        assert not [name for name in sys.modules if name.startswith("opentelemetry")]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60, cwd=_root())


# --- how long it takes ------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["config", "data"])
@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ("hang", {}),
        ("trickle", {"where": "headers", "interval": 0.05}),
        ("trickle", {"where": "body", "interval": 0.4}),
    ],
)
def test_the_deadline_is_kept(
    server: FaultyServer, waxell: WaxellExporter, fault: str, options: dict[str, object], known: bool
) -> None:
    """Given a server that answers too slowly or never, then the export ends a moment after its deadline."""
    if known:
        export(waxell, batch("first"))
    server.mode(fault, **options)
    begun = time.monotonic()
    outcome = export(waxell, *[batch(f"r{number}") for number in range(20)], timeout_s=0.6)
    assert time.monotonic() - begun < 2.0
    assert outcome.error
    assert not outcome.paused
    server.mode("healthy")
    run = batch("after")
    assert export(waxell, run).acknowledged == ids(run)
    if server.ingest:
        return
    clients = [run.client_id for run in server.runs.values()]
    assert clients.count("after") == 1


def test_a_deadline_that_has_passed_sends_nothing(server: FaultyServer, waxell: WaxellExporter) -> None:
    outcome = export(waxell, batch(), timeout_s=-1)
    assert outcome == Outcome(error=OUT_OF_TIME)
    assert server.requests == []


def test_a_late_thread_changes_nothing(
    server: FaultyServer, waxell: WaxellExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a good answer that comes after the deadline, then outcome and run state stay as they were."""
    state = RunState(started())
    export(waxell, RunBatch(state, [state.started]))
    kept = copy.copy(state)
    monkeypatch.setattr(Transport, "abort", lambda self: None)
    server.mode("trickle", where="headers", interval=0.01)
    outcome = export(waxell, RunBatch(state, [call(cost_usd=0.1)]), timeout_s=0.2)
    late = [thread for thread in threading.enumerate() if thread.name == "waxell-workers-export"]
    assert late
    for thread in late:
        thread.join(20)
        assert not thread.is_alive()
    assert outcome.acknowledged == set()
    assert state == kept


def test_a_slow_answer_leaves_no_thread_behind(server: FaultyServer, waxell: WaxellExporter) -> None:
    """Given headers that trickle, when the deadline passes, then the threads are free for the next export."""
    export(waxell, batch("first"))
    server.mode("trickle", where="headers", interval=0.05)
    for _ in range(2):
        export(waxell, batch(), timeout_s=0.2)
        ours = [thread for thread in threading.enumerate() if thread.name == "waxell-workers-export"]
        assert len(ours) == 1


def test_a_reply_without_end_is_cut(
    server: FaultyServer, waxell: WaxellExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("waxell_workers.export.transport.REPLY_LIMIT", 10)
    assert export(waxell, batch()).error == "config: 200, reply cut, no JSON object"


# --- Retry-After, refusals of connections, nothing to do -----------------------------------------------


def test_retry_after_is_passed_on(server: FaultyServer, waxell: WaxellExporter) -> None:
    export(waxell, batch("first"))
    server.mode("429", retry_after="17")
    assert export(waxell, batch()).retry_after_s == 17.0
    server.mode("503")
    assert export(waxell, batch()).retry_after_s is None


def test_a_refused_connection_is_tried_again(server: FaultyServer, waxell: WaxellExporter) -> None:
    run = batch()
    server.mode("refuse")
    outcome = export(waxell, run)
    assert outcome.error == "config: ConnectError (ConnectionRefusedError)"
    server.mode("healthy")
    assert export(waxell, run).acknowledged == ids(run)
    server.mode("refuse")
    assert export(waxell, batch("next")).error
    server.mode("healthy")
    assert export(waxell, batch("next")).error == ""


def test_a_name_that_cannot_be_found_is_tried_again() -> None:
    for host in ("no-such-host.invalid", f"{'a' * 70}.invalid"):
        waxell = exporter(f"http://{host}")
        outcome = export(waxell, batch())
        waxell.close()
        assert outcome.error.startswith("config: ")


def test_tls_to_a_server_that_has_none_is_tried_again(server: FaultyServer) -> None:
    waxell = exporter(server.url.replace("http:", "https:"))
    outcome = export(waxell, batch(), timeout_s=5)
    waxell.close()
    assert outcome.error.startswith("config: ConnectError")


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HTTPS_PROXY", "nonsense://x"), ("HTTP_PROXY", "http://[::1"), ("SSL_CERT_FILE", "/nonexistent.pem")],
)
def test_an_unusable_environment_pauses(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    outcome = export(exporter(server.url), batch())
    assert outcome.paused.startswith("proxy or certificate settings are unusable: ") or (
        variable == "SSL_CERT_FILE" and outcome.error == ""
    )


def test_an_exporter_without_an_address_pauses() -> None:
    waxell = WaxellExporter(Settings())
    assert export(waxell, batch()).paused == "config: UnsupportedProtocol"
    waxell.close()


def test_nothing_to_deliver_is_no_request(server: FaultyServer, waxell: WaxellExporter) -> None:
    assert export(waxell) == Outcome()
    assert export(waxell, RunBatch(RunState(started()), [])) == Outcome()
    assert server.requests == []


def test_it_can_be_used_again_after_close(server: FaultyServer, waxell: WaxellExporter) -> None:
    export(waxell, batch("a"))
    waxell.close()
    run = batch("b")
    assert export(waxell, run).acknowledged == ids(run)


def test_a_mistake_of_ours_is_an_error_and_not_an_exception(
    server: FaultyServer,
    waxell: WaxellExporter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*args: object) -> None:
        raise TypeError("CONTENT")

    monkeypatch.setattr("waxell_workers.export.bodies.start", broken)
    monkeypatch.setattr("waxell_workers.export.ingest.encode", broken)
    outcome = export(waxell, batch())
    assert outcome.error == "unexpected TypeError"
    assert outcome.acknowledged == set()
    assert "CONTENT" not in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_opens_its_own_connections(server: FaultyServer) -> None:
    """Given an exporter that has been used, when its process forks, then both can export."""
    code = f"""
        import os, warnings
        from tests.export_cases import batch, export, exporter, ids
        warnings.simplefilter("ignore")
        waxell = exporter({server.url!r})
        assert not export(waxell, batch("a")).error
        pid = os.fork()
        run = batch("child" if pid == 0 else "parent")
        good = export(waxell, run).acknowledged == ids(run)
        if pid == 0:
            os._exit(0 if good else 1)
        assert good
        assert os.waitpid(pid, 0)[1] == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60, cwd=_root())


def _root() -> str:
    from pathlib import Path

    return str(Path(__file__).parents[2])
