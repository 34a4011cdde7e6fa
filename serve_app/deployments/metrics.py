"""Hands the sums of `core/metrics.py` to Ray, once a second; Prometheus asks the agent that Ray has on each node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ray.util.metrics import Counter, Gauge

from serve_app.core.metrics import Metrics, Series

FLUSH_S = 1.0  # Ray's own way to the node's agent takes up to ten

logger = logging.getLogger(__name__)


class Exporter:
    def __init__(self, metrics: Metrics, measure: Callable[[], None]) -> None:
        """measure: puts into the metrics what is not counted as it happens. It is called before each flush."""
        self._metrics = metrics.all()
        self._measure = measure
        self._by_series: dict[Series, Counter | Gauge] = {
            series: (Counter if series.adds else Gauge)(series.name, series.help, tag_keys=series.labels)
            for metric in self._metrics
            for series in metric.series
        }

    async def run(self) -> None:
        """Until it is cancelled; then once more."""
        try:
            while True:
                await asyncio.sleep(FLUSH_S)
                try:
                    self.flush()
                except Exception as error:  # nobody is served worse for it
                    logger.warning("metrics cannot be told now: %s", type(error).__name__)
        finally:
            self.flush()

    def flush(self) -> None:
        self._measure()
        for metric in self._metrics:
            for series, labels, value in metric.take():
                told, tags = self._by_series[series], dict(zip(series.labels, labels, strict=True))
                if isinstance(told, Counter):
                    told.inc(value, tags)
                else:
                    told.set(value, tags)
