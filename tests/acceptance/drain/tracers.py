"""Two tracers that a user's application has beside waxell-workers, set up as their documentation says.

Each trace and span has a marker, which their exporters POST to `COLLECTOR_URL`, in the batches that they
are given. Importing this sets both up: in a worker that forks afterwards, children inherit their locks and
queues, and none of their threads.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

import httpx
from agents import custom_span, set_trace_processors, trace
from agents.tracing import Span
from agents.tracing.processor_interface import TracingExporter
from agents.tracing.processors import BatchTraceProcessor
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

EVERY_S = float(os.environ["EXPORT_EVERY_S"])
"""How often the tracers' own threads export; 5 unless one is set."""
EXPORT_S = 60
"""How long an exporter waits for an answer; that of openai-agents does so three times."""


def hand_over(markers: list[str]) -> None:
    """POST markers; they have arrived when the server answers."""
    if markers:
        httpx.post(os.environ["COLLECTOR_URL"], json=markers, timeout=EXPORT_S).raise_for_status()


class AgentsExporter(TracingExporter):
    """Hands over the names of what openai-agents calls custom spans."""

    def export(self, items: Sequence[Any]) -> None:
        hand_over([f"agents {item.span_data.name}" for item in items if isinstance(item, Span)])


class OpenTelemetryExporter(SpanExporter):
    """Hands over the names of OpenTelemetry's spans."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        hand_over([f"opentelemetry {span.name}" for span in spans])
        return SpanExportResult.SUCCESS


set_trace_processors([BatchTraceProcessor(AgentsExporter(), schedule_delay=EVERY_S)])
provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OpenTelemetryExporter(), schedule_delay_millis=EVERY_S * 1000))
otel.set_tracer_provider(provider)


def ask(marker: str) -> None:
    """Do what a task does: one trace of each tracer; say when, for whoever measures."""
    print(f"begun {time.monotonic()}", flush=True)
    with trace(marker), custom_span(marker):
        pass
    with otel.get_tracer(__name__).start_as_current_span(marker):
        pass
    print(f"traced {marker}", flush=True)
