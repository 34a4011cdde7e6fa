"""Every metric: its name with its unit, its labels, what it tells; and the plain sums that a process keeps of it.

A label has few values: models, routes, codes, never a workspace, a key or a text. `deployments/metrics.py` hands the
sums to Ray, once a second, since a call of Ray's for each request would cost more than all of this.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import NamedTuple

Labels = tuple[str, ...]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
POWERS = tuple(float(2**power) for power in range(12))


def lane_name(express: bool) -> str:
    """A lane, as a label."""
    return "express" if express else "bulk"


class Series(NamedTuple):
    """What Prometheus stores under one name. adds: values are increments, else they replace what was there."""

    name: str
    help: str
    labels: Labels
    adds: bool


class Counter:
    def __init__(self, name: str, help: str, *labels: str) -> None:
        self.series = (Series(name, help, labels, adds=True),)
        self._sums: dict[Labels, float] = {}

    def add(self, *labels: str, by: float = 1) -> None:
        self._sums[labels] = self._sums.get(labels, 0) + by

    def take(self) -> Iterator[tuple[Series, Labels, float]]:
        """What came since the last time."""
        sums, self._sums = self._sums, {}
        return ((self.series[0], labels, value) for labels, value in sums.items() if value > 0)


class Gauge:
    def __init__(self, name: str, help: str, *labels: str) -> None:
        self.series = (Series(name, help, labels, adds=False),)
        self._values: dict[Labels, float] = {}

    def show(self, values: Mapping[Labels, float]) -> None:
        """All that there is of it now; what was there before and is not any more is 0."""
        self._values = dict.fromkeys(self._values, 0.0) | dict(values)

    def take(self) -> Iterator[tuple[Series, Labels, float]]:
        return ((self.series[0], labels, value) for labels, value in self._values.items())


class Histogram:
    """Three counters: `_bucket` with a label `le`, `_sum` and `_count`, as a histogram of Prometheus has them.

    Not one of Ray's: those take one value at a time, and the node's agent takes each again (27 us), at the middle of
    its bucket, so that their sum is a guess.
    """

    def __init__(self, name: str, help: str, *labels: str, bounds: tuple[float, ...] = SECONDS) -> None:
        self.series = (
            Series(f"{name}_bucket", f"{help} By upper bound.", (*labels, "le"), adds=True),
            Series(f"{name}_sum", f"{help} The sum.", labels, adds=True),
            Series(f"{name}_count", f"{help} How many.", labels, adds=True),
        )
        self._bounds = bounds
        self._names = (*(f"{bound:g}" for bound in bounds), "+Inf")
        self._rows: dict[Labels, list[float]] = {}  # a place for each bucket, and the sum

    def observe(self, value: float, *labels: str) -> None:
        row = self._rows.get(labels)
        if row is None:
            row = self._rows[labels] = [0] * (len(self._names) + 1)
        row[bisect_left(self._bounds, value)] += 1
        row[-1] += value

    def take(self) -> Iterator[tuple[Series, Labels, float]]:
        """What came since the last time; buckets hold those below them, too."""
        rows, self._rows = self._rows, {}
        bucket, total, count = self.series
        for labels, row in rows.items():
            below = 0.0
            for name, more in zip(self._names, row, strict=False):
                below += more
                if below:
                    yield bucket, (*labels, name), below
            yield count, labels, below
            if row[-1] > 0:
                yield total, labels, row[-1]


Metric = Counter | Gauge | Histogram


class Metrics:
    """The metrics of one kind of process."""

    def all(self) -> list[Metric]:
        return [*vars(self).values()]


class IngressMetrics(Metrics):
    def __init__(self) -> None:
        self.requests = Counter(
            "serve_app_requests",
            "Requests, by how they were answered: code is ok, or the error's.",
            "route",
            "model",
            "status",
            "code",
        )
        self.request_seconds = Histogram(
            "serve_app_request_seconds",
            "Successes: from the request's head to the end of its answer.",
            "route",
            "model",
        )
        self.tokens = Counter("serve_app_tokens", "Tokens of requests that were computed.", "route", "model")
        self.queue_seconds = Histogram(
            "serve_app_queue_seconds", "What a request waited, its longest batch apart.", "model", "lane"
        )
        self.compute_seconds = Histogram("serve_app_compute_seconds", "A request's longest batch.", "model", "lane")
        self.settle_seconds = Histogram(
            "serve_app_settle_seconds", "Until a bill, or a reply with its bill, was durable.", "write"
        )
        self.refusals = Counter(
            "serve_app_refusals", "Requests refused for a budget: requests, tokens, replays, spend.", "budget"
        )
        self.claims = Counter("serve_app_claims", "Calls with an Idempotency-Key, by what became of them.", "outcome")
        self.texts = Counter("serve_app_texts", "Texts: encoded, cached, or duplicate.", "model", "answered")
        self.cache_bytes = Gauge("serve_app_cache_bytes", "Memory of an ingress that cached vectors take.", "model")
        self.pending_tokens = Gauge(
            "serve_app_pending_tokens", "Tokens that wait in an ingress for a place in a unit.", "model", "lane"
        )


class EncoderMetrics(Metrics):
    def __init__(self) -> None:
        self.batch_seconds = Histogram("serve_app_batch_seconds", "A batch's forward pass.", "model", "lane")
        self.batch_fill_ratio = Histogram(
            "serve_app_batch_fill_ratio", "Tokens of a batch to those that it may have.", "model", "lane", bounds=RATIOS
        )
        self.batch_texts = Histogram("serve_app_batch_texts", "Texts of a batch.", "model", "lane", bounds=POWERS)
        self.computed_tokens = Counter(
            "serve_app_computed_tokens", "Tokens that were computed, with what was padded.", "model", "lane"
        )
        self.padding_saved_tokens = Counter(
            "serve_app_padding_saved_tokens",
            "What would be more, were a batch padded to its longest text.",
            "model",
            "lane",
        )
        self.gpu_memory_allocated_bytes = Gauge(
            "serve_app_gpu_memory_allocated_bytes", "Of a replica's GPU: what its tensors take.", "model"
        )
        self.gpu_memory_reserved_bytes = Gauge(
            "serve_app_gpu_memory_reserved_bytes", "Of a replica's GPU: what PyTorch holds.", "model"
        )


class UsageMetrics(Metrics):
    def __init__(self) -> None:
        self.sink_lag_events = Gauge("serve_app_sink_lag_events", "Events that a sink has not acknowledged.", "sink")
        self.sink_lag_seconds = Gauge(
            "serve_app_sink_lag_seconds", "Since a sink last took what there was to take.", "sink"
        )
        self.ledger_difference_events = Gauge(
            "serve_app_ledger_difference_events",
            "Events that usage sums count and the ledger does not; less than 0: fewer.",
        )
