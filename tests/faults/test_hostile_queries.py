"""Every parameter of every address with everything that does not belong there: the same rows or a 4xx."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest
from starlette.datastructures import QueryParams

from tests.faults.hostile import ANSWER_S, Server, cli, ended, paths, request, serving, started
from tests.torture import effort, found
from waxell_workers.server import Store, create_app

NAMES = [
    "tri_ge",
    "triage",
    "trixge",
    "%",
    "_",
    "a%",
    "'",
    "O'Brien; --",
    '"',
    "\\",
    "NULL",
    "1=1",
    "[a-z]*",
    "TRIAGE",
]
TEXTS = [
    "' OR '1'='1",
    "' OR 1=1 --",
    "'; DROP TABLE runs; --",
    '" OR ""="',
    "') UNION SELECT sql FROM sqlite_master --",
    "1; ATTACH DATABASE '/tmp/x' AS x",
    "x' AND randomblob(1000000000) --",
    "load_extension('x')",
    "%",
    "_",
    "tri%",
    "TRIAGE",
    "triage ",
    "triage\x00",
    "\x00",
    "?",
    ":agent",
    "$1",
    "\\",
    "\ufffd",
    "a" * 8_000,
    "%27 OR 1=1",
    "\u0130\u0131\u017f",
    "tri\u0430ge",
]
NUMBERS = [
    "0", "-1", "1e3", "1.5", "NaN", "nan", "Infinity", "-inf", "9223372036854775807", "9223372036854775808",
    "-9223372036854775809", "9" * 5_000, "0x10", "1_000", "+5", " 5", "5 ", "\u0665", "\u00b2", "true",
    "null", "[]", "1001", "1; DROP TABLE runs", "",
]  # fmt: skip
TIMES = [
    "2026-02-30",
    "2026-13-01T00:00:00",
    "0000-00-00",
    "0001-01-01T00:00:00",
    "0001-01-01T00:00:00+23:59",
    "0001-01-01T00:00:00-23:59",
    "9999-12-31T23:59:59.999999",
    "9999-12-31T23:59:59-23:59",
    "10000-01-01",
    "2026-01-01T25:00:00",
    "2026-01-01T00:00:60",
    "2026-01-01T00:00:00Z",
    "2026-01-01T00:00:00ZZ",
    "Z",
    "2026-01-01T00:00:00+99:99",
    "2026-W01-1",
    "20260101",
    "1790000000",
    "-1",
    "now",
    "2026-01-01' OR '1'='1",
    "r0' OR '1'='1",
    "R0",
]
EVIL = [*TEXTS, *NUMBERS, *TIMES]


def parameters() -> dict[str, set[str]]:
    """Return the query parameters that each address is seen to read: none can be forgotten."""
    read: dict[str, set[str]] = {}

    class Noted(QueryParams):
        def get(self, key: str, default: object = None) -> object:
            read[current].add(key)
            return super().get(key, default)

        def __getitem__(self, key: str) -> str:
            read[current].add(key)
            return super().__getitem__(key)

    async def ask() -> None:
        nonlocal current
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(store)), base_url="http://localhost"
        ) as client:
            for path in paths("GET"):
                current = path
                read[path] = set()
                await client.get(path)

    current = ""
    with Store() as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr("starlette.requests.QueryParams", Noted)
        asyncio.run(ask())
    return read


READ = parameters()
KNOWN = {
    "/": {"agent", "status", "before"},
    "/runs/r": set(),
    "/spend": {"by", "since"},
    "/api/runs": {"limit", "agent", "status", "before"},
    "/api/runs/r": {"subtotal"},
    "/api/runs/r/tree": set(),
    "/api/traces/x": set(),
    "/api/tasks/x": set(),
    "/api/queues": {"since", "limit"},
    "/api/spend": {"by", "since", "limit"},
    "/api/waste": {"since", "limit"},
    "/api/stats": {"agent"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with runs whose names mean something to SQL."""
    with serving(tmp_path_factory.mktemp("queries")) as server:
        for number, name in enumerate(NAMES):
            server.send(
                started(f"r{number}", agent_name=name),
                ended(f"r{number}", state="error" if number % 2 else "success"),
            )
        yield server


def rows(server: Server) -> list[object]:
    """Return every row of the table of runs, and the tables that there are."""
    with contextlib.closing(sqlite3.connect(f"file:{server.db}?mode=ro", uri=True)) as connection:
        return [
            connection.execute("SELECT * FROM runs ORDER BY run_id").fetchall(),
            connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall(),
        ]


def test_no_parameter_is_forgotten() -> None:
    """Given the server's routes, each parameter that one of them reads is tried below."""
    assert {path: names for path, names in READ.items() if not path.startswith("/api/v1/")} == KNOWN
    assert not any(names for path, names in READ.items() if path.startswith("/api/v1/"))


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in READ for name in sorted(READ[path])])
def test_what_stands_in_a_parameter_is_a_value(server: Server, path: str, name: str) -> None:
    """Given SQL, wildcards, numbers and times that are none, the answer is 200 or 400, nothing is changed."""
    before = rows(server)
    refused = 0
    allowed = (200, 400, 404) if path == "/api/runs/r" else (200, 400)  # there is no such run
    with httpx.Client(base_url=server.url, timeout=ANSWER_S) as client:
        for text in EVIL:
            for query in (
                f"{name}={quote(text)}",
                f"{name}=x&{name}={quote(text)}",
                f"limit=1000&{name}={quote(text)}",
            ):
                answer = client.get(f"{path}?{query}")
                assert answer.status_code in allowed, (query, answer.text)
                refused += answer.status_code == 400
                if answer.status_code == 200 and path == "/api/runs" and query.startswith(f"{name}="):
                    check(name, text, answer.json()["runs"])
        for raw in ("%ff%fe", "%", "%zz", "%00", "a&b=c;d", "%u0027", "+", "%2527", "=", "&&&", "[]=1"):
            assert client.get(f"{path}?{name}={raw}").status_code in allowed, raw
        many = "&".join(f"{name}={n}" for n in range(4_000))
        assert client.get(f"{path}?{many}").status_code in (*allowed, 414, 431)
    assert rows(server) == before
    server.lives()
    found("values of a parameter", of=f"{path} {name}", tried=3 * len(EVIL), refused=refused)


def check(name: str, text: str, runs: list[dict[str, object]]) -> None:
    """Fail unless a list has exactly what a filter asks for."""
    names = sorted(str(run["agent_name"]) for run in runs)
    if name == "agent" and text:
        assert names == [each for each in NAMES if each == text], text
    if name == "status" and text not in ("", "error", "success"):
        assert runs == [], text
    if name == "limit":
        assert text == "" or len(runs) <= 1000


def test_filters_combine_and_match_whole_names(server: Server) -> None:
    """Given names that are patterns to LIKE and GLOB, a filter finds that name and no other."""
    for number, name in enumerate(NAMES):
        status = "error" if number % 2 else "success"
        url = f"/api/runs?agent={quote(name)}&status={status}&before=9999-12-31&limit=1000"
        assert [run["run_id"] for run in server.get(url).json()["runs"]] == [f"r{number}"]
        listed = (
            cli("runs", "ls", "--agent", name, "--json", "--url", server.url) if number % 5 == 0 else None
        )
        assert listed is None or listed.stdout.count(b"\n") == 1
        assert server.get(f"/api/stats?agent={quote(name)}").json()["runs"] == {status: 1}


@pytest.mark.parametrize("text", [text for text in EVIL if "\x00" not in text and len(text) < 1000])
def test_an_id_in_a_path_is_a_value(server: Server, text: str) -> None:
    """Given anything in the place of a run's id, by any method, it is 404 or 400 and no other run's."""
    for template in (path for path in (*paths("GET", "@"), *paths("POST", "@")) if "@" in path):
        for method, body in (("GET", b""), ("POST", b'{"calls": [], "result": {}, "status": "error"}')):
            target = template.replace("@", quote(text, safe=""))
            answer = server.raw(request(method, target, body=body))
            status = int(answer.split(b" ", 2)[1])
            kept = "/memory/" in template or template.endswith("/partial/")  # taken, and not looked at
            assert status in (400, 404, 405, 307) or (kept and status == 200), (method, target, answer[:200])
    assert re.search("error|success", str(server.get("/api/stats").json()["runs"]))


def test_the_command_line_takes_no_sql(server: Server) -> None:
    """Given SQL as an argument of `runs`, from a server or a file, it finds nothing and changes nothing."""
    before = rows(server)
    for source in (("--url", server.url), ("--db", str(server.db))):
        for text in TEXTS[: effort(1, 5)]:
            for arguments in (("ls", "--agent", text), ("ls", "--status", text)):
                done = cli("runs", *arguments, "--json", *source)
                assert (done.returncode, done.stdout) == (0, b""), done.stderr
            done = cli("runs", "show", text, *source)
            assert done.returncode == 1
            assert b"Traceback" not in done.stderr
    assert rows(server) == before
