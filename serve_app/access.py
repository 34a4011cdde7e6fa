"""What is told of a request once it is answered, whoever asked and however it ended: metrics, a log line, its span.

Nothing of what it held is in any: `Call` has the facts, `api.py` brings it here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from serve_app.core.metrics import IngressMetrics, lane_name
from serve_app.core.settings import LogLevel
from serve_app.service import Call
from serve_app.tracing import Span

Log = Callable[[Mapping[str, Any]], None]

LEVELS: dict[LogLevel, int] = {"info": 0, "warning": 400, "error": 500, "off": 1000}  # from which status on
HUNG_UP = 499  # nginx's word for a client that did not wait
OTHER = "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Access:
    def __init__(
        self,
        metrics: IngressMetrics,
        paths: Iterable[str],
        *,
        log: Log | None = None,
        log_from: LogLevel = "info",
        unlogged: Collection[str] = (),
    ) -> None:
        """paths: of the routes, as they are declared. A parameter is the last part of its path.

        log: takes the lines of that level and above, but of no `unlogged` path.
        """
        self._metrics = metrics
        self._log = log
        self._log_from_status = LEVELS[log_from]
        self._unlogged = unlogged
        self._paths = {path for path in paths if "{" not in path}
        self._stems = {
            path.partition("{")[0]: path.partition(":")[0].rstrip("}") + "}" for path in paths if "{" in path
        }

    def answered(self, call: Call, status: int) -> None:
        """status: `HUNG_UP` if nobody was there to be answered."""
        route, code, total_s = self.route(call.route), _code(call, status), time.perf_counter() - call.started_s
        self._count(call, route, code, status, total_s)
        if self._log is not None and status >= self._log_from_status and call.route not in self._unlogged:
            self._log(_line(call, route, code, status, total_s))

    def describe(self, span: Span, method: str, call: Call, status: int) -> None:
        """The span of a request that is traced, as far as a log line goes."""
        route, code = self.route(call.route), _code(call, status)
        method = method if method in METHODS else "_OTHER"
        span.rename(f"{method} {route}")
        span.tell(
            {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "serve_app.code": code,
                "serve_app.request_id": call.request_id,
                "serve_app.workspace": call.caller.workspace.id if call.caller else None,
                "serve_app.model": call.model or None,
                "serve_app.inputs": call.inputs,
                "serve_app.tokens": call.tokens,
                "serve_app.replayed": call.replay_of is not None,
            }
        )
        if status >= 500:
            span.fail(code)

    def _count(self, call: Call, route: str, code: str, status: int, total_s: float) -> None:
        metrics = self._metrics
        metrics.requests.add(route, call.model, str(status), code)
        if call.error and call.error.budget:
            metrics.refusals.add(call.error.budget)
        if status >= 400:
            return
        metrics.request_seconds.observe(total_s, route, call.model)
        if call.settle_s is not None:
            metrics.settle_seconds.observe(call.settle_s, "reply" if call.idempotency_keys else "bill")
        if call.compute_s is not None and call.queue_s is not None:
            metrics.tokens.add(route, call.model, by=call.tokens or 0)
            if call.express is not None:
                lane = lane_name(call.express)
                metrics.queue_seconds.observe(call.queue_s, call.model, lane)
                metrics.compute_seconds.observe(call.compute_s, call.model, lane)

    def route(self, path: str) -> str:
        """A path as it may stand in a label: callers choose what they send, routes are few."""
        if path in self._paths:
            return path
        return next((route for stem, route in self._stems.items() if path.startswith(stem)), OTHER)


def _line(call: Call, route: str, code: str, status: int, total_s: float) -> dict[str, Any]:
    """Ids for those who know whose they are, and no header, body or path."""
    return {
        "timestamp_ns": time.time_ns(),
        "levelname": "ERROR" if status >= 500 else "WARNING" if status >= 400 else "INFO",
        "message": "request",
        "request_id": call.request_id,
        "route": route,
        "model": call.model,
        "status": status,
        "code": code,
        "workspace": call.caller and call.caller.workspace.id,
        "key": call.caller and call.caller.key.id,
        "inputs": call.inputs,
        "tokens": call.tokens,
        "tokenize_ms": _ms(call.tokenize_s),
        "queue_ms": _ms(call.queue_s),
        "compute_ms": _ms(call.compute_s),
        "settle_ms": _ms(call.settle_s),
        "total_ms": _ms(total_s),
        "replay_of": call.replay_of,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 2)


def _code(call: Call, status: int) -> str:
    if status == HUNG_UP:
        return "hung_up"
    if call.error:
        return call.error.code
    return "ok" if status < 400 else OTHER
