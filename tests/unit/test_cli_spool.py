"""`waxell-workers spool`: what it says is true, also while all are at work, and it leaves no trace.

Each command runs as a process of its own: a POSIX lock goes when its process closes any descriptor of the
file, and this process must not be the one that proves it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faulty import FaultyServer
from tests.harness import START_S, await_, children_in, environment
from waxell_workers.core.encoding import encode
from waxell_workers.core.records import LLMCall, TaskLost
from waxell_workers.core.segments import FIRST_LINE, create_segment, seal

RUN_S = 90.0
KEY = "wax_sk_0123456789secret"
COMMAND = [sys.executable, "-m", "waxell_workers.cli.main"]
RECORD = """
import os, sys, waxell_workers
for _ in range(int(sys.argv[1])):
    with waxell_workers.WaxellContext(sys.argv[2]) as run:
        run.record_llm_call(model=sys.argv[2])
if len(sys.argv) > 3:
    print("written", flush=True)
    sys.stdin.read()
os._exit(0)
"""
DESTINATION = "0123456789abcdef"


class Place:
    """A spool, and the environment of the workers that write there."""

    def __init__(self, root: Path, url: str) -> None:
        self.root = root
        self.url = url

    def environ(self, **more: str) -> dict[str, str]:
        own = {"WAXELL_SPOOL_DIR": str(self.root), "WAXELL_SHIPPER": "external", "WAXELL_API_URL": self.url}
        return environment(**own, COLUMNS="80", **more)

    def record(self, runs: int, name: str = "script", **more: str) -> None:
        """Write runs of three records each, from a process that dies without a word."""
        command = [sys.executable, "-c", RECORD, str(runs), name]
        subprocess.run(command, env=self.environ(**more), check=True, timeout=RUN_S)

    @contextmanager
    def writer(self, name: str = "writer"):
        """Write a run from a process that then stays alive; yield its id."""
        process = subprocess.Popen(
            [sys.executable, "-c", RECORD, "1", name, "stay"],
            env=self.environ(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert process.stdout.readline() == b"written\n"
            yield process.pid
        finally:
            process.communicate(timeout=30)

    def run(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, *arguments]
        environ = self.environ(**more)
        return subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=RUN_S, check=False
        )

    def lines(self, *arguments: str, status: int = 0, **more: str) -> list[dict]:
        done = self.run("spool", *arguments, **more)
        assert done.returncode == status, done.stdout + done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def status(self, **more: str) -> dict:
        (found,) = self.lines("status", "--json", **more)
        return found

    def drain(self, timeout: float = 30, **more: str) -> subprocess.CompletedProcess[str]:
        return self.run("ship", "--drain", "--timeout", str(timeout), **more)

    @property
    def directory(self) -> Path:
        (found,) = self.root.iterdir()
        return found

    def tree(self) -> dict[str, tuple[int, int]]:
        found = sorted(path for path in self.root.rglob("*"))
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.fixture
def faulty():
    """A strict server with ingest."""
    with FaultyServer(ingest=True) as server:
        yield server


@pytest.fixture
def place(tmp_path, faulty):
    """A spool whose workers send to the server."""
    return Place(tmp_path / "spool", faulty.url)


@pytest.fixture
def made(tmp_path):
    """A spool with one destination, made by hand: nobody writes and nobody ships."""
    directory = tmp_path / "spool" / DESTINATION
    directory.mkdir(parents=True)
    create_segment(str(directory), 1)
    return Place(tmp_path / "spool", "http://127.0.0.1:1")


def call(number: int, at: float = 1.0) -> bytes:
    return encode(LLMCall(id=f"c{number}", at=at, model="m", run_id="r"))


def append(place: Place, number: int, *parts: bytes) -> None:
    with (place.directory / f"{number:06d}.ndjson").open("ab") as file:
        file.writelines(parts)


def problems(place: Place, status: int) -> list[tuple[str, int | None, bool]]:
    found = place.lines("verify", "--json", status=status)
    return [(line["where"], line["offset"], line["damage"]) for line in found if line["kind"] == "problem"]


# -- status ------------------------------------------------------------------------------------


def test_status_counts_what_has_not_arrived(place, faulty):
    """Three runs wait; they are delivered; one more comes: 9, 0, 3 records pending."""
    place.record(3)
    assert (place.status()["pending"], place.status()["records"]) == (9, 9)
    assert place.drain().returncode == 0
    drained = place.status()
    assert (drained["pending"], drained["oldest_at"], drained["ledger"]) == (0, None, "ok")
    place.record(1)
    found = place.status()
    assert found["pending"] == 3
    assert time.time() - 60 < found["oldest_at"] <= time.time()
    assert len(faulty.records) == 9


def test_what_was_delivered_beyond_the_cursor_is_not_pending(place, faulty):
    """One run fails, later ones arrive: only the former's records wait, as `ship` says too."""
    faulty.ingest = False  # by REST, runs go one by one
    place.record(1, "poison")
    place.record(2, "fine")
    faulty.mode("500", marker="poison")
    done = place.drain(timeout=4)
    assert faulty.fired["500"]
    assert [run.start["agent_name"] for run in faulty.runs.values()] == ["fine", "fine"]
    pending = int(re.search(r"pending (\d+)", done.stdout)[1])
    assert (pending, place.status()["pending"]) == (3, 3)


def test_a_record_that_is_there_twice_counts_once(made):
    """A writer that a seal has overtaken writes again, into the next segment."""
    append(made, 1, call(1), call(2))
    create_segment(str(made.directory), 2)
    seal(str(made.directory), 1)
    append(made, 2, call(2), call(3))
    assert made.status()["pending"] == 3
    assert [line["id"] for line in made.lines("export")] == ["c1", "c2", "c3"]


def test_what_is_never_sent_is_not_pending(made):
    """A `task_lost` explains the end of a run; the shipper sends none."""
    append(made, 1, call(1), encode(TaskLost(id="l1", at=1.0, task_id="t", reason="killed by signal 9")))
    assert (made.status()["pending"], made.status()["records"]) == (1, 2)


def test_status_says_who_lives(place):
    """Two writers alive, one dead, and a shipper: counted, and named by process id."""
    with place.writer() as first, place.writer() as second, children_in(place.root.parent / "c") as children:
        place.record(1)
        nobody = place.status()
        assert (nobody["shipper_alive"], nobody["shipper_pid"]) == (False, None)
        assert sorted(nobody["writer_pids"]) == sorted([first, second])
        shipper = children.start("ship", [*COMMAND, "ship"], place.environ())
        await_(lambda: (place.directory / "ship.sock").exists(), "socket", START_S)
        found = place.status()
        assert (found["shipper_alive"], found["shipper_pid"]) == (True, shipper.process.pid)
        assert found["writers_alive"] == 2
    assert place.status()["writers_alive"] == 0


def test_status_marks_the_destination_of_these_settings(place):
    """Given records of an older key too, each has its line, and only the present one is marked."""
    place.record(1, WAXELL_API_KEY=KEY)
    place.record(2)
    found = place.lines("status", "--json")
    assert sorted((line["pending"], line["current"]) for line in found) == [(3, False), (6, True)]
    table = place.run("spool", "status")
    assert KEY not in table.stdout + table.stderr
    (marked,) = [line for line in table.stdout.splitlines() if " * " in line]
    assert re.search(r"\b6\b", marked)


def test_status_fits_80_columns(place):
    """Given large numbers, nothing is cut and no line is wider than the terminal."""
    place.record(1, WAXELL_API_KEY=KEY)
    append_to = next(place.root.iterdir()) / "000001.ndjson"
    with append_to.open("ab") as file:
        for number in range(12_000):
            file.write(call(number))
    (append_to.parent / "quarantine.ndjson").write_text("{}\n" * 1234)
    done = place.run("spool", "status")
    assert "12,003" in done.stdout
    assert "1,234" in done.stdout
    assert "…" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()[1:]) <= 80


def test_a_spool_that_is_not_there_is_said_and_not_made(tmp_path):
    """Status 1, one line that says where it was looked for, and no directory."""
    place = Place(tmp_path / "none", "http://127.0.0.1:1")
    for command in ("status", "verify", "export"):
        done = place.run("spool", command)
        assert (done.returncode, done.stdout) == (1, "")
        assert str(place.root) in done.stderr
    assert not place.root.exists()


def test_another_spool_can_be_named(place, tmp_path):
    """`--spool-dir` beats the environment."""
    place.record(1)
    elsewhere = Place(tmp_path / "other", "http://127.0.0.1:1")
    (found,) = elsewhere.lines("status", "--json", "--spool-dir", str(place.root))
    assert (found["spool"], found["pending"], found["current"]) == (str(place.root), 3, False)


# -- without a trace ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["status"], ["verify"], ["export"], ["export", "--all"]])
def test_looking_leaves_everything_as_it_was(place, command):
    """No file appears, none changes: neither beside a ledger that was closed, nor one of a killed shipper."""
    place.record(2)
    place.drain()
    place.record(1)
    before = place.tree()
    assert not list(place.directory.glob("shipper.db-*"))
    place.run("spool", *command)
    assert place.tree() == before

    _kill_a_shipper_that_has_just_committed(place)
    before = place.tree()
    assert len(list(place.directory.glob("shipper.db-*"))) == 2
    place.run("spool", *command)
    assert place.tree() == before


def _kill_a_shipper_that_has_just_committed(place: Place) -> None:
    code = (
        "import os, sys\n"
        "from waxell_workers.core.ledger import Ledger\n"
        "from waxell_workers.core.segments import Position\n"
        "ledger, path = Ledger(sys.argv[1]), sys.argv[2]\n"
        "size, inode = os.stat(path).st_size, os.stat(path).st_ino\n"
        "ledger.commit(Position(int(os.path.basename(path)[:6]), size), inode, "
        "done_above=[], passed=[], runs=[])\n"
        "os._exit(0)\n"
    )
    segment = max(place.directory.glob("*.ndjson"))
    subprocess.run(
        [sys.executable, "-c", code, str(place.directory), str(segment)], check=True, timeout=RUN_S
    )


def test_what_a_killed_shipper_committed_is_believed(place):
    """Its last commit is only in the ledger's log (WAL): nothing is pending, in place and in a copy."""
    place.record(2)
    assert place.status()["pending"] == 6
    _kill_a_shipper_that_has_just_committed(place)
    assert place.status()["pending"] == 0
    # As in a copy that was made while the shipper ran.
    (place.directory / "shipper.db-shm").unlink()
    before = place.tree()
    assert place.status()["pending"] == 0
    assert place.tree() == before


def test_looking_takes_no_lock_away(tmp_path):
    """Given a process that writes and ships itself, a survey by it leaves its locks where they are."""
    code = (
        "import sys, time\n"
        "from waxell_workers.core import inspection, liveness\n"
        "directory = sys.argv[1]\n"
        "liveness.register(directory)\n"
        "assert liveness.ship_lock(directory).acquire()\n"
        "for _ in range(3):\n"
        "    inspection.survey(directory)\n"
        "print('looked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    directory = tmp_path / DESTINATION
    directory.mkdir()
    create_segment(str(directory), 1)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"looked\n"
        place = Place(tmp_path, "http://127.0.0.1:1")
        found = place.status()
        assert (found["writer_pids"], found["shipper_pid"]) == ([process.pid], process.pid)
    finally:
        process.communicate(timeout=30)


def test_looking_while_all_are_at_work_disturbs_nobody(place, faulty, tmp_path):
    """Given two busy writers and a busy shipper, each command succeeds each time, and nothing is lost."""
    runs = 400
    with children_in(tmp_path / "children") as children:
        children.start("ship", [*COMMAND, "ship"], place.environ(WAXELL_FLUSH_INTERVAL="0.2"))
        await_(lambda: list(place.root.glob("*/ship.sock")), "socket", START_S)
        slow = RECORD.replace("    with", "    import time; time.sleep(0.005)\n    with")
        writers = [
            children.start(f"writer {n}", [sys.executable, "-c", slow, str(runs), "w"], place.environ())
            for n in range(2)
        ]
        looked = 0
        while any(writer.alive for writer in writers) or looked < 3:
            assert place.status()["ledger"] == "ok"
            assert not [found for found in problems(place, 0) if found[2]]
            assert all("kind" in line for line in place.lines("export"))
            looked += 1
        assert faulty.wait_until(lambda: len(faulty.records) == 2 * runs * 3, 60)
    assert faulty.duplicates == 0
    assert place.status()["pending"] == 0
    assert not [found for found in problems(place, 0) if found[2]]


# -- verify ------------------------------------------------------------------------------------


def test_verify_finds_a_torn_line_at_its_offset_and_shows_nothing_of_it(made):
    """A line that was cut off, and the record after it: the offset is the line's first byte, status 1."""
    torn = call(2)[:-12].replace(b'"m"', b'"private"')
    append(made, 1, call(1))
    offset = os.path.getsize(made.directory / "000001.ndjson") + 1
    append(made, 1, torn, call(3))
    assert problems(made, 1) == [("000001.ndjson", offset, True)]
    content = (made.directory / "000001.ndjson").read_bytes()
    assert content[offset:].startswith(torn[1:])
    done = made.run("spool", "verify")
    assert f"000001.ndjson, byte {offset}" in done.stdout
    assert "private" not in done.stdout + done.stderr
    assert "1 damaged" in done.stdout
    assert (made.status()["torn"], made.status()["pending"]) == (1, 2)
    assert made.run("spool", "export").stderr.startswith("1 torn or damaged lines were left out")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"\n\xff\xfe\x00garbage\n", "no JSON"),
        (b'\n{"kind":"gpu_seconds","id":"x","at":1}\n', "no record of this version"),
        (b"\n" + b"x" * (3 << 20) + b"\n", "no JSON"),
    ],
    ids=["garbage", "unknown kind", "3 MiB without an end"],
)
def test_verify_tells_what_is_wrong_with_a_line(made, line, text):
    """Damage is counted and passed over; what comes after it is read."""
    append(made, 1, line, call(1))
    done = made.run("spool", "verify")
    assert done.returncode == 1
    assert text in " ".join(done.stdout.split())
    assert "c1" in [found["id"] for found in made.lines("export")]


def test_an_end_without_a_newline_is_torn_only_if_nobody_writes_any_more(place):
    """While its writer lives it may be a record that is being written; then it is one that never will be."""
    with place.writer():
        append(place, 1, b'\n{"kind":"llm_call"')
        (found,) = problems(place, 0)
        assert found[2] is False
    (found,) = problems(place, 1)
    assert found[2] is True


def test_verify_reports_each_segment(made):
    """Number, records, version and seal, for every segment; a healthy spool is status 0."""
    append(made, 1, call(1), call(2))
    create_segment(str(made.directory), 2)
    seal(str(made.directory), 1)
    append(made, 2, call(3))
    found = [line for line in made.lines("verify", "--json") if line["kind"] == "segment"]
    keys = ("segment", "records", "version", "sealed", "torn", "unfinished_bytes")
    assert [tuple(line[key] for key in keys) for line in found] == [
        (1, 2, 1, True, 0, 0),
        (2, 1, 1, False, 0, 0),
    ]
    assert "nothing is damaged" in made.run("spool", "verify").stdout


def test_verify_finds_a_missing_segment(made):
    """Somebody has deleted one by hand, above the lowest."""
    for number in (2, 3):
        create_segment(str(made.directory), number)
        seal(str(made.directory), number - 1)
    (made.directory / "000002.ndjson").unlink()
    assert problems(made, 1) == [("000002.ndjson", None, True)]


def test_verify_finds_a_segment_without_its_first_line(made):
    """A file that was put there by hand; its records are read all the same."""
    (made.directory / "000001.ndjson").write_bytes(call(1))
    assert problems(made, 1) == [("000001.ndjson", 0, True)]
    assert made.status()["pending"] == 1


def test_a_newer_journal_is_said_and_is_no_damage(made):
    """A newer version writes here too: its lines cannot be judged, and are not blamed."""
    newer = FIRST_LINE.replace(b'"version":1', b'"version":2')
    assert newer != FIRST_LINE
    (made.directory / "000001.ndjson").write_bytes(newer + b'\n{"kind":"from_the_future","id":"x"}\n')
    assert problems(made, 0) == [("000001.ndjson", None, False)]
    assert "newer version (format 2)" in made.run("spool", "verify").stdout


@pytest.mark.parametrize("part", ["head", "index"])
def test_verify_finds_a_damaged_ledger(place, part):
    """Overwritten in its head, or where no ordinary question looks: status 1, and nothing else is blamed."""
    place.record(3)
    place.drain()
    place.record(1)
    ledger = place.directory / "shipper.db"
    db = sqlite3.connect(f"file:{ledger}?mode=ro&immutable=1", uri=True)
    [[page]] = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'runs_ended'")
    [[size]] = db.execute("PRAGMA page_size")
    db.close()
    start = (page - 1) * size if part == "index" else 0
    content = bytearray(ledger.read_bytes())
    content[start : start + size // 2] = b"\xa5" * (size // 2)
    ledger.write_bytes(content)
    found = problems(place, 1)
    assert [(where, damage) for where, _, damage in found] == [("shipper.db", True)]


def test_verify_finds_a_cursor_that_does_not_fit(place):
    """In the middle of a line, or in a segment that was replaced by a copy: status 1."""
    place.record(3)
    place.drain()
    place.record(1)
    segment = max(place.directory.glob("*.ndjson"))
    _commit_in_the_middle(place, segment)
    assert "in the middle of a line" in " ".join(place.run("spool", "verify").stdout.split())
    shutil.copy(segment, f"{segment}.copy")
    os.replace(f"{segment}.copy", segment)
    done = place.run("spool", "verify")
    assert done.returncode == 1
    assert "is another file than it was" in " ".join(done.stdout.split())


def _commit_in_the_middle(place: Place, segment: Path) -> None:
    db = sqlite3.connect(place.directory / "shipper.db")
    with db:
        db.execute(
            "UPDATE cursor SET segment = ?, inode = ?, offset = ?",
            (int(segment.name[:6]), segment.stat().st_ino, len(FIRST_LINE) + 5),
        )
    db.close()


# -- export ------------------------------------------------------------------------------------


def test_export_writes_what_waits_as_it_stands_in_the_journal(place):
    """Each line is a record of the segment, byte for byte; what has arrived comes with `--all` alone."""
    place.record(2)
    segment = (place.directory / "000001.ndjson").read_text().splitlines()
    expected = [line for line in segment[1:] if line]
    assert place.run("spool", "export").stdout.splitlines() == expected
    with place.writer():
        place.drain()
        assert place.run("spool", "export").stdout == ""
        everything = place.lines("export", "--all")
    assert [line["kind"] for line in everything[-3:]] == ["run_started", "llm_call", "run_ended"]


@pytest.mark.parametrize(
    ("since", "expected"),
    [
        ("30m", ["c3"]),
        ("2h", ["c2", "c3"]),
        ("1.5d", ["c2", "c3"]),
        ("2000-01-01", ["c2", "c3"]),
        ("1970-01-01T00:00:00Z", ["c1", "c2", "c3"]),
    ],
)
def test_export_since(made, since, expected):
    """An age or a time; a time without a zone is UTC."""
    now = time.time()
    append(made, 1, call(1, at=1.0), call(2, at=now - 5400), call(3, at=now))
    assert [line["id"] for line in made.lines("export", "--since", since)] == expected


def test_export_refuses_a_time_that_is_none(made):
    """Status 2, and what would be one."""
    done = made.run("spool", "export", "--since", "yesterday")
    assert (done.returncode, done.stdout) == (2, "")
    assert "15m" in done.stderr


def test_export_never_mixes_accounts(place):
    """Two destinations: that of the settings, or the one whose hash begins so, or a question back."""
    place.record(1, "old", WAXELL_API_KEY=KEY)
    (old,) = [path.name for path in place.root.iterdir()]
    place.record(1, "new")
    assert {line["model"] for line in place.lines("export") if "model" in line} == {"new"}
    found = place.lines("export", "--destination", old[:4])
    assert {line["model"] for line in found if "model" in line} == {"old"}
    unclear = place.run("spool", "export", WAXELL_API_KEY="a-third-key")
    assert (unclear.returncode, unclear.stdout) == (2, "")
    assert old in unclear.stderr
    assert place.run("spool", "export", "--destination", "").returncode == 2


def test_export_into_a_pipe_that_closes_is_quiet(made):
    """`export | head -1` ends with 0 and without a word."""
    append(made, 1, *(call(number) for number in range(20_000)))
    pipe = f"{' '.join(COMMAND)} spool export | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", pipe], env=made.environ(), capture_output=True, text=True, timeout=RUN_S, check=True
    )
    record, status = done.stdout.splitlines()
    assert (json.loads(record)["id"], status, done.stderr) == ("c0", "0", "")
