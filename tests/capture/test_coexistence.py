"""A user who instruments an SDK as we do loses nothing by us, and we nothing by them.

Who wrapped first is settled for the life of a process, so each order runs in a process of its own: this file,
run as a script, makes the table's calls and prints what the user's OpenTelemetry and our sink got. HTTP
spans, metrics and `uninstrument()` are in `unit/test_capture_coexistence.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .shapes import Row, make, rows
from .test_shapes import ROOT, origin

__all__ = ["origin"]

INSTRUMENTORS = {
    "openai": ("opentelemetry.instrumentation.genai.openai", "OpenAIInstrumentor"),
    "anthropic": ("opentelemetry.instrumentation.genai.anthropic", "AnthropicInstrumentor"),
    "gemini": ("opentelemetry.instrumentation.google_genai", "GoogleGenAiSdkInstrumentor"),
}
MODELS = ("plain", "tools", "fail-429", "broken")
"""Of the table's; the others wait, or are no more than these to somebody who wraps methods."""
UNHEARD = {
    # The user's stream, outside ours, closes it and does not say why.
    ("openai", "ours first"): ("chat_stream_error_of_the_reader", "responses_stream_error_of_the_reader"),
    ("anthropic", "ours first"): ("messages_stream_error_of_the_reader",),
    # The user's instrumentor, inside ours, reads the tokens and clears them.
    ("gemini", "user first"): ("embed_content",),
}
"""Where both are at work, what we hear less of: of these the status, or the tokens."""
UNSTABLE = ("gen_ai.response.time_to_first_chunk",)


def chosen(sdk: str) -> list[Row]:
    found = [row for row in rows().values() if row.api["sdk"] == sdk and row.model in MODELS]
    return [row for row in found if not row.is_cancelled and not row.missing]


@pytest.fixture(scope="module")
def seen(origin: str) -> Iterator[Callable[[str, str], dict[str, Any]]]:
    results: dict[tuple[str, str], dict[str, Any]] = {}

    def run(sdk: str, order: str) -> dict[str, Any]:
        if (sdk, order) not in results:
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "tests.capture.test_coexistence",
                sdk,
                order,
                origin,
            ]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr
            results[sdk, order] = json.loads(done.stdout.splitlines()[-1])
        return results[sdk, order]

    return run


@pytest.mark.parametrize("order", ["ours first", "user first"])
@pytest.mark.parametrize("sdk", INSTRUMENTORS)
def test_the_user_sees_the_same_as_without_us(
    seen: Callable[[str, str], dict[str, Any]], sdk: str, order: str
) -> None:
    """Names, attributes, status and parents of the user's spans, and the environment, are the same."""
    alone, beside = seen(sdk, "user alone"), seen(sdk, order)
    assert sum(len(spans) for spans in alone["spans"].values()) > len(chosen(sdk)), "the user sees nothing"
    differing = {row: (spans, beside["spans"][row]) for row, spans in alone["spans"].items()}
    assert {row: both for row, both in differing.items() if both[0] != both[1]} == {}
    assert beside["environment"] == alone["environment"]


@pytest.mark.parametrize("order", ["ours first", "user first"])
@pytest.mark.parametrize("sdk", INSTRUMENTORS)
def test_we_hear_the_same_as_without_the_user(
    seen: Callable[[str, str], dict[str, Any]], sdk: str, order: str
) -> None:
    """Each call once, and with the same in it."""
    alone, beside = seen(sdk, "ours alone")["calls"], seen(sdk, order)["calls"]
    assert sum(map(len, alone.values())) >= len(chosen(sdk)) / 2, "we hear nothing"
    differing = {row for row, calls in alone.items() if calls != beside[row]}
    excepted = UNHEARD.get((sdk, order), ())
    assert {row for row in differing if row.split("-")[1] not in excepted} == set()
    assert [len(calls) for calls in beside.values()] == [len(calls) for calls in alone.values()]


# --- the script -------------------------------------------------------------------------------------------


def main(sdk: str, order: str, origin: str) -> None:
    import importlib
    import os

    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from waxell_workers import capture

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    calls: list[dict[str, Any]] = []

    def ours() -> None:
        capture.install(
            lambda **call: calls.append(call),
            names=None,
            current_run=lambda: "the run",
            wants_content=lambda: True,
        )

    def users() -> None:
        module, name = INSTRUMENTORS[sdk]
        instrumentor = getattr(importlib.import_module(module), name)()
        instrumentor.instrument(tracer_provider=provider, skip_dep_check=True)

    for step in {"user alone": (users,), "ours alone": (ours,), "ours first": (ours, users)}.get(
        order, (users, ours)
    ):
        step()
    result: dict[str, Any] = {"spans": {}, "calls": {}}
    for row in chosen(sdk):
        exporter.clear()
        calls.clear()
        with provider.get_tracer("the user's").start_as_current_span("task"):
            make(row, origin, "")
        result["spans"][row.id] = described(exporter.get_finished_spans())
        result["calls"][row.id] = [stable(call) for call in calls]
    result["environment"] = {name: value for name, value in os.environ.items() if name.startswith("OTEL")}
    print(json.dumps(result))


def described(spans: Any) -> list[dict[str, Any]]:
    names = {span.context.span_id: span.name for span in spans}
    return [
        {
            "name": span.name,
            "parent": names[span.parent.span_id] if span.parent else None,
            "status": span.status.status_code.name,
            "attributes": {k: repr(v) for k, v in span.attributes.items() if k not in UNSTABLE},
            "events": [event.name for event in span.events],
        }
        for span in spans
    ]


def stable(call: dict[str, Any]) -> dict[str, Any]:
    varying = ("id", "at", "duration_ms", "ttft_ms")
    return {name: value for name, value in call.items() if name not in varying}


if __name__ == "__main__":
    main(*sys.argv[1:])
