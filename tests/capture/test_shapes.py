"""Every shape of call of every SDK is heard as the table says, and its caller notices nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.providers.answers import ARGUMENTS, pieces_for
from waxell_workers import capture

from .shapes import Row, make, module_of, rows

ROOT = Path(__file__).parents[2]

# What the SDKs themselves, the oldest above all, do not do in time any more is nothing that we can act on.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    """Where the providers' stand-in listens."""
    command = [sys.executable, "-m", "tests.providers.server"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.stdin.close()


class Unheard:
    """A process that makes the same calls without us."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def begin(self, row: Row, call: str) -> None:
        """Let it make a row's call."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{row.id} {call}\n")
        self._process.stdin.flush()

    def saw(self) -> Any:
        """Return what the caller saw there."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def unheard(origin: str) -> Iterator[Unheard]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.capture.shapes", origin]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Unheard(process)
        assert process.stdin is not None
        process.stdin.close()


def requests_of(origin: str, call: str) -> int:
    with urllib.request.urlopen(f"{origin}/heard/{call}", timeout=60) as answer:
        return int(answer.read())


def told(call: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a call that the table settles, with those of the others that can be checked."""
    call = dict(call)
    assert len(call.pop("id")) == 32
    assert call.pop("run_id") == "the run"
    assert call.pop("at") > 0
    duration_ms, ttft_ms = call.pop("duration_ms"), call.pop("ttft_ms", None)
    assert 0 < duration_ms < 60_000
    assert ttft_ms is None or 0 < ttft_ms <= duration_ms
    for content in ("prompt", "response", "messages", "error_message"):
        assert "ello" not in str(call.pop(content, "")), f"{content} though nobody wanted content"
    tool_calls = call.pop("tool_calls", [])
    assert not any("Paris" in str(tool) for tool in tool_calls), "arguments though nobody wanted content"
    tokens = ("tokens_in", "tokens_out", "tokens_cached", "tokens_cache_written", "tokens_reasoning")
    nothing = dict.fromkeys(tokens) | {"error_type": "", "metadata": {}}
    more = {"ttft is known": ttft_ms is not None, "tools": [tool["name"] for tool in tool_calls]}
    return {**nothing, **call, **more}


def fits(error_type: str, expected: str) -> bool:
    """Return whether an error's type is (one of) the table's."""
    return any(
        re.fullmatch(re.escape(kind).replace(r"\{http\}", "httpx2?"), error_type)
        for kind in expected.split("|")
    )


def type_of_error(saw: Any) -> str:
    """Return the type of the error that a caller saw, as a call names it."""
    raised = saw["raised"].partition(":")[0].split(".") if isinstance(saw, dict) and "raised" in saw else [""]
    return ".".join(raised[:: len(raised) - 1] if len(raised) > 1 else raised).removeprefix("builtins.")


def differences(heard: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return what of a call is not as the table says."""
    assert heard.keys() == expected.keys()
    return [
        f"{name} is {heard[name]!r}, not {value!r}"
        for name, value in expected.items()
        if not (fits(heard[name], value) if name == "error_type" else heard[name] == value)
    ]


@contextmanager
def listening(*, wants_content: bool) -> Iterator[list[dict[str, Any]]]:
    """Hear calls, in a list that grows."""
    calls: list[dict[str, Any]] = []
    capture.install(
        lambda **call: calls.append(call),
        names=None,
        wants_content=lambda: wants_content,
        current_run=lambda: "the run",
    )
    try:
        yield calls
    finally:
        capture.uninstall()


def skip_if_missing(row: Row) -> None:
    if row.missing:
        pytest.skip(row.missing)
    module_of(row)


@pytest.mark.parametrize("row", rows().values(), ids=lambda row: row.id)
def test_a_call_is_heard_as_the_table_says(row: Row, origin: str, unheard: Unheard) -> None:
    """One call for each that the caller made, with what the provider said and nothing else; the caller gets
    the same result, or the same error, as in a process without us, and the server as many requests."""
    skip_if_missing(row)
    ours, theirs = uuid.uuid4().hex, uuid.uuid4().hex
    unheard.begin(row, theirs)
    try:
        with listening(wants_content=False) as calls:
            saw = make(row, origin, ours)
    finally:
        saw_unheard = unheard.saw()
    heard, expected = [told(call) for call in calls], row.expected()
    assert len(heard) == len(expected)
    for call, of_table in zip(heard, expected, strict=True):
        assert not differences(call, of_table)
        if "|" in of_table["error_type"]:
            assert call["error_type"] == type_of_error(saw)
    assert saw == saw_unheard
    assert requests_of(origin, ours) == requests_of(origin, theirs) == row.requests


TELLING = {(row.says["how"], row.is_async): row for row in rows().values() if row.is_whole_text}
"""One row of each shape whose answer is a whole one, in words or a tool's call."""


@pytest.mark.parametrize("row", TELLING.values(), ids=lambda row: row.id)
def test_content_is_heard_where_it_is_wanted(row: Row, origin: str) -> None:
    """What was asked, and what came back whole: the text, however it was streamed, or a tool's arguments."""
    skip_if_missing(row)
    with listening(wants_content=True) as calls:
        make(row, origin, uuid.uuid4().hex)
    (call,) = calls
    (of_table,) = row.expected()
    assert call["prompt"] in ("Say hello.", "Hello", "Weather?")
    assert call["messages"][-1] == {"role": "user", "text": call["prompt"]}
    asked_for = [(tool["name"], tool["arguments"]) for tool in call.get("tool_calls", [])]
    assert asked_for == [(name, ARGUMENTS) for name in of_table["tools"]]
    if not of_table["tools"]:
        assert call["response"] == "".join(pieces_for(row.model))
