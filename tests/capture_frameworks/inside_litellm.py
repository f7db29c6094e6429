"""litellm, which calls some providers by their SDK and most by itself. Run by `test_frameworks`."""

from __future__ import annotations

import asyncio
import gc
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.capture_frameworks.hearing import MESSAGES, NONE, TOKENS, URL, hearing, hearing_one
from tests.capture_frameworks.server import CACHED, TEXT, Handler

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks GitHub for prices
# isort: split
import litellm
import openai
from langchain_core.language_models import FakeListChatModel

litellm.suppress_debug_info = True

MODELS = {
    "openai/model": "openai",
    "mistral/model": "mistral_ai",
    "anthropic/model": "anthropic",
    "ollama_chat/model": "ollama",
}


def _ask(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": MESSAGES, "api_base": URL, "api_key": "x", "max_retries": 0, **more}


@pytest.mark.parametrize("model", MODELS)
def test_a_call_is_told_once(model: str) -> None:
    """Whether litellm or an SDK makes the request: one call, with model and provider apart."""
    with hearing_one() as call:
        litellm.completion(**_ask(model))
    assert (call.model, call.provider, call.operation) == ("model", MODELS[model], "chat")
    assert call.tokens == TOKENS
    assert (call.status, call.prompt, call.response, call.finish_reason) == ("ok", "Hi", TEXT, "stop")
    if "ollama" not in model:
        assert call.tokens_cached == CACHED


@pytest.mark.parametrize("model", ["openai/model", "mistral/model"])
def test_a_stream_is_told_once(model: str) -> None:
    """With its tokens, if the caller asks for them; without is a known gap."""
    with hearing_one() as call:
        list(litellm.completion(**_ask(model, stream=True, stream_options={"include_usage": True})))
    assert (call.streamed, call.is_left, call.response, call.tokens) == (True, False, TEXT, TOKENS)
    with hearing_one() as call:
        list(litellm.completion(**_ask(model, stream=True)))
    assert (call.streamed, call.is_left, call.response) == (True, False, TEXT)
    assert call.tokens == NONE, "no known gap any more"
    assert call.ttft_ms is None, "no known gap any more"


@pytest.mark.parametrize("pieces", [0, 1])
def test_a_stream_that_is_left_is_told_once(pieces: int) -> None:
    """Also one that nobody read."""
    with hearing_one() as call:
        stream = litellm.completion(**_ask("mistral/model", stream=True))
        for _ in range(pieces):
            next(stream)
        del stream
        gc.collect()
    assert (call.status, call.is_left) == ("ok", True)


@pytest.mark.parametrize("model", ["openai/fail-429", "anthropic/fail-429"])
def test_an_error_is_told_once(model: str) -> None:
    """The caller gets litellm's error, and so do we."""
    with hearing_one() as call, pytest.raises(litellm.RateLimitError):
        litellm.completion(**_ask(model))
    assert (call.status, call.error_type, call.model) == ("error", "litellm.RateLimitError", "fail-429")


def test_asynchronous_calls_stay_apart() -> None:
    """Each of several at a time is one."""

    async def several() -> None:
        await asyncio.gather(*(litellm.acompletion(**_ask(model)) for model in MODELS))
        async for _ in await litellm.acompletion(**_ask("mistral/model", stream=True)):
            pass

    with hearing() as calls:
        asyncio.run(several())
    assert sorted(call.provider for call in calls) == sorted([*MODELS.values(), "mistral_ai"])


def test_calls_in_threads_stay_apart() -> None:
    """Likewise."""
    with hearing() as calls, ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda model: litellm.completion(**_ask(model)), [*MODELS, *MODELS]))
    assert sorted(call.provider for call in calls) == sorted([*MODELS.values(), *MODELS.values()])


def test_embeddings_are_told_once() -> None:
    """With the tokens that they cost."""
    with hearing_one() as call:
        litellm.embedding(model="openai/model", input=["Hi"], api_base=URL, api_key="x")
    assert (call.model, call.operation, call.tokens) == ("model", "embeddings", (TOKENS[0], None))


def test_a_router_is_told_once() -> None:
    """It calls what is instrumented."""
    parameters = {"model": "anthropic/model", "api_base": URL, "api_key": "x"}
    router = litellm.Router(model_list=[{"model_name": "mine", "litellm_params": parameters}])
    with hearing_one() as call:
        router.completion(model="mine", messages=MESSAGES)
    assert (call.model, call.provider, call.tokens) == ("model", "anthropic", TOKENS)


def test_retries_of_litellms_are_one_call() -> None:
    """It describes what it does in one span, however often it asks: a known gap."""
    with hearing_one() as call:
        litellm.completion(**_ask("openai/once-500", max_retries=None, num_retries=1))
    assert Handler.asked["once-500"] == 2
    assert call.status == "ok"


def test_a_model_by_position_is_unknown() -> None:
    """OpenInference's reads keywords alone: a known gap."""
    with hearing_one() as call:
        litellm.completion("mistral/model", MESSAGES, api_base=URL, api_key="x")
    assert (call.model, call.tokens) == ("unknown", TOKENS)


def test_an_sdk_inside_it_is_told_instead() -> None:
    """Where a provider of litellm's asks through an SDK that is heard: that knows the model and the id."""
    client = openai.OpenAI(base_url=URL, api_key="x")

    class Own(litellm.CustomLLM):
        def completion(self, *args: Any, **kwargs: Any) -> Any:
            answer = client.chat.completions.create(model="direct", messages=MESSAGES)
            return litellm.ModelResponse(**answer.model_dump())

    litellm.custom_provider_map = [{"provider": "own", "custom_handler": Own()}]
    with hearing_one() as call:
        litellm.completion(**_ask("own/model"))
    assert (call.model, call.response_id, call.tokens) == ("direct", "chat-1", TOKENS)


def test_it_inside_langchain_is_told_once() -> None:
    """By litellm, which knows more."""

    class Over(FakeListChatModel):
        def _call(self, *args: Any, **kwargs: Any) -> str:
            return str(litellm.completion(**_ask("anthropic/model")).choices[0].message.content)

    with hearing_one() as call:
        assert Over(responses=[""]).invoke("Hi").content == TEXT
    assert (call.model, call.provider, call.tokens) == ("model", "anthropic", TOKENS)


def test_an_sdk_beside_it_is_heard() -> None:
    """A call through the SDK itself is told by the SDK's instrumentor, before and after litellm's."""
    client = openai.OpenAI(base_url=URL, api_key="x")
    with hearing() as calls:
        client.chat.completions.create(model="direct", messages=MESSAGES)
        litellm.completion(**_ask("mistral/model"))
        client.chat.completions.create(model="direct", messages=MESSAGES)
    assert [call.model for call in calls] == ["direct", "model", "direct"]
