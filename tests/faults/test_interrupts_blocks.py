"""Interrupts in what a user's code calls: blocks, `@observe`, and the recording functions.

Each test lets a framework's own exception surface at every instruction of ours, one after the other. Whatever
the instruction: the exception comes out in the code of the user's that called us, no run stays current or
open, no lock is held, and nothing that was recorded is lost or torn.
"""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import waxell_workers
from tests.faults.interrupting import (
    KINDS,
    Interrupt,
    Kind,
    armed,
    left_behind,
    locked,
    open_runs,
    records,
    sweep,
)
from tests.torture import LONG, effort, found
from waxell_workers import WaxellContext, get_context, observe, redact_texts
from waxell_workers.core.records import LLMCall
from waxell_workers.core.values import Redactor
from waxell_workers.testing import record_runs

pytestmark = [
    pytest.mark.timeout(effort(400, 1800)),
    # a coroutine that was hit before its first instruction
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited"),
]

ALL_KINDS = tuple(KINDS) if LONG else ("celery", "dramatiq")


@pytest.fixture(params=ALL_KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    with armed(KINDS[request.param]) as kind:
        yield kind


# -- what a user's code does -------------------------------------------------------------------

_noted: list[str] = []
"""The calls of which the user was told that they are recorded, by their model."""


def call(record: Callable[..., None] = waxell_workers.record_llm_call) -> None:
    model = f"model-{len(_noted)}"
    record(model=model, prompt_preview="Is it raining?")
    _noted.append(model)


def block() -> None:
    with WaxellContext("block", inputs={"question": "Is it raining?"}) as run:
        call(run.record_llm_call)
        run.record_step("step", {"number": 1})
        run.set_tag("tag", "value")
        run.set_metadata("key", {"number": 1})
        run.set_result({"answer": "yes"})
    call()


def nested_blocks() -> None:
    with WaxellContext("outer"), WaxellContext("inner"):
        call()


def block_that_fails() -> None:
    try:
        with WaxellContext("block"):
            raise LookupError("nobody knows")
    except LookupError:
        pass


async def async_block() -> None:
    async with WaxellContext("block"):
        call()


@observe
def function() -> None:
    call()


@observe
async def coroutine() -> None:
    call()


@observe
def generator() -> Iterator[int]:
    call()
    sent = yield 1
    assert sent is None
    yield 2


@observe
async def async_generator() -> AsyncIterator[int]:
    call()
    yield 1
    call()
    yield 2


def consume() -> None:
    for _ in generator():
        assert get_context() is None, "the body's run is current for its consumer"


def leave_early() -> None:
    items = generator()
    next(items)
    items.close()


async def consume_async() -> None:
    async for _ in async_generator():
        assert get_context() is None, "the body's run is current for its consumer"


def run(coroutine: Any) -> None:
    """Run what never waits to its end, without a loop that has exception handlers of its own."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


WORK: dict[str, Callable[[], None]] = {
    "block": block,
    "nested blocks": nested_blocks,
    "block that fails": block_that_fails,
    "async block": lambda: run(async_block()),
    "function": function,
    "coroutine": lambda: run(coroutine()),
    "generator": consume,
    "generator left early": leave_early,
    "async generator": lambda: run(consume_async()),
}


# -- claims ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", WORK)
@pytest.mark.parametrize("redact", [None, redact_texts(str.upper)], ids=["", "redacted"])
def test_an_interrupt_anywhere_ends_what_it_hits(what: str, redact: Redactor | None, kind: Kind) -> None:
    """Given any piece of work, when an interrupt surfaces at any instruction of ours, then it reaches the
    user's code, and no run is open or current there."""
    _noted.clear()
    work, struck = WORK[what], 0

    def interrupted(interrupt: Interrupt) -> None:
        try:
            with interrupt:
                work()
            assert not interrupt.where, f"the interrupt at {interrupt.where} is lost"
        except kind.exception:
            assert get_context() is None, f"hit at {interrupt.where}, a run is current in the user's handler"
            assert open_runs() == [], f"hit at {interrupt.where}, a run is open in the user's handler"

    with record_runs(redact=redact) as runs:
        work()
        for interrupt in sweep(kind.strike, interrupted, step=effort(3 if redact is None else 5, 1)):
            struck += 1
            assert struck % 100 or locked() == [], interrupt.where
        gc.collect()
        assert locked() == []
        work()
        assert left_behind() == []
        assert {run.parent_run_id for run in runs} - {run.run_id for run in runs} == {""}
        recorded = [record.model for record in records() if isinstance(record, LLMCall)]
        assert not set(_noted) - set(recorded), "a call is lost whose recording had returned"
    found(f"interrupts in a {what}", struck=struck, calls=len(recorded))
    assert struck > 100, "hardly any interrupt surfaced in the package"


def test_a_handler_around_an_inner_block_is_in_the_outer_one(kind: Kind) -> None:
    """Given a block in a block, when the inner one is hit anywhere, then the user's handler between the two
    is in the outer run, and what it records belongs to that."""
    struck = 0

    def interrupted(interrupt: Interrupt) -> None:
        with WaxellContext("outer") as outer:
            try:
                with interrupt, WaxellContext("inner"):
                    call()
            except kind.exception:
                assert get_context() is outer, interrupt.where
                assert open_runs() == ["outer"], interrupt.where
            call(get_context().record_llm_call)

    with record_runs() as runs:
        for _ in sweep(kind.strike, interrupted, step=effort(3, 1)):
            struck += 1
        outer = {run.run_id for run in runs if run.agent_name == "outer"}
        assert {run.parent_run_id for run in runs if run.agent_name == "inner"} <= outer
        assert left_behind() == []
    found("interrupts in an inner block", struck=struck)
    assert struck > 100


@pytest.mark.parametrize("what", ["generator", "async generator"])
def test_an_interrupt_in_the_consumer_is_no_end_of_the_generator(what: str, kind: Kind) -> None:
    """Given a generator that waits between two items, when its consumer records and is hit, then the run of
    the generator goes on with the next item, and ends with the last."""
    struck = 0

    def interrupted(interrupt: Interrupt) -> None:
        items = generator()
        next(items)
        try:
            with interrupt, WaxellContext("consumer"):
                call()
        except kind.exception:
            assert get_context() is None, interrupt.where
            assert open_runs() == ["generator"], interrupt.where
        assert list(items) == [2]
        assert open_runs() == [], interrupt.where

    async def interrupted_async(interrupt: Interrupt) -> None:
        items = async_generator()
        await anext(items)
        try:
            with interrupt:
                async with WaxellContext("consumer"):
                    call()
        except kind.exception:
            assert get_context() is None, interrupt.where
            assert open_runs() == ["async_generator"], interrupt.where
        assert [item async for item in items] == [2]
        assert open_runs() == [], interrupt.where

    by_name: dict[str, Callable[[Interrupt], None]] = {
        "generator": interrupted,
        "async generator": lambda interrupt: run(interrupted_async(interrupt)),
    }
    with record_runs() as runs:
        for _ in sweep(kind.strike, by_name[what], step=effort(5, 1)):
            struck += 1
        states = {run.state for run in runs if "generator" in run.agent_name}
        assert states == {"success"}
        assert left_behind() == []
    found(f"interrupts in the consumer of a {what}", struck=struck)
    assert struck > 50
