"""How a shape of call is made: the same words for a client that blocks and for one that is awaited.

A shape is a coroutine function that gets a `Caller` and returns what its caller saw, as something that JSON
can hold. For a client that blocks it is driven to its end without an event loop: nothing in it ever waits.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

CANCELLED_AFTER_S = 0.4
"""Long enough for a call to be under way."""

Shape = Callable[["Caller"], Coroutine[Any, Any, Any]]


@dataclass(frozen=True)
class Caller:
    """What a shape works with."""

    client: Any
    """Of the real SDK."""
    model: str
    """Says how the server is to behave."""
    is_async: bool
    closables: tuple[Any, ...]
    """What is to be closed afterwards: the client, or what is in it."""

    async def get(self, result: Any) -> Any:
        """Return what the SDK returned, awaited if it is to be."""
        return await result if self.is_async and inspect.isawaitable(result) else result

    @asynccontextmanager
    async def entered(self, manager: Any) -> AsyncIterator[Any]:
        """Enter a context manager of the SDK, and leave it, in the client's way."""
        if self.is_async:
            async with manager as value:
                yield value
        else:
            with manager as value:
                yield value

    async def read(self, stream: Any) -> list[Any]:
        """Return all items of a stream."""
        return [item async for item in stream] if self.is_async else list(stream)

    async def next(self, stream: Any) -> Any:
        """Return the next item of a stream."""
        return await stream.__anext__() if self.is_async else next(stream)

    async def close(self, closable: Any) -> None:
        """Close a stream, by whichever name it has for that."""
        name = "aclose" if self.is_async and hasattr(closable, "aclose") else "close"
        await self.get(getattr(closable, name)())


def seen(item: Any) -> Any:
    """Return what there is to see in a result of an SDK: its type, and all that it says."""
    if isinstance(item, list | tuple):
        return [seen(each) for each in item]
    dump = getattr(item, "model_dump", None)
    if dump is None:
        return item if isinstance(item, str | int | float | bool | None) else type(item).__name__
    return {type(item).__name__: dump(mode="json", warnings=False)}


def outcome(shape: Shape, caller: Caller, *, is_cancelled: bool) -> Any:
    """Return what the caller of a shape saw: its result, or what was raised. The client is closed."""

    async def run() -> Any:
        try:
            call = shape(caller)
            return await (asyncio.wait_for(call, CANCELLED_AFTER_S) if is_cancelled else call)
        finally:
            gc.collect()  # what the shape dropped is gone before the client is
            for closable in caller.closables:
                await caller.close(closable)

    gc.freeze()  # so that collecting, here and in shapes, looks at nothing older
    try:
        return asyncio.run(run()) if caller.is_async else _driven(run())
    except Exception as error:  # noqa: BLE001  whatever it is, it is what the caller saw
        kind, cause = type(error), type(error.__cause__)
        return {"raised": f"{kind.__module__}.{kind.__qualname__}: {error}", "cause": cause.__qualname__}
    finally:
        gc.collect()
        gc.unfreeze()


def _driven(shape: Coroutine[Any, Any, Any]) -> Any:
    try:
        shape.send(None)
    except StopIteration as end:
        return end.value
    shape.close()
    raise AssertionError("a call of a client that blocks was awaited")
