"""A collector of the tests' own: takes spans over HTTP, as OpenTelemetry's protocol has it, and keeps them."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """One span, and the process that it came from."""

    trace: str
    id: str
    parent: str
    name: str
    facts: dict[str, Any]
    service: str
    instance: str


class Collector:
    """Takes what comes to `url` until it is closed."""

    def __init__(self) -> None:
        self._bodies: list[bytes] = []
        bodies = self._bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces":
                    bodies.append(body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def raw(self) -> bytes:
        """All that came."""
        return b"".join(self._bodies)

    def spans(self, trace: str) -> list[Collected]:
        """Of this trace, so far, in the order in which they began."""
        return [span for span in self.all() if span.trace == trace]

    def all(self) -> list[Collected]:
        found = []
        for body in [*self._bodies]:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                process = _facts(resource.resource.attributes)
                found += [(span, process) for scope in resource.scope_spans for span in scope.spans]
        found.sort(key=lambda it: it[0].start_time_unix_nano)
        return [
            Collected(
                trace=span.trace_id.hex(),
                id=span.span_id.hex(),
                parent=span.parent_span_id.hex(),
                name=span.name,
                facts=_facts(span.attributes),
                service=process["service.name"],
                instance=process["service.instance.id"],
            )
            for span, process in found
        ]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _facts(attributes: Any) -> dict[str, Any]:
    return {it.key: getattr(it.value, it.value.WhichOneof("value")) for it in attributes}
