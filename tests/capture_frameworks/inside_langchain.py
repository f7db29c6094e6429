"""langchain and langgraph, over an SDK that is heard itself and over models that call none.

Run by `test_frameworks`. `OURS` is told by openai's instrumentor, `FAKE` by langchain's callbacks.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.capture_frameworks.hearing import MESSAGES, TOKENS, URL, Call, hearing, hearing_one
from tests.capture_frameworks.server import CACHED, TEXT
from waxell_workers.capture import nesting

# isort: split
import openai
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.language_models import FakeListChatModel, FakeListLLM, GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

FAKE_TEXT = "Fine"
FAKE = FakeListChatModel(responses=[FAKE_TEXT])
RUN = asyncio.new_event_loop().run_until_complete
"""One loop for all: langchain-openai keeps its connections, which belong to a loop."""


def ours(model: str = "model") -> ChatOpenAI:
    """Return a model that calls openai."""
    return ChatOpenAI(model=model, base_url=f"{URL}/v1", api_key="x", max_retries=0)


def _by_openai(call: Call) -> bool:
    return bool(call.response_id == "chat-1" and call.model == "model" and call.tokens[1] in (7, None))


def _by_langchain(call: Call) -> bool:
    return not call.response_id and call.response in (FAKE_TEXT, "")


def _count(calls: list[Call]) -> tuple[int, int]:
    """Return how many were told by openai's instrumentor, and by langchain's."""
    assert all(_by_openai(call) != _by_langchain(call) for call in calls), calls
    return sum(map(_by_openai, calls)), sum(map(_by_langchain, calls))


SYNC: dict[str, Callable[[Any], Any]] = {
    "invoke": lambda model: model.invoke("Hi"),
    "stream": lambda model: list(model.stream("Hi")),
    "batch of one": lambda model: model.batch(["Hi"]),
    "in a chain": lambda model: (ChatPromptTemplate.from_messages([("user", "{it}")]) | model).invoke("Hi"),
    "streamed by a chain": lambda model: list((RunnableLambda(str) | model).stream("Hi")),
    "inside a function": lambda model: RunnableLambda(lambda it: model.invoke(it)).invoke("Hi"),
    "structured": lambda model: model.bind(stop=["x"]).invoke("Hi"),
}


async def _read(stream: Any) -> None:
    async for _ in stream:
        pass


ASYNC: dict[str, Callable[[Any], Any]] = {
    "ainvoke": lambda model: model.ainvoke("Hi"),
    "astream": lambda model: _read(model.astream("Hi")),
    "abatch": lambda model: model.abatch(["Hi"]),
    "astream_events": lambda model: _read(model.astream_events("Hi", version="v2")),
    "in a chain": lambda model: (RunnableLambda(str) | model).ainvoke("Hi"),
    "sync in async": lambda model: RunnableLambda(lambda it: model.invoke(it)).ainvoke("Hi"),
}


@pytest.mark.parametrize("how", SYNC)
def test_a_call_is_told_once(how: str) -> None:
    """By the SDK's instrumentor where there is one, else by langchain's callbacks."""
    with hearing_one() as call:
        SYNC[how](ours())
    assert _by_openai(call)
    with hearing_one() as call:
        SYNC[how](FAKE)
    assert _by_langchain(call)
    assert not call.is_left


@pytest.mark.parametrize("how", ASYNC)
def test_an_asynchronous_call_is_told_once(how: str) -> None:
    """Likewise."""
    with hearing_one() as call:
        RUN(ASYNC[how](ours()))
    assert _by_openai(call)
    with hearing_one() as call:
        RUN(ASYNC[how](FAKE))
    assert _by_langchain(call)


def test_what_a_model_tells_is_heard() -> None:
    """Tokens, the reason to finish, what was said."""
    usage: Any = {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18}
    usage["input_token_details"] = {"cache_read": CACHED}
    answer = AIMessage(TEXT, usage_metadata=usage, response_metadata={"finish_reason": "stop"})
    with hearing_one() as call:
        GenericFakeChatModel(messages=iter([answer])).invoke([HumanMessage("Hi")])
    assert (call.tokens, call.tokens_cached, call.finish_reason) == (TOKENS, CACHED, "stop")
    assert (call.prompt, call.response, call.status) == ("Hi", TEXT, "ok")


def test_a_model_of_texts_is_told_once() -> None:
    """Not only chats."""
    model = FakeListLLM(responses=[FAKE_TEXT])
    with hearing() as calls:
        model.invoke("Hi")
        RUN(model.ainvoke("Hi"))
    assert len(calls) == 2


def test_batches() -> None:
    """As many calls as there are inputs, whichever way they are handed in."""
    several: list[list[BaseMessage]] = [[HumanMessage("a")], [HumanMessage("b")], [HumanMessage("c")]]

    async def asynchronous(model: Any) -> None:
        await model.abatch(several)
        await model.agenerate(several)

    for model, expected in ((ours(), (12, 0)), (FAKE, (0, 12))):
        with hearing() as calls:
            model.batch(several)
            model.generate(several)
            RUN(asynchronous(model))
        assert _count(calls) == expected


def test_calls_at_a_time_stay_apart() -> None:
    """In tasks of one event loop, and in threads."""

    async def several() -> None:
        models = [ours(), FAKE] * 4
        await asyncio.gather(*(model.ainvoke("Hi") for model in models))

    with hearing() as calls:
        RUN(several())
    assert _count(calls) == (4, 4)
    with hearing() as calls, ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda model: model.invoke("Hi"), [ours(), FAKE] * 4))
    assert _count(calls) == (4, 4)


def test_a_chain_of_several_models() -> None:
    """Beside and after each other, in one run."""
    chain = RunnableParallel(a=ours(), b=FAKE) | RunnableLambda(lambda _: "Hi") | FAKE
    with hearing() as calls:
        chain.invoke("Hi")
        RUN((RunnableParallel(a=ours(), b=FAKE) | RunnableLambda(lambda _: "Hi") | FAKE).ainvoke("Hi"))
    assert _count(calls) == (2, 4)


def test_an_agent_with_a_tool() -> None:
    """Two calls: one that asks for the tool, one that answers; a model that the tool calls is one more."""

    @tool
    def weather(city: str) -> str:
        """Return the weather."""
        return str(FAKE.invoke(city).content)

    with hearing() as calls:
        create_agent(ours("tools"), tools=[weather]).invoke({"messages": [("user", "Hi")]})
    assert [call.model for call in calls] == ["tools", "unknown", "tools"]
    assert [tool_call["name"] for tool_call in calls[0].tool_calls] == ["weather"]

    async def asynchronous() -> None:
        await create_agent(ours("tools"), tools=[weather]).ainvoke({"messages": [("user", "Hi")]})

    with hearing() as calls:
        RUN(asynchronous())
    assert [call.model for call in calls] == ["tools", "unknown", "tools"]


def test_errors_are_told_once() -> None:
    """With the type of the SDK, or of the model; the text is without the traceback that callbacks get."""
    with hearing_one() as call, pytest.raises(openai.RateLimitError):
        ours("fail-429").invoke("Hi")
    assert (call.status, call.error_type) == ("error", "openai.RateLimitError")

    class Broken(FakeListChatModel):
        def _call(self, *args: Any, **kwargs: Any) -> str:
            raise ValueError("broken")

    with hearing_one() as call, pytest.raises(ValueError, match="broken"):
        Broken(responses=[""]).invoke("Hi")
    assert (call.status, call.error_type, call.error_message) == ("error", "ValueError", "broken")


def test_retries_are_calls_of_their_own() -> None:
    """Each that langchain makes is told."""
    model = ours("once-503").with_retry(wait_exponential_jitter=False, stop_after_attempt=2)
    with hearing() as calls:
        model.invoke("Hi")
    assert [call.status for call in calls] == ["error", "ok"]


@pytest.mark.parametrize("model", [ours(), FAKE])
def test_a_stream_that_is_left_is_told_once(model: Any) -> None:
    """As left, and no error; what comes after it is told as ever."""
    with hearing_one() as call:
        stream = model.stream("Hi")
        next(stream)
        del stream
        gc.collect()
    assert (call.status, call.streamed, call.is_left) == ("ok", True, True)
    with hearing() as calls:
        ours().invoke("Hi")
        FAKE.invoke("Hi")
    assert _count(calls) == (1, 1)


def test_nothing_is_left_behind() -> None:
    """After a model of langchain's, a call through the SDK itself is told, and takes none away."""
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key="x")
    with hearing() as calls:
        FAKE.invoke("Hi")
        client.chat.completions.create(model="model", messages=MESSAGES)
        FAKE.invoke("Hi")
    assert [_by_openai(call) for call in calls] == [False, True, False]


def test_what_is_over_is_let_go() -> None:
    """The context keeps nothing of a call that has ended, however many there were."""
    with hearing():
        for _ in range(3):
            FAKE.invoke("Hi")
            ours().invoke("Hi")
    place = nesting.innermost()
    assert place is not None
    assert not place.is_open
    assert place.enclosing is None
    assert not place.inner


def test_an_answer_from_a_cache_is_no_call() -> None:
    """No model was asked."""
    model = FakeListChatModel(responses=[FAKE_TEXT], cache=InMemoryCache())
    with hearing_one():
        model.invoke("Hi")
    with hearing() as calls:
        assert model.invoke("Hi").content == FAKE_TEXT
    assert not calls


class _Handler(BaseCallbackHandler):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
        self.heard.append("start")

    def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        self.heard.append("end")


class _AsyncHandler(AsyncCallbackHandler, _Handler):
    async def on_llm_start(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        self.heard.append("start")

    async def on_llm_end(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        self.heard.append("end")


def test_the_users_callbacks_are_called_as_ever() -> None:
    """Of either kind, in either way."""
    for handler in (_Handler(), _AsyncHandler()):
        model = FakeListLLM(responses=[FAKE_TEXT])
        model.invoke("Hi", config={"callbacks": [handler]})
        RUN(model.ainvoke("Hi", config={"callbacks": [handler]}))
        assert handler.heard == ["start", "end"] * 2


def test_an_interrupt_that_surfaces_in_a_callback_of_ours_gets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """langchain logs what a handler raises, and goes on: ours says that an interrupt is to be raised."""
    stopped = type("SoftTimeLimitExceeded", (Exception,), {"__module__": "billiard.exceptions"})

    def stop(*args: Any, **kwargs: Any) -> None:
        raise stopped

    from openinference.instrumentation.langchain._tracer import OpenInferenceTracer

    monkeypatch.setattr(OpenInferenceTracer, "on_chat_model_start", stop)
    with hearing(), pytest.raises(stopped):
        FAKE.invoke("Hi")
