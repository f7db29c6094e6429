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


# -- managers, whose call begins when they are entered -------------------------------------------------


class Manager:
    """What an SDK's `stream` returns."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.fail = fail
        self.has_left = False

    def __enter__(self) -> str:
        if self.fail is not None:
            raise self.fail
        return "a stream"

    def __exit__(self, *exc_info: object) -> None:
        self.has_left = True

    async def __aenter__(self) -> str:
        return self.__enter__()

    async def __aexit__(self, *exc_info: object) -> None:
        self.has_left = True


def stream(wrapper: Callable[..., Any], manager: Manager, *, asynchronous: bool) -> Any:
    """Enter and leave what the SDK's `stream` returns, through a gate."""

    def stream() -> Manager:
        return manager

    gated = gates.gate(wrapper, gates.Passage(lambda: True, mark="sdk", has_managers=True))
    if not asynchronous:
        with gated(stream, SDK(), (), {}) as value:
            return value

    async def main() -> Any:
        async with gated(stream, SDK(), (), {}) as value:
            return value

    return asyncio.run(main())


class FailsToEnter(gates._Manager):
    """An instrumentor's manager that has a defect, before or after the SDK's is entered."""

    def __init__(self, manager: Any, error: Exception, *, is_late: bool) -> None:
        super().__init__(manager, gates._Doorway("", {}))
        self._self_error = error
        self._self_is_late = is_late

    def __enter__(self) -> Any:
        if self._self_is_late:
            self.__wrapped__.__enter__()
        raise self._self_error

    async def __aenter__(self) -> Any:
        if self._self_is_late:
            await self.__wrapped__.__aenter__()
        raise self._self_error


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("is_late", [False, True])
def test_a_defect_as_a_manager_is_entered_costs_the_record_and_not_the_call(
    is_late: bool, asynchronous: bool
) -> None:
    """The caller gets the SDK's stream, and the SDK's manager is left."""
    manager = Manager()

    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return FailsToEnter(wrapped(*args, **kwargs), AttributeError("defect"), is_late=is_late)

    assert stream(wrapper, manager, asynchronous=asynchronous) == "a stream"
    assert manager.has_left


@pytest.mark.parametrize("wrapper", [fails_before, fails_after])
def test_a_defect_as_a_manager_is_made_costs_the_record_and_not_the_call(wrapper: Callable[..., Any]) -> None:
    """The caller gets the SDK's manager."""
    manager = Manager()
    assert stream(wrapper, manager, asynchronous=False) == "a stream"
    assert manager.has_left


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("error", [TypeError("the SDK's"), SoftTimeLimitExceeded(1)])
def test_what_an_sdks_manager_raises_is_raised(error: Exception, asynchronous: bool) -> None:
    """It is no defect, of whatever type it is."""

    class Passes(gates._Manager):
        def __init__(self, manager: Any) -> None:
            super().__init__(manager, gates._Doorway("", {}))

        def __enter__(self) -> Any:
            return self.__wrapped__.__enter__()

        async def __aenter__(self) -> Any:
            return await self.__wrapped__.__aenter__()

    def passes(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return Passes(wrapped(*args, **kwargs))

    with pytest.raises(type(error)) as caught:
        stream(passes, Manager(error), asynchronous=asynchronous)
    assert caught.value is error


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_interrupt_as_a_manager_is_entered_is_raised(asynchronous: bool) -> None:
    """An interrupt that surfaces in the instrumentor's manager is none of its defects."""

    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return FailsToEnter(wrapped(*args, **kwargs), SoftTimeLimitExceeded(1), is_late=True)

    with pytest.raises(SoftTimeLimitExceeded):
        stream(wrapper, Manager(), asynchronous=asynchronous)
