"""What cannot be encoded, handed to every public function: objects that raise when they are asked anything,
numbers without end, cycles, 50 MB of text. Nothing is raised, nobody's code is run, nothing costs more than a
record may, and what arrives is what a strict server takes.

What a line of the journal makes of single values is in `tests/property/test_encoding.py`.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import waxell_workers
from tests.acceptance.conftest import children  # noqa: F401  a fixture
from tests.faulty import FaultyServer
from tests.harness import environment, start_server
from tests.torture import effort, found
from waxell_workers import WaxellContext
from waxell_workers.core import collector as collecting
from waxell_workers.core import tasks
from waxell_workers.core.collector import Collector
from waxell_workers.core.config import Settings
from waxell_workers.core.encoding import MAX_LINE
from waxell_workers.core.segments import segment_numbers, segment_path
from waxell_workers.core.shipper import Shipper

LARGE = 50 << 20


class UsersCode(BaseException):
    """No `Exception`, so that no guard takes it for something that may happen."""


def ran(*args: Any, **kwargs: Any) -> Any:
    raise UsersCode


class Names(type):
    __module__ = property(ran)

    def __getattribute__(cls, name: str) -> Any:
        return (
            ran() if name in ("__module__", "__qualname__", "__name__") else type.__getattribute__(cls, name)
        )


class Metaclass(Names):
    __hash__ = __eq__ = __repr__ = __instancecheck__ = __subclasscheck__ = ran


class NoHash(type):
    def __eq__(cls, other: object) -> bool:
        return True


class Asked:
    __repr__ = __str__ = __eq__ = __len__ = __iter__ = __bool__ = __format__ = __getattr__ = __index__ = ran
    __float__ = __int__ = __reduce__ = __dir__ = __contains__ = __getitem__ = __call__ = ran
    __hash__ = object.__hash__
    __class__ = property(ran)


class Text(str):
    __str__ = __repr__ = __format__ = __len__ = __bool__ = __eq__ = __iter__ = encode = __getitem__ = ran
    __hash__ = str.__hash__


class Mapping(dict):
    __len__ = __iter__ = __bool__ = __getitem__ = __repr__ = items = keys = values = get = ran


class Items(list):
    __len__ = __iter__ = __bool__ = __getitem__ = __repr__ = ran


class Array:
    """As numpy's: it has a length and items, and no truth."""

    __hash__ = None
    __eq__ = __bool__ = ran

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return iter((1, 2, 3))


class NoKey:
    __hash__ = ran


@dataclass
class Row:
    cells: Any
    __dict__ = property(ran)


def named(name: Any) -> object:
    kind = type("Named", (), {})
    kind.__qualname__ = name
    return kind()


def without_module() -> object:
    scope: dict[str, Any] = {}
    exec("kind = type('Homeless', (), {})", scope)
    return scope["kind"]()


def nested(levels: int) -> list[Any]:
    deep: list[Any] = []
    for _ in range(levels):
        deep = [deep]
    return deep


def cycle() -> dict[str, Any]:
    own: dict[str, Any] = {}
    own["own"] = own
    return own


ROW = object.__new__(Row)
POISON: dict[str, Callable[[], Any]] = {
    "bytes": lambda: b"\xff\0",
    "not a number": lambda: float("nan"),
    "infinity": lambda: float("-inf"),
    "lone surrogate": lambda: "a\ud800b",
    "zero byte": lambda: "a\0b",
    "50 MB of text": lambda: "x" * LARGE,
    "50 MB of bytes": lambda: bytes(LARGE),
    "a cycle": cycle,
    "100,000 levels": lambda: nested(100_000),
    "900 levels": lambda: nested(900),
    "5,000 digits": lambda: 10**5_000,
    "30 digits": lambda: 10**30,
    "below zero": lambda: -5,
    "true": lambda: True,
    "odd keys": lambda: {(1,): 1, None: 2, 1.5: 3, b"x": 4, frozenset(): 5, "\ud800": 6, True: 7},
    "asked": Asked,
    "metaclass": lambda: Metaclass("Kind", (), {})(),
    "its class": lambda: Metaclass("Kind", (), {}),
    "metaclass without a hash": lambda: NoHash("Kind", (), {})(),
    "no key": NoKey,
    "generator": lambda: (number for number in [ran]),
    "array": Array,
    "name that is no text": lambda: named("\ud800"),
    "name with a mind": lambda: named(Text("name")),
    "no module": without_module,
    "text with a mind": lambda: Text("text"),
    "dict with a mind": lambda: Mapping(a=1),
    "list with a mind": lambda: Items([1]),
    "dataclass with a mind": lambda: ROW,
    "3,000,000 items": lambda: list(range(3_000_000)),
    "1,000,000 keys": lambda: dict.fromkeys(range(1_000_000)),
    "1 GB by reference": lambda: [["x" * 1000] * 1000] * 1000,
    "set": lambda: {1, 2},
    "time": lambda: datetime.datetime(1, 1, 1),
    "deque": lambda: deque([1]),
    "function": lambda: ran,
    "error": lambda: ValueError(Asked()),
}

CONTEXT = (
    *("agent_name", "workflow_name", "inputs", "metadata", "session_id", "user_id", "user_group"),
    "parent_run_id",
)
CALL = (
    *("model", "tokens_in", "tokens_out", "cost", "task", "prompt_preview", "response_preview", "provider"),
    *("duration_ms", "metadata", "at", "streamed", "status", "finish_reason", "error_type", "response_id"),
    "tokens_cached",
)


def hand_over(value: Any) -> None:
    """Hand a value to each public function, in the place of each of its arguments."""
    for argument in CONTEXT:
        with WaxellContext(**{"agent_name": "agent", argument: value}):
            pass
    with WaxellContext("agent", inputs={"value": value}, metadata={"value": value}) as run:
        for argument in CALL:
            run.record_llm_call(**{"model": "model", argument: value})
            waxell_workers.record_llm_call(**{"model": "model", argument: value})
        run.record_step(value, value)
        run.set_tag(value, value)
        run.set_metadata(value, value)
        run.set_result(value)
    observed = waxell_workers.observe(lambda *args: args)
    assert observed(value)[0] is value


SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "with content": {"capture_content": True},
    "redacted": {
        "redact": waxell_workers.redact_texts(lambda text: text.replace("e", "*")),
        "exclude": ("none*",),
    },
}


@pytest.fixture
def collector(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Collector:
    own = {"api_url": "http://127.0.0.1:9", "spool_dir": str(tmp_path), "spool_limit": 1 << 30}
    more = SETTINGS[getattr(request, "param", "as it is")]
    monkeypatch.setattr(collecting, "_collector", Collector(Settings(shipper="external", **own, **more)))
    return collecting.current()


def longest_line(directory: str) -> int:
    return max(
        len(line)
        for number in segment_numbers(directory)
        for line in Path(segment_path(directory, number)).read_bytes().split(b"\n")
    )


def ship(collector: Collector, server: FaultyServer | Any) -> Shipper:
    """Ship all that was recorded to a server."""
    shipper = Shipper(
        replace(collector.settings, api_url=server.url), collector.journal.directory, stay=False
    )
    shipper.stop(time.monotonic() + 120)
    assert shipper.run(0.0)
    return shipper


@pytest.mark.parametrize(
    ("collector", "ingest"),
    [("as it is", False), ("with content", True), ("redacted", False)],
    indirect=["collector"],
)
def test_what_cannot_be_encoded_is_recorded_and_arrives(collector: Collector, ingest: bool) -> None:
    """Each poison in each place: no exception, no record lost, none too long, none rejected by a strict
    server."""
    for make in POISON.values():
        hand_over(make())
    assert collector.stats().dropped == {}
    assert longest_line(collector.journal.directory) <= MAX_LINE
    with FaultyServer(ingest=ingest) as server:
        shipper = ship(collector, server)
    found("poison, in every place", records=collector.stats().recorded)
    assert Counter(violation.partition(": ")[2] for violation in server.violations) == {}
    assert (shipper.pending, shipper.rejected, shipper.unreadable) == (0, 0, False)
    assert shipper._torn == 0
    assert shipper.delivered >= collector.stats().recorded > 1_000


@pytest.mark.parametrize("make", POISON.values(), ids=POISON)
def test_a_redactor_may_return_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    """Whatever stands in the fields of what `redact` returns, or in its place: each record is there, can be
    read, and belongs to its run."""
    for number, redact in enumerate((lambda record: dict.fromkeys(record, make()), lambda record: make())):
        settings = Settings(
            api_url="http://127.0.0.1:9",
            spool_dir=str(tmp_path / str(number)),
            shipper="external",
            redact=redact,
        )
        collector = Collector(settings)
        monkeypatch.setattr(collecting, "_collector", collector)
        with WaxellContext("agent", inputs={"secret": "hunter2"}) as run:
            run.record_llm_call(model="model", prompt_preview="hunter2")
            run.set_result("hunter2")
        assert (collector.stats().recorded, collector.stats().dropped) == (3, {})
        assert longest_line(collector.journal.directory) <= MAX_LINE
        kinds = ("run_started", "llm_call", "run_ended")
        assert {record["run_id"] for kind in kinds for record in records(collector, kind)} == {run.run_id}
        assert b"hunter2" not in Path(segment_path(collector.journal.directory, 1)).read_bytes()


def test_the_local_server_takes_it_and_shows_it(
    collector: Collector,
    children: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The same to the local server: everything is there, and each run's page can be read."""
    for make in POISON.values():
        hand_over(make())
    server = start_server(children, tmp_path / "children")
    shipper = ship(collector, server)
    assert (shipper.pending, shipper.rejected) == (0, 0)
    runs = server.runs()
    assert len(runs) >= len(POISON) * (len(CONTEXT) + 2)
    assert sum(server.calls().values()) >= 2 * len(POISON) * len(CALL)
    with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as client:
        for run in runs[:: effort(40, 1)]:
            assert client.get(f"/runs/{run['run_id']}").status_code == 200


@pytest.mark.parametrize("enqueued_at", [10**400, -1, float("nan"), float("inf"), "now", [1], True])
def test_a_message_with_a_time_that_is_none_has_no_waiting_time(
    collector: Collector, enqueued_at: Any
) -> None:
    """Whoever can enqueue a task cannot keep it from being recorded by what the message says."""
    message = {"waxell": {"enqueued_at": enqueued_at, "run": [1], "root": 5}, "traceparent": 7}
    attempt = tasks.prepare(tasks.Task("celery", "task", "id", message=message), tasks.options_of())
    tasks.begin(attempt)
    tasks.task_ended(attempt, "success")
    [start] = records(collector, "run_started")
    assert enqueued_at is True or "wait_s" not in start["metadata"]


# -- errors ------------------------------------------------------------------------------------


class Arguments(Exception):
    args = __traceback__ = __cause__ = __context__ = property(ran)


class Message(Exception):
    __str__ = __repr__ = ran


class Kind(Exception, metaclass=Names):
    pass


def lazily(name: str, value: Any) -> BaseException:
    kind = type("Odd", (Exception,), {})
    setattr(kind, name, value)
    return kind("odd")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "arguments": lambda: Arguments("a"),
    "message": lambda: Message("a"),
    "metaclass": lambda: Kind("a"),
    "module that is no text": lambda: lazily("__module__", 3),
    "name that is no text": lambda: lazily("__qualname__", "\ud800"),
    "name with a mind": lambda: lazily("__qualname__", Text("name")),
    "50 MB": lambda: ValueError("x" * LARGE),
    "1,000,000 arguments": lambda: ValueError(*range(1_000_000)),
    "asked": lambda: ValueError(Asked(), Text("a"), "\ud800", 10**5_000),
}


@pytest.mark.parametrize("collector", ["as it is", "with content", "redacted"], indirect=True)
@pytest.mark.parametrize("make", ERRORS.values(), ids=ERRORS)
def test_an_error_of_any_kind_ends_its_run(collector: Collector, make: Callable[[], BaseException]) -> None:
    """An exception that raises when it is asked anything passes untouched, and its run ends as an error."""
    error, caught = make(), None
    try:
        with WaxellContext("agent"):
            raise error
    except BaseException as raised:  # noqa: BLE001  nor does pytest look at it
        caught = raised
    if caught is not error:
        pytest.fail("another exception has come")
    del caught, error
    assert (collector.stats().recorded, collector.stats().dropped) == (2, {})
    [end] = records(collector, "run_ended")
    assert end["state"] == "error"
    assert end["error_type"]


def records(collector: Collector, kind: str) -> list[dict[str, Any]]:
    text = Path(segment_path(collector.journal.directory, 1)).read_text()
    found = [json.loads(line) for line in text.splitlines() if line]
    return [record for record in found if record["kind"] == kind]


# -- what it costs -----------------------------------------------------------------------------

COSTS = """
import resource, sys, time, waxell_workers
from waxell_workers.core.collector import current
waxell_workers.init(api_url="http://127.0.0.1:9", spool_dir=sys.argv[1], shipper="external", capture=(),
    redact=waxell_workers.redact_texts(lambda text: text.replace("x", "y")) if sys.argv[2] == "yes" else None)
value = {value}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with waxell_workers.WaxellContext("warm", inputs={{"a": 1}}) as run:
    run.record_step("s", ["x" * 300_000, object()])
before, began = peak(), time.process_time()
with waxell_workers.WaxellContext("agent", inputs={{"value": value}}) as run:
    run.record_llm_call(model="m", prompt_preview=value, metadata={{"value": value}})
    run.record_step("step", value)
    run.set_tag("tag", value)
    run.set_result(value)
print((peak() - before) >> 10, time.process_time() - began, current().stats().recorded)
"""
COSTLY = {
    "50 MB of text": '"x" * (50 << 20)',
    "50 MB of text in a list": '["x" * (50 << 20)] * 3',
    "1 GB by reference": '[["x" * 1000] * 1000] * 1000',
    "3,000,000 items": "list(range(3_000_000))",
    "1,000,000 keys": "dict.fromkeys(range(1_000_000))",
}


@pytest.mark.parametrize("value", COSTLY.values(), ids=COSTLY)
@pytest.mark.parametrize("redact", ["yes", "no"][: effort(1, 2)])
def test_a_large_value_costs_little(tmp_path: Path, value: str, redact: str) -> None:
    """Given something huge in five records, their making copies none of it: a few MB, whatever its size."""
    done = subprocess.run(
        [sys.executable, "-c", COSTS.format(value=value), str(tmp_path), redact],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    megabytes, seconds, recorded = done.stdout.split()
    found("a large value in five records", megabytes=int(megabytes), milliseconds=int(float(seconds) * 1000))
    assert int(megabytes) < 40
    assert float(seconds) < 5
    assert recorded == "8"


def test_a_stack_that_may_grow_without_end_is_not_used_up(tmp_path: Path) -> None:
    """Where a process has lifted the limit of recursion, a value of 1,000,000 levels is no crash of ours."""
    code = """
import sys, waxell_workers
from waxell_workers.core.collector import current
waxell_workers.init(api_url="http://127.0.0.1:9", spool_dir=sys.argv[1], shipper="external", capture=())
sys.setrecursionlimit(10**9)
deep = []
for _ in range(1_000_000):
    deep = [deep]
with waxell_workers.WaxellContext("agent", inputs={"deep": deep}) as run:
    run.record_step("step", deep)
print(current().stats().recorded, flush=True)
import os; os._exit(0)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
