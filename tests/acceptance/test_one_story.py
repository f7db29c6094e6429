"""Given one web request whose work goes over FastAPI, Celery, RQ and Dramatiq, then it is one tree.

Four real processes of four frameworks, three brokers in one Valkey. What is asked is what the local server
says: who is whose child, how long each waited, what each cost with all below it, and what failed cost.
"""

from __future__ import annotations

import json
import socket
import sys
import time
import urllib.request
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest

from tests.harness import WORK_S, await_, environment
from waxell_workers.testing.conformance.stage import free_port

STORY = Path(__file__).parent / "story"
IN_USD, OUT_USD = 0.15e-6, 0.60e-6
"""What a token of gpt-4o-mini costs, which has been so since July 2024."""
LATE_S = 1.5
RUNS = {
    "POST /tickets/{number}": ("fastapi", 1),
    "tickets.triage": ("celery", 1),
    "tickets.summarise": ("celery", 1),
    "tickets.translate": ("celery", 3),
    "tickets.score": ("celery", 1),
    "tickets.check": ("celery", 2),
    "tickets.decide": ("celery", 1),
    "consult": ("default", 1),
    "reports.fetch": ("rq", 1),
    "reports.report": ("rq", 1),
    "write": ("dramatiq", 1),
    "post": ("dramatiq", 1),
}
PARENTS = {
    "tickets.triage": "POST /tickets/{number}",
    "tickets.summarise": "tickets.triage",
    "tickets.translate": "POST /tickets/{number}",
    "tickets.score": "POST /tickets/{number}",
    "tickets.check": "POST /tickets/{number}",
    "tickets.decide": "tickets.check",  # the member of the header that came last, since it was tried again
    "consult": "tickets.decide",
    "reports.fetch": "consult",
    "reports.report": "consult",
    "write": "reports.report",
    "post": "write",
}
ON_BEHALF = ("consult", "reports.fetch", "reports.report", "write", "post")
ALL = sum(count for _, count in RUNS.values())


@pytest.fixture
def story(children, server, valkey, model, tmp_path):
    """Tell the story, with Dramatiq's worker late, and return what the server says of it."""
    settings = environment(
        BROKER_URL=valkey,
        OPENAI_BASE_URL=model,
        WAXELL_API_URL=server.url,
        WAXELL_SPOOL_DIR=str(tmp_path / "spool"),
        WAXELL_FLUSH_INTERVAL="1",
        PYTHONPATH=str(STORY),
    )
    port = free_port()

    def start(name, *command):
        return children.start(name, [sys.executable, "-m", *command], settings)

    def answers():
        with closing(socket.socket()) as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    start("celery", "celery", "-A", "tickets", "worker", "-c", "2", "--loglevel", "INFO")
    ours = [f"waxell_workers.rq.{name}" for name in ("Worker", "Queue")]
    rq_url = f"{valkey.rsplit('/', 1)[0]}/1"
    start(
        "rq", "rq.cli", "worker", "-u", rq_url, "--worker-class", ours[0], "--queue-class", ours[1], "reports"
    )
    start("web", "uvicorn", "web:app", "--port", str(port)).wait_for(answers, "its port", WORK_S)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/tickets/42", b"", WORK_S) as response:
        assert response.status == 202
    await_(lambda: ended(server, "reports.report"), "the end of RQ's part", WORK_S)
    time.sleep(LATE_S)  # not a wait for something: the letter waits for its worker, and that is to be seen
    start("dramatiq", "dramatiq", "letters", "--processes", "1", "--threads", "2")
    await_(lambda: len(server.ended()) >= ALL, f"{ALL} ended runs", WORK_S)
    return Story(server)


def ended(server, name):
    return [run for run in server.ended() if run["agent_name"] == name]


class Story:
    """What the server says, and its nodes flat."""

    def __init__(self, server):
        self.url = server.url
        (root,) = ended(server, "POST /tickets/{number}")
        self.tree = self.get(f"/api/runs/{root['run_id']}/tree")
        self.nodes, waiting = [], list(self.tree["tree"])
        while waiting:
            node = waiting.pop()
            self.nodes.append(node)
            waiting += node["children"]
        self.by_id = {node["run_id"]: node for node in self.nodes}

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=WORK_S) as response:
            return json.load(response)

    def named(self, name):
        return [node for node in self.nodes if node["agent_name"] == name]


def moment(text):
    return datetime.fromisoformat(text).timestamp()


def test_one_request_is_one_tree(story):
    """Over FastAPI, Celery (chain, group, chord with a retry), RQ (dependency), Dramatiq (pipeline)."""
    assert {name: (ns[0]["workflow_name"], len(ns)) for name in RUNS if (ns := story.named(name))} == RUNS
    assert (story.tree["runs"], len(story.nodes), story.tree["truncated"]) == (ALL, ALL, False)
    (root,) = story.tree["tree"]
    assert root["agent_name"] == "POST /tickets/{number}"
    assert {node["trace_id"] for node in story.nodes} == {story.tree["trace_id"]}
    by_trace = story.get(f"/api/traces/{story.tree['trace_id']}")
    assert by_trace["tree"] == story.tree["tree"]
    for name, parent in PARENTS.items():
        found = {story.by_id[node["parent_run_id"]]["agent_name"] for node in story.named(name)}
        assert found == {parent}, name
    (decide,) = story.named("tickets.decide")
    assert story.by_id[decide["parent_run_id"]]["attempt"] == 2
    assert {node["status"] for node in story.nodes if node["agent_name"] != "tickets.check"} == {"success"}
    (report,), (fetch,) = story.named("reports.report"), story.named("reports.fetch")
    assert report["metadata"]["depends_on"] == [fetch["task_id"]]
    check_waits(story)
    check_attempts(story)
    check_money(story)
    check_on_behalf(story)


def check_waits(story):
    """Each has waited from when it could have begun until it began; the letter for its worker."""
    for node in story.nodes:
        if not node["task"]:
            continue
        ready = max(moment(node["enqueued_at"]), moment(node["eta"]) if node["eta"] else 0.0)
        began = moment(node["started_at"])
        assert node["wait_s"] >= 0
        assert node["wait_s"] == pytest.approx(max(0.0, began - ready), abs=0.05), node["agent_name"]
    (write,), (post,) = story.named("write"), story.named("post")
    assert write["wait_s"] > LATE_S > post["wait_s"]
    again = max(story.named("tickets.check"), key=lambda node: node["attempt"])
    assert again["eta"]
    assert again["wait_s"] < moment(again["started_at"]) - moment(again["enqueued_at"]) - 1, (
        "the delay is no wait"
    )
    (fetch,), (report,) = story.named("reports.fetch"), story.named("reports.report")
    assert moment(report["enqueued_at"]) >= moment(fetch["started_at"]), (
        "a dependent waits from when it may go"
    )
    queues = {row["queue"]: row for row in story.get("/api/queues")}
    assert queues["letters"]["wait_s"]["max"] == pytest.approx(write["wait_s"], abs=0.001)
    assert {"celery", "reports", "letters"} <= queues.keys()


def check_attempts(story):
    """The two attempts are one group: numbered, the second knows the first, and what failed has its price."""
    first, second = sorted(story.named("tickets.check"), key=lambda node: node["attempt"])
    assert (first["status"], second["status"]) == ("retry", "success")
    assert first["reason"].startswith("retry")
    assert second["previous_run_id"] == first["run_id"]
    group = story.get(f"/api/tasks/{first['task_id']}")
    assert [run["run_id"] for run in group["runs"]] == [first["run_id"], second["run_id"]]
    assert (group["final_state"], group["attempts"], group["deliveries"]) == ("success", 2, 2)
    assert group["failed"]["runs"] == 1
    assert group["failed"]["cost_usd"] == pytest.approx(first["cost_usd"])
    assert group["cost_usd"] == pytest.approx(first["cost_usd"] + second["cost_usd"])
    assert group["wait_s"] == pytest.approx(first["wait_s"] + second["wait_s"], abs=0.001)
    waste = story.get("/api/waste")
    assert waste["total"]["cost_usd"] == pytest.approx(first["cost_usd"])
    (row,) = waste["by_error"]
    assert (row["status"], row["error_type"], row["runs"]) == ("retry", "TimeoutError", 1)


def check_money(story):
    """Each run has the price of its call, and each subtotal is that of all below."""
    for node in story.nodes:
        calls = 0 if node["agent_name"] in ("POST /tickets/{number}", "tickets.decide") else 1
        assert node["calls"] == calls, node["agent_name"]
        if calls:
            price = node["tokens_in"] * IN_USD + node["tokens_out"] * OUT_USD
            assert node["cost_usd"] == pytest.approx(price), node["agent_name"]
    total = sum(node["cost_usd"] or 0 for node in story.nodes)
    (root,) = story.tree["tree"]
    assert root["subtotal"]["cost_usd"] == pytest.approx(total)
    assert (root["subtotal"]["runs"], root["subtotal"]["calls"]) == (ALL, ALL - 2)
    for node in story.nodes:
        below = sum(child["subtotal"]["cost_usd"] for child in node["children"])
        assert node["subtotal"]["cost_usd"] == pytest.approx((node["cost_usd"] or 0) + below)
    asked = story.get(f"/api/runs/{root['run_id']}?subtotal=true")["subtotal"]
    assert asked == pytest.approx(root["subtotal"])
    for by, value in (("task", "tickets.translate"), ("queue", "letters"), ("framework", "rq")):
        rows = {row[by]: row for row in story.get(f"/api/spend?by={by}")}
        own = sum(node["cost_usd"] or 0 for node in story.nodes if node[by] == value)
        assert rows[value]["cost_usd"] == pytest.approx(own), by
    (model,) = story.get("/api/spend?by=model")
    assert (model["model"], model["calls"]) == ("gpt-4o-mini", ALL - 2)
    assert model["cost_usd"] == pytest.approx(total)


def check_on_behalf(story):
    """Session, user, tag and metadata that one run was given are those of all below it, and of no other."""
    for node in story.nodes:
        run = story.get(f"/api/runs/{node['run_id']}")
        told = (run["session_id"], run["user_id"], run["tags"], run["metadata"].get("plan"))
        is_below = node["agent_name"] in ON_BEHALF
        assert told == (("s-1", "u-7", {"tenant": "acme"}, "gold") if is_below else ("", "", {}, None)), node
    rows = {row["user"]: row for row in story.get("/api/spend?by=user")}
    (consult,) = story.named("consult")
    assert rows["u-7"]["cost_usd"] == pytest.approx(consult["subtotal"]["cost_usd"])
