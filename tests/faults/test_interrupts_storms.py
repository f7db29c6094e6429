"""Storms of interrupts over real workers whose tasks do nothing but record, and the same without us.

RQ's time limit, shorter than a second; Dramatiq's `TimeLimitExceeded` and `Shutdown`; in Celery's gevent pool
`gevent.Timeout` and `GreenletExit`, in its solo pool `KeyboardInterrupt`. The prefork pool's soft time limit
has a storm of its own.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dramatiq
import pytest
import rq

from tests.faults.storming import APPS, Storming, arrived, notes, nothing_open, states, wrong
from tests.faulty import FaultyServer
from tests.harness import ROOT, await_
from tests.torture import effort, found
from waxell_workers.testing.conformance.plugin import load_driver
from waxell_workers.testing.conformance.stage import RunningWorker, children_in, make_worker, start_valkey

pytestmark = pytest.mark.timeout(effort(400, 1800))
ARRIVAL_S = effort(60, 240)
LONG_S = 20.0
"""A task that takes so long has not been hit."""
BRIEF_S = 0.004
LIMIT_S = 3
"""The time limit that `rq_storm` takes for a random one."""

RQ = load_driver(ROOT / "integrations" / "rq" / "driver.py")
DRAMATIQ = load_driver(ROOT / "integrations" / "dramatiq" / "driver.py")
CELERY = load_driver(ROOT / "integrations" / "celery" / "driver.py")


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with children_in(tmp_path_factory.mktemp("broker")) as children:
        yield start_valkey(children)


Make = Callable[..., RunningWorker]


@pytest.fixture
def make(broker: str, tmp_path: Path) -> Iterator[Make]:
    """Make a worker of one of the storms' applications."""
    made: list[RunningWorker] = []

    def make(driver: Any, mode: str, slots: int, url: str, *more: str, **settings: str) -> RunningWorker:
        directory = tmp_path / f"worker-{len(made)}"
        directory.mkdir()
        (directory / "notes").touch()
        own = {"NOTES": str(directory / "notes"), "BROKER_URL": broker, "WAXELL_API_URL": url}
        words = {"scenarios": f"{driver.framework}_storm", "settings": "rq_storm"}
        [chosen] = [each for each in driver.modes if each.name == mode]
        worker = make_worker(
            Storming(driver, words, more),
            chosen,
            APPS,
            directory,
            slots=slots,
            WAXELL_CAPTURE="",
            PYTHONDONTWRITEBYTECODE="1",
            **own | settings,
        )
        made.append(worker)
        worker.start()
        return worker

    yield make
    for worker in made:
        worker.stop()


@dataclass
class Sent:
    """The tasks of a storm, by what was meant to happen to them."""

    kinds: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, task_id: str) -> None:
        self.kinds[task_id] = kind

    def of(self, kind: str) -> set[str]:
        return {task_id for task_id, own in self.kinds.items() if own == kind}


# -- what is sent ------------------------------------------------------------------------------


def send_jobs(worker: RunningWorker, count: int) -> Sent:
    """Enqueue jobs that go on until they are hit, such as may come to an end before, and such as do."""
    sent, limited = Sent(), {"job_timeout": LIMIT_S}
    sorts: list[tuple[str, float, dict[str, int]]] = [
        ("until hit", LONG_S, limited),
        ("in a race", BRIEF_S, limited),
        ("unlimited", BRIEF_S, {}),
    ]
    for number in range(count):
        kind, seconds, options = sorts[number % 5 % 3]
        sent.add(kind, enqueue(worker, "storm", seconds, **options))
    return sent


def enqueue(worker: RunningWorker, job: str, *arguments: float, **options: float) -> str:
    queue = rq.Queue(worker.site.queue, connection=RQ_CONNECTION(worker.site.broker_url))
    return str(queue.enqueue(f"rq_storm.{job}", *arguments, **options).id)


RQ_CONNECTION = RQ.send.__func__.__globals__["connect"]
DRAMATIQ_CLIENT = DRAMATIQ.send.__func__.__globals__["client"]


def send_message(worker: RunningWorker, actor: str, *arguments: float, **options: float) -> str:
    client = DRAMATIQ_CLIENT(worker.site.broker_url)
    client.declare_queue(worker.site.queue)
    message = dramatiq.Message(worker.site.queue, actor, arguments, {}, options)
    return str(client.enqueue(message).message_id)


def send_messages(worker: RunningWorker, count: int) -> Sent:
    """Enqueue messages that go on until they are hit by the one or the other, and such as come to an end.

    None that may be hit as it ends: that ends a thread of Dramatiq's, without us too.
    """
    sent = Sent()
    for number in range(count):
        moment = random.choice((random.randint(1, 3), random.randint(3, 60)))
        kind = ("TimeLimitExceeded", "Shutdown", "unlimited")[number % 5 % 3]
        options = {"TimeLimitExceeded": {"time_limit": moment}, "Shutdown": {"notice_ms": moment}}.get(
            kind, {}
        )
        seconds = LONG_S if options else BRIEF_S
        sent.add(kind, send_message(worker, "storm", seconds, **options))
    return sent


def settle(worker: RunningWorker, server: FaultyServer, sent: Sent) -> None:
    """Wait until all has arrived, and stop the worker; a shipper without one has 30 s."""
    tasks = set(sent.kinds)
    # A block that was hit as it was entered or left may stay open until its process ends.
    hardly_any = 1 + len(tasks) // 100
    worker.wait(lambda: arrived(server, tasks, hardly_any), "end of each task's run", ARRIVAL_S)
    worker.terminate()
    await_(lambda: nothing_open(server, tasks), "an end of each run", ARRIVAL_S)


# -- what is asked afterwards ------------------------------------------------------------------


def outcomes(worker: RunningWorker, sent: Sent, driver: Any) -> dict[str, set[str]]:
    """Return how the framework says that the tasks of each kind have ended, without the errors' texts."""
    ends = defaultdict(set)
    for task_id, kind in sent.kinds.items():
        ends[kind].add(": ".join(driver.outcome(worker, task_id).split(": ")[:2]))
    return dict(ends)


def check(worker: RunningWorker, server: FaultyServer, sent: Sent, what: str) -> dict[str, list[str]]:
    """Ask what must hold after each storm, and return the notes."""
    seen = notes(worker)
    in_task, in_framework = set(seen["task-inside"]), set(seen["framework-inside"])
    records = list(server.records.values())
    found(
        what,
        tasks=len(sent.kinds),
        surfaced=len({*in_task, *in_framework, *seen["task-outside"], *seen["framework-outside"]}),
        in_our_code=len(in_task | in_framework),
        in_our_code_but_not_in_a_task=len(in_framework - in_task),
        calls=sum(record["kind"] == "llm_call" for record in records),
    )
    assert len(in_task) > len(sent.kinds) / 20, "hardly any struck in our code"
    assert seen["lost"] == [], "the user's handler was in another run"
    assert wrong(records, set(sent.kinds)) == []
    assert server.violations == []
    assert lost_calls(seen, records) == {}
    return seen


def lost_calls(seen: dict[str, list[str]], records: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Return the tasks of whose calls some have not arrived: how many it has made, how many have arrived."""
    counts: dict[str, int] = defaultdict(int)
    for record in records:
        if record["kind"] == "llm_call":
            counts[record["model"]] += 1
    made = {
        task_id: int(word.removeprefix("calls-"))
        for word, ids in seen.items()
        if word.startswith("calls-")
        for task_id in ids
    }
    hit = {*seen["task-inside"], *seen["task-outside"]}  # amid a call that was recorded, maybe
    return {
        task_id: (count, counts[task_id])
        for task_id, count in made.items()
        if not count <= counts[task_id] <= count + (task_id in hit)
    }


# -- claims ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "kind"), [("simple", "SimpleWorker"), ("worker", "Worker")])
def test_time_limits_over_an_rq_worker_that_records(make: Make, mode: str, kind: str) -> None:
    """Given jobs that record without a pause, when RQ's time limit strikes all over them, then each job that
    was hit fails by it, each job is one run with one end that agrees with RQ's, and all arrives; and RQ comes
    to no end with a job to which it does not without us."""
    count = effort(40, 300) if mode == "worker" else effort(60, 600)
    more = ("--worker-class", f"rq_storm.{kind}")
    with FaultyServer(ingest=True) as server:
        worker = make(RQ, mode, 1, server.url, *more)
        sent = send_jobs(worker, count)
        worker.wait_done(count)
        settle(worker, server, sent)
        ends = outcomes(worker, sent, RQ)
        seen = check(worker, server, sent, f"RQ's time limit over a {kind}")
    failed = {*seen["framework-inside"], *seen["framework-outside"]}
    assert failed >= sent.of("until hit"), "a time limit came to nothing"
    assert set(seen["ended"]) >= sent.kinds.keys() - failed
    expected = {task_id: "error" if task_id in failed else "success" for task_id in sent.kinds}
    assert states(server) == expected

    control = make(RQ, mode, 1, server.url, *more, WAXELL_OBSERVE="false")
    alone = send_jobs(control, effort(40, 200))
    control.wait_done(len(alone.kinds))
    control.terminate()
    assert_no_other_end(ends, outcomes(control, alone, RQ))


def test_interrupts_over_a_dramatiq_worker_that_records(make: Make) -> None:
    """Given messages that record without a pause, when Dramatiq raises `TimeLimitExceeded` and `Shutdown` all
    over them, then each that was hit fails by that, each is one run with one end that says so, and all
    arrives; and Dramatiq comes to no end with a message to which it does not without us."""
    count = effort(60, 600)
    with FaultyServer(ingest=True) as server:
        worker = make(DRAMATIQ, "threads", 4, server.url)
        sent = send_messages(worker, count)
        worker.wait_done(count)
        settle(worker, server, sent)
        ends = outcomes(worker, sent, DRAMATIQ)
        check(worker, server, sent, "interrupts over a Dramatiq worker")
    of_kinds = {"TimeLimitExceeded": "error", "Shutdown": "interrupted", "unlimited": "success"}
    assert states(server) == {task_id: of_kinds[kind] for task_id, kind in sent.kinds.items()}

    control = make(DRAMATIQ, "threads", 4, server.url, WAXELL_OBSERVE="false")
    alone = send_messages(control, effort(40, 200))
    control.wait_done(len(alone.kinds))
    control.terminate()
    assert_no_other_end(ends, outcomes(control, alone, DRAMATIQ))


def test_greenlets_that_are_ended_from_outside(make: Make) -> None:
    """Given a gevent pool whose greenlets take turns inside our calls, when Celery's time limit and kills
    strike all over them, then each reaches its task, each task is one run with one end, and all arrives."""
    count = effort(60, 400)
    with FaultyServer(ingest=True) as server:
        worker = make(CELERY, "gevent", 10, server.url)
        sent = Sent()
        for number in range(count):
            if number % 3 == 0:
                sent.add("kills", worker.send("kills", LONG_S, 0.1))
            elif number % 3 == 1:
                limit_s = random.uniform(0.01, 0.2)
                sent.add("timeouts", worker.send("timeouts", LONG_S, hard_limit_s=limit_s))
            else:
                sent.add("unlimited", worker.send("timeouts", BRIEF_S))
        hit = sent.of("kills") | sent.of("timeouts")
        await_(lambda: len(over(worker)) == count, f"the end of {count} tasks", ARRIVAL_S)
        settle(worker, server, sent)
        seen = check(worker, server, sent, "greenlets that are ended from outside")
    assert {*seen["task-inside"], *seen["task-outside"]} == hit
    ends = states(server)
    assert {ends[task_id] for task_id in sent.of("kills")} == {"interrupted"}
    # Celery says a moment later that it was the hard time limit.
    assert {ends[task_id] for task_id in sent.of("timeouts")} <= {"killed", "interrupted"}
    assert {ends[task_id] for task_id in sent.of("unlimited")} == {"success"}


def test_a_solo_pool_is_asked_to_give_up(make: Make) -> None:
    """Given a solo pool, when `KeyboardInterrupt` strikes all over its tasks, then each reaches its task,
    each task is one run with one end, and all arrives."""
    count = effort(60, 600)
    with FaultyServer(ingest=True) as server:
        worker = make(CELERY, "solo", 1, server.url)
        sent = Sent()
        for _ in range(count):
            sent.add("keys", worker.send("keys", LONG_S, 0.02))
        await_(lambda: len(over(worker)) == count, f"the end of {count} tasks", ARRIVAL_S)
        settle(worker, server, sent)
        seen = check(worker, server, sent, "KeyboardInterrupt over a solo pool")
    assert {*seen["task-inside"], *seen["task-outside"]} == sent.of("keys")
    assert states(server) == dict.fromkeys(sent.kinds, "error")


def over(worker: RunningWorker) -> set[str]:
    """Return the tasks that have ended, by their own account."""
    seen = notes(worker)
    return {*seen["ended"], *seen["task-inside"], *seen["task-outside"]}


def assert_no_other_end(ends: dict[str, set[str]], alone: dict[str, set[str]]) -> None:
    """Make sure that the framework ends a task with us in no way in which it does not end one alone."""
    assert {kind: own - alone[kind] for kind, own in ends.items()} == {kind: set() for kind in ends}
