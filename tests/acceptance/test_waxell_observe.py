"""The platform's own SDK, unchanged and in an environment of its own, against the local server.

Given a program that uses `waxell-observe` as its documentation says, when it has run, then the server's
database, JSON and pages have what it recorded, and the server refused nothing of what it asked.
"""

from __future__ import annotations

import html
import json
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.environments import Environment, NotAvailable
from tests.harness import START_S, Server, await_, environment, start_server
from waxell_workers.server import Store

HERE = Path(__file__).parent / "waxell_observe"
PROGRAM_S = 90


@pytest.fixture(scope="session")
def sdk_python() -> Path:
    return Environment("waxell-observe", HERE / "requirements.txt").python_or_skip()


@dataclass
class Platform:
    """A local server, and programs that take it for the platform."""

    server: Server
    python: Path
    model: str
    home: Path
    key: str = "any"

    def environ(self) -> dict[str, str]:
        """Return a program's environment; the SDK does nothing without a key, the server needs none."""
        return environment(
            HOME=str(self.home),
            WAXELL_API_URL=self.server.url,
            WAXELL_API_KEY=self.key,
            OPENAI_BASE_URL=self.model,
        )

    def start(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        return subprocess.run(
            [str(self.python), str(HERE / program), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environ(),
            cwd=self.home,
            timeout=PROGRAM_S,
        )

    def run(self, program: str, *arguments: str) -> str:
        """Run a program that succeeds, and is refused nothing; return what it wrote to stdout."""
        done = self.start(program, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Waxell API error" not in done.stderr
        return done.stdout

    def get(self, path: str) -> Any:
        """Return JSON from the server."""
        answer = httpx.get(self.server.url + path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def names(self) -> list[str]:
        """Return the agents' names of all runs, as the JSON has them."""
        return sorted(run["agent_name"] for run in self.get("/api/runs")["runs"])

    def only(self, agent: str) -> dict[str, Any]:
        """Return the one run of an agent: the same from the database as by JSON."""
        [found] = self.get(f"/api/runs?agent={agent}")["runs"]
        run: dict[str, Any] = self.get(f"/api/runs/{found['run_id']}")
        with Store(self.server.db, read_only=True) as store:
            assert store.run(run["run_id"]) == run
        return run

    def page(self, path: str) -> str:
        """Return a page as markup."""
        answer = httpx.get(self.server.url + path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/html")
        return answer.text

    def refused(self) -> list[str]:
        """Return what the server has written beside its address: every refusal, and every error."""
        return self.server.child.log.read_text().splitlines()[1:]


@pytest.fixture
def platform(sdk_python, children, model, tmp_path):
    """A fresh server; in the end, it must have refused nothing."""
    server = start_server(children, tmp_path)
    (tmp_path / "home").mkdir()
    platform = Platform(server, sdk_python, model, tmp_path / "home")
    yield platform
    assert platform.refused() == []


def words(markup: str) -> str:
    """Return the text of markup."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def table(markup: str, name: str) -> list[str]:
    """Return the rows of a table of the page, as text."""
    [found] = re.findall(rf'<table class="{name}">.*?<tbody>(.*?)</tbody>', markup, re.S)
    return [words(row) for row in re.findall(r"<tr[ >].*?</tr>", found, re.S)]


def outline(markup: str) -> list[tuple[int, str]]:
    """Return the spans of the page: depth and first words."""
    [spans] = re.findall(r'<table class="spans">.*?</table>', markup, re.S)
    cells = re.findall(r'<div class="indent-(\d+)">(.*?)(?:</summary>|</span>)', spans, re.S)
    return [(int(depth), words(name)) for depth, name in cells]


def test_what_is_recorded_by_hand_is_shown(platform):
    """Given a call, steps, nested spans and scores, when recorded by hand, then JSON and page have each."""
    platform.run("manual.py")
    run = platform.only("manual")
    assert (run["status"], run["workflow_name"], run["source"]) == ("success", "tickets", "rest")
    assert (run["inputs"], run["result"]) == ({"ticket": 7}, {"output": "done"})
    assert (run["session_id"], run["user_id"]) == ("session-1", "user-1")
    assert run["metadata"] == {"shift": "night", "user_group": "beta"}
    assert (run["tokens_in"], run["tokens_out"], run["call_count"]) == (11, 7, 1)
    assert run["cost_usd"] == pytest.approx(9.75e-05)

    [call] = run["calls"]
    told = {name: call[name] for name in ("model", "provider", "operation", "status", "duration_ms")}
    assert told == {
        "model": "gpt-4o",
        "provider": "openai",
        "operation": "answer",
        "status": "ok",
        "duration_ms": 120,
    }
    assert (call["prompt"], call["response"]) == ("say hello", "hello")
    assert [(step["name"], step["output"].get("chars")) for step in run["steps"]] == [
        ("load ticket", 77),
        ("tool:lookup", None),
    ]
    scores = {
        (score["name"], score["data_type"], score["value"], score["comment"]) for score in run["scores"]
    }
    assert scores == {
        ("helpful", "numeric", 0.5, "so so"),
        ("safe", "boolean", "true", ""),
        ("tone", "categorical", "kind", ""),
    }
    by_name = {span["name"]: span for span in run["spans"]}
    assert by_name["research"]["parent_position"] == by_name["plan"]["position"]
    assert by_name["chat gpt-4o"]["parent_position"] == by_name["research"]["position"]
    assert by_name["lookup"]["output_data"] == {"state": "open"}

    page = platform.page(f"/runs/{run['run_id']}")
    assert outline(page) == [
        (0, "manual.tickets"),
        (1, "plan"),
        (2, "research"),
        (3, "chat gpt-4o"),
        (1, "load ticket"),
        (1, "lookup"),
    ]
    spans = table(page, "spans")
    assert all(re.search(r" (0|\+[\d.]+ m?s) ", row) for row in spans)  # each has its offset
    assert "120 ms" in spans[3]
    assert "5 ms" in spans[5]
    assert sorted(table(page, "scores")) == [
        "helpful 0.5 numeric so so",
        "safe true boolean",
        "tone kind categorical",
    ]
    [shown] = table(page, "calls")
    for text in ("gpt-4o", "openai", "answer", "ok", "120 ms", "say hello", "hello", "11", "7", "$0.00009"):
        assert text in shown
    for text in (
        "success",
        "tickets",
        "session-1",
        "user-1",
        "beta",
        "load ticket",
        '"chars": 77',
        "tool:lookup",
    ):
        assert text in words(page)
    [row] = table(platform.page("/"), "runs")
    for text in ("success", "manual", "tickets", "11", "7"):
        assert text in row


def test_instrumented_chats_are_shown_with_their_texts(platform):
    """Given a chat, a stream and a failure, when instrumented, then each is a call with tokens and texts."""
    platform.run("instrumented.py")
    assert platform.names() == ["instrumented"]
    run = platform.only("instrumented")
    assert run["status"] == "success"
    first, streamed, failed = run["calls"]
    assert (first["model"], first["operation"], first["status"]) == ("gpt-4o", "chat.completions", "ok")
    assert (first["prompt"], first["response"]) == (
        "say hello to bob",
        "[stand-in] You wrote: say hello to bob",
    )
    assert (first["tokens_in"], first["tokens_out"]) == (4, 12)  # as the stand-in counts
    assert (streamed["model"], streamed["tokens_in"], streamed["tokens_out"]) == ("slow-30-model", 2, 10)
    assert streamed["metadata"] == {"streamed": True}
    assert streamed["ttft_ms"] > 0
    assert (failed["model"], failed["status"], failed["cost_usd"]) == ("fail-429", "error", None)
    assert failed["error"].startswith("openai.RateLimitError: Error code: 429")
    assert (first["provider"], streamed["cost_usd"]) == ("openai", None)  # no price is known of such a model
    assert (run["tokens_in"], run["tokens_out"], run["call_count"]) == (6, 22, 3)
    assert [step["name"] for step in run["steps"]] == ["io:user_message", "io:agent_response"]

    page = platform.page(f"/runs/{run['run_id']}")
    assert outline(page) == [
        (0, "instrumented.default"),
        (1, "user_message"),
        (1, "chat gpt-4o"),
        (1, "agent_response"),
        (1, "chat slow-30-model"),
        (1, "chat fail-429"),
    ]
    calls = table(page, "calls")
    assert "[stand-in] You wrote: say hello to bob" in calls[0]
    assert "streamed" in calls[1]
    assert "openai.RateLimitError: Error code: 429" in calls[2]
    assert "error" in table(page, "spans")[5]


def collected(platform, way):
    """Make a call outside any context; return how many chunks came, the run, its call and its page."""
    chunks = int(platform.run("outside.py", way))
    [name] = platform.names()
    run = platform.only(name)
    [call] = run["calls"]
    assert name == f"auto:{call['model']}"
    assert (run["status"], run["workflow_name"], run["call_count"]) == ("success", "auto", 1)
    assert run["metadata"] == {"auto_collected": True, "call_count": 1}
    assert (run["spans"], run["steps"], run["scores"]) == ([], [], [])
    page = platform.page(f"/runs/{run['run_id']}")
    assert "auto_collected" in words(page)
    [row] = table(page, "calls")
    return chunks, run, call, row


def test_a_call_outside_any_context_makes_a_run_of_its_own(platform):
    """Given a chat outside any context, when the SDK's collector sends it, then `auto:{model}` has it."""
    _, _, call, row = collected(platform, "whole")
    assert (call["model"], call["status"], call["prompt"]) == ("gpt-4o-mini", "ok", "nobody asked")
    assert (call["tokens_in"], call["tokens_out"], call["error"]) == (2, 10, "")
    assert (call["ttft_ms"], call["metadata"]) == (None, {})
    assert "nobody asked" in row
    assert "streamed" not in row


def test_a_stream_outside_any_context_has_its_first_token(platform):
    """Given a streamed chat, when the collector sends it, then it is marked, with its first token's time."""
    chunks, _, call, row = collected(platform, "streamed")
    assert chunks > 1
    assert (call["model"], call["status"], call["prompt"]) == ("slow-30-model", "ok", "nobody asked")
    assert (call["tokens_in"], call["tokens_out"], call["error"]) == (2, 10, "")
    assert call["ttft_ms"] > 0
    assert call["metadata"] == {"streamed": True}
    assert "streamed" in row
    assert "first token" in row


def test_a_failure_outside_any_context_is_an_error(platform):
    """Given a chat that fails, when the collector sends it, then the call has the error."""
    _, run, call, row = collected(platform, "failing")
    assert (call["model"], call["status"], call["cost_usd"]) == ("fail-429", "error", None)
    assert (call["tokens_in"], call["tokens_out"]) == (0, 0)
    assert call["error"].startswith("openai.RateLimitError: Error code: 429")
    assert "openai.RateLimitError: Error code: 429" in row
    assert run["error"] == "", "the program has caught it, and the SDK says `success` of the run"


def test_a_decorated_function_that_raises_is_an_error(platform):
    """Given an observed function, when it raises, then the run has type, message and traceback."""
    platform.run("decorated.py")
    run = platform.only("failing")
    assert (run["status"], run["error"]) == ("error", "LookupError: no ticket 7")
    assert run["traceback"].rstrip().endswith("LookupError: no ticket 7")
    assert "in refund" in run["traceback"]
    assert run["inputs"] == {"ticket": 7}
    assert (run["tokens_in"], run["tokens_out"], run["call_count"]) == (3, 4, 1)
    assert [(step["name"], step["output"]) for step in run["steps"]] == [("load ticket", {"ticket": 7})]
    own = run["spans"][0]
    assert (own["kind"], own["status"], own["events"][0]["name"]) == ("agent", "error", "exception")

    page = platform.page(f"/runs/{run['run_id']}")
    assert "LookupError: no ticket 7" in words(page)
    assert "in refund" in words(re.findall(r'<details id="traceback" open>(.*?)</details>', page, re.S)[0])
    assert "LookupError: no ticket 7" in table(page, "spans")[0]
    [row] = table(platform.page("/?status=error"), "runs")
    assert "failing LookupError: no ticket 7" in row


def test_nested_contexts_name_their_parents(platform):
    """Given contexts in each other, when they end, then each run is linked with its neighbours."""
    platform.run("nested.py")
    assert platform.names() == ["child", "grandparent", "parent"]
    top, middle, bottom = (platform.only(name) for name in ("grandparent", "parent", "child"))
    assert (top["parent_run_id"], middle["parent_run_id"]) == ("", top["run_id"])
    assert (bottom["parent_run_id"], bottom["root_run_id"]) == (middle["run_id"], top["run_id"])
    assert {run["status"] for run in (top, middle, bottom)} == {"success"}
    assert [run["call_count"] for run in (top, middle, bottom)] == [0, 0, 1]
    page = platform.page(f"/runs/{middle['run_id']}")
    assert re.search(rf'<dt>started by</dt>.*?href="/runs/{top["run_id"]}"[^>]*>grandparent</a>', page, re.S)
    tree = [row.split()[0] for row in table(page, "trace")]
    assert tree == ["grandparent", "parent", "child"]
    assert outline(page) == [(0, "parent.default"), (1, "child.default")]


def test_what_a_platform_governs_is_answered(platform):
    """Given policy checks, decisions, guard, prompts and models, when asked for, then the SDK goes on."""
    said = json.loads(platform.run("governed.py"))
    assert said.pop("manifest")["policies"] == []
    guards = said.pop("guard")
    assert [(guard["action"], guard["redacted_text"]) for guard in guards] == [("allow", "hello")] * 2
    assert said == {
        "check": ["allow", True, []],
        "gate": "allow",
        "decision": True,
        "decision of nobody": False,
        "daily": [True, True, False, True],
        "models": ["local", 0],
        "prompt": 404,
    }
    assert platform.names() == ["cowork", "governed"]
    assert platform.only("governed")["status"] == "success"
    daily = platform.only("cowork")
    assert (daily["workflow_name"], daily["metadata"]["date"]) == ("daily", "2026-02-03")


def test_a_guarded_prompt_reaches_the_model_whole(platform):
    """Given a guard that redacts as the server says, when a chat is made, then no word is missing."""
    assert platform.run("guarded.py").strip() == "[stand-in] You wrote: keep every word"
    [call] = platform.only("guarded")["calls"]
    assert call["prompt"] == "keep every word"


def test_a_run_that_a_signal_ends_is_interrupted(platform, children):
    """Given a run under way, when the process gets SIGTERM, then the run is interrupted, with its call."""
    command = [str(platform.python), str(HERE / "interrupted.py")]
    program = children.start("program", command, platform.environ())
    program.wait_for_line("in mid-run", START_S)
    await_(lambda: "interrupted" in platform.names(), "start of the run")
    assert platform.only("interrupted")["status"] == "running"
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(PROGRAM_S) == -signal.SIGTERM
    run = platform.only("interrupted")
    assert run["status"] == "interrupted"
    assert run["error"].startswith("Interrupted: process interrupted")
    assert [(call["tokens_in"], call["tokens_out"]) for call in run["calls"]] == [(5, 6)]
    assert [step["name"] for step in run["steps"]] == ["half way"]
    [row] = table(platform.page("/?status=interrupted"), "runs")
    assert row.startswith("interrupted interrupted Interrupted: process interrupted")


def test_a_server_with_a_key_takes_the_sdks(sdk_python, children, model, tmp_path):
    """Given a server with a key, when the SDK has another, then nothing is stored; with it, all is."""
    command = [
        sys.executable,
        "-m",
        "waxell_workers.server",
        "--port",
        "0",
        "--db",
        str(tmp_path / "runs.db"),
    ]
    child = children.start("server", command, environment(WAXELL_SERVER_API_KEY="s3cret"))
    server = Server(child, child.wait_for_line("http://", START_S), tmp_path / "runs.db")
    stranger = Platform(server, sdk_python, model, tmp_path, key="wrong").start("nested.py")
    assert stranger.returncode == 0
    assert "401" in stranger.stderr
    assert server.runs() == []
    Platform(server, sdk_python, model, tmp_path, key="s3cret").run("nested.py")
    assert [run["status"] for run in server.runs()] == ["success"] * 3


def test_two_builds_at_once_make_one_environment(tmp_path):
    """Given two that need the environment, when they build at once, then one is left, whole."""
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# nothing\n")
    empty = Environment("empty", requirements, parent=tmp_path / "venvs")
    with ThreadPoolExecutor(2) as pool:
        found = set(pool.map(lambda _: empty.python(), range(2)))
    [python] = found
    place = python.parent.parent
    assert [path.name for path in empty.parent.iterdir()] == [place.name]
    done = subprocess.run(
        [str(python), "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True
    )
    assert done.stdout.strip() == str(place)
    requirements.write_text("# something else\n")
    assert empty.place != place


def test_what_cannot_be_installed_is_said(tmp_path, monkeypatch):
    """Given a requirement that no index has, when installed, then nothing is left, and only CI fails."""
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"--no-index\n--find-links {tmp_path}\nwaxell-observe==0.1.10\n")
    unknown = Environment("unknown", requirements, parent=tmp_path / "venvs")
    with pytest.raises(NotAvailable, match=r"waxell-observe==0\.1\.10"):
        unknown.python()
    assert list(unknown.parent.iterdir()) == []
    for ci, outcome in (("false", pytest.skip.Exception), ("true", pytest.fail.Exception)):
        monkeypatch.setenv("CI", ci)
        with pytest.raises(outcome, match="unknown cannot be installed: "):
            unknown.python_or_skip()
