"""What the platform's own client asks beside runs: answered so that it goes on, and guarded like the rest."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.datastructures import QueryParams
from starlette.routing import Route

from waxell_workers.server import Store, create_app, model

API = "/api/v1/observe"
MEMORY = "/api/v1/observability/runs/r/memory"


def ask(store: Store, method: str, path: str, api_key: str = "", **arguments: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app=create_app(store, api_key=api_key))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:4319") as client:
            return await client.request(method, path, **arguments)

    return asyncio.run(once())


def post(store: Store, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = ask(store, "POST", path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_every_check_allows_and_there_is_no_policy(store: Store) -> None:
    """Given a check of a run or at a surface, when asked, then it allows; the manifest is real and empty."""
    for body in ({"agent_name": "a", "agent_id": ""}, {"agent_name": "a", "surface": "llm.before", "x": [1]}):
        reply = post(store, f"{API}/policy-check/", body)
        assert reply == {"action": "allow", "reason": "", "metadata": {}, "evaluations": []}
    manifest = ask(store, "GET", f"{API}/policy-manifest/?agent_name=a").json()
    assert manifest["manifest_version"] == "1"  # 0 is what the client makes of a platform that is down
    assert (manifest["checkpoints"], manifest["surfaces"], manifest["policies"]) == ([], {}, [])


def test_a_decision_is_told_whether_its_run_is_known(store: Store) -> None:
    """Given a run and none, when a decision names it, then the client learns whether to come again."""
    run_id = post(store, f"{API}/runs/start/", {"agent_name": "a"})["workflow_id"]
    for named, known in ((run_id, True), ("nobody", False), ("", False), (7, False)):
        body = {"agent_name": "a", "workflow_id": named, "surface": "llm.before", "decisions": []}
        assert post(store, f"{API}/governance-decision/", body) == {"run_found": known}


def test_the_guard_finds_nothing_and_gives_the_text_back(store: Store) -> None:
    """Given a prompt, when guarded, then it is allowed, and whole for a client that takes it from here."""
    reply = post(store, f"{API}/prompt-guard/", {"text": "my words", "model": "gpt-4o"})
    assert (reply["action"], reply["violations"], reply["redacted_text"]) == ("allow", [], "my words")


def test_no_model_is_configured(store: Store) -> None:
    """Given a client that asks for the models of a tenant, when answered, then the list is empty."""
    manifest = ask(store, "GET", f"{API}/llm-config/manifest/").json()
    assert (manifest["schema_version"], manifest["tenant_slug"]) == (1, "local")
    assert manifest["instances"] == manifest["tenant_models"] == manifest["groups"] == []


@pytest.mark.parametrize(
    "path",
    [
        f"{API}/events/",
        f"{API}/runs/r/partial/",
        f"{API}/agents/a/heartbeat/",
        f"{MEMORY}/episodic/",
        f"{MEMORY}/semantic/",
    ],
)
def test_what_is_of_no_use_here_is_taken_and_not_kept(store: Store, path: str) -> None:
    """Given an object, when posted, then it is taken and nothing is stored; another body is 400."""
    assert post(store, path, {"events": [{"a": 1}], "partial": "x", "data": {}}) == {}
    assert store.runs() == []
    assert ask(store, "POST", path, content=b"[]").status_code == 400


class TestDaily:
    """The run of an agent's day."""

    def test_it_is_one_run_a_day_and_agent(self, store: Store) -> None:
        """Given a repeat, another day and another agent, when asked for, then the repeat is the same run."""
        day = {"agent_slug": "desk", "agent_type": "mcp", "date": "2026-02-03", "execution_region": "US"}
        first, again = (post(store, f"{API}/runs/daily/", day) for _ in range(2))
        others = [
            post(store, f"{API}/runs/daily/", day | change)
            for change in ({"date": "2026-02-04"}, {"agent_slug": "shop"}, {"agent_type": "x"})
        ]
        assert (first["created"], again["created"]) == (True, False)
        assert first | {"created": False} == again
        assert first["run_id"] == first["workflow_id"]
        assert first["date"] == "2026-02-03"
        assert len({first["run_id"], *(other["run_id"] for other in others)}) == 4
        run = store.run(first["run_id"])
        assert run is not None
        assert (run["agent_name"], run["workflow_name"], run["status"]) == ("desk", "daily", "running")
        assert run["metadata"] == {"date": "2026-02-03", "agent_type": "mcp"}

    def test_its_calls_are_shown_like_those_of_any_run(self, store: Store) -> None:
        """Given a daily run, when a call is sent to it, then it has the call."""
        run_id = post(store, f"{API}/runs/daily/", {"agent_slug": "desk"})["run_id"]
        post(store, f"{API}/runs/{run_id}/llm-calls/", {"calls": [{"model": "m", "tokens_in": 3}]})
        run = store.run(run_id)
        assert run is not None
        assert [(call["model"], call["tokens_in"]) for call in run["calls"]] == [("m", 3)]

    @pytest.mark.parametrize("date", [None, "", "today", "2026-02-03T00:00:00", 20260203, {"a": 1}])
    def test_without_a_date_it_is_today(self, store: Store, date: object) -> None:
        """Given no date that can be read, when asked for, then the day is the server's."""
        reply = post(store, f"{API}/runs/daily/", {"agent_slug": "desk", "date": date})
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", reply["date"])
        assert reply["date"] == reply["started_at"][:10]

    def test_it_needs_an_agent(self, store: Store) -> None:
        """Given no name, when asked for, then the client is told."""
        assert ask(store, "POST", f"{API}/runs/daily/", json={"agent_type": "mcp"}).status_code == 400


class TestRefusals:
    """Whoever runs the server sees in its log what a client asked in vain."""

    def test_an_unknown_request_is_in_the_log(self, store: Store, caplog: pytest.LogCaptureFixture) -> None:
        """Given a path, a method and a run that are unknown, when asked for, then each is one line."""
        for method, path in (
            ("POST", f"{API}/tomorrow/"),
            ("DELETE", f"{API}/runs/start/"),
            ("POST", f"{API}/runs/nobody/steps/"),
        ):
            assert ask(store, method, path, content=b"{}").status_code in (404, 405)
        ask(store, "POST", f"{API}/runs/start/", content=b"{")
        lines = [record.getMessage() for record in caplog.records if record.name == "waxell_workers.server"]
        assert [line.split(":")[0] for line in lines] == [
            f"refused POST '{API}/tomorrow/'",
            f"refused DELETE '{API}/runs/start/'",
            f"refused POST '{API}/runs/nobody/steps/'",
            f"refused POST '{API}/runs/start/'",
        ]
        assert [re.search(r": (\d+),", line).group(1) for line in lines] == ["404", "405", "404", "400"]  # type: ignore[union-attr]

    def test_a_path_cannot_forge_a_line(self, store: Store, caplog: pytest.LogCaptureFixture) -> None:
        """Given a line feed in an address, when refused, then the log has one line, and a short one."""
        ask(store, "GET", f"{API}/x%0aERROR%20forged{'y' * 1000}/")
        [record] = caplog.records
        assert "\n" not in record.getMessage()
        assert len(record.getMessage()) < 500

    def test_an_answer_that_is_no_refusal_is_not(
        self, store: Store, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Given a prompt and a page that are not there, when asked for, then the log is empty."""
        with caplog.at_level(logging.INFO, "waxell_workers.server"):
            answer = ask(store, "GET", f"{API}/prompts/a/b/?label=production")
            assert (answer.status_code, answer.json()) == (404, {"error": "this server keeps no prompts"})
            assert ask(store, "GET", "/api/runs/nobody").status_code == 404
            assert ask(store, "GET", "/runs/nobody").status_code == 404
            post(store, f"{API}/events/", {})
        assert [record for record in caplog.records if record.name.startswith("waxell_workers")] == []


def every_endpoint(store: Store) -> list[tuple[str, str]]:
    """Return method and path of all that clients can send to, with names filled in."""
    routes = [route for route in create_app(store).routes if isinstance(route, Route)]
    return [
        (method, re.sub(r"\{[^}]+\}", "x", route.path))
        for route in routes
        for method in sorted((route.methods or set()) - {"HEAD"})
        if route.path.startswith("/api/")
    ]


def test_each_endpoint_is_documented() -> None:
    """Given an endpoint, when somebody reads the page about the server, then it is in one of its tables."""
    page = (Path(__file__).parents[2] / "docs" / "local-server.md").read_text()
    table = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    table = table.replace("…/semantic/", "/api/v1/observability/runs/{run_id}/memory/semantic/")
    with Store() as store:
        routes = [route for route in create_app(store).routes if isinstance(route, Route)]
    for route in routes:
        path = route.path.removeprefix(f"{API}/").replace(":path", "")
        if route.path.startswith("/api/"):
            assert f"{path}`" in table or f"{path}?" in table, path


@pytest.mark.parametrize(
    "answer", [model.RunSummary, model.Tree, model.Node, model.Group, model.Attempt, model.QueueWait,
               model.Wait, model.Spend, model.Waste, model.WastedOn, model.Stats],
)  # fmt: skip
def test_each_field_that_a_tool_gets_is_documented(answer: type) -> None:
    """Given a list, a tree or a sum, then the page about the server names each of its fields."""
    page = (Path(__file__).parents[2] / "docs" / "local-server.md").read_text()
    told = " ".join(re.findall(r"`([^`]+)`", page.split("For tools:")[1].split("\n## ")[0]))
    assert set(answer.__annotations__) - set(re.findall(r"\w+", told)) == set()


def test_each_parameter_of_a_tool_is_documented(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given an endpoint that reads a parameter, then the page's table has it in that endpoint's address."""
    page = (Path(__file__).parents[2] / "docs" / "local-server.md").read_text()
    asked: set[str] = set()

    def noted(self: QueryParams, name: str, default: str = "") -> str:
        asked.add(name)
        return default

    monkeypatch.setattr(QueryParams, "get", noted)
    for address, query in re.findall(r"\| `GET (/api/[^`?]+)(?:\?([^`]*))?` \|", page):
        asked.clear()
        ask(store, "GET", address.replace("{", "").replace("}", ""))
        assert asked == set(re.findall(r"(\w+)=", query)), address


class TestGuard:
    """Every endpoint is behind the same door."""

    def test_each_needs_the_key_where_there_is_one(self, store: Store) -> None:
        """Given a key, when it is missing or wrong, then the answer is 401, and with it another."""
        endpoints = every_endpoint(store)
        assert len(endpoints) > 20
        for method, path in endpoints:
            for headers in ({}, {"x-wax-key": "wrong"}):
                refused = ask(store, method, path, "s3cret", headers=headers, content=b"{}")
                assert refused.status_code == 401, path
            answer = ask(store, method, path, "s3cret", headers={"x-wax-key": "s3cret"}, content=b"{}")
            assert answer.status_code in (200, 400, 404), path

    def test_each_needs_no_key_where_there_is_none_and_takes_any(self, store: Store) -> None:
        """Given no key on loopback, when a client sends one, as the platform's must, then it is let in."""
        for method, path in every_endpoint(store):
            for headers in ({}, {"x-wax-key": "any"}):
                answer = ask(store, method, path, headers=headers, content=b"{}")
                assert answer.status_code in (200, 400, 404), path

    def test_none_answers_another_host_or_another_sites_page(self, store: Store) -> None:
        """Given a foreign Host or Origin, when asked, then nothing is read and nothing written."""
        for method, path in every_endpoint(store):
            answer = ask(store, method, path, headers={"host": "evil.example"}, content=b"{}")
            assert answer.status_code == 421, path
            if method == "POST":
                headers = {"origin": "https://evil.example"}
                assert ask(store, method, path, headers=headers, content=b"{}").status_code == 403, path
        assert store.runs() == []
