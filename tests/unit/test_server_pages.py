"""The two pages: what a person must find on them, and that what a client sent is never markup."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from waxell_workers.core.records import STATES
from waxell_workers.server import Store, create_app, rest
from waxell_workers.server.ingest import ingest
from waxell_workers.server.views import ago, cost, count, duration, facts, offset, shorten

NOW = time.time() - 3600


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "runs.db") as store:
        yield store


def get(store: Store, path: str, **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app=create_app(store, **options))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:4319") as client:
            return await client.get(path)

    return asyncio.run(once())


def send(store: Store, *records: dict[str, Any]) -> None:
    reply = ingest(store, "\n".join(json.dumps(record) for record in records).encode())
    assert reply["rejected"] == []


def started(run_id: str, at: float = NOW, **more: Any) -> dict[str, Any]:
    record = {"kind": "run_started", "id": f"s-{run_id}", "at": at, "run_id": run_id, "agent_name": "triage"}
    return record | {"workflow_name": "celery"} | more


def call(run_id: str, record_id: str = "", **more: Any) -> dict[str, Any]:
    record = {"kind": "llm_call", "id": record_id or f"c-{run_id}", "at": NOW, "run_id": run_id}
    return record | {"model": "gpt-4o-mini", "tokens_in": 1200, "tokens_out": 34, "cost_usd": 0.0123} | more


def ended(run_id: str, state: str = "success", **more: Any) -> dict[str, Any]:
    record = {"kind": "run_ended", "id": f"e-{run_id}", "at": NOW + 1, "run_id": run_id, "state": state}
    return record | {"duration_ms": 1234.0} | more


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def links(self) -> list[str]:
        return [value for _, name, value in self.attributes if name == "href"]

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def test_an_empty_server_says_how_to_send_data(store: Store) -> None:
    """The two lines that a user needs, with this server's address; a key only where one is needed."""
    page = get(store, "/").text
    assert "export WAXELL_API_URL=http://127.0.0.1:4319\n" in page
    assert "import waxell_workers.celery" in page
    assert "WAXELL_API_KEY" not in page


def test_runs_stand_newest_first_with_what_matters(store: Store) -> None:
    """Status in words, name, workflow, time, duration, calls, tokens, cost and the error."""
    send(
        store,
        started("old"),
        started("new", NOW + 60),
        call("new"),
        ended("new", "killed", error_message="signal 9"),
    )
    html = get(store, "/").text
    words = Page(html).words()
    assert html.index("/runs/new") < html.index("/runs/old")
    for expected in (
        "killed",
        "triage",
        "celery",
        "1.2 s",
        "1 200",  # the thin space went with the others
        "34",
        "$0.0123",
        "signal 9",
    ):
        assert expected in words
    assert re.search(r"\d+ (min|h) ago", words)
    assert re.search(r'<time datetime="[^"]+" title="\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC">', html)


@pytest.mark.parametrize("state", [*STATES, "a_state_of_tomorrow"])
def test_every_state_is_shown_in_words(store: Store, state: str) -> None:
    """Colour is never the only sign, and a state that this server does not know is shown as it is."""
    send(store, started("r"), ended("r", state))
    assert re.search(rf'class="status \w+">{state}<', get(store, "/").text)
    assert re.search(rf'class="status \w+">{state}<', get(store, "/runs/r").text)


def test_filters_stand_in_the_address_and_pages_keep_them(store: Store) -> None:
    """A link to one agent's errors can be sent to somebody; older pages and the way back keep the filters."""
    for n in range(60):
        send(store, started(f"a{n:02}", NOW + n, agent_name="a & b"), ended(f"a{n:02}", "error"))
    send(store, started("other", NOW + 99, agent_name="c"), ended("other"))
    address = f"/?agent={quote('a & b')}&status=error"
    page = Page(get(store, address).text)
    runs = [link for link in page.links() if link.startswith("/runs/")]
    assert (runs[0], len(runs)) == ("/runs/a59", 50)
    older = next(link for link in page.links() if "before=" in link)
    assert "status=error" in older
    second = Page(get(store, older).text)
    assert len([link for link in second.links() if link.startswith("/runs/")]) == 10
    assert ("option", "selected", "") in second.attributes
    assert "/?agent=a+%26+b&status=error" in second.links()
    assert "No run matches" in get(store, "/?status=retry").text
    assert get(store, "/?before=a-run-that-is-gone").status_code == 200


def test_a_run_shows_its_facts_calls_steps_and_relatives(store: Store) -> None:
    """What one asks when a task went wrong: where it ran, what it called and paid, what came before."""
    metadata = {"queue": "llm", "worker": "celery@web-1", "pid": 4242, "attempt": 2, "z": {"deep": [1]}}
    send(
        store,
        started("parent", agent_name="enqueuer"),
        started("first", task_id="t1", metadata={"attempt": 1}),
        ended("first", "retry"),
        started("second", NOW + 5, task_id="t1", metadata=metadata, parent_run_id="parent"),
        call("second", prompt="What is up?", response="All is well.", provider="openai"),
        call("second", "c-failed", status="error", error_type="openai.RateLimitError", error_message="429"),
        {
            "kind": "step",
            "id": "st",
            "at": NOW,
            "run_id": "second",
            "name": "load ticket",
            "output": {"chars": 77},
        },
        {"kind": "run_updated", "id": "u", "at": NOW, "run_id": "second", "tags": {"tier": "gold"}},
        ended(
            "second", "error", error_type="ValueError", error_message="no", traceback="Traceback …\n  line 61"
        ),
    )
    page = Page(get(store, "/runs/second").text)
    words = page.words()
    for expected in (
        *("triage", "ValueError: no", "line 61", "t1", "llm", "celery@web-1", "4242", "gold", '"deep"'),
        *("gpt-4o-mini", "openai", "What is up?", "All is well.", "openai.RateLimitError: 429"),
        *("load ticket", '"chars": 77', "enqueuer", "Attempts of this task", "attempt 1", "this run"),
    ):
        assert expected in words, expected
    assert {"/runs/first", "/runs/parent"} <= set(page.links())
    assert "/runs/second" in Page(get(store, "/runs/parent").text).links()
    # previews are folded away
    assert not any(value == "call-1" for tag, name, value in page.attributes if name == "open")


def test_only_what_can_change_refreshes_itself(store: Store) -> None:
    """The list and a running run are live; a run that has ended is still."""
    send(store, started("on"), started("off"), ended("off"))
    assert "data-live" in get(store, "/").text
    assert "data-live" in get(store, "/runs/on").text
    assert "data-live" not in get(store, "/runs/off").text


def test_a_run_with_very_many_calls_can_be_looked_at(store: Store) -> None:
    """The page shows the first ones and says so."""
    send(store, started("r"), *(call("r", f"c{n}") for n in range(600)))
    html = get(store, "/runs/r").text
    assert html.count("gpt-4o-mini") == 500
    assert "The first 500 of 600 calls" in html


def add_spans(store: Store, run_id: str, *spans: dict[str, Any]) -> None:
    """Send spans as a REST client does."""
    with store.write() as writer:
        rest.add_spans(rest.RunRequest(writer, run_id, {"spans": list(spans)}, NOW))


def rows_of(html: str, table: str) -> list[str]:
    """Return the rows of the table of this class, as text."""
    [found] = re.findall(rf'<table class="{table}">.*?<tbody>(.*?)</tbody>', html, re.S)
    return [Page(row).words() for row in re.findall(r"<tr>.*?</tr>", found, re.S)]


def test_spans_are_a_tree_with_offset_and_duration(store: Store) -> None:
    """Given nested spans, when the run is shown, then children follow their parent, indented, with times."""
    send(store, started("r"))
    add_spans(
        store,
        "r",
        {"name": "the run", "kind": "agent", "status": "error", "position": 0, "duration_ms": 1500}
        | {"attributes": {"error.type": "ValueError", "error.message": "no"}},
        {"name": "first", "kind": "chain", "status": "ok", "position": 1, "start_offset_ms": 20},
        {"name": "second", "kind": "tool", "status": "ok", "position": 2, "start_offset_ms": 900}
        | {"input_data": {"q": "why"}, "output_data": "because", "duration_ms": 40},
        {"name": "in first", "kind": "llm", "status": "ok", "position": 3, "parent_position": 1}
        | {"start_offset_ms": 30, "events": [{"name": "exception"}]},
    )
    html = get(store, "/runs/r").text
    rows = rows_of(html, "spans")
    assert [row.split()[0] for row in rows] == ["the", "first", "in", "second"]
    assert re.findall(r'<div class="indent-(\d+)">', html) == ["0", "1", "2", "1"]
    for row, expected in zip(
        rows,
        (
            ("the run", "agent", "error", "1.5 s", "ValueError: no"),
            ("first", "chain", "+20 ms", "\u2013"),
            ("in first", "llm", "+30 ms", "exception"),
            ("second", "tool", "+900 ms", "40 ms", "because", '"q": "why"'),
        ),
        strict=True,
    ):
        for text in expected:
            assert text in row
    bars = re.findall(r'<rect class="(\w+)" x="([\d.]+)" width="([\d.]+)"', html)
    assert bars[0] == ("bad", "0.0", "100.0")
    assert bars[3] == ("good", "60.0", "2.67")
    assert not any(value.startswith("span-") for tag, name, value in Page(html).attributes if name == "open")


def test_scores_are_shown_with_value_type_and_comment(store: Store) -> None:
    """Given scores of each type, when the run is shown, then each is a row; without any there is no table."""
    send(store, started("r"), started("none"))
    with store.write() as writer:
        for name, data_type, value in (("helpful", "numeric", 0.5), ("tone", "categorical", "kind")):
            writer.score("r", name=name, data_type=data_type, value=value, comment="so so")
        writer.score("r", name="empty", data_type="numeric", value=None, comment="")
    rows = rows_of(get(store, "/runs/r").text, "scores")
    assert rows == ["helpful 0.5 numeric so so", "tone kind categorical so so", "empty numeric"]
    words = Page(get(store, "/runs/none").text).words()
    assert "Scores" not in words
    assert "Spans" not in words


def test_steps_show_their_output_in_short_and_in_full(store: Store) -> None:
    """Given a step with a long output, when the run is shown, then its line is cut, the whole is folded."""
    text = "word " * 60 + "end"
    send(
        store,
        started("r"),
        *(
            {"kind": "step", "id": f"st{n}", "at": NOW, "run_id": "r", "name": name, "output": output}
            for n, (name, output) in enumerate((("load", {"text": text}), ("done", None)))
        ),
    )
    html = get(store, "/runs/r").text
    [summary] = re.findall(r'<details id="step-1">\s*<summary>(.*?)</summary>', html, re.S)
    assert "load" in summary
    assert "…" in summary
    assert len(Page(summary).words()) < 120
    assert text in Page(html).words()
    assert 'id="step-2"' not in html  # nothing to unfold


def test_a_run_with_very_many_spans_can_be_looked_at(store: Store) -> None:
    """Given more spans and scores than fit, when the run is shown, then the first are, and it says so."""
    send(store, started("r"))
    add_spans(store, "r", *({"name": f"s{n}", "position": n, "parent_position": n - 1} for n in range(700)))
    with store.write() as writer:
        for n in range(600):
            writer.score("r", name=f"n{n}", data_type="numeric", value=n, comment="")
    html = get(store, "/runs/r").text
    assert len(rows_of(html, "spans")) == len(rows_of(html, "scores")) == 500
    assert "The first 500 of 700 spans" in html
    assert "The first 500 of 600 scores" in html
    assert set(re.findall(r'class="indent-(\d+)"', html)) == {str(n) for n in range(13)}
    style = get(store, "/static/style.css").text
    assert all(f".indent-{n} " in style for n in range(1, 13))


def test_an_unknown_run_is_a_page_with_a_way_back(store: Store) -> None:
    """For people, in HTML; and the name of the run is not repeated."""
    answer = get(store, "/runs/%3Cscript%3E")
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html")
    assert "/" in Page(answer.text).links()
    assert "<script>" not in answer.text


EVIL = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}</textarea></details>javascript:alert(1)"
)


def test_nothing_that_a_client_sent_is_markup(store: Store) -> None:
    """Hostile text in every field of every record: both pages have the same tags as with harmless text."""

    def fill(text: str, suffix: str) -> None:
        r, other = f"r{suffix}", f"o{suffix}"
        deep = {text: text, "list": [text, {text: text}], "attempt": text}
        named = {
            "agent_name": text,
            "workflow_name": text,
            "session_id": text,
            "user_id": text,
            "trace_id": text,
        }
        fields = ("model", "response_model", "provider", "operation", "error_type", "error_message")
        texts = dict.fromkeys((*fields, "prompt", "response", "response_id", "finish_reason"), text)
        send(
            store,
            started(
                r,
                **named,
                inputs=deep,
                metadata=deep,
                task_id=text + suffix,
                parent_run_id=text,
                root_run_id=text,
            ),
            started(other, **named, task_id=text + suffix),
            call(r, status=text, metadata=deep, **texts),
            {"kind": "step", "id": f"st{suffix}", "at": NOW, "run_id": r, "name": text, "output": deep},
            {
                "kind": "run_updated",
                "id": f"u{suffix}",
                "at": NOW,
                "run_id": r,
                "tags": deep,
                "metadata": {"x": text},
            },
            ended(r, "error", error_type=text, error_message=text, traceback=text, result=deep),
        )
        with store.write() as writer:
            writer.score(r, name=text, data_type=text, value=text, comment=text)
        failed = {"error.type": text, "error.message": text}
        data = {"input_data": deep, "output_data": text, "events": [deep], "attributes": deep | failed}
        add_spans(
            store,
            r,
            {"name": text, "kind": text, "status": text, "position": 1} | data,
            {"name": text, "kind": text, "status": text, "position": 2, "parent_position": 1},
        )

    fill("harmless", "1")
    harmless = [Page(get(store, path).text) for path in ("/runs/r1", f"/?agent={quote('harmless')}")]
    fill(EVIL, "2")
    hostile = [Page(get(store, path).text) for path in ("/runs/r2", f"/?agent={quote(EVIL)}&status=&before=")]
    for tame, wild in zip(harmless, hostile, strict=True):
        names = [(tag, name) for tag, name, _ in tame.attributes]
        wild_names = [(tag, name) for tag, name, _ in wild.attributes]
        assert wild.tags.count("script") == 1
        assert wild.tags.count("img") == 1
        assert set(wild_names) <= set(names) | {("option", "selected")}
        assert EVIL in "".join(wild.text)
        for _, name, value in wild.attributes:
            assert not name.startswith("on")
            assert name not in ("href", "src", "action") or value.startswith("/")
    assert hostile[0].tags == harmless[0].tags
    for query in ("status", "agent", "before"):
        page = Page(get(store, f"/?{query}={quote(EVIL)}").text)
        assert (page.tags.count("script"), page.tags.count("img")) == (1, 1)


SHOWN_TEXT = [
    ("span", {"name": EVIL}),
    ("span", {"kind": EVIL}),
    ("span", {"status": EVIL}),
    ("span", {"input_data": EVIL}),
    ("span", {"output_data": {EVIL: [EVIL]}}),
    ("span", {"attributes": {EVIL: EVIL}}),
    ("span", {"attributes": {"error.type": EVIL}}),
    ("span", {"attributes": {"exception.message": EVIL}}),
    ("span", {"events": [{"name": EVIL, "attributes": {EVIL: EVIL}}]}),
    ("score", {"name": EVIL}),
    ("score", {"data_type": EVIL}),
    ("score", {"comment": EVIL}),
    ("score", {"string_value": EVIL}),
    ("step", {"step_name": EVIL}),
    ("step", {"output": EVIL}),
    ("step", {"output": {EVIL: [EVIL]}}),
]
NUMBERS = [
    *(("span", {name: EVIL}) for name in ("start_offset_ms", "duration_ms", "position", "parent_position")),
    ("score", {"numeric_value": EVIL}),
    ("step", {"position": EVIL}),
]
ADD = {"span": rest.add_spans, "score": rest.add_scores, "step": rest.add_steps}


@pytest.mark.parametrize(
    ("kind", "fields", "shown"),
    [
        pytest.param(kind, fields, shown, id=f"{kind}-{n}-{next(iter(fields))[:20]}")
        for shown, cases in ((True, SHOWN_TEXT), (False, NUMBERS))
        for n, (kind, fields) in enumerate(cases)
    ],
)
def test_no_field_of_a_rest_record_is_markup(
    store: Store, kind: str, fields: dict[str, Any], shown: bool
) -> None:
    """Given hostile text in one field, when the run is shown, then it is text; a number is never shown so."""

    def page_with(run_id: str, record: dict[str, Any]) -> Page:
        send(store, started(run_id))
        with store.write() as writer:
            ADD[kind](rest.RunRequest(writer, run_id, {f"{kind}s": [record]}, NOW))
        html = get(store, f"/runs/{run_id}").text
        assert "<script>alert" not in html
        assert f"{kind.capitalize()}s" in Page(html).text
        return Page(html)

    named = {"step_name" if kind == "step" else "name": "n"}
    tame = page_with("tame", named | json.loads(json.dumps(fields).replace(json.dumps(EVIL)[1:-1], "tame")))
    wild = page_with("wild", named | fields)
    assert wild.tags == tame.tags
    assert [(tag, name) for tag, name, _ in wild.attributes] == [
        (tag, name) for tag, name, _ in tame.attributes
    ]
    assert ("alert(1)" in "".join(wild.text)) is shown


def test_pages_need_nothing_from_elsewhere(store: Store) -> None:
    """No address of another machine, no inline script or style: they work offline, under a strict policy."""
    send(store, started("r"), call("r"))
    for path in ("/", "/runs/r", "/static/style.css", "/static/live.js", "/static/icon.svg"):
        text = get(store, path).text
        assert get(store, path).status_code == 200
        hosts = set(re.findall(r"https?://([^/\"'\s)]+)", text)) - {"www.w3.org", "127.0.0.1:4319"}
        assert not hosts
        assert "style=" not in text
        assert not re.search(r"<script(?![^>]*\bsrc=)", text)


@pytest.mark.parametrize(
    ("value_ms", "expected"),
    [
        (None, "\u2013"),
        (0, "0.00 ms"),
        (0.5, "0.50 ms"),
        (999.4, "999 ms"),
        (999.6, "1.0 s"),
        (59_949, "59.9 s"),
        (59_960, "1 min 00 s"),
        (3_599_999, "1 h 00 min"),
    ],
)
def test_durations_read_well(value_ms: float | None, expected: str) -> None:
    """In the unit that a person would use, and never `60 s`."""
    assert duration(value_ms) == expected


def test_money_counts_and_times_read_well() -> None:
    """Small sums keep the digits that matter; unknown is not nought."""
    assert [cost(usd) for usd in (None, 0, 9.75e-05, 0.0123, 1234.5, 1e-9)] == [
        "\u2013",
        "$0",
        "$0.000097",
        "$0.0123",
        "$1,234.50",
        "< $0.000001",
    ]
    assert count(1_234_567) == "1\u202f234\u202f567"
    assert [offset(ms) for ms in (None, 0, 30, 1500, -5)] == ["\u2013", "0", "+30 ms", "+1.5 s", "\u22125 ms"]
    assert ago("1970-01-01T00:00:00.000+00:00").endswith("d ago")
    assert ago("9999-01-01T00:00:00.000+00:00") == "in the future"
    assert shorten("one\ntwo") == "one"
    assert shorten("x" * 20, 10) == "x" * 9 + "…"


def test_facts_of_a_task_come_first() -> None:
    """Task id, attempt, queue; the rest by name; nothing that is empty."""
    metadata = {"b": 1, "a": 0, "queue": "q", "task_id": "t", "none": None, "empty": ""}
    assert [name for name, _ in facts(metadata)] == ["task_id", "queue", "a", "b"]
