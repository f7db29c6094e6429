"""The export's threads: never more than asked for, never past the deadline, never in the way of an exit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from waxell_workers.export.crew import Crew


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew(4)
    yield crew
    crew.dismiss()


def test_jobs_run_side_by_side(crew: Crew) -> None:
    together = threading.Barrier(4)
    assert crew.run([lambda: together.wait(10) and None] * 4, time.monotonic() + 20, lambda: None)
    assert not together.broken


def test_many_jobs_share_few_threads(crew: Crew) -> None:
    names: set[str] = set()
    done: list[int] = []

    def job(number: int) -> None:
        names.add(str(threading.get_ident()))
        done.append(number)

    crew.run([lambda n=n: job(n) for n in range(50)], time.monotonic() + 20, lambda: None)
    assert sorted(done) == list(range(50))
    assert len(names) <= 4


def test_jobs_begin_in_their_order(crew: Crew) -> None:
    begun: list[int] = []
    one = Crew(1)
    one.run([lambda n=n: begun.append(n) for n in range(20)], time.monotonic() + 20, lambda: None)
    one.dismiss()
    assert begun == list(range(20))


def test_a_job_that_overruns_is_told_to_end(crew: Crew) -> None:
    told = threading.Event()
    assert crew.run([lambda: told.wait(10) and None], time.monotonic() + 0.05, told.set)


def test_a_job_that_does_not_end_is_left_alone_and_the_crew_goes_on(crew: Crew) -> None:
    release = threading.Event()
    begun = time.monotonic()
    assert not crew.run([lambda: release.wait(10) and None], begun + 0.05, lambda: None)
    assert time.monotonic() - begun < 2
    done: list[int] = []
    assert crew.run([lambda: done.append(1)], time.monotonic() + 20, lambda: None)
    release.set()
    assert done == [1]


def test_nothing_begins_after_the_deadline(crew: Crew) -> None:
    done: list[int] = []
    crew.run([lambda: done.append(1)], time.monotonic() - 1, lambda: None)
    assert done == []


def test_without_threads_the_caller_does_the_jobs(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    idents: list[int] = []
    crew.run([lambda: idents.append(threading.get_ident())] * 3, time.monotonic() + 20, lambda: None)
    assert idents == [threading.get_ident()] * 3
