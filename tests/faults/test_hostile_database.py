"""Whatever happens to the database file: nothing is acknowledged that is not in it, and the server heals.

Or it says why it cannot. What was answered with 503 stays in the sender's journal, and comes again.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.hostile import (
    ANSWER_S,
    API,
    CLIENT,
    INGEST,
    call,
    cli,
    ndjson,
    needs_root,
    serving,
    small_disk,
    started,
)
from tests.harness import await_, environment
from tests.torture import effort, found
from waxell_workers.server import Store, schema
from waxell_workers.server.writes import Start

RUNS = 1_500
IMPATIENT = (
    "import waxell_workers.server.body as body, waxell_workers.server.schema as schema\n"
    "body.PATIENCE_S, schema.BUSY_S = 2.0, 1.0\n"
)
"""How long a write waits for its turn and for the lock, shortened in the process itself."""
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with many pages, closed as it should be."""
    directory = tmp_path_factory.mktemp("whole")
    with serving(directory) as server:
        server.send(*(started(f"r{n}", metadata={"n": n, "text": "t" * 200}) for n in range(RUNS)))
        server.send(*(call(f"r{n}", f"c{n}") for n in range(RUNS)))
        assert server.end() == 0
    assert not Path(f"{server.db}-wal").exists()
    return server.db


def overwrite(offset: int | None, size: int = 4096) -> Damage:
    """Return damage: random bytes at an offset, or in the middle."""

    def damage(path: Path) -> None:
        at = path.stat().st_size // 2 // 4096 * 4096 if offset is None else offset
        with path.open("r+b") as file:
            file.seek(at)
            file.write(random.Random(offset).randbytes(size))

    return damage


def cut(part: float) -> Damage:
    """Return damage: the end of the file is gone."""
    return lambda path: os.truncate(path, int(path.stat().st_size * part))


def foreign_log(path: Path) -> None:
    """Put another database's log of writes beside it: one that was closed by a crash, after a copy."""
    other = path.with_name("other.db")
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript("CREATE TABLE x (a); INSERT INTO x VALUES (randomblob(40000));")
        shutil.copy(f"{other}-wal", f"{path}-wal")


HEALED: dict[str, Damage] = {
    "cut in half": cut(0.5),
    "cut in the middle of a page": cut(0.7123),
    "a header and nothing else": lambda path: os.truncate(path, 100),
    "the first page": overwrite(100, 3000),
    "the second page": overwrite(4096),
    "a page of an index": overwrite(8 * 4096),
    "a page in the middle": overwrite(None),
    "many pages": lambda path: [overwrite(n * 4096)(path) for n in range(3, 60, 7)],
}
ALONE: dict[str, Damage] = {
    "zero bytes": lambda path: os.truncate(path, 0),
    "noise beside it": lambda path: Path(f"{path}-wal").write_bytes(os.urandom(50_000)),
    "an index of its log that is noise": lambda path: Path(f"{path}-shm").write_bytes(os.urandom(32_768)),
}


@pytest.mark.parametrize("name", HEALED)
def test_a_damaged_file_is_put_aside_and_a_new_one_begun(whole: Path, tmp_path: Path, name: str) -> None:
    """Given a file of ours that is damaged, the server starts, says so once, deletes nothing, and stores."""
    db = tmp_path / "runs.db"
    shutil.copy(whole, db)
    HEALED[name](db)
    damaged = db.read_bytes()
    assert damaged != whole.read_bytes()  # the fault is there
    with serving(tmp_path) as server:
        assert server.get("/api/runs").json() == {"runs": []}
        server.send(started("new"))
        assert server.get("/runs/new").status_code == 200
        assert server.said.count("is damaged") == 1
        [aside] = tmp_path.glob("runs.db.damaged-*[0-9]")
        assert aside.name in server.said
        assert aside.read_bytes() == damaged
        assert server.end() == 0
    with serving(tmp_path) as server:  # the new one is whole
        assert server.get("/api/runs/new").status_code == 200
        assert "damaged" not in server.said


@pytest.mark.parametrize("name", ALONE)
def test_what_looks_like_damage_and_is_none_is_served(whole: Path, tmp_path: Path, name: str) -> None:
    """Given an empty file, or a log that is not its own, the server starts, and what is stored stays."""
    db = tmp_path / "runs.db"
    shutil.copy(whole, db)
    ALONE[name](db)
    with serving(tmp_path) as server:
        kept = name != "zero bytes"
        assert (server.get("/api/runs/r7").status_code == 200) is kept
        server.send(started("new"))
        assert server.get("/runs/new").status_code == 200
        assert "damaged" not in server.said


def sqlite_file(*statements: str) -> Damage:
    """Return a change: the file is a database that these statements make."""

    def change(path: Path) -> None:
        path.unlink()
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.executescript(";".join(statements))

    return change


def newer(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


REFUSED: dict[str, tuple[Damage, str]] = {
    "noise": (overwrite(0, 50_000), "move this away"),
    "the header alone": (overwrite(0, 100), "move this away"),
    "a text": (lambda path: path.write_text("my thesis\n" * 10_000), "move this away"),
    "another program's": (sqlite_file("CREATE TABLE x (a)"), f"version {schema.VERSION}, not 0"),
    "another program's version 1": (
        sqlite_file("CREATE TABLE runs (a)", "PRAGMA user_version = 1"),
        "another program's",
    ),
    "a newer one": (newer, f"version {schema.VERSION}, not {schema.VERSION + 1}"),
    "a directory": (a_directory, "is a directory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_ours_is_left_alone(whole: Path, tmp_path: Path, name: str) -> None:
    """Given somebody else's file, the command ends with 2 and a sentence, and the file stays as it is."""
    db = tmp_path / "runs.db"
    shutil.copy(whole, db)
    change, expected = REFUSED[name]
    change(db)
    before = db.read_bytes() if db.is_file() else b""
    for command in (("serve", "--port", "0", "--db", db), ("runs", "ls", "--db", db)):
        done = cli(*command)
        assert (done.returncode, done.stdout) == (2, b"")
        assert b"Traceback" not in done.stderr
        assert str(db).encode() in done.stderr
        if command[0] == "serve":
            assert expected.encode() in done.stderr
    assert (db.read_bytes() if db.is_file() else b"") == before
    assert [path.name for path in tmp_path.iterdir()] == ["runs.db"]


def test_another_databases_log_beside_it_is_said(whole: Path, tmp_path: Path) -> None:
    """Given a log of writes that belongs to another database, which SQLite believes, the command says so."""
    db = tmp_path / "runs.db"
    shutil.copy(whole, db)
    foreign_log(db)
    done = cli("serve", "--port", "0", "--db", db)
    assert (done.returncode, done.stdout) == (2, b"")
    assert f"expected a database of this server (version {schema.VERSION}, not 0)".encode() in done.stderr


def test_the_first_databases_are_still_read(whole: Path, tmp_path: Path) -> None:
    """Given a file from before there was an application id, it is opened as it is."""
    db = tmp_path / "runs.db"
    shutil.copy(whole, db)
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("PRAGMA application_id = 0")
    with serving(tmp_path) as server:
        assert server.get("/api/runs/r7").status_code == 200
        server.send(started("new"))


# -- while it serves ---------------------------------------------------------------------------


def stored(db: Path) -> set[str]:
    """Return the ids of the runs in a file."""
    with contextlib.closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as connection:
        return {row[0] for row in connection.execute("SELECT run_id FROM runs")}


TAKEN_AWAY: dict[str, Callable[[Path], object]] = {
    "deleted": lambda db: [path.unlink() for path in db.parent.glob("runs.db*")],
    "deleted, its log left": lambda db: db.unlink(),
    "its log deleted": lambda db: Path(f"{db}-wal").unlink(),
    "renamed": lambda db: db.rename(db.with_name("elsewhere")),
    "its directory deleted": lambda db: shutil.rmtree(db.parent),
    "replaced by an empty file": lambda db: (db.unlink(), db.touch()),
}


@pytest.mark.parametrize("name", TAKEN_AWAY)
def test_what_is_acknowledged_is_in_the_file_that_is_there(tmp_path: Path, name: str) -> None:
    """Given a file that is taken away under the server, what is answered with 200 is in the new one."""
    db = tmp_path / "data" / "runs.db"
    with serving(tmp_path, db=db) as server:
        server.send(started("old"))
        assert server.get("/api/runs/old").status_code == 200  # a reader has the file open, too
        TAKEN_AWAY[name](db)
        taken = []
        for number in range(5):
            answer = server.post(INGEST, ndjson([started(f"r{number}")]))
            assert answer.status_code in (200, 503), answer.text
            if answer.status_code == 200:
                taken.append(f"r{number}")
        assert taken  # it heals
        for run in taken:
            assert server.get(f"/api/runs/{run}").status_code == 200
        assert server.said.count("was taken away") == 1
        server.process.kill()
        server.process.wait()
    assert set(taken) <= stored(db)


def test_a_file_that_goes_in_the_middle_of_a_write_has_not_taken_it(tmp_path: Path) -> None:
    """Given a file that is deleted between the first statement and the commit, the write fails, and heals."""
    start_of = Start(agent_name="a", workflow_name="w", started_at=1_790_000_000.0, source="rest")
    with Store(tmp_path / "runs.db") as store:
        with pytest.raises(sqlite3.OperationalError, match="taken away"), store.write() as writer:  # noqa: PT012
            writer.start("r", start_of)
            (tmp_path / "runs.db").unlink()
        with store.write() as writer:
            assert writer.start("r", start_of)
    assert stored(tmp_path / "runs.db") == {"r"}


def test_a_page_that_breaks_while_it_serves_is_healed_by_the_next_write(whole: Path, tmp_path: Path) -> None:
    """Given pages that turn to noise under the server, nothing is acknowledged in vain; it goes on anew."""
    shutil.copy(whole, tmp_path / "runs.db")
    with serving(tmp_path) as server:
        assert server.get("/api/runs/r7").status_code == 200
        for page in range(2, 90):
            overwrite(page * 4096)(server.db)
        answers = [server.get(f"/api/runs/r{n}").status_code for n in range(0, RUNS, 100)]
        taken = []
        for number in range(5):
            answer = server.post(INGEST, ndjson([started(f"new{number}")]))
            if answer.status_code == 200:
                taken.append(f"new{number}")
            else:
                assert answer.status_code == 503
        assert 503 in answers or len(taken) < 5  # the fault was met
        assert taken
        assert server.said.count("is damaged") == 1
        assert len(list(tmp_path.glob("runs.db.damaged-*"))) >= 1
        for path in ("/", "/api/runs", "/api/stats", f"/runs/{taken[0]}"):
            assert server.get(path).status_code == 200, path
        server.process.kill()
        server.process.wait()
    assert set(taken) <= stored(tmp_path / "runs.db")


def test_a_full_disk_is_503_and_heals(tmp_path: Path) -> None:
    """Given a disk without room, writes are 503, reads go on, and room is used again."""
    with small_disk(tmp_path / "disk", "3m") as disk, serving(tmp_path, db=disk / "runs.db") as server:
        server.send(started("before"))
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        answers = [
            server.post(INGEST, ndjson([started(f"full{n}", inputs={"x": "y" * 50_000})])).status_code
            for n in range(10)
        ]
        assert answers[-1] == 503
        assert set(answers) <= {200, 503}
        assert (
            server.post(f"{API}/runs/start/", {"agent_name": "a", "inputs": {"x": "y" * 50_000}}).status_code
            == 503
        )
        assert server.get("/api/runs/before").status_code == 200
        assert server.said.count("the database refuses") == 1  # and not for each of them
        ballast.unlink()
        server.send(*(started(f"full{n}") for n in range(10)))
        assert len(server.get("/api/runs").json()["runs"]) == 11
        assert server.end() == 0


def test_a_file_that_cannot_be_written_is_said(whole: Path, tmp_path: Path) -> None:
    """Given a file system that becomes read-only, writes are 503; a server that starts there says why not."""
    with small_disk(tmp_path / "disk", "8m") as disk:
        shutil.copy(whole, disk / "runs.db")
        remount = ["mount", "-o", "remount,ro", str(disk)]
        with serving(tmp_path, db=disk / "runs.db") as server:
            server.send(started("before"))
            server.process.send_signal(0)
            done = subprocess.run(remount, capture_output=True, check=False)
            if done.returncode == 0:  # the kernel may refuse while a file is open for writing
                assert server.post(INGEST, ndjson([started("after")])).status_code == 503
            assert server.end() == 0
        subprocess.run(remount, capture_output=True, check=True)
        done = cli("serve", "--port", "0", "--db", disk / "runs.db")
        assert (done.returncode, done.stdout) == (2, b"")
        assert b"Traceback" not in done.stderr
        assert b"expected a file that can be written" in done.stderr
        listed = cli("runs", "ls", "--db", disk / "runs.db")
        assert b"Traceback" not in listed.stderr


def test_a_file_of_somebody_else_is_said(tmp_path: Path) -> None:
    """Given no permission, which root always has, the command ends with 2 and a sentence."""
    needs_root()
    db = tmp_path / "runs.db"
    db.touch(0o600)
    os.chmod(tmp_path, 0o755)
    code = (
        "import os\n"
        "from waxell_workers.core.errors import ConfigError\n"
        "from waxell_workers.server import Store\n"
        "os.setgid(65534); os.setuid(65534)\n"
        f"try: Store({str(db)!r})\n"
        "except ConfigError as error: print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("refused:"), done


def test_a_long_lock_holds_up_writes_for_seconds_and_reads_not_at_all(tmp_path: Path) -> None:
    """Given another process that holds the write lock, writes are 503 in time, reads go on; then it heals."""
    with serving(tmp_path, before=IMPATIENT) as server:
        server.send(started("before"))
        with (
            contextlib.closing(sqlite3.connect(server.db, isolation_level=None)) as other,
            ThreadPoolExecutor(12) as pool,
        ):
            other.execute("BEGIN IMMEDIATE")
            began = time.monotonic()

            def send(number: int) -> tuple[int, float]:
                return server.post(
                    INGEST, ndjson([started(f"r{number}")])
                ).status_code, time.monotonic() - began

            writes = [pool.submit(send, number) for number in range(10)]
            reads = 0
            while not all(write.done() for write in writes):
                for path in ("/", "/api/runs", "/runs/before"):
                    assert CLIENT.get(server.url + path, timeout=ANSWER_S).status_code == 200
                    reads += 1
            answers = [write.result() for write in writes]
            other.execute("ROLLBACK")
        assert {status for status, _ in answers} == {503}
        assert max(seconds for _, seconds in answers) < 25  # a client waits for 30
        assert reads >= 6
        assert server.said.count("the database refuses") <= 2
        server.send(*(started(f"r{number}") for number in range(10)))
        found("a write lock held by another process", reads_meanwhile=reads, writes_refused=len(answers))


def test_the_sender_keeps_what_was_not_acknowledged(tmp_path: Path) -> None:
    """Given a real sender and a database that is locked meanwhile, all records arrive, once."""
    db, enough = tmp_path / "data" / "runs.db", tmp_path / "enough"
    with serving(tmp_path, db=db, before=IMPATIENT) as server:
        code = (
            "import os, time, waxell_workers\n"
            "waxell_workers.init(flush_interval=0.2, shutdown_timeout=0.1)\n"
            "n = 0\n"
            f"while n < {effort(20, 600)} or not os.path.exists({str(enough)!r}):\n"
            "    with waxell_workers.WaxellContext(agent_name='sender') as run:\n"
            "        run.record_llm_call(model=f'm{n}', tokens_in=1, tokens_out=1)\n"
            "    n += 1\n"
            "    time.sleep(0.02)\n"
            "print(n)\n"
        )
        environ = environment(
            WAXELL_API_URL=server.url, WAXELL_SPOOL_DIR=str(tmp_path / "spool"), WAXELL_SHIPPER="thread"
        )
        sender = subprocess.Popen(
            [sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True
        )
        try:
            await_(lambda: stored_models(db), "first record", 2 * ANSWER_S)
            with contextlib.closing(sqlite3.connect(db, timeout=ANSWER_S, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                await_(lambda: "the database refuses" in server.said, "refusal", 2 * ANSWER_S)
                other.execute("ROLLBACK")
            enough.touch()
            count = int(sender.communicate(timeout=2 * ANSWER_S)[0])
        finally:
            if sender.poll() is None:
                sender.kill()
                sender.communicate()
        drained = cli("ship", "--drain", **{k: v for k, v in environ.items() if k.startswith("WAXELL_")})
        assert drained.returncode == 0, drained.stderr
        models = [row[0] for row in rows(db, "SELECT model FROM calls")]
        assert sorted(models) == sorted(f"m{n}" for n in range(count))
        found("records of a sender whose server's database was locked", records=len(models))


def rows(db: Path, query: str) -> list[tuple[str, ...]]:
    """Return what a query finds; nothing while there is no table."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as connection:
            return connection.execute(query).fetchall()
    except sqlite3.OperationalError:
        return []


def stored_models(db: Path) -> set[str]:
    """Return the models of all calls that are stored."""
    return {row[0] for row in rows(db, "SELECT model FROM calls")}
