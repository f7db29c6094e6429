"""Which run is current, where code does not go from top to bottom: tasks, threads, generators.

What a plain context or `@observe` does is in `test_core_runs.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import waxell_workers
from waxell_workers import WaxellContext, get_context, observe
from waxell_workers.core import collector as collecting
from waxell_workers.core.config import Settings
from waxell_workers.core.reader import Reader
from waxell_workers.core.records import LLMCall, RunEnded, RunStarted

needs_task_groups = pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.TaskGroup is of 3.11")


class Journal:
    """What has been recorded, read from the disk."""

    def __init__(self, collector: collecting.Collector) -> None:
        self._collector = collector

    def _of(self, kind: type[Any]) -> list[Any]:
        if not self._collector.journal.directory:
            return []
        reader = Reader(self._collector.journal.directory, None, 0)
        try:
            return [entry.record for entry in reader.read() if isinstance(entry.record, kind)]
        finally:
            reader.close()

    def calls(self) -> list[tuple[str, str]]:
        """Return each call as its model and the name of its run, in the order in which they were made."""
        names = {run.run_id: run.agent_name for run in self._of(RunStarted)} | {"": ""}
        return [(call.model, names[call.run_id]) for call in self._of(LLMCall)]

    def ends(self) -> dict[str, str]:
        """Return the state in which each run ended; a run that ended twice is a failure."""
        names = {run.run_id: run.agent_name for run in self._of(RunStarted)}
        ends = [(names[end.run_id], end.state) for end in self._of(RunEnded)]
        assert len(dict(ends)) == len(ends)
        return dict(ends)

    def error_of(self, name: str) -> str:
        """Return the type of the error with which a run ended."""
        (run,) = [run for run in self._of(RunStarted) if run.agent_name == name]
        (end,) = [end for end in self._of(RunEnded) if end.run_id == run.run_id]
        return str(end.error_type)

    def parents(self) -> dict[str, str]:
        """Return the name of each run's parent."""
        names = {run.run_id: run.agent_name for run in self._of(RunStarted)} | {"": ""}
        return {run.agent_name: names[run.parent_run_id] for run in self._of(RunStarted)}


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    settings = Settings(api_url="http://127.0.0.1:9", spool_dir=str(tmp_path), shipper="external")
    collector = collecting.Collector(settings)
    monkeypatch.setattr(collecting, "_collector", collector)
    yield Journal(collector)
    assert get_context() is None
    assert collector.open_runs == {}


def call(model: str) -> None:
    waxell_workers.record_llm_call(model=model)


def in_turn(*turns: tuple[asyncio.Event | None, Callable[[], Any], asyncio.Event | None]) -> Awaitable[None]:
    """Do things one after another inside one task, each after an event, each followed by one."""

    async def go() -> None:
        for before, do, after in turns:
            if before is not None:
                await before.wait()
            do()
            if after is not None:
                after.set()

    return go()


# --- more than one task ------------------------------------------------------------------------------


def test_a_sync_block_in_a_coroutine_records_each_call_once(journal: Journal) -> None:
    """Given `with`, not `async with`, around awaits, then each call is there once and in the run."""

    async def main() -> None:
        with WaxellContext("block"):
            call("before")
            await asyncio.sleep(0)
            call("after")
        call("outside")

    asyncio.run(main())
    assert journal.calls() == [("before", "block"), ("after", "block"), ("outside", "")]
    assert journal.ends() == {"block": "success"}


def test_concurrent_tasks_each_have_their_own(journal: Journal) -> None:
    """Given many tasks whose runs overlap in every order, then no call is in another's run."""

    async def job(number: int) -> None:
        for turn in range(3):
            with WaxellContext(f"{number}.{turn}"):
                for step in range((number + turn) % 4):
                    await asyncio.sleep(0)
                    call(f"{number}.{turn}.{step}")
            await asyncio.sleep(0)
            assert get_context() is None

    async def main() -> None:
        await asyncio.gather(*(job(number) for number in range(20)))

    asyncio.run(main())
    calls = journal.calls()
    assert len(calls) == sum((n + t) % 4 for n in range(20) for t in range(3))
    assert all(model.rpartition(".")[0] == name for model, name in calls)
    assert set(journal.ends().values()) == {"success"}


def test_entered_in_one_task_and_exited_in_another(journal: Journal) -> None:
    """Given a run that another task ends, then it ends once, and the other task's own run stays current."""

    async def main() -> None:
        moved = WaxellContext("moved")
        entered, left = asyncio.Event(), asyncio.Event()

        async def first() -> None:
            moved.__enter__()
            call("in the first")
            entered.set()
            await left.wait()

        async def second() -> None:
            with WaxellContext("second's own"):
                await entered.wait()
                call("second, before")
                moved.__exit__(None, None, None)
                call("second, after")
            assert get_context() is None
            left.set()

        await asyncio.gather(first(), second())

    asyncio.run(main())
    assert journal.calls() == [
        ("in the first", "moved"),
        ("second, before", "second's own"),
        ("second, after", "second's own"),
    ]
    assert journal.ends() == {"moved": "success", "second's own": "success"}


def test_after_a_run_that_was_ended_elsewhere_the_task_finds_its_way_back(journal: Journal) -> None:
    """Given a run that another task has ended, when a later run here is left, then neither is current."""

    async def main() -> None:
        async def end(run: WaxellContext) -> None:
            run.__exit__(None, None, None)

        run = WaxellContext("ended elsewhere").__enter__()
        await asyncio.create_task(end(run))
        with WaxellContext("later"):
            call("in the later one")
        assert get_context() is None
        call("outside")

    asyncio.run(main())
    assert journal.calls() == [("in the later one", "later"), ("outside", "")]


def test_blocks_that_are_left_out_of_order(journal: Journal) -> None:
    """Given two runs of which the outer one is left first, then the inner one is current until it is."""
    outer, inner = WaxellContext("outer"), WaxellContext("inner")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    call("in the inner one")
    inner.__exit__(None, None, None)
    call("outside")
    assert journal.calls() == [("in the inner one", "inner"), ("outside", "")]
    assert journal.ends() == {"outer": "success", "inner": "success"}


def test_a_task_that_outlives_the_run_in_which_it_was_made_stays_its_child(journal: Journal) -> None:
    """Given fire-and-forget, then the task's calls belong to the run that started it, ended or not."""

    async def main() -> None:
        go = asyncio.Event()

        async def later() -> None:
            await go.wait()
            call("late")

        with WaxellContext("starter"):
            task = asyncio.create_task(later())
        go.set()
        await task
        call("outside")

    asyncio.run(main())
    assert journal.calls() == [("late", "starter"), ("outside", "")]


@needs_task_groups
def test_a_task_group_whose_task_fails(journal: Journal) -> None:
    """Given a failing task, then it is an error, its sibling is interrupted, and so is nobody else."""

    async def fail() -> None:
        async with WaxellContext("failing"):
            await asyncio.sleep(0)
            raise ValueError("no")

    async def wait() -> None:
        async with WaxellContext("sibling"):
            await asyncio.sleep(3600)

    async def main() -> None:
        async with WaxellContext("parent"), asyncio.TaskGroup() as group:
            group.create_task(wait())
            group.create_task(fail())

    with pytest.raises(BaseException) as caught:  # noqa: PT011  an ExceptionGroup: no such name on 3.10
        asyncio.run(main())
    assert [type(error) for error in caught.value.exceptions] == [ValueError]  # type: ignore[attr-defined]
    assert journal.ends() == {"failing": "error", "sibling": "interrupted", "parent": "error"}
    assert journal.error_of("parent") == "ExceptionGroup"
    assert journal.parents() == {"parent": "", "failing": "parent", "sibling": "parent"}


@pytest.mark.parametrize("inside", [True, False], ids=["inside the timeout", "around the timeout"])
def test_a_timeout(journal: Journal, inside: bool) -> None:
    """Given a timeout around the run it is interrupted; given one inside, it has failed with TimeoutError."""

    async def work() -> None:
        async with WaxellContext("work"):
            if inside:
                await asyncio.sleep(3600)
            else:
                await asyncio.wait_for(asyncio.sleep(3600), 0.01)

    async def main() -> None:
        await asyncio.wait_for(work(), 0.01 if inside else 60)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(main())
    assert journal.ends() == {"work": "interrupted" if inside else "error"}
    assert journal.error_of("work").rpartition(".")[2] == ("CancelledError" if inside else "TimeoutError")


def test_a_cancellation_that_is_caught_inside_is_no_end(journal: Journal) -> None:
    """Given a body that survives a cancellation, then the run goes on, and ends as it ends."""

    async def stubborn() -> None:
        async with WaxellContext("stubborn"):
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                call("after the cancellation")

    async def main() -> None:
        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        task.cancel()
        await task

    asyncio.run(main())
    assert journal.calls() == [("after the cancellation", "stubborn")]
    assert journal.ends() == {"stubborn": "success"}


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_loop_ends_the_runs(journal: Journal, kind: type[BaseException]) -> None:
    """Given Ctrl-C or sys.exit in a coroutine, then it comes out of the loop, and every run has ended."""

    async def wait() -> None:
        async with WaxellContext("other task"):
            await asyncio.sleep(3600)

    @observe(agent_name="body")
    async def body() -> None:
        await asyncio.sleep(0)
        raise kind

    async def main() -> None:
        other = asyncio.create_task(wait())
        await asyncio.sleep(0)
        await body()
        await other

    with pytest.raises(kind):
        asyncio.run(main())
    assert journal.ends() == {"body": "interrupted", "other task": "interrupted"}


def test_an_async_exit_stack_and_an_async_context_manager(journal: Journal) -> None:
    """Given a run inside a user's own context manager, then it is current in the block and not after."""

    @contextlib.asynccontextmanager
    async def agent(name: str) -> AsyncIterator[WaxellContext]:
        async with WaxellContext(name) as run:
            yield run

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for name in ("one", "two"):
                await stack.enter_async_context(agent(name))
            call("inside")
        call("outside")

    asyncio.run(main())
    assert journal.calls() == [("inside", "two"), ("outside", "")]
    assert journal.ends() == {"one": "success", "two": "success"}


# --- threads -----------------------------------------------------------------------------------------


def test_threads_of_a_pool_start_outside_and_copies_inside(journal: Journal) -> None:
    """Given a run, then a pool's threads are outside it, `to_thread` and a copied context inside."""

    async def in_a_loop() -> None:
        await asyncio.to_thread(call, "to_thread")
        await asyncio.get_running_loop().run_in_executor(None, call, "run_in_executor")

    with ThreadPoolExecutor(1) as pool, WaxellContext("run"):
        pool.submit(call, "bare").result()
        pool.submit(contextvars.copy_context().run, call, "copied").result()
        asyncio.run(in_a_loop())
    assert dict(journal.calls()) == {"bare": "", "copied": "run", "to_thread": "run", "run_in_executor": ""}


def test_runs_of_threads_that_overlap(journal: Journal) -> None:
    """Given threads that are inside their runs at the same time, then each has its own."""
    together = threading.Barrier(8)

    def work(name: str) -> None:
        with WaxellContext(name):
            together.wait(60)
            call(f"in {name}")
            together.wait(60)

    threads = [threading.Thread(target=work, args=(f"thread {number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(journal.calls()) == [(f"in thread {n}", f"thread {n}") for n in range(8)]


def test_a_run_that_another_thread_ends(journal: Journal) -> None:
    """Given a run that is handed to another thread, then it ends there, and that thread is in no run."""
    run = WaxellContext("handed over").__enter__()
    seen: list[object] = []

    def finish() -> None:
        run.record_llm_call(model="by the other thread")
        run.__exit__(None, None, None)
        seen.append(get_context())

    thread = threading.Thread(target=finish)
    thread.start()
    thread.join()
    run.leave()
    assert seen == [None]
    assert journal.calls() == [("by the other thread", "handed over")]
    assert journal.ends() == {"handed over": "success"}


# --- generators --------------------------------------------------------------------------------------


def test_a_run_that_is_open_across_a_yield_stays_inside_the_generator(journal: Journal) -> None:
    """Given an observed generator with a run of its own around a yield, then the consumer is outside both."""

    @observe(agent_name="generator")
    def items() -> Iterator[int]:
        with WaxellContext("inner"):
            call("first")
            yield 1
            call("second")
        call("third")
        yield 2

    for item in items():
        call(f"consumer {item}")
        assert get_context() is None
    assert journal.calls() == [
        ("first", "inner"),
        ("consumer 1", ""),
        ("second", "inner"),
        ("third", "generator"),
        ("consumer 2", ""),
    ]
    assert journal.parents() == {"generator": "", "inner": "generator"}


def test_the_same_for_an_async_generator(journal: Journal) -> None:
    """Given awaits, and other tasks between them, then all the same."""

    @observe(agent_name="generator")
    async def items() -> AsyncIterator[int]:
        async with WaxellContext("inner"):
            await asyncio.sleep(0)
            call("first")
            yield 1
            await asyncio.sleep(0)
            call("second")
        call("third")
        yield 2

    async def main() -> None:
        async with WaxellContext("consumer"):
            async for item in items():
                call(f"consumer {item}")

    async def other() -> None:
        for _ in range(10):
            assert get_context() is None
            await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(main(), other())

    asyncio.run(both())
    assert journal.calls() == [
        ("first", "inner"),
        ("consumer 1", "consumer"),
        ("second", "inner"),
        ("third", "generator"),
        ("consumer 2", "consumer"),
    ]
    assert journal.parents() == {"consumer": "", "generator": "consumer", "inner": "generator"}


def test_each_item_in_a_task_of_its_own(journal: Journal) -> None:
    """Given a consumer that waits for each item in a new task, then the generator's run is whole."""

    @observe(agent_name="generator")
    async def items() -> AsyncIterator[int]:
        for number in range(3):
            call(f"item {number}")
            yield number

    async def main() -> None:
        generator = items()
        for number in range(3):
            assert await asyncio.create_task(generator.__anext__()) == number  # type: ignore[arg-type]
            call(f"consumer {number}")
        with pytest.raises(StopAsyncIteration):
            await asyncio.create_task(generator.__anext__())  # type: ignore[arg-type]

    asyncio.run(main())
    assert journal.calls() == [
        pair for n in range(3) for pair in ((f"item {n}", "generator"), (f"consumer {n}", ""))
    ]
    assert journal.ends() == {"generator": "success"}


def test_an_async_generator_whose_item_is_cancelled(journal: Journal) -> None:
    """Given a timeout on one item, then the generator gets the cancellation, and its run is interrupted."""
    log: list[str] = []

    @observe(agent_name="generator")
    async def items() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.sleep(3600)
        finally:
            call("in the finally")
            log.append("closed")

    async def main() -> None:
        generator = items()
        assert await generator.__anext__() == 1
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(generator.__anext__(), 0.01)
        assert get_context() is None

    asyncio.run(main())
    assert log == ["closed"]
    assert journal.calls() == [("in the finally", "generator")]
    assert journal.ends() == {"generator": "interrupted"}


def test_generators_that_are_left_and_forgotten(journal: Journal) -> None:
    """Given generators that nobody closes, then their runs end when Python finalizes them."""

    @observe(agent_name="sync")
    def numbers() -> Iterator[int]:
        yield 1
        yield 2

    @observe(agent_name="async")
    async def letters() -> AsyncIterator[str]:
        yield "a"
        yield "b"

    async def main() -> None:
        async for _ in letters():
            break
        for _ in range(5):  # the loop closes it in a task
            await asyncio.sleep(0)

    for _ in numbers():
        break
    asyncio.run(main())
    gc.collect()
    assert journal.ends() == {"sync": "success", "async": "success"}


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
def test_what_is_thrown_in_and_not_caught_comes_out(journal: Journal, kind: type[BaseException]) -> None:
    """Given an exception thrown into a generator, then it is the one that comes out, and the run's end."""

    @observe(agent_name="generator")
    def items() -> Iterator[int]:
        yield 1

    generator: Any = items()
    next(generator)
    error = kind("x")
    with pytest.raises(kind) as caught:
        generator.throw(error)
    assert caught.value is error
    expected = {ValueError: "error", GeneratorExit: "success"}
    assert journal.ends() == {"generator": expected.get(kind, "interrupted")}
    with pytest.raises(StopIteration):
        next(generator)


def test_a_generator_that_ignores_its_end(journal: Journal) -> None:
    """Given a body that yields after close(), then Python's own RuntimeError comes out: an error."""

    @observe(agent_name="generator")
    def items() -> Iterator[int]:
        try:
            yield 1
        except GeneratorExit:
            yield 2

    generator: Any = items()
    next(generator)
    with pytest.raises(RuntimeError, match="generator ignored GeneratorExit"):
        generator.close()
    assert journal.ends() == {"generator": "error"}
    del generator
    gc.collect()


def test_a_generator_inside_another(journal: Journal) -> None:
    """Given `yield from`, then values go in and out through both, and each call is in the innermost run."""

    @observe(agent_name="inner")
    def inner() -> Iterator[Any]:
        got = yield "from the inner one"
        call(f"inner got {got}")
        return "result"

    @observe(agent_name="outer")
    def outer() -> Iterator[Any]:
        result = yield from inner()  # type: ignore[misc]
        call(f"outer got {result}")
        yield result

    generator: Any = outer()
    assert next(generator) == "from the inner one"
    assert generator.send("word") == "result"
    assert list(generator) == []
    assert journal.calls() == [("inner got word", "inner"), ("outer got result", "outer")]
    assert journal.parents() == {"outer": "", "inner": "outer"}


# --- observed callables ------------------------------------------------------------------------------


class Agent:
    """Its methods are observed, each in its own way."""

    @observe(agent_name="method")
    def method(self, word: str) -> str:
        call("method")
        return word

    @classmethod
    @observe(agent_name="of the class")
    def of_the_class(cls) -> str:
        call("class")
        return cls.__name__

    @staticmethod
    @observe(agent_name="static")
    def static() -> None:
        call("static")

    @observe(agent_name="async method")
    async def async_method(self) -> None:
        call("async")


def test_methods_of_every_kind(journal: Journal) -> None:
    """Given methods, class methods, static and asynchronous ones, then each is called as it is without us."""
    agent = Agent()
    assert agent.method("word") == "word"
    assert Agent.of_the_class() == "Agent"
    agent.static()
    asyncio.run(agent.async_method())
    assert journal.calls() == [
        ("method", "method"),
        ("class", "of the class"),
        ("static", "static"),
        ("async", "async method"),
    ]


def test_recursion_nests(journal: Journal) -> None:
    """Given a function that calls itself, then each level is a run below the one before."""

    @observe(agent_name="level")
    def go(depth: int) -> list[str]:
        run = get_context()
        assert run is not None
        call(str(depth))
        return [*(go(depth - 1) if depth else []), run.parent_run_id or ""]

    parents = go(3)
    assert len(set(parents)) == 4
    assert parents[-1] == ""
    assert journal.calls() == [(str(depth), "level") for depth in (3, 2, 1, 0)]


def test_an_exception_in_one_of_nested_runs(journal: Journal) -> None:
    """Given an error that the outer run catches, then only the inner one has failed, and calls go on."""
    with WaxellContext("outer"):
        with pytest.raises(ValueError, match="no"), WaxellContext("inner"):
            raise ValueError("no")
        call("after")
    assert journal.calls() == [("after", "outer")]
    assert journal.ends() == {"inner": "error", "outer": "success"}
