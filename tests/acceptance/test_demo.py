"""`waxell-workers demo` as a user runs it: what it counts, what it prints, and that it leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from contextlib import contextmanager

import psutil
import pytest

FIGURES = {
    "tasks",
    "attempts",
    "runs",
    "calls",
    "tokens_in",
    "tokens_out",
    "cost_usd",
    "killed",
    "lost",
    "duplicated",
    "misattributed_calls",
}
START_S = 30
DEMO_S = 90


@pytest.fixture
def demo(tmp_path):
    """Start demos in a temporary directory of their own; in the end, neither a process nor a file is left."""
    mark = uuid.uuid4().hex

    @contextmanager
    def start(*options, **environ):
        process = subprocess.Popen(
            [sys.executable, "-m", "waxell_workers.cli.main", "demo", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path), "DEMO_TEST_MARK": mark, **environ},
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()

    yield start
    left = [process for process in psutil.process_iter() if mark in environment_of(process)]
    commands = [command_of(process) for process in left]
    for process in left:
        process.kill()
    assert commands == [], "processes were left behind"
    assert list(tmp_path.iterdir()) == []


def environment_of(process):
    try:
        return process.environ().get("DEMO_TEST_MARK", "")
    except psutil.Error:
        return ""


def command_of(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return [str(process)]


def test_the_demo_loses_nothing_although_its_tasks_are_killed(demo):
    """The point of it all: hard limits, SIGKILLs, and every attempt and call of all three is there, once."""
    with demo("--once", "--json") as process:
        out, err = process.communicate(timeout=DEMO_S)
    assert process.returncode == 0, err
    figures = json.loads(out)
    assert set(figures) >= FIGURES
    assert (figures["lost"], figures["duplicated"], figures["misattributed_calls"]) == (0, 0, 0)
    assert figures["killed"] >= 4
    assert figures["tasks"] == 100
    assert figures["runs"] == figures["attempts"] > 100
    assert figures["calls"] >= 100
    assert {name: one["tasks"] for name, one in figures["frameworks"].items()} == {
        "celery": 60,
        "rq": 20,
        "dramatiq": 20,
    }
    assert all(one["runs"] == one["attempts"] >= one["tasks"] for one in figures["frameworks"].values())
    assert figures["cost_usd"] > 0
    assert "stand-in" in err


def test_a_model_that_does_not_answer_is_no_loss(demo):
    """Every call fails, the second tasks of chains never start, and the demo still ends with its count."""
    with demo(
        *("--once", "--json", "--tasks", "24", "--base-url", "http://127.0.0.1:1/v1"), OPENAI_API_KEY="none"
    ) as process:
        out, err = process.communicate(timeout=DEMO_S)
    assert process.returncode == 0, err
    figures = json.loads(out)
    assert figures["tasks"] == 24
    assert (figures["lost"], figures["duplicated"]) == (0, 0)
    assert figures["runs"] == figures["attempts"] > 0


def test_without_once_the_page_stays_until_ctrl_c(demo):
    """The table is on stdout, the page still answers, Ctrl-C ends everything."""
    with demo("--tasks", "24") as process:
        table = until(process.stdout, "duplicated")
        url = until(process.stderr, "The page stays at").split()[4]
        with urllib.request.urlopen(url, timeout=10) as page:
            assert page.status == 200
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=START_S)
    assert process.returncode == 0, err
    assert "lost" in table


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_demo_leaves_nothing_behind(demo, number):
    """In the middle of the work; what the fixture looks at afterwards is the point."""
    with demo("--once", "--json") as process:
        until(process.stderr, "page:")
        process.send_signal(number)
        out, _ = process.communicate(timeout=START_S)
    assert process.returncode == 1
    assert out == ""


def until(stream, text):
    """Read lines until one has `text` in it; return it and those before."""
    lines = []
    deadline = time.monotonic() + DEMO_S
    while time.monotonic() < deadline:
        line = stream.readline()
        assert line, f"ended without {text}: {''.join(lines)}"
        lines.append(line)
        if text in line:
            return line if text != "duplicated" else "".join(lines)
    raise AssertionError(f"no {text} in time: {''.join(lines)}")
