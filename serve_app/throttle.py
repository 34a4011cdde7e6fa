"""How fast a key may ask: admits far from the limit without asking the store, and near it only what the store admits.

What was admitted without asking is reported within `REPORT_S`, and an ingress never holds back more than a sixteenth of
what may come at once: so at any moment all of them together have admitted at most that much each beyond the limit, and
in the long run nothing. `core/limits.py` has the rule; a store that is down leaves each ingress to its own count.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from serve_app.accounts import Caller
from serve_app.apart import apart
from serve_app.core import errors
from serve_app.core.errors import RateLimitExceeded
from serve_app.core.limits import FULL, NOTHING, Buckets, Budget, Charge, Cost, Limit, Verdict, decide
from serve_app.core.plans import Limits
from serve_app.gather import Gather
from serve_app.stores import Store, StoreDown

REPORT_S = 1.0
SLACK = 16  # the part of a burst that one ingress may have admitted unreported
NEAR = 2  # at half of a burst the store is asked first
KNOWN_US = 4_000_000  # what the store said is too old to go by after that, as a key is in `accounts.py`
ASK_S = 5.0  # a store that takes longer is as good as down
QUEUE_US = 12_000_000  # refused calls are told to come back in turn, up to so much later than the first could
HOLD_S = 1.0
MOST_HELD_OF_A_KEY, MOST_HELD = 256, 1024  # of the 4,096 requests that an ingress works on at once
MOST_KEYS = 10_000
BATCH = 256  # keys in one question to the store

ONE_REQUEST = Cost(requests=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the headers tell of a budget: how much a minute, how much right now, and seconds until it is full again."""

    limit: int
    remaining: int
    full_in_s: float


@dataclass(slots=True, kw_only=True)
class _Meter:
    """What this ingress knows of a key. told: the store's last word, and when it was asked for."""

    limit: Limit
    told: Buckets = FULL
    told_us: float | None = None
    unsent: Cost = NOTHING
    sent: Cost = NOTHING  # part of a question that is not answered yet
    promised_us: list[float] = field(default_factory=lambda: [0.0, 0.0])  # to refused calls: when the last may come
    held: int = 0  # refused calls that are not answered yet

    def buckets(self, now_us: float) -> Buckets:
        """As far as this ingress knows: others may have taken more, but never less."""
        passed_us = now_us - (self.told_us or 0.0)
        told = Buckets(*(max(0.0, left_us - passed_us) for left_us in self.told))
        return self.limit.taken(told, self.unsent.plus(self.sent))

    def floods(self, now_us: float) -> bool:
        """Whether more calls were refused than can be told a time of their own."""
        return max(self.promised_us) >= now_us + QUEUE_US

    def may_decide_alone(self, now_us: float, cost: Cost, after: Buckets) -> bool:
        """Whether the limit is far, whatever the other ingresses have not reported yet."""
        if self.told_us is None or now_us - self.told_us > KNOWN_US:
            return False
        held_back = self.unsent.plus(self.sent).plus(cost)
        return _is_far(self.limit.requests, held_back.requests, after.requests_us) and (
            self.limit.tokens is None or _is_far(self.limit.tokens, held_back.tokens, after.tokens_us)
        )


def _is_far(budget: Budget, held_back: int, left_us: float) -> bool:
    return held_back <= budget.at_once // SLACK and left_us <= budget.at_once * budget.each_us / NEAR


class Throttle:
    """The budgets of the keys that call at this ingress."""

    def __init__(
        self,
        store: Store,
        limits: Limits,
        *,
        now_us: Callable[[], float] | None = None,
        report_s: float = REPORT_S,
        hold_s: float = HOLD_S,
    ) -> None:
        self._limits = limits
        self._now_us = now_us or _monotonic_us
        self._report_s = report_s
        self._hold_s = hold_s
        self._held = 0
        self._ask: Gather[Charge, Verdict] = Gather(store.charge, max_items=BATCH)
        self._meters: OrderedDict[str, _Meter] = OrderedDict()
        self._reporting: asyncio.Task[None] | None = None
        self._closed = False

    def change(self, limits: Limits) -> None:
        """What a key has used stays used."""
        self._limits = limits

    async def admit(self, caller: Caller) -> None:
        """Take one request of the key's budget. Raises RateLimitExceeded."""
        await self._take(caller, ONE_REQUEST)

    async def spend(self, caller: Caller, tokens: int) -> None:
        """Take so many tokens for a request that was admitted. Raises RateLimitExceeded, and gives the request back."""
        meter = self._meter(caller)
        if meter.limit.tokens is None:
            return
        try:
            await self._take(caller, Cost(tokens=tokens))
        except RateLimitExceeded:
            self._owe(meter, Cost(requests=-1))
            raise

    async def look(self, caller: Caller) -> None:
        """Take nothing, but learn how the budget stands."""
        await self._ask_store(caller.key.id, self._meter(caller), NOTHING)

    def standing(self, caller: Caller) -> tuple[Standing, Standing | None]:
        """Of requests, and of tokens if they are limited: as far as this ingress knows."""
        meter = self._meter(caller)
        left, limit = meter.buckets(self._now_us()), meter.limit
        tokens = None if limit.tokens is None else _standing(limit.tokens, left.tokens_us)
        return _standing(limit.requests, left.requests_us), tokens

    async def report(self) -> None:
        """Tell the store what was admitted without asking it."""
        owing = [(key, meter) for key, meter in self._meters.items() if any(meter.unsent)]
        await asyncio.gather(*(self._ask_store(key, meter, NOTHING) for key, meter in owing))

    async def close(self) -> None:
        """Report what is left."""
        self._closed = True
        if self._reporting is not None:
            self._reporting.cancel()
        await self.report()

    async def _take(self, caller: Caller, cost: Cost) -> None:
        meter = self._meter(caller)
        verdict = await self._decide(caller.key.id, meter, cost)
        if not verdict.admitted:
            decided_us = self._now_us()
            await self._hold(meter)
            raise self._refusal(meter, cost, verdict, decided_us)

    async def _decide(self, key: str, meter: _Meter, cost: Cost) -> Verdict:
        now_us = self._now_us()
        alone = decide(meter.buckets(now_us), Charge(key=key, limit=meter.limit, cost=cost))
        if alone.admitted and not meter.may_decide_alone(now_us, cost, alone.buckets):
            return await self._ask_store(key, meter, cost)
        if alone.admitted:
            self._owe(meter, cost)
        return alone  # what is refused here, the store would refuse, too

    async def _hold(self, meter: _Meter) -> None:
        """Who goes on asking, though told to wait, is answered slowly: refusals, too, cost the others time."""
        if not self._hold_s or not meter.floods(self._now_us()):
            return
        if meter.held >= MOST_HELD_OF_A_KEY or self._held >= MOST_HELD:
            return
        meter.held, self._held = meter.held + 1, self._held + 1
        try:
            await asyncio.sleep(self._hold_s)
        finally:
            meter.held, self._held = meter.held - 1, self._held - 1

    async def _ask_store(self, key: str, meter: _Meter, cost: Cost) -> Verdict:
        owed, asked_us = meter.unsent, self._now_us()
        meter.unsent, meter.sent = NOTHING, meter.sent.plus(owed)
        try:
            async with asyncio.timeout(ASK_S):
                verdict = await self._ask(Charge(key=key, limit=meter.limit, cost=cost, owed=owed))
        except (StoreDown, TimeoutError):
            meter.sent, meter.unsent = meter.sent.minus(owed), meter.unsent.plus(owed)
            verdict = decide(meter.buckets(self._now_us()), Charge(key=key, limit=meter.limit, cost=cost))
            self._owe(meter, cost if verdict.admitted else NOTHING)
            return verdict
        except BaseException:  # nobody waits any more; whether the store took it, nobody knows
            meter.sent, meter.unsent = meter.sent.minus(owed), meter.unsent.plus(owed)
            raise
        meter.sent = meter.sent.minus(owed)
        meter.told, meter.told_us = verdict.buckets, asked_us
        return verdict

    def _owe(self, meter: _Meter, cost: Cost) -> None:
        meter.unsent = meter.unsent.plus(cost)
        if any(meter.unsent) and self._reporting is None and not self._closed:
            self._reporting = apart(self._report_later())

    async def _report_later(self) -> None:
        try:
            await asyncio.sleep(self._report_s)
        finally:
            self._reporting = None
        await self.report()

    def _refusal(self, meter: _Meter, cost: Cost, verdict: Verdict, decided_us: float) -> RateLimitExceeded:
        """Those that are refused together are told different times, in turn: else they would come back together."""
        which = max((0, 1), key=lambda bucket: verdict.wait[bucket])
        now_us = self._now_us()
        wait_us = max(0.0, verdict.wait[which] - (now_us - decided_us))
        budget = meter.limit.requests if which == 0 or meter.limit.tokens is None else meter.limit.tokens
        turn_us = min(max(now_us + wait_us, meter.promised_us[which]), now_us + wait_us + QUEUE_US)
        meter.promised_us[which] = turn_us + min(cost[which], budget.at_once) * budget.each_us
        what: errors.Budget = "requests" if which == 0 else "tokens"
        return RateLimitExceeded(
            f"This key may send {budget.per_minute:,} {what} a minute, {budget.at_once:,} of them at once.",
            budget=what,
            retry_after_s=(turn_us - now_us) / 1e6,
        )

    def _meter(self, caller: Caller) -> _Meter:
        plan, key = caller.workspace.plan, caller.key
        tokens = self._limits.tokens_per_minute(plan, key)
        limit = Limit(
            requests=Budget(per_minute=self._limits.requests_per_minute(plan, key)),
            tokens=None if tokens is None else Budget(per_minute=tokens),
        )
        meter = self._meters.get(key.id)
        if meter is None:
            meter = self._meters[key.id] = _Meter(limit=limit)
            if len(self._meters) > MOST_KEYS:
                self._meters.popitem(last=False)  # so long unused that it has nothing to report
        self._meters.move_to_end(key.id)
        meter.limit = limit
        return meter


def _standing(budget: Budget, left_us: float) -> Standing:
    return Standing(limit=budget.per_minute, remaining=budget.remaining(left_us), full_in_s=left_us / 1e6)


def _monotonic_us() -> float:
    return time.monotonic_ns() / 1000
