"""Whatever stands in whatever field of a record is text: in pages, in JSON and in a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest

from tests.faults.hostile import (
    API,
    CLI,
    INGEST,
    NOW,
    STATIC,
    Server,
    cli,
    ended,
    ndjson,
    paths,
    routes,
    serving,
    started,
)
from tests.harness import environment
from tests.torture import found
from waxell_workers.core.records import LLMCall, RunEnded, RunStarted, RunUpdated, Step, TaskLost
from waxell_workers.server.facts import FACTS
from waxell_workers.server.spend import DIMENSIONS

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "image": "<img src=x onerror=alert(1)>",
    "svg": "<svg/onload=alert(1)><animate onbegin=alert(1)>",
    "double quote": '" onmouseover="alert(1)" autofocus onfocus="alert(1)',
    "single quote": "' onmouseover='alert(1)' style='background:url(//evil.example)",
    "breakout": "\"'></title></style></script></details></option></select><iframe src=//evil.example>",
    "address": "javascript:alert(1)",
    "address in disguise": "java\tscript:alert(1)//\x01javascript:alert(1)",
    "data": "data:text/html,<script>alert(1)</script>",
    "template": "{{7*7}}${7*7}<%= 7*7 %>{% raw %}{{ config }}",
    "comment": "--><!--<![CDATA[<script>alert(1)//]]>",
    "entities": "&lt;script&gt;alert(1)&lt;/script&gt;&#60;b&#62;&quot;",
    "full width": "\uff1cscript\uff1ealert(1)\uff1c/script\uff1e",
    "base": "<base href=//evil.example/><meta http-equiv=refresh content=0;url=//evil.example>",
    "form": "</form><form action=//evil.example><input name=agent>",
    "clobber": '<a id=live></a><form id="live-state"></form>',
    "nul": "<\x00script>alert(1)</scr\x00ipt>",
    "terminal": "\x1b[2J\x1b[1;1H\x1b]0;owned\x07\x1b]8;;http://evil.example\x07click\x1b]8;;\x07\x9b31m\r\b\x7f",
    "direction": "\u202egnp.exe\u2066\u2069\u200f\u061c",
    "markup": "[red]x[/red][link=http://evil.example]y[/link][/]\\[bold]",
    "forged row": "a\nbbbb2222 12:00:00 tickets.triage success\n\tc\u2028d\x85e",
    "halves": "\ufffd\ufffe\U0010ffff\U000e0041",
}
RECORDS = (RunStarted, LLMCall, Step, RunUpdated, RunEnded, TaskLost)
FIXED = {"id", "run_id", "kind", "state", "at", "proc"}
"""What is checked when it comes, and stands in addresses; the rest may be anything."""
POLICY = {
    "default-src": "'none'",
    "style-src": "'self'",
    "script-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "form-action": "'self'",
    "base-uri": "'none'",
    "frame-ancestors": "'none'",
}


def mapping(text: str) -> dict[str, Any]:
    """Return an object with `text` in what the server reads out of a run's metadata, and elsewhere."""
    nested = [text, {text: text}]
    return {text: text, "nested": nested, "depends_on": [text], "clock_skew_s": text} | dict.fromkeys(
        FACTS, text
    )


def filled(kind: type[msgspec.Struct], text: str) -> dict[str, Any]:
    """Return a record with `text` in each of its fields that can hold one, also those of tomorrow."""
    values: dict[str, Any] = {}
    for each in msgspec.structs.fields(kind):
        if each.name in FIXED:
            continue
        if each.type is str:
            values[each.name] = text
        elif str(each.type).startswith("list[dict"):
            values[each.name] = [dict.fromkeys(("role", "text", "name", "id", "arguments", text), text)]
        elif "dict" in str(each.type):
            values[each.name] = mapping(text)
        elif each.type is Any:
            values[each.name] = [text, {text: text}]
    return values


def by_ingest(run_id: str, text: str) -> list[dict[str, Any]]:
    """Return all kinds of records of a run, with `text` everywhere."""
    records = []
    for number, kind in enumerate(RECORDS):
        head = {"kind": kind.__struct_config__.tag, "id": f"{number}-{run_id}", "at": NOW, "run_id": run_id}
        records.append(filled(kind, text) | head)
    return records


def by_rest(text: str, run_id: str) -> dict[str, dict[str, Any]]:
    """Return a body for each endpoint of the protocol, with `text` in every field that it has."""
    deep = mapping(text)
    ours = {"run_id": run_id, "task_id": text, "trace_id": text, "tags": deep, "metadata": deep, text: text}
    names = ("model", "task", "prompt_preview", "response_preview", "status", "error_type", "error_message")
    span = dict.fromkeys(("name", "kind", "status", "input_data", "output_data"), text)
    failed = {"error.type": text, "exception.message": text, "waxell.call_id": text}
    spans = [
        span | {"position": 1, "attributes": deep | failed, "events": [deep, text]},
        span | {"kind": "llm", "position": 2, "parent_position": 1, "attributes": {"model": text} | failed},
    ]
    start = ("agent_name", "workflow_name", "user_id", "user_group", "session_id", "trace_id", "agent_slug")
    score = {"name": text, "data_type": text, "comment": text, "string_value": text}
    run = f"{API}/runs/{run_id}"
    return {
        f"{API}/runs/start/": dict.fromkeys(start, text)
        | {"inputs": deep, "parent_workflow_id": text, "root_workflow_id": text}
        | {"metadata": deep | {"waxell": ours}},
        f"{API}/runs/daily/": {"agent_slug": text, "agent_type": text, "date": text},
        f"{run}/llm-calls/": {"calls": [dict.fromkeys(names, text) | {"prompt_hash": text}]},
        f"{run}/steps/": {
            "steps": [{"step_name": text, "output": deep}, {"step_name": text, "output": text}]
        },
        f"{run}/spans/": {"spans": spans},
        f"{run}/scores/": {"scores": [score]},
        f"{run}/complete/": {"result": {text: text, "waxell": {"tags": deep, "metadata": deep}}}
        | dict.fromkeys(("status", "error", "error_type", "traceback", "trace_id"), text),
        f"{API}/policy-check/": deep,
        f"{API}/governance-decision/": {"workflow_id": text, "agent_name": text},
        f"{API}/prompt-guard/": {"text": text, "agent_name": text, "model": text},
        f"{API}/events/": {"events": [deep]},
        f"{run}/partial/": {"partial": text},
        f"{API}/agents/x/heartbeat/": deep,
        f"/api/v1/observability/runs/{run_id}/memory/episodic/": deep,
        f"/api/v1/observability/runs/{run_id}/memory/semantic/": deep,
    }


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), attrs
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the elements with the names of their attributes; in no order, since facts stand by name."""
        return sorted((tag, tuple(attributes)) for tag, attributes in self.elements)


def is_harmless(page: Page) -> None:
    """Fail if any element, attribute or address of a page is none that a page of ours has."""
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "style", "textarea", "animate"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("style", "srcdoc", "formaction", "http-equiv", "xlink:href"), (tag, name)
            if name in ("href", "src", "action"):
                assert re.match(r"/(?!/)", value), (tag, name, value)
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert scripts == [{"src": "/static/live.js", "defer": ""}]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))  # the script finds the parts of a page by them


def is_guarded(answer: httpx.Response, kind: str) -> None:
    """Fail unless an answer says of what type it is, and forbids everything else."""
    assert answer.headers["content-type"].split(";")[0] == kind
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy == POLICY
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has, by each way in, a tame run and one for each hostile text in all fields."""
    with serving(tmp_path_factory.mktemp("content")) as server:
        for number, text in enumerate(["tame", *HOSTILE.values()]):
            records = by_ingest(f"ingest-{number}", text)
            assert server.post(INGEST, ndjson(records)).json() == {
                "accepted": len(records),
                "duplicates": 0,
                "rejected": [],
            }
            for path, body in by_rest(text, f"rest-{number}").items():
                assert server.post(path, body).status_code == 200, path
        yield server


def test_no_endpoint_is_forgotten() -> None:
    """Given the server's own routes, each that takes a body has one here, and each page is looked at."""
    assert set(by_rest("x", "r")) | {INGEST} == set(paths("POST"))
    pages = {path for path in paths("GET") if not path.startswith("/api/")}
    assert pages == {"/", "/runs/r", "/spend"}, "a new page: look at it below"
    assert len(routes()) == len(paths("POST")) + len(paths("GET"))


@pytest.mark.parametrize("way", ["ingest", "rest"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_of_hostile_text_looks_like_a_tame_one(server: Server, name: str, way: str) -> None:
    """Given hostile text in every field, its page has the elements of a tame run's, and the text is there."""
    number = list(HOSTILE).index(name) + 1
    tame = Page(server.get(f"/runs/{way}-0").text)
    answer = server.get(f"/runs/{way}-{number}")
    assert answer.status_code == 200
    is_guarded(answer, "text/html")
    wild = Page(answer.text)
    is_harmless(wild)
    assert wild.shape() == tame.shape()
    shown = HOSTILE[name].replace("\r", "\n").replace("\x00", "\ufffd")
    assert shown in wild.text.replace("\r", "\n").replace("\x00", "\ufffd")


@pytest.mark.parametrize("name", HOSTILE)
def test_lists_and_filters_of_hostile_text_are_harmless(server: Server, name: str) -> None:
    """Given hostile text in a filter or an unknown address, the list is harmless, and so is its JSON."""
    text = quote(HOSTILE[name].encode("utf-8", "replace"))
    for path in (
        f"/?agent={text}",
        f"/?status={text}",
        f"/?before={text}",
        f"/?{text}={text}",
        f"/runs/{text}",
        f"/spend?by={text}",
        f"/spend?since={text}",
    ):
        answer = server.get(path)
        assert answer.status_code in (200, 400, 404), path
        is_guarded(answer, "text/html")
        is_harmless(Page(answer.text))
    assert HOSTILE[name].split("\n")[0].strip()[:20].replace("\x00", "") in Page(
        server.get(f"/?agent={text}").text
    ).text.replace("\x00", "")
    for path in (f"/api/runs?agent={text}", f"/api/stats?agent={text}", f"/api/runs?before={text}"):
        answer = server.get(path)
        assert answer.status_code in (200, 400), path
        is_guarded(answer, "application/json")
        answer.json()
    assert len(server.get(f"/api/runs?agent={text}").json()["runs"]) == 3  # ingest, rest, and daily's


@pytest.mark.parametrize("by", DIMENSIONS)
def test_spend_by_hostile_names_is_harmless(server: Server, by: str) -> None:
    """Given tasks, models, users … of hostile names, what they cost is shown, and they are text."""
    answer = server.get(f"/spend?by={by}")
    assert answer.status_code == 200
    is_guarded(answer, "text/html")
    page = Page(answer.text)
    is_harmless(page)
    assert "tame" in page.text or by == "attempt"


def test_json_gives_back_what_was_sent(server: Server) -> None:
    """Given hostile text, the JSON API returns it as it was: nothing is rewritten on the way."""
    for number, text in enumerate(HOSTILE.values(), 1):
        for way in ("ingest", "rest"):
            answer = server.get(f"/api/runs/{way}-{number}")
            is_guarded(answer, "application/json")
            run = answer.json()
            assert run["agent_name"] == text
            assert run["calls"][0]["model"] == text
            assert run["tags"][text] == text


def test_every_answer_is_guarded(server: Server) -> None:
    """Given any path, method and outcome, the answer names its type, and its headers forbid the rest."""
    kinds = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for path in STATIC:
        is_guarded(server.get(path), kinds[Path(path).suffix])
    for path in paths("GET"):
        is_guarded(server.get(path), "application/json" if path.startswith("/api/") else "text/html")
    for path in paths("POST"):
        is_guarded(server.post(path, b"{"), "application/json")
    for path in ("/nothing", "/static/nothing", "/static/"):
        is_guarded(server.get(path), "text/html")
    is_guarded(server.get("/", headers={"host": "evil.example"}), "application/json")


def obeyed(output: bytes) -> set[str]:
    """Return the characters of an output that a terminal would obey, but for line ends and rich's colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", output.decode()).replace("\r\n", "\n")
    return {each for each in text if each != "\n" and (ord(each) < 32 or 127 <= ord(each) < 160)} | (
        set(text)
        & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c\u2028\u2029")
    )


def in_a_terminal(*arguments: str) -> bytes:
    """Run the command line in a terminal of its own and return what that would have shown."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*CLI, *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment(TERM="xterm-256color", COLUMNS="400"),
        start_new_session=True,
    )
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 65_536):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert process.wait() == 0, shown
    return shown


def test_a_terminal_is_told_nothing_by_a_run(server: Server) -> None:
    """Given escape sequences, directions and markup in every field, `runs` shows them, and obeys none."""
    number = list(HOSTILE).index("terminal") + 1
    control = obeyed(HOSTILE["terminal"].encode())
    assert len(control) >= 5  # the fault is there
    for source in (("--url", server.url), ("--db", str(server.db))):
        listed = cli("runs", "ls", "--limit", "200", *source)
        assert listed.returncode == 0, listed.stderr
        assert obeyed(listed.stdout) == set()
        assert b"\\x1b[2J" in listed.stdout
        assert b"\\u202e" in listed.stdout
        assert b"[red]x[/red]" in re.sub(rb"\s+", b"", listed.stdout)
        assert b"\nbbbb2222 " not in listed.stdout
    shown = in_a_terminal("runs", "ls", "--limit", "200", "--url", server.url)
    assert obeyed(shown) == set()
    assert b"\x1b[" in shown  # it was a terminal, with colours
    assert b"\x1b[2J" not in shown
    for way in ("ingest", "rest"):
        for each in range(1, len(HOSTILE) + 1):
            if each in (number, number + 1, number + 2):
                shown = in_a_terminal("runs", "show", f"{way}-{each}", "--url", server.url)
                assert obeyed(shown) == set(), each
    whole = cli("runs", "show", f"ingest-{number}", "--json", "--url", server.url)
    assert json.loads(whole.stdout)["agent_name"] == HOSTILE["terminal"]
    assert whole.stdout.isascii()
    found("runs of hostile text, looked at in pages, JSON and terminals", runs=2 * len(HOSTILE))


def test_an_error_of_many_lines_forges_no_row(server: Server) -> None:
    """Given an error that looks like lines of the table, each of its lines begins with a bar."""
    server.send(started("forger"), ended("forger", state="error", error_message="x\nffff 1 success\n  ok"))
    listed = cli("runs", "ls", "--agent", "triage", "--url", server.url, COLUMNS="160").stdout.decode()
    lines = listed.splitlines()
    assert [line.strip()[:2] for line in lines if "ffff" in line or line.strip().endswith("ok")] == [
        "| ",
        "| ",
    ]
