"""The comparison that the demo is for: what its tasks noted for themselves, against what the server was told.

Pure functions over two lists; nothing here knows how either came to be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .demo_tally import Attempt, Call

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class SeenRun:
    """A run as the server has it."""

    run_id: str
    attempt: Attempt
    status: str
    calls: Sequence[Call]
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_unknown: int = 0
    """Calls that are not in these two."""
    cost_usd: float | None = None
    cost_unknown: int = 0
    """Calls that are not in the cost."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The figures of one demo."""

    tasks: int
    attempts: int
    runs: int
    calls: int
    tokens_in: int
    tokens_out: int
    tokens_unknown: int
    """Calls that the two above are without: nobody told."""
    cost_usd: float | None
    cost_unknown: int
    """Calls that the cost is without."""
    killed: int
    lost_runs: int
    lost_calls: int
    duplicated_runs: int
    duplicated_calls: int
    misattributed_calls: int
    """At the server, but in the run of another attempt."""

    @property
    def lost(self) -> int:
        """Attempts and calls that happened and are not at the server."""
        return self.lost_runs + self.lost_calls

    @property
    def duplicated(self) -> int:
        """Attempts and calls that are at the server more often than they happened."""
        return self.duplicated_runs + self.duplicated_calls

    @property
    def clean(self) -> bool:
        """True if the server has exactly what happened, where it belongs."""
        return not (self.lost or self.duplicated or self.misattributed_calls)


def judge(tasks: int, attempts: Iterable[Attempt], calls: Iterable[Call], seen: Sequence[SeenRun]) -> Verdict:
    """Compare the attempts and calls that happened with the runs that the server has."""
    happened, made = Counter(attempts), list(calls)
    runs = Counter(run.attempt for run in seen)
    shown = [call for run in seen for call in run.calls]
    lost_calls, duplicated_calls = _difference(Counter(map(_identity, made)), Counter(map(_identity, shown)))
    lost_runs, duplicated_runs = _difference(happened, runs)
    costs = [run.cost_usd for run in seen if run.cost_usd is not None]
    return Verdict(
        tasks=tasks,
        attempts=happened.total(),
        runs=len(seen),
        calls=len(shown),
        tokens_in=sum(run.tokens_in for run in seen),
        tokens_out=sum(run.tokens_out for run in seen),
        tokens_unknown=sum(run.tokens_unknown for run in seen),
        cost_usd=round(sum(costs), 6) if costs else None,
        cost_unknown=sum(run.cost_unknown for run in seen),
        killed=sum(run.status == "killed" for run in seen),
        lost_runs=lost_runs,
        lost_calls=lost_calls,
        duplicated_runs=duplicated_runs,
        duplicated_calls=duplicated_calls,
        misattributed_calls=_misattributed(made, shown),
    )


def judge_each(
    ended: Mapping[str, int], attempts: Sequence[Attempt], calls: Sequence[Call], seen: Sequence[SeenRun]
) -> dict[str, Verdict]:
    """Judge each framework by itself, and `all` of them together."""
    verdicts = {
        framework: judge(
            tasks,
            [attempt for attempt in attempts if attempt.framework == framework],
            [call for call in calls if call.attempt.framework == framework],
            [run for run in seen if run.attempt.framework == framework],
        )
        for framework, tasks in ended.items()
    }
    return verdicts | {"all": judge(sum(ended.values()), attempts, calls, seen)}


def _identity(call: Call) -> Hashable:
    """Return what tells one call from another: the model's id of its answer, else attempt and model."""
    return call.response_id or (call.attempt, call.model)


def _difference(happened: Counter[Key], seen: Counter[Key]) -> tuple[int, int]:
    """Return how many were lost, and how many are there too often.

    Something that is seen once and was not noted is no duplicate: its process died between the answer and the
    note.
    """
    lost = (happened - seen).total()
    return lost, sum(max(0, count - max(happened[key], 1)) for key, count in seen.items())


def _misattributed(made: Iterable[Call], shown: Iterable[Call]) -> int:
    home = {call.response_id: call.attempt for call in made if call.response_id}
    return sum(home.get(call.response_id, call.attempt) != call.attempt for call in shown)
