"""What a provider did not say is not 0: in sums, on pages, in JSON and in a terminal, by both roads."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from tests.application import API, Client, call, ended, started
from waxell_workers.cli.commands import cli
from waxell_workers.core.records import LLMCall, Record, RunStarted
from waxell_workers.export import bodies
from waxell_workers.server import Store
from waxell_workers.server.views import least, messages, tools, unknown_of

UNTOLD: dict[str, Any] = {"tokens_in": None, "tokens_out": None, "cost_usd": None}


def by_ingest(client: Client, *calls: dict[str, Any]) -> None:
    client.send(started(), *calls, ended())


def by_rest(client: Client, *calls: dict[str, Any]) -> None:
    """Send what our exporter makes of the records for a server that takes REST only."""
    start = msgspec.convert(started(), Record)
    assert isinstance(start, RunStarted)
    records = [msgspec.convert(each, LLMCall) for each in calls]
    client.post(f"{API}/runs/start/", bodies.start(start)).raise_for_status()
    spans = [bodies.llm_span(record, start, n) for n, record in enumerate(records, 1)]
    run = f"{API}/runs/r1"
    client.post(f"{run}/llm-calls/", {"calls": [bodies.call(each) for each in records]}).raise_for_status()
    client.post(f"{run}/spans/", {"spans": spans}).raise_for_status()
    client.post(f"{run}/complete/", {"status": "success"}).raise_for_status()


ROADS = pytest.mark.parametrize("send", [by_ingest, by_rest])


@ROADS
def test_a_call_whose_tokens_nobody_told_has_none(client: Client, send: Any) -> None:
    """Neither tokens nor a cost, and no kind of tokens that would be a number."""
    send(client, call(**UNTOLD))
    [found] = client.run("r1")["calls"]
    sizes = (
        "tokens_in",
        "tokens_out",
        "tokens_cached",
        "tokens_cache_written",
        "tokens_reasoning",
        "cost_usd",
    )
    assert {found[name] for name in sizes} == {None}
    assert client.run("r1")["tokens_in"] is None


@ROADS
def test_a_count_of_0_is_known(client: Client, send: Any) -> None:
    """A provider that says that nothing was cached has said something; so has one with an empty answer."""
    send(
        client, call(tokens_out=0, tokens_cached=0, tokens_cache_written=0, tokens_reasoning=0, cost_usd=0.0)
    )
    run = client.run("r1")
    [found] = run["calls"]
    sizes = ("tokens_out", "tokens_cached", "tokens_cache_written", "tokens_reasoning", "cost_usd")
    assert [found[name] for name in sizes] == [0] * 5
    assert (run["tokens_out_unknown"], run["cost_unknown"]) == (0, 0)


@ROADS
def test_a_sum_says_how_many_calls_it_is_without(client: Client, send: Any) -> None:
    """It is the sum of what is known, and each of its three kinds has a count of its own."""
    send(client, call("c1"), call("c2", tokens_out=None, cost_usd=None), call("c3", **UNTOLD))
    run = client.run("r1")
    assert (run["tokens_in"], run["tokens_out"], run["cost_usd"]) == (20, 5, 0.001)
    assert (run["tokens_in_unknown"], run["tokens_out_unknown"], run["cost_unknown"]) == (1, 2, 2)
    [summary] = client.get("/api/runs").json()["runs"]
    stats = client.get("/api/stats").json()
    for found in (summary, stats):
        assert (found["tokens_in"], found["tokens_in_unknown"]) == (20, 1)
        assert (found["tokens_out"], found["tokens_out_unknown"]) == (5, 2)
        assert (found["cost_usd"], found["cost_unknown"]) == (0.001, 2)


@ROADS
def test_a_sum_of_unknowns_is_unknown_and_that_of_no_calls_is_0(client: Client, send: Any) -> None:
    """In the run, in the list, and over all runs."""
    client.send(started("none"), ended("none"))
    assert client.run("none")["tokens_in"] == 0
    assert client.get("/api/stats").json()["tokens_in"] == 0
    send(client, call("c1", **UNTOLD), call("c2", **UNTOLD))
    first = next(run for run in client.get("/api/runs").json()["runs"] if run["run_id"] == "r1")
    for found in (client.run("r1"), first, client.get("/api/stats").json()):
        assert (found["tokens_in"], found["tokens_out"], found["cost_usd"]) == (None, None, None)


@ROADS
def test_an_embedding_has_no_output_rather_than_an_unknown_one(client: Client, send: Any) -> None:
    """Nobody tells its size, and nothing is missing."""
    send(client, call(operation="embeddings", tokens_out=None))
    run = client.run("r1")
    assert (run["tokens_out"], run["tokens_out_unknown"]) == (0, 0)


@ROADS
def test_messages_tools_and_caches_arrive_by_both_roads(client: Client, send: Any) -> None:
    """What REST has no field for goes with the span, the whole text of an answer too."""
    sent: dict[str, Any] = {
        "messages": [{"role": "system", "text": "Be brief."}, {"role": "user", "text": "p" * 900}],
        "prompt": "p" * 900,
        "response": "r" * 900,
        "tool_calls": [
            {"name": "search", "id": "t1", "arguments": '{"q": 1}'},
            {"name": "refund", "id": "t2"},
        ],
        "tokens_cached": 4,
        "tokens_cache_written": 3,
        "tokens_reasoning": 2,
        "finish_reason": "tool_calls",
        "response_id": "chatcmpl-1",
        "streamed": True,
        "ttft_ms": 12.0,
    }
    send(client, call(**sent))
    [found] = client.run("r1")["calls"]
    for name in (
        "messages",
        "response",
        "tool_calls",
        "tokens_cached",
        "tokens_cache_written",
        "tokens_reasoning",
    ):
        assert found[name] == sent[name], name
    assert found["metadata"] == {
        "streamed": True,
        "finish_reason": "tool_calls",
        "response_id": "chatcmpl-1",
    }
    assert found["ttft_ms"] == 12


def test_another_clients_call_without_a_count_is_unknown(client: Client) -> None:
    """REST wants a number; who leaves it out, or sends nonsense, has not told one. 0 is a number."""
    run_id = client.post(f"{API}/runs/start/", {"agent_name": "a"}).json()["run_id"]
    sent = [
        {"model": "m"},
        {"model": "m", "tokens_in": "many", "tokens_out": True},
        {"model": "m", "tokens_in": 0},
    ]
    client.post(f"{API}/runs/{run_id}/llm-calls/", {"calls": sent}).raise_for_status()
    assert [(c["tokens_in"], c["tokens_out"]) for c in client.run(run_id)["calls"]] == [
        (None, None),
        (None, None),
        (0, None),
    ]


def test_a_span_without_counts_belongs_to_a_call_without(client: Client) -> None:
    """The two are matched by their counts: not told is not told, here and there."""
    run_id = client.post(f"{API}/runs/start/", {"agent_name": "a"}).json()["run_id"]
    client.post(f"{API}/runs/{run_id}/llm-calls/", {"calls": [{"model": "m"}]}).raise_for_status()
    facts = {"model": "m", "gen_ai.provider.name": "ollama"}
    span = {"name": "chat", "kind": "llm", "position": 1, "duration_ms": 70, "attributes": facts}
    client.post(f"{API}/runs/{run_id}/spans/", {"spans": [span]}).raise_for_status()
    [found] = client.run(run_id)["calls"]
    assert (found["provider"], found["duration_ms"], found["tokens_in"]) == ("ollama", 70, None)
    assert client.run(run_id)["tokens_in_unknown"] == 1


def test_pages_show_no_nought_for_the_unknown(client: Client) -> None:
    """A dash where nobody knows anything; where something is known, that it is at least so much."""
    client.send(
        started(),
        call("c1", tokens_in=1200, cost_usd=0.0123),
        call("c2", **UNTOLD),
        ended(),
        started("r2"),
        call("c3", "r2", **UNTOLD),
        ended("r2"),
    )
    for path in ("/runs/r1", "/"):
        page = client.get(path).text
        assert "≥\u00a01\u202f200" in page
        assert "≥\u00a0$0.0123" in page
    assert "1 of 2 unknown" in client.get("/runs/r1").text
    assert "2 of 3 unknown" in client.get("/").text
    unknown = client.get("/runs/r2").text
    assert "$0" not in unknown
    cells = re.findall(r'data-label="(?:tokens in|tokens out|cost)">(.*?)</td>', unknown, re.DOTALL)
    assert [re.sub(r"<.*?>", "", cell).strip() for cell in cells] == ["\N{EN DASH}"] * 3
    assert "≥" not in unknown
    assert "1 of 1 unknown" in unknown
    assert "the provider did not say" in unknown
    assert "≥" not in client.get("/runs/r1").text.split('<table class="calls">')[1]


def test_a_call_is_shown_with_its_messages_answer_and_tools(client: Client) -> None:
    """Names of tools always, arguments where they were recorded; a long text is folded, and there."""
    long = "word " * 200
    client.send(
        started(),
        call(
            "c1",
            messages=[{"role": "system", "text": "Be brief."}, {"role": "user", "text": long}],
            response="Looking it up.",
            tool_calls=[{"name": "search", "id": "t1", "arguments": '{"q": "<b>"}'}],
            tokens_cached=3,
            tokens_cache_written=2,
            tokens_reasoning=4,
            finish_reason="tool_calls",
            streamed=True,
            ttft_ms=12.0,
            response_model="gpt-4o-mini-2024",
        ),
        call("c2", at=1_790_000_002.0, tool_calls=[{"name": "refund"}]),
        ended(),
    )
    page = client.get("/runs/r1").text
    for expected in (
        *(
            "system",
            "Be brief.",
            long.strip(),
            "1\u202f000 characters",
            "Looking it up.",
            ">search<",
            ">refund<",
        ),
        *(
            "&lt;b&gt;",
            "3 cached",
            "2 cache written",
            "4 reasoning",
            "tool_calls",
            "streamed",
            "first token 12 ms",
        ),
        "answered by gpt-4o-mini-2024",
    ):
        assert expected in page, expected
    assert page.count("messages and answer") == 1
    assert page.count("Arguments of") == 1


def test_a_terminal_shows_the_same(client: Client, store: Store) -> None:
    """A dash, at least so much, and of how many calls it is without; JSON has null and the counts."""
    client.send(started(), call("c1"), call("c2", **UNTOLD, tool_calls=[{"name": "search"}]), ended())
    client.send(started("r2"), call("c3", "r2", **UNTOLD), ended("r2"))

    def shown(*arguments: str) -> str:
        result = CliRunner(env={"COLUMNS": "160"}).invoke(cli, [*arguments, "--db", str(store.path)])
        assert result.exit_code == 0, result.output
        return result.stdout

    listed = {line.split()[0]: line for line in shown("runs", "ls").splitlines()}
    assert "≥ 15" in listed["r1"]
    assert "≥ $0.001000" in listed["r1"]
    assert listed["r2"].split()[-2:] == ["-", "-"]
    run = " ".join(shown("runs", "show", "r1").split())
    assert "tokens in ≥ 10 (1 of 2 unknown), out ≥ 5 (1 of 2 unknown)" in run
    assert "cost ≥ $0.001000 (1 of 2 unknown)" in run
    assert "search" in run
    [made] = [line for line in shown("runs", "show", "r2").splitlines() if "gpt-4o-mini" in line]
    assert made.split() == ["gpt-4o-mini", "chat", "ok", *"----"]
    as_json = json.loads(shown("runs", "show", "r2", "--json"))
    assert (as_json["tokens_in"], as_json["cost_usd"], as_json["cost_unknown"]) == (None, None, 1)
    assert as_json["llm_calls"][0]["tokens_in"] is None


def test_how_it_is_written() -> None:
    """One form, everywhere."""
    assert least("12", 0) == "12"
    assert least("12", 1) == "≥\u00a012"
    assert least("\N{EN DASH}", 1) == "\N{EN DASH}"
    assert (unknown_of(0, 3), unknown_of(1, 3)) == ("", "1 of 3 unknown")


def test_messages_and_tools_of_any_shape_can_be_shown() -> None:
    """They are what a client sent: a list is all that is sure."""
    assert messages([{"role": 1, "text": {"a": 1}}, "x", None, {}]) == [
        ("1", '{\n  "a": 1\n}'),
        ("", "x"),
        ("", ""),
        ("", ""),
    ]
    assert tools([{"name": "n", "arguments": {"a": 1}}, {}, 3]) == [
        ("n", "", '{\n  "a": 1\n}'),
        ("?", "", ""),
        ("3", "", ""),
    ]
