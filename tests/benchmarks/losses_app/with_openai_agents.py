"""openai-agents: its `BatchTraceProcessor` with default settings and an exporter of our own.

It is set up when the app is imported, as the SDK's own default processor is. Its thread starts with the first
trace, so that in a prefork pool each process has one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from agents.tracing import GenerationSpanData, Span, generation_span, set_trace_processors, trace
from agents.tracing.processor_interface import TracingExporter
from agents.tracing.processors import BatchTraceProcessor
from handover import hand_over

__all__ = ["call", "trace"]


class HandOver(TracingExporter):
    """Hands over the calls among what it is given."""

    def export(self, items: Sequence[Any]) -> None:
        data = [item.span_data for item in items if isinstance(item, Span)]
        hand_over([each.model for each in data if isinstance(each, GenerationSpanData)])


set_trace_processors([BatchTraceProcessor(HandOver())])


@contextmanager
def call(model: str) -> Iterator[None]:
    """Record one call as a generation span."""
    with generation_span(model=model):
        yield
