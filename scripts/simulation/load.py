"""Who asks what, and when: requests drawn from a seed, at random moments with bursts, or each behind an answer.

The same seed gives the same requests at the same moments.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

BURST_PART = 0.1  # of the time
BURST_S = 0.1  # a burst's mean length
SPREAD = 0.5  # sigma of a long text's length, lognormal


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What requests are: some a short query each, the others so many texts. Lengths in tokens."""

    short_part: float = 0.5
    short_tokens: int = 14
    texts: int = 16
    text_tokens: int = 120
    workspaces: int = 100
    keyed_part: float = 0.1
    """Of the requests, those with an Idempotency-Key."""

    @property
    def tokens(self) -> float:
        """Of a request, on average."""
        return self.short_part * self.short_tokens + (1 - self.short_part) * self.texts * self.text_tokens

    @property
    def vectors(self) -> float:
        """Of a request, on average."""
        return self.short_part + (1 - self.short_part) * self.texts

    def request(self, rng: random.Random) -> tuple[list[int], str]:
        """Tokens of each text, and whose request it is."""
        workspace = f"ws_{rng.randrange(self.workspaces)}"
        if rng.random() < self.short_part:
            return [max(3, round(rng.uniform(0.5, 1.5) * self.short_tokens))], workspace
        median = math.log(self.text_tokens) - SPREAD**2 / 2  # so that text_tokens is the mean
        return [max(3, round(rng.lognormvariate(median, SPREAD))) for _ in range(self.texts)], workspace


def arrivals(rng: random.Random, per_s: float, *, burst: float) -> Iterator[float]:
    """Moments in seconds, without end: a Poisson process, for a tenth of the time `burst` times its mean rate."""
    if not 1 <= burst < 1 / BURST_PART:
        raise ValueError(f"a burst is 1 to {1 / BURST_PART:g} times the mean rate, not {burst:g}")
    rates = {True: burst * per_s, False: per_s * (1 - burst * BURST_PART) / (1 - BURST_PART)}
    means = {True: BURST_S, False: BURST_S * (1 - BURST_PART) / BURST_PART}
    now_s, high = 0.0, False
    while True:
        until_s = now_s + rng.expovariate(1 / means[high])
        while (now_s := now_s + rng.expovariate(rates[high])) < until_s:
            yield now_s
        now_s, high = until_s, not high
