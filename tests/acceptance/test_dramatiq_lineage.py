"""Given a Dramatiq worker: who caused which message, how long it waited, how it ended, as the server has it.

One script enqueues in every way that Dramatiq knows, one worker does it; what is at the server is one tree.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from tests.harness import ROOT, await_
from waxell_workers.testing.conformance import stage
from waxell_workers.testing.conformance.plugin import load_driver

APP = """
import json, os, sys, threading, time
import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AsyncIO, GroupCallbacks, Retries
from dramatiq.rate_limits.backends import RedisBackend
from waxell_workers import WaxellContext, options
from waxell_workers.dramatiq import WaxellMiddleware

QUEUE, PLACE = os.environ["QUEUE"], os.environ.get("PLACE", "last")
SOON = {"min_backoff": 300, "max_backoff": 300}
if os.environ["BROKER_URL"].startswith("amqp"):
    broker = RabbitmqBroker(url=os.environ["BROKER_URL"].rstrip("/"))
else:
    broker = RedisBroker(url=os.environ["BROKER_URL"])
broker.add_middleware(AsyncIO())
broker.add_middleware(GroupCallbacks(RedisBackend(url=os.environ["BACKEND_URL"])))
if PLACE != "nowhere":
    before = {"first": type(broker.middleware[0]), "amid": Retries, "last": None}[PLACE]
    broker.add_middleware(WaxellMiddleware(), before=before)
dramatiq.set_broker(broker)

def actor(**given):
    return dramatiq.actor(queue_name=QUEUE, **{"max_retries": 0, **given})

@actor()
def one(*_results):
    return 1

@actor()
def two(*_results):
    return 2

@actor()
def three(*_results):
    return 3

@actor()
def member():
    pass

@actor()
def together():
    child.send()

@actor()
def child():
    pass

@actor()
async def in_the_loop():
    child.send()
    with WaxellContext("block"):
        child.send()

@actor()
def told(*_what):
    pass

@actor(max_retries=2, on_failure="told", on_retry_exhausted="exhausted", **SOON)
def fails():
    child.send()
    raise ValueError("no")

@actor()
def exhausted(*_what):
    pass

@actor(on_success="told")
def later():
    pass

@actor()
@options(propagate="link")
def linked():
    child.send()

@actor()
@options(propagate="none")
def alone():
    pass

@actor(max_age=1000)
def aged():
    raise AssertionError

@actor(time_limit=1500)
def slow():
    print("it runs", flush=True)
    while not os.environ.get("STARTED_AGAIN"):
        time.sleep(0.05)

@actor()
def stuck():
    print("it runs", flush=True)
    if not os.environ.get("STARTED_AGAIN"):
        threading.Event().wait(600)

@actor(notify_shutdown=True)
def attentive():
    print("it runs", flush=True)
    while True:
        time.sleep(0.05)

def story():
    with WaxellContext("web", session_id="s", user_id="u", metadata={"plan": "gold"}) as run:
        run.set_tag("tenant", "acme")
        stages = [one.message(), two.message_with_options(delay=600), three.message_with_options(delay=600)]
        dramatiq.pipeline(stages).run(delay=600)
        second = member.message_with_options(delay=300, pipe_ignore=True)
        group = dramatiq.group([member.message(), dramatiq.pipeline([member.message(), second])])
        group.add_completion_callback(together.message())
        group.run()
        in_the_loop.send()
        fails.send()
        later.send_with_options(delay=900)
        linked.send()
        alone.send()
        return run.run_id

if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps({"run": story()}))
    else:
        message = dramatiq.Message(QUEUE, sys.argv[1], (), {}, json.loads(sys.argv[2]))
        print(json.dumps({"task": broker.enqueue(message).message_id}))
"""
DELAY_S = 0.6
DRIVER = load_driver(ROOT / "integrations" / "dramatiq" / "driver.py")
MODES = {mode.name: mode for mode in DRIVER.modes}


class Variation:
    """The driver, with this module's app and other arguments on the command line."""

    def __init__(self, arguments):
        self._arguments = arguments

    def __getattr__(self, name):
        return getattr(DRIVER, name)

    def command(self, mode, site, *, slots, recycle=False):
        command = DRIVER.command(mode, site, slots=slots, recycle=recycle)
        return ["app" if word == "scenarios" else word for word in command] + self._arguments


@pytest.fixture
def start(server, valkey, tmp_path):
    """Return a worker of this module's app."""
    app = tmp_path / "app"
    app.mkdir()
    (app / "app.py").write_text(APP)
    made = []

    def begin(broker=valkey, mode="threads", slots=2, arguments=(), **settings):
        own = {"BROKER_URL": broker, "BACKEND_URL": valkey, "WAXELL_API_URL": server.url} | settings
        worker = stage.make_worker(Variation(list(arguments)), MODES[mode], app, tmp_path, slots=slots, **own)
        made.append(worker)
        worker.start()
        return worker

    yield begin
    for worker in made:
        worker.stop()


def enqueue(worker, *arguments, **settings):
    """Enqueue from a script: the whole story, or one message by its actor's name, with options."""
    done = subprocess.run(
        [sys.executable, "app.py", *arguments],
        cwd=worker.folder,
        env=worker.environ(**settings),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ended(server, count, worker):
    """Wait for so many ended runs and return them."""
    return worker.wait(lambda: len(found := server.ended()) >= count and found, f"{count} ended runs")


def named(runs, name):
    """Return the runs of this name, earliest first."""
    return sorted((run for run in runs if run["agent_name"] == name), key=lambda run: run["at"])


STORY = {
    "web": 1,
    "one": 1,
    "two": 1,
    "three": 1,
    "member": 3,
    "together": 1,
    "in_the_loop": 1,
    "block": 1,
    "fails": 3,
    "told": 4,
    "exhausted": 1,
    "later": 1,
    "linked": 1,
    "alone": 1,
    "child": 7,
}
"""Each run of `story`, by name: what is sent by `together`, `in_the_loop`, each of `fails`, and `linked`."""


@pytest.mark.parametrize(
    ("transport", "mode", "place"),
    [
        ("valkey", "threads", "first"),
        ("valkey", "threads", "amid"),
        ("valkey", "threads", "last"),
        ("valkey", "processes", "last"),
        ("valkey", "gevent", "last"),
        ("rabbitmq", "threads", "first"),
        ("rabbitmq", "threads", "last"),
    ],
)
def test_one_story(start, server, request, transport, mode, place):
    """Pipelines, groups, callbacks, delays, retries and async actors make one tree, whatever the broker."""
    worker = start(broker=request.getfixturevalue(transport), mode=mode, slots=4, PLACE=place)
    web = enqueue(worker)["run"]
    runs = ended(server, sum(STORY.values()), worker)
    assert {name: len(named(runs, name)) for name in STORY} == STORY

    def parents(name):
        return [run["parent"] for run in named(runs, name)]

    def one(name):
        (run,) = named(runs, name)
        return run["run_id"]

    assert (one("web"), parents("web")) == (web, [""])
    assert (parents("one"), parents("two"), parents("three")) == ([web], [one("one")], [one("two")])
    *members, delayed = named(runs, "member")
    assert [run["parent"] for run in members] == [web, web]
    assert delayed["parent"] in [run["run_id"] for run in members]
    assert parents("together") == [delayed["run_id"]], "of who came last"
    attempts = [run["run_id"] for run in named(runs, "fails")]
    assert parents("fails") == [web] * 3
    assert parents("exhausted") == [attempts[-1]]
    assert sorted(parents("told")) == sorted([*attempts, one("later")])
    causes = [one("together"), one("in_the_loop"), one("block"), *attempts, one("linked")]
    assert sorted(parents("child")) == sorted(causes)
    assert parents("block") == [one("in_the_loop")]

    (linked,), (alone,) = named(runs, "linked"), named(runs, "alone")
    (seed,) = named(runs, "web")
    assert (linked["parent"], linked["root"]) == ("", linked["run_id"])
    assert linked["metadata"]["linked_run_id"] == web
    assert linked["metadata"]["linked_trace_id"] == seed["trace"]
    assert (alone["parent"], alone["session"], alone["tags"]) == ("", "", {})
    below = {run["run_id"] for run in named(runs, "child") if run["parent"] == linked["run_id"]}
    connected = [run for run in runs if run["run_id"] not in {*below, linked["run_id"], alone["run_id"]}]
    assert {(run["trace"], run["root"]) for run in connected} == {(seed["trace"], web)}
    assert {run["trace"] for run in runs if run["run_id"] in below} == {linked["trace"]}
    for run in [run for run in runs if run["run_id"] != alone["run_id"]]:
        assert (run["session"], run["user"]) == ("s", "u"), run["agent_name"]
        assert run["tags"] == {"tenant": "acme"}, run["agent_name"]
        assert run["metadata"]["plan"] == "gold", run["agent_name"]


@pytest.mark.parametrize("transport", ["valkey", "rabbitmq"])
def test_waits_and_attempts(start, server, request, transport):
    """A delay and a backoff are no waiting; each attempt knows the one before and what comes next."""
    worker = start(broker=request.getfixturevalue(transport), slots=4)
    enqueue(worker)
    runs = ended(server, sum(STORY.values()), worker)
    for name in ("one", "two", "three", "later"):
        (run,) = named(runs, name)
        facts = run["metadata"]
        (sent_by,) = [other for other in runs if other["run_id"] == run["parent"]]
        assert sent_by["at"] <= facts["enqueued_at"] < run["at"] - DELAY_S / 2, "it is the sender's"
        since = max(facts["enqueued_at"], facts["eta"])  # the client connects in between
        assert facts["wait_s"] == pytest.approx(run["at"] - since, abs=0.1), name
        assert "waits" not in facts
    attempts = named(runs, "fails")
    assert [run["metadata"]["attempt"] for run in attempts] == [1, 2, 3]
    ids = [run["run_id"] for run in attempts]
    assert [run["metadata"].get("previous_run_id") for run in attempts] == [None, *ids[:-1]]
    assert [run["status"] for run in attempts] == ["retry", "retry", "error"]
    said = [run["reason"].rpartition(" in ")[0] for run in attempts]
    assert said == ["retry: attempt 2 of 3", "retry: attempt 3 of 3", ""]
    for run in attempts[1:]:
        assert run["metadata"]["wait_s"] == pytest.approx(run["at"] - run["metadata"]["eta"], abs=0.1)


def test_a_sender_without_the_middleware(start, server):
    """What anybody sends has waited since it was made, and its attempts are one story of its own."""
    worker = start()
    task = enqueue(worker, "fails", "{}", PLACE="nowhere")["task"]
    eta = {"eta": int(time.time() * 1000) + 1000}
    delayed = enqueue(worker, "later", json.dumps(eta), PLACE="nowhere")["task"]
    runs = ended(server, 3 + 3 + 3 + 1 + 2, worker)
    attempts = [run for run in named(runs, "fails") if run["task_id"] == task]
    ids = [run["run_id"] for run in attempts]
    assert [run["parent"] for run in attempts] == [""] * 3
    assert {run["root"] for run in attempts} == {ids[0]}
    assert len({run["trace"] for run in attempts}) == 1
    assert [run["metadata"].get("previous_run_id") for run in attempts] == [None, *ids[:-1]]
    (later,) = named(runs, "later")
    assert later["task_id"] == delayed
    since = max(later["metadata"]["enqueued_at"], later["metadata"]["eta"])  # a busy script may be late
    assert later["metadata"]["wait_s"] == pytest.approx(later["at"] - since, abs=0.1)


def test_how_they_end_in_words(start, server):
    """Age limit, time limit, and an actor that nobody has here."""
    worker = start()
    old = enqueue(worker, "aged", json.dumps({"max_age": 1}))["task"]
    slow = enqueue(worker, "slow", "{}")["task"]
    unknown = enqueue(worker, "nobody", "{}")["task"]
    runs = {run["task_id"]: run for run in ended(server, 3, worker)}
    assert runs[old]["status"] == "rejected"
    assert runs[old]["reason"] == "rejected: older than its age limit of 0.001 s"
    assert (runs[slow]["status"], runs[slow]["reason"]) == ("error", "error: time limit of 1.5 s")
    assert runs[slow]["error"].startswith("dramatiq.middleware.time_limit.TimeLimitExceeded")
    assert runs[unknown]["status"] == "rejected"
    assert runs[unknown]["reason"] == "rejected: no actor of this name in this worker"


@pytest.mark.parametrize(
    ("actor", "reason"),
    [
        ("attentive", "interrupted: the worker was told to stop"),
        ("stuck", "interrupted: the worker did not wait for it any longer"),
    ],
)
def test_how_a_stop_ends_them_in_words(start, server, actor, reason):
    """An actor that is told of the stop, and one that outlasts `--worker-shutdown-timeout`."""
    worker = start(arguments=["--worker-shutdown-timeout", "1000"])
    enqueue(worker, actor, "{}")
    worker.wait(lambda: "it runs" in worker.text, "the actor")
    worker.terminate()
    (run,) = ended(server, 1, worker)
    assert (run["status"], run["reason"]) == ("interrupted", reason)


def test_a_message_that_is_delivered_again(start, server, rabbitmq):
    """A worker that is killed says nothing; the next one has the same attempt once more."""
    worker = start(broker=rabbitmq)
    task = enqueue(worker, "stuck", "{}")["task"]
    worker.wait(lambda: "it runs" in worker.text, "the actor")
    await_(lambda: [run for run in server.runs() if run["task_id"] == task], "the run")
    worker.kill_tree()
    worker.start(STARTED_AGAIN="1")
    first, second = named(ended(server, 2, worker), "stuck")
    assert (first["status"], second["status"]) == ("killed", "success")
    assert first["reason"] == "killed: the process died without a word"
    assert [run["metadata"]["attempt"] for run in (first, second)] == [1, 1]
    assert [run["metadata"].get("redelivered", False) for run in (first, second)] == [False, True]
    assert [run["task_id"] for run in (first, second)] == [task] * 2
    group = server.get(f"/api/tasks/{task}")
    assert (group["attempts"], group["deliveries"], group["final_state"]) == (1, 2, "success")
