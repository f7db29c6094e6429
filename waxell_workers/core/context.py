"""`WaxellContext`: a run that a user opens, sync or async.

A time limit may surface at any instruction, and so where nothing of ours can catch it: before the first line
of `__exit__`, or after the last one of `__enter__`. So what a `with` keeps until its block is left, on the
interpreter's stack, is not `__exit__` itself, but a guard. If it goes without having been called to the end,
the run ends there and then.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .collector import current
from .runs import Run, state_of


class _Guarded:
    """A method that a `with` looks up before it enters, and calls when it leaves."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __get__(self, run: WaxellContext | None, kind: type) -> Callable[..., Any]:
        if run is None:
            return self._function
        # In C: a call that is hit before its first instruction leaves nothing that would keep the guard.
        guard = functools.partial(self._function, run)
        if run._guard is None and not run._began:
            run._guard = weakref.ref(guard, run._abandon)
        return guard


class _Nothing:
    """What may be awaited, and is there already."""

    def __await__(self) -> Iterator[None]:
        return iter(())


_NOTHING = _Nothing()


class WaxellContext(Run):
    """A run as a context manager, sync and async.

        with WaxellContext("researcher", session_id="s-1") as run:
            client.chat.completions.create(…)       # belongs to the run
            run.set_tag("tenant", "acme")

    An exception ends the run as `error` (`interrupted` for one that is no `Exception`) and passes through
    untouched. Nothing here waits for the network.

    Args:
        agent_name: who runs.
        workflow_name: what it runs.
        inputs: plain data, recorded since you hand it over; redacted.
        metadata: plain data for filters and the page.
        session_id: a conversation to which the run belongs.
        user_id: the end user for whom it runs.
        user_group: the end user's group.
        parent_run_id: the run that caused this one; the current run unless given.
        capture_content: whether prompts, responses, and errors in full are recorded inside; as in the run
            around it unless given, and as it is configured outside any.
    """

    __slots__ = ("_guard",)

    def __init__(
        self,
        agent_name: str,
        workflow_name: str = "default",
        inputs: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        session_id: str | None = None,
        user_id: str | None = None,
        *,
        user_group: str | None = None,
        parent_run_id: str | None = None,
        capture_content: bool | None = None,
    ) -> None:
        self._guard: weakref.ref[Callable[..., Any]] | None = None
        collector = current()
        super().__init__(
            None if collector.excluded(agent_name) else collector,
            agent_name,
            workflow_name,
            inputs,
            metadata,
            session_id,
            user_id,
            user_group=user_group,
            parent_run_id=parent_run_id,
            capture_content=capture_content,
        )

    def __enter__(self) -> WaxellContext:
        try:
            self.start()
            self.enter()
        except BaseException as error:  # a time limit's, at any instruction: no block will end what has begun
            self._close(error)
            raise
        return self

    async def __aenter__(self) -> WaxellContext:
        return self.__enter__()

    def _leave(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._close(error)
        except BaseException:  # likewise: it goes on, once this is done
            self._close(error)
            raise

    def _leave_async(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> _Nothing:
        # At once, not in a coroutine: the guard has gone by the time that one is awaited.
        self._leave(kind, error, trace)
        return _NOTHING

    if TYPE_CHECKING:

        def __exit__(
            self,
            kind: type[BaseException] | None,
            error: BaseException | None,
            trace: TracebackType | None,
        ) -> None: ...

        async def __aexit__(
            self,
            kind: type[BaseException] | None,
            error: BaseException | None,
            trace: TracebackType | None,
        ) -> None: ...

    else:
        __exit__ = _Guarded(_leave)
        __aexit__ = _Guarded(_leave_async)

    def _close(self, error: BaseException | None) -> None:
        self.leave()
        self.end(state_of(error), error)
        self._guard = None

    def _abandon(self, guard: object) -> None:
        """End what nobody has ended, as its guard goes."""
        self._guard = None
        self.leave()
        self.end("interrupted", reason="interrupted: its block was cut off")
