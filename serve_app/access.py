"""What is told of each request once it is answered, whoever asked and however it ended: its metrics.

Nothing of what it held, and nobody's name: `Call` has the facts, `api.py` brings it here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from serve_app.core.metrics import IngressMetrics, lane_name
from serve_app.service import Call

HUNG_UP = 499  # nginx's word for a client that did not wait
OTHER = "other"


class Access:
    def __init__(self, metrics: IngressMetrics, paths: Iterable[str]) -> None:
        """paths: of the routes, as they are declared. A parameter is the last part of its path."""
        self._metrics = metrics
        self._paths = {path for path in paths if "{" not in path}
        self._stems = {
            path.partition("{")[0]: path.partition(":")[0].rstrip("}") + "}" for path in paths if "{" in path
        }

    def answered(self, call: Call, status: int) -> None:
        """status: `HUNG_UP` if nobody was there to be answered."""
        metrics, route = self._metrics, self.route(call.route)
        metrics.requests.add(route, call.model, str(status), _code(call, status))
        if call.error and call.error.budget:
            metrics.refusals.add(call.error.budget)
        if status >= 400:
            return
        metrics.request_seconds.observe(time.perf_counter() - call.started_s, route, call.model)
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


def _code(call: Call, status: int) -> str:
    if status == HUNG_UP:
        return "hung_up"
    if call.error:
        return call.error.code
    return "ok" if status < 400 else OTHER
