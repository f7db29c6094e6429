"""The command line: what it prints where, with which status, and what it needs for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from waxell_workers.cli.commands import cli
from waxell_workers.cli.demo_tally import Attempt, Call
from waxell_workers.cli.demo_verdict import SeenRun, judge
from waxell_workers.cli.extras import MissingExtra, require
from waxell_workers.cli.processes import ChildError, Children
from waxell_workers.cli.runs import FIELDS, MORE_FIELDS
from waxell_workers.server import Store
from waxell_workers.server.writes import CallMade, End, Start

RUNS = {
    "aaaa1111": ("tickets.triage", "success"),
    "aaaa2222": ("tickets.triage", "error"),
    "bbbb3333": ("tickets.[red]research", "killed"),
}
NOON = 1_790_000_000.0


@pytest.fixture
def db(tmp_path):
    """A server's database with three runs, one call each."""
    path = tmp_path / "runs.db"
    with Store(path) as store, store.write() as writer:
        for number, (run_id, (agent, status)) in enumerate(RUNS.items()):
            at = NOON + number
            writer.start(run_id, Start(agent, "celery", at, "ingest", metadata={"queue": "q"}))
            writer.call(
                run_id,
                CallMade("gpt-4o-mini", at, tokens_in=10, tokens_out=5, cost_usd=0.25, operation="chat"),
            )
            failed = "ValueError: no" if status == "error" else ""
            writer.end(run_id, End(status, at + 1, 1000.0, error=failed))
    return path


@pytest.fixture
def run(monkeypatch):
    """Invoke the command line in an environment without settings of ours."""
    for name in os.environ:
        if name.startswith(("WAXELL_", "OPENAI_")):
            monkeypatch.delenv(name)

    def invoke(*arguments, **environ):
        return CliRunner(env=environ).invoke(cli, [str(argument) for argument in arguments])

    return invoke


def lines(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


# -- the command itself ------------------------------------------------------------------------


def test_help_imports_nothing_that_a_command_works_with():
    """`--help` is quick, and works with no extra but `cli`."""
    heavy = ["httpx", "rich", "celery", "openai", "redis", "starlette", "uvicorn", "sqlite3"]
    code = f"import sys, waxell_workers.cli.commands; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_without_the_extra_the_command_says_what_to_install():
    """A base installation has the command, but not click: status 2 and one line that helps."""
    code = (
        "import importlib.util as util, sys\n"
        "find_spec = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'click' else find_spec(name, *rest)\n"
        "from waxell_workers.cli.main import main\n"
        "main()\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == 'waxell-workers: click not found: pip install "waxell-workers[cli]"\n'


def test_a_command_says_which_extra_it_needs(monkeypatch):
    """`demo` without Celery names Celery and the extra."""
    import waxell_workers.cli.extras as extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "celery" else object())
    with pytest.raises(
        MissingExtra, match=r'celery not found: pip install "waxell-workers\[demo\]"'
    ) as raised:
        require("demo")
    assert raised.value.exit_code == 2


def test_a_wrong_setting_is_one_line_and_no_traceback(run):
    """A ConfigError from anywhere below is what the user reads, with status 2."""
    result = run("ship", "--drain", WAXELL_API_URL="ftp://x")
    assert result.exit_code == 2
    assert "WAXELL_API_URL='ftp://x': expected an http:// or https:// URL" in result.stderr


# -- runs --------------------------------------------------------------------------------------


def test_ls_prints_one_object_a_line_newest_first_with_the_promised_fields(run, db):
    """`runs ls --json` is what scripts read: these fields, in this order, and nothing else on stdout."""
    result = run("runs", "ls", "--db", db, "--json")
    assert result.exit_code == 0
    found = lines(result)
    assert [line["run_id"] for line in found] == ["bbbb3333", "aaaa2222", "aaaa1111"]
    assert [tuple(line) for line in found] == [FIELDS] * 3
    assert found[1] | {"started_at": ""} == {
        "run_id": "aaaa2222",
        "agent_name": "tickets.triage",
        "workflow_name": "celery",
        "status": "error",
        "started_at": "",
        "duration_ms": 1000.0,
        "calls": 1,
        "tokens_in": 10,
        "tokens_out": 5,
        "cost_usd": 0.25,
        "error": "ValueError: no",
        "metadata": {"queue": "q"},
        "tokens_in_unknown": 0,
        "tokens_out_unknown": 0,
        "cost_unknown": 0,
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--agent", "tickets.triage"], ["aaaa2222", "aaaa1111"]),
        (["--status", "killed"], ["bbbb3333"]),
        (["--limit", "1"], ["bbbb3333"]),
        (["--agent", "nobody"], []),
    ],
)
def test_ls_filters(run, db, options, expected):
    """Agent, status and limit narrow the list."""
    assert [line["run_id"] for line in lines(run("runs", "ls", "--db", db, "--json", *options))] == expected


def test_ls_shows_a_table_and_takes_no_markup_from_names(run, db):
    """A task called `[red]…` is printed as it is called."""
    result = run("runs", "ls", "--db", db, COLUMNS="160")
    assert "tickets.[red]research" in result.stdout
    assert "killed" in result.stdout
    assert "ValueError: no" in result.stdout


def test_show_prints_a_run_with_its_calls(run, db):
    """The same fields as `ls`, `calls` still a number, and the calls beside it."""
    (found,) = lines(run("runs", "show", "bbbb3333", "--db", db, "--json"))
    assert {name: found[name] for name in ("run_id", "status", "calls")} == {
        "run_id": "bbbb3333",
        "status": "killed",
        "calls": 1,
    }
    assert [call["model"] for call in found["llm_calls"]] == ["gpt-4o-mini"]


def test_show_prints_a_panel(run, db):
    """For people: name, status, the sums, and a line for each call."""
    result = run("runs", "show", "aaaa2222", "--db", db, COLUMNS="120")
    assert result.exit_code == 0
    for expected in ("tickets.triage", "error", "ValueError: no", "gpt-4o-mini", "$0.2500", "1 call"):
        assert expected in result.stdout


def test_a_run_says_why_it_ended_where_no_error_does(run, db):
    """Given a task that was killed without an exception, then table and panel say by what, as plain text."""
    with Store(db) as store, store.write() as writer:
        writer.start("cccc4444", Start("slow", "celery", 1_795_000_000.0, "ingest"))
        writer.end("cccc4444", End("killed", 1_795_000_001.0, reason="killed: limit of 30 s \x1b[2J[bold]"))
    for command in (["ls"], ["show", "cccc4444"]):
        result = run("runs", *command, "--db", db, COLUMNS="160")
        assert "killed: limit of 30 s \\x1b[2J[bold]" in result.stdout
    assert set(lines(run("runs", "ls", "--db", db, "--json"))[0]) == set(FIELDS)


def test_show_tells_where_a_run_belongs_and_for_whom_it_was(run, db):
    """Trace, parent, session, user and tags, for people as for scripts; what is unknown has no line."""
    start = Start(
        "child",
        "celery",
        1_795_000_000.0,
        "ingest",
        task_id="t-1",
        trace_id="ab" * 16,
        root_run_id="aaaa1111",
        parent_run_id="aaaa2222",
        session_id="s-1",
        user_id="[bold]u",
        tags={"plan": "gold", "seats": 3},
    )
    with Store(db) as store, store.write() as writer:
        writer.start("dddd5555", start)
    rows = dict(
        line.strip().split(maxsplit=1)
        for line in run("runs", "show", "dddd5555", "--db", db, COLUMNS="160").stdout.splitlines()
        if len(line.split()) > 1
    )
    assert rows.items() >= {
        ("trace", "ab" * 16),
        ("parent", "aaaa2222"),
        ("session", "s-1"),
        ("user", "[bold]u"),
        ("tags", "plan=gold, seats=3"),
    }
    (found,) = lines(run("runs", "show", "dddd5555", "--db", db, "--json"))
    assert {name: found[name] for name in (*MORE_FIELDS, "reason")} == {
        "task_id": "t-1",
        "trace_id": "ab" * 16,
        "root_run_id": "aaaa1111",
        "parent_run_id": "aaaa2222",
        "session_id": "s-1",
        "user_id": "[bold]u",
        "tags": {"plan": "gold", "seats": 3},
        "traceback": "",
        "reason": "",
    }
    assert "no calls" in run("runs", "show", "dddd5555", "--db", db).stdout
    known = run("runs", "show", "aaaa1111", "--db", db, COLUMNS="160").stdout
    assert not any(line.startswith(("parent", "session", "user", "tags")) for line in known.splitlines())


def test_show_takes_the_beginning_of_an_id(run, db):
    """Nobody types 32 digits."""
    (found,) = lines(run("runs", "show", "b", "--db", db, "--json"))
    assert found["run_id"] == "bbbb3333"


@pytest.mark.parametrize(
    ("prefix", "message"), [("aaaa", "2 runs begin with aaaa"), ("c", "no run begins with c")]
)
def test_show_refuses_a_beginning_that_names_no_one_run(run, db, prefix, message):
    """Two runs or none: status 1, the reason on stderr, nothing on stdout."""
    result = run("runs", "show", prefix, "--db", db, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr


def test_url_and_db_exclude_each_other(run, db):
    """A command reads from one place."""
    result = run("runs", "ls", "--db", db, "--url", "http://127.0.0.1:1")
    assert result.exit_code == 2
    assert "--url or --db" in result.stderr


def test_a_server_that_does_not_answer_is_named(run):
    """Status 1, and the address that was tried: the one of the environment."""
    result = run("runs", "ls", WAXELL_API_URL="http://127.0.0.1:1/")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "http://127.0.0.1:1" in result.stderr


@contextmanager
def served(db, port=0, **environ):
    """Run `waxell-workers serve` yield its address and process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "waxell_workers.cli.main", "serve", "--port", str(port), "--db", str(db)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environ},
    )
    try:
        yield process.stdout.readline().strip(), process
    finally:
        process.terminate()
        process.communicate(timeout=10)


def test_a_server_and_its_file_show_the_same(run, db):
    """`--url` and `--db` are two roads to the same lines; `show` finds a beginning on both."""
    with served(db) as (url, _):
        assert url.startswith("http://127.0.0.1:")
        for command in (["ls"], ["ls", "--status", "error"], ["show", "bb"]):
            by_url = run("runs", *command, "--json", "--url", url)
            by_file = run("runs", *command, "--json", "--db", db)
            assert by_url.exit_code == 0, by_url.stderr
            assert by_url.stdout == by_file.stdout
        missing = run("runs", "show", "cc", "--url", url)
        assert (missing.exit_code, missing.stdout) == (1, "")


def test_a_server_with_a_key_is_read_with_the_key_of_the_environment(run, db):
    """Without the key: status 1, what the server said, and what to do."""
    with served(db, WAXELL_SERVER_API_KEY="s3cret") as (url, _):
        refused = run("runs", "ls", "--url", url)
        assert refused.exit_code == 1
        assert "401" in refused.stderr
        assert "set WAXELL_API_KEY" in refused.stderr
        assert len(lines(run("runs", "ls", "--json", "--url", url, WAXELL_API_KEY="s3cret"))) == 3


# -- serve, ship, demo -------------------------------------------------------------------------


def test_serve_prints_its_address_alone_and_ends_quietly(db):
    """A script reads one line from stdout; a person reads on stderr what to export."""
    with served(db) as (url, process):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert out == ""
    assert process.returncode == 0
    assert f"export WAXELL_API_URL={url}" in err


def test_serve_refuses_an_open_address_without_a_key(run):
    """Anybody could read the prompts; the message names the variable that holds a key."""
    result = run("serve", "--host", "0.0.0.0", "--port", "0")
    assert result.exit_code == 2
    assert "WAXELL_SERVER_API_KEY" in result.stderr


def test_ship_needs_somewhere_to_ship_to(run):
    """Neither a key nor a loopback address: status 2."""
    result = run("ship", "--drain")
    assert result.exit_code == 2
    assert "nowhere to ship to" in result.stderr


RECORD = """
import waxell_workers
with waxell_workers.WaxellContext("script") as run:
    run.record_llm_call(model="gpt-4o-mini", tokens_in=3, tokens_out=4)
"""


def test_ship_drain_tells_whether_something_remains(run, tmp_path):
    """Nobody listens: status 1 and nothing lost. Then a server listens: status 0, and the run is there."""
    db, spool = tmp_path / "later.db", tmp_path / "spool"
    with served(tmp_path / "first.db") as (url, _):
        port = url.rpartition(":")[2]
    environ = {"WAXELL_API_URL": url, "WAXELL_SPOOL_DIR": str(spool), "WAXELL_SHIPPER": "external"}
    subprocess.run([sys.executable, "-c", RECORD], env={**os.environ, **environ}, check=True, timeout=30)

    refused = ship(environ, "--timeout", "1")
    assert refused.returncode == 1, refused.stderr
    with served(db, port) as (again, _):
        assert again == url
        delivered = ship(environ)
        assert delivered.returncode == 0, delivered.stderr
        (found,) = lines(run("runs", "ls", "--json", "--url", url))
    assert (found["agent_name"], found["status"], found["calls"]) == ("script", "success", 1)


def ship(environ, *options):
    command = [sys.executable, "-m", "waxell_workers.cli.main", "ship", "--drain", *options]
    environ = {**os.environ, **environ}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=90, check=False)


def test_demo_with_a_real_model_needs_its_key(run):
    """Before anything is started."""
    result = run("demo", "--base-url", "https://api.openai.com/v1")
    assert result.exit_code == 2
    assert "OPENAI_API_KEY" in result.stderr


# -- the demo's verdict ------------------------------------------------------------------------

FIRST, RETRIED = Attempt("t1", 0), Attempt("t1", 1)


def seen(attempt, *calls, status="success"):
    return SeenRun(f"run-{attempt.task_id}-{attempt.number}", attempt, status, calls)


def call(attempt, response_id="r1", model="gpt-4o-mini"):
    return Call(attempt, model, response_id)


def test_everything_in_its_place_is_clean():
    """Two attempts of a task, a call each: nothing lost, nothing twice."""
    calls = [call(FIRST, "r1"), call(RETRIED, "r2")]
    runs = [seen(FIRST, calls[0], status="killed"), seen(RETRIED, calls[1])]
    verdict = judge(1, [FIRST, RETRIED], calls, runs)
    assert verdict.clean
    assert (verdict.attempts, verdict.runs, verdict.calls, verdict.killed) == (2, 2, 2, 1)


@pytest.mark.parametrize(
    ("runs", "lost", "duplicated", "misattributed"),
    [
        ([], 2, 0, 0),
        ([seen(FIRST)], 1, 0, 0),
        ([seen(FIRST, call(FIRST)), seen(FIRST)], 0, 1, 0),
        ([seen(FIRST, call(FIRST), call(FIRST))], 0, 1, 0),
        ([seen(FIRST), seen(RETRIED, call(RETRIED))], 0, 0, 1),
    ],
    ids=["nothing came", "run without call", "run twice", "call twice", "call in another run"],
)
def test_what_is_wrong_is_counted(runs, lost, duplicated, misattributed):
    """One attempt with one call happened; the server has something else."""
    verdict = judge(1, [FIRST], [call(FIRST)], runs)
    assert (verdict.lost, verdict.duplicated, verdict.misattributed_calls) == (
        lost,
        duplicated,
        misattributed,
    )
    assert not (verdict.clean and runs)


def test_calls_without_an_id_are_counted_by_attempt_and_model():
    """Embeddings have no id: two in one attempt, one arrived, one is lost."""
    embedding = call(FIRST, response_id="", model="text-embedding-3-small")
    verdict = judge(1, [FIRST], [embedding, embedding], [seen(FIRST, embedding)])
    assert (verdict.lost_calls, verdict.duplicated_calls) == (1, 0)


def test_a_call_whose_note_was_never_written_is_no_duplicate():
    """Killed between the answer and the note: the server knows more than the task could say."""
    verdict = judge(1, [FIRST], [], [seen(FIRST, call(FIRST))])
    assert verdict.clean


# -- child processes ---------------------------------------------------------------------------


def python(code):
    return [sys.executable, "-c", code]


def test_children_are_ended_with_what_they_started_even_if_they_refuse(tmp_path):
    """A child that ignores SIGTERM, and its own child, are gone after the block."""
    deaf = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.fork(); "
        "os.write(1, b'up %d\\n' % os.getpid()); time.sleep(60)"
    )
    with Children(tmp_path) as children:
        child = children.start("deaf", python(deaf), os.environ)
        child.wait_for(lambda: child.log.read_bytes().count(b"\n") == 2, "both", timeout_s=10)
        pids = [int(line.split()[1]) for line in child.tail().splitlines()]
        child.stop(timeout_s=0.1)
    deadline = time.monotonic() + 5
    while any(lives(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.02)


def lives(pid):
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_child_that_ends_too_early_is_told_with_the_end_of_its_log(tmp_path):
    """What is waited for will not come: the error has the child's last words."""
    with Children(tmp_path) as children:
        child = children.start("early", python("print('last words'); raise SystemExit(3)"), os.environ)
        with pytest.raises(ChildError, match=r"early ended \(3\)(.|\n)*last words"):
            child.wait_for_line("http://", timeout_s=10)
        with pytest.raises(ChildError, match="early has ended"):
            children.check()


def test_a_wait_has_an_end(tmp_path):
    """A child that lives and says nothing is not waited for beyond the deadline."""
    with Children(tmp_path) as children:
        child = children.start("silent", python("import time; time.sleep(60)"), os.environ)
        with pytest.raises(ChildError, match="silent: no line http"):
            child.wait_for_line("http://", timeout_s=0.2)
