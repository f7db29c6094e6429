"""Bodies that lie, swell, trickle or make no sense: a clear 4xx, bounded memory, others served meanwhile."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.faults.hostile import (
    ANSWER_S,
    API,
    CLIENT,
    INGEST,
    NOW,
    Server,
    call,
    ended,
    ndjson,
    paths,
    request,
    serving,
    started,
)
from tests.faults.test_hostile_content import RECORDS, by_rest
from tests.harness import await_
from tests.torture import effort, found
from waxell_workers.server.body import MAX_BYTES, MAX_MEMBERS, MAX_VALUES
from waxell_workers.server.values import LARGEST_MAPPING, MAX_DEPTH

MEMORY_MIB = 500
"""The most that the server may have resident, whatever is sent: some bodies of 32 MiB, and objects of one."""

IMPATIENT = (
    "import waxell_workers.server.body as body, waxell_workers.server.connections as connections\n"
    "connections.PATIENCE_S, connections._LOOKS_S, body.BODY_S = 2.0, 0.5, 3.0\n"
)
"""The deadlines, shortened in the process itself."""

GZIP = {"content-encoding": "gzip"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a run named r."""
    with serving(tmp_path_factory.mktemp("bodies")) as server:
        server.send(started("r"))
        yield server


def all_pages(server: Server, *runs: str) -> None:
    """Fail unless every page and list can be read, and says nothing that is no JSON."""
    for path in ("/", "/api/runs?limit=1000", "/api/stats"):
        assert server.get(path).status_code == 200, (path, server.said[-2000:])
    for run in runs:
        assert server.get(f"/runs/{run}").status_code == 200, (run, server.said[-2000:])
        assert server.get(f"/api/runs/{run}").json()["run_id"] == run


# -- what makes no sense -----------------------------------------------------------------------

MALFORMED = {
    "empty": b"",
    "torn": b'{"agent_name": "a"',
    "a list": b"[1, 2]",
    "a string": b'"x"',
    "nothing": b"null",
    "no JSON": b"<xml/>",
    "two objects": b"{}{}",
    "a comma too many": b'{"a": 1,}',
    "not UTF-8": b'{"agent_name": "\xff\xfe"}',
    "too long an encoding": b'{"agent_name": "\xc0\x80"}',
    "UTF-16": '{"agent_name": "a"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"agent_name": "a"}',
    "half a surrogate pair": b'{"agent_name": "\\ud800"}',
    "raw control characters": b'{"agent_name": "\x00\x01"}',
    "no number": b'{"agent_name": NaN}',
    "infinity": b'{"agent_name": -Infinity}',
    "beyond numbers": b'{"agent_name": 1e999}',
    "a number of many digits": b'{"agent_name": ' + b"9" * 5000 + b"}",
    "deep": b'{"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "just too deep": b'{"agent_name": "a", "x": ' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}",
    "deep and torn": b"[" * 5_000_000,
    "many values": b'{"agent_name": "a", "x": [' + b"0," * (MAX_VALUES + 1) + b"0]}",
    "a binary": bytes(range(256)) * 10,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_makes_no_sense_is_refused_with_a_reason(server: Server, name: str) -> None:
    """Given a body that is no JSON object, each endpoint answers 4xx with a reason, ingest line by line."""
    before = server.get("/api/stats").json()
    for path in paths("POST"):
        answer = server.post(path, MALFORMED[name])
        reply = answer.json()
        assert len(answer.content) < 5_000
        if path == INGEST:
            assert answer.status_code == 200
            assert (reply["accepted"], len(reply["rejected"])) == (
                0,
                0 if name == "empty" else 1,
            ) or b"\n" in MALFORMED[name]
        else:
            assert answer.status_code in (400, 413), (path, reply)
            assert reply["error"]
    assert server.get("/api/stats").json() == before
    server.lives()


def test_names_that_come_twice_are_taken_once(server: Server) -> None:
    """Given duplicate keys, the last one counts, for the checks as for the store."""
    line = json.dumps(started("twice"))[:-1] + ', "run_id": "../evil", "id": ""}'
    assert server.post(INGEST, line.encode()).json()["accepted"] == 0
    line = '{"id": "", "run_id": "../evil", ' + json.dumps(started("twice"))[1:]
    assert server.post(INGEST, line.encode()).json()["accepted"] == 1
    all_pages(server, "twice")


WRONG: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    2**53 + 1,
    -(2**63),
    2**64,
    1.7e308,
    -1e-320,
    "",
    "x",
    "\x00",
    [],
    [[]],
    {},
    {"": None},
]


def test_the_wrong_type_in_any_field_of_a_record_spoils_no_page(server: Server) -> None:
    """Given each field of each record with each wrong type, it is taken or rejected, and pages go on."""
    records = []
    for kind in RECORDS:
        names = [each.name for each in msgspec.structs.fields(kind)]
        for name in [*names, "kind", "unknown"]:
            for number, value in enumerate(WRONG):
                base = {
                    "kind": kind.__struct_config__.tag,
                    "id": f"{kind.__name__}-{name}-{number}",
                    "at": NOW,
                }
                base |= {
                    "run_id": "wrong",
                    "agent_name": "a",
                    "model": "m",
                    "name": "n",
                    "task_id": "t",
                    "reason": "r",
                }
                records.append(base | {name: value})
    answer = server.post(INGEST, ndjson(records))
    assert answer.status_code == 200, (answer.text, server.said[-2000:])
    reply = answer.json()
    assert reply["accepted"] > 100
    assert len(reply["rejected"]) > 100
    assert reply["accepted"] + reply["duplicates"] + len(reply["rejected"]) == len(records)
    assert all(each["reason"] for each in reply["rejected"])
    all_pages(server, "wrong")
    found("wrong types in fields of records", sent=len(records), rejected=len(reply["rejected"]))


def everywhere(body: Any, value: Any) -> Iterator[Any]:
    """Yield copies of a body, each with `value` in one other place."""
    places = body.items() if isinstance(body, dict) else enumerate(body)
    for name, item in list(places):
        yield _with(body, name, value)
        if isinstance(item, (dict, list)):
            for inner in everywhere(item, value):
                yield _with(body, name, inner)


def _with(body: Any, name: Any, value: Any) -> Any:
    copy = dict(body) if isinstance(body, dict) else list(body)
    copy[name] = value
    return copy


def test_the_wrong_type_in_any_field_of_rest_spoils_no_page(server: Server) -> None:
    """Given each field of each body with each wrong type, the answer is 200 or 400, and pages go on."""
    sent = 0
    with httpx.Client(base_url=server.url, timeout=ANSWER_S) as client:
        assert (
            client.post(f"{API}/runs/start/", json=by_rest("a", "rest")[f"{API}/runs/start/"]).status_code
            == 200
        )
        for path, body in by_rest("a", "rest").items():
            for value in WRONG if effort(0, 1) else WRONG[::3]:
                for wrong in everywhere(body, value):
                    answer = client.post(path, content=msgspec.json.encode(wrong))
                    assert answer.status_code in (200, 400), (path, wrong, answer.text)
                    sent += 1
    all_pages(server, "rest")
    assert sent > 300
    found("wrong types in fields of the protocol", sent=sent)


def test_no_sum_and_no_depth_spoils_the_list_of_all_runs(server: Server) -> None:
    """Given numbers whose sum no database holds, and the deepest nesting that is taken, lists are made."""
    deep: Any = 1
    for _ in range(MAX_DEPTH - 3):
        deep = [deep]
    most: dict[str, Any] = {"tokens_in": 2**53, "tokens_out": 2**53, "cost_usd": 1e12}
    many = [call("sum0", f"c-0-{n}", **most) for n in range(1100)]
    server.send(started("sum0", inputs={"deep": deep}, metadata={"deep": deep}), *many)
    server.send(*(call(f"sum{n}", f"c-{n}", **most) for n in range(1, 1100)))
    server.send(
        call("sum0", "inf-1", cost_usd=1.7e308, duration_ms=1.7e308), call("sum0", "inf-2", cost_usd=1.7e308)
    )
    server.send(ended("sum0", duration_ms=1.7e308, result=deep))
    all_pages(server, "sum0", "sum1", "sum2")
    stats = server.get("/api/stats").json()
    assert stats["tokens_in"] == stats["tokens_out"] == 2**63 - 1
    assert server.get("/api/runs/sum0").json()["tokens_in"] == 2**53
    assert stats["cost_usd"] >= 2199e12


def test_a_record_that_fills_a_page_is_cut_visibly(server: Server) -> None:
    """Given very large texts and metadata, lists and pages stay small, and the JSON has the content."""
    big = "\x00" + "y" * 3_000_000
    server.send(
        started("big", metadata={"kept": 1, "large": "z" * 1_000_000}, inputs={"text": big}),
        call("big", "c-big", prompt=big, response=big, metadata={"x": big}),
        {"kind": "step", "id": "st-big", "at": NOW, "run_id": "big", "name": "n", "output": big},
        ended("big", state="error", error_message="e" * 1_000_000, traceback=big),
    )
    listed = next(
        run for run in server.get("/api/runs?agent=triage").json()["runs"] if run["run_id"] == "big"
    )
    assert listed["metadata"]["kept"] == 1
    assert "large" in listed["metadata"]["not kept here"]
    assert len(json.dumps(listed)) < LARGEST_MAPPING + 40_000
    page = server.get("/runs/big").text
    assert len(page) < 200_000
    assert "too long for a page" in page
    assert "cut here" in page
    whole = server.get("/api/runs/big").json()
    assert whole["calls"][0]["prompt"] == whole["steps"][0]["output"] == whole["traceback"] == big


# -- what swells -------------------------------------------------------------------------------


def bomb(size: int, chunk: bytes = bytes(1 << 20)) -> bytes:
    """Return gzip of `size` bytes."""
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(chunk) for _ in range(size // len(chunk))]
    return b"".join([*parts, packer.flush()])


LISTS = b'{"kind":"run_started","id":"z","at":1790000000,"run_id":"z","agent_name":"x","inputs":{"a":['
SWELLING = {
    "zeros": lambda: (bomb(1 << 30), 413),
    "newlines": lambda: (bomb(31 << 20, b"\n" * (1 << 20)), 413),
    "just too large": lambda: (bomb(MAX_BYTES + (1 << 20)), 413),
    "a bomb in a bomb": lambda: (gzip.compress(bomb(1 << 30)), 200),
    "values": lambda: (gzip.compress(LISTS + b"[]," * ((MAX_BYTES - 300) // 3) + b"1]}}"), 200),
    "objects": lambda: (gzip.compress(LISTS + b"{}," * (MAX_VALUES // 2 - 100) + b"1]}}"), 200),
    "lines": lambda: (gzip.compress(b"{}\n" * 60_000), 413),
    "members": lambda: (gzip.compress(b"", mtime=0) * (MAX_BYTES // 20), 400),
    "as many members as may be": lambda: (gzip.compress(b"", mtime=0) * MAX_MEMBERS, 200),
    "truncated": lambda: (gzip.compress(ndjson([started("t")]))[:-9], 400),
    "without its checksum": lambda: (gzip.compress(ndjson([started("t")]))[:-8] + bytes(8), 400),
    "followed by noise": lambda: (gzip.compress(ndjson([started("t")])) + b"noise", 400),
    "not gzip": lambda: (b"{}", 400),
    "zlib": lambda: (zlib.compress(ndjson([started("t")])), 400),
}


@pytest.mark.parametrize("name", SWELLING)
def test_a_body_that_swells_is_stopped(server: Server, name: str) -> None:
    """Given compression that hides something large or broken, the answer is clear and memory is bounded."""
    body, status = SWELLING[name]()
    server.forget_memory()
    answer = server.post(INGEST, body, headers=GZIP)
    assert answer.status_code == status, answer.text
    assert len(answer.content) < 1_000
    assert server.memory_mib() < MEMORY_MIB
    server.lives()


@pytest.mark.parametrize(
    "encoding", ["zstd", "deflate", "br", "compress", "gzip, gzip", "gzip,identity", "gzip;q=1", "\u00e9"]
)
def test_other_compressions_are_refused(server: Server, encoding: str) -> None:
    """Given a compression that is not understood, also one of several layers, the answer is 415."""
    headers = {"content-encoding": encoding.encode("utf-8")}
    answer = server.post(INGEST, gzip.compress(ndjson([started("enc")])), headers=headers)
    assert answer.status_code == 415
    assert "gzip" in answer.json()["error"]
    twice = request("POST", INGEST, [("Content-Encoding", "gzip"), ("Content-Encoding", "gzip")], b"x")
    assert server.status(twice) == 415
    assert server.get("/api/runs/enc").status_code == 404


def test_a_length_that_lies_does_no_harm(server: Server) -> None:
    """Given a Content-Length that is too large, negative, huge, doubled or no number, nothing is stored."""
    record = ndjson([started("liar")])
    for length in (str(len(record) + 50), "-1", "1e3", "0x10", "+5", "9" * 30, "5, 6", "", " ", "\u0665"):
        head = f"POST {INGEST} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), ANSWER_S) as connection:
            connection.sendall(head.encode() + record)
            connection.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                answer = connection.recv(65_536)
                assert not answer or answer.split(b" ", 2)[1] in (b"400", b"413"), (length, answer)
    assert server.get("/api/runs/liar").status_code == 404
    short = request("POST", INGEST, body=record).replace(
        b"Content-Length: %d" % len(record), b"Content-Length: 3"
    )
    assert server.status(short) == 200  # the rest is no request
    assert server.get("/api/runs/liar").status_code == 404
    server.lives()


def test_a_body_without_end_is_cut_off(server: Server) -> None:
    """Given chunks that never end, the client is answered 413 after a while, and nothing of it is held."""
    server.forget_memory()
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port), ANSWER_S) as connection:
        connection.sendall(
            f"POST {INGEST} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        with suppress(ConnectionError):
            while sent < 4096:
                connection.sendall(chunk)
                sent += 1
        with suppress(ConnectionError):
            assert connection.recv(12) == b"HTTP/1.1 413"
    assert 32 < sent < 1000
    assert server.memory_mib() < MEMORY_MIB
    server.lives()


def test_large_bodies_at_once_share_a_bounded_memory(server: Server) -> None:
    """Given 40 clients that send 30 MiB each at once, memory is bounded, and each is answered 200 or 503."""
    server.forget_memory()
    body = b'{"x": "' + b"y" * (30 << 20) + b'"}'
    answers: list[int] = []

    def send() -> None:
        for _ in range(effort(1, 5)):
            answers.append(server.post(f"{API}/events/", body).status_code)

    threads = [threading.Thread(target=send) for _ in range(40)]
    for thread in threads:
        thread.start()
    assert CLIENT.get(f"{server.url}/api/stats", timeout=ANSWER_S).status_code == 200
    for thread in threads:
        thread.join()
    peak = server.memory_mib()
    found("large bodies at once", taken=answers.count(200), sent_away=answers.count(503), peak_mib=peak)
    assert set(answers) <= {200, 503}
    assert 200 in answers
    assert len(answers) == 40 * effort(1, 5)
    assert peak < MEMORY_MIB
    assert server.post(f"{API}/events/", body).status_code == 200  # there is room again


def test_a_header_flood_is_refused(server: Server) -> None:
    """Given headers without measure, the answer is 4xx or none, and memory is bounded."""
    server.forget_memory()
    for headers in (
        [("X-Long", "x" * 50_000_000)],
        [(f"X-{n}", "y" * 100) for n in range(200_000)],
        [("X-Same", "")] * 500_000,
        [("Cookie", "a=b; " * 1_000_000)],
        [("y" * 10_000_000, "x")],
    ):
        assert server.status(request("GET", "/", headers)) in (0, 400, 431)
    assert server.memory_mib() < MEMORY_MIB
    server.lives()


# -- what is not what it seems -----------------------------------------------------------------

SMUGGLED = b"POST /api/v1/observe/runs/daily/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 24\r\n\r\n"
SMUGGLED += b'{"agent_slug":"smuggled"}'[:24]
AMBIGUOUS = {
    "both lengths": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both, the other way": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n00000",
    "a coding that is none": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two codings": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "coding twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "a space before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a folded line": b"X: y\r\n Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a size that is none": b"Transfer-Encoding: chunked\r\n\r\n-5\r\n00000\r\n0\r\n\r\n",
    "a size of many digits": b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n",
    "a size with 0x": b"Transfer-Encoding: chunked\r\n\r\n0x5\r\n00000\r\n0\r\n\r\n",
    "a chunk that is longer": b"Transfer-Encoding: chunked\r\n\r\n5\r\n0000000\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_no_request_hides_in_another(server: Server, name: str) -> None:
    """Given a body whose end two readers would see in two places, it is refused and the connection closed."""
    head = f"POST {API}/events/ HTTP/1.1\r\nHost: localhost\r\n".encode()
    answer = server.raw(head + AMBIGUOUS[name] + SMUGGLED)
    assert answer.count(b"HTTP/1.1 ") <= 1, answer
    assert not answer or answer.split(b" ", 2)[1] in (b"400", b"501"), answer
    names = [run["agent_name"] for run in server.get("/api/runs?limit=1000").json()["runs"]]
    assert "smuggled" not in " ".join(names)


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    """Given a hundred requests in one write, each has its answer, in order, and a thousand hold no memory."""
    server.forget_memory()
    wanted = []
    data = b""
    for number in range(100):
        path = ("/api/stats", "/nothing", f"{API}/events/")[number % 3]
        body = b"{}" if path.startswith(API) else b""
        one = request("POST" if body else "GET", path, body=body)
        data += one if number == 99 else one.replace(b"Connection: close\r\n", b"")
        wanted.append(b"404" if path == "/nothing" else b"200")
    answer = server.raw(data)
    assert [part.split(b" ", 1)[0] for part in answer.split(b"HTTP/1.1 ")[1:]] == wanted
    server.raw(
        request("GET", "/api/stats").replace(b"Connection: close\r\n", b"") * 1_000 + request("GET", "/")
    )
    assert server.memory_mib() < MEMORY_MIB


# -- what trickles -----------------------------------------------------------------------------


def test_clients_that_dawdle_are_cut_off_and_hold_up_nobody(tmp_path: Path) -> None:
    """Given hundreds of connections that trickle headers or bodies, others are served, and all are ended."""
    count = effort(300, 800)
    with serving(tmp_path, before=IMPATIENT) as server, ExitStack() as stack:
        server.forget_memory()
        address = ("127.0.0.1", server.port)
        dawdlers = [
            stack.enter_context(socket.create_connection(address, ANSWER_S)) for _ in range(count + 60)
        ]
        body = f"POST {INGEST} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n".encode()
        for number, each in enumerate(dawdlers):
            each.sendall(body if number < 60 else b"GET / HTTP/1.1\r\nHost: local")
        cut: set[int] = set()

        def all_cut() -> bool:
            for number, each in enumerate(dawdlers):
                if number in cut:
                    continue
                try:
                    each.setblocking(False)
                    each.send(b"x")  # one byte at a time, and never the end
                    if each.recv(4096) == b"":
                        cut.add(number)
                except BlockingIOError:
                    pass
                except OSError:
                    cut.add(number)
            answer = CLIENT.get(f"{server.url}/api/stats")
            assert answer.status_code == 200
            return len(cut) == len(dawdlers)

        assert not all_cut()  # they did hold a connection
        await_(all_cut, "end of all connections that dawdle", 60)
        assert server.send(started("after"))["accepted"] == 1
        assert server.memory_mib() < MEMORY_MIB
        found("clients that dawdled, and were cut off", clients=len(cut), peak_mib=server.memory_mib())


def test_a_slow_body_is_told_so(tmp_path: Path) -> None:
    """Given a body that does not come to its end, the client reads 408, and one that is in time is stored."""
    with serving(tmp_path, before=IMPATIENT) as server:
        record = ndjson([started("slow")])
        head = f"POST {INGEST} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(record)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port), ANSWER_S) as connection:
            connection.sendall(head + record[:-1])
            assert connection.recv(12) == b"HTTP/1.1 408"
        with socket.create_connection(("127.0.0.1", server.port), ANSWER_S) as connection:
            connection.sendall(head + record[:-1])
            time.sleep(0.5)  # slow, but within what it may take
            connection.sendall(record[-1:])
            assert connection.recv(12) == b"HTTP/1.1 200"


def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    """Given a large answer that nobody reads, the connection ends, and its memory is free again."""
    with serving(tmp_path, before=IMPATIENT) as server:
        server.send(started("large"), *(call("large", f"c{n}", prompt="p" * 200_000) for n in range(100)))
        server.forget_memory()
        with ExitStack() as stack:
            lazy = [
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), ANSWER_S))
                for _ in range(30)
            ]
            for each in lazy:
                each.sendall(request("GET", "/api/runs/large"))

            def ended_by_the_server() -> bool:
                states = Path(f"/proc/{server.process.pid}/net/tcp").read_text().splitlines()
                own = f":{server.port:04X}"
                return sum(line.split()[1].endswith(own) and line.split()[3] == "01" for line in states) == 0

            assert not ended_by_the_server()
            await_(ended_by_the_server, "end of the connections that nobody reads", 60)
        assert len(server.get("/api/runs/large").json()["calls"]) == 100
        assert server.memory_mib() < MEMORY_MIB


def test_a_client_that_leaves_in_the_middle_leaves_nothing(server: Server) -> None:
    """Given clients that break off in headers, bodies and answers, nothing is stored, and others go on."""
    record = ndjson([started("gone")])
    whole = request("POST", INGEST, body=record)
    for end in range(1, len(whole) - 1, effort(7, 1)):
        with socket.create_connection(("127.0.0.1", server.port), ANSWER_S) as connection:
            connection.sendall(whole[:end])
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port), ANSWER_S) as connection:
            connection.sendall(request("GET", "/"))
    server.lives()
    assert server.get("/api/runs/gone").status_code == 404
