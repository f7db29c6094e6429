"""Ways to call the Google Gen AI SDK: the rows of `shapes.toml` name them."""

from __future__ import annotations

import gc
from typing import Any

from google import genai
from google.genai import types
from google.genai.client import AsyncClient

from .calling import Caller, seen

TOOL = types.Tool(
    function_declarations=[
        types.FunctionDeclaration(
            name="get_weather",
            description="Weather of a city.",
            parameters=types.Schema(
                type=types.Type.OBJECT, properties={"city": types.Schema(type=types.Type.STRING)}
            ),
        )
    ]
)
PROMPT = "Say hello."


def make_client(origin: str, call: str, model: str, *, is_async: bool, timeout_s: float, retries: int) -> Any:
    """Return a client; `.aio` of it for the one that is awaited."""
    options = types.HttpOptions(
        base_url=origin,
        headers={"X-Call": call},
        timeout=int(timeout_s * 1000),
        retry_options=types.HttpRetryOptions(attempts=retries + 1, initial_delay=0.01, max_delay=0.01),
    )
    client = genai.Client(api_key="none", http_options=options)
    return client.aio if is_async else client


def closables(client: Any) -> tuple[Any, ...]:
    """Return what is to be closed: the client, or what in google-genai 1.32 it does not close."""
    if hasattr(client, "close") or hasattr(client, "aclose"):
        return (client,)
    inside = client._api_client
    return (inside._async_httpx_client if isinstance(client, AsyncClient) else inside._httpx_client,)


async def _stream(c: Caller, **more: Any) -> Any:
    return await c.get(c.client.models.generate_content_stream(model=c.model, contents=PROMPT, **more))


async def _left(c: Caller, stream: Any, read: int) -> Any:
    """Read so many items of a stream, and drop it."""
    items = [seen(await c.next(stream)) for _ in range(read)]
    del stream
    gc.collect()
    return items


async def generate_content(c: Caller) -> Any:
    return seen(await c.get(c.client.models.generate_content(model=c.model, contents=PROMPT)))


async def generate_content_tools(c: Caller) -> Any:
    config = types.GenerateContentConfig(tools=[TOOL])
    generate = c.client.models.generate_content
    return seen(await c.get(generate(model=c.model, contents=PROMPT, config=config)))


async def generate_content_schema(c: Caller) -> Any:
    config = {
        "response_mime_type": "application/json",
        "response_schema": {"type": "OBJECT", "properties": {"text": {"type": "STRING"}}},
    }
    generate = c.client.models.generate_content
    response = await c.get(generate(model=c.model, contents=PROMPT, config=config))
    return [seen(response), seen(response.parsed)]


async def generate_content_stream(c: Caller) -> Any:
    return seen(await c.read(await _stream(c)))


async def generate_content_stream_tools(c: Caller) -> Any:
    return seen(await c.read(await _stream(c, config=types.GenerateContentConfig(tools=[TOOL]))))


async def generate_content_stream_abandoned(c: Caller) -> Any:
    return await _left(c, await _stream(c), 1)


async def generate_content_stream_abandoned_later(c: Caller) -> Any:
    return await _left(c, await _stream(c), 2)


async def generate_content_stream_never_read(c: Caller) -> Any:
    return await _left(c, await _stream(c), 0)


async def generate_content_stream_closed(c: Caller) -> Any:
    stream = await _stream(c)
    item = seen(await c.next(stream))
    await c.close(stream)
    return item


async def chat_send(c: Caller) -> Any:
    chat = c.client.chats.create(model=c.model)
    return seen(await c.get(chat.send_message(PROMPT)))


async def chat_send_stream(c: Caller) -> Any:
    chat = c.client.chats.create(model=c.model)
    return seen(await c.read(await c.get(chat.send_message_stream(PROMPT))))


def get_weather(city: str) -> str:
    """Weather of a city."""
    return "Rain."


async def automatic_function_calling(c: Caller) -> Any:
    config = types.GenerateContentConfig(tools=[get_weather])
    generate = c.client.models.generate_content
    return (await c.get(generate(model=c.model, contents=PROMPT, config=config))).text


async def automatic_function_calling_stream(c: Caller) -> Any:
    config = types.GenerateContentConfig(tools=[get_weather])
    return [chunk.text for chunk in await c.read(await _stream(c, config=config))]


async def embed_content(c: Caller) -> Any:
    return seen(await c.get(c.client.models.embed_content(model=c.model, contents=["one two", "three"])))


async def count_tokens(c: Caller) -> Any:
    return seen(await c.get(c.client.models.count_tokens(model=c.model, contents=PROMPT)))
