"""A call that an application makes with the real `openai` client is told once, whatever its shape and end."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import openai
import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from pydantic import BaseModel

from waxell_workers import capture
from waxell_workers.core.errors import ConfigError

MODEL = "gpt-4o"
PROMPT = "Where is the parcel 4711?"
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
REPLY = f"[stand-in] You wrote: {PROMPT}"
TOKENS_IN, TOKENS_OUT = 9, 14
"""Words and punctuation marks in all the messages, and in the reply."""

run: contextvars.ContextVar[str] = contextvars.ContextVar("run", default="")


class Reply(BaseModel):
    text: str


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    command = [sys.executable, "-m", "waxell_workers.cli.standin"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def listen() -> Iterator[Callable[..., list[dict[str, Any]]]]:
    def listen(**settings: Any) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        defaults: dict[str, Any] = {"names": None, "wants_content": lambda: False}
        capture.install(lambda **call: calls.append(call), current_run=run.get, **{**defaults, **settings})
        return calls

    yield listen
    capture.uninstall()


@pytest.fixture
def calls(listen: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return listen()


@contextmanager
def inside(run_id: str) -> Iterator[None]:
    token = run.set(run_id)
    yield
    run.reset(token)


def asynchronously(base_url: str, call: Callable[[openai.AsyncOpenAI], Any]) -> Any:
    async def main() -> Any:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
            return await call(client)

    return asyncio.run(main())


# --- shapes of calls --------------------------------------------------------------------------------------


def chat(client: openai.OpenAI) -> str | None:
    return client.chat.completions.create(model=MODEL, messages=MESSAGES).choices[0].message.content


def chat_raw(client: openai.OpenAI) -> str | None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)
    assert raw.headers["x-waxell-standin"] == "1"
    return raw.parse().choices[0].message.content


def chat_streaming_response(client: openai.OpenAI) -> str | None:
    with client.chat.completions.with_streaming_response.create(model=MODEL, messages=MESSAGES) as response:
        return response.parse().choices[0].message.content


def chat_stream(client: openai.OpenAI) -> str:
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def chat_raw_stream(client: openai.OpenAI) -> str:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in raw.parse() if chunk.choices)


def chat_stream_helper(client: openai.OpenAI) -> str | None:
    options: Any = {"include_usage": True}
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, stream_options=options) as stream:
        return stream.get_final_completion().choices[0].message.content


def responses(client: openai.OpenAI) -> str:
    return client.responses.create(model=MODEL, input=MESSAGES).output_text


def responses_stream(client: openai.OpenAI) -> str:
    events = client.responses.create(model=MODEL, input=MESSAGES, stream=True)
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def responses_stream_helper(client: openai.OpenAI) -> str:
    with client.responses.stream(model=MODEL, input=MESSAGES) as stream:
        return stream.get_final_response().output_text


async def async_chat(client: openai.AsyncOpenAI) -> str | None:
    completion = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    return completion.choices[0].message.content


async def async_chat_stream(client: openai.AsyncOpenAI) -> str:
    stream = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


async def async_chat_stream_helper(client: openai.AsyncOpenAI) -> str | None:
    options: Any = {"include_usage": True}
    async with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, stream_options=options
    ) as stream:
        return (await stream.get_final_completion()).choices[0].message.content


async def async_responses(client: openai.AsyncOpenAI) -> str:
    return (await client.responses.create(model=MODEL, input=MESSAGES)).output_text


async def async_responses_stream(client: openai.AsyncOpenAI) -> str:
    events = await client.responses.create(model=MODEL, input=MESSAGES, stream=True)
    return "".join([event.delta async for event in events if event.type == "response.output_text.delta"])


async def async_responses_stream_helper(client: openai.AsyncOpenAI) -> str:
    async with client.responses.stream(model=MODEL, input=MESSAGES) as stream:
        return (await stream.get_final_response()).output_text


SYNC = (chat, chat_raw, chat_streaming_response, chat_stream, chat_raw_stream, chat_stream_helper)
SYNC_RESPONSES = (responses, responses_stream, responses_stream_helper)
ASYNC = (async_chat, async_chat_stream, async_chat_stream_helper)
ASYNC_RESPONSES = (async_responses, async_responses_stream, async_responses_stream_helper)
STREAMED = (
    chat_stream,
    chat_raw_stream,
    chat_stream_helper,
    *SYNC_RESPONSES[1:],
    *ASYNC[1:],
    *ASYNC_RESPONSES[1:],
)


def assert_told(call: dict[str, Any], *, streamed: bool, began: float) -> None:
    assert began <= call.pop("at") <= time.time()
    assert len(call.pop("id")) == 32
    assert 0 < call["duration_ms"] < 60_000
    ttft_ms, duration_ms = call.pop("ttft_ms"), call.pop("duration_ms")
    assert (0 < ttft_ms <= duration_ms) if streamed else ttft_ms is None
    assert call.pop("response_id").startswith(("chatcmpl-standin-", "resp_standin_"))
    assert call == {
        "run_id": "the run",
        "model": MODEL,
        "response_model": MODEL,
        "provider": "openai",
        "operation": "chat",
        "tokens_in": TOKENS_IN,
        "tokens_out": TOKENS_OUT,
        "tokens_cached": None,
        "tokens_cache_written": None,
        "tokens_reasoning": None,
        "streamed": streamed,
        "finish_reason": "stop",
        "status": "ok",
    }


@pytest.mark.parametrize("shape", [*SYNC, *SYNC_RESPONSES])
def test_a_call_is_told_once_and_whole(
    calls: list[dict[str, Any]], client: openai.OpenAI, shape: Callable[[openai.OpenAI], str]
) -> None:
    """Model, tokens, timing and run are those of the call, and the caller gets the model's reply."""
    began = time.time()
    with inside("the run"):
        assert shape(client) == REPLY
    (call,) = calls
    assert_told(call, streamed=shape in STREAMED, began=began)


@pytest.mark.parametrize("shape", [*ASYNC, *ASYNC_RESPONSES])
def test_an_asynchronous_call_is_told_once_and_whole(
    calls: list[dict[str, Any]], base_url: str, shape: Callable[[openai.AsyncOpenAI], Any]
) -> None:
    """The same for the asynchronous client."""
    began = time.time()
    with inside("the run"):
        assert asynchronously(base_url, shape) == REPLY
    (call,) = calls
    assert_told(call, streamed=shape in STREAMED, began=began)


def test_structured_outputs_are_told_once(calls: list[dict[str, Any]], client: openai.OpenAI) -> None:
    """`parse()` of either API is one call."""
    client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Reply)
    client.responses.parse(model=MODEL, input=PROMPT, text_format=Reply)
    assert [(call["status"], call["tokens_in"]) for call in calls] == [("ok", TOKENS_IN), ("ok", 6)]


def test_embeddings_are_told(calls: list[dict[str, Any]], client: openai.OpenAI, base_url: str) -> None:
    """Embeddings have an operation of their own, and tokens that went in."""
    client.embeddings.create(model="text-embedding-3-small", input=["one two", "three"])
    asynchronously(base_url, lambda client: client.embeddings.create(model="e", input="one"))
    told = [(call["operation"], call["model"], call["tokens_in"], call["tokens_out"]) for call in calls]
    assert told == [("embeddings", "text-embedding-3-small", 3, None), ("embeddings", "e", 1, None)]


def test_an_asynchronous_streaming_response_is_left_to_its_reader(
    calls: list[dict[str, Any]], base_url: str
) -> None:
    """The body of an asynchronous `with_streaming_response` is not read by us: told without tokens."""

    async def call(client: openai.AsyncOpenAI) -> Any:
        create = client.chat.completions.with_streaming_response.create
        async with create(model=MODEL, messages=MESSAGES) as response:
            return (await response.parse()).choices[0].message.content

    assert asynchronously(base_url, call) == REPLY
    assert [(call["status"], call["model"], call["tokens_out"]) for call in calls] == [("ok", MODEL, None)]


# --- ends of calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "error_type", "message"),
    [
        ("fail-429-now", "openai.RateLimitError", "Error code: 429"),
        ("fail-500", "openai.InternalServerError", "Error code: 500"),
        ("fail-401", "openai.AuthenticationError", "Error code: 401"),
    ],
)
def test_an_error_is_told_and_raised(
    calls: list[dict[str, Any]], client: openai.OpenAI, model: str, error_type: str, message: str
) -> None:
    """The caller gets the SDK's error; we its type and status, and nothing of the request that it quotes."""
    with pytest.raises(openai.APIStatusError, match=PROMPT):
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": PROMPT}])
    with pytest.raises(openai.APIStatusError):
        client.responses.create(model=model, input=PROMPT)
    with pytest.raises(openai.APIStatusError):
        client.embeddings.create(model=model, input=PROMPT)
    assert len(calls) == 3
    for call in calls:
        assert (call["status"], call["error_type"], call["error_message"]) == ("error", error_type, message)
        assert PROMPT not in repr(call)


def test_a_timeout_is_told(calls: list[dict[str, Any]], client: openai.OpenAI) -> None:
    """A call that the client gave up has the SDK's constant text."""
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.1).chat.completions.create(model="slow-5000-x", messages=MESSAGES)
    (call,) = calls
    assert (call["error_type"], call["error_message"]) == ("openai.APITimeoutError", "Request timed out.")
    assert 100 <= call["duration_ms"] < 4000


@contextmanager
def soft_time_limit(after_s: float) -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise SoftTimeLimitExceeded(30)

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        yield
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_under_a_soft_time_limit_is_told_and_interrupted(
    calls: list[dict[str, Any]], client: openai.OpenAI, stream: bool
) -> None:
    """The interrupt reaches the task as it is; the call is an error of that type."""
    with pytest.raises(SoftTimeLimitExceeded), soft_time_limit(0.2):
        client.chat.completions.create(model="slow-5000-x", messages=MESSAGES, stream=stream)
    (call,) = calls
    assert (call["status"], call["error_type"], call["error_message"]) == (
        "error",
        "billiard.SoftTimeLimitExceeded",
        "",
    )


def test_a_cancelled_call_is_told(calls: list[dict[str, Any]], base_url: str) -> None:
    """Cancelling the task of an asynchronous call is an end like any other."""

    async def call(client: openai.AsyncOpenAI) -> None:
        await asyncio.wait_for(client.chat.completions.create(model="slow-5000-x", messages=MESSAGES), 0.1)

    with pytest.raises(asyncio.TimeoutError):
        asynchronously(base_url, call)
    assert [call["error_type"] for call in calls] == ["asyncio.CancelledError"]


@pytest.mark.parametrize("how", ["closed", "left by with", "dropped"])
def test_a_stream_left_early_is_told_as_such(
    calls: list[dict[str, Any]], client: openai.OpenAI, how: str
) -> None:
    """A stream that nobody reads to its end is no error: the call is told when it is closed or dropped."""
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    next(stream)
    assert calls == []
    if how == "closed":
        stream.close()
    elif how == "left by with":
        with stream:
            pass
    else:
        response = stream.response
        del stream
        gc.collect()
        response.close()
    (call,) = calls
    assert (call["status"], call["finish_reason"]) == ("ok", "")
    assert call["metadata"] == {"stream": "left early"}


def test_an_error_in_the_loop_over_a_stream_is_told(
    calls: list[dict[str, Any]], client: openai.OpenAI
) -> None:
    """What a task raises while it reads a stream ends the call as an error of that type."""

    def task() -> None:
        with client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True) as stream:
            for _ in stream:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        task()
    assert [(call["status"], call["error_type"]) for call in calls] == [("error", "ZeroDivisionError")]


def test_a_call_belongs_to_the_run_in_which_it_started(
    calls: list[dict[str, Any]], client: openai.OpenAI
) -> None:
    """A stream that is opened in one run and ends in another, in another thread, belongs to the first."""
    with inside("run A"):
        stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    with inside("run B"):
        chat(client)
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(list, stream))
        thread.start()
        thread.join()
    assert [call["run_id"] for call in calls] == ["run B", "run A"]


def test_many_threads_keep_their_runs_apart(calls: list[dict[str, Any]], client: openai.OpenAI) -> None:
    """Calls that overlap in threads each belong to their own run."""

    def task(number: int) -> None:
        with inside(f"run {number}"):
            client.chat.completions.create(model=f"slow-50-{number}", messages=MESSAGES)

    threads = [threading.Thread(target=task, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = sorted((call["run_id"], call["model"]) for call in calls)
    assert told == [(f"run {number}", f"slow-50-{number}") for number in range(8)]


def test_many_tasks_of_one_loop_keep_their_runs_apart(calls: list[dict[str, Any]], base_url: str) -> None:
    """So do calls that overlap on one event loop, streams included."""

    async def task(client: openai.AsyncOpenAI, number: int) -> None:
        with inside(f"run {number}"):
            create = client.chat.completions.create
            async for _ in await create(model=f"slow-50-{number}", messages=MESSAGES, stream=True):
                await asyncio.sleep(0)

    async def tasks(client: openai.AsyncOpenAI) -> None:
        await asyncio.gather(*(task(client, number) for number in range(8)))

    asynchronously(base_url, tasks)
    told = sorted((call["run_id"], call["model"]) for call in calls)
    assert told == [(f"run {number}", f"slow-50-{number}") for number in range(8)]


# --- content ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SYNC, *SYNC_RESPONSES])
def test_without_capture_content_there_is_none(
    calls: list[dict[str, Any]],
    client: openai.OpenAI,
    shape: Callable[[openai.OpenAI], str],
) -> None:
    """Nothing that the sink gets holds a word of the prompt or of the reply."""
    assert shape(client) == REPLY
    (call,) = calls
    assert "parcel" not in repr(call)
    assert "prompt" not in call
    assert "response" not in call


@pytest.mark.parametrize("shape", [*SYNC, *SYNC_RESPONSES])
def test_content_is_the_last_user_message_and_the_reply(
    listen: Callable[..., list[dict[str, Any]]],
    client: openai.OpenAI,
    shape: Callable[[openai.OpenAI], str],
) -> None:
    """With `capture_content`, prompt and response are the texts that went and came."""
    calls = listen(wants_content=lambda: True)
    assert shape(client) == REPLY
    (call,) = calls
    assert (call["prompt"], call["response"]) == (PROMPT, REPLY)


@pytest.mark.parametrize("shape", [*ASYNC, *ASYNC_RESPONSES])
def test_content_of_an_asynchronous_call(
    listen: Callable[..., list[dict[str, Any]]],
    base_url: str,
    shape: Callable[[openai.AsyncOpenAI], Any],
) -> None:
    """The same for the asynchronous client."""
    calls = listen(wants_content=lambda: True)
    assert asynchronously(base_url, shape) == REPLY
    (call,) = calls
    assert (call["prompt"], call["response"]) == (PROMPT, REPLY)


def test_texts_are_told_whole(listen: Callable[..., list[dict[str, Any]]], client: openai.OpenAI) -> None:
    """Neither cut nor redacted: that is the collector's. All messages are told, and an error in full."""
    calls = listen(wants_content=lambda: True)
    client.chat.completions.create(
        model=MODEL, messages=[*MESSAGES, {"role": "user", "content": "x" * 50_000}]
    )
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="fail-429", messages=MESSAGES)
    assert calls[0]["prompt"] == "x" * 50_000
    assert [message["role"] for message in calls[0]["messages"]] == ["system", "user", "user"]
    assert calls[0]["messages"][1]["text"] == PROMPT
    assert calls[1]["error_message"].startswith("Error code: 429 - [stand-in] fail-429 asked for it")
    assert calls[1]["prompt"] == PROMPT


def test_content_is_wanted_or_not_call_by_call(
    listen: Callable[..., list[dict[str, Any]]], client: openai.OpenAI
) -> None:
    """Asked when a call starts: what is answered later says nothing about it."""
    wanted = True
    calls = listen(wants_content=lambda: wanted)
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    wanted = False
    chat(client)
    list(stream)
    assert ["prompt" in call for call in calls] == [False, True]


def test_an_interrupt_in_the_sink_reaches_the_task(client: openai.OpenAI) -> None:
    """A soft time limit that surfaces where the call is written (in a redactor, say) is not swallowed."""

    def sink(**call: Any) -> None:
        raise SoftTimeLimitExceeded(30)

    capture.install(sink, names=None, current_run=run.get, wants_content=lambda: False)
    try:
        with pytest.raises(SoftTimeLimitExceeded):
            chat(client)
    finally:
        capture.uninstall()


# --- switching on and off ---------------------------------------------------------------------------------


def test_after_uninstall_nothing_is_told(calls: list[dict[str, Any]], client: openai.OpenAI) -> None:
    """Calls pass straight through, those of methods that a client has kept included."""
    kept = client.chat.completions.with_raw_response.create
    chat(client)
    capture.uninstall()
    assert chat(client) == REPLY
    assert kept(model=MODEL, messages=MESSAGES).parse().choices
    assert len(calls) == 1


def test_a_second_installation_replaces_the_first(
    listen: Callable[..., list[dict[str, Any]]], client: openai.OpenAI
) -> None:
    """One call is told to one sink, however often capture was switched on and with what settings."""
    sinks = [listen(), listen(wants_content=lambda: True), listen(), listen(wants_content=lambda: True)]
    chat(client)
    assert [len(calls) for calls in sinks] == [0, 0, 0, 1]


def test_no_names_are_no_capture(listen: Callable[..., list[dict[str, Any]]], client: openai.OpenAI) -> None:
    """An empty selection listens to nothing."""
    calls = listen(names=())
    chat(client)
    assert calls == []


def test_an_unknown_name_is_refused(listen: Callable[..., list[dict[str, Any]]]) -> None:
    """The error names the setting, the value and what is allowed."""
    with pytest.raises(ConfigError, match=r"capture='opnai': expected some of anthropic, .*openai"):
        listen(names=("opnai",))


def test_the_methods_stay_what_they_were(calls: list[dict[str, Any]]) -> None:
    """Signature, name and kind of an instrumented method are the SDK's."""
    create = openai.resources.chat.completions.Completions.create
    assert inspect.isfunction(create)
    assert create.__name__ == "create"
    assert "messages" in inspect.signature(create).parameters
    assert inspect.iscoroutinefunction(openai.resources.embeddings.AsyncEmbeddings.create)
