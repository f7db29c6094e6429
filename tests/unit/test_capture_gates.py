"""Around our wrappers: a defect of an instrumentor costs a record, never a task; no context leaks.

The wrappers here are small ones that fail where an instrumentor could.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from opentelemetry import context

from waxell_workers.capture import gates
from waxell_workers.capture.tracer import KNOWN, OPENED

OPEN_CALL = "opentelemetry.genai.client.inference.context"
PASSAGE = gates.Passage(lambda: True, mark="sdk")


class SDK:
    """What is instrumented: says in which context it was called, or fails."""

    def create(self, fail: Exception | None = None) -> Any:
        if fail is not None:
            raise fail
        return context.get_current()

    async def acreate(self, fail: Exception | None = None) -> Any:
        return self.create(fail)


def fails_before(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    context.attach(context.set_value(OPEN_CALL, "leaked"))
    raise AttributeError("defect")


def fails_after(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    wrapped(*args, **kwargs)
    raise TypeError("defect")


def says_its_context(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return context.get_current(), wrapped(*args, **kwargs)


def awaiting(wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same wrapper for a coroutine function."""

    async def async_wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        results: list[Any] = []

        async def call() -> None:
            results.append(await wrapped(*args, **kwargs))

        if wrapper is not fails_before:
            await call()
        return wrapper(lambda *args, **kwargs: results[0], instance, args, kwargs)

    return async_wrapper


def call(wrapper: Callable[..., Any], *args: Any, asynchronous: bool) -> Any:
    sdk = SDK()
    if not asynchronous:
        return gates.gate(wrapper, PASSAGE)(sdk.create, sdk, args, {})

    async def main() -> Any:
        before = context.get_current()
        try:
            return await gates.gate(awaiting(wrapper), PASSAGE)(sdk.acreate, sdk, args, {})
        finally:
            assert context.get_current() == before

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def nothing_leaks() -> Any:
    """Whatever happens in a gate, the caller's context is the same afterwards."""
    gates._said.clear()
    before = context.get_current()
    yield
    assert context.get_current() is before


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("wrapper", [fails_before, fails_after])
def test_a_defect_costs_the_record_and_not_the_call(
    wrapper: Callable[..., Any], asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller gets what the SDK returned; the defect is logged once."""
    with caplog.at_level(logging.WARNING, "waxell_workers.capture"):
        for _ in range(3):
            assert OPEN_CALL not in call(wrapper, asynchronous=asynchronous)
    assert [record.name for record in caplog.records] == ["waxell_workers.capture"]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("error", [TypeError("the SDK's"), KeyError("the SDK's"), SoftTimeLimitExceeded(1)])
def test_what_the_sdk_raises_is_raised(error: Exception, asynchronous: bool) -> None:
    """Of whatever type: the SDK's own errors are not taken for a defect."""
    with pytest.raises(type(error)) as caught:
        call(says_its_context, error, asynchronous=asynchronous)
    assert caught.value is error


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_interrupt_in_the_instrumentor_is_raised(asynchronous: bool) -> None:
    """An interrupt that surfaces in a wrapper is none of its defects."""

    def interrupted(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        context.attach(context.set_value(OPEN_CALL, "leaked"))
        raise SoftTimeLimitExceeded(1)

    with pytest.raises(SoftTimeLimitExceeded):
        call(interrupted, asynchronous=asynchronous)


def test_the_users_open_call_is_hidden_from_us_and_ours_from_them() -> None:
    """Our wrapper runs where no call is open, the SDK in the caller's context."""
    theirs = object()
    token = context.attach(context.set_value("theirs", theirs, context.set_value(OPEN_CALL, theirs)))
    ours, inside = call(says_its_context, asynchronous=False)
    context.detach(token)
    assert ours == {"theirs": theirs, OPENED: [], KNOWN: {}}
    assert inside == {"theirs": theirs, OPEN_CALL: theirs, gates._OURS: "sdk"}


def test_a_call_within_a_call_is_part_of_it() -> None:
    """An SDK's method that calls another of its methods is told once."""
    told: list[str] = []

    def tells(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        told.append("a call")
        return wrapped(*args, **kwargs)

    gate = gates.gate(tells, PASSAGE)
    sdk = SDK()

    def parse() -> Any:
        return gate(sdk.create, sdk, (), {})

    gate(parse, sdk, (), {})
    assert told == ["a call"]
