"""OpenTelemetry: its `BatchSpanProcessor` with default settings and an exporter of our own.

It is set up in `worker_process_init`, as the documentation of its Celery instrumentation has it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from celery.signals import worker_process_init
from handover import hand_over
from opentelemetry import trace as api
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

MODEL = "gen_ai.request.model"


class HandOver(SpanExporter):
    """Hands over the calls among what it is given."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        attributes = [span.attributes or {} for span in spans]
        hand_over([str(each[MODEL]) for each in attributes if MODEL in each])
        return SpanExportResult.SUCCESS


@worker_process_init.connect(weak=False)
def set_up(**_: object) -> None:
    """Give a pool process its own provider and its own export thread."""
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(HandOver()))
    api.set_tracer_provider(provider)


def trace(name: str) -> AbstractContextManager[object]:
    """Record what a task does as a root span."""
    return api.get_tracer("losses").start_as_current_span(name)


def call(model: str) -> AbstractContextManager[object]:
    """Record one call as a chat span."""
    attributes = {"gen_ai.operation.name": "chat", MODEL: model}
    return api.get_tracer("losses").start_as_current_span(
        f"chat {model}", kind=api.SpanKind.CLIENT, attributes=attributes
    )
