"""Rate limits: a leaky bucket of requests and one of tokens for each key, decided together or not at all.

GCRA: all that is known of a bucket is when it will be full again, so nothing has to be refilled. The stores keep the
buckets and decide as `decide` says; `throttle.py` decides what needs no store.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

MINUTE_US = 60_000_000
AT_ONCE = 10  # the part of a minute's budget that may come at once: 50 of 500
NOW_US = 1.0  # less than this is rounding: Unix microseconds in a float are good to a quarter of one


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """So many in a minute, and of those `at_once` without a pause."""

    per_minute: int

    @property
    def at_once(self) -> int:
        return max(1, self.per_minute // AT_ONCE)

    @property
    def each_us(self) -> float:
        """How long one takes to come back."""
        return MINUTE_US / self.per_minute

    def wait_us(self, left_us: float, cost: int) -> float:
        """How long until so much may be taken from a bucket that is full again in `left_us`; 0: now.

        What is more than the bucket holds goes once it is full, and leaves it owing. A bucket that owes gives nothing.
        """
        wait_us = max(0.0, left_us) + (min(cost, self.at_once) - self.at_once) * self.each_us
        return wait_us if wait_us >= NOW_US else 0.0

    def taken(self, left_us: float, cost: int) -> float:
        """When it is full again once so much is taken (or, below 0, given back), in microseconds from now."""
        return max(0.0, max(0.0, left_us) + cost * self.each_us)

    def remaining(self, left_us: float) -> int:
        """How much may be taken right now."""
        return min(self.at_once, max(0, math.floor(self.at_once - (left_us - NOW_US) / self.each_us)))


class Cost(NamedTuple):
    """What a request takes; negative: what it gives back."""

    requests: int = 0
    tokens: int = 0

    def plus(self, other: Cost) -> Cost:
        return Cost(self.requests + other.requests, self.tokens + other.tokens)

    def minus(self, other: Cost) -> Cost:
        return Cost(self.requests - other.requests, self.tokens - other.tokens)


class Buckets(NamedTuple):
    """Microseconds until each is full again."""

    requests_us: float = 0.0
    tokens_us: float = 0.0


FULL = Buckets()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Of one key. tokens: None if they are not limited."""

    requests: Budget
    tokens: Budget | None = None

    def taken(self, buckets: Buckets, cost: Cost) -> Buckets:
        tokens_us = buckets.tokens_us
        if self.tokens is not None:
            tokens_us = self.tokens.taken(tokens_us, cost.tokens)
        return Buckets(self.requests.taken(buckets.requests_us, cost.requests), tokens_us)

    def wait(self, buckets: Buckets, cost: Cost) -> Buckets:
        """What each bucket makes this cost wait for."""
        tokens_us = 0.0 if self.tokens is None else self.tokens.wait_us(buckets.tokens_us, cost.tokens)
        return Buckets(self.requests.wait_us(buckets.requests_us, cost.requests), tokens_us)


NOTHING = Cost()


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """A question to a store. owed: what was admitted without asking, and is taken whatever the buckets hold."""

    key: str
    limit: Limit
    cost: Cost
    owed: Cost = NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """wait: until the cost fits, bucket by bucket; both 0: it was taken, else none of it. buckets: afterwards."""

    wait: Buckets
    buckets: Buckets

    @property
    def admitted(self) -> bool:
        return not any(self.wait)


def decide(buckets: Buckets, charge: Charge) -> Verdict:
    """Take the whole cost or nothing of it. What is owed is taken first."""
    limit = charge.limit
    buckets = limit.taken(buckets, charge.owed)
    wait = limit.wait(buckets, charge.cost)
    return Verdict(wait=wait, buckets=buckets if any(wait) else limit.taken(buckets, charge.cost))
