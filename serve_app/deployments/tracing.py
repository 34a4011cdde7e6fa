"""The exporter that Serve's `tracing_config` names: our spans, by way of OpenTelemetry, to a collector.

Serve calls `otlp` in each replica before it makes it, and that is what switches `serve_app/tracing.py` on; this module
is not imported otherwise. Where spans go is in OpenTelemetry's own variables, `OTEL_EXPORTER_OTLP_ENDPOINT` first of
all. Serve's own spans stay here: they quote exceptions, which may quote a text, and know nothing of batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from urllib.parse import quote

import ray
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serve_app import tracing
from serve_app.tracing import Fact, Span

SCOPE = "serve_app"
REPLICA = "SERVE_REPLICA::"  # before APPLICATION#DEPLOYMENT#ID, in the name of a replica's Ray actor


def otlp() -> list[SpanProcessor]:
    """Spans in batches over HTTP, with OpenTelemetry's defaults: to port 4318 of this machine, in protobuf."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ImportError(
            "`tracing_config` is enabled, and OpenTelemetry's OTLP exporter is not installed: "
            "pip install 'serve-app[tracing]' on every node, or set `enabled: false`."
        ) from None
    _name_process(ray.get_runtime_context().get_actor_name() or "")
    tracing.switch_on(OpenTelemetry(trace.get_tracer(SCOPE)))
    return [OursOnly(OTLPSpanExporter())]


def _name_process(actor: str) -> None:
    """Serve makes the provider, which reads these variables, after `otlp` has returned."""
    application, _, replica = actor.removeprefix(REPLICA).partition("#")
    os.environ.setdefault("OTEL_SERVICE_NAME", f"serve-app.{application}" if actor.startswith(REPLICA) else "serve-app")
    given = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if "service.instance.id=" not in given:
        instance = f"service.instance.id={quote(replica or str(os.getpid()))}"
        os.environ["OTEL_RESOURCE_ATTRIBUTES"] = f"{given},{instance}" if given else instance


class OursOnly(BatchSpanProcessor):
    """From a thread of its own: where its queue is full, or the collector away, spans are lost and no request waits."""

    def on_end(self, span: ReadableSpan) -> None:
        if span.instrumentation_scope is not None and span.instrumentation_scope.name == SCOPE:
            super().on_end(span)


class OpenTelemetry:
    """See `tracing.Tracer`. The sampler is Serve's: as the parent says; without one, `sampling_ratio` of the traces."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    def start(self, name: str, parent: str | None, *, serves: bool = False, ago_s: float = 0.0) -> Span | None:
        context = Context()  # not the current one, which is Serve's
        if parent is not None:
            context = self._propagator.extract({"traceparent": parent}, context)
        kind = trace.SpanKind.SERVER if serves else trace.SpanKind.INTERNAL
        started_ns = time.time_ns() - int(1e9 * ago_s)
        span = self._tracer.start_span(name, context, kind, start_time=started_ns)
        return _Recorded(span) if span.is_recording() else None


class _Recorded:
    def __init__(self, span: trace.Span) -> None:
        self._span = span
        context = span.get_span_context()
        ids = trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)
        self.traceparent = f"00-{ids[0]}-{ids[1]}-01"

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def tell(self, facts: Mapping[str, Fact | None]) -> None:
        self._span.set_attributes({name: fact for name, fact in facts.items() if fact is not None})

    def fail(self, kind: str) -> None:
        self._span.set_attribute("error.type", kind)
        self._span.set_status(trace.StatusCode.ERROR)

    def end(self) -> None:
        self._span.end()
