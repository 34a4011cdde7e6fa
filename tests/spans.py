"""Spans into memory, by the OpenTelemetry that a replica has; and what is read from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

from serve_app import tracing
from serve_app.deployments.tracing import SCOPE, OpenTelemetry

TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{CLIENT}-01"}
NOT_SAMPLED = {"traceparent": f"00-{TRACE}-{CLIENT}-00"}


class Spans:
    """What was recorded so far."""

    def __init__(self, ratio: float) -> None:
        """ratio: of the traces that begin here."""
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=ParentBasedTraceIdRatio(ratio))
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def all(self) -> list[ReadableSpan]:
        return [*self._exporter.get_finished_spans()]

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all() if span.name == name]

    def tree(self, root: str = CLIENT) -> dict[str, list[str]]:
        """The names below each name, from the span of that id on."""
        names = {f"{span.context.span_id:016x}": span.name for span in self.all()} | {root: "client"}
        found: dict[str, list[str]] = {}
        for span in sorted(self.all(), key=lambda span: span.start_time or 0):
            above = names[f"{span.parent.span_id:016x}"] if span.parent else ""
            found.setdefault(above, []).append(span.name)
        return found

    def text(self) -> str:
        return "\n".join(span.to_json() for span in self.all())


@contextmanager
def recorded(ratio: float = 0.0) -> Iterator[Spans]:
    """While tracing is on in this process."""
    spans = Spans(ratio)
    tracing.switch_on(OpenTelemetry(spans.provider.get_tracer(SCOPE)))
    try:
        yield spans
    finally:
        tracing.switch_on(None)
