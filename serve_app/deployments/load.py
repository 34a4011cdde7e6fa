"""What a replica tells the autoscaler: how busy it is, how fast, and how much waits for it in the ingresses.

Each unit says what its ingress still holds; what one said long ago counts no more. `core/scaling.py` decides by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from serve_app.core.scaling import BUSY, QUEUED_TOKENS, TOKENS_PER_S
from serve_app.dispatch import Unit

HEARD_S = 10.0  # an ingress that sent nothing for so long has nothing that waits, or is gone


class _Stopwatch:
    """Seconds under way, summed over all that are at once; and in which any is."""

    def __init__(self, now_s: float) -> None:
        self.sum_s = self.any_s = 0.0
        self._running, self._at_s = 0, now_s

    def change(self, by: int, now_s: float) -> None:
        passed_s, self._at_s = now_s - self._at_s, now_s
        self.sum_s += passed_s * self._running
        self.any_s += passed_s * (self._running > 0)
        self._running += by


class Load:
    """One replica's. at_once: units that it computes, by lane."""

    def __init__(self, at_once: Mapping[bool, int], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._at_once = at_once
        self._clock = clock
        self._lanes = {lane: _Stopwatch(clock()) for lane in at_once}
        self._whole = _Stopwatch(clock())
        self._tokens = 0
        self._tokens_per_s = 0.0
        self._queues: dict[str, tuple[float, int]] = {}  # by ingress: when it told, and what
        self._reported_s = clock()

    def heard(self, unit: Unit) -> None:
        """A unit came: it tells what its ingress holds back."""
        self._queues[unit.ingress] = (self._clock(), unit.queued_tokens)

    @contextmanager
    def computing(self, lane: bool, tokens: int) -> Iterator[None]:
        """Around one batch."""
        self._change(lane, +1)
        try:
            yield
        finally:
            self._change(lane, -1)
            self._tokens += tokens

    def report(self) -> dict[str, float]:
        """Since the last report."""
        now_s = self._clock()
        passed_s, self._reported_s = now_s - self._reported_s, now_s
        for lane in self._lanes:
            self._change(lane, 0)
        if self._whole.any_s and self._tokens:
            self._tokens_per_s = self._tokens / self._whole.any_s
            self._tokens = 0
            self._whole.any_s = 0.0
        busy = max(watch.sum_s / self._at_once[lane] for lane, watch in self._lanes.items()) / max(passed_s, 1e-9)
        for watch in self._lanes.values():
            watch.sum_s = 0.0
        self._queues = {ingress: told for ingress, told in self._queues.items() if now_s - told[0] <= HEARD_S}
        return {
            BUSY: min(1.0, busy),
            QUEUED_TOKENS: float(sum(tokens for _, tokens in self._queues.values())),
            TOKENS_PER_S: self._tokens_per_s,
        }

    def _change(self, lane: bool, by: int) -> None:
        now_s = self._clock()
        self._lanes[lane].change(by, now_s)
        self._whole.change(by, now_s)
