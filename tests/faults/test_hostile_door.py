"""Who is let in, over real sockets: keys, addresses, Host, other sites' pages, and paths that lead astray."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.hostile import (
    ANSWER_S,
    API,
    CLI,
    CLIENT,
    INGEST,
    KEY,
    STATIC,
    Server,
    ndjson,
    paths,
    request,
    serving,
    started,
)
from tests.harness import START_S, environment
from tests.torture import found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on loopback, without a key, that has a run."""
    with serving(tmp_path_factory.mktemp("door")) as server:
        server.send(started("r", agent_name="SECRET-NAME"))
        yield server


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on all addresses, with a key, that has a run."""
    with serving(tmp_path_factory.mktemp("open"), "--host", "0.0.0.0", key=KEY) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        server.send(started("r", agent_name="SECRET-NAME"))
        yield server


def content(db: Path) -> list[object]:
    """Return every row of every table."""
    with contextlib.closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as connection:
        names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        return [connection.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall() for (name,) in names]


EVERYTHING = [
    *(("GET", path) for path in (*paths("GET"), *STATIC, "/nothing", "/static/")),
    *(("POST", path) for path in paths("POST")),
]


# -- keys --------------------------------------------------------------------------------------


def basic(password: str, name: str = "any") -> str:
    """Return the header that a browser makes of a name and a password."""
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


NO_KEYS: dict[str, list[tuple[str, str]]] = {
    "missing": [],
    "empty": [("X-Wax-Key", "")],
    "wrong": [("X-Wax-Key", "wrong")],
    "one more": [("X-Wax-Key", KEY + "x")],
    "one less": [("X-Wax-Key", KEY[:-1])],
    "upper case": [("X-Wax-Key", KEY.upper())],
    "quoted": [("X-Wax-Key", f'"{KEY}"')],
    "a scheme before it": [("X-Wax-Key", f"Bearer {KEY}")],
    "twice, once right": [("X-Wax-Key", "wrong"), ("X-Wax-Key", KEY)],
    "twice, once wrong": [("X-Wax-Key", KEY), ("X-Wax-Key", "wrong")],
    "joined": [("X-Wax-Key", f"wrong, {KEY}")],
    "a byte that is no ASCII": [("X-Wax-Key", KEY + "\udcff")],
    "bearer": [("Authorization", f"Bearer {KEY}")],
    "basic, the name alone": [("Authorization", basic("", KEY))],
    "basic, wrong": [("Authorization", basic(KEY + "x"))],
    "basic, not base64": [("Authorization", f"Basic {KEY}")],
    "a cookie": [("Cookie", f"X-Wax-Key={KEY}; key={KEY}")],
    "another header": [("X-Api-Key", KEY), ("Api-Key", KEY)],
    "from here, it says": [("X-Forwarded-For", "127.0.0.1"), ("Forwarded", "for=127.0.0.1;host=localhost")],
    "for here, it says": [
        ("X-Forwarded-Host", "localhost"),
        ("X-Real-IP", "127.0.0.1"),
        ("X-Original-URL", "/"),
    ],
}


@pytest.mark.parametrize("name", NO_KEYS)
def test_no_route_opens_without_the_key(open_server: Server, name: str) -> None:
    """Given no key, or nearly one, every route answers 401, the static files too, and tells nothing."""
    for method, path in EVERYTHING:
        body = b'{"agent_name":"intruder"}' if method == "POST" else b""
        answer = open_server.raw(request(method, path, NO_KEYS[name], body))
        assert answer.startswith(b"HTTP/1.1 401 "), (method, path, answer[:100])
        assert b"SECRET-NAME" not in answer
        assert KEY.encode() not in answer
    assert b"intruder" not in json.dumps(open_server.get("/api/runs").json()).encode()


@pytest.mark.parametrize("query", [f"?key={KEY}", f"?X-Wax-Key={KEY}", f"?api_key={KEY}&token={KEY}"])
def test_a_key_in_an_address_is_none(open_server: Server, query: str) -> None:
    """Given the key in a query, the answer is 401: addresses end up in histories and logs."""
    for method, path in EVERYTHING:
        assert open_server.status(request(method, path + query)) == 401, path


def test_every_route_opens_with_the_key(open_server: Server) -> None:
    """Given the key as a header, no route refuses; as a browser's password, it opens what is read."""
    for method, path in EVERYTHING:
        body = b"{}" if method == "POST" else b""
        right = open_server.status(request(method, path, [("X-Wax-Key", KEY)], body))
        assert right in (200, 400, 404), (method, path, right)
        by_browser = open_server.status(request(method, path, [("Authorization", basic(KEY))], body))
        assert by_browser == (401 if method == "POST" else right), (method, path)
    challenge = CLIENT.get(open_server.url + "/")
    assert challenge.headers["www-authenticate"].startswith("Basic realm=")
    assert (
        "basic" not in CLIENT.get(open_server.url + "/api/runs").headers.get("www-authenticate", "").lower()
    )


def own_addresses() -> list[str]:
    """Return the IPv4 addresses of this machine that are not its loopback."""
    return [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]


def test_from_another_address_the_key_is_asked_for(open_server: Server) -> None:
    """Given the machine's own other address, a client needs the key, whatever it says of itself."""
    if not own_addresses():
        pytest.skip("this machine has no address but its loopback")
    for address in own_addresses():
        url = f"http://{address}:{open_server.port}"
        for headers in ({}, {"Host": "127.0.0.1"}, {"Host": "localhost", "X-Forwarded-For": "127.0.0.1"}):
            assert CLIENT.get(f"{url}/", headers=headers).status_code == 401
            assert CLIENT.post(url + INGEST, content=b"", headers=headers).status_code == 401
        assert CLIENT.get(f"{url}/api/runs", headers={"X-Wax-Key": KEY}).status_code == 200


def test_on_loopback_nobody_else_can_connect(server: Server) -> None:
    """Given a server on loopback, the machine's other addresses take no connection."""
    if not own_addresses():
        pytest.skip("this machine has no address but its loopback")
    for address in own_addresses():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, server.port), 5)


OPEN = ["0.0.0.0", "::", "192.0.2.1", "build-7.example", "0", "127.1.example", *own_addresses()[:1]]


UNUSABLE = ["  ", "\t", "schl\u00fcssel", "a b ", "line\nfeed"]


@pytest.mark.parametrize(
    ("host", "key"), [*((each, "") for each in OPEN), *(("0.0.0.0", key) for key in UNUSABLE)]
)
def test_beyond_loopback_it_does_not_start_without_a_usable_key(tmp_path: Path, host: str, key: str) -> None:
    """Given an open address and no key, or one that no client could send, it ends with 2 and a sentence."""
    command = [*CLI, "serve", "--host", host, "--port", "0", "--db", str(tmp_path / "db")]
    environ = environment(WAXELL_SERVER_API_KEY=key)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=START_S, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert "api_key" in done.stderr
    assert not key.strip() or key not in done.stderr
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2", "::"])
def test_each_address_that_it_may_bind_answers(tmp_path: Path, host: str) -> None:
    """Given a loopback address, or all of them with a key, it answers at the address that it says."""
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with serving(tmp_path, "--host", host, key=KEY if host == "::" else "") as server:
        url = server.url.replace("[::]", "[::1]")
        assert CLIENT.get(f"{url}/api/runs", headers=server.headers).json() == {"runs": []}
        assert CLIENT.get(f"{url}/api/runs").status_code == (401 if host == "::" else 200)
        assert CLIENT.get(f"{url}/", headers={"Host": "evil.example"}).status_code == (
            401 if host == "::" else 421
        )


# -- DNS rebinding -----------------------------------------------------------------------------

FOREIGN_HOSTS = [
    "evil.example",
    "EVIL.EXAMPLE:80",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "evil.example#.localhost",
    "evil.example/.localhost",
    "evil.example\\.localhost",
    "evil.example?.localhost",
    "localhost@evil.example",
    "evil.example@localhost",
    "evil.example:80@localhost",
    "localhost:80:evil.example",
    "localhost evil.example",
    "localhost,evil.example",
    "localhost.",
    "127.0.0.1.",
    "127.1",
    "0x7f000001",
    "2130706433",
    "0177.0.0.1",
    "0.0.0.0",
    "10.0.0.1",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[fe80::1]",
    "[::1",
    "::1",
    "[::1].evil.example",
    "[::1]evil.example",
    "localhost:port",
    "localhost:",
    "localhost:123456",
    ":80",
    "xn--lcalhost-54a",
    "l\u00f6calhost",
    "localhost\t",
]


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_foreign_host_reads_nothing(server: Server, host: str) -> None:
    """Given a page that resolves its own name to 127.0.0.1, every route refuses that name."""
    accepted = {"localhost\t": 200}  # spaces around a header's value belong to no value
    for method, path in EVERYTHING:
        answer = server.raw(request(method, path, body=b"{}" if method == "POST" else b"", host=host))
        status = int(answer.split(b" ", 2)[1])
        if host in accepted:
            assert status not in (421, 500)
            continue
        assert status in (400, 421), (path, answer[:100])
        assert b"SECRET-NAME" not in answer


def test_a_request_without_one_host_is_none(server: Server) -> None:
    """Given no Host, two of them, or HTTP/1.0 without one, nothing is read."""
    head = b"GET /api/runs HTTP/1.1\r\nConnection: close\r\n"
    for lines in (
        b"",
        b"Host: localhost\r\nHost: evil.example\r\n",
        b"Host: evil.example\r\nHost: localhost\r\n",
    ):
        assert server.status(head + lines + b"\r\n") in (400, 421)
    assert server.status(b"GET /api/runs HTTP/1.0\r\n\r\n") in (400, 421)
    assert server.status(b"GET /api/runs HTTP/1.0\r\nHost: evil.example\r\n\r\n") == 421
    for line in (b"Host : localhost\r\n", b"Host: local\r\n host\r\n", b"Host: localhost\x00\r\n"):
        assert server.status(head + line + b"\r\n") in (400, 421), line


def test_an_absolute_address_opens_nothing(server: Server) -> None:
    """Given a request line with another site's whole address, it is no path of ours."""
    for target in (
        "http://evil.example/api/runs",
        "http://localhost/api/runs",
        "//evil.example/api/runs",
        "evil.example:80",
        "*",
    ):
        answer = server.raw(request("GET", target))
        assert answer.split(b" ", 2)[1] in (b"400", b"404"), target
        assert b"SECRET-NAME" not in answer
    assert server.status(request("CONNECT", "evil.example:80")) in (400, 404, 405)


# -- other sites' pages ------------------------------------------------------------------------

FOREIGN: dict[str, list[tuple[str, str]]] = {
    "another site": [("Origin", "https://evil.example")],
    "a sandbox": [("Origin", "null")],
    "an empty one": [("Origin", "")],
    "a file": [("Origin", "file://")],
    "a name like ours": [("Origin", "http://127.0.0.1.evil.example")],
    "our name as a user": [("Origin", "http://127.0.0.1@evil.example")],
    "another port": [("Origin", "http://127.0.0.1:1")],
    "two of them": [("Origin", "http://127.0.0.1"), ("Origin", "https://evil.example")],
    "half an address": [("Origin", "http://[::1")],
    "an extension": [("Origin", "chrome-extension://abcdefgh")],
    "cross-site": [("Sec-Fetch-Site", "cross-site")],
    "same-site": [("Sec-Fetch-Site", "same-site")],
    "a new kind": [("Sec-Fetch-Site", "anything")],
    "a form": [("Content-Type", "application/x-www-form-urlencoded")],
    "a form with a file": [("Content-Type", "multipart/form-data; boundary=x")],
    "a form of text": [("Content-Type", "Text/Plain;charset=UTF-8")],
    "a beacon": [("Content-Type", "text/plain;application/json")],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_sites_page_writes_nothing(server: Server, name: str) -> None:
    """Given what a page of another site can send without asking, every route refuses it."""
    before = content(server.db)
    for path in paths("POST"):
        body = (
            ndjson([started("forged")])
            if path == INGEST
            else b'{"agent_name":"forged","agent_slug":"forged"}'
        )
        assert server.status(request("POST", path, FOREIGN[name], body)) in (403, 415), path
    assert content(server.db) == before


def test_what_our_own_page_and_programs_send_is_taken(server: Server) -> None:
    """Given our own origin, a program's JSON, or no word of where it comes from, the request is taken."""
    ours = f"127.0.0.1:{server.port}"
    for headers in (
        [],
        [("Content-Type", "application/json")],
        [("Content-Type", "application/x-ndjson")],
        [("Origin", f"http://{ours}"), ("Sec-Fetch-Site", "same-origin")],
        [("Sec-Fetch-Site", "none")],
    ):
        assert server.status(request("POST", f"{API}/events/", headers, b"{}", host=ours)) == 200, headers


def test_no_other_origin_is_ever_allowed(server: Server) -> None:
    """Given a preflight for any route, no CORS header answers, and there are no other methods."""
    wants = [("Origin", "https://evil.example"), ("Access-Control-Request-Method", "POST")]
    wants += [
        ("Access-Control-Request-Headers", "content-type"),
        ("Access-Control-Request-Private-Network", "true"),
    ]
    for _, path in EVERYTHING:
        for method in ("OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND"):
            answer = server.raw(request(method, path, wants)).lower()
            assert answer.split(b" ", 2)[1] in (b"403", b"404", b"405"), (method, path)
            assert b"access-control-" not in answer
        assert b"access-control-" not in server.raw(request("GET", path, wants[:1])).lower()


def test_no_get_changes_anything(server: Server) -> None:
    """Given every route, GET and HEAD, with whatever query, the database stays as it was."""
    before = content(server.db)
    for path in (*paths("GET"), *paths("POST"), *STATIC):
        for method in ("GET", "HEAD"):
            for query in ("", "?agent_name=x&method=POST&_method=DELETE&delete=1&run_id=r"):
                extra = [("X-HTTP-Method-Override", "POST")]
                assert server.status(request(method, path + query, extra)) in (200, 404, 405), path
    assert content(server.db) == before


def test_there_is_no_websocket(server: Server) -> None:
    """Given an upgrade, which no browser asks leave for, the server goes on in HTTP."""
    upgrade = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13")]
    upgrade += [
        ("Sec-WebSocket-Key", base64.b64encode(bytes(16)).decode()),
        ("Origin", "https://evil.example"),
    ]
    for path in ("/", "/api/runs", INGEST):
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n" + "".join(f"{n}: {v}\r\n" for n, v in upgrade)
        assert server.status(head.encode() + b"\r\n") in (200, 404, 405)
    h2c = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    assert server.status(h2c) in (0, 400, 421)
    server.lives()


# -- paths -------------------------------------------------------------------------------------

ASTRAY = [
    "/static/../app.py",
    "/static/..%2fapp.py",
    "/static/%2e%2e/app.py",
    "/static/%2e%2e%2f%2e%2e%2f%2e%2e%2f%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "/static/....//....//etc/passwd",
    "/static/..%5c..%5capp.py",
    "/static//etc/passwd",
    "/static/%2fetc%2fpasswd",
    "/static/style.css%00.js",
    "/static/.",
    "/static",
    "/static/%",
    "/static/%ff%fe",
    "/static/" + "a" * 300,
    "/static/" + "a/" * 3000,
    "/../../etc/passwd",
    "/runs/../../../etc/passwd",
    "/runs/..%2f..%2fetc%2fpasswd",
    "/runs/%2e%2e%2fapi%2fruns",
    "/runs/r%00",
    "/runs/r%00.html",
    "/runs/%27%20OR%20%271%27=%271",
    "/runs/r%22",
    "/runs/r%0d%0aSet-Cookie:%20x=1",
    "/runs/" + "r" * 10_000,
    "/api/runs/..",
    "/api/runs/%2e%2e%2fstats",
    "/api/runs/r%2f",
    "/api/runs//r",
    "//api/runs",
    "/api/runs/",
    "/API/RUNS",
    "/templates/run.html",
    "/runs.db",
    "/server/app.py",
    "/%2e",
    "/;/api/runs",
    "/api/v1/observe/prompts/..%2f..%2f..%2fetc%2fpasswd/",
    "/api/v1/observe/prompts/" + "x/" * 2000,
]


@pytest.mark.parametrize("target", ASTRAY, ids=[target[:50] for target in ASTRAY])
def test_a_path_leads_nowhere_but_to_a_route(server: Server, target: str) -> None:
    """Given a path with dots, encoded slashes, NULs or quotes, it is unknown, and no file is read."""
    for method, body in (("GET", b""), ("POST", b"{}")):
        answer = server.raw(request(method, target, body=body))
        status = int(answer.split(b" ", 2)[1])
        assert status in (307, 400, 404, 405), (method, answer[:200])
        for secret in (b"root:", b"import ", b"{% block", b"SQLite format", b"SECRET-NAME"):
            assert secret not in answer
        assert b"set-cookie" not in answer.lower()
        if status == 307:  # a slash too few or too many
            location = dict(line.split(b": ", 1) for line in answer.split(b"\r\n\r\n")[0].split(b"\r\n")[1:])[
                b"location"
            ]
            assert location.startswith((b"http://127.0.0.1/", b"/")), location
    server.lives()


def test_an_id_of_ten_megabytes_is_refused_or_cut(server: Server) -> None:
    """Given ids beyond all measure, in an address or a record, the answer is an error or a cut, and brief."""
    huge = "x" * 10_000_000
    assert server.status(request("GET", f"/runs/{huge}")) in (0, 400, 414, 431)
    huge = huge[:1_000_000]
    records = [
        started("ok", agent_name=huge, task_id=huge, session_id=huge, parent_run_id=huge),
        started("ok") | {"id": huge},
        started("ok") | {"id": "other", "run_id": huge},
    ]
    reply = server.post(INGEST, ndjson(records))
    assert len(reply.content) < 2_000
    assert (reply.json()["accepted"], len(reply.json()["rejected"])) == (1, 2)
    for path in ("/", "/runs/ok", "/api/runs", "/api/runs/ok"):
        answer = server.get(path)
        assert answer.status_code == 200
        assert len(answer.content) < 100_000, path
    for path in paths("POST", "ok"):
        if path != INGEST:
            fields = dict.fromkeys(
                ("agent_name", "agent_slug", "workflow_id", "status", "error", "date"), huge
            )
            assert server.post(path, fields).status_code == 200, path
    assert len(server.get("/").content) < 200_000
    found(
        "requests that should not be let in",
        routes=len(EVERYTHING),
        hosts=len(FOREIGN_HOSTS),
        keys=len(NO_KEYS),
    )


def test_a_connection_is_for_answers_alone(server: Server) -> None:
    """Given a refusal in the middle of a connection, what follows on it is judged for itself."""
    two = request("GET", "/api/runs", host="evil.example").replace(b"Connection: close\r\n", b"")
    two += request("GET", "/api/stats")
    with socket.create_connection(("127.0.0.1", server.port), ANSWER_S) as connection:
        connection.sendall(two)
        answers = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert answers.count(b"HTTP/1.1 ") == 2
    assert answers.startswith(b"HTTP/1.1 421 ")
    assert b"HTTP/1.1 200 " in answers
