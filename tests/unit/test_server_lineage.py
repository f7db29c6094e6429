"""Trees of traces, and the attempts of a task: what is under what, what it cost, and that nothing is lost."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

from tests.application import API, NOW, Client, call, ended, started
from waxell_workers.core.records import Record, RunEnded, RunStarted
from waxell_workers.export import bodies
from waxell_workers.server import Store, lineage
from waxell_workers.server.model import Node, Tree
from waxell_workers.server.writes import CallMade, End, Start

TRACE = "0af7651916cd43dd8448eb211c80319c"
UNKNOWN: dict[str, Any] = {"tokens_in": None, "tokens_out": None, "cost_usd": None}


NO_ATTEMPT: tuple[Any, ...] = ("2", 0, -1, 1.5, True, 2**60, 1e300, None, [1], {"a": 1})
NO_WAIT: tuple[Any, ...] = ("1", -1, 1e300, True, None, [1.0], {"s": 1})
NO_TIME: tuple[Any, ...] = ("now", -1, 1e300, [], {})


def member(run_id: str, parent: str = "", **more: Any) -> dict[str, Any]:
    """Return the start of a run of the trace."""
    return started(run_id, parent_run_id=parent, root_run_id="a", trace_id=TRACE) | more


def shape(nodes: list[Any]) -> Any:
    """Return ids as they are nested: `{"a": {"b": {}}}`."""
    return {node["run_id"]: shape(node["children"]) for node in nodes}


def flat(nodes: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        assert node["run_id"] not in found
        found[node["run_id"]] = node
        waiting.extend(node["children"])
    return found


def tree(store: Store, run_id: str) -> Tree:
    found = store.tree(run_id)
    assert found is not None
    return found


def add(store: Store, *runs: tuple[str, dict[str, Any]]) -> None:
    """Store runs that have ended, each a second after the one before, unless it says when."""
    with store.write() as writer:
        for number, (run_id, more) in enumerate(runs):
            at = more.pop("at", NOW + number)
            writer.start(run_id, Start("agent", "celery", at, "ingest", **more))
            writer.end(run_id, End("success", at + 0.5, 500.0))


class TestTree:
    def test_a_trace_is_a_tree_with_sums_at_every_node(self, client: Client) -> None:
        """Own sums stay a run's own; the subtotal has all below; what is not known is counted, never 0."""
        client.send(
            *(member("a"), member("b", "a", at=NOW + 1), member("c", "b", at=NOW + 2)),
            member("d", "a", at=NOW + 3),
            *(call("1", "a"), call("2", "c"), call("3", "c", **UNKNOWN), call("4", "d", **UNKNOWN)),
            *(ended(name, at=NOW + 9) for name in "abcd"),
        )
        found = client.get(f"/api/traces/{TRACE}").json()
        assert shape(found["tree"]) == {"a": {"b": {"c": {}}, "d": {}}}
        assert (found["runs"], found["shown"], found["truncated"]) == (4, 4, False)
        assert (found["trace_id"], found["duration_ms"]) == (TRACE, 9000.0)
        assert (found["cost_usd"], found["cost_unknown"], found["tokens_in"]) == (0.002, 2, 20)
        nodes = flat(found["tree"])
        assert (nodes["b"]["cost_usd"], nodes["b"]["calls"]) == (None, 0)
        assert nodes["b"]["subtotal"] == {
            "runs": 2, "calls": 2, "tokens_in": 10, "tokens_out": 5, "cost_usd": 0.001,
            "tokens_in_unknown": 1, "tokens_out_unknown": 1, "cost_unknown": 1,
        }  # fmt: skip
        assert nodes["d"]["subtotal"]["tokens_in"] is None
        assert nodes["c"]["offset_ms"] == 2000.0
        names = ("runs", "calls", "tokens_in", "cost_usd", "cost_unknown")
        assert {name: nodes["a"]["subtotal"][name] for name in names} == {name: found[name] for name in names}
        assert not any(node["moved"] for node in nodes.values())
        for run_id in "abcd":
            assert client.get(f"/api/runs/{run_id}/tree").json() == found
            told = client.get(f"/api/runs/{run_id}?subtotal=true").json()
            assert told["subtotal"] == nodes[run_id]["subtotal"]
            assert "subtotal" not in client.run(run_id)

    def test_a_call_less_parent_of_unknowns_knows_nothing(self, client: Client) -> None:
        """The sum of no calls is 0, with one unknown call below it is not: here and in the database alike."""
        client.send(member("a"), member("b", "a"), call("1", "b", **UNKNOWN))
        [top] = client.get(f"/api/traces/{TRACE}").json()["tree"]
        assert (top["tokens_in"], top["subtotal"]["tokens_in"], top["subtotal"]["cost_usd"]) == (
            0,
            None,
            None,
        )
        assert client.get("/api/runs/a?subtotal=true").json()["subtotal"] == top["subtotal"]

    def test_retries_of_a_root_are_roots_and_an_unknown_parent_is_told(self, client: Client) -> None:
        """They are of one trace; a run whose parent is not stored stands at the top, and says whose it is."""
        client.send(member("a"), member("a2", at=NOW + 5), member("x", "gone", at=NOW + 6))
        found = client.get(f"/api/traces/{TRACE}").json()
        assert shape(found["tree"]) == {"a": {}, "a2": {}, "x": {}}
        assert flat(found["tree"])["x"]["parent_run_id"] == "gone"
        assert found["duration_ms"] is None  # they run

    def test_without_a_trace_the_root_holds_runs_together(self, client: Client) -> None:
        """As for runs from before there were traces: by any run, and by the root's id."""
        client.send(
            started("a", root_run_id="a"),
            started("b", root_run_id="a", parent_run_id="a", at=NOW + 1),
            started("lost", root_run_id="a", parent_run_id="gone", at=NOW + 2),
            started("other"),
        )
        for path in ("runs/b/tree", "runs/a/tree", "traces/a"):
            found = client.get(f"/api/{path}").json()
            assert shape(found["tree"]) == {"a": {"b": {}}, "lost": {}}, path
            assert found["trace_id"] == ""
        assert shape(client.get("/api/runs/other/tree").json()["tree"]) == {"other": {}}

    def test_a_child_of_another_trace_is_below_its_parent(self, client: Client) -> None:
        """As one has who names a parent by hand; asked from the child, it is the parent's tree."""
        client.send(
            member("a"),
            started("b", parent_run_id="a", trace_id="b" * 32, at=NOW + 1),
            started("c", parent_run_id="b", trace_id="c" * 32, at=NOW + 2),
        )
        for path in (f"traces/{TRACE}", "runs/c/tree", "runs/a/tree"):
            found = client.get(f"/api/{path}").json()
            assert shape(found["tree"]) == {"a": {"b": {"c": {}}}}, path
            assert found["trace_id"] == TRACE

    def test_who_names_only_a_task_hangs_under_its_latest_run_before(self, client: Client) -> None:
        """The errback of a task whose process was killed: the second delivery's, not the third's."""
        client.send(
            *(started(f"r{n}", at=NOW + 10 * n, task_id="t", trace_id=TRACE) for n in range(3)),
            started("errback", at=NOW + 15, metadata={"parent_task_id": "t"}, task_id="e"),
            started("early", at=NOW - 5, metadata={"parent_task_id": "t"}),
            started("own", at=NOW + 50, metadata={"parent_task_id": "t"}, task_id="t"),
        )
        for path in ("runs/errback/tree", f"traces/{TRACE}"):
            found = client.get(f"/api/{path}").json()["tree"]
            assert shape(found) == {"r0": {}, "r1": {"errback": {}}, "r2": {}}, path
        assert client.get("/api/runs/r1?subtotal=true").json()["subtotal"]["runs"] == 2
        assert client.get("/api/runs/r0?subtotal=true").json()["subtotal"]["runs"] == 1
        assert shape(client.get("/api/runs/early/tree").json()["tree"]) == {"early": {}}

    def test_a_node_says_what_its_task_told(self, client: Client) -> None:
        """Queue, attempt, delivery, waiting; a second run of the same attempt is its second delivery."""
        told = {"task": "tasks.t", "queue": "q", "framework": "celery", "wait_s": 1.5, "attempt": 2}
        told |= {"enqueued_at": NOW - 2, "eta": NOW - 1}
        client.send(
            member("a", task_id="t", metadata=told),
            ended("a", state="killed", reason="killed: signal 9"),
            member("b", task_id="t", metadata=told, at=NOW + 3),
            member("c", "b", at=NOW + 4),
            member("d", task_id="t", metadata=told | {"attempt": 3}, at=NOW + 6),
            ended("b", state="error", error_type="ValueError", error_message="no", at=NOW + 5),
        )
        nodes = flat(client.get(f"/api/traces/{TRACE}").json()["tree"])
        names = (
            "task",
            "queue",
            "framework",
            "wait_s",
            "attempt",
            "delivery",
            "enqueued_at",
            "eta",
            "task_id",
        )
        assert [nodes["a"][name] for name in names] == [
            "tasks.t", "q", "celery", 1.5, 2, 1,
            "2026-09-21T14:13:18.000+00:00", "2026-09-21T14:13:19.000+00:00", "t",
        ]  # fmt: skip
        assert (nodes["a"]["status"], nodes["a"]["reason"]) == ("killed", "killed: signal 9")
        assert (nodes["d"]["attempt"], nodes["d"]["delivery"]) == (3, 1)
        assert (nodes["b"]["delivery"], nodes["b"]["error_type"]) == (2, "ValueError")
        assert (nodes["c"]["delivery"], nodes["c"]["attempt"], nodes["c"]["wait_s"]) == (None, None, None)

    def test_a_tree_counts_deliveries_as_the_task_does(self, store: Store) -> None:
        """Given runs that say they are no repetition, and one that says nothing: all are of one attempt."""
        add(
            store,
            ("a", {"task_id": "t", "trace_id": TRACE, "metadata": {"attempt": 1, "repeat": 0}}),
            ("b", {"task_id": "t", "trace_id": TRACE, "metadata": {"attempt": 1, "replaced": 0}}),
            ("c", {"task_id": "t", "trace_id": TRACE, "metadata": {"attempt": 1}}),
        )
        group = store.task("t")
        assert group is not None
        assert [(run["run_id"], run["delivery"]) for run in group["runs"]] == [("a", 1), ("b", 2), ("c", 3)]
        assert [(node["run_id"], node["delivery"]) for node in tree(store, "a")["tree"]] == [
            ("a", 1), ("b", 2), ("c", 3),
        ]  # fmt: skip

    def test_linked_runs_are_no_children(self, store: Store) -> None:
        """They have a trace of their own, and can be asked for."""
        add(
            store,
            ("a", {"trace_id": TRACE}),
            ("b", {"trace_id": "b" * 32, "metadata": {"linked_run_id": "a"}}),
        )
        assert shape(tree(store, "a")["tree"]) == {"a": {}}
        assert tree(store, "b")["tree"][0]["linked_run_id"] == "a"
        assert [run["run_id"] for run in store.linked("a")] == ["b"]
        assert store.linked("") == []

    def test_what_is_not_stored_is_404(self, client: Client) -> None:
        """And a choice that is none is 400."""
        client.send(started())
        for path in ("/api/runs/x/tree", f"/api/traces/{TRACE}", "/api/tasks/x", "/api/runs/x?subtotal=true"):
            assert client.get(path).status_code == 404, path
        answer = client.get("/api/runs/r1?subtotal=yes")
        assert (answer.status_code, answer.json()) == (400, {"error": "subtotal: expected true or false"})


class TestHostileTrees:
    def test_circles_are_cut_and_nobody_is_lost(self, store: Store) -> None:
        """A run that is its own parent, two that are each other's, and what hangs on them."""
        add(
            store,
            *(("tail", {"parent_run_id": "y"}), ("own", {"parent_run_id": "own"})),
            *(("x", {"parent_run_id": "y"}), ("y", {"parent_run_id": "x"})),
            *(
                ("p", {"task_id": "p", "metadata": {"parent_task_id": "q"}}),
                ("under", {"parent_run_id": "own"}),
            ),
        )
        assert shape(tree(store, "own")["tree"]) == {"own": {"under": {}}}
        for run_id in ("x", "y", "tail"):
            found = tree(store, run_id)
            assert shape(found["tree"]) == {"x": {"y": {"tail": {}}}}
            assert [node["moved"] for node in found["tree"]] == [True]
            assert found["tree"][0]["subtotal"]["runs"] == found["runs"] == 3
            sums = store.subtotal(run_id)
            assert sums is not None
            assert sums["runs"] == (1 if run_id == "tail" else 3)

    def test_a_chain_of_10_000_is_answered_in_time_and_can_be_read(
        self, store: Store, client: Client
    ) -> None:
        """The tree ends at a number of runs, the nesting at a depth; sums are of all."""
        add(
            store,
            *(
                (
                    f"r{n}",
                    {"parent_run_id": f"r{n - 1}" if n else "", "trace_id": TRACE, "at": NOW + n / 1000},
                )
                for n in range(10_000)
            ),
        )
        began = time.monotonic()
        for path in (f"traces/{TRACE}", "runs/r50/tree", "runs/r9999/tree"):
            answer = client.get(f"/api/{path}")
            found = json.loads(answer.content)
            assert msgspec.json.decode(answer.content) == found
            assert (found["runs"], found["shown"], found["truncated"]) == (10_000, lineage.LARGEST, True)
            nodes = flat(found["tree"])
            assert len(nodes) == lineage.LARGEST
            if "9999" not in path:
                [top] = found["tree"]
                assert top["subtotal"]["runs"] == lineage.LARGEST
                depth, node = 1, top
                while node["children"]:
                    depth, node = depth + 1, node["children"][0]
                assert depth == lineage.DEEPEST
                assert sum(node["moved"] for node in nodes.values()) == lineage.LARGEST - lineage.DEEPEST
            else:
                assert {"r9999", "r9998", "r9900"} <= set(nodes)
        sums = store.subtotal("r0")
        assert sums is not None
        assert sums["runs"] == 10_000
        assert time.monotonic() - began < 60

    def test_one_task_id_for_everything_is_no_square(self, store: Store) -> None:
        """Ten thousand runs of one task, and as many that name only it: each has one parent."""
        add(
            store,
            *(
                (f"r{n}", {"task_id": "t", "trace_id": TRACE, "metadata": {"attempt": 1}})
                for n in range(10_000)
            ),
            *((f"c{n}", {"at": NOW + n + 0.5, "metadata": {"parent_task_id": "t"}}) for n in range(10_000)),
        )
        began = time.monotonic()
        found = tree(store, "c77")
        assert (found["runs"], found["shown"]) == (20_000, lineage.LARGEST)
        assert shape(found["tree"])["r77"] == {"c77": {}}
        group = store.task("t")
        assert group is not None
        assert (group["deliveries"], group["attempts"], len(group["runs"]), group["truncated"]) == (
            10_000, 1, 200, True,
        )  # fmt: skip
        assert [group["runs"][n]["delivery"] for n in (0, -1)] == [9801, 10_000]
        assert time.monotonic() - began < 60

    def test_runs_that_began_at_the_same_instant_are_no_square(self, store: Store) -> None:
        """Given a task whose runs all claim one time, then its tree takes no longer than any other."""
        add(
            store,
            *((f"r{n:05}", {"at": NOW, "task_id": "t", "trace_id": TRACE}) for n in range(8000)),
            *((f"c{n}", {"at": NOW, "metadata": {"parent_task_id": "t"}}) for n in range(100)),
        )
        with store.read() as connection:
            steps = iter(range(200))
            connection.set_progress_handler(lambda: next(steps, None) is None, 50_000)  # of SQLite's machine
            found = lineage.tree(connection, "c7")
            connection.set_progress_handler(None, 0)
        assert found is not None
        assert found["runs"] == 8100
        total = store.subtotal("r07999")
        assert total is not None
        assert total["runs"] == 101
        assert store.subtotal("r00000") == total | {"runs": 1}

    def test_large_metadata_is_not_in_a_tree(self, store: Store) -> None:
        """Two thousand times 64 KiB would be much; the run itself has it."""
        add(store, ("a", {"metadata": {"text": "x" * 10_000, "queue": "q"}}))
        [node] = tree(store, "a")["tree"]
        assert list(node["metadata"]) == ["…"]
        assert node["queue"] == "q"

    @pytest.mark.parametrize(
        "metadata",
        [
            *({"attempt": value} for value in NO_ATTEMPT),
            *({"wait_s": value} for value in NO_WAIT),
            *({"enqueued_at": value, "eta": value} for value in NO_TIME),
            {name: {"a": [1]} for name in ("framework", "task", "queue", "parent_task_id", "linked_run_id")},
            dict.fromkeys(("framework", "task", "queue", "previous_run_id", "user_group"), 7),
            {"queue": "q\x00'\"", "task": "t" * 5000},
        ],
    )
    def test_metadata_that_means_nothing_spoils_nothing(
        self, client: Client, metadata: dict[str, Any]
    ) -> None:
        """It is kept as it came, counts as not known, and every list and sum has the run."""
        assert client.send(started(task_id="t", trace_id=TRACE, metadata=metadata), call())["rejected"] == []
        run = client.run("r1")
        assert run["metadata"] == metadata | {"task_id": "t"}
        if "queue" not in metadata or metadata["queue"] != "q\x00'\"":
            names = (
                "attempt",
                "wait_s",
                "enqueued_at",
                "eta",
                "queue",
                "task",
                "framework",
                "previous_run_id",
            )
            assert {run[name] for name in names} <= {None, ""}
        for path in ("runs", "queues", f"traces/{TRACE}", "runs/r1/tree", "tasks/t", "spend", "waste"):
            assert client.get(f"/api/{path}").status_code == 200, path
        for by in ("task", "queue", "framework", "attempt", "run", "model"):
            [line] = client.get(f"/api/spend?by={by}").json()
            assert (line["cost_usd"], line["runs"]) == (0.001, 1)


class TestTask:
    @pytest.mark.parametrize("theirs", ["T-7", 7, ""])
    def test_a_users_metadata_takes_no_run_out_of_its_task(self, client: Client, theirs: Any) -> None:
        """`task_id` is a name that users give to something else, too: at the start, later, or before it."""
        updated = {"kind": "run_updated", "at": NOW + 1, "metadata": {"task_id": theirs}}
        client.send(
            started("a", task_id="t", metadata={"task_id": theirs}),
            *(started("b", task_id="t", at=NOW + 1), updated | {"id": "ub", "run_id": "b"}),
            *(updated | {"id": "uc", "run_id": "c"}, started("c", task_id="t", at=NOW + 2)),
        )
        found = client.get("/api/tasks/t").json()
        assert [run["run_id"] for run in found["runs"]] == ["a", "b", "c"]
        assert {client.run(name)["metadata"]["task_id"] for name in "abc"} == {theirs}

    @pytest.mark.parametrize("what", ["repeat", "replaced"])
    def test_what_is_repeated_or_replaced_begins_again(self, client: Client, what: str) -> None:
        """Two rounds of a task, each with attempts from 1: no delivery of one another, and in their order."""
        for number, (round_, attempt) in enumerate([(0, 1), (0, 2), (1, 1), (1, 2)]):
            told = {"attempt": attempt, **({what: round_} if round_ else {})}
            client.send(
                started(f"r{number}", task_id="t", trace_id=TRACE, at=NOW + number, metadata=told),
                ended(f"r{number}", state="retry" if attempt == 1 else "success", at=NOW + number + 0.5),
            )
        found = client.get("/api/tasks/t").json()
        assert [(run["run_id"], run["attempt"], run["delivery"]) for run in found["runs"]] == [
            ("r0", 1, 1),
            ("r1", 2, 1),
            ("r2", 1, 1),
            ("r3", 2, 1),
        ]
        assert (found["attempts"], found["deliveries"], found["final_state"]) == (4, 4, "success")
        tree = client.get(f"/api/traces/{TRACE}").json()["tree"]
        assert [node["delivery"] for node in tree] == [1, 1, 1, 1]

    def test_attempts_and_deliveries_are_counted_and_summed(self, client: Client) -> None:
        """Killed, delivered again, retried, and done: by the attempt, not by the order of arrival."""
        runs = [("r1", 1, "killed", 0), ("r2", 1, "retry", 10), ("r3", 2, "success", 20)]
        for run_id, attempt, state, at in reversed(runs):
            told = {"task": "tasks.t", "framework": "rq", "queue": "q", "attempt": attempt, "wait_s": 2.0}
            client.send(
                started(run_id, task_id="t", at=NOW + at, metadata=told),
                call(f"c-{run_id}", run_id),
                ended(run_id, state=state, at=NOW + at + 1, duration_ms=1000.0, reason=f"{state}: so"),
            )
        client.send(call("c4", "r2", **UNKNOWN))
        found = client.get("/api/tasks/t").json()
        assert [(run["run_id"], run["attempt"], run["delivery"]) for run in found["runs"]] == [
            ("r1", 1, 1),
            ("r2", 1, 2),
            ("r3", 2, 1),
        ]
        assert [run["previous_run_id"] for run in found["runs"]] == ["", "r1", "r2"]
        assert (found["final_state"], found["reason"]) == ("success", "success: so")
        assert (found["attempts"], found["deliveries"]) == (2, 3)
        assert (found["wait_s"], found["wait_unknown"], found["duration_ms"]) == (6.0, 0, 3000.0)
        assert (found["task"], found["framework"], found["queue"]) == ("tasks.t", "rq", "q")
        assert (found["calls"], found["cost_usd"], found["cost_unknown"]) == (4, 0.003, 1)
        failed = found["failed"]
        assert (failed["runs"], failed["calls"], failed["cost_usd"], failed["cost_unknown"]) == (
            2,
            3,
            0.002,
            1,
        )

    def test_an_order_of_arrival_is_no_order_of_attempts(self, client: Client) -> None:
        """The last attempt decides, although the first one was delivered once more after it."""
        for run_id, attempt, state, at in (
            ("r1", 1, "retry", 0),
            ("r2", 2, "success", 5),
            ("r3", 1, "error", 9),
        ):
            client.send(
                started(run_id, task_id="t", at=NOW + at, metadata={"attempt": attempt}),
                ended(run_id, state=state, at=NOW + at + 1),
            )
        found = client.get("/api/tasks/t").json()
        assert [run["run_id"] for run in found["runs"]] == ["r1", "r3", "r2"]
        assert found["final_state"] == "success"

    def test_what_nobody_told_is_not_0(self, client: Client) -> None:
        """Waiting, durations, attempt numbers; what runs and what was ignored has not failed."""
        client.send(
            started("r1", task_id="t"),
            ended("r1", state="ignored"),
            started("r2", task_id="t", at=NOW + 5, metadata={"previous_run_id": "told"}),
        )
        found = client.get("/api/tasks/t").json()
        assert (found["attempts"], found["deliveries"], found["final_state"]) == (None, 2, "running")
        assert (found["wait_s"], found["wait_unknown"]) == (None, 2)
        assert (found["duration_ms"], found["duration_unknown"]) == (2000.0, 1)
        assert (found["failed"]["runs"], found["failed"]["cost_usd"]) == (0, None)
        assert [(run["delivery"], run["previous_run_id"]) for run in found["runs"]] == [
            (None, ""),
            (None, "told"),
        ]

    @pytest.mark.parametrize("task_id", ["tenant/42", "a/b/", "a b?#%2F"])
    def test_an_id_that_a_user_chose_may_have_slashes(self, client: Client, task_id: str) -> None:
        """Given a job id such as `tenant/42`, when it is asked for, quoted, then it is found."""
        client.send(started(task_id=task_id))
        answer = client.get(f"/api/tasks/{quote(task_id, safe='')}")
        assert answer.status_code == 200
        assert answer.json()["task_id"] == task_id

    def test_a_reason_or_else_the_error_is_told(self, client: Client) -> None:
        """One of them says why."""
        client.send(started(task_id="t"), ended(state="error", error_type="ValueError", error_message="no"))
        assert client.get("/api/tasks/t").json()["reason"] == "ValueError: no"


class TestTold:
    def sent(self) -> tuple[RunStarted, RunEnded]:
        told = {"attempt": 2, "queue": "q", "wait_s": 0.5}
        start = msgspec.convert(
            started(tags={"tier": "gold", "x": 1}, ambient={"org": 7, "queue": "no"}, metadata=told), Record
        )
        end = msgspec.convert(ended(state="killed", reason="killed: signal 9"), Record)
        assert isinstance(start, RunStarted)
        assert isinstance(end, RunEnded)
        return start, end

    def check(self, run: dict[str, Any]) -> None:
        assert (run["tags"], run["metadata"]["org"]) == ({"tier": "gold", "x": 1}, 7)
        assert (run["queue"], run["attempt"], run["wait_s"]) == ("q", 2, 0.5)
        assert (run["status"], run["reason"], run["error_type"]) == ("killed", "killed: signal 9", "")

    def test_by_ingest(self, client: Client) -> None:
        """Tags that a run was born with, ambient metadata below its own, and why it ended."""
        client.send(*(msgspec.to_builtins(record) for record in self.sent()))
        self.check(client.run("r1"))

    def test_by_rest(self, client: Client) -> None:
        """The same, in what our exporter makes of it."""
        start, end = self.sent()
        client.post(f"{API}/runs/start/", bodies.start(start)).raise_for_status()
        assert client.run("r1")["tags"] == {"tier": "gold", "x": 1}
        client.post(f"{API}/runs/r1/complete/", bodies.complete(start, end)).raise_for_status()
        self.check(client.run("r1"))

    @pytest.mark.parametrize("state", ["killed", "revoked", "rejected", "interrupted", "retry", "error"])
    @pytest.mark.parametrize("error", [("", ""), ("", "no more"), ("ValueError", ""), ("ValueError", "no")])
    def test_an_end_reads_the_same_by_either_way(
        self, client: Client, state: str, error: tuple[str, str]
    ) -> None:
        """Given an end without an exception, then REST, which has to name one, tells no other story."""
        start, _ = self.sent()
        kind, message = error
        record = ended(state=state, reason=f"{state}: so", error_type=kind, error_message=message)
        end = msgspec.convert(record, RunEnded)
        client.send(*(msgspec.to_builtins(record) for record in (start, end)))
        other = msgspec.structs.replace(start, run_id="r2")
        client.post(f"{API}/runs/start/", bodies.start(other)).raise_for_status()
        body = bodies.complete(other, msgspec.structs.replace(end, run_id="r2"))
        client.post(f"{API}/runs/r2/complete/", body).raise_for_status()
        ingested, posted = client.run("r1"), client.run("r2")
        for name in ("status", "error", "error_type", "reason"):
            assert (name, posted[name]) == (name, ingested[name])

    def test_an_update_wins_whenever_it_comes(self, client: Client) -> None:
        """Tags and facts of an update count above the start's, before and after it."""
        update = {
            "kind": "run_updated",
            "at": NOW,
            "tags": {"t": 2},
            "metadata": {"queue": "new", "attempt": "x"},
        }
        start = {"tags": {"t": 1, "u": 1}, "metadata": {"queue": "old", "attempt": 3, "task": "n"}}
        client.send(update | {"id": "u1", "run_id": "r1"}, started("r1", **start))
        client.send(started("r2", **start), update | {"id": "u2", "run_id": "r2"})
        for run_id in ("r1", "r2"):
            run = client.run(run_id)
            assert (run["tags"], run["queue"], run["attempt"], run["task"]) == (
                {"t": 2, "u": 1}, "new", None, "n",
            )  # fmt: skip


def test_relatives_are_found_by_an_index(store: Store) -> None:
    """A tree of a large file costs a tree: no statement reads the whole table."""
    add(store, ("a", {"trace_id": TRACE, "task_id": "t", "metadata": {"attempt": 1}}))
    statements: list[str] = []
    with store.read() as connection:
        connection.set_trace_callback(statements.append)
        lineage.tree(connection, "a")
        lineage.trace(connection, TRACE)
        lineage.trace(connection, "a")
        lineage.subtotal(connection, "a")
        connection.set_trace_callback(None)
        assert len(statements) > 8
        for statement in statements:
            for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}"):
                assert not row["detail"].startswith(("SCAN runs", "SCAN r ", "SCAN n ")), statement


def test_an_old_sqlite_takes_no_thousand_values(store: Store) -> None:
    """A tree of more tasks than one statement may name, all with the number of their delivery."""
    add(
        store,
        *(
            (f"r{n}", {"trace_id": TRACE, "task_id": f"t{n // 2}", "metadata": {"attempt": 1}})
            for n in range(1400)
        ),
    )
    nodes: list[Node] = tree(store, "r0")["tree"]
    assert [node["delivery"] for node in nodes] == [1, 2] * 700


def test_the_columns_are_in_the_file(store: Store) -> None:
    """As scripts may read them: SQL sees the same as the API."""
    add(store, ("a", {"metadata": {"attempt": 3, "queue": "q"}}))
    with store.write() as writer:
        writer.call("a", CallMade("m", NOW))
    with closing(sqlite3.connect(store.path)) as connection:
        assert connection.execute("SELECT queue, attempt, wait_s FROM runs").fetchall() == [("q", 3, None)]
