"""A database that an older server has made keeps working, and a reader leaves it as it is."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from waxell_workers.core.errors import ConfigError
from waxell_workers.server import Store, migration, schema
from waxell_workers.server.writes import CallMade, End, Start

TABLES = {version: Path(__file__).with_name(f"server_version_{version}.sql") for version in (1, 2)}
NOW = 1_790_000_000.0


TOLD = {"framework": "celery", "task": "tasks.t", "queue": "q", "attempt": 2, "wait_s": 1.5, "eta": NOW}
TOLD |= {"enqueued_at": NOW - 1, "previous_run_id": "p", "parent_task_id": "up", "user_group": "g"}


@pytest.fixture(params=[1, 2])
def old(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A database of an older version: a run with a chat, an embedding, and a failure that had no usage."""
    path = tmp_path / "runs.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(TABLES[request.param].read_text())
        connection.execute(
            "INSERT INTO runs (run_id, agent_name, workflow_name, status, known, started_at, ended_at,"
            " source, calls, tokens_in, tokens_out, cost_usd, metadata, error)"
            " VALUES ('r', 'triage', 'celery', 'error', 1, ?, ?, 'ingest', 3, 107, 20, 0.5, ?,"
            " 'openai.APIError: no: more')",
            (NOW, NOW + 2, json.dumps(TOLD)),
        )
        connection.execute(
            "INSERT INTO runs (run_id, started_at, source) VALUES ('empty', ?, 'ingest')", (NOW - 9,)
        )
        connection.executemany(
            "INSERT INTO calls (run_id, call_id, model, operation, status, started_at, tokens_in, tokens_out,"
            " tokens_cached, cost_usd, prompt) VALUES ('r', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                ("c1", "gpt-4o", "chat", "ok", NOW, 100, 20, 30, 0.4, "hello"),
                ("c2", "embedder", "embeddings", "ok", NOW + 1, 7, 0, 0, 0.1, ""),
                ("c3", "gpt-4o", "chat", "error", NOW + 2, 0, 0, 0, None, ""),
            ],
        )
        if request.param == 2:
            connection.execute(
                "UPDATE runs SET tokens_in_unknown = 1, tokens_out_unknown = 1, cost_unknown = 1"
                " WHERE run_id = 'r'"
            )
            connection.execute("UPDATE calls SET tokens_in = NULL, tokens_out = NULL WHERE tokens_in = 0")
            connection.execute("UPDATE calls SET tokens_cached = NULL WHERE tokens_cached = 0")
        connection.execute("INSERT INTO records VALUES ('c1', 'r', ?)", (NOW,))
        connection.commit()
    return path


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def looks_as_now(store: Store) -> None:
    run = store.run("r")
    assert run is not None
    assert (run["call_count"], run["tokens_in"], run["tokens_out"], run["cost_usd"]) == (3, 107, 20, 0.5)
    assert (run["tokens_in_unknown"], run["tokens_out_unknown"], run["cost_unknown"]) == (1, 1, 1)
    assert [(call["tokens_in"], call["tokens_out"], call["tokens_cached"]) for call in run["calls"]] == [
        (100, 20, 30),
        (7, 0, None),
        (None, None, None),
    ]
    first = run["calls"][0]
    assert (first["id"], first["prompt"], first["cost_usd"]) == ("c1", "hello", 0.4)
    assert (first["tokens_cache_written"], first["messages"], first["tool_calls"]) == (None, [], [])
    assert [each["run_id"] for each in store.runs()] == ["r", "empty"]
    assert [each["tokens_in_unknown"] for each in store.runs()] == [1, 0]
    assert {name: run["metadata"][name] for name in TOLD} == TOLD
    names = (
        "framework",
        "task",
        "queue",
        "attempt",
        "wait_s",
        "previous_run_id",
        "parent_task_id",
        "user_group",
    )
    assert {name: run[name] for name in names} == {name: TOLD[name] for name in names}  # type: ignore[literal-required]
    assert (run["eta"], run["reason"]) == ("2026-09-21T14:13:20.000+00:00", "")
    assert run["error_type"] == "openai.APIError"
    assert store.runs()[1]["attempt"] is None
    [queue] = store.queues()
    assert (queue["queue"], queue["wait_s"]["p95"]) == ("q", 1.5)
    assert [(each["task"], each["cost_usd"]) for each in store.spend()] == [("tasks.t", 0.5), (None, None)]
    assert [each["model"] for each in store.spend("model")] == ["gpt-4o", "embedder"]
    assert [each["error_type"] for each in store.waste()["by_error"]] == ["openai.APIError"]
    found, sums, waited = store.tree("r"), store.subtotal("r"), store.wait_of("r")
    assert found is not None and sums is not None and waited is not None  # noqa: PT018
    assert (found["runs"], sums["cost_usd"], waited["wait_s"]) == (1, 0.5, 1.5)
    stats = store.stats()
    assert (stats["calls"], stats["tokens_in"], stats["cost_unknown"]) == (3, 107, 1)


def test_a_server_brings_it_up_to_date_and_goes_on(old: Path) -> None:
    """Nothing is lost; what is written then goes beside it; the second start finds nothing to do."""
    with Store(old) as store:
        looks_as_now(store)
        with store.write() as writer:
            assert writer.seen("c1")
            writer.start("new", Start("a", "w", NOW + 9, "ingest"))
            writer.call("new", CallMade("m", NOW + 9, tool_calls=[{"name": "search"}]))
            writer.end("new", End("success", NOW + 10))
    assert version_of(old) == schema.VERSION
    with Store(old) as store:
        run = store.run("new")
        assert run is not None
        assert run["calls"][0]["tool_calls"] == [{"name": "search"}]
        assert run["tokens_in_unknown"] == 1


def test_it_ends_up_with_the_tables_of_a_new_one(old: Path, tmp_path: Path) -> None:
    """Column by column and index by index: no statement has to know two kinds of files."""

    def shape(path: Path) -> object:
        with closing(sqlite3.connect(path)) as connection:
            names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master ORDER BY name")]
            columns = {
                name: sorted(row[1:5] for row in connection.execute(f"PRAGMA table_info({name})"))
                for name in ("runs", "calls", "steps", "spans", "scores", "records", "counters")
            }
            keys = connection.execute("PRAGMA foreign_key_list(calls)").fetchall()
            return names, columns, [row[2:] for row in keys]

    for path in (old, tmp_path / "new.db"):
        with Store(path):
            pass
    assert shape(old) == shape(tmp_path / "new.db")


def test_a_reader_shows_it_and_changes_nothing(old: Path) -> None:
    """`runs --db` looks at the file of a server that still runs, and may be the older one."""
    before = old.read_bytes()
    with Store(old, read_only=True) as store:
        looks_as_now(store)
        looks_as_now(store)
    assert old.read_bytes() == before


def test_a_run_goes_with_its_calls_after_that(old: Path) -> None:
    """The table that was made anew belongs to its runs as the old one did."""
    with Store(old, max_runs=1) as store:
        for n in range(5):
            with store.write() as writer:
                writer.start(f"n{n}", Start("a", "w", NOW + 100 + n, "ingest"))
                writer.end(f"n{n}", End("success", NOW + 200))
    with closing(sqlite3.connect(old)) as connection:
        assert connection.execute("SELECT count(*) FROM calls").fetchone() == (0,)


def test_what_goes_wrong_on_the_way_leaves_the_file_as_it_was(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, say, in the last step: the server does not start, and the next try finds it whole."""
    version, content = version_of(old), dump(old)
    half, _, _ = migration._STEPS[2].partition("CREATE INDEX runs_spend")
    monkeypatch.setitem(migration._STEPS, 2, f"{half}INSERT INTO no_such_table VALUES (1);\n")
    with pytest.raises(ConfigError, match="no such table"):
        Store(old)
    monkeypatch.undo()
    assert version_of(old) == version
    assert dump(old) == content
    with Store(old) as store:
        looks_as_now(store)


def test_a_damaged_one_is_put_aside_as_it_is(old: Path) -> None:
    """It is looked at before it is changed: what is put aside is what was there."""
    with old.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 4096)
    damaged = old.read_bytes()
    with Store(old) as store:
        assert store.runs() == []
    [aside] = old.parent.glob("runs.db.damaged-*[0-9]")
    assert aside.read_bytes() == damaged


HOSTILE = [
    "[]",
    "null",
    "7",
    '"queue"',
    "",
    "{",
    '{"attempt": "2", "wait_s": "1", "queue": 7, "eta": {"a": 1}}',
    '{"attempt": 1e400, "wait_s": NaN, "queue": "q"}',
    '{"attempt": -1, "wait_s": -1, "enqueued_at": 1e300, "task": ["t"]}',
    '{"attempt": true, "wait_s": null, "framework": {"a": [[[]]]}}',
    "[" * 5000,
    '{"queue": "' + "q" * 70_000 + '"}',
]


def test_metadata_of_any_kind_is_brought_along(old: Path) -> None:
    """What is no fact is not known, what is no JSON is left as it is, and nobody is kept from starting."""
    with closing(sqlite3.connect(old)) as connection:
        connection.executemany(
            "INSERT INTO runs (run_id, started_at, source, metadata, error) VALUES (?, ?, 'ingest', ?, ?)",
            [(f"h{n}", NOW - 100 - n, text, "no: " * n) for n, text in enumerate(HOSTILE)],
        )
        connection.commit()
    with Store(old, read_only=True) as store:
        before = (store.queues(), store.spend("attempt"), store.spend(), store.waste())
    with Store(old) as store:
        assert (store.queues(), store.spend("attempt"), store.spend(), store.waste()) == before
    with closing(sqlite3.connect(old)) as connection:
        kept = connection.execute("SELECT metadata FROM runs WHERE run_id LIKE 'h%' ORDER BY -started_at")
        assert [row[0] for row in kept] == HOSTILE
        told = connection.execute(
            "SELECT max(attempt), max(wait_s) FROM runs WHERE run_id LIKE 'h%'"
        ).fetchone()
        assert told == (None, None)


def test_a_large_one_is_brought_up_in_bounded_time(old: Path) -> None:
    """Twenty thousand runs, each read once; trees and sums work on all of them then."""
    with closing(sqlite3.connect(old)) as connection:
        connection.executemany(
            "INSERT INTO runs (run_id, known, started_at, source, metadata, trace_id, error, status, inputs)"
            " VALUES (?, 1, ?, 'ingest', ?, 'trace', 'ValueError: x', 'error', ?)",
            (
                (f"b{n}", NOW + n, json.dumps(TOLD | {"attempt": n % 3 + 1}), json.dumps(["x" * 1000]))
                for n in range(20_000)
            ),
        )
        connection.commit()
    began = time.monotonic()
    with Store(old) as store:
        assert time.monotonic() - began < 60
        attempts = {each["attempt"]: each["runs"] for each in store.spend("attempt")}
        assert attempts == {1: 6667, 2: 6667 + 1, 3: 6666, None: 1}
        found = store.trace("trace")
        assert found is not None
        assert (found["runs"], found["truncated"]) == (20_000, True)


@pytest.mark.parametrize("read_only", [True, False])
def test_what_version_2_knew_of_a_call_is_still_known(tmp_path: Path, read_only: bool) -> None:
    """Messages, tools, and a count of 0 that is one: what version 1 had no word for."""
    path = tmp_path / "runs.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(TABLES[2].read_text())
        connection.execute(
            "INSERT INTO runs (run_id, started_at, source, calls) VALUES ('r', ?, 'rest', 1)", (NOW,)
        )
        connection.execute(
            "INSERT INTO calls (run_id, model, started_at, tokens_in, tokens_cache_written, messages,"
            " tool_calls) VALUES ('r', 'm', ?, 0, 3, '[{\"role\": \"user\"}]', '[{\"name\": \"search\"}]')",
            (NOW,),
        )
        connection.commit()
    with Store(path, read_only=read_only) as store:
        run = store.run("r")
    assert run is not None
    [call] = run["calls"]
    assert (call["tokens_in"], call["tokens_cache_written"]) == (0, 3)
    assert (call["messages"], call["tool_calls"]) == ([{"role": "user"}], [{"name": "search"}])
