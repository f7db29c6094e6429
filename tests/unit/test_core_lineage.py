"""Lineage: what a message carries, what is believed of it, and what a run has from the one above it."""

from __future__ import annotations

import datetime
import decimal
import itertools
import json
import math
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from opentelemetry.trace import NonRecordingSpan, SpanContext, use_span

from tests.faults.interrupting import sweep
from waxell_workers import WaxellContext, get_context, redact_texts
from waxell_workers.core import collector as collecting
from waxell_workers.core import encoding, lineage, tasks, travelling
from waxell_workers.core.errors import ConfigError
from waxell_workers.core.records import RunEnded, RunStarted
from waxell_workers.core.runs import MUTED, Run
from waxell_workers.core.values import PROPAGATION

Header = dict[str, Any]


@contextmanager
def executed(message: Header, name: str = "job", **options: Any) -> Iterator[Run]:
    """Execute a task that has come with this message."""
    task = tasks.Task("celery", name, f"id of {name}", queue="q", message=message)
    attempt = tasks.prepare(task, tasks.Options(**options))
    tasks.begin(attempt)
    yield attempt.run
    tasks.close(attempt, "success")


def sent() -> Header:
    """Enqueue here: over JSON, as most brokers have it."""
    message: Header = json.loads(json.dumps(lineage.outgoing({})))
    return message


def runs(records: Any) -> dict[str, RunStarted]:
    return {run.agent_name: run for run in records(RunStarted)}


# -- what comes in is anybody's ----------------------------------------------------------------


class Hostile:
    """Whose every question is answered by failing."""

    def _fail(self, *_: object, **__: object) -> Any:
        raise AssertionError("code of the user's ran")

    __eq__ = __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = __str__ = __int__ = _fail
    __float__ = __lt__ = __le__ = __gt__ = __ge__ = __call__ = __getattr__ = get = keys = items = _fail
    __hash__ = object.__hash__


class Words(str):
    __eq__ = __getitem__ = __len__ = __iter__ = __str__ = Hostile._fail
    __hash__ = str.__hash__


class Dict(dict):  # type: ignore[type-arg]
    __eq__ = __getitem__ = __len__ = __iter__ = get = keys = items = Hostile._fail
    __hash__ = object.__hash__  # type: ignore[assignment]


HOSTILE = st.one_of(
    st.builds(Hostile),
    st.builds(Words, st.just("x")),
    st.builds(Dict, st.just([("run", "r")])),
    st.just(Hostile),
    st.builds(object),
    st.binary(),
    st.complex_numbers(),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**60, max_value=2**4000),
    st.floats(),
    st.text(),
    st.text(alphabet="\ud800\udfff\x00ü"),
    st.just("é" * 5000),
    st.dates(),
    st.decimals(),
    st.uuids(),
    HOSTILE,
)
KEYS = st.one_of(st.text(), st.just("k" * 300), st.integers(), st.just("\ud800"), st.just("ü" * 200))
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4), st.tuples(inner)
    ),
    max_leaves=12,
)
FIELDS = (
    *("enqueued_at", "run", "root", "trace", "previous", "mode", "session", "user", "user_group"),
    *("tags", "metadata", "own_root", "own_trace"),
)
OWN = st.dictionaries(st.sampled_from(FIELDS), ANYTHING)
MESSAGES = st.dictionaries(st.sampled_from(["waxell", "traceparent", "tracestate"]), st.one_of(OWN, ANYTHING))


@given(MESSAGES)
@settings(max_examples=300, deadline=None)
def test_nothing_that_comes_in_raises_or_runs_code(message: Header) -> None:
    """Given anything as our headers, each field is what it should be, or as if it were not there."""
    carried = lineage.incoming(message)
    assert carried.enqueued_at is None or 0 <= carried.enqueued_at < 1e11
    texts = [carried.run_id, carried.root_run_id, carried.trace_id, carried.previous_run_id]
    texts += [carried.session_id, carried.user_id, carried.user_group]
    assert all(type(text) is str and len(text) <= 1000 for text in texts)
    assert carried.mode in PROPAGATION
    for values in (carried.tags, carried.metadata):
        assert type(values) is dict
        msgspec.json.encode(values)


@given(MESSAGES)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_task_begins_whatever_its_message_says(configure: Any, message: Header) -> None:
    """Nor does the whole way of a task raise, down to the line in the journal; and it can enqueue."""
    configure(api_url="")
    with executed(message) as run:
        assert run.run_id != MUTED
        plain(lineage.outgoing({}))


@pytest.mark.parametrize(
    ("field", "value", "attribute", "kept"),
    [
        ("run", "r-1", "run_id", "r-1"),
        ("run", "", "run_id", ""),
        ("run", " r-1", "run_id", ""),
        ("run", "x" * 201, "run_id", ""),
        ("run", "a\nb", "run_id", ""),
        ("root", ["r"], "root_run_id", ""),
        ("trace", "a" * 32, "trace_id", "a" * 32),
        ("trace", "A" * 32, "trace_id", ""),
        ("trace", "0" * 32, "trace_id", ""),
        ("trace", MUTED, "trace_id", ""),
        ("own_root", {}, "own_root_run_id", ""),
        ("own_trace", "a" * 33, "own_trace_id", ""),
        ("enqueued_at", 5, "enqueued_at", 5.0),
        ("enqueued_at", True, "enqueued_at", None),
        ("enqueued_at", -1, "enqueued_at", None),
        ("enqueued_at", "5", "enqueued_at", None),
        ("enqueued_at", math.nan, "enqueued_at", None),
        ("enqueued_at", math.inf, "enqueued_at", None),
        ("enqueued_at", 10**400, "enqueued_at", None),
        ("mode", "link", "mode", "link"),
        ("mode", "child", "mode", "parent"),
        ("session", 7, "session_id", ""),
        ("session", "s" * 2000, "session_id", "s" * 1000),
        ("tags", ["a"], "tags", {}),
        ("tags", {"a": {"b": [1]}}, "tags", {"a": {"b": [1]}}),
        ("metadata", "text", "metadata", {}),
    ],
)
def test_each_field_by_itself(field: str, value: object, attribute: str, kept: object) -> None:
    """What is not as it should be is left out, and the rest counts all the same."""
    carried = lineage.incoming({"waxell": {"user": "u-1", "previous": "p-1", field: value}})
    assert getattr(carried, attribute) == kept
    assert (carried.user_id, carried.previous_run_id) == ("u-1", "p-1")


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_an_object_of_the_user_s(field: str) -> None:
    """One that a pickled message brings: it is not asked anything."""
    assert lineage.incoming({"waxell": {field: Hostile()}}).run_id == ""


@pytest.mark.parametrize("found", [None, "text", 7, [], ["waxell"], b"x", Hostile(), Dict(run="r")], ids=type)
def test_somebody_else_s_header_of_our_name_is_none(found: object) -> None:
    """Another type than ours, in a message that comes in and in one that goes out."""
    assert lineage.incoming({"waxell": found}) == lineage.Carried()
    assert set(lineage.outgoing({"waxell": found})["waxell"]) == {"enqueued_at"}


# -- what goes out is plain, and small ---------------------------------------------------------


def plain(message: Header) -> None:
    """Claim that every broker and serializer takes what a message is to carry."""
    assert json.loads(json.dumps(message, allow_nan=False)) == message
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message)) == message
    pytest.importorskip("amqp.serialization").dumps("F", [message])
    # Three texts of 1000 characters, tags and metadata of 4096 bytes each, ids and times.
    assert len(msgspec.json.encode(message)) < 3 * 4000 + 2 * 4096 + 1000


@given(st.lists(st.tuples(KEYS, ANYTHING), max_size=5), ANYTHING, ANYTHING, st.dictionaries(KEYS, ANYTHING))
@example([("\ud800", "\ud800"), ("k" * 300, 1), ("ü" * 200, 1)], "\ud800", 2**64, {})
@example([("huge", 2**64), ("deep", [{"k" * 300: 1}])], 10**5000, "é" * 5000, {"n": math.nan})
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whatever_a_run_has_what_it_sends_is_plain_and_bounded(
    configure: Any, tags: list[tuple[str, Any]], session: Any, user: Any, metadata: dict[str, Any]
) -> None:
    """Given anything as tags, metadata, session and user, enqueuing never fails, and no broker refuses it."""
    configure(api_url="")
    with WaxellContext("a", session_id=session, user_id=user, metadata=metadata) as run:
        for key, value in tags:
            run.set_tag(key, value)
            run.set_metadata(key, value)
        message = lineage.outgoing({})
        with executed(message):
            plain(lineage.outgoing({}))
    plain(message)


def test_times_and_decimals_travel_as_texts(records: Any) -> None:
    """What JSON has no word for travels as it is written: a serializer of the broker's need not know it."""
    moment = datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)
    number = uuid.UUID(int=7)
    with WaxellContext("a") as run:
        run.set_tag("at", moment)
        run.set_tag("price", decimal.Decimal("1.20"))
        run.set_tag("id", number)
        run.set_tag("nan", math.nan)
        tags = lineage.outgoing({})["waxell"]["tags"]
    assert tags == {"at": "2026-01-02T00:00:00Z", "price": "1.20", "id": str(number), "nan": None}


def test_what_is_too_much_stays_at_home(records: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """A value that does not fit, or that some broker cannot say, is left out alone; it is said once."""
    monkeypatch.setattr(travelling, "_said", [])
    with WaxellContext("a") as run:
        for number in range(10):
            run.set_tag(f"big {number}", "x" * 1500)
        run.set_tag("long" * 100, 1)
        run.set_tag("huge", 2**70)
        run.set_tag("tenant", "acme")
        tags = sent()["waxell"]["tags"]
        sent()
    assert set(tags) == {"big 0", "big 1", "tenant"}
    assert caplog.text.count("do not travel") == 1


def test_a_run_that_is_given_any_number_of_tags_stays_small(records: Any) -> None:
    """Given a run that lives for days, setting a tag and enqueuing cost what they did at first."""
    with WaxellContext("a", metadata={str(number): number for number in range(5000)}) as run:
        for number in range(5000):
            run.set_tag(f"tag {number}", number)
            run.set_metadata(f"field {number}", number)
        run.set_tag("tag 0", "changed")
        own = sent()["waxell"]
    assert len(run.tags or {}) <= travelling.MOST
    assert own["tags"]["tag 0"] == "changed"
    assert min(len(own["tags"]), len(own["metadata"])) > 100


def test_what_is_too_much_does_not_go_on_to_nested_runs(records: Any) -> None:
    """The journal has a large document once, not again with each run that is begun inside."""
    with WaxellContext("a", metadata={"document": ["x" * 1500] * 100, "tenant": "acme"}) as outer:
        outer.set_tag("large", ["y" * 1500] * 100)
        outer.set_tag("small", 1)
        with WaxellContext("b"), WaxellContext("c"):
            pass
    for name in ("b", "c"):
        assert runs(records)[name].ambient == {"tenant": "acme"}
        assert runs(records)[name].tags == {"small": 1}


class Key(str):
    """A user's own class of texts, as frameworks have them."""


@pytest.mark.parametrize("value", [uuid.UUID(int=7), Key("k-1"), 12], ids=["uuid", "subclass", "int"])
def test_an_id_of_another_type_travels_as_it_is_recorded(records: Any, value: Any) -> None:
    """A user's primary key is often a UUID: the task is as much theirs as the request was."""
    with WaxellContext("web", session_id=value, user_id=value, user_group=value):
        message = sent()
    with executed(message):
        pass
    for run in runs(records).values():
        assert (run.session_id, run.user_id, run.user_group) == (str(value),) * 3


def test_tags_that_another_thread_sets_meanwhile(records: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own metadata may change while it is looked at: enqueuing never fails for it."""
    metadata: dict[str, Any] = {"a": 1, "b": 2}

    def reduce_and_change(value: object) -> Any:
        metadata[f"new {len(metadata)}"] = 1
        return encoding.reduce(value)

    monkeypatch.setattr(travelling, "reduce", reduce_and_change)
    with WaxellContext("a", metadata=metadata):
        assert sent()["waxell"]["metadata"] == {"a": 1, "b": 2}


# -- what travels ------------------------------------------------------------------------------


def test_for_whom_it_is_travels_through_contexts_and_messages(records: Any) -> None:
    """Session, user, group, tags and metadata: to nested runs, over the header, and on from there; the
    nearest counts."""
    with WaxellContext(
        "web", "flow", {"secret": 1}, {"plan": "pro", "n": 1}, "s-1", "u-1", user_group="g"
    ) as web:
        web.set_tag("tenant", "acme")
        with WaxellContext("step", metadata={"n": 2}, user_id="u-2") as step:
            step.set_tag("step", 1)
            step.set_metadata("k", [1])
            message = sent()
    with executed(message, "child") as child:
        child.set_tag("tenant", "other")
        message = sent()
    with executed(message, "grandchild"):
        pass
    found = runs(records)
    assert found["step"].ambient == {"plan": "pro", "n": 1}
    assert found["step"].metadata == {"n": 2}
    own = {"plan": "pro", "n": 2, "k": [1]}
    for name, tags in (
        ("child", {"tenant": "acme", "step": 1}),
        ("grandchild", {"tenant": "other", "step": 1}),
    ):
        run = found[name]
        assert (run.session_id, run.user_id, run.user_group) == ("s-1", "u-2", "g")
        assert (run.tags, run.ambient, run.inputs) == (tags, own, {})
        assert not own.keys() & run.metadata.keys(), "what an adapter tells of its task is that alone"
        assert (run.root_run_id, run.trace_id) == (found["web"].run_id, found["web"].trace_id)
    assert found["child"].parent_run_id == found["step"].run_id
    assert found["grandchild"].parent_run_id == found["child"].run_id


def test_what_is_set_after_the_enqueue_does_not_travel(records: Any) -> None:
    """A message is as the run was when it was enqueued; so is a nested run."""
    with WaxellContext("a") as run:
        run.set_tag("before", 1)
        message = sent()
        with WaxellContext("nested"):
            run.set_tag("after", 1)
            run.set_metadata("after", 1)
    with executed(message, "child"):
        pass
    assert (runs(records)["child"].tags, runs(records)["child"].ambient) == ({"before": 1}, {})
    assert (runs(records)["nested"].tags, runs(records)["nested"].ambient) == ({"before": 1}, {})


def test_redact_sees_what_a_task_has_from_outside(configure: Any, records: Any) -> None:
    """Tags and ambient metadata of a task's run are content, unlike what its adapter tells of it."""
    with WaxellContext("a", metadata={"mail": "anna@example.com"}) as run:
        run.set_tag("who", "anna@example.com")
        message = sent()
    configure(redact=redact_texts(lambda text: text.replace("anna", "***").replace("q", "***")))
    with executed(message, "child"):
        pass
    child = runs(records)["child"]
    assert (child.tags, child.ambient) == ({"who": "***@example.com"}, {"mail": "***@example.com"})
    assert child.metadata["queue"] == "q"


# -- who is whose child ------------------------------------------------------------------------


def test_runs_that_are_not_recorded_keep_the_chain_connected(records: Any) -> None:
    """A task, and a block, that are left out stand aside: parent, root, trace, tags and metadata go past."""
    with WaxellContext("root", session_id="s-1") as root:
        root.set_tag("tenant", "acme")
        message = sent()
    with executed(message, "secret job") as secret:
        assert secret.is_muted
        secret.set_tag("own", 1)
        message = sent()
        assert message["traceparent"].split("-")[1] == root.trace_id
        with WaxellContext("inside"):
            pass
    with executed(message, "child"), WaxellContext("secret block"), WaxellContext("secret too"):
        with WaxellContext("inner"):
            pass
        message = sent()
    with executed(message, "grandchild"):
        pass
    found = runs(records)
    assert set(found) == {"root", "inside", "child", "inner", "grandchild"}
    parents = {name: run.parent_run_id for name, run in found.items()}
    assert parents["inside"] == parents["child"] == root.run_id
    assert parents["inner"] == parents["grandchild"] == found["child"].run_id
    assert {(run.root_run_id, run.trace_id, run.session_id) for run in found.values()} == {
        (root.run_id, root.trace_id, "s-1")
    }
    assert found["inside"].tags == found["grandchild"].tags == {"tenant": "acme", "own": 1}


@pytest.mark.parametrize("parent", [None, "order-1"])
def test_a_run_that_is_not_recorded_is_never_named(records: Any, parent: str | None) -> None:
    """At the top of all, or below an id of the user's own: its stand-in id is in no record and no message."""
    with WaxellContext("secret", parent_run_id=parent):
        message = lineage.outgoing({})
        with WaxellContext("inner"):
            pass
    with executed(message, "child"):
        pass
    assert MUTED not in json.dumps(message)
    for run in runs(records).values():
        assert run.parent_run_id == (parent or "")
        assert run.root_run_id == (parent or run.run_id)
        assert len(run.trace_id) == 32


def test_headers_that_are_copied_have_a_new_parent(records: Any) -> None:
    """A user who hands on all headers of his task's message: the new one is this run's child, no sibling."""
    with WaxellContext("first", session_id="s-1"):
        first = sent()
    with executed(first, "second") as second:
        copied = lineage.outgoing({**first, "own": 1})
    assert copied["waxell"]["run"] == second.run_id
    assert "own" not in copied
    assert first["waxell"]["run"] != second.run_id, "what was handed in stays as it is"


def test_what_is_sent_on_by_nobody_keeps_its_parent(records: Any) -> None:
    """A delay that is over, or a worker that requeues, outside any run: only the time is new."""
    with WaxellContext("first") as first:
        message = lineage.outgoing({})
    message["waxell"]["enqueued_at"] = 1.0
    message["waxell"]["attempt"] = 2
    again = lineage.outgoing(message)
    assert again["waxell"]["enqueued_at"] > 1.0
    assert again["waxell"] | {"enqueued_at": 1.0} == message["waxell"]
    assert again["waxell"]["run"] == first.run_id
    assert "traceparent" not in again


def test_a_task_that_is_sent_again_keeps_its_parent(records: Any) -> None:
    """A retry is its predecessor's sibling, and says which that was; so, too, the one after it."""
    with WaxellContext("enqueues") as outer:
        message = sent()
    previous = []
    for _ in range(3):
        with executed(message, "job") as run:
            run.set_tag("attempt's own", 1)
            message = {**message, **lineage.outgoing(message, again=True)}
            previous.append(run.run_id)
    attempts = records(RunStarted)[1:]
    assert [run.run_id for run in attempts] == previous
    assert {(run.parent_run_id, run.root_run_id, run.trace_id) for run in attempts} == {
        (outer.run_id, outer.run_id, outer.trace_id)
    }
    assert [run.metadata.get("previous_run_id") for run in attempts] == [None, *previous[:2]]
    assert [run.tags for run in attempts] == [{}, {}, {}]


def test_a_root_s_retry_keeps_root_and_trace(records: Any) -> None:
    """A task that nobody's run has enqueued: its attempts are one story all the same."""
    message: Header = sent()
    for _ in range(3):
        with executed(message, "job"):
            message = {**message, **lineage.outgoing(message, again=True)}
    first, second, third = records(RunStarted)
    assert [run.parent_run_id for run in (first, second, third)] == ["", "", ""]
    assert second.root_run_id == third.root_run_id == first.run_id
    assert first.trace_id == second.trace_id == third.trace_id
    assert third.metadata["previous_run_id"] == second.run_id


@pytest.mark.parametrize("mode", ["link", "none"])
def test_the_attempts_of_what_is_not_a_child_are_one_story(configure: Any, records: Any, mode: str) -> None:
    """A task that is linked, or connected with nothing: root and trace are the first attempt's."""
    configure(propagate=mode)
    with WaxellContext("enqueues", session_id="s-1") as outer:
        message: Header = sent()
    for _ in range(3):
        with executed(message, "job"), WaxellContext("a block inside"):
            message = {**message, **lineage.outgoing(message, again=True)}
    attempts = [run for run in records(RunStarted) if run.agent_name == "job"]
    assert {run.root_run_id for run in attempts} == {attempts[0].run_id}
    assert len({run.trace_id for run in attempts} | {outer.trace_id}) == 2
    assert {run.parent_run_id for run in attempts} == {""}
    linked = (outer.run_id, outer.trace_id) if mode == "link" else (None, None)
    for run in attempts:
        assert (run.metadata.get("linked_run_id"), run.metadata.get("linked_trace_id")) == linked


def test_an_attempt_that_is_not_recorded_is_nobody_s_predecessor(records: Any) -> None:
    """A retry of a task that is left out: its message goes on as it came."""
    message = sent()
    with executed(message, "secret job"):
        again = lineage.outgoing(message, again=True)["waxell"]
    assert again.keys() == {"enqueued_at"}


@pytest.mark.parametrize("sender", PROPAGATION)
@pytest.mark.parametrize("receiver", PROPAGATION)
@pytest.mark.parametrize("option", [None, *PROPAGATION])
def test_how_a_task_is_connected(
    configure: Any, records: Any, sender: str, receiver: str, option: str | None
) -> None:
    """The task's own option counts; without one, of the sender's and the receiver's settings the one that
    connects less. What the sender has not sent, no option brings back."""
    configure(propagate=sender)
    with WaxellContext("enqueues", session_id="s-1") as outer:
        message = sent()
    configure(propagate=receiver)
    with executed(message, "child", propagate=option):
        pass
    child = runs(records)["child"]
    mode = option or max(sender, receiver, key=PROPAGATION.index)
    has_lineage = sender != "none" and mode != "none"
    assert child.parent_run_id == (outer.run_id if has_lineage and mode == "parent" else "")
    assert (child.trace_id == outer.trace_id) == (has_lineage and mode == "parent")
    assert child.session_id == ("s-1" if has_lineage else "")
    assert child.metadata.get("linked_run_id") == (outer.run_id if has_lineage and mode == "link" else None)
    assert child.metadata.get("linked_trace_id") == (
        outer.trace_id if has_lineage and mode == "link" else None
    )
    assert child.metadata["wait_s"] >= 0, "waiting is measured in every mode"


@pytest.mark.parametrize("mode", [*PROPAGATION, "nonsense"])
def test_the_environment_of_a_process_that_only_enqueues_counts(monkeypatch: Any, mode: str) -> None:
    """Nothing is configured there, and the current span is no run of ours: it is handed on, or not."""
    monkeypatch.setattr(collecting, "_collector", None)
    monkeypatch.setenv("WAXELL_PROPAGATE", mode)
    span = NonRecordingSpan(SpanContext(0xAB, 0xCD, is_remote=False))
    with use_span(span):
        message = sent()
    assert message["waxell"].get("mode") == (mode if mode in ("link", "none") else None)
    assert ("traceparent" in message) == (mode != "none")
    assert collecting.configured() is None


def test_a_task_that_is_no_child_has_nothing_of_the_run_around_it(records: Any) -> None:
    """`none` and `link` hold for a task that runs inside another, too: an eager one."""
    with executed(sent(), "outer") as outer:
        outer.set_tag("tenant", "acme")
        for mode in ("none", "link"):
            task = tasks.Task("celery", mode, f"t-{mode}", message=lineage.outgoing({}), nested=True)
            attempt = tasks.prepare(task, tasks.Options(propagate=mode))
            tasks.begin(attempt)
            tasks.close(attempt, "success")
    found = runs(records)
    assert (found["none"].parent_run_id, found["none"].tags) == ("", {})
    assert (found["link"].parent_run_id, found["link"].tags) == ("", {"tenant": "acme"})


def test_an_origin_is_asked_only_where_it_is_needed(configure: Any, records: Any) -> None:
    """Outside any run, for a message of one's own, which is to be connected."""
    asked = []
    made = Run(collecting.current(), "origin", parent_run_id="")
    made.connect()

    def origin() -> Run:
        asked.append(1)
        return made

    lineage.origin.set(origin)
    try:
        lineage.outgoing({"waxell": {"enqueued_at": 1.0}})
        with WaxellContext("own"):
            lineage.outgoing({})
        configure(propagate="none")
        lineage.outgoing({})
        assert asked == []
        configure()
        assert lineage.outgoing({})["waxell"]["run"] == made.run_id
        assert asked == [1]
    finally:
        lineage.origin.set(None)


def test_switched_off_there_is_no_header(configure: Any) -> None:
    """`observe=False`: a message goes as the user has written it."""
    configure(observe=False)
    with WaxellContext("a"):
        assert lineage.outgoing({"own": 1}) == {}
        assert lineage.outgoing({"own": 1}, again=True) == {}


@pytest.mark.parametrize(
    "given",
    [{"flush_timeout": "soon"}, {"flush_timeout": -1}, {"flush_timeout": math.nan}, {"agent_name": 1}],
)
def test_a_choice_that_cannot_be_is_refused_where_it_is_made(given: Any) -> None:
    """Not at the end of a task, which could only fail for it."""
    with pytest.raises(ConfigError, match=next(iter(given))):
        tasks.options(**given)


def test_a_timeout_may_be_said_as_in_the_environment(records: Any) -> None:
    """As text; the task's end does not fail for it."""

    @tasks.options(flush="task", flush_timeout="0")  # type: ignore[arg-type]
    def marked() -> None: ...

    attempt = tasks.prepare(tasks.Task("celery", "job", "t-1"), tasks.options_of(marked))
    tasks.begin(attempt)
    tasks.task_ended(attempt, "success")
    assert [end.state for end in records(RunEnded)] == ["success"]


# -- attempts that never began -----------------------------------------------------------------


def never_began(message: Header, name: str = "job") -> None:
    task = tasks.Task("celery", name, "t-1", attempt=2, message=message, facts={"schedule": "nightly"})
    tasks.never_began(task, tasks.Options(), "revoked", "revoked before start", "TaskRevokedError")


def test_an_attempt_that_never_began_is_a_run_all_the_same(records: Any) -> None:
    """With its parent, its reason and its facts, and without a wait, which nobody knows."""
    with WaxellContext("enqueues", session_id="s-1") as outer:
        message = sent()
    never_began(message)
    run, end = runs(records)["job"], records(RunEnded)[-1]
    assert (run.parent_run_id, run.trace_id, run.session_id) == (outer.run_id, outer.trace_id, "s-1")
    assert (run.metadata["attempt"], run.metadata["schedule"]) == (2, "nightly")
    assert "wait_s" not in run.metadata
    assert "enqueued_at" in run.metadata
    assert (end.run_id, end.state, end.reason) == (run.run_id, "revoked", "revoked before start")
    assert end.error_type == "TaskRevokedError"


def test_an_attempt_that_never_began_disturbs_nobody(configure: Any, records: Any) -> None:
    """Not the run that is current where it is told, which is not its parent; nothing where nothing is
    recorded."""
    with WaxellContext("other") as other:
        never_began({})
        never_began({}, "secret job")
        assert get_context() is other
    assert {name: run.parent_run_id for name, run in runs(records).items()} == {"other": "", "job": ""}
    configure(api_url="")
    never_began({})
    assert collecting.current().journal.dropped == {}


# -- interrupts --------------------------------------------------------------------------------


class Interrupted(BaseException):
    """A framework's."""


def strike() -> None:
    raise Interrupted


def test_a_run_whose_start_is_interrupted_is_one_run(records: Any) -> None:
    """Given a start that an interrupt hits at any instruction, when it is called again, then there is one
    run, with the parent, root, trace, tags and metadata that it would have had."""
    struck = 0
    numbers = itertools.count()
    with WaxellContext("outer", metadata={"plan": "pro"}, session_id="s-1") as outer:
        outer.set_tag("tenant", "acme")

        def start(interrupt: Any) -> None:
            collector = collecting.current()
            run = Run(collector, f"inner {next(numbers)}", metadata={"n": 1}, tags={"own": 1})
            try:
                with interrupt:
                    run.start()
            except Interrupted:
                run.start()
            run.end()

        for _ in sweep(strike, start):
            struck += 1
    assert struck > 50
    inner = {run.run_id: run for run in records(RunStarted) if run.run_id != outer.run_id}
    assert len(inner) == len({run.agent_name for run in inner.values()}) == struck + 1
    for run in records(RunStarted):
        if run.run_id in inner:
            assert (run.parent_run_id, run.root_run_id, run.trace_id) == (
                outer.run_id,
                outer.run_id,
                outer.trace_id,
            )
            assert (run.tags, run.ambient) == ({"tenant": "acme", "own": 1}, {"plan": "pro"})
            assert run.session_id == "s-1"


# -- ends that nobody has told -----------------------------------------------------------------


def begun(name: str) -> tasks.Attempt:
    attempt = tasks.prepare(tasks.Task("celery", name, f"id of {name}"), tasks.Options())
    tasks.begin(attempt)
    return attempt


def left_on_a_slot() -> None:
    begun("left")
    tasks.close(begun("next"), "success")


def left_in_a_thread() -> None:
    thread = threading.Thread(target=begun, args=("left",))
    thread.start()
    thread.join()


def left_in_a_process() -> None:
    attempt = begun("left")
    tasks.pool_process_stopping()
    attempt.run.leave_all()


def left_in_a_block() -> None:
    run = WaxellContext("left")
    leave = run.__exit__
    run.__enter__()
    assert callable(leave)
    del leave


@pytest.mark.parametrize("left", [left_on_a_slot, left_in_a_thread, left_in_a_process, left_in_a_block])
def test_a_run_that_nobody_ends_says_why_it_ended(records: Any, left: Callable[[], None]) -> None:
    """An interrupt may take away the one who would have ended it: no error tells why, so that we do."""
    left()
    [run_id] = {run.run_id for run in records(RunStarted) if run.agent_name == "left"}
    [end] = [end for end in records(RunEnded) if end.run_id == run_id]
    assert (end.state, end.error_type) == ("interrupted", "")
    assert end.reason.startswith("interrupted: ")
