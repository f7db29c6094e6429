"""The examples of `docs/manual-calls.md` run, and record what the page says."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import waxell_workers
from waxell_workers import WaxellContext
from waxell_workers.core.records import LLMCall
from waxell_workers.testing import RecordedRuns, record_runs

PAGE = Path(__file__).parents[2] / "docs" / "manual-calls.md"
EXAMPLE = re.compile(
    r"<!-- tested by tests/docs/test_manual_calls_page\.py: (\w+) -->\n```python\n(.*?)```", re.DOTALL
)
TABLE_ROW = re.compile(r"^\| (`[a-z_`, ]+) \|", re.MULTILINE)
ARGUMENTS = {
    "operation": "task",
    "cost_usd": "cost",
    "prompt": "prompt_preview",
    "response": "response_preview",
}
"""What an argument is called, where the record's field has another name."""
NOT_GIVEN = {"id", "proc", "run_id"}


class Model:
    """What the examples ask: it echoes, fails at `fail`, and counts words."""

    asked_at = 0.0

    def complete(self, prompt: str) -> Any:
        self.asked_at = time.time()
        if prompt == "fail":
            raise TimeoutError(prompt)
        tools = [{"name": "search", "id": "t1", "arguments": {"query": prompt}}]
        return SimpleNamespace(text=prompt.upper(), usage={"in": 3, "out": 2}, tools=tools)

    def stream(self, prompt: str) -> Iterator[Any]:
        for piece in prompt.split():
            yield SimpleNamespace(text=piece, usage=None)
        yield SimpleNamespace(text="", usage={"in": 3, "out": 2})


@pytest.fixture
def page() -> dict[str, Any]:
    """Run the page's examples, in their order, and return their names."""
    names: dict[str, Any] = {"model": Model()}
    examples = EXAMPLE.findall(PAGE.read_text())
    assert len(examples) == PAGE.read_text().count("```python")
    for name, example in examples:
        exec(example, names)  # what a reader copies
        assert name in names
    return names


@pytest.fixture
def runs() -> Iterator[RecordedRuns]:
    with record_runs() as recorded:
        yield recorded


def test_every_field_has_a_row_in_the_table(page: dict[str, Any]) -> None:
    """The page has each argument that is taken, under its own name, and no other."""
    documented = {name for row in TABLE_ROW.findall(PAGE.read_text()) for name in re.findall(r"\w+", row)}
    fields = set(LLMCall.__struct_fields__) - NOT_GIVEN
    assert documented == {ARGUMENTS.get(field, field) for field in fields}


def test_every_argument_of_the_table_is_taken(runs: RecordedRuns) -> None:
    """Each can be given, and is in the record; one that does not exist raises."""
    given = {ARGUMENTS.get(field, field): "x" for field in set(LLMCall.__struct_fields__) - NOT_GIVEN}
    given |= {name: 1 for name in given if name.startswith("tokens") or name.endswith("_ms")}
    given |= {"cost": 0.5, "at": 5.0, "streamed": True, "metadata": {"x": 1}}
    given |= {"messages": [{"role": "user", "text": "x"}], "tool_calls": [{"name": "x"}]}
    waxell_workers.record_llm_call(**given)
    (call,) = runs.calls
    names = {ARGUMENTS.get(field, field): getattr(call, field) for field in LLMCall.__struct_fields__}
    assert {name: names[name] for name in given} == given
    with pytest.raises(TypeError):
        waxell_workers.record_llm_call(model="m", temperature=1)


def test_a_call_belongs_to_the_run_around_it(page: dict[str, Any], runs: RecordedRuns) -> None:
    """With tokens, a beginning and a duration; what was not said is unknown and no 0."""
    before = time.time()
    with WaxellContext("task"):
        assert page["ask"]("hello") == "HELLO"
    (call,) = runs.one("task").calls
    assert (call.model, call.provider, call.tokens_in, call.tokens_out) == ("house-7b", "in-house", 3, 2)
    assert (call.tokens_cached, call.tokens_reasoning, call.cost_usd) == (None, None, None)
    assert before <= call.at <= page["model"].asked_at
    assert 0 <= call.duration_ms < 60_000


def test_outside_any_run_it_is_collected(page: dict[str, Any], runs: RecordedRuns) -> None:
    """Such a call has no run: the shipper groups those of a model."""
    page["ask"]("hello")
    assert [call.run_id for call in runs.calls] == [""]
    assert len(runs) == 0


def test_threads_record_into_the_run_that_asked_for_them(page: dict[str, Any], runs: RecordedRuns) -> None:
    """The run of whoever made the pool has each thread's calls; without a run they are collected."""
    with WaxellContext("task"):
        assert page["ask_all"](["a", "b", "c"]) == ["A", "B", "C"]
    assert len(runs.one("task").calls) == 3
    page["ask_all"](["d"])
    assert [call.run_id for call in runs.calls][3:] == [""]


def test_a_failed_call_is_recorded_and_its_error_goes_on(page: dict[str, Any], runs: RecordedRuns) -> None:
    """The caller gets the exception; the record has its type, a duration, and no tokens."""
    assert page["ask_safely"]("hello") == "HELLO"
    with pytest.raises(TimeoutError):
        page["ask_safely"]("fail")
    fine, failed = runs.calls
    assert (fine.status, fine.error_type, fine.tokens_out) == ("ok", "", 2)
    assert (failed.status, failed.error_type, failed.tokens_out) == ("error", "TimeoutError", None)
    assert failed.duration_ms is not None


def test_a_stream_is_one_call_however_it_ends(page: dict[str, Any], runs: RecordedRuns) -> None:
    """Read to its end or left: one record, in the run in which it began."""
    with WaxellContext("whole"):
        whole = page["stream"]("one two")
        assert next(whole) == "one"
    assert list(whole) == ["two", ""]
    with WaxellContext("left"):
        left = page["stream"]("one two")
        next(left)
    left.close()
    (call,) = runs.one("whole").calls
    assert (call.streamed, call.tokens_out, call.finish_reason) == (True, 2, "stop")
    assert 0 <= call.ttft_ms <= call.duration_ms
    (call,) = runs.one("left").calls
    assert (call.streamed, call.tokens_out, call.finish_reason) == (True, None, "")


def test_tools_are_told_as_they_are_given(page: dict[str, Any], runs: RecordedRuns) -> None:
    """Names and ids are there; arguments are nobody's business unless they are handed over."""
    page["ask_with_tools"]("weather")
    assert runs.calls[0].tool_calls == [{"name": "search", "id": "t1"}]


def test_a_batch_is_recorded_afterwards_with_its_own_times(page: dict[str, Any], runs: RecordedRuns) -> None:
    """Each answer is a call of the run that collects, with the batch's times and its price."""
    answers = [{"id": f"a{number}", "usage": {"in": 1000, "out": 100}} for number in range(2)]
    batch = {"id": "b1", "model": "gpt-4o-mini", "created_at": 1000.0, "completed_at": 1060.0}
    page["collect"](batch | {"answers": answers})
    run = runs.one("nightly-batch")
    assert run.metadata["batch_id"] == "b1"
    assert [(call.response_id, call.at, call.duration_ms) for call in run.calls] == [
        ("a0", 1000.0, 60_000.0),
        ("a1", 1000.0, 60_000.0),
    ]
    assert run.calls[0].cost_usd == pytest.approx(0.000105)
