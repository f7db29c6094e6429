"""What an agent of openai-agents does becomes steps and calls, once each, in the run in which it happens.

Run by `tests/unit/test_capture_agents.py`, in environments with the newest and with the oldest openai-agents.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

agents = pytest.importorskip("agents")
openai = pytest.importorskip("openai")

from agents import (  # noqa: E402
    Agent,
    GuardrailFunctionOutput,
    InputGuardrail,
    ModelResponse,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    Usage,
    custom_span,
    function_tool,
    generation_span,
    trace,
)
from agents.models.interface import Model  # noqa: E402

from tests.agents.model_server import ARGUMENTS, SLOW_S, TEXT, ModelServer  # noqa: E402
from waxell_workers import WaxellContext, capture  # noqa: E402
from waxell_workers.capture import agents as ours  # noqa: E402
from waxell_workers.core import collector as collecting  # noqa: E402
from waxell_workers.core.config import Settings  # noqa: E402
from waxell_workers.core.encoding import decode  # noqa: E402
from waxell_workers.core.records import LLMCall, RunStarted, Step  # noqa: E402
from waxell_workers.core.redaction import redact_texts  # noqa: E402
from waxell_workers.drain import Drain  # noqa: E402

ROOT = Path(__file__).parents[2]
TOKENS = (13, 8, 5, 4)
FOUND = "what the tool found"
PROGRAM_S = 120


class Seen:
    """A processor of the user's: what it was told, without ids and times."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def _note(self, event: str, span: Any) -> None:
        data = span.span_data.export()
        self.told.append((event, json.dumps(data, default=str), span.parent_id is None, str(span.error)))

    def on_trace_start(self, trace: Any) -> None:
        self.told.append(("trace", trace.name))

    def on_trace_end(self, trace: Any) -> None:
        self.told.append(("traced", trace.name))

    def on_span_start(self, span: Any) -> None:
        self._note("start", span)

    def on_span_end(self, span: Any) -> None:
        self._note("end", span)

    def shutdown(self) -> None:
        pass

    def force_flush(self) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[ModelServer]:
    serving = ModelServer()
    yield serving
    serving.stop()


@pytest.fixture
def models(server: ModelServer) -> list[str]:
    """Return the models of the requests that are made in this test."""
    server.models.clear()
    return server.models


@pytest.fixture
def user() -> Iterator[Seen]:
    seen = Seen()
    agents.set_trace_processors([seen])
    yield seen
    agents.set_trace_processors([])


@pytest.fixture
def configure(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Configure this process anew; nobody ships."""
    entered = []

    def with_settings(**more: Any) -> None:
        own = {"api_url": "http://127.0.0.1:9", "spool_dir": str(tmp_path), "shipper": "external"}
        manager = collecting.instead(collecting.Collector(Settings(**own | {"shutdown_timeout": 0.0} | more)))
        manager.__enter__()
        entered.append(manager)

    with_settings()
    yield with_settings
    for manager in reversed(entered):
        manager.__exit__(None, None, None)


@pytest.fixture
def records(tmp_path: Path, configure: Any, user: Seen) -> Callable[[type], list[Any]]:
    """Return what was recorded since the test began, by kind; steps by their position."""

    def read(kind: type) -> list[Any]:
        lines = [line for path in tmp_path.glob("*/0*.ndjson") for line in path.read_bytes().splitlines()]
        found = [decode(line) for line in lines if line and b'"segment"' not in line]
        wanted = [record for record in found if isinstance(record, kind)]
        return sorted(wanted, key=lambda step: step.position) if kind is Step else wanted

    return read


def responses(server: ModelServer, model: str) -> Model:
    client = openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    return OpenAIResponsesModel(model=model, openai_client=client)


def chat(server: ModelServer, model: str) -> Model:
    client = openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    return OpenAIChatCompletionsModel(model=model, openai_client=client)


ENDPOINTS = {"responses": responses, "chat": chat}


@function_tool
async def search(query: str) -> str:
    """Search."""
    return FOUND


@function_tool
def look(query: str) -> str:
    """Look, in a thread where the SDK uses one."""
    return FOUND


@function_tool
def broken(query: str) -> str:
    """Fail."""
    raise ValueError("the tool's secret")


def guardrail(name: str, *, trips: bool) -> InputGuardrail[Any]:
    async def check(context: Any, agent: Any, given: Any) -> GuardrailFunctionOutput:
        return GuardrailFunctionOutput(output_info=None, tripwire_triggered=trips)

    return InputGuardrail(guardrail_function=check, name=name)


def agent(name: str, model: Model, **more: Any) -> Agent[Any]:
    return Agent(name=name, model=model, model_settings=ModelSettings(include_usage=True), **more)


def make(scenario: str, model: Callable[[str], Model]) -> Agent[Any]:
    """Return the agent of a scenario."""
    if scenario == "text":
        return agent("Writer", model("text"))
    if scenario == "tool":
        return agent("Worker", model("call.search"), tools=[search])
    if scenario == "two tools at once":
        return agent("Worker", model("call.search.look"), tools=[search, look])
    if scenario == "broken tool":
        return agent("Worker", model("call.broken"), tools=[broken])
    if scenario == "turns":
        return agent("Worker", model("turns-3.look"), tools=[look])
    if scenario == "handoff":
        billing = agent("Billing", model("text"))
        return agent("Triage", model("call.transfer_to_billing"), handoffs=[billing])
    if scenario == "agent as a tool":
        inner = agent("Inner", model("call.search"), tools=[search])
        tool = inner.as_tool("ask_inner", "Ask the other.")
        # Its input is a text: the arguments of the stand-in's model would not do.
        tool.on_invoke_tool = _with_input(tool.on_invoke_tool)
        return agent("Outer", model("call.ask_inner"), tools=[tool])
    if scenario == "guardrail":
        return agent("Guarded", model("text"), input_guardrails=[guardrail("polite", trips=False)])
    if scenario == "guardrail trips":
        return agent("Guarded", model("slow"), input_guardrails=[guardrail("no_math", trips=True)])
    assert scenario == "error"
    return agent("Failing", model("fail-400"))


def _with_input(invoke: Any) -> Any:
    async def with_input(context: Any, arguments: str) -> Any:
        return await invoke(context, '{"input": "from outside"}')

    return with_input


STEPS = {
    "text": ["agent: Writer"],
    "tool": ["agent: Worker", "tool: search"],
    "two tools at once": ["agent: Worker", "tool: search", "tool: look"],
    "broken tool": ["agent: Worker", "tool: broken"],
    "turns": ["agent: Worker", "tool: look", "tool: look", "tool: look"],
    "handoff": ["agent: Triage", "handoff: Triage → Billing", "agent: Billing"],
    "agent as a tool": ["agent: Outer", "tool: ask_inner", "agent: Inner", "tool: search"],
    "guardrail": ["agent: Guarded", "guardrail: polite"],
    "guardrail trips": ["agent: Guarded", "guardrail: no_math (triggered)"],
    "error": ["agent: Failing"],
}
CALLS = {
    "text": 1,
    "tool": 2,
    "two tools at once": 2,
    "broken tool": 2,
    "turns": 4,
    "handoff": 2,
    "agent as a tool": 4,
    "guardrail": 1,
    "error": 1,
}


async def run(made: Agent[Any], streamed: bool = False, **more: Any) -> Any:
    try:
        if not streamed:
            return (await Runner.run(made, "what the user said", **more)).final_output
        result = Runner.run_streamed(made, "what the user said", **more)
        async for _ in result.stream_events():
            pass
        return result.final_output
    except (agents.InputGuardrailTripwireTriggered, openai.APIStatusError) as error:
        return type(error).__name__
    finally:
        # What a tripwire leaves behind ends before the loop does.
        await asyncio.sleep(SLOW_S if made.name == "Guarded" else 0)


def tokens(call: LLMCall) -> tuple[int | None, ...]:
    return call.tokens_in, call.tokens_out, call.tokens_cached, call.tokens_reasoning


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("scenario", STEPS)
def test_steps_and_calls(
    server: ModelServer, models: list[str], records: Any, endpoint: str, scenario: str, streamed: bool
) -> None:
    """Given an agent in a run, its steps are there in the order in which they began, each inside a step that
    is there too, and each request is one call, with the tokens that the server told."""
    made = make(scenario, lambda name: ENDPOINTS[endpoint](server, name))
    with WaxellContext("task"):
        asyncio.run(run(made, streamed))
    (started,) = records(RunStarted)
    steps, calls = records(Step), records(LLMCall)
    assert [step.name for step in steps] == STEPS[scenario]
    assert [step.position for step in steps] == list(range(1, len(steps) + 1))
    assert {record.run_id for record in steps + calls} == {started.run_id}
    shown = {step.output["span_id"] for step in steps}
    assert {step.output["parent_id"] for step in steps if not step.name.startswith("agent:")} <= shown
    assert all(step.output["duration_ms"] > 0 for step in steps)
    if scenario == "guardrail trips":  # whether the model was asked by then is a matter of chance
        assert len(calls) == len(models)
        return
    assert sorted(call.model for call in calls) == sorted(models)
    assert len(calls) == CALLS[scenario]
    for call in calls:
        if scenario == "error":
            assert (call.status, call.error_type) == ("error", "openai.BadRequestError")
        else:
            assert tokens(call) == TOKENS
            assert call.streamed == (
                streamed and not (scenario == "agent as a tool" and "search" in call.model)
            )
            assert call.response_id


def test_a_step_inside_another_names_it(server: ModelServer, records: Any) -> None:
    """An agent that a tool calls is inside that tool, also where openai-agents has further spans between."""
    with WaxellContext("task"):
        asyncio.run(run(make("agent as a tool", lambda name: responses(server, name))))
    found = {step.name: step.output for step in records(Step)}
    assert found["tool: ask_inner"]["parent_id"] == found["agent: Outer"]["span_id"]
    assert found["agent: Inner"]["parent_id"] == found["tool: ask_inner"]["span_id"]
    assert found["tool: search"]["parent_id"] == found["agent: Inner"]["span_id"]


CONTENT = ("what the user said", FOUND, "arguments of the model", TEXT, "secret", "you said")


@pytest.mark.parametrize("scenario", ["tool", "broken tool", "error", "handoff", "custom"])
def test_without_content_there_is_none(
    server: ModelServer, records: Any, tmp_path: Path, scenario: str
) -> None:
    """Where no content is wanted, nothing that was said, asked of a tool, answered or quoted by an error is
    written; that there was an error is."""

    async def custom() -> None:
        with trace("t"), custom_span("mine", {"note": "secret"}) as span:
            span.set_error({"message": "it said secret", "data": None})

    with WaxellContext("task") as context:
        assert context.run_id
        if scenario == "custom":
            asyncio.run(custom())
        else:
            asyncio.run(run(make(scenario, lambda name: chat(server, name))))
    assert records(Step)
    written = b"".join(path.read_bytes() for path in tmp_path.glob("*/0*.ndjson")).decode()
    assert [text for text in CONTENT if text in written] == []
    failed = [step.name for step in records(Step) if "error" in step.output]
    expected = {"broken tool": ["tool: broken"], "error": ["agent: Failing"], "custom": ["custom: mine"]}
    if scenario != "error":  # from some version on, the agent's step has it too
        assert failed == expected.get(scenario, [])


def test_with_content_a_step_has_it(server: ModelServer, records: Any) -> None:
    """Where content is wanted, a tool's step has what it was asked and what it answered."""
    with WaxellContext("task", capture_content=True):
        asyncio.run(run(make("tool", lambda name: responses(server, name))))
        asyncio.run(run(make("broken tool", lambda name: responses(server, name))))
        with trace("t"), custom_span("mine", {"note": "kept"}) as span:
            span.set_error({"message": "it said", "data": {"error": "secret"}})
    found = {step.name: step.output for step in records(Step)}
    assert found["tool: search"]["input"] == ARGUMENTS
    assert found["tool: search"]["output"] == FOUND
    assert found["tool: broken"]["error"].startswith("Error running tool (non-fatal)")
    assert found["custom: mine"]["error"] == "it said: secret"
    assert found["custom: mine"]["data"] == {"note": "kept"}
    (first, *_) = records(LLMCall)
    assert first.prompt == "what the user said"


def test_a_step_is_redacted_whole_and_then_cut(server: ModelServer, records: Any, configure: Any) -> None:
    """`redact` sees a tool's texts; `content_limit` bounds what is left of them."""
    redact = redact_texts(lambda text: text.replace("what the tool found", "f" * 50))
    configure(capture_content=True, redact=redact, content_limit=40)
    with WaxellContext("task"):
        asyncio.run(run(make("tool", lambda name: responses(server, name))))
    (found,) = (step.output for step in records(Step) if step.name == "tool: search")
    assert found["output"] == f"{'f' * 40}… [10 characters cut]"


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("scenario", [name for name in STEPS if name not in ("guardrail trips",)])
def test_the_users_processor_sees_the_same_as_without_us(
    server: ModelServer, configure: Any, user: Seen, endpoint: str, scenario: str
) -> None:
    """Types, data, errors and order of the spans that a processor of the user's gets are those without us."""
    seen = []
    for with_us in (True, False):
        if not with_us:
            capture.uninstall()
        user.told.clear()
        with WaxellContext("task"):
            asyncio.run(run(make(scenario, lambda name: ENDPOINTS[endpoint](server, name))))
        seen.append(_without_ids(user.told))
    assert seen[0]
    assert seen[0] == seen[1]


def _without_ids(told: list[Any]) -> list[Any]:
    """Leave out what differs from answer to answer: the server counts them."""
    return [
        tuple(re.sub(r"(resp|call|chatcmpl|msg|fc)_?-?[0-9_]+", "ID", str(one)) for one in row)
        for row in told
    ]


def test_ours_stays_and_the_users_list_is_the_users(server: ModelServer, records: Any) -> None:
    """Given `set_trace_processors([…])` after us, the user's processors are as they were given, and steps are
    recorded; a list that was handed over is not changed, and ours is there once."""
    first, second = Seen(), Seen()
    given = [first]
    agents.set_trace_processors(given)
    agents.set_trace_processors(given)
    agents.add_trace_processor(second)
    with WaxellContext("task"):
        asyncio.run(run(make("text", lambda name: responses(server, name))))
    assert given == [first]
    assert first.told == second.told != []
    assert [step.name for step in records(Step)] == ["agent: Writer"]


def test_after_the_end_nothing_is_heard(server: ModelServer, records: Any) -> None:
    """Given `uninstall()`, agents go on and are not heard."""
    capture.uninstall()
    with WaxellContext("task"):
        assert asyncio.run(run(make("text", lambda name: responses(server, name)))) == TEXT
    assert records(Step) + records(LLMCall) == []


def test_disabled_tracing_leaves_the_calls(server: ModelServer, models: list[str], records: Any) -> None:
    """Where the user has disabled tracing, there are no steps, and each request is a call all the same."""
    with WaxellContext("task"):
        made = make("tool", lambda name: responses(server, name))
        asyncio.run(run(made, run_config=RunConfig(tracing_disabled=True)))
        agents.set_tracing_disabled(True)
        try:
            asyncio.run(run(make("tool", lambda name: responses(server, name))))
        finally:
            agents.set_tracing_disabled(False)
    assert records(Step) == []
    assert [call.model for call in records(LLMCall)] == models
    assert len(models) == 4


def test_a_run_config_without_sensitive_data_changes_no_number(
    server: ModelServer, models: list[str], records: Any
) -> None:
    """`trace_include_sensitive_data=False` keeps a tool's texts out of steps; the calls have their tokens."""
    with WaxellContext("task", capture_content=True):
        made = make("tool", lambda name: responses(server, name))
        asyncio.run(run(made, run_config=RunConfig(trace_include_sensitive_data=False)))
    (found,) = (step.output for step in records(Step) if step.name == "tool: search")
    assert found.get("input") is found.get("output") is None
    assert [tokens(call) for call in records(LLMCall)] == [TOKENS] * len(models)


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_where_the_sdk_is_not_heard_spans_tell_the_calls(
    server: ModelServer, models: list[str], records: Any, configure: Any, endpoint: str, streamed: bool
) -> None:
    """Given `capture` without openai, each request is a call by its span, with the same tokens and texts."""
    configure(capture=("openai-agents",), capture_content=True)
    with WaxellContext("task"):
        asyncio.run(run(make("tool", lambda name: ENDPOINTS[endpoint](server, name)), streamed))
        asyncio.run(run(make("error", lambda name: ENDPOINTS[endpoint](server, name)), streamed))
    *calls, failed = sorted(records(LLMCall), key=lambda call: call.at)
    assert len(calls) + 1 == len(models) == 3
    # 0.2 tells the cached ones and those of reasoning of responses alone.
    told = (TOKENS, (*TOKENS[:2], None, None)) if endpoint == "chat" else (TOKENS,)
    assert all(tokens(call) in told for call in calls)
    first, second = calls
    assert [(one["name"], one["arguments"]) for one in first.tool_calls] == [("search", ARGUMENTS)]
    assert first.prompt == second.prompt == "what the user said"
    assert [message["role"] for message in second.messages][-1] == "tool"
    assert second.messages[-1]["text"] == FOUND
    assert second.response == TEXT
    assert (failed.status, failed.error_type) == ("error", "openai.BadRequestError")
    if endpoint == "responses":
        assert first.response_model == f"{models[0]}-2026"
        assert first.response_id.startswith("resp_")
    else:
        assert [call.model for call in (*calls, failed)] == models


# -- models that no SDK of ours hears ----------------------------------------------------------------------


class OwnModel(Model):
    """A model of the user's own, told by a span of its own, as the SDK's models are."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

    async def get_response(self, *_: Any, **more: Any) -> ModelResponse:
        with generation_span(model="own-model", input=[{"role": "user", "content": "asked"}]) as span:
            await self.work(span)
        message = {
            "id": "m",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": TEXT, "annotations": []}],
        }
        from openai.types.responses import ResponseOutputMessage

        output = ResponseOutputMessage.model_validate(message)
        return ModelResponse(output=[output], usage=Usage(), response_id=None)

    async def stream_response(self, *_: Any, **more: Any) -> Any:
        raise NotImplementedError
        yield


async def answers(span: Any) -> None:
    span.span_data.usage = {
        "input_tokens": 3,
        "output_tokens": 2,
        "input_tokens_details": {"cached_tokens": 1},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    span.span_data.output = [{"role": "assistant", "content": "answered", "tool_calls": [call]}]


@pytest.mark.parametrize("wants_content", [False, True])
def test_a_model_that_nobody_hears_is_told_by_its_span(records: Any, wants_content: bool) -> None:
    """Given a model that goes through no SDK that is heard, its generation is the call, with its tokens."""
    with WaxellContext("task", capture_content=wants_content) as context:
        asyncio.run(run(agent("Own", OwnModel(answers))))
    (call,) = records(LLMCall)
    assert (call.model, call.status, call.run_id) == ("own-model", "ok", context.run_id)
    assert tokens(call) == (3, 2, 1, 0)
    assert call.duration_ms > 0
    said = {"name": "look", "id": "c1"} | ({"arguments": "{}"} if wants_content else {})
    assert call.tool_calls == [said]
    assert (call.prompt, call.response) == (("asked", "answered") if wants_content else ("", ""))


def test_tokens_that_nobody_told_are_none(records: Any) -> None:
    """A generation without usage, or with the zeros that stand for none, has no tokens, which is not 0."""

    async def says_nothing(span: Any) -> None:
        pass

    async def says_zero(span: Any) -> None:
        span.span_data.usage = {"requests": 1, "input_tokens": 0, "output_tokens": 0, "total_tokens": 0}

    with WaxellContext("task"):
        for work in (says_nothing, says_zero):
            asyncio.run(run(agent("Own", OwnModel(work))))
    assert [tokens(call) for call in records(LLMCall)] == [(None,) * 4] * 2


@pytest.mark.parametrize(
    ("model", "model_impl", "told"),
    [
        ("anthropic/claude-x", "litellm", ("claude-x", "anthropic")),
        ("gemini/g/x", "litellm", ("g/x", "gcp.gemini")),
        ("claude-x", "litellm", ("claude-x", "")),
        ("mine/claude-x", None, ("mine/claude-x", "")),
        (None, None, ("unknown", "")),
    ],
)
def test_a_name_that_begins_with_a_provider_says_it(
    records: Any, model: str | None, model_impl: str | None, told: tuple[str, str]
) -> None:
    """Of a model of litellm's, provider and model are told apart, as those who know prices know them."""
    config = {"model_impl": model_impl} if model_impl else None
    with WaxellContext("task"), trace("t"), generation_span(model=model, model_config=config):
        pass
    (call,) = records(LLMCall)
    assert (call.model, call.provider) == told


def test_a_model_that_fails_is_a_failed_call(records: Any) -> None:
    """Given a model of the user's own that raises, its call is an error of that type, without its text."""

    async def fails(span: Any) -> None:
        raise TimeoutError("secret")

    with WaxellContext("task"), pytest.raises(TimeoutError):
        asyncio.run(Runner.run(agent("Own", OwnModel(fails)), "x"))
    (call,) = records(LLMCall)
    assert (call.status, call.error_type, call.error_message) == ("error", "TimeoutError", "")


def test_what_is_heard_inside_is_told_once(server: ModelServer, models: list[str], records: Any) -> None:
    """Given a model of the user's own that asks through an SDK that is heard, its requests are the calls, and
    its own span is none; also of an agent that it asks."""

    async def asks(span: Any) -> None:
        client = openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0)
        for _ in range(2):
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])

    async def asks_an_agent(span: Any) -> None:
        await run(agent("Inner", OwnModel(answers)))

    with WaxellContext("task"):
        asyncio.run(run(agent("Own", OwnModel(asks))))
        assert [call.model for call in records(LLMCall)] == models == ["m", "m"]
        asyncio.run(run(agent("Outer", OwnModel(asks_an_agent))))
    assert [call.model for call in records(LLMCall)][2:] == ["own-model"]


# -- which run ---------------------------------------------------------------------------------------------


def test_agents_at_the_same_time_are_in_their_runs(
    server: ModelServer, models: list[str], records: Any
) -> None:
    """Given two runs in one loop, at the same time, and two in threads, each has its own steps and calls."""

    async def task(name: str, scenario: str, streamed: bool) -> None:
        with WaxellContext(name):
            await run(make(scenario, lambda model: responses(server, model)), streamed)

    async def both() -> None:
        await asyncio.gather(task("a", "turns", False), task("b", "two tools at once", True))

    threads = [
        threading.Thread(target=lambda args=args: asyncio.run(task(*args)))
        for args in (("c", "handoff", True), ("d", "agent as a tool", False))
    ]
    for thread in threads:
        thread.start()
    asyncio.run(both())
    for thread in threads:
        thread.join()
    scenarios = {"a": "turns", "b": "two tools at once", "c": "handoff", "d": "agent as a tool"}
    for started in records(RunStarted):
        scenario = scenarios.pop(started.agent_name)
        steps = [step.name for step in records(Step) if step.run_id == started.run_id]
        calls = [call for call in records(LLMCall) if call.run_id == started.run_id]
        assert steps == STEPS[scenario]
        assert len(calls) == CALLS[scenario]
    assert not scenarios
    assert len(records(LLMCall)) == len(models)


def test_agents_that_one_run_gathers_are_in_it(server: ModelServer, models: list[str], records: Any) -> None:
    """Given three agents at the same time in one run, it has the steps and calls of all."""

    async def three() -> None:
        await asyncio.gather(*(run(make("tool", lambda name: responses(server, name))) for _ in range(3)))

    with WaxellContext("task"):
        asyncio.run(three())
    steps = records(Step)
    assert sorted(step.name for step in steps) == ["agent: Worker"] * 3 + ["tool: search"] * 3
    assert len({step.position for step in steps}) == 6
    assert len(records(LLMCall)) == len(models) == 6


def test_what_ends_elsewhere_is_where_it_began(records: Any) -> None:
    """Given spans that end in another run than they began in, or in another thread, they are the first's."""
    with WaxellContext("first") as first, trace("t"):
        spans = [
            custom_span("mine"),
            generation_span(model="m"),
            custom_span("last"),
            generation_span(model="m"),
        ]
        for span in spans:
            span.start()
    with WaxellContext("second", capture_content=True):
        spans[0].finish()
        spans[1].finish()
    thread = threading.Thread(target=lambda: [span.finish() for span in spans[2:]])
    thread.start()
    thread.join()
    assert [step.name for step in records(Step)] == ["custom: mine", "custom: last"]
    assert len(records(LLMCall)) == 2
    assert {record.run_id for record in records(Step) + records(LLMCall)} == {first.run_id}
    assert "data" not in records(Step)[0].output


def test_the_users_steps_stand_among_ours(server: ModelServer, records: Any) -> None:
    """A step that the user records inside a tool comes after the tool's, and before that of the next tool."""

    @function_tool
    async def noting(query: str) -> str:
        """Note."""
        waxell_context.record_step("noted")
        return FOUND

    made = agent("Worker", responses(server, "turns-2.noting"), tools=[noting])
    with WaxellContext("task") as waxell_context:
        asyncio.run(run(made))
    expected = ["agent: Worker", "tool: noting", "noted", "tool: noting", "noted"]
    assert [step.name for step in records(Step)] == expected


def test_outside_any_run_there_are_calls_and_no_steps(
    server: ModelServer, models: list[str], records: Any
) -> None:
    """Given no run, nothing is a step, and each request is a call for the background collector."""
    asyncio.run(run(make("tool", lambda name: responses(server, name))))
    assert records(Step) == []
    assert [call.run_id for call in records(LLMCall)] == [""] * 2


def test_a_run_that_is_not_recorded_has_neither(server: ModelServer, records: Any, configure: Any) -> None:
    """Given an excluded name, nothing inside is recorded."""
    configure(exclude=("secret*",))
    with WaxellContext("secret task"):
        asyncio.run(run(make("tool", lambda name: responses(server, name))))
    asyncio.run(run(make("text", lambda name: responses(server, name))))
    assert len(records(Step)) == 0
    assert len(records(LLMCall)) == 1


# -- what must not happen ----------------------------------------------------------------------------------


def test_a_span_that_never_ends_is_forgotten(records: Any) -> None:
    """Given spans that are begun and dropped, nothing of ours keeps them, and what follows is not theirs."""
    with WaxellContext("task"), trace("t"):
        kept = []
        for make_span in (lambda: generation_span(model="dropped"), lambda: agents.agent_span("Dropped")):
            span = make_span()
            span.start()
            kept.append(weakref.ref(span))
            del span
        gc.collect()
        assert [ref() for ref in kept] == [None, None]
        around = ours.nesting.enclosing(None)
        assert around is None
        with generation_span(model="next"):
            pass
        assert ours.nesting.innermost() is None, "what has ended is not kept either"
    assert [call.model for call in records(LLMCall)] == ["next"]
    assert records(Step) == []


def test_an_interrupt_passes_after_the_record_and_a_defect_does_not(
    records: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Given an interrupt of a framework that surfaces in the processor, it goes on, and the step is told; a
    defect is logged, once, and goes nowhere."""
    interrupt = type("SoftTimeLimitExceeded", (Exception,), {"__module__": "billiard.exceptions"})
    told: list[str] = []
    raised: list[type[Exception]] = [interrupt]

    def step_sink(**fields: Any) -> None:
        told.append(fields["id"])
        if raised:
            raise raised.pop()

    processor = ours.Processor()
    processor.listener = ours.Listener(
        lambda **_: None, lambda: "run", lambda: False, lambda: ("run", 1), step_sink
    )
    span = types.SimpleNamespace(span_id="s", parent_id=None, trace_id="t", error=None)
    span.span_data = types.SimpleNamespace(type="agent", name="A")
    processor.on_span_start(span)
    with pytest.raises(interrupt):
        processor.on_span_end(span)
    assert len(told) == 2
    assert len(set(told)) == 1
    with caplog.at_level(logging.WARNING, "waxell_workers.capture"):
        for _ in range(2):
            raised.append(ZeroDivisionError)
            processor.on_span_start(span)
            processor.on_span_end(span)
    assert [record.getMessage() for record in caplog.records] == [
        "a span of openai-agents could not be recorded (ZeroDivisionError)"
    ]


def test_a_span_of_no_known_shape_is_nothing(records: Any) -> None:
    """Given spans of a provider of the user's that lack what spans have, nothing is raised, nor recorded."""
    processor = ours.Processor()
    processor.listener = ours._processor.listener
    with WaxellContext("task"):
        for span in (object(), types.SimpleNamespace(), types.SimpleNamespace(span_data=None)):
            processor.on_span_start(span)
            processor.on_span_end(span)
    assert records(Step) == []


def test_neither_flush_nor_shutdown_do_anything(server: ModelServer, records: Any) -> None:
    """Given the SDK's own flush, by us or by the user, and its shutdown, agents are heard as before."""
    provider = agents.tracing.get_trace_provider()
    drain = Drain(("openai-agents",))
    drain.begin(time.monotonic() + 5)()
    assert drain.counts()["openai-agents"]["flushed"] == 1
    provider.shutdown()
    with WaxellContext("task"):
        asyncio.run(run(make("text", lambda name: responses(server, name))))
    assert len(records(Step)) == 1


def test_where_the_platforms_own_sdk_records_ours_is_silent(
    server: ModelServer, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given `waxell_observe` at work in this process, there are neither steps nor calls of ours."""
    monkeypatch.setitem(sys.modules, "waxell_observe._init", types.SimpleNamespace(_initialized=True))
    with WaxellContext("task"):
        asyncio.run(run(make("tool", lambda name: responses(server, name))))
    assert records(Step) + records(LLMCall) == []


# -- in processes of their own -----------------------------------------------------------------------------


def program(code: str, tmp_path: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "OPENAI_API_KEY": "none", "HOME": str(tmp_path)}
        | environment,
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


INIT = """
import sys, waxell_workers
def init(**more):
    waxell_workers.init(api_url="http://127.0.0.1:9", spool_dir="spool", shipper="external",
                        shutdown_timeout=0.0, **more)
def heard():
    from agents import agent_span, set_trace_processors, trace
    set_trace_processors([])
    with waxell_workers.WaxellContext("task") as run, trace("t"), agent_span("A"):
        pass
    return run.begin_step()[1] - 1
"""


@pytest.mark.parametrize(
    ("order", "steps"),
    [
        ("init(); import agents", 1),
        ("import agents; init()", 1),
        ("import agents; agents.set_trace_processors([]); init()", 1),
        ("init(capture=('openai-agents',)); import agents", 1),
        ("init(capture=('openai',)); import agents", 0),
    ],
)
def test_the_order_of_imports_is_free(tmp_path: Path, order: str, steps: int) -> None:
    """Given the SDK imported before `init` or after it, its agents are heard, if `capture` names it."""
    assert program(f"{INIT}\n{order}\nprint(heard())", tmp_path) == f"{steps}\n"


def test_tracing_that_the_environment_disables_stays_so(tmp_path: Path) -> None:
    """Given `OPENAI_AGENTS_DISABLE_TRACING`, there are no spans, and no steps."""
    out = program(
        f"{INIT}\ninit(); import agents\nprint(heard())", tmp_path, OPENAI_AGENTS_DISABLE_TRACING="1"
    )
    assert out == "0\n"


def test_nothing_is_imported_for_us(tmp_path: Path) -> None:
    """Given `init` without the SDK, neither it nor what hears it is imported."""
    names = "[n for n in sys.modules if n.startswith('agents') or 'capture.agents' in n]"
    code = f"{INIT}\ninit()\nprint({names})"
    assert program(code, tmp_path) == "[]\n"


@pytest.mark.parametrize("inside", ["", "from agents import tracing"])
def test_another_module_of_that_name_is_left_alone(tmp_path: Path, inside: str) -> None:
    """Given a project with a package `agents` of its own, nothing is said, and nothing done."""
    package = tmp_path / "agents"
    package.mkdir()
    (package / "__init__.py").write_text(inside)
    (package / "tracing.py").write_text("def add_trace_processor(one): raise SystemExit('not yours')")
    assert program(f"{INIT}\ninit(); import agents\nprint('fine')", tmp_path) == "fine\n"
