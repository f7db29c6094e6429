"""A user who instruments the same SDKs with the same instrumentors, with us or without.

    python -m tests.capture_frameworks.coexistence <order>

`order` is `alone`, or says whether we are installed `before` or `after` the user's instrumentors are switched
on. Prints, as JSON, the user's spans, and which calls were heard.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from importlib.metadata import distribution
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from waxell_workers import capture

from . import server

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
URL = server.start()
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]

_VARYING = re.compile(
    r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{32}|0x[0-9a-f]+|\d{4}-\d\d-\d\d\S*|127\.0\.0\.1:\d+"
)
_DATES = re.compile(r"\d\d \w{3} \d{4} [\d:]+ GMT|\d+\.\d+")


def _sdks() -> None:
    import boto3
    import cohere
    import groq
    import mistralai.client
    import ollama
    import together

    mistral = mistralai.client.Mistral(api_key="x", server_url=URL)
    mistral.chat.complete(model="model", messages=MESSAGES)
    list(mistral.chat.stream(model="model", messages=MESSAGES))
    for client in (groq.Groq, together.Together):
        completions = client(api_key="x", base_url=URL, max_retries=0).chat.completions
        completions.create(model="model", messages=MESSAGES)
        list(completions.create(model="model", messages=MESSAGES, stream=True))
        try:
            completions.create(model="fail-429", messages=MESSAGES)
        except (groq.RateLimitError, together.RateLimitError):
            pass
    ollama.Client(host=URL).chat(model="model", messages=MESSAGES)
    list(ollama.Client(host=URL).chat(model="model", messages=MESSAGES, stream=True))
    cohere.ClientV2(api_key="x", base_url=URL).chat(model="model", messages=MESSAGES)
    list(cohere.ClientV2(api_key="x", base_url=URL).chat_stream(model="model", messages=MESSAGES))
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    bedrock = boto3.client("bedrock-runtime", endpoint_url=URL, **keys)
    said = [{"role": "user", "content": [{"text": "Hi"}]}]
    bedrock.converse(modelId="model", messages=said)
    list(bedrock.converse_stream(modelId="model", messages=said)["stream"])


def _litellm() -> None:
    import litellm

    litellm.suppress_debug_info = True
    asked: dict[str, Any] = {"messages": MESSAGES, "api_base": URL, "api_key": "x", "max_retries": 0}
    for model in ("openai/model", "anthropic/model"):
        litellm.completion(model=model, **asked)
    list(litellm.completion(model="mistral/model", stream=True, **asked))
    try:
        litellm.completion(model="mistral/fail-429", **asked)
    except litellm.RateLimitError:
        pass


def _langchain() -> None:
    from langchain_core.language_models import FakeListChatModel
    from langchain_core.runnables import RunnableLambda
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="model", base_url=f"{URL}/v1", api_key="x", max_retries=0)
    fake = FakeListChatModel(responses=["Fine"])
    (RunnableLambda(str) | model).invoke("Hi")
    list(fake.stream("Hi"))
    fake.invoke("Hi")
    model.invoke("Hi")


def _llama_index() -> None:
    from llama_index.core.llms import ChatMessage, MockLLM
    from llama_index.llms.openai import OpenAI

    said = [ChatMessage(role="user", content="Hi")]
    model = OpenAI(model="gpt-4", api_base=f"{URL}/v1", api_key="x", max_retries=0)
    for each in (model, MockLLM()):
        each.chat(said)
        list(each.stream_chat(said))


CALLS = (_sdks, _litellm, _langchain, _llama_index)
MODULES = (
    *("mistralai.client", "groq", "together", "ollama", "cohere", "botocore.client", "litellm"),
    *("langchain_openai", "llama_index.core"),
)
_NAMES = ("mistralai", "groq", "together", "ollama", "cohere", "litellm", "langchain", "llama-index")
DISTRIBUTIONS = (
    *(f"openinference-instrumentation-{name}" for name in _NAMES),
    "opentelemetry-instrumentation-genai-bedrock",
    "opentelemetry-instrumentation-genai-openai",
)


def _switch_on(provider: TracerProvider) -> None:
    for name in DISTRIBUTIONS:
        (point,) = distribution(name).entry_points.select(group="opentelemetry_instrumentor")
        point.load()().instrument(tracer_provider=provider)


def _steady(value: Any) -> str:
    return _DATES.sub("…", _VARYING.sub("…", str(value)))


def _attributes(span: ReadableSpan) -> dict[str, str]:
    told = sorted((span.attributes or {}).items())
    return {key: _steady(value) for key, value in told if key != "server.port"}


def _as_data(spans: tuple[ReadableSpan, ...]) -> list[Any]:
    names = {span.context.span_id: span.name for span in spans}
    traces = {span.context.trace_id for span in spans}
    told = [
        {
            "name": span.name,
            "parent": names.get(span.parent.span_id, "?") if span.parent else "",
            "kind": span.kind.name,
            "status": [span.status.status_code.name, _steady(span.status.description).split("\n")[0]],
            "attributes": _attributes(span),
            "events": [event.name for event in span.events],
        }
        for span in spans
    ]
    return [len(traces), *told]


def main() -> None:
    """Make the calls."""
    (order,) = sys.argv[1:]
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    calls: list[Any] = []

    def listen() -> None:
        capture.install(
            lambda **call: calls.append(call),
            names=None,
            current_run=lambda: "run",
            wants_content=lambda: False,
        )

    if order == "before":
        listen()
    for module in MODULES:
        importlib.import_module(module)
    _switch_on(provider)
    if order == "after":
        listen()
    with provider.get_tracer("user").start_as_current_span("outer"):
        for make in CALLS:
            make()
    heard = [[call["model"], call["status"], call["tokens_in"]] for call in calls]
    print(json.dumps({"spans": _as_data(exporter.get_finished_spans()), "calls": heard}))


if __name__ == "__main__":
    main()
