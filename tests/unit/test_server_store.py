"""The store: retention, reading a file without a server, several threads, what a file may be."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from waxell_workers.core.errors import ConfigError
from waxell_workers.server import Store
from waxell_workers.server.writes import CallMade, End, Start

NOW = 1_790_000_000.0


def add(store: Store, run_id: str, at: float = NOW, *, ended: bool = True, task_id: str = "") -> None:
    with store.write() as writer:
        writer.start(
            run_id,
            Start(agent_name="a", workflow_name="w", started_at=at, source="ingest", task_id=task_id),
        )
        writer.call(run_id, CallMade(model="m", started_at=at, tokens_in=1, cost_usd=0.5))
        writer.remember(f"record-{run_id}", run_id, at)
        if ended:
            writer.end(run_id, End(status="success", ended_at=at + 1))


def rows(path: Path, table: str) -> int:
    connection = sqlite3.connect(path)
    try:
        return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
    finally:
        connection.close()


def test_beyond_the_limit_the_oldest_ended_run_goes_first(tmp_path: Path) -> None:
    """A run that still goes on is kept, even if it is older; the newest stay."""
    with Store(tmp_path / "db", max_runs=3) as store:
        add(store, "old-running", NOW - 100, ended=False)
        for n in range(5):
            add(store, f"r{n}", NOW + n)
        assert [run["run_id"] for run in store.runs()] == ["r4", "r3", "old-running"]


def test_a_run_takes_all_that_is_its_own_with_it(tmp_path: Path) -> None:
    """The file does not grow by what nobody can reach any more."""
    with Store(tmp_path / "db", max_runs=2) as store:
        for n in range(10):
            add(store, f"r{n}", NOW + n)
        assert store.stats()["calls"] == 2
    for table in ("runs", "calls", "records"):
        assert rows(tmp_path / "db", table) == 2


def test_runs_that_never_end_are_bounded_too(tmp_path: Path) -> None:
    """If nothing has ended, the oldest running ones go."""
    with Store(tmp_path / "db", max_runs=2) as store:
        for n in range(5):
            add(store, f"r{n}", NOW + n, ended=False)
        assert [run["run_id"] for run in store.runs()] == ["r4", "r3"]


def test_a_file_is_read_while_it_is_written_and_afterwards(tmp_path: Path) -> None:
    """`runs ls --db FILE` needs no server, and does not disturb one."""
    path = tmp_path / "db"
    with Store(path) as store:
        add(store, "r1")
        with Store(path, read_only=True) as reader:
            assert [run["run_id"] for run in reader.runs()] == ["r1"]
            add(store, "r2", NOW + 1)
            assert [run["run_id"] for run in reader.runs()] == ["r2", "r1"]
            detail = reader.run("r1")
            assert detail is not None
            assert [call["model"] for call in detail["calls"]] == ["m"]
            with pytest.raises(sqlite3.Error), reader.write():
                pass
    with Store(path, read_only=True) as reader:
        assert len(reader.runs()) == 2
        assert reader.run("nobody") is None


def test_a_file_that_is_none_of_ours_is_a_config_error(tmp_path: Path) -> None:
    """The message names the file; a read creates none, and a stranger's database is not touched."""
    with pytest.raises(ConfigError, match="no such file"):
        Store(tmp_path / "missing", read_only=True)
    assert not (tmp_path / "missing").exists()
    text = tmp_path / "text"
    text.write_text("no database, but long enough to be read as one. " * 100)
    strange = tmp_path / "strange"
    connection = sqlite3.connect(strange)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    for path in (text, strange, tmp_path):
        with pytest.raises(ConfigError, match="db="):
            Store(path)
        with pytest.raises(ConfigError, match="db="):
            Store(path, read_only=True)
    assert rows(strange, "sqlite_master") == 1


def test_the_file_is_its_owners(tmp_path: Path) -> None:
    """Prompts may be in it."""
    with Store(tmp_path / "new" / "db") as store:
        add(store, "r1")
        for path in (store.path, store.path.with_name("db-wal")):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_temporary_store_leaves_nothing(tmp_path: Path) -> None:
    """Without a file, the data goes with the store."""
    store = Store()
    add(store, "r1")
    assert store.path.exists()
    store.close()
    store.close()
    assert not store.path.parent.exists()


def test_a_failed_transaction_is_taken_back(tmp_path: Path) -> None:
    """All of it, and the next one works."""
    with Store(tmp_path / "db") as store:

        def fail() -> None:
            with store.write() as writer:
                writer.place("r1", NOW, "ingest")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert store.runs() == []
        add(store, "r1")
        assert len(store.runs()) == 1


def test_threads_write_and_read_at_once(tmp_path: Path) -> None:
    """One writer at a time, readers beside it: nothing is lost and nobody fails."""
    failures: list[Exception] = []
    with Store(tmp_path / "db") as store:

        def work(name: int) -> None:
            try:
                for n in range(25):
                    add(store, f"{name}-{n}", NOW + n)
                    assert store.runs(limit=5)
                    assert store.stats()["calls"] > 0
            except Exception as error:  # noqa: BLE001  whatever it is, the test shows it
                failures.append(error)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert store.stats()["runs"] == {"success": 200}
        assert store.stats()["cost_usd"] == 100.0


def test_equal_times_are_paged_without_loss(tmp_path: Path) -> None:
    """Runs that began in the same instant are each on exactly one page."""
    with Store(tmp_path / "db") as store:
        for n in range(7):
            add(store, f"r{n}")
        seen: list[str] = []
        before = ""
        while page := store.runs(limit=2, before=before):
            seen += [run["run_id"] for run in page]
            before = page[-1]["run_id"]
        assert sorted(seen) == [f"r{n}" for n in range(7)]


def test_the_list_of_runs_uses_an_index(tmp_path: Path) -> None:
    """A page of a large file costs a page, whatever the filter."""
    with Store(tmp_path / "db") as store, store.read() as connection:
        for where in ("1", "agent_name = 'a'", "status = 'error'", "(started_at, run_id) < (1, 'x')"):
            plan = connection.execute(
                f"EXPLAIN QUERY PLAN SELECT * FROM runs WHERE {where}"
                " ORDER BY started_at DESC, run_id DESC LIMIT 50"
            ).fetchall()
            detail = " ".join(row["detail"] for row in plan)
            assert "INDEX runs_" in detail
            assert "TEMP B-TREE" not in detail
