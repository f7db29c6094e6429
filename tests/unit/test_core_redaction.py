"""`redact`: what it is handed, what becomes of what it returns, and what is cut after it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from billiard.exceptions import SoftTimeLimitExceeded

import waxell_workers
from waxell_workers import WaxellContext, redact_texts
from waxell_workers.core import collector as collecting
from waxell_workers.core import redaction
from waxell_workers.core.encoding import MAX_LINE, SHORT
from waxell_workers.core.records import STATES, LLMCall, Record, RunStarted
from waxell_workers.core.tasks import Options, Task, begin, prepare, task_ended
from waxell_workers.testing import record_runs

FAILED = "[redaction failed]"
MARK = "hunter2"


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each test hear what is said once."""
    monkeypatch.setattr(redaction, "_failed", set())


def captured(**fields: Any) -> None:
    """Hand over a call as capture does."""
    collecting.current().record_call(**{"model": "m", **fields})


def everything() -> None:
    """Make a record of each kind, with content in each place."""
    with WaxellContext("a", inputs={"q": MARK}, metadata={"m": MARK}) as run:
        run.record_llm_call(
            model="m",
            tokens_in=3,
            prompt_preview=MARK,
            response_preview=MARK,
            messages=[{"role": "user", "text": MARK}],
            tool_calls=[{"name": "look", "id": "1", "arguments": MARK}],
            error_message=MARK,
            metadata={"m": MARK},
        )
        run.record_step("step", {"deep": [MARK]})
        run.set_tag("tag", MARK)
        run.set_metadata("key", MARK)
        run.set_result(MARK)
    with pytest.raises(ValueError, match=MARK), WaxellContext("b"):
        raise ValueError(MARK)


# -- what it is handed -------------------------------------------------------------------------------


def test_redact_sees_each_record_as_plain_data() -> None:
    """Each record passes through it, as a dict that has all the fields of its kind and that JSON can say."""
    seen: list[dict[str, Any]] = []

    def note(record: dict[str, Any]) -> dict[str, Any]:
        seen.append(json.loads(json.dumps(record)))
        return record

    with record_runs(redact=note):
        everything()
        captured(prompt=MARK)
        collecting.current().record(waxell_workers.core.records.TaskLost, task_id="t", reason="killed")
    kinds = [record["kind"] for record in seen]
    assert kinds == [
        *("run_started", "llm_call", "step", "run_updated", "run_updated", "run_ended"),
        *("run_started", "run_ended", "llm_call", "task_lost"),
    ]
    fields = {kind.__struct_config__.tag: {"kind", *kind.__struct_fields__} for kind in Record.__args__}
    assert all(set(record) == fields[record["kind"]] for record in seen)
    assert seen[1]["prompt"] == MARK
    assert seen[1]["messages"] == [{"role": "user", "text": MARK}]


class Asked(dict):  # type: ignore[type-arg]
    __len__ = __iter__ = __getitem__ = __repr__ = items = keys = values = get = property(
        lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
    )


def test_redact_is_handed_no_object_of_the_users() -> None:
    """What a user hands over is plain data by then: nobody's methods run, and the user's value stays."""
    given = {"when": object(), "items": (1, {2}), "own": Asked(a=MARK)}

    def change(record: dict[str, Any]) -> dict[str, Any]:
        if record["kind"] == "step":
            assert type(record["output"]["own"]) is dict
            record["output"]["items"].append("more")
            record["output"]["own"]["a"] = "gone"
        return record

    with record_runs(redact=change) as runs, WaxellContext("a") as run:
        run.record_step("s", given)
    output = runs.one().steps[0].output
    assert output == {"when": "<builtins.object>", "items": [1, [2], "more"], "own": {"a": "gone"}}
    assert given["items"] == (1, {2})


def test_bytes_are_told_by_their_number_alone() -> None:
    """As text in base64 a secret would pass any redactor."""
    with record_runs(redact=redact_texts(lambda text: text)) as runs, WaxellContext("a") as run:
        run.record_step("s", {"raw": b"hunter2", "deep": [bytearray(3)]})
    assert runs.one().steps[0].output == {"raw": "<7 bytes>", "deep": ["<3 bytes>"]}


# -- what becomes of what it returns -----------------------------------------------------------------


def test_what_redact_returns_is_written() -> None:
    """Any field of content, and those that say who it was, may be changed; a new dict will do."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        if record["kind"] == "run_started":
            return record | {"user_id": "", "agent_name": "somebody", "unknown": 1}
        if record["kind"] == "llm_call":
            return record | {"prompt": "…", "model": "a model"}
        return record

    with record_runs(redact=change) as runs, WaxellContext("a", user_id="ann@example.com") as run:
        run.record_llm_call(model="m", prompt_preview=MARK, tokens_in=3)
    run_ = runs.one("somebody")
    assert run_.user_id == ""
    assert (run_.calls[0].prompt, run_.calls[0].model, run_.calls[0].tokens_in) == ("…", "a model", 3)


def test_what_a_record_is_known_by_is_not_redacted() -> None:
    """Kind, ids, times, state and status stay, whatever is made of them: else calls would lose their run."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        for name in redaction._IDENTITY:
            record[name] = {"rubbish": name}
        return record

    with record_runs(redact=change) as runs:
        everything()
        attempt = prepare(Task("celery", "task", "task-1"), Options())
        begin(attempt)
        task_ended(attempt, "retry")
    first, second, task = runs.all()
    assert [run.state for run in (first, second, task)] == ["success", "error", "retry"]
    assert (len(first.calls), len(first.steps), first.tags) == (1, 1, {"tag": MARK})
    assert (first.calls[0].status, first.root_run_id, first.trace_id) == ("ok", *2 * [first.run_id])
    assert task.task_id == "task-1"
    assert all(call.at > 1e9 for call in runs.calls)


@pytest.mark.parametrize("rubbish", [None, 3.7, "text", ["text"], {"a": 1}, object(), Asked(a=1), b"bytes"])
def test_a_field_of_another_type_is_made_to_fit(rubbish: Any) -> None:
    """Whatever stands in a field after it, the record arrives."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(record, rubbish)

    with record_runs(redact=change) as runs:
        everything()
        assert waxell_workers.stats().dropped == {}
    assert [run.state for run in runs] == ["success", "error"]
    (call,) = runs.calls
    assert type(call.model) is type(call.prompt) is str
    assert type(call.messages) is type(call.tool_calls) is list
    assert MARK not in f"{runs.all()}"


def test_messages_that_are_none_are_kept() -> None:
    """What a redactor puts into a list of messages is not lost for being no message."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        return record | ({"messages": ["a", {"text": "b"}], "tokens_in": 2.6} if "messages" in record else {})

    with record_runs(redact=change) as runs:
        captured()
    assert runs.calls[0].messages == [{"value": "a"}, {"text": "b"}]
    assert runs.calls[0].tokens_in == 3


def test_a_field_that_is_taken_away_has_its_default() -> None:
    """`{}` is a record of which nothing is told but that it happened."""
    with record_runs(redact=lambda record: {}) as runs:
        everything()
    assert [run.agent_name for run in runs] == ["unknown", "unknown"]
    assert (runs.calls[0].model, runs.calls[0].tokens_in, runs.calls[0].prompt) == ("unknown", None, "")


# -- when it fails -----------------------------------------------------------------------------------


def raises(record: Any) -> Any:
    record["model"] = record["agent_name"] = "changed before"
    raise LookupError(MARK)


def returns_nothing(record: Any) -> Any:
    return None


def returns_text(record: Any) -> Any:
    return str(record)


def returns_what_cannot_be_read(record: Any) -> Any:
    class Broken(dict):  # type: ignore[type-arg]
        pass

    class Key(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            raise LookupError(MARK)

    return Broken({Key(key): value for key, value in record.items()})


@pytest.mark.parametrize(
    ("redact", "why"),
    [
        (raises, "it raised LookupError"),
        (returns_nothing, "it returned NoneType, not the record"),
        (returns_text, "it returned str, not the record"),
        (returns_what_cannot_be_read, "it raised LookupError"),
    ],
)
def test_a_redactor_that_fails_costs_the_content(
    redact: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No text of the content is written; everything else is; the log says it once, and quotes nothing."""
    with record_runs(redact=redact) as runs:
        everything()
        everything()
    assert MARK not in f"{runs.all()}"
    first, second = runs.all()[:2]
    assert first.agent_name == "a"
    assert first.inputs == first.metadata | first.inputs == {FAILED: FAILED}
    (call, *_) = runs.calls
    assert (call.model, call.tokens_in, call.prompt, call.response) == ("m", 3, FAILED, FAILED)
    assert call.messages == [{"role": "user", "text": FAILED}]
    assert call.tool_calls == [{"name": "look", "id": "1", "arguments": FAILED}]
    assert (call.error_message, call.metadata) == (FAILED, {FAILED: FAILED})
    assert first.steps[0].output == {FAILED: [FAILED]}
    assert (first.tags, first.result) == ({FAILED: FAILED}, FAILED)
    assert (second.error_type, second.error_message, second.traceback) == ("ValueError", FAILED, FAILED)
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert f"({why})" in said.getMessage()
    assert MARK not in caplog.text


def test_what_an_adapter_tells_of_its_task_is_no_content() -> None:
    """Queue, attempt and worker are there although the redactor fails; a user's metadata is not."""
    with record_runs(redact=raises, capture_content=True) as runs:
        task = Task("celery", "task", "task-1", attempt=2, queue="mail", inputs=lambda: {"args": [MARK]})
        attempt = prepare(task, Options())
        begin(attempt)
        attempt.run.set_metadata("m", MARK)
        task_ended(attempt, "success")
    run = runs.one()
    assert (run.metadata["attempt"], run.metadata["queue"], run.metadata["framework"]) == (
        2,
        "mail",
        "celery",
    )
    assert run.inputs == {FAILED: [FAILED]}
    assert run.metadata[FAILED] == FAILED


@pytest.mark.parametrize("by_texts", [True, False], ids=["redact_texts", "redact"])
@pytest.mark.parametrize("interrupt", [SoftTimeLimitExceeded, KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_redact_reaches_the_task(interrupt: type[BaseException], by_texts: bool) -> None:
    """It goes on, after the record was written without its content; each run has its one end."""
    asked: list[str] = []

    def slow(record: dict[str, Any]) -> dict[str, Any]:
        asked.append(record["id"])
        raise interrupt

    def slow_at_a_text(text: str) -> str:
        if text != FAILED:
            raise interrupt
        return text

    with record_runs(redact=redact_texts(slow_at_a_text) if by_texts else slow) as runs:
        with pytest.raises(interrupt), WaxellContext("a", inputs={"q": MARK}):
            pytest.fail("the block has begun")
        run = WaxellContext("b")
        with pytest.raises(interrupt):
            run.record_llm_call(model="m", prompt_preview=MARK, tokens_in=3)
        with pytest.raises(interrupt):
            captured(id="c", prompt=MARK)
        captured(id="c", prompt=MARK)  # as capture does after an interrupt
        assert waxell_workers.get_context() is None
        assert collecting.current().open_runs == {}
    assert len(asked) == len(set(asked)), "a redactor that was interrupted is asked again"
    assert MARK not in f"{runs.all()} {runs.calls}"
    first = runs.one("a")
    assert first.state in STATES
    assert first.inputs == {FAILED: FAILED}
    assert [(call.tokens_in, call.prompt) for call in runs.calls] == [(3, FAILED), (None, FAILED)]


# -- redact_texts ------------------------------------------------------------------------------------


def test_redact_texts_sees_all_content_and_nothing_else() -> None:
    """Each text of the content goes through it, keys too; roles, names, models and states do not."""
    with record_runs(redact=redact_texts(str.upper)) as runs:
        everything()
        attempt = prepare(Task("celery", "task", "task-1", queue="mail"), Options())
        begin(attempt)
        task_ended(attempt, "success")
    first, second, task = runs.all()
    assert MARK not in f"{runs.all()}"
    assert (first.agent_name, first.inputs, first.result) == ("a", {"Q": "HUNTER2"}, "HUNTER2")
    (call,) = first.calls
    assert (call.model, call.prompt, call.error_message) == ("m", "HUNTER2", "HUNTER2")
    assert call.messages == [{"role": "user", "text": "HUNTER2"}]
    assert call.tool_calls == [{"name": "look", "id": "1", "arguments": "HUNTER2"}]
    assert first.steps[0].output == {"DEEP": ["HUNTER2"]}
    assert (first.tags, first.metadata) == ({"TAG": "HUNTER2"}, {"M": "HUNTER2", "KEY": "HUNTER2"})
    assert (second.error_type, second.error_message) == ("ValueError", "HUNTER2")
    assert second.traceback.startswith("TRACEBACK")
    assert (task.metadata["queue"], task.metadata["framework"]) == ("mail", "celery")


def test_redact_texts_costs_the_one_text_at_which_it_fails() -> None:
    """The others are kept; what is returned and is no text is a failure."""

    def picky(text: str) -> Any:
        if text == "raise":
            raise LookupError
        return None if text == "nothing" else text

    with record_runs(redact=redact_texts(picky)) as runs, WaxellContext("a") as run:
        run.record_step("s", ["raise", "nothing", "text", ""])
    assert runs.one().steps[0].output == [FAILED, FAILED, "text", ""]


def test_redact_texts_of_one_function_are_equal(caplog: pytest.LogCaptureFixture) -> None:
    """A second `init` with the same function is no other setting."""
    assert redact_texts(str.upper) == redact_texts(str.upper) != redact_texts(str.lower)


def test_redact_texts_can_be_called_in_a_redactor_of_ones_own() -> None:
    """It takes any record, and any part of one."""
    texts = redact_texts(str.upper)

    def both(record: dict[str, Any]) -> dict[str, Any]:
        record.pop("session_id", None)
        return texts(record)

    with record_runs(redact=both) as runs, WaxellContext("a", session_id="s") as run:
        run.set_result(MARK)
    assert (runs.one().session_id, runs.one().result) == ("", "HUNTER2")
    assert texts({}) == {}
    assert texts({"kind": 3, "prompt": MARK}) == {"kind": 3, "prompt": MARK}


# -- what is cut, and when ---------------------------------------------------------------------------


def test_a_text_is_redacted_whole_and_cut_afterwards() -> None:
    """A secret across the end of what is kept is gone, in each text that is cut."""
    secret = "hunter2" * 4
    long = "x" * 9_990 + secret
    with record_runs(
        capture_content=True, redact=redact_texts(lambda text: text.replace(secret, "***"))
    ) as runs:
        captured(
            prompt=long,
            response=long,
            messages=[{"role": "user", "text": long}],
            tool_calls=[{"name": "n", "id": "1", "arguments": "x" * 1_990 + secret}],
            error_message="x" * 490 + secret,
        )
    (call,) = runs.calls
    assert "hunter" not in f"{call}"
    assert call.prompt == call.response == "x" * 9_990 + "***"


@pytest.mark.parametrize("shorter", [str, lambda text: text.replace("xx", "x")], ids=["", "halved"])
def test_of_a_text_that_no_record_holds_the_beginning_is_kept(shorter: Callable[[str], str]) -> None:
    """It is redacted as far as a record reaches; less is kept, so that no half of a secret is there."""
    long = "x" * (MAX_LINE - 3) + MARK * 50_000
    with record_runs(redact=redact_texts(lambda text: shorter(text.replace(MARK, "")))) as runs:
        waxell_workers.record_llm_call(model="m", prompt_preview=long)
    (call,) = runs.calls
    assert "hun" not in call.prompt
    assert SHORT < len(call.prompt) < SHORT + 50


def test_a_cut_text_says_how_much_is_missing_in_all() -> None:
    """However often it was cut."""
    with record_runs(redact=lambda record: record) as runs:
        waxell_workers.record_llm_call(model="m", prompt_preview="x" * (MAX_LINE + 1_000))
    assert runs.calls[0].prompt == "x" * SHORT + f"… [{MAX_LINE + 1_000 - SHORT} characters cut]"


@pytest.mark.parametrize("redact", [None, redact_texts(lambda text: text)], ids=["", "redacted"])
def test_a_captured_call_is_cut_visibly(redact: Any) -> None:
    """Prompt and response to `content_limit` each, arguments to 2,000, the text of an error to 500."""
    with record_runs(redact=redact, content_limit=20) as runs:
        captured(
            prompt="p" * 25,
            response="r" * 20,
            tool_calls=[
                {"name": "n", "id": "1", "arguments": "a" * 2_001},
                {"name": "n", "id": "2"},
                {"name": "n", "id": "3", "arguments": {"a": [1]}},
                {"name": "n", "id": "4", "arguments": {"a": ["b" * 1_000] * 10}},
            ],
            error_message="e" * 510,
        )
    (call,) = runs.calls
    assert call.prompt == "p" * 20 + "… [5 characters cut]"
    assert call.response == "r" * 20
    assert call.tool_calls[0]["arguments"] == "a" * 2_000 + "… [1 characters cut]"
    assert call.tool_calls[1:3] == [
        {"name": "n", "id": "2"},
        {"name": "n", "id": "3", "arguments": {"a": [1]}},
    ]
    assert call.tool_calls[3]["arguments"].startswith('{"a":["bbb')
    assert len(call.tool_calls[3]["arguments"]) < 2_050
    assert call.error_message == "e" * 500 + "… [10 characters cut]"


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "text": text} for text in texts]


def left_out(count: int) -> dict[str, str]:
    return {"role": "…", "text": f"… [{count} messages cut]"}


@pytest.mark.parametrize("redact", [None, redact_texts(lambda text: text)], ids=["", "redacted"])
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([], []),
        (["a" * 4, "b" * 6], said("a" * 4, "b" * 6)),
        (["a" * 4, "b" * 6, "c"], said("a" * 3 + "… [1 characters cut]", "b" * 6, "c")),
        (["a", "b" * 6, "c" * 4], [left_out(1), *said("b" * 6, "c" * 4)]),
        (["a", "b", "c" * 11], [left_out(2), *said("c" * 10 + "… [1 characters cut]")]),
        (["a" * 300_000, "b", "c" * 9], [left_out(1), *said("b", "c" * 9)]),
    ],
)
def test_of_messages_the_newest_are_kept(given: list[str], kept: list[dict[str, str]], redact: Any) -> None:
    """Whole, as many as fit into `content_limit`; what is left out is said first."""
    with record_runs(redact=redact, content_limit=10) as runs:
        captured(messages=said(*given))
    assert runs.calls[0].messages == kept


def test_a_long_conversation_is_not_redacted_in_vain() -> None:
    """Of more messages than a record can hold the redactor sees the newest ones, each whole."""
    seen: list[int] = []

    def note(record: dict[str, Any]) -> dict[str, Any]:
        seen.extend(len(message["text"]) for message in record["messages"])
        return record

    with record_runs(redact=note) as runs:
        captured(messages=said(*["x" * 1_000] * 5_000))
    assert set(seen) == {1_000}
    assert 10 < len(seen) < 300
    assert runs.calls[0].messages == [left_out(4_990), *said(*["x" * 1_000] * 10)]


# -- per run -----------------------------------------------------------------------------------------


def fail() -> None:
    """End a run with an error whose text is longer than what is no content."""
    raise ValueError("x" * 300)


@pytest.fixture(params=[True, False], ids=["on for one", "off for one"])
def wanted(request: pytest.FixtureRequest) -> Iterator[bool]:
    wanted: bool = request.param
    with record_runs(capture_content=not wanted) as runs:
        yield wanted
        for run in runs:
            expected = wanted if run.agent_name.startswith("one") else not wanted
            assert (len(run.error_message) == 300, "raise ValueError" in run.traceback) == (
                expected,
                expected,
            ), run


def in_block(choice: bool | None, name: str, work: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match="xx"), WaxellContext(name, capture_content=choice):
        work()


def test_a_block_chooses_whether_its_content_is_recorded(wanted: bool) -> None:
    """The choice counts for its errors and what is asked inside; blocks inside have it too, or their own."""
    asked = []

    def inside() -> None:
        asked.append(waxell_workers.core.runs.wants_content())
        in_block(None, "one-inner", fail)
        in_block(not wanted, "other-inner", fail)
        asked.append(waxell_workers.core.runs.wants_content())
        fail()

    in_block(wanted, "one", inside)
    in_block(None, "other", fail)
    assert asked == [wanted, wanted]
    assert waxell_workers.core.runs.wants_content() is not wanted


def test_an_observed_function_chooses_too(wanted: bool) -> None:
    """Sync, as a coroutine's and a generator's."""

    @waxell_workers.observe(agent_name="one", capture_content=wanted)
    def function() -> None:
        fail()

    @waxell_workers.observe(agent_name="one-generator", capture_content=wanted)
    def generator() -> Iterator[bool]:
        yield waxell_workers.core.runs.wants_content()
        fail()

    with pytest.raises(ValueError, match="xx"):
        function()
    items = generator()
    assert next(items) is wanted
    with pytest.raises(ValueError, match="xx"):
        next(items)


def test_a_task_chooses_and_what_it_calls_follows(wanted: bool) -> None:
    """`@options` counts for the arguments, the error, and for a task that runs inside it."""

    def run(name: str, marked: Options, *, nested: bool = False, inside: Callable[[], None] = int) -> bool:
        arguments = []
        task = Task("f", name, name, inputs=lambda: arguments.append(1) or {}, nested=nested)
        attempt = prepare(task, marked)
        begin(attempt)
        inside()
        try:
            fail()
        except ValueError as error:
            task_ended(attempt, "error", error=error)
        return bool(arguments)

    told: list[bool] = []
    inner = lambda: told.append(run("one-nested", Options(), nested=True))  # noqa: E731
    assert run("one", Options(capture_content=wanted), inside=inner) is wanted
    assert run("other", Options()) is not wanted
    assert told == [wanted]


def test_a_task_on_its_slot_does_not_follow_what_was_left_there() -> None:
    """Given a run that nobody has ended, the next task on the slot has its own choice."""
    with record_runs(capture_content=False) as runs:
        begin(prepare(Task("f", "left", "1"), Options(capture_content=True)))
        attempt = prepare(Task("f", "next", "2"), Options())
        begin(attempt)
        assert not waxell_workers.core.runs.wants_content()
        task_ended(attempt, "success")
    assert [run.state for run in runs] == ["interrupted", "success"]


def test_options_take_no_other_choice() -> None:
    """A wrong one is refused where it is made."""
    with pytest.raises(waxell_workers.ConfigError, match="capture_content"):
        waxell_workers.options(capture_content="yes")  # type: ignore[arg-type]


def test_nothing_is_wanted_where_nothing_is_recorded() -> None:
    """In a run that is excluded, content would be made for nobody."""
    with record_runs(capture_content=True, exclude=("none",)):
        assert waxell_workers.core.runs.wants_content()
        with WaxellContext("none"):
            assert not waxell_workers.core.runs.wants_content()


def test_every_field_is_content_or_not_on_purpose() -> None:
    """A field that holds anything, or texts of a length that nobody bounds, is in the table."""
    free = {dict[str, Any], list[dict[str, Any]], Any}
    for kind in Record.__args__:
        fields = {field.name for field in msgspec.structs.fields(kind) if field.type in free}
        assert fields <= set(redaction.CONTENT[kind.__struct_config__.tag]), kind
    assert set(redaction.CONTENT) == {kind.__struct_config__.tag for kind in Record.__args__}
    assert {"prompt", "response", "error_message"} <= set(redaction.CONTENT["llm_call"])
    assert LLMCall.__struct_config__.tag in redaction.CONTENT
    assert RunStarted.__struct_config__.tag in redaction.CONTENT
