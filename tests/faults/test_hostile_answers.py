"""What answers at an address may be anything: `doctor` and `runs` say so, end, and obey nothing of it."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from click.testing import CliRunner

from tests.faults.test_hostile_content import HOSTILE, obeyed
from tests.harness import environment
from tests.torture import effort, found
from waxell_workers.cli.commands import cli
from waxell_workers.server.model import Call, RunDetail, RunSummary

RUN_S = 120.0
LIMITED = (
    "import resource, sys\n"
    "resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29))\n"
    "from waxell_workers.cli.main import main\n"
    "main()\n"
)
"""The command line with 1.5 GiB of address space: more would be a MemoryError."""

EVIL = "".join(HOSTILE.values())
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\n"


def reply(body: bytes, head: bytes = HEAD) -> list[bytes]:
    """Return an answer as it goes over the wire."""
    return [head + b"Content-Length: %d\r\n\r\n" % len(body), body]


def as_json(value: object) -> list[bytes]:
    """Return an answer of JSON."""
    return reply(json.dumps(value).encode())


def shaped(kind: type, text: str) -> dict[str, object]:
    """Return what a server of ours would answer, with `text` in each text."""
    values: dict[str, object] = {}
    for name, hint in kind.__annotations__.items():
        if "dict" in str(hint):
            values[name] = {text: text, "n": [text]}
        elif "list" in str(hint):
            values[name] = []
        elif "str" in str(hint):
            values[name] = text
        elif "Any" in str(hint):
            values[name] = [text]
        else:
            values[name] = 1
    return values


def endless(part: bytes) -> Iterator[bytes]:
    while True:
        yield part


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


WELL: dict[str, list[bytes]] = {
    "a list": as_json({"runs": [shaped(RunSummary, text) for text in HOSTILE.values()]}),
    "a run": as_json(shaped(RunDetail, EVIL) | {"calls": [shaped(Call, EVIL)] * 3}),
    "a configuration": as_json({"ingest_endpoint": EVIL, "otel_endpoint": EVIL, "tenant_id": EVIL}),
}
"""Answers of the right shape."""

BOMB = gzip.compress(b" " * (1 << 30), 1)
ODD: dict[str, list[bytes] | Iterator[bytes]] = {
    "a reason": [b"HTTP/1.1 500 \x1b[2J\x1b]0;owned\x07\r\nContent-Length: 0\r\n\r\n"],
    "headers": [b"HTTP/1.1 503 No\r\nRetry-After: \x1b[31m\r\nServer: \x9b31m\r\nContent-Length: 0\r\n\r\n"],
    "a redirect to a file": [
        b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"
    ],
    "a redirect that is none": [b"HTTP/1.1 307 Go\r\nLocation: \x1b[2J\r\nContent-Length: 0\r\n\r\n"],
    "a page": reply(EVIL.encode("utf-8", "replace"), HEAD.replace(b"application/json", b"text/html")),
    "nothing": [],
    "an empty body": reply(b""),
    "noise": [bytes(range(256)) * 100],
    "a status that is none": [b"HTTP/1.1 999 \x1b[2J\r\nContent-Length: 0\r\n\r\n"],
    "another protocol": [b"SSH-2.0-\x1b[2J\r\n"],
    "no JSON": reply(b"\x1b[2J{"),
    "not UTF-8": reply(b'{"runs": "\xff\xfe"}'),
    "null": as_json(None),
    "a number of runs": as_json({"runs": 5}),
    "runs that are none": as_json({"runs": [None, 5, {}]}),
    "runs without fields": as_json({"runs": [{"run_id": "r", EVIL: EVIL}]}),
    "wrong types": as_json({"runs": [shaped(RunSummary, "x") | {"metadata": [], "tokens_in": "many"}]}),
    "numbers without end": reply(b'{"runs": [' + b"9" * 100_000 + b"]}"),
    "infinity": reply(b'{"runs": [], "x": Infinity}'),
    "deep": reply(b'{"runs": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "too short": [HEAD + b'Content-Length: 1000\r\n\r\n{"runs": []}'],
    "headers without end": endless(b"X-Y: " + b"z" * 60_000 + b"\r\n"),
    "a body without end": endless(chunk(b" " * (1 << 20))),
    "a bomb": reply(BOMB, HEAD + b"Content-Encoding: gzip\r\n"),
    "a compression that is none": reply(b"\x1b[2J", HEAD + b"Content-Encoding: gzip\r\n"),
}
LARGE = ("headers without end", "a body without end", "a bomb")
FIRST = {
    "headers without end": b"HTTP/1.1 200 OK\r\n",
    "a body without end": HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
}


@contextmanager
def answering(name: str, parts: list[bytes] | Iterator[bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """Answer every connection in the same way; yield the address, and what was asked."""
    asked: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            heard = connection.recv(65_536)
            if not heard:
                return  # somebody who only looked whether the port is open
            asked.append(heard)
            connection.sendall(FIRST.get(name, b""))
            for part in parts:
                connection.sendall(part)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        listener.shutdown(socket.SHUT_RDWR)


def command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command line with little memory."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments],
        env=environment(COLUMNS="200", **environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=RUN_S,
        check=False,
    )
    assert b"Traceback" not in done.stderr, done.stderr[-3000:]
    assert obeyed(done.stdout) == set(), done.stdout
    assert obeyed(done.stderr) == set(), done.stderr
    assert len(done.stdout) + len(done.stderr) < 300_000
    return done


@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_is_a_sentence(name: str) -> None:
    """Given an answer that no server of ours gives, `runs` ends with 1 and a sentence about the address."""
    with answering(name, ODD[name]) as (url, asked):
        done = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["runs", "ls", "--url", url])
        assert asked  # it was asked, and answered so
        assert isinstance(done.exception, SystemExit), done.exception
        assert (done.exit_code, done.stdout) == (1, ""), done
        assert obeyed(done.stderr_bytes) == set()
        assert url in done.stderr
        assert len(done.stderr) < 2_000


@pytest.mark.parametrize("name", LARGE)
def test_an_answer_without_end_takes_bounded_memory(name: str) -> None:
    """Given more than memory holds, a command with 1.5 GiB of address space ends with 1 and a sentence."""
    with answering(name, ODD[name]) as (url, asked):
        done = command("runs", "ls", "--url", url)
        assert asked
        assert (done.returncode, done.stdout) == (1, b""), done
        assert url.encode() in done.stderr


@pytest.mark.parametrize(
    "name", ["a reason", "noise", "deep", "headers without end", "a bomb", "a configuration"]
)
def test_the_doctor_ends_and_obeys_nothing(tmp_path, name: str) -> None:
    """Given any answer, `doctor` ends in time, and what it prints has no character that a terminal obeys."""
    with answering(name, (ODD | WELL)[name]) as (url, asked):
        for options in ((), ("--json",)) if effort(0, 1) else ((),):
            done = command(
                "doctor", "--timeout", "2", *options, WAXELL_API_URL=url, WAXELL_SPOOL_DIR=str(tmp_path)
            )
            assert asked
            assert done.returncode in (0, 1)
            assert b"server" in done.stdout


def test_an_answer_of_the_right_shape_is_shown_as_text() -> None:
    """Given hostile text in every field of a right answer, `runs` shows it, and `--json` gives it back."""
    with answering("a list", WELL["a list"]) as (url, _):
        shown = command("runs", "ls", "--url", url)
        assert shown.returncode == 0
        assert b"\\x1b[2J" in shown.stdout
        lines = command("runs", "ls", "--json", "--url", url).stdout.splitlines()
        assert [json.loads(line)["agent_name"] for line in lines] == list(HOSTILE.values())
    with answering("a run", WELL["a run"]) as (url, asked):
        shown = command("runs", "show", "../../secret?x=1#y", "--url", url)
        assert shown.returncode == 0
        assert b"\\x1b[2J" in shown.stdout
        assert asked[0].startswith(b"GET /api/runs/..%2F..%2Fsecret%3Fx%3D1%23y HTTP/1.1")
    found("odd answers", answers=len(ODD))
