"""Which fault strikes when, by the seed: spread evenly over the calls, one after the other is over.

The calls are held back to match, so that each fault meets a service at work.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from chaosrun.faults import LOOK_S, Fault
from chaosrun.history import History

WEIGHTS = {
    "ingress": 3,
    "idempotency": 3,
    "redis": 3,
    "encoder": 2,
    "usage": 2,
    "haproxy": 1,
    "controller": 1,
    "node": 1,
}
FIRST_CYCLE_S = 8.0  # from a fault to the next: until it was measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    kind: str
    at_s: float  # on the monotonic clock


@dataclass(slots=True)
class Kills:
    """Of the run, so far."""

    wanted: int
    strikes: list[Strike] = field(default_factory=list)
    over_s: dict[str, list[float]] = field(default_factory=dict)
    """By kind: how long it took from the strike to its end."""
    cycle_s: float = FIRST_CYCLE_S

    @property
    def by_kind(self) -> Counter[str]:
        return Counter(strike.kind for strike in self.strikes)

    @property
    def left(self) -> int:
        return self.wanted - len(self.strikes)


def in_turn(kinds: Sequence[str], times: int) -> list[str]:
    """One of each, and again."""
    return [*kinds] * times


def at_random(faults: Mapping[str, Fault], kills: int, others: int, seed: int) -> list[str]:
    """So many of both, each kind at least once where there are enough."""
    chance = random.Random(f"{seed}:order")
    order: list[str] = []
    for deadly, count in ((True, kills), (False, others)):
        kinds = [kind for kind, fault in faults.items() if fault.kills is deadly]
        first = kinds[:count]
        weights = [WEIGHTS.get(kind, 1) for kind in kinds]
        order += first + chance.choices(kinds, weights, k=count - len(first))
    chance.shuffle(order)
    return order


class Pace:
    """Holds calls back, so that they last as long as the kills."""

    def __init__(self, calls: int, history: History, kills: Kills) -> None:
        self._calls = calls
        self._history = history
        self._kills = kills
        self._last_s = 0.0

    async def turn(self) -> None:
        while (early_s := self._last_s + self._interval_s() - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(early_s, LOOK_S))  # kills are done meanwhile, and the interval changes
        self._last_s = time.monotonic()

    def _interval_s(self) -> float:
        return self._kills.left * self._kills.cycle_s / max(1, self._calls - self._history.begun)


class Killer:
    def __init__(
        self,
        faults: Mapping[str, Fault],
        order: Sequence[str],
        kills: Kills,
        history: History,
        *,
        calls: int,
        seed: int,
        patience_s: float,
        look: Callable[[], None],
    ) -> None:
        """order: kinds. patience_s: then the next kind has its turn, though this one is not over.

        look: called before each strike, while its victim still lives.
        """
        self._faults = faults
        self._order = order
        self._kills = kills
        self._history = history
        self._calls = calls
        self._chance = random.Random(f"{seed}:kills")
        self._patience_s = patience_s
        self._look = look
        self._going_on: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until all are done and over."""
        for number, kind in enumerate(self._order):
            place = (number + self._chance.random()) / (len(self._order) + 1)
            while self._history.begun < self._calls * place:  # noqa: ASYNC110 # calls need not know of kills
                await asyncio.sleep(0.02)
            await self._strike(kind)
        for going_on in self._going_on.values():
            await going_on

    async def _strike(self, kind: str) -> None:
        if before := self._going_on.get(kind):
            await before
        begun_s = time.monotonic()
        await asyncio.to_thread(self._look)
        over = await self._faults[kind].strike(self._chance)
        strike = Strike(kind=kind, at_s=time.monotonic())
        self._kills.strikes.append(strike)
        print(f"{kind}: struck", file=sys.stderr, flush=True)
        task = self._going_on[kind] = asyncio.create_task(self._until_over(strike, over))
        await asyncio.wait([task], timeout=self._patience_s)
        await asyncio.sleep(self._chance.uniform(0.1, 0.8))
        self._kills.cycle_s += (time.monotonic() - begun_s - self._kills.cycle_s) / 8

    async def _until_over(self, strike: Strike, over: Awaitable[None]) -> None:
        await over
        after_s = time.monotonic() - strike.at_s
        self._kills.over_s.setdefault(strike.kind, []).append(after_s)
        print(f"{strike.kind}: over after {after_s:.1f} s", file=sys.stderr, flush=True)
