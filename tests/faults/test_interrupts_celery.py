"""Celery's soft time limit, raised by its own signal handler while our code runs.

The sweep goes through `celery.app.trace`, which is what a pool process executes for each task, and through
every instruction of ours in it: our signal handlers, where Celery swallows what is raised, and what the task
calls, where it must arrive.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator

import celery
import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from celery.app.trace import build_tracer

import waxell_workers
import waxell_workers.celery
from tests.faults.interrupting import KINDS, Interrupt, armed, left_behind, locked, open_runs, sweep
from tests.torture import effort, found
from waxell_workers import WaxellContext, get_context
from waxell_workers.testing import record_runs

pytestmark = pytest.mark.timeout(effort(400, 1800))

LIMIT = KINDS["celery"]


@pytest.fixture(autouse=True)
def soft_time_limit() -> Iterator[None]:
    # Celery logs each exception of a handler; thousands of them are thousands of formatted tracebacks.
    logger = logging.getLogger("celery.utils.dispatch.signal")
    before, logger.level = logger.level, logging.CRITICAL
    with armed(LIMIT):
        yield
    logger.level = before


@pytest.fixture
def app() -> Iterator[celery.Celery]:
    with celery.Celery("interrupts", broker="memory://", backend="cache+memory://") as app:
        yield app


class Traced:
    """A task, executed as a pool process does it."""

    def __init__(self, app: celery.Celery, body: Callable[[], None]) -> None:
        self.saw_the_limit = False

        def noticing() -> None:
            try:
                body()
            except SoftTimeLimitExceeded:
                self.saw_the_limit = True
                raise

        self._task = app.task(noticing, name=f"task-{uuid.uuid4().hex}", shared=False)
        self._trace = build_tracer(self._task.name, self._task, app=app)

    def execute(self, task_id: str) -> str:
        """Execute one attempt; return Celery's own word of how it ended."""
        self.saw_the_limit = False
        request = {"id": task_id, "task": self._task.name, "delivery_info": {"routing_key": "q"}}
        self._trace(task_id, (), {}, request)
        return self._task.AsyncResult(task_id).state


def ask() -> None:
    with WaxellContext("block") as run:
        run.record_step("step", {"number": 1})
        waxell_workers.record_llm_call(model="asked")


def refuse() -> None:
    ask()
    raise LookupError("nobody knows")


@pytest.mark.parametrize(("body", "end"), [(ask, "SUCCESS"), (refuse, "FAILURE")], ids=["succeeds", "fails"])
def test_a_soft_time_limit_anywhere_in_our_code(
    app: celery.Celery, body: Callable[[], None], end: str
) -> None:
    """Given a task, when its soft time limit surfaces at any instruction of ours, then it reaches the task,
    or Celery has swallowed it in a signal and the task ends as it would have; either way it is one run, with
    one end that agrees with Celery's, and nothing of it is open or current afterwards."""
    task = Traced(app, body)
    reached = swallowed = 0
    ends: dict[str, str] = {}

    def interrupted(interrupt: Interrupt) -> None:
        nonlocal reached, swallowed
        task_id = uuid.uuid4().hex
        with interrupt:
            state = task.execute(task_id)
        reached += task.saw_the_limit
        swallowed += bool(interrupt.where) and not task.saw_the_limit
        assert state == ("FAILURE" if task.saw_the_limit else end), interrupt.where
        assert get_context() is None, interrupt.where
        assert open_runs() == [], interrupt.where
        ends[task_id] = "success" if state == "SUCCESS" else "error"

    with record_runs() as runs:
        assert task.execute(f"control, {end}") == end
        for interrupt in sweep(LIMIT.strike, interrupted, step=effort(7, 1)):
            assert (reached + swallowed) % 100 or locked() == [], interrupt.where
        assert task.execute(f"afterwards, {end}") == end
        assert locked() == []
        assert left_behind() == []
        of_tasks = {run.task_id: run for run in runs if run.task_id}
        assert {task_id: of_tasks[task_id].state for task_id in ends} == ends
        assert len(of_tasks) == len(ends) + 2 == sum(bool(run.task_id) for run in runs)
        assert {run.parent_run_id for run in of_tasks.values()} == {""}
        tasks_by_run = {run.run_id for run in of_tasks.values()}
        assert {run.parent_run_id for run in runs if not run.task_id} <= tasks_by_run, "a call left its task"
        assert all(call.run_id for call in runs.calls), "a call is outside any run"
    found(f"soft time limits in our code, a task that {end.lower()}s", reached=reached, swallowed=swallowed)
    assert reached > 50
    assert swallowed > 50
