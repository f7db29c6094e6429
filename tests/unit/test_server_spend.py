"""Money by dimension, money in vain, and waiting: sums that say what they do not know, and from when on."""

from __future__ import annotations

import math
import random
import time
from typing import Any

import pytest

from tests.application import NOW, Client, call, ended, started
from waxell_workers.server import Store, spend, waits
from waxell_workers.server.writes import CallMade, End, Start

UNKNOWN: dict[str, Any] = {"tokens_in": None, "tokens_out": None, "cost_usd": None}
SUMS = ("runs", "calls", "tokens_in", "tokens_out", "cost_usd", "cost_unknown")


def task(run_id: str, name: str, at: float = NOW, framework: str = "celery", **told: Any) -> dict[str, Any]:
    more = {name: told.pop(name) for name in ("session_id", "user_id") if name in told}
    return started(
        run_id, at=at, agent_name=name, metadata={"task": name, "framework": framework} | told, **more
    )


def sums(lines: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in (*names, *SUMS)) for line in lines]


class TestSpend:
    @pytest.fixture(autouse=True)
    def runs(self, client: Client) -> None:
        """Two tasks of one name in two frameworks, one that knows no price, and a run that is no task."""
        client.send(
            task("r1", "t", queue="q", attempt=1, session_id="s1", user_id="u1"),
            call("1", "r1", cost_usd=0.25),
            call("2", "r1", **UNKNOWN),
            task("r2", "t", queue="q", attempt=2, session_id="s1", user_id="u2", at=NOW + 100),
            call("3", "r2", cost_usd=0.5, at=NOW + 101, model="gpt-4o", provider="openai"),
            task("r3", "t", framework="rq", queue="q", at=NOW + 200),
            call("4", "r3", **UNKNOWN, model="local", at=NOW + 201),
            started("r4", at=NOW + 300, agent_name="script"),
            call("5", "r4", cost_usd=1.0, at=NOW + 301),
        )

    def test_by_task(self, client: Client) -> None:
        """The dearest first, unknown prices last, and what is no task has a line, too."""
        found = client.get("/api/spend").json()
        assert found == client.get("/api/spend?by=task").json()
        assert sums(found, "task", "framework") == [
            (None, None, 1, 1, 10, 5, 1.0, 0),
            ("t", "celery", 2, 3, 20, 10, 0.75, 1),
            ("t", "rq", 1, 1, None, None, None, 1),
        ]

    def test_by_model_it_is_that_of_calls(self, client: Client) -> None:
        """Each call counts for its model and provider, whatever else its run has called."""
        found = client.get("/api/spend?by=model").json()
        assert sums(found, "model", "provider") == [
            ("gpt-4o-mini", None, 2, 3, 20, 10, 1.25, 1),
            ("gpt-4o", "openai", 1, 1, 10, 5, 0.5, 0),
            ("local", None, 1, 1, None, None, None, 1),
        ]

    @pytest.mark.parametrize(
        ("by", "expected"),
        [
            ("queue", [(None, 1.0), ("q", 0.75), ("q", None)]),
            ("framework", [(None, 1.0), ("celery", 0.75), ("rq", None)]),
            ("agent", [("script", 1.0), ("t", 0.75)]),
            ("session", [(None, 1.0), ("s1", 0.75)]),
            ("user", [(None, 1.0), ("u2", 0.5), ("u1", 0.25)]),
            ("attempt", [(None, 1.0), (2, 0.5), (1, 0.25)]),
            ("run", [("r4", 1.0), ("r2", 0.5), ("r1", 0.25), ("r3", None)]),
        ],
    )
    def test_by_each_dimension(self, client: Client, by: str, expected: list[Any]) -> None:
        """What is not known has a line without a name."""
        found = client.get(f"/api/spend?by={by}").json()
        assert [(line[by], line["cost_usd"]) for line in found] == expected
        assert all(set(SUMS) <= set(line) for line in found)

    def test_a_run_says_what_it_is(self, client: Client) -> None:
        """Enough for a list of the dearest runs."""
        first, second, *_ = client.get("/api/spend?by=run").json()
        names = ("run", "task", "agent", "framework", "status", "started_at", "runs")
        assert [first[name] for name in names] == [
            "r4", None, "script", None, "running", "2026-09-21T14:18:20.000+00:00", 1,
        ]  # fmt: skip
        assert second["task"] == "t"

    def test_since_and_limit(self, client: Client) -> None:
        """A time counts by when a run, or a call, began."""
        assert [line["run"] for line in client.get("/api/spend?by=run&limit=2").json()] == ["r4", "r2"]
        later = "since=2026-09-21T14:16:40Z"
        assert [line["run"] for line in client.get(f"/api/spend?by=run&{later}").json()] == ["r4", "r3"]
        found = client.get(f"/api/spend?by=model&{later}").json()
        assert [(line["model"], line["cost_usd"]) for line in found] == [
            ("gpt-4o-mini", 1.0),
            ("local", None),
        ]
        assert client.get("/api/spend?by=run&since=2100-01-01").json() == []

    def test_a_span_ends_now(self, client: Client) -> None:
        """`90s`, `30m`, `24h`, `7d`, `2w`."""
        now = time.time()
        client.send(task("new", "t", at=now - 3600), task("old", "t", at=now - 3 * 86_400))
        for span, expected in (("60s", 0), ("90m", 1), ("24h", 1), ("7d", 2), ("1w", 2)):
            found = client.get(f"/api/spend?by=run&since={span}").json()
            assert sum(line["run"] in ("new", "old") for line in found) == expected, span


@pytest.mark.parametrize("path", ["spend", "waste", "queues"])
@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("since=yesterday", "since: expected an ISO 8601 time, or a span such as 30m, 24h or 7d"),
        ("since=7y", "since: expected an ISO 8601 time"),
        ("since=-1d", "since: expected an ISO 8601 time"),
        ("since=%D9%A7d", "since: expected an ISO 8601 time"),
        ("limit=0", "limit: expected a whole number from 1 to 1000"),
    ],
)
def test_what_is_allowed_is_said(client: Client, path: str, query: str, words: str) -> None:
    """400, in words."""
    answer = client.get(f"/api/{path}?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(words)


def test_a_dimension_that_is_none_is_refused(client: Client) -> None:
    """With those that there are; and each of these is one."""
    answer = client.get("/api/spend?by=colour")
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("by: expected task, queue, framework, agent, model,")
    for by in spend.DIMENSIONS:
        assert client.get(f"/api/spend?by={by}").json() == []


class TestWaste:
    def test_by_error_and_in_all(self, client: Client) -> None:
        """What ended in success, ignored or not at all is no waste; a killed run says its state."""
        ends = [
            ("r1", "a", {"state": "error", "error_type": "ValueError"}, 0.25),
            ("r2", "b", {"state": "error", "error_type": "ValueError"}, 0.5),
            ("r3", "b", {"state": "killed", "reason": "killed: signal 9"}, 2.0),
            ("r4", "c", {"state": "retry", "error_type": "TimeoutError"}, None),
            ("r5", "a", {"state": "success"}, 8.0),
            ("r6", "a", {"state": "ignored"}, 16.0),
            ("r7", "a", None, 32.0),
        ]
        for run_id, name, end, cost in ends:
            client.send(task(run_id, name), call(f"c-{run_id}", run_id, cost_usd=cost))
            if end:
                client.send(ended(run_id, **end))
        found = client.get("/api/waste").json()
        assert sums([found["total"]]) == [(4, 4, 40, 20, 2.75, 1)]
        assert sums(found["by_error"], "status", "error_type", "tasks") == [
            ("killed", "", ["b"], 1, 1, 10, 5, 2.0, 0),
            ("error", "ValueError", ["b", "a"], 2, 2, 20, 10, 0.75, 0),
            ("retry", "TimeoutError", ["c"], 1, 1, 10, 5, None, 1),
        ]
        assert [line["status"] for line in client.get("/api/waste?limit=1").json()["by_error"]] == ["killed"]
        none = client.get("/api/waste?since=2100-01-01").json()
        assert none["by_error"] == []
        assert sums([none["total"]]) == [(0, 0, 0, 0, None, 0)]

    def test_the_dearest_tasks_are_named(self, client: Client) -> None:
        """Three of them; a run that is no task by its agent."""
        for n in range(5):
            client.send(
                started(f"r{n}", agent_name=f"a{n}"),
                call(f"c{n}", f"r{n}", cost_usd=float(n)),
                ended(f"r{n}", state="error"),
            )
        [line] = client.get("/api/waste").json()["by_error"]
        assert line["tasks"] == ["a4", "a3", "a2"]


class TestWaits:
    def test_percentiles_are_those_of_the_nearest_rank(self, store: Store) -> None:
        """As a sorted list has them; the queue that is slower for 19 of 20 stands first."""
        values = {
            "one": [5.0],
            "many": [float(n) for n in range(1, 101)],
            "twenty": [float(n) for n in range(1, 21)],
            "odd": [round(random.Random(1).expovariate(1), 3) for _ in range(37)],
            "outlier": [0.1] * 39 + [999.0],
        }
        with store.write() as writer:
            for queue, told in values.items():
                for n, wait in enumerate(told):
                    metadata = {"framework": "celery", "queue": queue, "wait_s": wait}
                    writer.start(f"{queue}-{n}", Start("a", "w", NOW + n, "ingest", metadata=metadata))
        found = store.queues()
        assert [line["queue"] for line in found] == ["many", "twenty", "one", "odd", "outlier"]
        for line in found:
            told = sorted(values[line["queue"]])
            assert (line["runs"], line["waited"], line["framework"]) == (len(told), len(told), "celery")
            assert line["wait_s"]["max"] == told[-1]
            assert line["wait_s"]["mean"] == pytest.approx(sum(told) / len(told))
            for name, part in (("p50", 50), ("p95", 95)):
                rank = math.ceil(len(told) * part / 100)
                assert line["wait_s"][name] == told[rank - 1], (line["queue"], name)  # type: ignore[literal-required]

    def test_a_wait_that_is_not_known_is_no_0(self, client: Client) -> None:
        """It is counted as a run, and not as one that waited; such a queue stands last."""
        client.send(
            *(task(f"r{n}", "t", queue="q", wait_s=2.0) for n in range(2)),
            task("r3", "t", queue="q", wait_s="long"),
            task("r4", "t", queue="silent"),
            task("r5", "t", wait_s=9.0),
        )
        none = {"mean": None, "p50": None, "p95": None, "max": None}
        assert client.get("/api/queues").json() == [
            {"framework": "celery", "queue": "q", "runs": 3, "waited": 2, "wait_s": dict.fromkeys(none, 2.0)},
            {"framework": "celery", "queue": "silent", "runs": 1, "waited": 0, "wait_s": none},
        ]
        assert client.get("/api/queues?since=2100-01-01").json() == []
        assert len(client.get("/api/queues?limit=1").json()) == 1

    def test_a_runs_wait_beside_what_is_usual(self, store: Store, client: Client) -> None:
        """Of its own queue and framework, the newest runs; for one without a queue there is nothing usual."""
        client.send(
            *(task(f"r{n}", "t", queue="q", wait_s=float(n)) for n in range(10)),
            task("mute", "t", queue="q"),
            task(
                "other", "t", framework="rq", queue="q", wait_s=100.0, clock_skew_s=0.5, enqueued_at=NOW - 1
            ),
            started("none"),
        )
        found = store.wait_of("r7")
        assert found is not None
        assert (found["wait_s"], found["longer_than"]) == (7.0, 0.7)
        assert found["usual"] is not None
        assert (found["usual"]["runs"], found["usual"]["waited"]) == (11, 10)
        assert found["usual"]["wait_s"] == {"mean": 4.5, "p50": 4.0, "p95": 9.0, "max": 9.0}
        mute, other, none = store.wait_of("mute"), store.wait_of("other"), store.wait_of("none")
        assert mute is not None and other is not None and none is not None  # noqa: PT018
        assert (mute["wait_s"], mute["longer_than"], mute["usual"]) == (None, None, found["usual"])
        assert (other["clock_skew_s"], other["enqueued_at"]) == (0.5, "2026-09-21T14:13:19.000+00:00")
        assert (none["usual"], none["longer_than"]) == (None, None)
        assert store.wait_of("nobody") is None

    def test_what_is_usual_is_what_was_lately(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """Last month's traffic is not."""
        monkeypatch.setattr(waits, "NEWEST", 3)
        with store.write() as writer:
            for n in range(10):
                metadata = {"queue": "q", "wait_s": float(100 - n)}
                writer.start(f"r{n}", Start("a", "w", NOW + n, "ingest", metadata=metadata))
        found = store.wait_of("r0")
        assert found is not None
        assert found["usual"] is not None
        assert (found["usual"]["runs"], found["usual"]["wait_s"]["max"], found["longer_than"]) == (
            3,
            93.0,
            1.0,
        )


def test_sums_over_many_runs_read_an_index_only(store: Store) -> None:
    """Not the texts beside the figures: a large file is summed up in a moment."""
    with store.write() as writer:
        writer.start("r", Start("a", "w", NOW, "ingest", metadata={"queue": "q", "wait_s": 1.0}))
        writer.call("r", CallMade("m", NOW))
        writer.end("r", End("error", NOW + 1))
    statements: list[str] = []
    with store.read() as connection:
        connection.set_trace_callback(statements.append)
        waits.queues(connection, since=1.0, limit=5)
        spend.waste(connection, since=1.0, limit=5)
        spend.total(connection, since=1.0)
        for by in spend.DIMENSIONS:
            spend.spend(connection, by=by, since=1.0, limit=5)
        connection.set_trace_callback(None)
        assert len(statements) >= 5 + len(spend.DIMENSIONS) - 1
        for statement in statements:
            plan = [row["detail"] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
            assert any("USING COVERING INDEX" in line for line in plan), statement
            assert not any(
                line.startswith(("SCAN runs USING INDEX", "SEARCH runs USING INDEX")) for line in plan
            )


def test_huge_amounts_stay_numbers(client: Client) -> None:
    """Beyond 64 bits and beyond every price: the answer is still JSON that anybody reads."""
    for n in range(3):
        client.send(
            task(f"r{n}", "t", queue="q", wait_s=1e12, attempt=2**53),
            *(call(f"c{n}-{m}", f"r{n}", tokens_in=2**53, cost_usd=1e12) for m in range(3)),
            ended(f"r{n}", state="error"),
        )
    for path in ("spend", "spend?by=model", "spend?by=attempt", "waste", "queues"):
        assert client.get(f"/api/{path}").status_code == 200
    [line] = client.get("/api/spend").json()
    assert (line["cost_usd"], line["tokens_in"]) == (9e12, 3 * 2**53)
