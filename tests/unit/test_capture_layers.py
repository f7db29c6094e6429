"""Real SDKs under a layer of ours: what a caller gets, and what stays behind, is as if nobody listened."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock

import anthropic
import openai
import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from google import genai
from google.genai import types
from openai.resources.chat.completions import Completions
from opentelemetry import context
from opentelemetry.instrumentation.genai.anthropic import patch, wrappers
from opentelemetry.instrumentation.google_genai import GoogleGenAiSdkInstrumentor
from wrapt import wrap_function_wrapper

from waxell_workers import capture
from waxell_workers.capture import nesting
from waxell_workers.capture.calls import short_error_type

MESSAGES: list[Any] = [{"role": "user", "content": "Where is the parcel 4711?"}]
REQUEST: dict[str, Any] = {"model": "plain", "max_tokens": 9, "messages": MESSAGES}


def install(calls: list[dict[str, Any]]) -> None:
    capture.install(
        lambda **call: calls.append(call),
        names=None,
        current_run=lambda: "",
        wants_content=lambda: True,
    )


@pytest.fixture
def calls() -> Iterator[list[dict[str, Any]]]:
    calls: list[dict[str, Any]] = []
    install(calls)
    yield calls
    capture.uninstall()


@pytest.fixture(scope="module")
def providers() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.providers.server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def claude(calls: list[dict[str, Any]], providers: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=providers, api_key="none", max_retries=0) as client:
        yield client


# -- the caller's context -------------------------------------------------------------------------------


def read(client: anthropic.Anthropic, seen: Callable[[], None]) -> None:
    stream = client.messages.create(**REQUEST, stream=True)
    seen()
    next(stream)
    seen()
    list(stream)


def left(client: anthropic.Anthropic, seen: Callable[[], None]) -> None:
    with client.messages.create(**REQUEST, stream=True) as stream:
        next(stream)
        seen()


def dropped(client: anthropic.Anthropic, seen: Callable[[], None]) -> None:
    stream = client.messages.create(**REQUEST, stream=True)
    next(stream)
    del stream
    gc.collect()


def helper(client: anthropic.Anthropic, seen: Callable[[], None]) -> None:
    with client.messages.stream(**REQUEST) as stream:
        seen()
        stream.get_final_message()
        seen()


def raw(client: anthropic.Anthropic, seen: Callable[[], None]) -> None:
    response = client.messages.with_raw_response.create(**REQUEST, stream=True)
    seen()
    list(response.parse())


@pytest.mark.parametrize("call", [read, left, dropped, helper, raw])
def test_a_stream_leaves_its_readers_context(
    claude: anthropic.Anthropic,
    calls: list[dict[str, Any]],
    call: Callable[[anthropic.Anthropic, Callable[[], None]], None],
) -> None:
    """While it is open, and when it has ended, in whichever way."""
    token = context.attach(context.set_value("users", object()))
    before = context.get_current()

    def seen() -> None:
        assert context.get_current() is before

    call(claude, seen)
    seen()
    context.detach(token)
    assert [call["streamed"] for call in calls] == [True]


def test_a_stream_that_ends_elsewhere_leaves_the_context_there(claude: anthropic.Anthropic) -> None:
    """The context in which it was created does not come back where it is read."""
    token = context.attach(context.set_value("users", "first"))
    stream = claude.messages.create(**REQUEST, stream=True)
    context.detach(token)
    token = context.attach(context.set_value("users", "second"))
    list(stream)
    assert context.get_value("users") == "second"
    context.detach(token)


def test_an_asynchronous_stream_leaves_its_readers_context(
    calls: list[dict[str, Any]], providers: str
) -> None:
    """Whether it is read from `create()`, or by the helper."""

    async def main() -> None:
        async with anthropic.AsyncAnthropic(base_url=providers, api_key="none", max_retries=0) as client:
            before = context.get_current()
            async for _ in await client.messages.create(**REQUEST, stream=True):
                assert context.get_current() is before
            assert context.get_current() is before
            async with client.messages.stream(**REQUEST) as stream:
                assert context.get_current() is before
                await stream.get_final_message()
            assert context.get_current() is before

    asyncio.run(main())
    assert len(calls) == 2


# -- interrupts in the instrumentor, which catches every `Exception` ------------------------------------


def test_an_interrupt_in_a_chunk_reaches_the_reader(
    claude: anthropic.Anthropic, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream goes at once, and not when garbage is collected. And the next stream has its tokens: one
    interrupt does not switch that off for the process."""

    def interrupted(**_: Any) -> None:
        raise SoftTimeLimitExceeded(1)

    def read() -> Any:
        stream = claude.messages.create(**REQUEST, stream=True)
        try:
            list(stream)
        except SoftTimeLimitExceeded:
            return weakref.ref(stream.response)
        raise AssertionError("the interrupt is lost")

    gc.collect()
    gc.disable()
    try:
        with monkeypatch.context() as broken:
            broken.setattr(wrappers, "accumulate_event", interrupted)
            response = read()
        assert response() is None
    finally:
        gc.enable()
    list(claude.messages.create(**REQUEST, stream=True))
    assert calls[-1]["tokens_out"]


def test_an_interrupt_in_a_prompt_reaches_the_caller(
    claude: anthropic.Anthropic, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The messages are read after the answer: the call is told."""

    def interrupted(_: Any) -> None:
        raise SoftTimeLimitExceeded(1)

    monkeypatch.setattr(patch, "get_input_messages", interrupted)
    with pytest.raises(SoftTimeLimitExceeded):
        claude.messages.create(**REQUEST)
    assert [call["error_type"] for call in calls] == ["billiard.SoftTimeLimitExceeded"]


def test_an_interrupt_of_before_is_not_raised_again(claude: anthropic.Anthropic) -> None:
    """Where a call is made while one is handled, and the instrumentor logs something else."""
    try:
        raise SoftTimeLimitExceeded(1)
    except SoftTimeLimitExceeded:
        assert claude.messages.create(**REQUEST).content
        patch._logger.debug("something else")


# -- answers of servers that are compatible with OpenAI's, more or less ----------------------------------


def chunk(**fields: Any) -> dict[str, Any]:
    return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "other", **fields}


USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
TOOL = {"id": "x", "type": "function", "function": {"name": "look", "arguments": "{}"}}
ANSWERS: dict[str, Any] = {
    "no index": [chunk(choices=[{"delta": {"content": "a"}}]), chunk(choices=[], usage=USAGE)],
    "no index of a tool": [
        chunk(choices=[{"index": 0, "delta": {"tool_calls": [TOOL]}}]),
        chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "tool_calls"}], usage=USAGE),
    ],
    "nothing": {},
}


@pytest.fixture(scope="module")
def other() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = ANSWERS[request["model"]]
            kind, body = "application/json", json.dumps(answer)
            if isinstance(answer, list):
                kind = "text/event-stream"
                body = "".join(f"data: {json.dumps(one)}\n\n" for one in answer) + "data: [DONE]\n\n"
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("model", ["no index", "no index of a tool"])
def test_a_chunk_that_the_instrumentor_does_not_understand_fails_no_stream(
    calls: list[dict[str, Any]], other: str, model: str
) -> None:
    """Its reader gets all chunks, and the call is told with its tokens."""
    with openai.OpenAI(base_url=other, api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model=model, messages=MESSAGES, stream=True)
        assert len(list(stream)) == len(ANSWERS[model])
    assert [(call["status"], call["tokens_in"], call["tokens_out"]) for call in calls] == [("ok", 3, 4)]


def test_such_a_chunk_fails_no_asynchronous_stream(calls: list[dict[str, Any]], other: str) -> None:
    """The same, awaited."""

    async def main() -> int:
        async with openai.AsyncOpenAI(base_url=other, api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(model="no index", messages=MESSAGES, stream=True)
            return len([chunk async for chunk in stream])

    assert asyncio.run(main()) == 2
    assert [call["tokens_out"] for call in calls] == [4]


def test_a_call_is_no_error_where_only_the_instrumentor_failed(
    calls: list[dict[str, Any]], other: str
) -> None:
    """What it stumbled over is an answer that the SDK has returned."""
    with openai.OpenAI(base_url=other, api_key="none", max_retries=0) as client:
        client.responses.create(model="nothing", input="hello")
    assert [(call["status"], call["model"]) for call in calls] == [("ok", "nothing")]


# -- mocks, and others who put back what they found -----------------------------------------------------


@pytest.fixture
def chat(calls: list[dict[str, Any]], providers: str) -> Iterator[Callable[[], Any]]:
    with openai.OpenAI(base_url=f"{providers}/v1", api_key="none", max_retries=0) as client:
        yield lambda: client.chat.completions.create(model="plain", messages=MESSAGES)


def put_back(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Put a method of an SDK's back for the test, as if nobody had come yet."""
    method = vars(owner)[name]
    while "waxell_workers" in method.__code__.co_filename:
        method = method.__wrapped__
    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize("is_function", [False, True])
def test_a_method_that_was_a_mock_at_the_installation_is_heard_at_the_next(
    calls: list[dict[str, Any]],
    chat: Callable[[], Any],
    is_function: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mock stays what it is."""
    put_back(monkeypatch, Completions, "create")
    options: dict[str, Any] = {"autospec": True} if is_function else {}
    with mock.patch.object(Completions, "create", **options) as create:
        install(calls)
        chat()
        assert create.called
    calls.clear()
    install(calls)
    chat()
    chat()
    assert len(calls) == 2


def test_a_method_that_a_mock_puts_back_is_heard(
    calls: list[dict[str, Any]], chat: Callable[[], Any]
) -> None:
    """Also if we were installed anew while the mock stood there; once per call, however often that was."""
    for _ in range(3):
        with mock.patch.object(Completions, "create"):
            install(calls)
            chat()
        calls.clear()
        chat()
        assert len(calls) == 1


def test_a_users_wrapper_between_two_gates_stays(
    calls: list[dict[str, Any]], chat: Callable[[], Any], providers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where we are put on again because another method was put back; each call is told once."""
    seen: list[str] = []

    def users(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        seen.append("a call")
        return wrapped(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Completions, "create", Completions.create)
        wrap_function_wrapper("openai.resources.chat.completions", "Completions.create", users)
        with mock.patch.object(openai.resources.Embeddings, "create"):
            install(calls)
        chat()
        assert (len(seen), len(calls)) == (1, 1)
    # The user takes the wrapper off, and brings back what stood under it: ours, and replaced meanwhile.
    install(calls)
    chat()
    assert (len(seen), len(calls)) == (1, 2)


def test_geminis_users_instrumentor_may_leave(
    calls: list[dict[str, Any]], providers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It puts back the methods that it found, ours with them: the next installation repairs that."""
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_EMIT_EVENT", "")
    monkeypatch.delenv("OTEL_INSTRUMENTATION_GENAI_EMIT_EVENT")
    client = genai.Client(api_key="none", http_options=types.HttpOptions(base_url=providers))
    put_back(monkeypatch, genai.models.Models, "generate_content")
    theirs = GoogleGenAiSdkInstrumentor()

    def generate() -> None:
        client.models.generate_content(model="plain", contents="hello")

    theirs.instrument(skip_dep_check=True)
    install(calls)  # around theirs
    generate()
    assert len(calls) == 1
    theirs.uninstrument()
    install(calls)
    generate()
    assert len(calls) == 2


FORK = """
import os, sys
from waxell_workers import capture
from waxell_workers.capture import layers
import openai
layers._claims["openai"] = object()  # another thread is at it
child = os.fork()
if not child:
    told = []
    capture.install(lambda **call: told.append(call), names=("openai",), current_run=str, wants_content=bool)
    with openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0) as client:
        client.chat.completions.create(model="plain", messages=[{"role": "user", "content": "hello"}])
    os._exit(len(told))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_that_was_forked_while_a_thread_put_a_layer_on_hears_its_calls(providers: str) -> None:
    """The thread is not there, and its claim neither."""
    done = subprocess.run([sys.executable, "-c", FORK, f"{providers}/v1"], timeout=60, check=False)
    assert done.returncode == 1


# -- nesting, and what is no content --------------------------------------------------------------------


def test_a_span_that_is_open_for_long_does_not_collect_what_was_in_it() -> None:
    """It still knows that a call was told inside it, and of the streams that are open."""
    around = nesting.Layer(None, is_framework=True)
    stream = nesting.Layer(around, is_framework=False)
    for number in range(1000):
        inner = nesting.Layer(around, is_framework=False)
        inner.is_open = False
        inner.is_told = number == 500
    assert len(around.inner) < 100
    assert stream in around.inner
    stream.is_open = False
    assert around.is_superseded()


def test_a_text_in_the_place_of_a_code_is_not_told() -> None:
    """It may quote the request; classes and codes are names."""
    assert short_error_type("invalid: 'Where is the parcel 4711?'") == "unknown"
    for name in ("429", "rate_limit_exceeded", "tests.f.<locals>.Lost"):
        assert short_error_type(name).split(".")[-1] == name.split(".")[-1]
