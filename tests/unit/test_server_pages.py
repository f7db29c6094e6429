"""The pages: what a person must find on them, and that what a client sent is never markup."""

from __future__ import annotations

import asyncio
import json
import re
import time
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from waxell_workers.core.records import STATES
from waxell_workers.server import Store, create_app, lineage, rest
from waxell_workers.server.ingest import ingest
from waxell_workers.server.views import (
    after,
    ago,
    between,
    cost,
    count,
    duration,
    facts,
    offset,
    percent,
    shorten,
    status_class,
    waited,
)

NOW = time.time() - 3600


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
    return [Page(row).words() for row in re.findall(r"<tr\b.*?</tr>", found, re.S)]


def section(html: str, title: str) -> str:
    """Return the section under this heading."""
    [found] = [
        each for each in re.findall(r"<section.*?</section>", html, re.S) if f"<h2>{title}</h2>" in each
    ]
    return str(found)


def task(run_id: str, at: float = NOW, task_id: str = "t1", **more: Any) -> dict[str, Any]:
    """Return the start of a task's run; what is no field of a record is metadata."""
    fields = {name: more.pop(name) for name in ("agent_name", "trace_id", "parent_run_id") if name in more}
    facts = {"framework": "celery", "task": "triage", "queue": "llm", "task_id": task_id}
    return started(run_id, at, task_id=task_id, metadata=facts | more, **fields)


def test_how_a_run_ended_stands_beside_its_status(store: Store) -> None:
    """Given a reason, when the run or a list is shown, then it is there; an error says more in a list."""
    send(
        store,
        started("k"),
        ended(
            "k", "killed", reason="killed: hard time limit of 30 s", error_message="hard time limit of 30 s"
        ),
        started("r", NOW + 1),
        ended("r", "revoked", reason="revoked before start"),
    )
    html = get(store, "/runs/k").text
    assert '<p class="reason dead">killed: hard time limit of 30 s</p>' in html
    assert '<p class="reason off">revoked before start</p>' in get(store, "/runs/r").text
    revoked, killed = rows_of(get(store, "/").text, "runs")
    assert "revoked before start" in revoked
    assert "hard time limit of 30 s" in killed
    assert "killed: hard" not in killed


def test_every_state_has_a_colour_of_its_kind(store: Store) -> None:
    """No state of a worker has the class of what nobody knows, and the style knows each class."""
    style = get(store, "/static/style.css").text
    for state in STATES:
        assert status_class(state) != "other"
        assert re.search(rf"\.status\.{status_class(state)}\b", style)
    assert status_class("a_state_of_tomorrow") == "other"


def test_a_run_says_how_long_it_waited_and_what_is_usual(store: Store) -> None:
    """Given runs of a queue, when a slow one is shown, then its times, its wait and the usual are told."""
    for n in range(20):
        send(store, task(f"w{n}", NOW + n, f"t{n}", wait_s=0.5), ended(f"w{n}"))
    at = NOW + 60
    send(store, task("slow", at, wait_s=12.5, enqueued_at=at - 20, eta=at - 12.5), ended("slow"))
    waiting = Page(section(get(store, "/runs/slow").text, "Waiting")).words()
    for expected in ("enqueued", "due", "started", "after waiting 12.5 s", "ended", "after working 1.2 s"):
        assert expected in waiting
    assert "waited 12.5 s after it was due" in waiting
    assert "95 % of the runs of its queue waited less" in waiting
    assert "Longer than usual" in waiting
    assert "Usual in celery · llm, by its newest 21 runs: half waited up to 500 ms" in waiting
    assert "Longer than usual" not in get(store, "/runs/w1").text


@pytest.mark.parametrize(
    ("facts", "end", "expected"),
    [
        ({}, {}, "How long it waited is not known: nothing tells when it was enqueued"),
        ({"wait_s": 0.0, "clock_skew_s": 2.5}, {}, "is at least 2.5 s ahead of"),
        (
            {"enqueued_at": NOW - 90, "never_began": True},
            {"state": "revoked", "reason": "revoked: expired before start"},
            "It never began: it was given up 1 min 30 s after it had been enqueued",
        ),
    ],
)
def test_what_is_not_known_of_a_wait_is_said(
    store: Store, facts: dict[str, Any], end: dict[str, Any], expected: str
) -> None:
    """Given no wait, a clock that is ahead, or a task that never began, then words say it, never 0."""
    send(store, task("r", **facts), ended("r", **end))
    assert expected in Page(section(get(store, "/runs/r").text, "Waiting")).words()


def test_a_run_that_is_no_task_has_not_waited(store: Store) -> None:
    """Given a run outside any task, when it is shown, then nothing is said of waiting."""
    send(store, started("r"), ended("r"))
    assert "<h2>Waiting</h2>" not in get(store, "/runs/r").text


def test_of_many_attempts_the_last_are_shown_and_called_so(store: Store) -> None:
    """Given more attempts than a page lists, then it says which those are."""
    send(store, *(task(f"a{n}", NOW + n, attempt=n) for n in range(1, 251)))
    attempts = section(get(store, "/runs/a250").text, "Attempts of this task")
    assert "The last 200 of 250." in attempts
    assert rows_of(attempts, "attempts")[0].startswith("running attempt 51 ")


def test_a_long_name_of_a_task_is_cut_where_runs_are_compared(store: Store) -> None:
    """Given a task with an endless name, then the table of what costs most keeps its shape."""
    send(store, task("r", NOW, task="t" * 900))
    for by in ("run", "task"):
        assert "t" * 81 not in get(store, f"/spend?by={by}").text


def test_a_run_named_none_comes_before_nobody(store: Store) -> None:
    """Given a client that calls a run `none`, then the first attempt is not said to be after it."""
    send(store, task("a", NOW, attempt=1), task("none", NOW + 1, attempt=2))
    first, second = rows_of(get(store, "/runs/a").text, "attempts")
    assert "after" not in first
    assert "after attempt 1" in second


def test_of_many_linked_runs_a_page_says_that_there_may_be_more(store: Store) -> None:
    """Given a run that enqueued hundreds with a trace of their own, then the list says that it is cut."""
    send(store, started("p"), *(started(f"l{n}", metadata={"linked_run_id": "p"}) for n in range(200)))
    assert "The first 200" not in get(store, "/runs/p").text
    send(store, started("l200", NOW + 1, metadata={"linked_run_id": "p"}))
    linked = section(get(store, "/runs/p").text, "Runs that it enqueued with a trace of their own")
    assert "The first 200" in linked
    assert len(rows_of(linked, "runs")) == 200


def test_attempts_and_deliveries_of_a_task_are_one_group(store: Store) -> None:
    """Given a retry, a kill and a redelivery, when one is shown, then all are, with what failing has cost."""
    send(
        store,
        task("a1", NOW, attempt=1, wait_s=1.0),
        call("a1", cost_usd=0.01),
        ended("a1", "retry", reason="retry: attempt 2 in 5 s", error_type="ValueError", error_message="no"),
        task("a2", NOW + 10, attempt=2, wait_s=2.0, previous_run_id="a1"),
        call("a2", cost_usd=0.02),
        call("a2", "blind", cost_usd=None),
        ended("a2", "killed", reason="killed: signal 9, probably out of memory"),
        task("a2b", NOW + 20, attempt=2),
        call("a2b", cost_usd=0.04),
        ended("a2b"),
    )
    attempts = section(get(store, "/runs/a2").text, "Attempts of this task")
    first, second, third = rows_of(attempts, "attempts")
    for row, expected in (
        (first, ("retry", "attempt 1", "ValueError: no", "retry: attempt 2 in 5 s", "1.0 s", "$0.0100")),
        (second, ("killed", "attempt 2", "this run", "after attempt 1", "signal 9", "≥ $0.0200")),
        (third, ("success", "attempt 2, delivery 2", "\u2013", "$0.0400")),
    ):
        for text in expected:
            assert text in row.replace("\N{NO-BREAK SPACE}", " ")
    words = Page(attempts).words()
    for expected in (
        "Final state success",
        "Attempts 2",
        "3 deliveries",
        "≥ 3.0 s 1 of 3 unknown",
        "2 failed",
    ):
        assert expected in words
    assert "Cost of all ≥ $0.0700 1 of 4 unknown" in words
    assert "Cost of failed attempts ≥ $0.0300 1 of 3 unknown" in words
    assert {"/runs/a1", "/runs/a2b"} <= set(Page(attempts).links())


def family(store: Store) -> None:
    """Store a request, the task that it enqueued, and two tasks of that one."""
    trace = "a" * 32
    send(
        store,
        started("request", agent_name="POST /tickets", trace_id=trace),
        ended("request"),
        task(
            "load", NOW + 1, "t-load", parent_run_id="request", trace_id=trace, agent_name="load", wait_s=0.5
        ),
        call("load", cost_usd=0.01),
        ended("load"),
        task("one", NOW + 3, "t-one", parent_run_id="load", trace_id=trace, agent_name="one", queue="slow"),
        call("one", cost_usd=0.02),
        ended("one", "killed", reason="killed: stopped by user"),
        task("two", NOW + 4, "t-two", parent_run_id="load", trace_id=trace, agent_name="two"),
        call("two", cost_usd=None),
        ended("two"),
    )


def test_a_trace_is_a_tree_from_its_request_down(store: Store) -> None:
    """Given a request and tasks of tasks, when one is shown, then all are, indented, with sums of each."""
    family(store)
    html = get(store, "/runs/load").text
    trace = section(html, "The whole trace")
    rows = [row.replace("\N{NO-BREAK SPACE}", " ") for row in rows_of(trace, "trace")]
    assert [row.split(" celery")[0] for row in rows][1:] == ["load · this run ·", "one", "two"]
    assert re.findall(r'class="indent-(\d+)"', trace) == ["0", "1", "2", "2"]
    for row, expected in zip(
        rows,
        (
            ("POST /tickets", "success", "≥ $0.0300"),
            ("celery · llm", "500 ms", "1.2 s", "$0.0100", "≥ $0.0300"),
            ("celery · slow", "killed: stopped by user", "$0.0200"),
            ("celery · llm", "\u2013"),
        ),
        strict=True,
    ):
        for text in expected:
            assert text in row
    assert trace.count('<tr class="current">') == 1
    assert trace.count('<rect class="wait"') == 1
    assert {"/runs/request", "/runs/one", "/runs/two"} <= set(Page(trace).links())
    words = Page(html).words().replace("\N{NO-BREAK SPACE}", " ")
    assert "Cost $0.0100 ≥ $0.0300 with all below" in words
    assert "LLM calls 1 3 with all below" in words
    assert "with all below" not in Page(get(store, "/runs/two").text).words().split("The whole trace")[0]


def test_a_page_is_live_while_anything_of_its_trace_runs(store: Store) -> None:
    """Given an ended run with a child that has not, when it is shown, then the page refreshes itself."""
    send(store, started("r"), ended("r"), started("child", NOW + 1, parent_run_id="r"))
    assert "data-live" in get(store, "/runs/r").text
    send(store, ended("child"))
    assert "data-live" not in get(store, "/runs/r").text


def test_a_large_trace_is_folded_and_refreshed_less_often(store: Store) -> None:
    """Given a large trace in which one run goes on, when one is shown, then its tree is folded and live."""
    ends = [ended(f"c{n:04}") for n in range(600)]
    starts = [started(f"c{n:04}", NOW + n, parent_run_id="top") for n in range(600)]
    send(store, started("top"), ended("top"), *starts, *ends, started("last", NOW + 900, parent_run_id="top"))
    page = Page(get(store, "/runs/top").text)
    assert ("div", "data-live", "10") in page.attributes
    assert ("details", "id", "trace") in page.attributes
    assert "/runs/last" not in page.links()
    send(store, ended("last"))
    assert "data-live" not in get(store, "/runs/top").text


def test_a_very_large_trace_says_what_is_not_shown(store: Store) -> None:
    """Given more runs than fit, when a late one is shown, then it is there with its parents."""
    children = [started(f"c{n:04}", NOW + n, parent_run_id="top", trace_id="b" * 32) for n in range(1200)]
    send(store, started("top", trace_id="b" * 32), *children, started("x", NOW, parent_run_id="c1199"))
    html = get(store, "/runs/x").text
    trace = section(html, "The whole trace")
    assert len(rows_of(trace, "trace")) == 500
    assert "/runs/c1199" in Page(trace).links()
    assert trace.count('<tr class="current">') == 1
    assert re.search(r"500 of its 1.202 runs are shown", Page(trace).words())
    assert "/api/runs/x/tree" in Page(trace).links()
    assert not any(value == "trace" for _, name, value in Page(html).attributes if name == "open")


def test_a_sum_of_a_part_of_a_trace_is_at_least_that(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given more runs than a tree has, then what stands beside one with all below says that more may be."""
    monkeypatch.setattr(lineage, "LARGEST", 3)
    for n in range(4):
        run_id = f"c{n}"
        send(store, started(run_id, NOW + n, parent_run_id="top" if n else "", trace_id="c" * 32))
        send(store, call(run_id, cost_usd=0.25))
    send(store, started("top", NOW - 1, trace_id="c" * 32))
    html = get(store, "/runs/top").text.replace("\N{NO-BREAK SPACE}", " ")
    top = rows_of(section(html, "The whole trace"), "trace")[0]
    assert "≥ $0.2500" in top
    monkeypatch.setattr(lineage, "LARGEST", 5)
    html = get(store, "/runs/top").text.replace("\N{NO-BREAK SPACE}", " ")
    top = rows_of(section(html, "The whole trace"), "trace")[0]
    assert "$0.7500" in top
    assert "≥" not in top


def test_relatives_beyond_the_tree_are_links_if_they_are_stored(store: Store) -> None:
    """Given links, dependencies and a parent task, then each leads to its run, or is said to be gone."""
    send(
        store,
        task("before", NOW, "t-before", agent_name="extract"),
        ended("before"),
        started("origin", NOW, agent_name="the origin"),
        ended("origin"),
        task(
            "r",
            NOW + 9,
            linked_run_id="origin",
            linked_trace_id="c" * 32,
            depends_on=["t-before", "t-gone", "t-before"],
            schedule="nightly",
            group_id="g-1",
            parent_task_id="t-before",
            previous_run_id="gone",
        ),
        ended("r"),
    )
    html = get(store, "/runs/r").text
    words = Page(section(html, "Facts")).words()
    for expected in (
        *("parent task extract success t-before", "attempt before gone not stored here"),
        *("enqueued by the origin success", "depends on extract success t-before t-gone not stored here"),
        *("schedule nightly", "group_id g-1", "linked_trace_id cccc"),
    ):
        assert expected in words, expected
    assert {"/runs/before", "/runs/origin"} <= set(Page(html).links())
    ids = [value for _, name, value in Page(html).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    enqueued = section(get(store, "/runs/origin").text, "Runs that it enqueued with a trace of their own")
    assert "/runs/r" in Page(enqueued).links()


BY = ("task", "model", "queue", "framework", "agent", "session", "user", "attempt", "run")


def test_spend_shows_what_costs_what_failed_and_where_runs_wait(store: Store) -> None:
    """Given runs that cost, fail and wait, when spend is shown, then each has its table, unknowns said."""
    send(
        store,
        task("a", NOW, "t1", task="dear", wait_s=4.0, attempt=1),
        call("a", cost_usd=0.5),
        call("a", "a2", cost_usd=None),
        ended("a", "error", error_type="openai.RateLimitError", error_message="429"),
        task("b", NOW, "t2", task="cheap", queue="fast", attempt=1),
        call("b", model="gpt-4o", cost_usd=0.1),
        ended("b"),
        started("c", session_id="s-1", user_id="ann"),
        call("c", cost_usd=None),
        ended("c"),
    )
    html = get(store, "/spend").text.replace("\N{NO-BREAK SPACE}", " ")
    rows = rows_of(html, "spend")
    assert rows[0].startswith("dear celery 1 2")
    assert "≥ $0.5000 1 of 2 unknown" in rows[0]
    assert rows[1].startswith("cheap celery 1 1")
    assert rows[2].startswith("no task 1 1")
    assert "$0" not in rows[2]
    [wasted] = rows_of(html, "waste")
    for expected in ("openai.RateLimitError", "dear", "error", "≥ $0.5000"):
        assert expected in wasted
    slowest, fast = rows_of(html, "queues")
    assert slowest.startswith("llm celery 1 4.0 s 4.0 s")
    assert fast.startswith("fast celery 1 1 of 1 unknown \u2013")
    words = Page(html).words()
    assert "Cost ≥ $0.6000 2 of 4 unknown" in words
    assert "Spent on what failed ≥ $0.5000 1 of 2 unknown 1 failed run" in words


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        *(("model", "gpt-4o-mini"), ("queue", "llm celery"), ("framework", "celery"), ("agent", "triage")),
        *(("session", "s-1"), ("user", "ann"), ("attempt", "attempt 1"), ("run", "triage")),
    ],
)
def test_what_is_summed_up_by_is_chosen_in_the_address(store: Store, by: str, expected: str) -> None:
    """The spend by one thing in one time can be sent to somebody; links keep the other choice."""
    run = task("r", time.time() - 60, attempt=1) | {"session_id": "s-1", "user_id": "ann"}
    send(store, run, call("r", at=time.time() - 60), ended("r"))
    html = get(store, f"/spend?by={by}&since=1h").text
    page = Page(html)
    assert expected in rows_of(html, "spend")[0]
    assert f"/spend?by={by}&since=7d" in page.links()
    assert f"/spend?by={by}" in page.links()
    assert "/spend?since=1h" in page.links()
    assert page.attributes.count(("a", "aria-current", "true")) == 2
    if by == "run":
        assert "/runs/r" in page.links()


def test_spend_that_nobody_knows_is_a_dash(store: Store) -> None:
    """Given calls of which nobody told tokens or a price, when spend is shown, then dashes stand, never 0."""
    send(store, started("r"), call("r", tokens_in=None, tokens_out=None, cost_usd=None), ended("r", "error"))
    html = get(store, "/spend").text
    words = Page(html).words()
    dash = "\u2013 1 of 1 unknown"
    for what in ("Tokens in", "Tokens out", "Cost", "Spent on what failed"):
        assert f"{what} {dash}" in words
    assert rows_of(html, "spend") == [f"no task 1 1 \u2013 \u2013 {dash}"]


def test_spend_of_nothing_says_so_in_words(store: Store) -> None:
    """Given no runs, none in this time, none that failed or waited, then words stand, not zeros."""
    assert "No runs yet" in get(store, "/spend").text
    send(store, started("r", NOW - 90_000), ended("r", at=NOW - 80_000))
    assert "No run began in this time" in get(store, "/spend?since=1h").text
    words = Page(get(store, "/spend?since=all").text).words()
    assert "No run failed in this time" in words
    assert "No run says which queue it was in" in words
    assert "No LLM call was made" in get(store, "/spend?by=model").text


def test_of_many_lines_a_page_of_spend_says_that_there_are_more(store: Store) -> None:
    """Given more queues and errors than lines, then the total is of all, and that there are more is said."""
    records: list[dict[str, Any]] = []
    for n in range(1100):
        records += [
            task(f"r{n}", NOW, f"t{n}", framework=f"f{n}", queue=f"q{n}"),
            call(f"r{n}", cost_usd=0.01),
            ended(f"r{n}", "error", error_type=f"E{n}", error_message="no"),
        ]
    send(store, *records)
    html = get(store, "/spend").text
    words = Page(html).words()
    assert "Runs 1 100 LLM calls 1 100" in words
    assert "Cost $11.00 Spent on what failed $11.00" in words
    assert "The 50 that cost most." in Page(section(html, "Spent on what failed")).words()
    assert "The 50 slowest." in Page(section(html, "Slowest queues")).words()


def test_models_are_summed_up_by_the_time_of_their_calls(store: Store) -> None:
    """Given a run that began before, then its call has a line, the total is without it, and that is said."""
    now = time.time()
    send(store, started("old", now - 7200), call("old", at=now - 60, cost_usd=0.5))
    send(store, started("new", now - 60), call("new", at=now - 60, cost_usd=0.25))
    html = get(store, "/spend?by=model&since=1h").text
    assert "$0.7500" in rows_of(html, "spend")[0]
    words = Page(html).words()
    assert "Cost $0.2500" in words
    assert "Of the calls made in this time" in words
    assert "The 50" not in words
    for path in ("/spend?by=model", "/spend?since=1h"):
        assert "Of the calls made in this time" not in Page(get(store, path).text).words()


@pytest.mark.parametrize("query", ["by=colour", "since=yesterday", "by=task&since=1y"])
def test_a_choice_that_there_is_not_is_a_page_that_says_what_there_is(store: Store, query: str) -> None:
    """Given a wrong address, when it is asked for, then 400, with words for people and a way back."""
    answer = get(store, f"/spend?{query}")
    assert answer.status_code == 400
    assert query.split("=")[0] in Page(answer.text).words() or "since" in Page(answer.text).words()
    assert "/" in Page(answer.text).links()


def test_every_page_leads_to_the_spend(store: Store) -> None:
    """From the list, from a run, and from a page of an error."""
    send(store, started("r"))
    for path in ("/", "/runs/r", "/runs/none", "/spend"):
        assert "/spend" in Page(get(store, path).text).links()


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
        told = (
            "framework",
            "task",
            "queue",
            "group_id",
            "schedule",
            "worker",
            "wait_s",
            "eta",
            "enqueued_at",
        )
        told += ("parent_task_id", "previous_run_id", "linked_run_id", "clock_skew_s", "repeat", "user_group")
        of_task = deep | dict.fromkeys(told, text) | {"depends_on": [text, text + suffix]}
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
                metadata=of_task,
                task_id=text + suffix,
                parent_run_id=text,
                root_run_id=text,
            ),
            started(other, **named, task_id=text + suffix, metadata=of_task | {"attempt": 2}),
            started(f"child{suffix}", **named, parent_run_id=r, metadata=of_task | {"wait_s": 2.0}),
            started(f"linked{suffix}", agent_name=text, metadata=of_task | {"linked_run_id": r}),
            ended(other, "killed", reason=text),
            ended(f"linked{suffix}", "revoked", reason=text),
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
            ended(r, "error", error_type=text, error_message=text, traceback=text, result=deep, reason=text),
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
    pages = ("/runs/r{n}", "/runs/o{n}", "/runs/linked{n}", "/?agent={text}&status=&before=")
    spend = [f"/spend?by={by}" for by in BY]
    harmless = [Page(get(store, path.format(n=1, text="harmless")).text) for path in (*pages, *spend)]
    fill(EVIL, "2")
    hostile = [Page(get(store, path.format(n=2, text=quote(EVIL))).text) for path in (*pages, *spend)]
    for tame, wild in zip(harmless, hostile, strict=True):
        names = [(tag, name) for tag, name, _ in tame.attributes]
        wild_names = [(tag, name) for tag, name, _ in wild.attributes]
        assert wild.tags.count("script") == 1
        assert wild.tags.count("img") == 1
        assert set(wild_names) <= set(names) | {("option", "selected")}
        assert EVIL in "".join(wild.text) or EVIL[:60] in "".join(wild.text)
        for _, name, value in wild.attributes:
            assert not name.startswith("on")
            assert name not in ("href", "src", "action") or value.startswith("/")
    assert hostile[0].tags == harmless[0].tags
    answer = get(store, f"/spend?since={quote(EVIL)}")
    assert (answer.status_code, Page(answer.text).tags.count("script")) == (400, 1)
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
    for path in ("/", "/runs/r", "/spend", "/static/style.css", "/static/live.js", "/static/icon.svg"):
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


def test_waits_times_and_parts_read_well() -> None:
    """A short wait is not 0, a time beyond the calendar not known, and no part falsely a whole."""
    assert [waited(s) for s in (None, 0, 0.25, 12.5, 90)] == [
        "\u2013",
        "< 1 ms",
        "250 ms",
        "12.5 s",
        "1 min 30 s",
    ]
    assert after("2026-01-01T00:00:00.000+00:00", 1500) == "2026-01-01T00:00:01.500+00:00"
    assert after("2026-01-01T00:00:00.000+00:00", None) is None
    assert after("9999-12-31T23:59:59.000+00:00", 1e12) is None
    assert between("2026-01-01T00:00:00.000+00:00", "2026-01-01T00:00:01.000+00:00") == 1000
    assert between("2026-01-01T00:00:01.000+00:00", "2026-01-01T00:00:00.000+00:00") is None
    assert [percent(part) for part in (0, 0.004, 0.5, 0.996, 1)] == [
        *("0 %", "less than 1 %", "50 %", "more than 99 %", "100 %"),
    ]


def test_facts_of_a_task_come_first() -> None:
    """Task id, attempt, queue; the rest by name; nothing that is empty."""
    metadata = {"b": 1, "a": 0, "queue": "q", "task_id": "t", "none": None, "empty": ""}
    assert [name for name, _ in facts(metadata)] == ["task_id", "queue", "a", "b"]
