"""Records as REST bodies: nothing is lost that the protocol has any place for."""

from __future__ import annotations

import pytest

from tests.export_cases import AT, call, ended, started, step
from waxell_workers.core.records import STATES, RunUpdated
from waxell_workers.export import bodies


def test_a_start_carries_our_ids_in_its_metadata() -> None:
    body = bodies.start(
        started(inputs={"q": 1}, trace_id="ab" * 16, parent_run_id="p", root_run_id="o", task_id="t")
    )
    assert body["inputs"] == {"q": 1}
    assert body["trace_id"] == ""
    assert body["interaction_mode"] == "autonomous"
    assert not {"user_id", "user_group", "session_id", "parent_workflow_id"} & body.keys()
    assert body["metadata"]["queue"] == "q"
    ours = body["metadata"]["waxell"]
    assert ours.pop("client").startswith("waxell-workers/")
    assert ours == {
        "run_id": "r",
        "started_at": AT,
        "trace_id": "ab" * 16,
        "parent_run_id": "p",
        "root_run_id": "o",
        "task_id": "t",
    }


def test_a_session_makes_it_interactive() -> None:
    body = bodies.start(started(session_id="s", user_id="u", user_group="g"))
    assert (body["interaction_mode"], body["session_id"], body["user_id"], body["user_group"]) == (
        "interactive",
        "s",
        "u",
        "g",
    )


def test_updates_are_folded_in_once_however_often_they_come() -> None:
    update = RunUpdated(id="u", at=AT, run_id="r", tags={"a": "1"}, metadata={"queue": "other", "k": 2})
    later = RunUpdated(id="v", at=AT, run_id="r", tags={"b": "2"}, metadata={"k": 3})
    once = bodies.fold(bodies.fold(started(), update), later)
    assert bodies.fold(once, later) == once
    assert bodies.start(once)["metadata"]["queue"] == "other"
    assert bodies.start(once)["metadata"]["waxell"]["tags"] == {"a": "1", "b": "2"}
    ours = bodies.complete(once, ended())["result"]["waxell"]
    assert ours["tags"] == {"a": "1", "b": "2"}
    assert ours["metadata"] == {"queue": "other", "k": 3}


def test_a_users_own_key_of_our_name_does_no_harm() -> None:
    body = bodies.start(
        bodies.fold(started(metadata={"waxell": "mine"}), RunUpdated(id="u", at=1, run_id="r"))
    )
    assert body["metadata"]["waxell"]["run_id"] == "r"


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_one_of_the_protocols_three_and_keeps_its_name(state: str) -> None:
    body = bodies.complete(started(), ended(state=state))
    assert body["status"] == {
        "success": "success",
        "ignored": "success",
        "revoked": "interrupted",
        "interrupted": "interrupted",
    }.get(state, "error")
    assert body["result"]["waxell"]["state"] == state
    assert body.get("error_type", state) == state
    assert bool(body["error"]) == (body["status"] != "success")


def test_an_end_carries_result_error_and_times() -> None:
    end = ended(
        state="error", error_type="ValueError", error_message="no", traceback="Traceback …", result=[1]
    )
    body = bodies.complete(started(trace_id="ab" * 16), end)
    assert body["result"]["output"] == [1]
    assert body["result"]["waxell"]["duration_ms"] == 9000.0
    assert body["result"]["waxell"]["ended_at"] == AT + 9
    assert (body["error"], body["error_type"], body["traceback"]) == ("no", "ValueError", "Traceback …")
    assert body["trace_id"] == "ab" * 16
    assert "trace_id" not in bodies.complete(started(trace_id="xyz"), end)


def test_previews_are_cut_where_the_protocol_cuts_them() -> None:
    record = bodies.call(call(prompt="p" * 900, response="r" * 900))
    assert (len(record["prompt_preview"]), len(record["response_preview"])) == (500, 500)


@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ({}, "chat.completions"),
        ({"response_id": "resp_1"}, "responses.create"),
        ({"response_id": "chatcmpl-1"}, "chat.completions"),
        ({"operation": "embeddings"}, "embeddings"),
        ({"operation": "generate_content"}, "generate_content"),
    ],
)
def test_a_call_names_the_method_as_the_platform_does(fields: dict[str, str], task: str) -> None:
    assert bodies.call(call(**fields))["task"] == task


def test_an_unknown_cost_is_zero_in_the_record_and_absent_in_the_span() -> None:
    unknown = call(model="stand-in")
    assert bodies.call(unknown)["cost"] == 0.0
    assert "cost" not in bodies.llm_span(unknown, started(), 1)["attributes"]
    assert bodies.llm_span(call(cost_usd=0.0), started(), 1)["attributes"]["cost"] == 0.0


def test_a_stream_says_so() -> None:
    record = bodies.call(call(streamed=True, ttft_ms=12.6))
    assert (record["is_streaming"], record["ttft_ms"]) == (True, 13)
    assert "is_streaming" not in bodies.call(call())


def test_a_span_has_what_the_call_record_has_no_field_for() -> None:
    span = bodies.llm_span(call(number=3, tokens_cached=7), started(), 4)
    assert (span["position"], span["parent_position"], span["start_offset_ms"]) == (4, 0, 4000)
    assert span["duration_ms"] == 250
    assert span["attributes"]["waxell.call_id"] == "r.call3"
    assert span["attributes"]["waxell.started_at"] == AT + 4
    assert span["attributes"]["waxell.tokens_cached"] == 7
    assert bodies.llm_span(call(duration_ms=None), started(), 1)["duration_ms"] is None


def test_a_call_that_began_before_its_run_has_no_negative_offset() -> None:
    early = call(number=-100)
    assert bodies.llm_span(early, started(), 1)["start_offset_ms"] == 0


def test_the_output_of_a_step_is_an_object() -> None:
    assert bodies.step(step(output={"a": 1}))["output"] == {"a": 1}
    assert bodies.step(step(output=3))["output"] == {"output": 3}
    assert bodies.step(step())["output"] == {}


def test_unknown_tokens_are_zero_in_the_record_and_absent_in_the_span() -> None:
    """REST wants numbers; its open objects tell which of them nobody told, and which are really 0."""
    untold = call(tokens_in=None, tokens_out=None)
    assert (bodies.call(untold)["tokens_in"], bodies.call(untold)["tokens_out"]) == (0, 0)
    told = bodies.llm_span(untold, started(), 1)["attributes"].keys()
    assert not told & {"tokens_in", "tokens_out", "total_tokens", "waxell.tokens_cached", "cost"}
    half = bodies.llm_span(call(tokens_out=None), started(), 1)["attributes"]
    assert half["tokens_in"] == 1000
    assert "total_tokens" not in half
    none_at_all = bodies.llm_span(call(tokens_out=0, tokens_cached=0), started(), 1)["attributes"]
    assert (none_at_all["tokens_out"], none_at_all["total_tokens"]) == (0, 1000)
    assert none_at_all["waxell.tokens_cached"] == 0


def test_an_embedding_has_no_output_to_be_unknown() -> None:
    """Its span says 0: nothing is missing."""
    embedding = bodies.llm_span(call(operation="embeddings", tokens_out=None), started(), 1)
    assert (embedding["attributes"]["tokens_out"], embedding["attributes"]["total_tokens"]) == (0, 1000)


def test_what_previews_cut_is_whole_in_the_span() -> None:
    """Messages and the answer, as the platform's own client names them; only where there is more to say."""
    sent = call(
        prompt="p" * 900, response="r" * 900, messages=[{"role": "user", "text": "hi"}, {"role": "tool"}]
    )
    span = bodies.llm_span(sent, started(), 1)
    assert span["input_data"] == {
        "prompt_preview": "p" * 500,
        "full_messages": [{"role": "user", "content": "hi"}, {"role": "tool", "content": ""}],
    }
    assert span["output_data"] == {"response_preview": "r" * 500, "full_response": "r" * 900}
    short = bodies.llm_span(call(prompt="p", response="r"), started(), 1)
    assert short["input_data"] == {"prompt_preview": "p"}
    assert short["output_data"] == {"response_preview": "r"}
    alone = bodies.llm_span(call(prompt="p" * 900), started(), 1)
    assert alone["input_data"]["full_messages"] == [{"role": "user", "content": "p" * 900}]


def test_a_span_names_the_tools_that_were_asked_for() -> None:
    """There is no other place for them in the protocol."""
    asked = [{"name": "search", "id": "t1"}]
    span = bodies.llm_span(call(tool_calls=asked, tokens_cache_written=5), started(), 1)
    assert span["attributes"]["waxell.tool_calls"] == asked
    assert span["attributes"]["waxell.tokens_cache_written"] == 5
    assert "waxell.tool_calls" not in bodies.llm_span(call(), started(), 1)["attributes"]


def test_what_a_run_was_born_with_is_in_its_start_and_its_end() -> None:
    """Tags and ambient metadata are there from the start; the run's own metadata counts above that."""
    born = started(tags={"tenant": "acme", "a": 0}, ambient={"plan": "pro", "queue": "outer's"})
    body = bodies.start(born)
    assert (body["metadata"]["plan"], body["metadata"]["queue"]) == ("pro", "q")
    assert body["metadata"]["waxell"]["tags"] == {"tenant": "acme", "a": 0}
    update = RunUpdated(id="u", at=AT, run_id="r", tags={"a": 1}, metadata={"plan": "free"})
    folded = bodies.fold(bodies.fold(born, update), update)
    assert bodies.start(folded)["metadata"]["plan"] == "free"
    ours = bodies.complete(folded, ended())["result"]["waxell"]
    assert ours["tags"] == {"tenant": "acme", "a": 1}
    assert "tags" not in bodies.start(born, bare=True)["metadata"]["waxell"], (
        "content goes where it is left out"
    )


def test_the_reason_of_an_end_is_told() -> None:
    end = ended(state="killed", reason="killed: stopped by user")
    assert bodies.complete(started(), end)["result"]["waxell"]["reason"] == "killed: stopped by user"
