"""Runs and `@observe`: which run is current, how it ends, and what may be written about it."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import functools
import inspect
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import waxell_workers
from tests.harness import await_
from waxell_workers import WaxellContext, get_context, observe, redact_texts
from waxell_workers.core import collector as collecting
from waxell_workers.core.config import Settings
from waxell_workers.core.reader import Reader
from waxell_workers.core.records import LLMCall, Record, RunEnded, RunStarted, RunUpdated, Step


class Journal:
    """What has been recorded, read from the disk."""

    def __init__(self, collector: collecting.Collector) -> None:
        self.collector = collector

    def records(self) -> list[Record]:
        if not self.collector.journal.directory:
            return []
        reader = Reader(self.collector.journal.directory, None, 0)
        found = [entry.record for entry in reader.read() if entry.record is not None]
        reader.close()
        return found

    def of(self, kind: Any) -> list[Any]:
        return [record for record in self.records() if isinstance(record, kind)]

    def states(self) -> list[str]:
        return [record.state for record in self.of(RunEnded)]

    def calls(self) -> dict[str, str]:
        """Model to the name of the run to which the call belongs."""
        names = {record.run_id: record.agent_name for record in self.of(RunStarted)} | {"": ""}
        return {call.model: names[call.run_id] for call in self.of(LLMCall)}


def configure(monkeypatch: pytest.MonkeyPatch, root: Path, **more: Any) -> Journal:
    settings = Settings(api_url="http://127.0.0.1:9", spool_dir=str(root), shipper="external", **more)
    collector = collecting.Collector(settings)
    monkeypatch.setattr(collecting, "_collector", collector)
    return Journal(collector)


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    yield configure(monkeypatch, tmp_path)
    assert get_context() is None


def call(model: str) -> None:
    waxell_workers.record_llm_call(model=model)


# --- contexts ---------------------------------------------------------------------------------------


def test_runs_nest(journal: Journal) -> None:
    """An inner run is the child of the outer one, which is current again after it."""
    with WaxellContext("outer") as outer:
        call("a")
        with WaxellContext("inner") as inner:
            call("b")
            assert get_context() is inner
        call("c")
        assert get_context() is outer
    call("d")
    assert journal.calls() == {"a": "outer", "b": "inner", "c": "outer", "d": ""}
    first, second = journal.of(RunStarted)
    assert second.parent_run_id == first.run_id
    assert second.root_run_id == first.root_run_id == first.run_id
    assert second.trace_id == first.trace_id
    assert len(first.trace_id) == 32


def test_everything_said_about_a_run_is_written_at_once(journal: Journal) -> None:
    """Tags, metadata and steps stand in the journal before the run has ended: a killed run has them."""
    with WaxellContext("a", "flow", {"q": 1}, {"m": 2}, "session", "user", user_group="group") as run:
        run.set_tag("tenant", "acme")
        run.set_metadata("k", [1])
        run.record_step("one", {"x": 1})
        run.record_step("two")
        run.record_llm_call(model="m", tokens_in=1, tokens_out=2, cost=0.5, provider="openai")
        updates, steps, calls = journal.of(RunUpdated), journal.of(Step), journal.of(LLMCall)
        run.set_result({"answer": 42})
    assert [(u.tags, u.metadata) for u in updates] == [({"tenant": "acme"}, {}), ({}, {"k": [1]})]
    assert [(s.name, s.output, s.position) for s in steps] == [("one", {"x": 1}, 1), ("two", None, 2)]
    assert (calls[0].tokens_in, calls[0].tokens_out, calls[0].cost_usd) == (1, 2, 0.5)
    (start,) = journal.of(RunStarted)
    assert (start.workflow_name, start.inputs, start.metadata) == ("flow", {"q": 1}, {"m": 2})
    assert (start.session_id, start.user_id, start.user_group) == ("session", "user", "group")
    (end,) = journal.of(RunEnded)
    assert end.result == {"answer": 42}
    assert end.duration_ms >= 0


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ValueError("no"), "error"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(3), "interrupted"),
        (asyncio.CancelledError(), "interrupted"),
        (GeneratorExit(), "interrupted"),
    ],
)
def test_an_exception_ends_the_run_and_passes_untouched(
    journal: Journal, error: BaseException, state: str
) -> None:
    """The very same exception comes out; the run has ended with its type."""
    with pytest.raises(type(error)) as caught, WaxellContext("a"):
        raise error
    assert caught.value is error
    (end,) = journal.of(RunEnded)
    assert (end.state, end.error_type.rsplit(".")[-1]) == (state, type(error).__name__)


def test_a_run_ends_once(journal: Journal) -> None:
    """Only the first end is written."""
    run = WaxellContext("a")
    run.start()
    run.end("retry")
    run.end("success")
    journal.collector.close_open_runs()
    assert journal.states() == ["retry"]


def test_what_is_left_open_is_closed_as_interrupted(journal: Journal) -> None:
    """A process that goes in an orderly way ends the runs that it left open."""
    WaxellContext("a").start()
    journal.collector.close_open_runs()
    assert journal.states() == ["interrupted"]
    assert journal.collector.open_runs == {}


def test_a_thread_starts_outside_any_run(journal: Journal) -> None:
    """A new thread belongs to no run unless it was given a copy of the context."""
    with WaxellContext("a"):
        threads = [
            threading.Thread(target=call, args=("bare",)),
            threading.Thread(target=contextvars.copy_context().run, args=(call, "copied")),
        ]
        for thread in threads:
            thread.start()
            thread.join()
    assert journal.calls() == {"bare": "", "copied": "a"}


def test_asyncio_tasks_keep_to_their_runs(journal: Journal) -> None:
    """Tasks inherit the run in which they were made, and their own runs do not leak to their siblings."""

    async def job(name: str) -> None:
        async with WaxellContext(name):
            await asyncio.sleep(0)
            call(f"in {name}")
            await asyncio.sleep(0)

    async def main() -> None:
        async with WaxellContext("main"):
            await asyncio.gather(*(job(f"job {n}") for n in range(5)))
            call("after")

    asyncio.run(main())
    assert journal.calls() == {f"in job {n}": f"job {n}" for n in range(5)} | {"after": "main"}
    assert journal.states() == ["success"] * 6


def test_a_sync_block_in_a_coroutine(journal: Journal) -> None:
    """`with` across an await is the same run, and other tasks do not see it."""

    async def holder(entered: asyncio.Event, leave: asyncio.Event) -> None:
        with WaxellContext("held"):
            entered.set()
            await leave.wait()
            call("inside")

    async def main() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(holder(entered, leave))
        await entered.wait()
        call("outside")
        leave.set()
        await task

    asyncio.run(main())
    assert journal.calls() == {"inside": "held", "outside": ""}


def test_a_cancelled_task_is_interrupted(journal: Journal) -> None:
    """Cancellation ends the run as interrupted and arrives at whoever cancelled."""

    async def main() -> None:
        async def wait() -> None:
            async with WaxellContext("a"):
                await asyncio.sleep(60)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert journal.states() == ["interrupted"]


def test_a_forked_child_does_not_end_its_parent_s_run(journal: Journal) -> None:
    """A child inside the block records into the run, and its way out of the block ends nothing."""
    with WaxellContext("a"):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                call("child")
                run = get_context()
                assert run is not None
                run.end("error")
                journal.collector.close_open_runs()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
    assert journal.calls() == {"child": "a"}
    assert journal.states() == ["success"]


def test_unconfigured_contexts_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a destination the same code runs, with ids and lineage, and nothing is written."""
    collector = collecting.Collector(Settings())
    monkeypatch.setattr(collecting, "_collector", collector)
    with WaxellContext("a") as outer, WaxellContext("b") as inner:
        inner.set_tag("k", "v")
        assert inner.parent_run_id == outer.run_id
    assert collector.journal.dropped == {"unconfigured": 5}
    assert collector.open_runs == {}


# --- @observe ---------------------------------------------------------------------------------------


def test_a_function_is_a_run_and_stays_what_it_was(journal: Journal) -> None:
    """Name, signature, documentation and result are the function's own."""

    @observe
    def work(a: int, *, b: int = 2) -> int:
        """Work."""
        call("inside")
        return a + b

    @observe(agent_name="named", workflow_name="flow")
    async def later() -> str:
        call("later")
        return "done"

    assert (work.__name__, work.__doc__, work(1, b=5)) == ("work", "Work.", 6)
    assert list(inspect.signature(work).parameters) == ["a", "b"]
    assert inspect.iscoroutinefunction(later)
    assert asyncio.run(later()) == "done"
    assert journal.calls()["later"] == "named"
    assert journal.calls()["inside"].endswith("work")
    assert journal.of(RunStarted)[1].workflow_name == "flow"
    assert journal.of(RunStarted)[0].inputs == {}


@observe(agent_name="gen")
def numbers(log: list[str]) -> Iterator[Any]:
    try:
        call("first")
        got = yield 1
        log.append(f"got {got}")
        call("second")
        try:
            yield 2
        except KeyError as error:
            log.append(f"caught {error!r}")
        yield 3
    finally:
        log.append("closed")
    return "value"


def test_a_generator_s_run_is_current_only_inside(journal: Journal) -> None:
    """send, throw and the return value pass through; between the items the consumer is outside the run."""
    log: list[str] = []
    assert inspect.isgeneratorfunction(numbers)
    generator = numbers(log)
    assert journal.records() == []
    assert next(generator) == 1  # type: ignore[call-overload]
    assert get_context() is None
    call("between")
    assert generator.send("hello") == 2  # type: ignore[attr-defined]
    assert generator.throw(KeyError("k")) == 3  # type: ignore[attr-defined]
    assert journal.states() == []
    with pytest.raises(StopIteration) as stop:
        next(generator)  # type: ignore[call-overload]
    assert stop.value.value == "value"
    assert log == ["got hello", "caught KeyError('k')", "closed"]
    assert journal.calls() == {"first": "gen", "between": "", "second": "gen"}
    assert journal.states() == ["success"]


def test_a_generator_that_is_left_early_has_ended_well(journal: Journal) -> None:
    """A consumer that breaks off closes the generator and the run; so does one that only lets go."""
    log: list[str] = []
    for _ in numbers(log):
        break
    await_(lambda: journal.states() == ["success"], "end", 5)
    assert log == ["closed"]


def test_a_generator_that_fails_or_lets_an_error_through_is_an_error(journal: Journal) -> None:
    """An exception thrown in and not caught comes out again and ends the run."""
    generator = numbers([])
    next(generator)  # type: ignore[call-overload]
    error = RuntimeError("x")
    with pytest.raises(RuntimeError) as caught:
        generator.throw(error)  # type: ignore[attr-defined]
    assert caught.value is error
    assert journal.states() == ["error"]


def test_two_generators_in_turn_do_not_mix(journal: Journal) -> None:
    """Interleaved generators each have their own run, inside the consumer's."""
    with WaxellContext("consumer"):
        for _ in zip(numbers([]), numbers([]), strict=False):
            call("in the loop")
    assert journal.calls()["in the loop"] == "consumer"
    starts = journal.of(RunStarted)
    assert [s.parent_run_id for s in starts] == ["", starts[0].run_id, starts[0].run_id]


@observe(agent_name="agen")
async def letters(log: list[str]) -> AsyncIterator[Any]:
    try:
        call("a")
        await asyncio.sleep(0)
        call("a2")
        got = yield "a"
        log.append(f"got {got}")
        try:
            yield "b"
        except KeyError:
            log.append("caught")
        yield "c"
    finally:
        log.append("closed")


def test_an_async_generator_likewise(journal: Journal) -> None:
    """asend, athrow and aclose pass through; between the items the consumer is outside the run."""
    log: list[str] = []

    async def main() -> None:
        generator: Any = letters(log)
        assert await generator.asend(None) == "a"
        assert get_context() is None
        call("between")
        assert await generator.asend("x") == "b"
        assert await generator.athrow(KeyError()) == "c"
        with pytest.raises(StopAsyncIteration):
            await generator.asend(None)
        generator = letters(log)
        async for _ in generator:
            break
        await generator.aclose()

    asyncio.run(main())
    assert inspect.isasyncgenfunction(letters)
    assert log == ["got x", "caught", "closed", "closed"]
    assert journal.calls() == {"a": "agen", "a2": "agen", "between": ""}
    assert journal.states() == ["success", "success"]


def test_what_a_generator_does_while_it_is_closed_belongs_to_it(journal: Journal) -> None:
    """A call in a `finally` is the generator's, also if the consumer stops early."""

    @observe(agent_name="gen")
    def careful() -> Iterator[int]:
        try:
            yield 1
        finally:
            call("last")

    generator = careful()
    next(generator)
    generator.close()  # type: ignore[attr-defined]
    assert journal.calls() == {"last": "gen"}


def test_a_partial_can_be_observed(journal: Journal) -> None:
    """Any callable will do."""
    assert observe(functools.partial(int, "7"))() == 7


def test_an_excluded_name_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`exclude` is about task and agent names."""
    journal = configure(monkeypatch, tmp_path, exclude=("noisy.*",))
    with WaxellContext("noisy.agent"):
        pass
    assert journal.records() == []


# --- content ----------------------------------------------------------------------------------------


def test_an_error_is_its_type_and_a_bounded_message(journal: Journal) -> None:
    """Without capture_content: no source lines, at most 200 characters, and no code of the user's is run."""

    class Loud(Exception):
        def __str__(self) -> str:
            raise AssertionError("nobody may ask")

    with pytest.raises(Loud), WaxellContext("a"):
        raise Loud("secret in the source " + "x" * 1000, object())
    (end,) = journal.of(RunEnded)
    assert len(end.error_message) == 200
    assert "object at" not in end.error_message
    assert "raise Loud" not in end.traceback
    assert end.traceback.count("File ") == 1
    assert "test_core_runs.py" in end.traceback


def test_with_capture_content_the_source_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it, the message is whole and the traceback has its lines, through `redact`."""
    journal = configure(
        monkeypatch,
        tmp_path,
        capture_content=True,
        redact=redact_texts(lambda text: text.replace("hunter2", "***")),
    )
    with pytest.raises(ValueError, match="hunter2"), WaxellContext("a"):
        raise ValueError("hunter2" + "x" * 1000)
    (end,) = journal.of(RunEnded)
    assert len(end.error_message) == 1003
    assert "raise ValueError" in end.traceback
    assert "hunter2" not in f"{end}"


def test_redact_is_applied_to_what_is_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, steps, results, prompts and responses, at any depth, before anything is written."""
    journal = configure(
        monkeypatch, tmp_path, redact=redact_texts(lambda text: text.replace("hunter2", "***"))
    )
    with WaxellContext("a", inputs={"deep": [{"er": ("hunter2",)}]}) as run:
        run.record_step("s", {"k": "hunter2"})
        run.record_llm_call(model="m", prompt_preview="hunter2", response_preview="hunter2")
        run.set_result(["hunter2"])
    assert len(journal.records()) == 4
    assert b"hunter2" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*.ndjson"))


def test_redact_is_applied_to_a_call_s_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider's error message may quote the prompt."""
    journal = configure(
        monkeypatch, tmp_path, redact=redact_texts(lambda text: text.replace("hunter2", "***"))
    )
    waxell_workers.record_llm_call(model="m", status="error", error_message="hunter2")
    assert journal.of(LLMCall)[0].error_message == "***"


@dataclasses.dataclass
class Answer:
    text: str


@pytest.mark.parametrize(
    "value", [Answer("hunter2"), {"hunter2"}, {"hunter2": 1}], ids=["dataclass", "set", "key"]
)
def test_redact_sees_all_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object
) -> None:
    """Whatever the encoder can write, the redactor has seen."""
    journal = configure(
        monkeypatch, tmp_path, redact=redact_texts(lambda text: text.replace("hunter2", "***"))
    )
    with WaxellContext("a") as run:
        run.set_result(value)
    assert len(journal.records()) == 2
    assert b"hunter2" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*.ndjson"))


def test_redact_is_applied_to_tags_and_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`redact` is for all content."""
    configure(monkeypatch, tmp_path, redact=redact_texts(lambda text: text.replace("hunter2", "***")))
    with WaxellContext("a", metadata={"m": "hunter2"}) as run:
        run.set_tag("t", "hunter2")
        run.set_metadata("m", "hunter2")
    assert b"hunter2" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*.ndjson"))


def test_a_secret_across_the_cut_is_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message is redacted whole and cut afterwards: half a key is still half a key."""
    journal = configure(
        monkeypatch, tmp_path, redact=redact_texts(lambda text: text.replace("hunter2hunter2", "***"))
    )
    with pytest.raises(ValueError, match="hunter2"), WaxellContext("a"):
        raise ValueError("x" * 190 + "hunter2hunter2")
    assert "hunter2" not in journal.of(RunEnded)[0].error_message


def test_a_redactor_that_fails_costs_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task goes on; the text is replaced, never written as it was."""

    def broken(text: str) -> str:
        raise LookupError(text)

    journal = configure(monkeypatch, tmp_path, redact=redact_texts(broken))
    with WaxellContext("a", inputs={"q": "hunter2"}):
        pass
    assert journal.of(RunStarted)[0].inputs == {"[redaction failed]": "[redaction failed]"}


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "SoftTimeLimitExceeded"])
def test_an_interrupt_in_the_redactor_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A framework's way to stop a task works while the user's redactor runs."""
    from billiard.exceptions import SoftTimeLimitExceeded

    interrupt = KeyboardInterrupt if kind == "KeyboardInterrupt" else SoftTimeLimitExceeded

    def slow(text: str) -> str:
        raise interrupt()

    configure(monkeypatch, tmp_path, redact=redact_texts(slow))
    with pytest.raises(interrupt), WaxellContext("a") as run:
        run.record_step("s", "text")


def test_an_interrupt_in_the_end_passes_and_leaves_no_open_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given an interrupt while a run's end is being made, it goes on, and the run has its one end."""
    hits = iter([True])

    def slow(text: str) -> str:
        if next(hits, False):
            raise KeyboardInterrupt
        return text

    journal = configure(monkeypatch, tmp_path, redact=redact_texts(slow))
    with pytest.raises(KeyboardInterrupt), WaxellContext("a") as run:
        run.set_result("text")
    journal.collector.close_open_runs()
    assert journal.states() == ["success"]


def test_a_cycle_and_a_redactor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is handed over, nothing is raised into the task."""
    configure(monkeypatch, tmp_path, redact=redact_texts(str.upper))
    cycle: list[Any] = ["x"]
    cycle.append(cycle)
    with WaxellContext("a") as run:
        run.record_step("s", cycle)


class Rude(str):
    __slots__ = ()

    def __str__(self) -> str:
        raise RuntimeError("rude")


@pytest.mark.parametrize("argument", [10**5000, Rude("x")], ids=["huge", "rude"])
def test_an_error_s_arguments_cannot_hide_the_error(journal: Journal, argument: object) -> None:
    """What the task raised is what comes out, whatever its arguments do."""
    error = ValueError(argument)
    with pytest.raises(ValueError) as caught, WaxellContext("a"):  # noqa: PT011
        raise error
    assert caught.value is error
