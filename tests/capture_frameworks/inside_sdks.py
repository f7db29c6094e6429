"""SDKs that are heard through OpenInference's instrumentors, and Bedrock through the official one.

Run by `test_frameworks`, in an environment with the newest of each. Where an assertion says that something is
not heard, that is a known gap of the instrumentor's, and stands on the documentation's page.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.capture_frameworks.hearing import MESSAGES, NONE, TOKENS, URL, Call, hearing, hearing_one
from tests.capture_frameworks.server import CACHED, REASONING, TEXT

# isort: split
import boto3
import botocore.config
import botocore.exceptions
import cohere
import groq
import mistralai.client
import ollama
import together

MISTRAL = mistralai.client.Mistral(api_key="x", server_url=URL)
GROQ = groq.Groq(api_key="x", base_url=URL, max_retries=0)
TOGETHER = together.Together(api_key="x", base_url=URL, max_retries=0)
OLLAMA = ollama.Client(host=URL)
COHERE = cohere.ClientV2(api_key="x", base_url=URL)
BEDROCK = boto3.client(
    "bedrock-runtime",
    region_name="us-east-1",
    endpoint_url=URL,
    aws_access_key_id="x",
    aws_secret_access_key="x",
    config=botocore.config.Config(retries={"max_attempts": 0}),
)
BEDROCK_MESSAGES = [{"role": "user", "content": [{"text": "Hi"}]}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def _cohere(model: str) -> Any:
    return COHERE.chat(model=model, messages=MESSAGES, request_options={"max_retries": 0})


def _bedrock_events() -> Any:
    return BEDROCK.converse_stream(modelId="model", messages=BEDROCK_MESSAGES)["stream"]


PLAIN: dict[str, Callable[[str], Any]] = {
    "mistral_ai": lambda model: MISTRAL.chat.complete(model=model, messages=MESSAGES),
    "groq": lambda model: GROQ.chat.completions.create(model=model, messages=MESSAGES),
    "together": lambda model: TOGETHER.chat.completions.create(model=model, messages=MESSAGES),
    "ollama": lambda model: OLLAMA.chat(model=model, messages=MESSAGES),
    "cohere": _cohere,
    "aws.bedrock": lambda model: BEDROCK.converse(modelId=model, messages=BEDROCK_MESSAGES),
}
STREAMS: dict[str, Callable[[], Any]] = {
    "mistral_ai": lambda: MISTRAL.chat.stream(model="model", messages=MESSAGES),
    "together": lambda: TOGETHER.chat.completions.create(model="model", messages=MESSAGES, stream=True),
    "ollama": lambda: OLLAMA.chat(model="model", messages=MESSAGES, stream=True),
    "cohere": lambda: COHERE.chat_stream(model="model", messages=MESSAGES),
    "aws.bedrock": _bedrock_events,
}
TELL_THE_FIRST_TOKEN = {"mistral_ai", "aws.bedrock"}
"""The others: a known gap."""


def _is_an_answer(call: Call, provider: str) -> None:
    assert (call.model, call.provider, call.operation, call.status) == ("model", provider, "chat", "ok")
    assert call.response_model in ("model-dated", "")
    assert call.tokens == TOKENS
    assert call.prompt == "Hi"
    assert call.response == TEXT
    assert call.finish_reason in ("stop", "COMPLETE")
    assert not call.is_left


@pytest.mark.parametrize("provider", PLAIN)
def test_a_call_is_heard(provider: str) -> None:
    """One call, with the provider's name, its tokens and what was said."""
    with hearing_one() as call:
        PLAIN[provider]("model")
    _is_an_answer(call, provider)
    assert not call.streamed


@pytest.mark.parametrize("provider", PLAIN)
def test_an_error_is_heard(provider: str) -> None:
    """The error reaches the caller, and is told with its type, without content in its text."""
    with hearing_one() as call, pytest.raises(Exception, match="429") as raised:
        PLAIN[provider]("fail-429")
    kind = raised.type
    assert call.status == "error"
    assert call.error_type == f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
    assert call.error_message
    assert not call.error_message.startswith(kind.__name__)
    assert (call.model, call.provider, call.tokens) == ("fail-429", provider, NONE)


@pytest.mark.parametrize("provider", STREAMS)
def test_a_stream_is_heard(provider: str) -> None:
    """A stream that is read to its end is one call with all that an answer has."""
    with hearing_one() as call:
        assert len(list(STREAMS[provider]())) >= 3
    _is_an_answer(call, provider)
    assert call.streamed
    assert (call.ttft_ms is not None) == (provider in TELL_THE_FIRST_TOKEN)


@pytest.mark.parametrize("provider", STREAMS)
def test_a_stream_that_is_left_is_heard(provider: str) -> None:
    """A stream that is dropped after its first piece is one call, no error, and said to be left."""
    with hearing_one() as call:
        stream = STREAMS[provider]()
        next(iter(stream))
        getattr(stream, "close", lambda: None)()
        del stream
        gc.collect()
    assert call.status == "ok"
    assert call.is_left
    assert call.tokens == NONE


def test_details_of_tokens() -> None:
    """Cached tokens and those of reasoning are heard where the instrumentor tells them."""
    with hearing_one() as call:
        PLAIN["groq"]("model")
    assert (call.tokens_cached, call.tokens_reasoning) == (CACHED, REASONING)
    with hearing_one() as call:
        PLAIN["aws.bedrock"]("model")
    assert call.tokens_cached == CACHED
    with hearing_one() as call:
        PLAIN["mistral_ai"]("model")
    assert call.tokens_cached is None, "no known gap any more"


def test_tool_calls() -> None:
    """The tool that a model asks for is heard."""
    with hearing_one() as call:
        GROQ.chat.completions.create(model="tools", messages=MESSAGES, tools=TOOLS)
    assert call.tool_calls == [{"name": "weather", "id": "call_1", "arguments": {"city": "Paris"}}]


def test_a_stream_of_groq_is_heard_only_to_begin() -> None:
    """OpenInference's groq ends the call where its stream begins: neither tokens nor text are heard."""
    with hearing_one() as call:
        list(GROQ.chat.completions.create(model="model", messages=MESSAGES, stream=True))
    assert (call.status, call.streamed, call.is_left) == ("ok", True, False)
    assert call.tokens == NONE, "no known gap any more"


def test_embeddings() -> None:
    """Those of cohere are heard, without their tokens; reranking is no call of a model that answers."""
    with hearing_one() as call:
        COHERE.embed(model="model", texts=["Hi"], input_type="search_query", embedding_types=["float"])
    assert (call.model, call.operation, call.provider) == ("model", "embeddings", "cohere")
    assert call.tokens == NONE, "no known gap any more"
    with hearing() as calls, pytest.raises(cohere.NotFoundError):
        COHERE.rerank(model="model", query="Hi", documents=["a"])
    assert not calls


def test_a_bedrock_model_by_its_own_body() -> None:
    """`invoke_model` is heard, and its body can still be read."""
    body = json.dumps({"messages": MESSAGES, "max_tokens": 5, "anthropic_version": "bedrock-2023-05-31"})
    with hearing_one() as call:
        answer = BEDROCK.invoke_model(modelId="anthropic.model", body=body)
        assert json.loads(answer["body"].read())["stop_reason"] == "end_turn"
    assert (call.provider, call.tokens, call.tokens_cached) == ("aws.bedrock", TOKENS, CACHED)


async def _asynchronous(provider: str) -> None:
    """Make a plain call and read a stream, each within its own client."""
    if provider == "mistral_ai":
        mistral = mistralai.client.Mistral(api_key="x", server_url=URL)
        await mistral.chat.complete_async(model="model", messages=MESSAGES)
        pieces = await mistral.chat.stream_async(model="model", messages=MESSAGES)
    elif provider == "groq":
        client = groq.AsyncGroq(api_key="x", base_url=URL)
        await client.chat.completions.create(model="model", messages=MESSAGES)
        pieces = await client.chat.completions.create(model="model", messages=MESSAGES, stream=True)
    elif provider == "together":
        tog = together.AsyncTogether(api_key="x", base_url=URL)
        await tog.chat.completions.create(model="model", messages=MESSAGES)
        pieces = await tog.chat.completions.create(model="model", messages=MESSAGES, stream=True)
    elif provider == "ollama":
        oll = ollama.AsyncClient(host=URL)
        await oll.chat(model="model", messages=MESSAGES)
        pieces = await oll.chat(model="model", messages=MESSAGES, stream=True)
    else:
        coh = cohere.AsyncClientV2(api_key="x", base_url=URL)
        await coh.chat(model="model", messages=MESSAGES)
        pieces = coh.chat_stream(model="model", messages=MESSAGES)
    assert [piece async for piece in pieces]


@pytest.mark.parametrize("provider", ["mistral_ai", "groq", "together", "ollama", "cohere"])
def test_asynchronous_calls_are_heard(provider: str) -> None:
    """Two calls, a plain and a streamed one."""
    with hearing() as calls:
        asyncio.run(_asynchronous(provider))
    plain, streamed = calls
    _is_an_answer(plain, provider)
    assert streamed.streamed
    if provider != "groq":
        _is_an_answer(streamed, provider)


class Stopped(Exception):
    """Stands for a framework's interrupt: raised inside the SDK's call."""


@pytest.mark.parametrize("provider", ["mistral_ai", "groq", "together", "ollama", "cohere", "aws.bedrock"])
@pytest.mark.parametrize("kind", [Stopped, KeyboardInterrupt])
def test_what_interrupts_a_call_gets_out(
    provider: str, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No exception that surfaces in the SDK is swallowed, plain or not; the call is told."""

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise kind("now")

    monkeypatch.setattr("httpx.Client.send", stop)
    monkeypatch.setattr("mistralai.client.basesdk.BaseSDK.do_request", stop)
    monkeypatch.setattr("botocore.httpsession.URLLib3Session.send", stop)
    for name in ("groq._base_client", "together._base_client"):
        monkeypatch.setattr(f"{name}.SyncAPIClient._send_request", stop, raising=False)
    with hearing_one() as call, pytest.raises(BaseException, match=r"now|[Cc]onnection"):
        PLAIN[provider]("model")
    assert call.status == "error"


READERS = {
    "mistral_ai": "mistralai.{}.get_attributes_from_response",
    "groq": "groq.{}.get_attributes",
    "together": "together.{}.get_attributes",
    "ollama": "ollama.{}.get_attributes",
}


@pytest.mark.parametrize("provider", READERS)
def test_an_interrupt_that_surfaces_in_an_instrumentor_gets_out(
    provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They catch and log what comes while they read an answer: but a soft time limit gets out."""
    stopped = type("SoftTimeLimitExceeded", (Exception,), {"__module__": "billiard.exceptions"})

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise stopped

    reader = READERS[provider].format("_response_attributes_extractor._ResponseAttributesExtractor")
    monkeypatch.setattr(f"openinference.instrumentation.{reader}", stop)
    with hearing_one() as call, pytest.raises(stopped):
        PLAIN[provider]("model")
    assert call.model == "model"
