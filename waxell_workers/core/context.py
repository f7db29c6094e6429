"""`WaxellContext`: a run that a user opens, sync or async."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from . import content
from .collector import current
from .runs import Run, state_of


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
    """

    __slots__ = ()

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
    ) -> None:
        collector = current()
        super().__init__(
            None if collector.excluded(agent_name) else collector,
            agent_name,
            workflow_name,
            inputs,
            metadata if metadata is None else content.redacted(collector.settings, metadata),
            session_id,
            user_id,
            user_group=user_group,
            parent_run_id=parent_run_id,
        )

    def __enter__(self) -> WaxellContext:
        try:
            self.start()
            self.enter()
        except BaseException as error:  # a time limit's, at any instruction: no block will end what has begun
            self._close(error)
            raise
        return self

    def __exit__(
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

    def _close(self, error: BaseException | None) -> None:
        self.leave()
        self.end(state_of(error), error)

    async def __aenter__(self) -> WaxellContext:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, trace)
