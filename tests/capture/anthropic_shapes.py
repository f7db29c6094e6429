"""Ways to call the Anthropic SDK: the rows of `shapes.toml` name them."""

from __future__ import annotations

import gc
from typing import Any

import anthropic
from pydantic import BaseModel

from .calling import Caller, seen

MESSAGES: list[Any] = [{"role": "user", "content": "Say hello."}]
_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [{"name": "get_weather", "description": "Weather of a city.", "input_schema": _SCHEMA}]


class Reply(BaseModel):
    text: str


def make_client(origin: str, call: str, model: str, *, is_async: bool, timeout_s: float, retries: int) -> Any:
    """Return a client."""
    kind = anthropic.AsyncAnthropic if is_async else anthropic.Anthropic
    options: dict[str, Any] = {"api_key": "none", "timeout": timeout_s, "max_retries": retries}
    return kind(base_url=origin, default_headers={"X-Call": call}, **options)


def closables(client: Any) -> tuple[Any, ...]:
    """Return what is to be closed: the client."""
    return (client,)


def _request(c: Caller, **more: Any) -> dict[str, Any]:
    return {"model": c.model, "max_tokens": 100, "messages": MESSAGES, **more}


async def _left(c: Caller, stream: Any, read: int) -> Any:
    """Read so many items of a stream, and drop it."""
    items = [seen(await c.next(stream)) for _ in range(read)]
    del stream
    gc.collect()
    return items


async def _text(c: Caller, raw: Any) -> str:
    # a property until anthropic 1, a method since
    return str(await c.get(raw.text()) if callable(raw.text) else raw.text)


async def _stream(c: Caller, **more: Any) -> Any:
    return await c.get(c.client.messages.create(**_request(c, stream=True, **more)))


async def messages_create(c: Caller) -> Any:
    return seen(await c.get(c.client.messages.create(**_request(c, system="Be brief."))))


async def messages_tools(c: Caller) -> Any:
    return seen(await c.get(c.client.messages.create(**_request(c, tools=TOOLS))))


async def messages_stream(c: Caller) -> Any:
    return seen(await c.read(await _stream(c)))


async def messages_stream_and_its_type(c: Caller) -> Any:
    # Older classes ask for the exact type, which a stream that an instrumentor wraps has not.
    stream = await _stream(c)
    assert isinstance(stream, anthropic.AsyncStream if c.is_async else anthropic.Stream)
    return seen(await c.read(stream))


async def messages_stream_tools(c: Caller) -> Any:
    return seen(await c.read(await _stream(c, tools=TOOLS)))


async def messages_stream_left_by_with(c: Caller) -> Any:
    async with c.entered(await _stream(c)) as stream:
        return seen(await c.next(stream))


async def messages_stream_error_of_the_reader(c: Caller) -> Any:
    async with c.entered(await _stream(c)) as stream:
        await c.next(stream)
        raise ZeroDivisionError("the reader's own")


async def messages_stream_abandoned(c: Caller) -> Any:
    return await _left(c, await _stream(c), 1)


async def messages_stream_never_read(c: Caller) -> Any:
    return await _left(c, await _stream(c), 0)


async def messages_stream_closed(c: Caller) -> Any:
    stream = await _stream(c)
    item = seen(await c.next(stream))
    await c.close(stream)
    return item


async def messages_stream_helper(c: Caller) -> Any:
    async with c.entered(c.client.messages.stream(**_request(c))) as stream:
        events = [event.type for event in await c.read(stream)]
        return [events, seen(await c.get(stream.get_final_message()))]


async def messages_stream_helper_text(c: Caller) -> Any:
    async with c.entered(c.client.messages.stream(**_request(c))) as stream:
        return await c.read(stream.text_stream)


async def messages_stream_helper_final_only(c: Caller) -> Any:
    async with c.entered(c.client.messages.stream(**_request(c))) as stream:
        return seen(await c.get(stream.get_final_message()))


async def messages_stream_helper_tools(c: Caller) -> Any:
    async with c.entered(c.client.messages.stream(**_request(c, tools=TOOLS))) as stream:
        return seen(await c.get(stream.get_final_message()))


async def messages_stream_helper_left(c: Caller) -> Any:
    async with c.entered(c.client.messages.stream(**_request(c))) as stream:
        return (await c.next(stream)).type


async def messages_stream_helper_never_entered(c: Caller) -> Any:
    manager = c.client.messages.stream(**_request(c))
    del manager


async def messages_raw(c: Caller) -> Any:
    raw = await c.get(c.client.messages.with_raw_response.create(**_request(c)))
    return [raw.status_code, raw.headers["content-type"], await _text(c, raw), seen(await c.get(raw.parse()))]


async def messages_raw_never_parsed(c: Caller) -> Any:
    raw = await c.get(c.client.messages.with_raw_response.create(**_request(c)))
    return [raw.status_code, await _text(c, raw)]


async def messages_raw_stream(c: Caller) -> Any:
    raw = await c.get(c.client.messages.with_raw_response.create(**_request(c, stream=True)))
    return seen(await c.read(await c.get(raw.parse())))


async def messages_streaming_response(c: Caller) -> Any:
    manager = c.client.messages.with_streaming_response.create(**_request(c))
    async with c.entered(manager) as response:
        return seen(await c.get(response.parse()))


async def messages_streaming_response_bytes(c: Caller) -> Any:
    manager = c.client.messages.with_streaming_response.create(**_request(c))
    async with c.entered(manager) as response:
        return b"".join(await c.read(response.iter_bytes())).decode()


async def messages_streaming_response_stream(c: Caller) -> Any:
    manager = c.client.messages.with_streaming_response.create(**_request(c, stream=True))
    async with c.entered(manager) as response:
        return seen(await c.read(await c.get(response.parse())))


async def messages_parse(c: Caller) -> Any:
    message = await c.get(c.client.messages.parse(**_request(c, output_format=Reply)))
    return [seen(message), seen(message.parsed_output)]


async def messages_count_tokens(c: Caller) -> Any:
    return seen(await c.get(c.client.messages.count_tokens(model=c.model, messages=MESSAGES)))


# --- beta -------------------------------------------------------------------------------------------------


async def beta_create(c: Caller) -> Any:
    return seen(await c.get(c.client.beta.messages.create(**_request(c, betas=["some-beta-2026-01-01"]))))


async def beta_tools(c: Caller) -> Any:
    return seen(await c.get(c.client.beta.messages.create(**_request(c, tools=TOOLS))))


async def beta_stream(c: Caller) -> Any:
    stream = await c.get(c.client.beta.messages.create(**_request(c, stream=True)))
    return seen(await c.read(stream))


async def beta_stream_abandoned(c: Caller) -> Any:
    return await _left(c, await c.get(c.client.beta.messages.create(**_request(c, stream=True))), 1)


async def beta_stream_helper(c: Caller) -> Any:
    async with c.entered(c.client.beta.messages.stream(**_request(c))) as stream:
        return seen(await c.get(stream.get_final_message()))


async def beta_raw(c: Caller) -> Any:
    raw = await c.get(c.client.beta.messages.with_raw_response.create(**_request(c)))
    return [raw.status_code, await _text(c, raw), seen(await c.get(raw.parse()))]


async def beta_parse(c: Caller) -> Any:
    message = await c.get(c.client.beta.messages.parse(**_request(c, output_format=Reply)))
    return [seen(message), seen(message.parsed_output)]


def get_weather(city: str) -> str:
    """Weather of a city.

    Args:
        city: Which one.
    """
    return "Rain."


async def async_get_weather(city: str) -> str:
    """Weather of a city.

    Args:
        city: Which one.
    """
    return "Rain."


def _tools(c: Caller) -> list[Any]:
    if c.is_async:
        return [anthropic.beta_async_tool(name="get_weather")(async_get_weather)]
    return [anthropic.beta_tool(get_weather)]


async def tool_runner(c: Caller) -> Any:
    runner = c.client.beta.messages.tool_runner(**_request(c, tools=_tools(c)))
    return seen(await c.read(runner))


async def tool_runner_streamed(c: Caller) -> Any:
    runner = c.client.beta.messages.tool_runner(**_request(c, tools=_tools(c), stream=True))
    if c.is_async:
        return [seen(await stream.get_final_message()) async for stream in runner]
    return [seen(stream.get_final_message()) for stream in runner]
