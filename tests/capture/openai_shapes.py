"""Ways to call the OpenAI SDK: the rows of `shapes.toml` name them."""

from __future__ import annotations

import gc
from typing import Any

import openai
from pydantic import BaseModel

from .calling import Caller, seen

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello."}]
USAGE: Any = {"include_usage": True}
_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_FUNCTION = {"name": "get_weather", "description": "Weather of a city.", "parameters": _PARAMETERS}
CHAT_TOOLS: list[Any] = [{"type": "function", "function": _FUNCTION}]
RESPONSES_TOOLS: list[Any] = [{"type": "function", "strict": False, **_FUNCTION}]


class Reply(BaseModel):
    text: str


def make_client(origin: str, call: str, model: str, *, is_async: bool, timeout_s: float, retries: int) -> Any:
    """Return a client, or Azure's where the model says so; for openai 1.26 with an HTTP client of its own."""
    options: dict[str, Any] = {"api_key": "none", "timeout": timeout_s, "max_retries": retries}
    options["default_headers"] = {"X-Call": call}
    if openai.__version__ == "1.26.0":  # which passes on an argument that httpx 0.28 has no more
        http = openai.DefaultAsyncHttpxClient if is_async else openai.DefaultHttpxClient
        options["http_client"] = http(timeout=timeout_s)
    if model.startswith("azure"):
        azure = openai.AsyncAzureOpenAI if is_async else openai.AzureOpenAI
        return azure(azure_endpoint=origin, api_version="2024-10-21", **options)
    plain = openai.AsyncOpenAI if is_async else openai.OpenAI
    return plain(base_url=f"{origin}/v1", **options)


def closables(client: Any) -> tuple[Any, ...]:
    """Return what is to be closed: the client."""
    return (client,)


async def _left(c: Caller, stream: Any, read: int) -> Any:
    """Read so many items of a stream, and drop it."""
    items = [seen(await c.next(stream)) for _ in range(read)]
    del stream
    gc.collect()
    return items


async def _closed(c: Caller, stream: Any) -> Any:
    item = seen(await c.next(stream))
    await c.close(stream)
    return item


# --- chat completions -------------------------------------------------------------------------------------


async def chat_create(c: Caller) -> Any:
    return seen(await c.get(c.client.chat.completions.create(model=c.model, messages=MESSAGES)))


async def chat_tools(c: Caller) -> Any:
    create = c.client.chat.completions.create
    return seen(await c.get(create(model=c.model, messages=MESSAGES, tools=CHAT_TOOLS)))


async def _chat_stream(c: Caller, **more: Any) -> Any:
    create = c.client.chat.completions.create
    return await c.get(create(model=c.model, messages=MESSAGES, stream=True, **more))


async def chat_stream(c: Caller) -> Any:
    stream = await _chat_stream(c, stream_options=USAGE)
    assert isinstance(stream, openai.AsyncStream if c.is_async else openai.Stream)
    return seen(await c.read(stream))


async def chat_stream_without_usage(c: Caller) -> Any:
    return seen(await c.read(await _chat_stream(c)))


async def chat_stream_tools(c: Caller) -> Any:
    return seen(await c.read(await _chat_stream(c, stream_options=USAGE, tools=CHAT_TOOLS)))


async def chat_stream_in_with(c: Caller) -> Any:
    async with c.entered(await _chat_stream(c, stream_options=USAGE)) as stream:
        return seen(await c.read(stream))


async def chat_stream_left_by_with(c: Caller) -> Any:
    async with c.entered(await _chat_stream(c, stream_options=USAGE)) as stream:
        return seen(await c.next(stream))


async def chat_stream_error_of_the_reader(c: Caller) -> Any:
    async with c.entered(await _chat_stream(c, stream_options=USAGE)) as stream:
        await c.next(stream)
        raise ZeroDivisionError("the reader's own")


async def chat_stream_abandoned(c: Caller) -> Any:
    return await _left(c, await _chat_stream(c, stream_options=USAGE), 1)


async def chat_stream_never_read(c: Caller) -> Any:
    return await _left(c, await _chat_stream(c, stream_options=USAGE), 0)


async def chat_stream_closed(c: Caller) -> Any:
    return await _closed(c, await _chat_stream(c, stream_options=USAGE))


async def chat_parse(c: Caller) -> Any:
    parse = c.client.chat.completions.parse
    completion = await c.get(parse(model=c.model, messages=MESSAGES, response_format=Reply))
    return [seen(completion), seen(completion.choices[0].message.parsed)]


async def chat_stream_helper(c: Caller) -> Any:
    manager = c.client.chat.completions.stream(model=c.model, messages=MESSAGES, stream_options=USAGE)
    async with c.entered(manager) as stream:
        events = [event.type for event in await c.read(stream)]
        return [events, seen(await c.get(stream.get_final_completion()))]


async def chat_stream_helper_final_only(c: Caller) -> Any:
    manager = c.client.chat.completions.stream(model=c.model, messages=MESSAGES, stream_options=USAGE)
    async with c.entered(manager) as stream:
        return seen(await c.get(stream.get_final_completion()))


async def chat_stream_helper_left(c: Caller) -> Any:
    manager = c.client.chat.completions.stream(model=c.model, messages=MESSAGES, stream_options=USAGE)
    async with c.entered(manager) as stream:
        return (await c.next(stream)).type


async def chat_raw(c: Caller) -> Any:
    create = c.client.chat.completions.with_raw_response.create
    raw = await c.get(create(model=c.model, messages=MESSAGES))
    return [raw.status_code, raw.headers["content-type"], raw.text, seen(await c.get(raw.parse()))]


async def chat_raw_stream(c: Caller) -> Any:
    create = c.client.chat.completions.with_raw_response.create
    raw = await c.get(create(model=c.model, messages=MESSAGES, stream=True, stream_options=USAGE))
    return [raw.headers["content-type"], seen(await c.read(await c.get(raw.parse())))]


async def chat_raw_stream_never_parsed(c: Caller) -> Any:
    create = c.client.chat.completions.with_raw_response.create
    raw = await c.get(create(model=c.model, messages=MESSAGES, stream=True))
    await c.close(raw.http_response)
    return raw.status_code


async def chat_streaming_response(c: Caller) -> Any:
    create = c.client.chat.completions.with_streaming_response.create
    async with c.entered(create(model=c.model, messages=MESSAGES)) as response:
        return seen(await c.get(response.parse()))


async def chat_streaming_response_bytes(c: Caller) -> Any:
    create = c.client.chat.completions.with_streaming_response.create
    async with c.entered(create(model=c.model, messages=MESSAGES)) as response:
        return b"".join(await c.read(response.iter_bytes())).decode()


async def chat_streaming_response_stream(c: Caller) -> Any:
    create = c.client.chat.completions.with_streaming_response.create
    manager = create(model=c.model, messages=MESSAGES, stream=True, stream_options=USAGE)
    async with c.entered(manager) as response:
        return seen(await c.read(await c.get(response.parse())))


# --- legacy completions -----------------------------------------------------------------------------------


async def completions_create(c: Caller) -> Any:
    return seen(await c.get(c.client.completions.create(model=c.model, prompt="Say hello.")))


async def _completions_stream(c: Caller, **more: Any) -> Any:
    return await c.get(c.client.completions.create(model=c.model, prompt="Hello", stream=True, **more))


async def completions_stream(c: Caller) -> Any:
    return seen(await c.read(await _completions_stream(c, stream_options=USAGE)))


async def completions_stream_without_usage(c: Caller) -> Any:
    return seen(await c.read(await _completions_stream(c)))


async def completions_stream_abandoned(c: Caller) -> Any:
    return await _left(c, await _completions_stream(c), 1)


async def completions_stream_closed(c: Caller) -> Any:
    return await _closed(c, await _completions_stream(c))


async def completions_raw(c: Caller) -> Any:
    raw = await c.get(c.client.completions.with_raw_response.create(model=c.model, prompt="Say hello."))
    return [raw.status_code, raw.text, seen(await c.get(raw.parse()))]


# --- embeddings -------------------------------------------------------------------------------------------


async def embeddings_create(c: Caller) -> Any:
    return seen(await c.get(c.client.embeddings.create(model=c.model, input=["one two", "three"])))


async def embeddings_raw(c: Caller) -> Any:
    raw = await c.get(c.client.embeddings.with_raw_response.create(model=c.model, input="one"))
    return [raw.status_code, raw.text, seen(await c.get(raw.parse()))]


async def embeddings_streaming_response(c: Caller) -> Any:
    create = c.client.embeddings.with_streaming_response.create
    async with c.entered(create(model=c.model, input="one")) as response:
        return seen(await c.get(response.parse()))


# --- responses --------------------------------------------------------------------------------------------


async def responses_create(c: Caller) -> Any:
    return seen(await c.get(c.client.responses.create(model=c.model, input=MESSAGES)))


async def responses_tools(c: Caller) -> Any:
    create = c.client.responses.create
    return seen(await c.get(create(model=c.model, input="Weather?", tools=RESPONSES_TOOLS)))


async def _responses_stream(c: Caller, **more: Any) -> Any:
    return await c.get(c.client.responses.create(model=c.model, input="Say hello.", stream=True, **more))


async def responses_stream(c: Caller) -> Any:
    stream = await _responses_stream(c)
    assert isinstance(stream, openai.AsyncStream if c.is_async else openai.Stream)
    return seen(await c.read(stream))


async def responses_stream_tools(c: Caller) -> Any:
    return seen(await c.read(await _responses_stream(c, tools=RESPONSES_TOOLS)))


async def responses_stream_left_by_with(c: Caller) -> Any:
    async with c.entered(await _responses_stream(c)) as stream:
        return seen(await c.next(stream))


async def responses_stream_error_of_the_reader(c: Caller) -> Any:
    async with c.entered(await _responses_stream(c)) as stream:
        await c.next(stream)
        raise ZeroDivisionError("the reader's own")


async def responses_stream_abandoned(c: Caller) -> Any:
    return await _left(c, await _responses_stream(c), 1)


async def responses_stream_never_read(c: Caller) -> Any:
    return await _left(c, await _responses_stream(c), 0)


async def responses_stream_closed(c: Caller) -> Any:
    return await _closed(c, await _responses_stream(c))


async def responses_parse(c: Caller) -> Any:
    parse = c.client.responses.parse
    response = await c.get(parse(model=c.model, input="Say hello.", text_format=Reply))
    return [seen(response), seen(response.output_parsed)]


async def responses_stream_helper(c: Caller) -> Any:
    async with c.entered(c.client.responses.stream(model=c.model, input="Say hello.")) as stream:
        events = [event.type for event in await c.read(stream)]
        return [events, seen(await c.get(stream.get_final_response()))]


async def responses_stream_helper_final_only(c: Caller) -> Any:
    async with c.entered(c.client.responses.stream(model=c.model, input="Say hello.")) as stream:
        return seen(await c.get(stream.get_final_response()))


async def responses_stream_helper_left(c: Caller) -> Any:
    async with c.entered(c.client.responses.stream(model=c.model, input="Say hello.")) as stream:
        return (await c.next(stream)).type


async def responses_raw(c: Caller) -> Any:
    raw = await c.get(c.client.responses.with_raw_response.create(model=c.model, input="Say hello."))
    return [raw.status_code, raw.text, seen(await c.get(raw.parse()))]


async def responses_raw_stream(c: Caller) -> Any:
    create = c.client.responses.with_raw_response.create
    raw = await c.get(create(model=c.model, input="Say hello.", stream=True))
    return [raw.headers["content-type"], seen(await c.read(await c.get(raw.parse())))]


async def responses_streaming_response(c: Caller) -> Any:
    create = c.client.responses.with_streaming_response.create
    async with c.entered(create(model=c.model, input="Say hello.")) as response:
        return seen(await c.get(response.parse()))


async def responses_streaming_response_stream(c: Caller) -> Any:
    create = c.client.responses.with_streaming_response.create
    async with c.entered(create(model=c.model, input="Say hello.", stream=True)) as response:
        return seen(await c.read(await c.get(response.parse())))


async def responses_retrieve(c: Caller) -> Any:
    return seen(await c.get(c.client.responses.retrieve("resp_1")))


async def models_list(c: Caller) -> Any:
    page = c.client.models.list()
    return seen(await c.read(page))
