"""The progress bar of `ship --drain`, on stderr: delivered of all, how fast, how long yet."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ..core.config import Settings
from ..core.inspection import survey
from .spool_places import chosen, places


class _Rate(ProgressColumn):
    """Records a second."""

    def render(self, task: Task) -> Text:
        # Of the whole way: a batch arrives at once, so that the last moments say little.
        if not task.completed or not task.elapsed:
            return Text("")
        return Text(f"{task.completed / task.elapsed:,.0f}/s")


class ShipBar:
    """Takes the shipper's word on how far it is; the shipper itself knows only what it has read so far."""

    def __init__(self, settings: Settings) -> None:
        self._total = _waiting(settings)
        self._progress = Progress(
            TextColumn("delivered"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=self._total or None)

    def __enter__(self) -> ShipBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, delivered: int, pending: int) -> None:
        """Show how far it is; more may have come since the beginning."""
        self._total = max(self._total, delivered + pending)
        self._progress.update(self._task, completed=delivered, total=self._total or None)


def _waiting(settings: Settings) -> int:
    place = chosen(places(settings))
    if place is None:
        return 0
    try:
        return survey(f"{place.root}/{settings.destination}").pending
    except OSError:  # nothing was recorded yet
        return 0
