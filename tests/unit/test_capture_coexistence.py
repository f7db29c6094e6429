"""A user who instruments OpenAI with the same instrumentor loses nothing by us, and we nothing by them.

Who wrapped first is settled for the life of a process, so each order runs in a process of its own: this file,
run as a script, makes one call of every shape and prints what the user's OpenTelemetry and our sink got.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

SHAPES = (
    "chat",
    "chat_stream",
    "chat_stream_left_early",
    "chat_stream_helper",
    "chat_parse",
    "chat_raw",
    "chat_raw_stream",
    "chat_error",
    "responses",
    "responses_stream",
    "responses_stream_helper",
    "embeddings",
    "async_chat",
    "async_chat_stream",
    "async_responses",
    "async_responses_stream",
    "async_responses_stream_helper",
    "async_embeddings",
)
ORDERS = ("ours first", "user first", "user comes and goes")
"""The last: the user's instrumentation leaves from under ours and comes back on top of it."""


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    command = [sys.executable, "-m", "waxell_workers.cli.standin"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


@pytest.fixture(scope="module")
def seen(base_url: str) -> Callable[[str], dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}

    def run(order: str) -> dict[str, Any]:
        if order not in results:
            command = [sys.executable, "-W", "error", __file__, order, base_url]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""
            results[order] = json.loads(done.stdout)
        return results[order]

    return run


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_user_sees_the_same_spans_as_without_us(
    seen: Callable[[str], dict[str, Any]], order: str, shape: str
) -> None:
    """Names, attributes and parents of the user's spans are the same, GenAI and HTTP spans alike."""
    alone = seen("user alone")["spans"][shape]
    assert len([span for span in alone if span["name"] != "HTTP"]) == 2, "one of GenAI, one around it"
    assert seen(order)["spans"][shape] == alone


@pytest.mark.parametrize("order", ["ours alone", *ORDERS])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_call_is_one_call(seen: Callable[[str], dict[str, Any]], order: str, shape: str) -> None:
    """Our sink hears of each call once, and of the same call as without the user's instrumentation."""
    (call,) = seen(order)["calls"][shape]
    (alone,) = seen("ours alone")["calls"][shape]
    assert call == alone


@pytest.mark.parametrize("order", ORDERS)
def test_the_users_metrics_are_not_doubled(seen: Callable[[str], dict[str, Any]], order: str) -> None:
    """As many durations and tokens are measured as without us, where providers are process-wide."""
    assert seen("user alone")["metrics"]
    assert seen(order)["metrics"] == seen("user alone")["metrics"]


def test_http_spans_keep_their_parents_where_only_we_listen(seen: Callable[[str], dict[str, Any]]) -> None:
    """With no GenAI instrumentation of the user's, an HTTP span has the parent that it has without us."""
    for shape in SHAPES:
        spans = seen("ours alone")["spans"][shape]
        assert spans == seen("nobody")["spans"][shape]
        assert [span["parent"] for span in spans if span["name"] == "HTTP"] == ["task"]


def test_both_go_on_after_the_other_has_left(seen: Callable[[str], dict[str, Any]]) -> None:
    """The user's `uninstrument()` leaves our wrappers in place, our `uninstall()` theirs."""
    assert seen("user leaves")["calls"] == seen("ours alone")["calls"]
    assert seen("user leaves")["spans"] == seen("nobody")["spans"]
    assert seen("we leave")["spans"] == seen("user alone")["spans"]
    assert not any(seen("we leave")["calls"].values())


# --- the script -------------------------------------------------------------------------------------------


def main(order: str, base_url: str) -> None:
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from waxell_workers import capture

    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    provider, meters = TracerProvider(), MeterProvider([reader])
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(meters)
    calls: list[dict[str, Any]] = []

    def ours() -> None:
        capture.install(
            lambda **call: calls.append(call),
            names=None,
            current_run=lambda: "run",
            wants_content=lambda: True,
        )

    def users() -> Any:
        from opentelemetry.instrumentation.genai.openai import OpenAIInstrumentor

        OpenAIInstrumentor().instrument(tracer_provider=provider, meter_provider=meters)
        return OpenAIInstrumentor()

    if order == "user alone":
        users()
    elif order == "ours alone":
        ours()
    elif order == "ours first":
        ours()
        users()
    elif order == "user first":
        users()
        ours()
    elif order == "user comes and goes":
        instrumentor = users()
        ours()
        instrumentor.uninstrument()
        users()
    elif order == "user leaves":
        instrumentor = users()
        ours()
        instrumentor.uninstrument()
    elif order == "we leave":
        ours()
        users()
        capture.uninstall()
    else:
        assert order == "nobody"
    shapes = Shapes(base_url, provider.get_tracer("the user's"))
    result: dict[str, Any] = {"spans": {}, "calls": {}, "metrics": {}}
    for shape in SHAPES:
        exporter.clear()
        calls.clear()
        shapes.make(shape)
        result["spans"][shape] = described(exporter.get_finished_spans())
        result["calls"][shape] = [stable(call) for call in calls]
    result["metrics"] = measured(reader)
    print(json.dumps(result))


def described(spans: Any) -> list[dict[str, Any]]:
    names = {span.context.span_id: span.name for span in spans}
    unstable = ("gen_ai.response.id", "gen_ai.response.time_to_first_chunk")
    return [
        {
            "name": span.name,
            "parent": names[span.parent.span_id] if span.parent else None,
            "status": span.status.status_code.name,
            "attributes": {k: repr(v) for k, v in span.attributes.items() if k not in unstable},
        }
        for span in spans
    ]


def stable(call: dict[str, Any]) -> dict[str, Any]:
    assert call["at"] > 0
    assert call["duration_ms"] > 0
    varying = ("id", "at", "duration_ms", "ttft_ms", "response_id")
    return {name: value for name, value in call.items() if name not in varying}


def measured(reader: Any) -> dict[str, int]:
    data = reader.get_metrics_data()
    counts: dict[str, int] = {}
    for resource in data.resource_metrics if data else ():
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                counts[metric.name] = sum(point.count for point in metric.data.data_points)
    return counts


class Shapes:
    """One call of each shape, over an HTTP transport that the user traces."""

    messages: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Say hi."}]}
    response: dict[str, Any] = {"model": "gpt-4o", "input": "Say hi."}
    embedding: dict[str, Any] = {"model": "text-embedding-3-small", "input": "Say hi."}

    def __init__(self, base_url: str, tracer: Any) -> None:
        self.tracer = tracer
        self.options: dict[str, Any] = {"base_url": base_url, "api_key": "none", "max_retries": 0}

    def make(self, shape: str) -> None:
        import openai
        from opentelemetry import trace

        with self.tracer.start_as_current_span("task") as task:
            if shape.startswith("async_"):
                asyncio.run(self._async_client_and(getattr(self, shape)))
            else:
                client = openai.DefaultHttpxClient(transport=traced_transport(self.tracer))
                with openai.OpenAI(**self.options, http_client=client) as sync:
                    getattr(self, shape)(sync)
            assert trace.get_current_span() is task, shape

    async def _async_client_and(self, call: Callable[..., Any]) -> None:
        import openai

        client = openai.DefaultAsyncHttpxClient(transport=async_traced_transport(self.tracer))
        async with openai.AsyncOpenAI(**self.options, http_client=client) as asynchronous:
            await call(asynchronous)

    def chat(self, client: Any) -> None:
        client.chat.completions.create(**self.messages)

    def chat_stream(self, client: Any) -> None:
        usage = {"include_usage": True}
        assert (
            len(list(client.chat.completions.create(**self.messages, stream=True, stream_options=usage))) > 3
        )

    def chat_stream_left_early(self, client: Any) -> None:
        with client.chat.completions.create(**self.messages, stream=True) as stream:
            next(stream)

    def chat_stream_helper(self, client: Any) -> None:
        with client.chat.completions.stream(**self.messages) as stream:
            assert stream.get_final_completion().choices[0].message.content

    def chat_parse(self, client: Any) -> None:
        from pydantic import BaseModel

        class Reply(BaseModel):
            text: str

        reply = client.chat.completions.parse(**self.messages, response_format=Reply)
        assert isinstance(reply.choices[0].message.parsed, Reply)

    def chat_raw(self, client: Any) -> None:
        raw = client.chat.completions.with_raw_response.create(**self.messages)
        assert raw.headers["x-waxell-standin"] == "1"
        assert raw.parse().choices

    def chat_raw_stream(self, client: Any) -> None:
        raw = client.chat.completions.with_raw_response.create(**self.messages, stream=True)
        assert len(list(raw.parse())) > 3

    def chat_error(self, client: Any) -> None:
        import openai

        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**{**self.messages, "model": "fail-429"})

    def responses(self, client: Any) -> None:
        assert client.responses.create(**self.response).output_text

    def responses_stream(self, client: Any) -> None:
        assert len(list(client.responses.create(**self.response, stream=True))) > 3

    def responses_stream_helper(self, client: Any) -> None:
        with client.responses.stream(**self.response) as stream:
            assert stream.get_final_response().output_text

    def embeddings(self, client: Any) -> None:
        assert client.embeddings.create(**self.embedding).data

    async def async_chat(self, client: Any) -> None:
        await client.chat.completions.create(**self.messages)

    async def async_chat_stream(self, client: Any) -> None:
        assert (
            len([chunk async for chunk in await client.chat.completions.create(**self.messages, stream=True)])
            > 3
        )

    async def async_responses(self, client: Any) -> None:
        assert (await client.responses.create(**self.response)).output_text

    async def async_responses_stream(self, client: Any) -> None:
        assert len([event async for event in await client.responses.create(**self.response, stream=True)]) > 3

    async def async_responses_stream_helper(self, client: Any) -> None:
        async with client.responses.stream(**self.response) as stream:
            assert (await stream.get_final_response()).output_text

    async def async_embeddings(self, client: Any) -> None:
        assert (await client.embeddings.create(**self.embedding)).data


def traced_transport(tracer: Any) -> Any:
    import httpx2
    from opentelemetry import trace

    class Traced(httpx2.HTTPTransport):
        def handle_request(self, request: Any) -> Any:
            current = getattr(trace.get_current_span(), "name", "")
            with tracer.start_as_current_span("HTTP", attributes={"current": current}):
                return super().handle_request(request)

    return Traced()


def async_traced_transport(tracer: Any) -> Any:
    import httpx2
    from opentelemetry import trace

    class Traced(httpx2.AsyncHTTPTransport):
        async def handle_async_request(self, request: Any) -> Any:
            current = getattr(trace.get_current_span(), "name", "")
            with tracer.start_as_current_span("HTTP", attributes={"current": current}):
                return await super().handle_async_request(request)

    return Traced()


if __name__ == "__main__":
    main(*sys.argv[1:])
