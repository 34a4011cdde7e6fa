"""How many replicas a model should have, from what its replicas measure: tokens that wait, and how busy they are.

As many as keep the work that arrives within `target_busy`, and besides as many as empty the queue in `target_queue_s`.
`deployments/load.py` measures it; Serve asks here for each model, and adds delays and bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

# What a replica reports, by these names.
BUSY = "busy"  # of its lanes the one that computed most: 0 to 1
QUEUED_TOKENS = "queued_tokens"  # that wait for the model, in all ingresses that sent it a unit lately
TOKENS_PER_S = "tokens_per_s"  # of its own, while it computes


class Measured(Protocol):
    """What is used of Serve's AutoscalingContext."""

    @property
    def current_num_replicas(self) -> int: ...

    @property
    def target_num_replicas(self) -> int: ...

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """Metric -> replica -> its mean over the look-back period."""
        ...


class ByTokens:
    """An autoscaling policy of Serve, by tokens: a call may hold one of them or thousands.

    Serve pickles it by value into its controller, which is why this module imports nothing of the service's.
    """

    def __init__(self, *, target_busy: float, target_queue_s: float) -> None:
        self._target_busy = target_busy
        self._target_queue_s = target_queue_s

    def __call__(self, measured: Measured) -> tuple[float, dict[str, Any]]:
        """(replicas, nothing to remember). Without a measurement nothing changes: a new replica has not reported."""
        metrics = measured.aggregated_metrics or {}
        busy = metrics.get(BUSY)
        if not busy:
            return measured.target_num_replicas, {}
        for_arrivals = measured.current_num_replicas * _mean(busy) / self._target_busy
        # Each replica heard of all queues, at other moments. One that has computed nothing yet knows no rate.
        queued, rates = _mean(metrics[QUEUED_TOKENS]), {r: rate for r, rate in metrics[TOKENS_PER_S].items() if rate}
        for_the_queue = queued / _mean(rates) / self._target_queue_s if rates else 0.0
        return for_arrivals + for_the_queue, {}


def _mean(by_replica: Mapping[Any, float]) -> float:
    return sum(by_replica.values()) / len(by_replica)
