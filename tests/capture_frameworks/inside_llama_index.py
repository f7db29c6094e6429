"""llama-index, over an SDK that is heard itself and over models that call none. Run by `test_frameworks`."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.capture_frameworks.hearing import MESSAGES, TOKENS, URL, Call, hearing, hearing_one
from tests.capture_frameworks.server import TEXT

# isort: split
import openai
from langchain_core.language_models import FakeListChatModel
from langchain_openai import ChatOpenAI
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import ChatMessage, ChatResponse, MockLLM
from llama_index.core.llms.callbacks import llm_chat_callback
from llama_index.llms.openai import OpenAI

CHAT = [ChatMessage(role="user", content="Hi")]
FAKE = MockLLM()
EMBEDDING = MockEmbedding(embed_dim=2)


def ours(**more: Any) -> OpenAI:
    """Return a model that calls openai; a new one, since its client belongs to an event loop."""
    return OpenAI(model="gpt-4", api_base=f"{URL}/v1", api_key="x", max_retries=0, **more)


def _by_openai(call: Call) -> bool:
    return call.response_id == "chat-1" and call.model == "gpt-4"


SYNC: dict[str, Callable[[Any], Any]] = {
    "chat": lambda model: model.chat(CHAT),
    "complete": lambda model: model.complete("Hi"),
    "stream_chat": lambda model: list(model.stream_chat(CHAT)),
    "stream_complete": lambda model: list(model.stream_complete("Hi")),
}


async def _read(stream: Any) -> None:
    async for _ in await stream:
        pass


ASYNC: dict[str, Callable[[Any], Any]] = {
    "achat": lambda model: model.achat(CHAT),
    "acomplete": lambda model: model.acomplete("Hi"),
    "astream_chat": lambda model: _read(model.astream_chat(CHAT)),
}


@pytest.mark.parametrize("how", SYNC)
def test_a_call_is_told_once(how: str) -> None:
    """By the SDK's instrumentor where there is one, else by llama-index's events."""
    with hearing_one() as call:
        SYNC[how](ours())
    assert _by_openai(call)
    assert call.response == TEXT
    with hearing_one() as call:
        SYNC[how](FAKE)
    assert not _by_openai(call)
    assert (call.status, call.streamed, call.is_left) == ("ok", "stream" in how, False)
    assert "Hi" in call.prompt
    assert "Hi" in call.response


@pytest.mark.parametrize("how", ASYNC)
def test_an_asynchronous_call_is_told_once(how: str) -> None:
    """Likewise."""
    with hearing_one() as call:
        asyncio.run(ASYNC[how](ours()))
    assert _by_openai(call)
    with hearing_one() as call:
        asyncio.run(ASYNC[how](FAKE))
    assert not _by_openai(call)


def test_what_a_provider_tells_is_heard() -> None:
    """Tokens, names and the reason to finish, from the answer that llama-index hands on."""

    class Raw(MockLLM):
        @llm_chat_callback()
        def chat(self, messages: Any, **kwargs: Any) -> ChatResponse:
            usage = {"prompt_tokens": TOKENS[0], "completion_tokens": TOKENS[1]}
            raw = {"model": "dated", "id": "it", "usage": usage, "choices": [{"finish_reason": "stop"}]}
            return ChatResponse(message=ChatMessage(role="assistant", content=TEXT), raw=raw)

    with hearing_one() as call:
        Raw().chat(CHAT)
    assert (call.tokens, call.response_model, call.response_id) == (TOKENS, "dated", "it")
    assert (call.finish_reason, call.prompt, call.response) == ("stop", "Hi", TEXT)


def test_calls_at_a_time_stay_apart() -> None:
    """In tasks of one event loop, and in threads."""

    async def several() -> None:
        await asyncio.gather(*(model.achat(CHAT) for model in [ours(), FAKE] * 4))

    with hearing() as calls:
        asyncio.run(several())
    assert sorted(map(_by_openai, calls)) == [False] * 4 + [True] * 4
    with hearing() as calls, ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda model: model.chat(CHAT), [ours(), FAKE] * 4))
    assert sorted(map(_by_openai, calls)) == [False] * 4 + [True] * 4


def test_errors_are_told_once() -> None:
    """With the type of the SDK, or of the model."""
    with hearing_one() as call, pytest.raises(openai.RateLimitError):
        ours(additional_kwargs={"model": "fail-429"}).chat(CHAT)
    assert (call.status, call.error_type) == ("error", "openai.RateLimitError")

    class Broken(MockLLM):
        def complete(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("broken")

    with hearing_one() as call, pytest.raises(ValueError, match="broken"):
        Broken().chat(CHAT)
    assert (call.status, call.error_type, call.error_message) == ("error", "ValueError", "broken")


def test_a_stream_that_is_left_is_told_once() -> None:
    """As left, and no error; what comes after it is told as ever."""
    for model in (ours(), FAKE):
        with hearing_one() as call:
            stream = model.stream_complete("Hi there")
            next(stream)
            del stream
            gc.collect()
        assert (call.status, call.streamed, call.is_left) == ("ok", True, True)
    with hearing() as calls:
        ours().chat(CHAT)
        FAKE.chat(CHAT)
    assert list(map(_by_openai, calls)) == [True, False]


def test_a_query_engine() -> None:
    """Embeddings of the documents and of the question, and the answer: each once."""
    with hearing() as calls:
        index = VectorStoreIndex.from_documents([Document(text="a")], embed_model=EMBEDDING)
        index.as_query_engine(llm=FAKE).query("Hi")
        index.as_query_engine(llm=ours()).query("Hi")
    operations = ["embeddings", "embeddings", "chat", "embeddings", "chat"]
    assert [call.operation for call in calls] == operations
    assert [_by_openai(call) for call in calls if call.operation == "chat"] == [False, True]


def test_a_framework_in_a_framework() -> None:
    """A model of llama-index's that asks langchain's, which may ask openai: one call, told by the last."""

    def ask(inner: Any) -> None:
        class Over(MockLLM):
            @llm_chat_callback()
            def chat(self, messages: Any, **kwargs: Any) -> ChatResponse:
                answer = str(inner.invoke("Hi").content)
                return ChatResponse(message=ChatMessage(role="assistant", content=answer))

        Over().chat(CHAT)

    with hearing_one() as call:
        ask(ChatOpenAI(model="gpt-4", base_url=f"{URL}/v1", api_key="x", max_retries=0))
    assert _by_openai(call)
    with hearing_one() as call:
        ask(FakeListChatModel(responses=["Fine"]))
    assert (call.provider, call.response) == ("fakelistchatmodel", "Fine")


def test_nothing_is_left_behind() -> None:
    """After a model of llama-index's, a call through the SDK itself is told, and takes none away."""
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key="x")
    with hearing() as calls:
        FAKE.chat(CHAT)
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
        FAKE.chat(CHAT)
    assert list(map(_by_openai, calls)) == [False, True, False]
