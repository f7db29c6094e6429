"""`@observe`: a function, coroutine or generator as a run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, TypeVar, overload

from .context import WaxellContext
from .runs import Body, state_of

_F = TypeVar("_F", bound=Callable[..., Any])


@overload
def observe(function: _F, /) -> _F: ...
@overload
def observe(
    *, agent_name: str | None = None, workflow_name: str = "default", capture_content: bool | None = None
) -> Callable[[_F], _F]: ...
def observe(
    function: Callable[..., Any] | None = None,
    /,
    *,
    agent_name: str | None = None,
    workflow_name: str = "default",
    capture_content: bool | None = None,
) -> Any:
    """Make each call of a function a run: sync, async, a generator of either kind.

    A generator's run is open from its first item to its end, and current only while its body runs.
    Arguments and results are not recorded.

    Args:
        function: the function, where the decorator is used without parentheses.
        agent_name: the run's agent name; the function's qualified name otherwise.
        workflow_name: the run's workflow name.
        capture_content: whether the content of what happens inside is recorded, as for `WaxellContext`.
    """

    def decorate(wrapped: Callable[..., Any]) -> Callable[..., Any]:
        own_name: str = getattr(wrapped, "__qualname__", type(wrapped).__qualname__)
        name = agent_name or own_name

        def new_run() -> WaxellContext:
            return WaxellContext(name, workflow_name, capture_content=capture_content)

        if inspect.isasyncgenfunction(wrapped):
            return functools.wraps(wrapped)(_async_generator(wrapped, new_run))
        if inspect.isgeneratorfunction(wrapped):
            return functools.wraps(wrapped)(_generator(wrapped, new_run))
        if inspect.iscoroutinefunction(wrapped):

            @functools.wraps(wrapped)
            async def run_async(*args: Any, **kwargs: Any) -> Any:
                with new_run():
                    return await wrapped(*args, **kwargs)

            return run_async

        @functools.wraps(wrapped)
        def run(*args: Any, **kwargs: Any) -> Any:
            with new_run():
                return wrapped(*args, **kwargs)

        return run

    return decorate if function is None else decorate(function)


# In both, the outermost `except` sees also an interrupt that surfaced in code of ours: what has begun ends
# there, and is hidden from the consumer. A run that has ended already stays as it is.


def _generator(
    wrapped: Callable[..., Generator[Any, Any, Any]], new_run: Callable[[], WaxellContext]
) -> Callable[..., Generator[Any, Any, Any]]:
    def run(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        generator = wrapped(*args, **kwargs)
        context = new_run()
        body = Body(context)
        resume: Callable[[], Any] = lambda: next(generator)  # noqa: E731  what the consumer asked for last
        try:
            try:
                context.start()
                while True:
                    with body:
                        item = resume()
                    try:
                        sent = yield item
                    except GeneratorExit:
                        with body:
                            generator.close()
                        raise
                    except BaseException as error:  # noqa: BLE001  thrown in by the consumer: the generator's
                        resume = functools.partial(generator.throw, error)
                    else:
                        resume = functools.partial(generator.send, sent)
            except StopIteration as stop:
                context.end()
                return stop.value
            except GeneratorExit:
                context.end()
                raise
        except BaseException as error:
            body.hide()
            context.end(state_of(error), error)
            raise

    return run


def _async_generator(
    wrapped: Callable[..., AsyncGenerator[Any, Any]], new_run: Callable[[], WaxellContext]
) -> Callable[..., AsyncGenerator[Any, Any]]:
    async def run(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        generator = wrapped(*args, **kwargs)
        context = new_run()
        body = Body(context)
        resume: Callable[[], Any] = functools.partial(generator.asend, None)
        try:
            try:
                context.start()
                while True:
                    with body:
                        item = await resume()
                    try:
                        sent = yield item
                    except GeneratorExit:
                        with body:
                            await generator.aclose()
                        raise
                    except BaseException as error:  # noqa: BLE001  thrown in by the consumer: the generator's
                        resume = functools.partial(generator.athrow, error)
                    else:
                        resume = functools.partial(generator.asend, sent)
            except StopAsyncIteration:
                context.end()
            except GeneratorExit:
                context.end()
                raise
        except BaseException as error:
            body.hide()
            context.end(state_of(error), error)
            raise

    return run
