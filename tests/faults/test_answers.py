"""A server that answers anything at all: what becomes of the records, and that all arrive when it heals.

What a status code leads to is fired by `tests/unit/test_shipping_answers.py`; here are answers that are none,
answers without an end, answers that lie, and a network that does not carry them. Each is fired at a shipper
that runs, in both shapes of the protocol; the later tests fire at a shipper process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import wild
from tests.certificates import Certificates, make
from tests.destination import (
    Destination,
    call,
    end_shipper,
    ended,
    start_shipper,
    started,
    states,
)
from tests.faulty import FaultyServer
from tests.harness import await_
from tests.torture import LONG, effort, found
from tests.unit.test_shipping_answers import Running, quarantined
from tests.wild import CHUNKED, Play, answers, bomb, chunk, goes_on, says, says_and_hangs, trickles
from waxell_workers.core import shipper as shipping
from waxell_workers.core import window
from waxell_workers.core.flush import request_flush
from waxell_workers.core.records import Step
from waxell_workers.core.shipper import Shipper
from waxell_workers.export import answers as reading

HTML = b"<!DOCTYPE html><html><body>Log in to this network</body></html>"
SHAPES = ("ingest", "rest")
EXPORT_S = 0.5
"""The longest that a batch may take here; 15 s in earnest."""
MEMORY = 48 << 20
"""By so much may a process grow, whatever is sent to it: a bomb has 256 MiB."""


@pytest.fixture(params=SHAPES)
def server(request: pytest.FixtureRequest) -> Iterator[FaultyServer]:
    with FaultyServer(ingest=request.param == "ingest") as server:
        yield server
        assert server.violations == []


@pytest.fixture
def destination(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Destination:
    monkeypatch.setattr(window, "_BACKOFF_MOST_S", 0.05)
    monkeypatch.setattr(shipping, "_POLL_S", 0.01)
    monkeypatch.setattr(shipping, "_EXPORT_S", EXPORT_S)
    destination = Destination(server, tmp_path)
    destination.settings = dataclasses.replace(destination.settings, flush_interval=0.05)
    return destination


def data(server: FaultyServer) -> str:
    """The endpoint that the first record of a run goes to."""
    return "ingest" if server.ingest else "start"


def heal(server: FaultyServer) -> None:
    """From here on a busy machine has the time that it needs: by REST, what is late would come again."""
    shipping._EXPORT_S = 15.0  # taken back with what the fixture has patched
    server.mode("healthy")


def record_run(destination: Destination, name: str = "a") -> None:
    destination.append(started(name), call(name), ended(name))


def arrived_once(server: FaultyServer, *names: str) -> bool:
    names = names or ("a",)
    return states(server) == dict.fromkeys(names, "success") and sorted(
        record["model"] for record in server.calls
    ) == sorted(f"{name}-0" for name in names)


# -- answers that lead to another attempt ----------------------------------------------------------

NO_ANSWER: dict[str, Play] = {
    "not a byte": says(b""),
    "not HTTP": says(b"SSH-2.0-OpenSSH_9.9\r\n"),
    "binary": says(bytes(range(256)) * 64),
    "half a status line": says(b"HTTP/1.1 2"),
    "a status that is no number": says(b"HTTP/1.1 OK 200\r\n\r\n"),
    "switching protocols": says(b"HTTP/1.1 101 Go\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"),
    "headers, then silence": says_and_hangs(b"HTTP/1.1 200 X\r\nContent-Length: 99\r\n"),
    "status line by the byte": trickles(b"", b"HTTP/1.1 200 " + b"X" * 1000),
    "headers by the byte": trickles(b"HTTP/1.1 200 X\r\n", b"X-A: b\r\n"),
    "headers without end": goes_on(b"HTTP/1.1 200 X\r\n", b"X-A: b\r\n" * 100),
    "a header without end": goes_on(b"HTTP/1.1 200 X\r\nX-A: ", b"b" * 4096),
    "103 without end": goes_on(b"", b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n", 0.001),
    "a negative length": says(b"HTTP/1.1 200 X\r\nContent-Length: -5\r\n\r\n{}"),
    "two lengths": says(b"HTTP/1.1 200 X\r\nContent-Length: 2\r\nContent-Length: 9\r\n\r\n{}"),
    "an unknown transfer coding": says(b"HTTP/1.1 200 X\r\nTransfer-Encoding: brick\r\n\r\n{}"),
    "503 whose body has no end": goes_on(
        b"HTTP/1.1 503 X\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(b"x" * 4096)
    ),
}

NO_WORD: dict[str, Play] = {
    "a body that does not come": says_and_hangs(wild.response(200, b" " * 99)[:-99]),
    "half a body, then silence": says_and_hangs(wild.response(200, {"run_id": "x" * 50})[:-20]),
    "half a body, then the end": says(wild.response(200, {"run_id": "x" * 50})[:-20]),
    "a body by the byte": trickles(CHUNKED, chunk(b" ")),
    "a body without end": goes_on(CHUNKED, chunk(b" " * 65536)),
    "a chunk of no size": says(CHUNKED, b"zz\r\nabc\r\n"),
    "JSON that is a list": answers(200, []),
    "JSON that is a text": answers(200, "ok"),
    "null": answers(200, None),
    "JSON that is very deep": answers(200, b'{"run_id":' + b"[" * 100_000),
    "JSON with half a character": answers(200, b'{"run_id": "\\ud800"}'),
    "no UTF-8": answers(200, b'{"run_id": "\xff\xfe", "accepted": \xff}'),
    "nothing": answers(200),
    "204": says(b"HTTP/1.1 204 None\r\n\r\n"),
    "205": says(b"HTTP/1.1 205 None\r\nContent-Length: 0\r\n\r\n"),
    "an empty object": answers(200, {}),
    "an answer of somebody else": answers(200, {"status": "ok"}),
    "HTML": answers(200, HTML, Content_Type="text/html; charset=utf-8"),
    "HTML that is called JSON": answers(200, HTML),
    "HTML without end": goes_on(CHUNKED.replace(b"application/json", b"text/html"), chunk(b"<p>" * 10_000)),
    "a bomb": says(bomb()),
    "a bomb in a bomb": says(bomb(2)),
    "a coding that nobody knows": answers(200, b"\x0b\x02\x80{}\x03", Content_Encoding="br"),
    "gzip that is none": answers(200, b'{"run_id": "x", "accepted": 3}', Content_Encoding="gzip"),
    "true as a count, a number as an id": answers(200, {"accepted": True, "run_id": 5}),
    "a text as a count, null as an id": answers(200, {"accepted": "3", "run_id": None}),
    "a negative count, no id": answers(200, {"accepted": -3, "run_id": ""}),
    "a broken count, a list as an id": answers(200, {"accepted": 3.5, "run_id": ["x"]}),
    "a list as a count, a huge id": answers(200, {"accepted": [3], "run_id": "x" * 100_000}),
    "null as a count, an id of dots": answers(200, {"accepted": None, "run_id": ".."}),
    "an object as a count, an id with a line break": answers(200, {"accepted": {}, "run_id": "x\r\ny"}),
}
"""The status line says yes, and nothing that is needed comes after it."""


def pairs() -> Iterator[tuple[str, str]]:
    """Yield shapes and answers: briefly, an answer that is none in either shape is fired in one of them."""
    for number, what in enumerate(NO_ANSWER | NO_WORD):
        for shape in SHAPES:
            if LONG or "count" in what or number % 2 == SHAPES.index(shape):
                yield shape, what


@pytest.mark.parametrize(("server", "what"), list(pairs()), indirect=["server"])
def test_what_is_no_answer_is_asked_for_again(
    server: FaultyServer, destination: Destination, what: str
) -> None:
    """Given an answer that cannot be understood, nothing counts as delivered or is lost; all arrives once."""
    server.mode("raw", endpoint=data(server), play=(NO_ANSWER | NO_WORD)[what])
    record_run(destination)
    with Running(destination) as running:
        await_(lambda: server.fired["raw"] >= 2, "a second attempt")
        assert running.shipper.delivered == 0
        heal(server)
        await_(lambda: running.shipper.pending == 0, "delivery")
    assert arrived_once(server)
    assert quarantined(destination) == []


@pytest.mark.parametrize(
    "what", ["not HTTP", "headers, then silence", "a body by the byte", "HTML", "a bomb"]
)
def test_a_configuration_that_is_no_answer_is_asked_for_again(
    server: FaultyServer, destination: Destination, what: str
) -> None:
    """Given a server that cannot say which shape it takes, nobody guesses; all arrives in the right one."""
    server.mode("raw", endpoint="config", play=(NO_ANSWER | NO_WORD)[what])
    record_run(destination)
    with Running(destination) as running:
        await_(lambda: server.fired["raw"] >= 2, "a second attempt")
        assert server.count(data(server)) == 0
        heal(server)
        await_(lambda: running.shipper.pending == 0, "delivery")
    assert arrived_once(server)


AFTER_A_START = ("HTML", "HTML that is called JSON", "HTML without end", *NO_ANSWER)


@pytest.mark.parametrize(
    "endpoint", ["llm-calls", "steps", "complete"] if LONG else ["llm-calls", "complete"]
)
@pytest.mark.parametrize("what", AFTER_A_START if LONG else AFTER_A_START[:6])
def test_what_follows_a_start_is_asked_for_again(tmp_path: Path, endpoint: str, what: str) -> None:
    """Given no answer, or a page of somebody else's, in mid-run, what the server did not take goes again."""
    with FaultyServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "_BACKOFF_MOST_S", 0.05)
        patch.setattr(shipping, "_POLL_S", 0.01)
        patch.setattr(shipping, "_EXPORT_S", EXPORT_S)
        destination = Destination(server, tmp_path)
        server.mode("raw", endpoint=endpoint, play=(NO_ANSWER | NO_WORD)[what])
        step = Step(id="step", at=time.time(), run_id="a", name="plan", position=0)
        destination.append(started("a"), call("a"), step, ended("a"))
        with Running(destination) as running:
            await_(lambda: server.fired["raw"] >= 2, "a second attempt")
            heal(server)
            await_(lambda: running.shipper.pending == 0, "delivery")
        assert arrived_once(server)
        (run,) = server.runs.values()
        assert (len(run.steps), len(run.ends), server.violations) == (1, 1, [])
        assert quarantined(destination) == []


# -- answers that are good, and odd ----------------------------------------------------------------


def odd_but_good(server: FaultyServer) -> dict[str, Play]:
    good = {"run_id": "srv-1", "workflow_id": "srv-1"} if not server.ingest else {"accepted": 3}
    head = b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n"
    return {
        "after a 103": says(head * 3, wild.response(200, good)),
        "compressed, though nobody asked": says(wild.packed(good)),
        "in chunks of one byte": says(
            CHUNKED, *(chunk(bytes([byte])) for byte in json.dumps(good).encode()), b"0\r\n\r\n"
        ),
        "with unknown fields": answers(202, good | {"accepted_by": "x", "duplicates": None, "rejected": 7}),
        "more than was sent": answers(200, good | {"accepted": 10**9, "rejected": [{"id": "nobody's"}, 5]}),
    }


@pytest.mark.parametrize(
    "what",
    [
        "after a 103",
        "compressed, though nobody asked",
        "in chunks of one byte",
        "with unknown fields",
        "more than was sent",
    ],
)
def test_an_odd_answer_that_says_yes_is_believed(
    server: FaultyServer, destination: Destination, what: str
) -> None:
    """Given an answer that says what is needed in an unusual way, nothing is sent again; what it says of
    records that nobody sent changes nothing."""
    server.mode("raw", endpoint=data(server), times=1, processed=True, play=odd_but_good(server)[what])
    record_run(destination)
    with Running(destination) as running:
        await_(lambda: running.shipper.pending == 0, "delivery")
        assert (running.shipper.delivered, running.shipper.rejected) == (3, 0)
    assert server.fired["raw"] == 1
    assert server.count(data(server)) == 1
    assert arrived_once(server)
    assert quarantined(destination) == []


def test_a_record_of_which_an_answer_says_nothing_is_not_taken_for_delivered(tmp_path: Path) -> None:
    """Given a 200 of `ingest` that leaves one record out, that is found and kept aside; the rest arrives."""
    with FaultyServer(ingest=True) as server:
        destination = Destination(server, tmp_path)
        take = server._ingest

        def forgetful(request: Any) -> tuple[int, Any]:
            lines = request.body.splitlines()
            kept = [line for line in lines if b"forgotten" not in line]
            if len(kept) < len(lines):
                server.fired["forgotten"] += 1
            return take(dataclasses.replace(request, body=b"\n".join(kept)))

        server._ingest = forgetful  # type: ignore[method-assign]  # a server with a fault of its own
        record_run(destination)
        destination.append(call("b", 0, model="forgotten"), call("b", 1))
        with Running(destination) as running:
            await_(lambda: server.fired["forgotten"] >= 2 and running.shipper.pending == 0, "delivery")
            assert running.shipper.rejected == 1
        assert sorted(record["model"] for record in server.calls) == ["a-0", "b-1"]
    (kept,) = quarantined(destination)
    assert (kept["record"]["model"], kept["reason"]) == ("forgotten", "ingest: 200, not accounted for")


def test_rejections_of_every_shape_cost_only_what_they_name(tmp_path: Path) -> None:
    """Given a 200 of `ingest` with rejections of sent, unknown and nonsensical ids, only the sent one goes to
    quarantine, its reason bounded."""
    with FaultyServer(ingest=True) as server:
        destination = Destination(server, tmp_path)
        rejected = [
            {"id": "a-c0", "reason": "no " * 1000},
            {"id": "a-c0", "reason": {"a": ["b"]}},
            {"id": "somebody else's", "reason": "x"},
            {"id": 5, "reason": "x"},
            {"reason": "x"},
            "a-s",
            None,
        ]
        play = answers(200, {"accepted": 2, "duplicates": 0, "rejected": rejected})
        server.mode("raw", endpoint="ingest", times=1, play=play)
        record_run(destination)
        assert destination.ship().pending == 0
        assert server.fired["raw"] == 1
    (kept,) = quarantined(destination)
    assert kept["record"]["id"] == "a-c0"
    assert len(kept["reason"]) <= 220


# -- redirects, and the way out --------------------------------------------------------------------


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
def test_the_key_follows_no_redirect(
    server: FaultyServer, destination: Destination, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Given a redirect to another host, nobody goes there, with or without the key; it is said once, and all
    is kept, and arrives when it is gone."""
    caplog.set_level(logging.WARNING, "waxell_workers")
    with FaultyServer() as elsewhere, pytest.MonkeyPatch.context() as patch:
        away = answers(status, {}, Location=f"{elsewhere.url}/api/v1/observe/ingest/")
        server.mode("raw", endpoint=data(server), play=away)
        destination.settings = dataclasses.replace(destination.settings, api_key="wax_sk_secret")
        record_run(destination)
        with Running(destination) as running:
            await_(lambda: server.fired["raw"], "the redirect")
            running.goes_round(20)
            assert (server.fired["raw"], running.shipper.delivered) == (1, 0)
        assert len([record for record in caplog.records if "everything is kept" in record.message]) == 1
        patch.setattr(shipping, "_PAUSE_S", 0.05)
        with Running(destination) as running:
            await_(lambda: server.fired["raw"] >= 3, "more redirects")
            heal(server)
            await_(lambda: running.shipper.pending == 0, "delivery")
        assert (elsewhere.connections, elsewhere.requests) == (0, [])
    assert arrived_once(server)


@pytest.mark.parametrize("status", [401, 403, 407])
def test_a_refusal_without_an_end_is_not_waited_for(
    server: FaultyServer, destination: Destination, status: int
) -> None:
    """Given a refusal whose body never ends, the status is enough: the destination is paused at once."""
    head = f"HTTP/1.1 {status} X\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    server.mode("raw", endpoint=data(server), play=goes_on(head, chunk(b"x" * 4096)))
    record_run(destination)
    with Running(destination) as running:
        await_(lambda: server.fired["raw"], "the refusal")
        running.goes_round(20)
        assert (server.fired["raw"], running.shipper.delivered) == (1, 0)
    heal(server)
    assert destination.ship().pending == 0
    assert arrived_once(server)


@pytest.mark.parametrize(
    ("header", "waits"),
    [
        ("1", True),
        (f"{time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime(time.time() + 86400))}", True),
        ("31536000", True),
        ("9" * 400, True),
        ("soon", False),
        ("-7", False),
        ("nan", False),
        ("Mon, 99 Foo 20x6", False),
        ("Thu, 01 Jan 1970 00:00:00 GMT", False),
        ("\x00\xff", False),
    ],
    ids=["seconds", "date", "a year", "400 digits", "word", "negative", "nan", "no date", "past", "binary"],
)
@pytest.mark.parametrize("status", ["429", "503"] if LONG else ["503"])
def test_retry_after_of_every_kind(
    server: FaultyServer,
    destination: Destination,
    status: str,
    header: str,
    waits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Given a time to wait, nobody comes sooner, nor an hour later; given none that can be read, as ever."""
    monkeypatch.setattr(reading, "RETRY_AFTER_MAX_S", 0.5)
    head = f"HTTP/1.1 {status} X\r\nRetry-After: {header}\r\nContent-Length: 0\r\n\r\n".encode("latin-1")
    asked_at: list[float] = []

    def play(connection: socket.socket, still: Callable[[], bool]) -> None:
        asked_at.append(time.monotonic())
        connection.sendall(head)

    server.mode("raw", endpoint=data(server), play=play)
    record_run(destination)
    with Running(destination) as running:
        await_(lambda: len(asked_at) >= 2, "a second attempt")
        heal(server)
        await_(lambda: running.shipper.pending == 0, "delivery")
    if waits:
        assert asked_at[1] - asked_at[0] >= 0.5, "it came before its time"
    assert arrived_once(server)


# -- connections -----------------------------------------------------------------------------------


def record_much(destination: Destination, name: str = "a") -> None:
    """Record more than the buffers of a connection hold, however well it is compressed."""
    destination.append(started(name))
    for number in range(40):
        texts = {"prompt": secrets.token_hex(50_000), "metadata": {"more": secrets.token_hex(60_000)}}
        destination.append(call(name, number, **texts))
    destination.append(ended(name))


def test_a_server_that_reads_nothing_is_given_up_at_the_deadline(
    server: FaultyServer, destination: Destination
) -> None:
    """Given a connection on which nothing is read, a request that does not fit into its buffers ends at the
    deadline; all arrives later."""
    server.deaf = True
    record_much(destination)
    with Running(destination) as running:
        await_(lambda: server.fired["deaf"] >= 2, "a second attempt")
        assert running.shipper.delivered == 0
        heal(server)
        server.listens()
        await_(lambda: running.shipper.pending == 0, "delivery")
    assert len({record["model"] for record in server.calls}) == 40
    assert set(states(server).values()) == {"success"}


def test_a_request_that_is_cut_off_is_sent_again(server: FaultyServer, destination: Destination) -> None:
    """Given a connection that is reset while the request is on its way, it is sent again, whole."""
    rounds = 3
    cut = threading.Event()

    def cutter() -> None:
        # A second server on the way: it takes a part of the body and tears the connection down.
        for _ in range(rounds):
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(65536)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        listener.close()
        cut.set()

    server.mode("refuse")
    listener = _bound(server)
    listener.listen()
    threading.Thread(target=cutter, daemon=True).start()
    record_much(destination)
    with Running(destination) as running:
        await_(cut.is_set, f"{rounds} requests that were cut off")
        assert running.shipper.delivered == 0
        heal(server)
        await_(lambda: running.shipper.pending == 0, "delivery")
    assert sorted(record["model"] for record in server.calls) == sorted(f"a-{n}" for n in range(40))


def test_a_full_backlog_is_as_good_as_a_server_that_is_down(
    server: FaultyServer, destination: Destination
) -> None:
    """Given a server that no longer accepts, connecting ends at the deadline; all arrives once it does."""
    server.mode("refuse")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_bound(server))
        listener.listen(0)
        for _ in range(8):  # nobody accepts these
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        record_run(destination)
        with pytest.raises(TimeoutError):
            socket.create_connection(listener.getsockname(), 0.3)
        with Running(destination) as running:
            running.goes_round(3)
            assert (running.shipper.delivered, running.shipper.pending) == (0, 3)
    heal(server)
    assert destination.ship().pending == 0
    assert arrived_once(server)


def _bound(server: FaultyServer) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", int(server.url.rpartition(":")[2])))
    return listener


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make(tmp_path_factory.mktemp("certificates"))


@pytest.mark.parametrize("certificate", ["self_signed", "expired", "wrong_host"])
def test_a_certificate_that_is_not_to_be_trusted_gets_nothing(
    server: FaultyServer,
    destination: Destination,
    certificates: Certificates,
    certificate: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Given a server with such a certificate, it sees neither key nor record; with a good one it gets all."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
    destination.settings = dataclasses.replace(
        destination.settings, api_url=server.url.replace("http:", "https:")
    )
    server.tls = certificates.contexts[certificate]
    record_run(destination)
    with Running(destination) as running:
        await_(lambda: server.fired["tls"] >= 3, "more attempts")
        assert (server.requests, running.shipper.delivered) == ([], 0)
        heal(server)
        server.tls = certificates.contexts["good"]
        await_(lambda: running.shipper.pending == 0, "delivery")
    assert arrived_once(server)
    assert quarantined(destination) == []


def test_plain_http_to_a_port_that_speaks_tls_is_tried_again(
    server: FaultyServer, destination: Destination, certificates: Certificates
) -> None:
    """Given `http://` to a port with TLS, all is kept; it arrives when the port speaks HTTP."""
    server.tls = certificates.contexts["good"]
    record_run(destination)
    with Running(destination) as running:
        await_(lambda: server.fired["tls"] >= 3, "more attempts")
        assert (server.requests, running.shipper.delivered) == ([], 0)
        heal(server)
        server.tls = None
        await_(lambda: running.shipper.pending == 0, "delivery")
    assert arrived_once(server)


class Proxy:
    """An HTTP proxy that knows CONNECT, and answers it as it is told to."""

    def __init__(self) -> None:
        self.answer = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
        self.asked = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self._listener.accept()[:1], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(65536) or b"\r\n\r\n"
            self.asked += 1
            client.sendall(self.answer)
            if b" 200 " not in self.answer.partition(b"\n")[0]:
                return
            host, _, port = head.split()[1].decode().rpartition(":")
            with socket.create_connection((host, int(port))) as upstream:
                there = threading.Thread(target=_pour, args=(client, upstream), daemon=True)
                there.start()
                _pour(upstream, client)


def _pour(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while read := source.recv(65536):
            target.sendall(read)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    proxy = Proxy()
    yield proxy
    proxy.close()


@pytest.mark.parametrize("status", ["407", "502"])
def test_a_proxy_that_lets_nobody_through(
    server: FaultyServer,
    destination: Destination,
    certificates: Certificates,
    proxy: Proxy,
    status: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Given a proxy that demands a password, the destination is paused; given one in trouble, it is asked
    again. All arrives once it lets us through, and no log has the password."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
    monkeypatch.setenv("HTTPS_PROXY", f"http://ann:hunter2@{proxy.url}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    caplog.set_level(logging.DEBUG)
    server.tls = certificates.contexts["good"]
    proxy.answer = f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode()
    destination.settings = dataclasses.replace(
        destination.settings, api_url=server.url.replace("http:", "https:")
    )
    record_run(destination)
    with Running(destination) as running:
        await_(lambda: proxy.asked >= (1 if status == "407" else 3), "the proxy's answer")
        running.goes_round(20)
        assert (server.requests, running.shipper.delivered) == ([], 0)
        assert proxy.asked == 1 or status != "407", "it is tried again each minute, not each round"
    heal(server)
    proxy.answer = b"HTTP/1.1 200 Welcome\r\n\r\n"
    assert destination.ship().pending == 0
    assert arrived_once(server)
    assert "hunter2" not in caplog.text


# -- a shipper process -----------------------------------------------------------------------------

IN_A_PROCESS: dict[str, Callable[[FaultyServer], object]] = {
    "503": lambda server: server.mode("503", endpoint=data(server)),
    "429": lambda server: server.mode("429", endpoint=data(server), retry_after="0"),
    "reset of the request": lambda server: server.mode("reset", endpoint=data(server), where="request"),
    "reset of the reply": lambda server: server.mode("reset", endpoint=data(server), where="body"),
    "hang": lambda server: server.mode("hang", endpoint=data(server)),
    **{
        what: lambda server, play=play: server.mode("raw", endpoint=data(server), play=play)  # type: ignore[misc]
        for what, play in (NO_ANSWER | NO_WORD).items()
    },
}
SHORT = (
    *("503", "429", "reset of the request", "reset of the reply", "not HTTP", "103 without end"),
    *("headers without end", "a body without end", "a bomb", "a bomb in a bomb", "HTML", "204"),
)


@pytest.fixture
def process(server: FaultyServer, tmp_path: Path) -> Iterator[Destination]:
    """A destination for which a process may ship that a worker has started."""
    destination = Destination(server, tmp_path)
    yield destination
    end_shipper(destination)


def most_memory(process: psutil.Process) -> int:
    """Return the most that a process has ever had, in bytes; where nobody keeps count, what it has now."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return int(process.memory_info().rss)
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def flush(destination: Destination, timeout_s: float = 5.0) -> bool:
    """Ask the process to hurry; true if nothing is pending."""
    answer = request_flush(destination.directory, 0, time.monotonic() + timeout_s)
    return answer is not None and answer.pending == 0


def test_a_process_survives_whatever_a_server_answers(server: FaultyServer, process: Destination) -> None:
    """Given one answer after the other that makes no sense, the process that ships lives, stays as small as
    it was, and delivers each run once the server is well."""
    shipper = start_shipper(process)
    record_run(process, "first")
    await_(lambda: flush(process), "delivery of the first run")
    memory = most_memory(shipper)
    faults = list(IN_A_PROCESS) if LONG else list(SHORT)
    for number, what in enumerate(faults):
        before = server.fired.total()
        IN_A_PROCESS[what](server)
        record_run(process, f"r{number}")
        await_(lambda: flush(process, 0.2) or server.fired.total() > before, what)  # noqa: B023
        assert server.fired.total() > before, f"{what} did not fire"
        server.mode("healthy")
        await_(lambda: flush(process), f"delivery after {what}")
    grown = most_memory(shipper) - memory
    found("a process and a server out of its mind", faults=len(faults), grown_kib=grown >> 10)
    assert shipper.is_running()
    assert grown < MEMORY
    assert arrived_once(server, "first", *(f"r{number}" for number in range(len(faults))))
    assert quarantined(process) == []


@pytest.mark.parametrize(
    "fault", ["401", "402", "redirect"] if not LONG else ["401", "402", "403", "405", "redirect"]
)
def test_a_process_that_is_refused_keeps_all_for_the_next_one(
    server: FaultyServer, process: Destination, fault: str
) -> None:
    """Given a refusal, the process says so once in its log; killed, it leaves all to the next one."""
    server.mode(fault, endpoint=data(server))
    start_shipper(process)
    record_run(process)
    await_(lambda: flush(process, 0.2) or server.fired[fault], fault)
    assert not flush(process, 0.5)
    log = Path(process.directory, "shipper.log").read_text()
    assert log.count("everything is kept") == 1
    assert fault.replace("redirect", "307") in log
    end_shipper(process)
    server.mode("healthy")
    start_shipper(process)
    await_(lambda: flush(process), "delivery")
    assert arrived_once(server)


def test_a_name_that_is_not_there_costs_nothing(server: FaultyServer, process: Destination) -> None:
    """Given a host that no name server knows, the process keeps all; one with the right name delivers it."""
    right = process.settings
    process.settings = dataclasses.replace(right, api_url="http://no-such-host.invalid", api_key="k")
    start_shipper(process)
    record_run(process)
    log = Path(process.directory, "shipper.log")
    await_(lambda: flush(process, 0.5) or "config: ConnectError (gaierror)" in log.read_text(), "the failure")
    assert server.requests == []
    end_shipper(process)
    shipper = Shipper(right, process.directory, stay=False)
    shipper.stop(time.monotonic() + 30)
    assert shipper.run()
    assert shipper.pending == 0
    assert arrived_once(server)


def test_poison_in_every_place_costs_only_itself(server: FaultyServer, process: Destination) -> None:
    """Given records that the server refuses, scattered over many runs, each goes to quarantine alone, and
    everything else arrives, once."""
    runs = effort(12, 60)
    server.mode("reject", status=422, marker="poison")
    start_shipper(process)
    for number in range(runs):
        name = f"r{number}"
        process.append(started(name), call(name), call(name, 1, model="poison"), call(name, 2), ended(name))
    path = Path(process.directory, "quarantine.ndjson")
    await_(lambda: path.exists() and path.read_bytes().count(b"\n") == runs, "the quarantine")
    await_(lambda: set(states(server).values()) == {"success"} and len(server.runs) == runs, "the rest")
    assert server.fired["reject"] >= runs
    expected = sorted(f"r{number}-{which}" for number in range(runs) for which in (0, 2))
    assert sorted(record["model"] for record in server.calls) == expected
    assert [kept["record"]["model"] for kept in quarantined(process)] == ["poison"] * runs
    found("poison", records=runs, refusals=server.fired["reject"])
