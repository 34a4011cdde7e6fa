"""Simulated arrivals at several ingresses that share a store, beside one bucket that sees all of them.

Time is simulated, so ten minutes take seconds; the store may be any. `scripts/prove limits` runs it at full size.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.accounts import Caller
from serve_app.core.errors import RateLimitExceeded
from serve_app.core.keys import ApiKey, Plan, Workspace
from serve_app.core.limits import FULL, Buckets, Budget, Charge, Cost, Limit, Verdict, decide
from serve_app.core.plans import Limits, PlanLimits
from serve_app.stores import Store
from serve_app.throttle import REPORT_S, SLACK, Throttle
from tests.stores.steps import Clock

NEVER_S = 1e9


def caller(plan: Plan = Plan.PRO, **key: Any) -> Caller:
    workspace = Workspace(id="ws", name="test", plan=plan, created_ms=0)
    return Caller(
        workspace=workspace, key=ApiKey(id="key", workspace="ws", name="test", digest="", created_ms=0, **key)
    )


class CountedStore:
    """Counts questions; answers them itself unless it has a store to ask."""

    def __init__(self, clock: Clock, store: Store | None = None) -> None:
        self.questions = 0
        self.asked = asyncio.Event()
        self._clock = clock
        self._store = store
        self._full_us: dict[str, tuple[float, float]] = {}

    async def charge(self, charges: Sequence[Charge]) -> list[Verdict]:
        self.questions += 1
        self.asked.set()
        if self._store is not None:
            return await self._store.charge(charges)
        return [self._decide(charge) for charge in charges]

    def _decide(self, charge: Charge) -> Verdict:
        now_us = 1000 * self._clock()
        requests_us, tokens_us = self._full_us.get(charge.key, (0.0, 0.0))
        left = FULL._replace(requests_us=max(0.0, requests_us - now_us), tokens_us=max(0.0, tokens_us - now_us))
        verdict = decide(left, charge)
        self._full_us[charge.key] = (now_us + verdict.buckets.requests_us, now_us + verdict.buckets.tokens_us)
        return verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """ideal: what one bucket that saw every arrival would have admitted. beyond: at worst, more than the burst."""

    offered: int
    admitted: int
    ideal: int
    beyond: float
    bound: int
    questions: int


async def arrive(
    clock: Clock, *, store: Store | None, replicas: int, per_minute: int, load: float, minutes: float, seed: int
) -> Figures:
    """Poisson arrivals at `load` times the limit, each at a replica drawn by chance."""
    chance, counted = random.Random(seed), CountedStore(clock, store)
    limits = Limits(plans={plan: PlanLimits(requests_per_minute=per_minute) for plan in Plan if plan.has_keys})
    throttles = [
        Throttle(counted, limits, now_us=lambda: 1000.0 * clock(), report_s=NEVER_S, hold_s=0.0)  # type: ignore[arg-type]
        for _ in range(replicas)
    ]
    who, limit = caller(), Limit(requests=Budget(per_minute=per_minute))
    one, ideal_us, real_us, beyond, offered, admitted, ideal = Cost(requests=1), FULL, FULL, 0.0, 0, 0, 0
    start_ms, at_s, reported_ms = clock(), 0.0, clock()
    while (at_s := at_s + chance.expovariate(load * per_minute / 60)) < 60 * minutes:
        arrival_ms = start_ms + int(1000 * at_s)
        while reported_ms + 1000 * REPORT_S <= arrival_ms:
            reported_ms += int(1000 * REPORT_S)
            passed_us = 1000.0 * (reported_ms - clock())
            ideal_us, real_us = _later(ideal_us.requests_us, passed_us), _later(real_us.requests_us, passed_us)
            clock.tick(reported_ms - clock())
            for throttle in throttles:
                await throttle.report()
        passed_us = 1000.0 * (arrival_ms - clock())
        ideal_us, real_us = _later(ideal_us.requests_us, passed_us), _later(real_us.requests_us, passed_us)
        clock.tick(arrival_ms - clock())
        offered += 1
        verdict = decide(ideal_us, Charge(key="", limit=limit, cost=one))
        ideal_us, ideal = verdict.buckets, ideal + verdict.admitted
        try:
            await chance.choice(throttles).admit(who)
        except RateLimitExceeded:
            continue
        admitted += 1
        real_us = limit.taken(real_us, one)
        beyond = max(beyond, real_us.requests_us / limit.requests.each_us - limit.requests.at_once)
    for throttle in throttles:
        await throttle.close()
    bound = replicas * (limit.requests.at_once // SLACK)
    return Figures(
        offered=offered, admitted=admitted, ideal=ideal, beyond=beyond, bound=bound, questions=counted.questions
    )


def _later(left_us: float, passed_us: float) -> Buckets:
    return FULL._replace(requests_us=max(0.0, left_us - passed_us))
