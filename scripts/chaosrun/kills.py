"""Kills with SIGKILL, by the seed: which kind when, spread evenly over the calls, one after the other is back.

The calls are held back to match, so that each kill meets a service at work.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from chaosrun import ChaosError
from chaosrun.history import History
from chaosrun.installation import INGRESSES, Installation

WEIGHTS = {"ingress": 3, "idempotency": 3, "redis": 3, "encoder": 2, "usage": 2}
ONLY_IDEMPOTENCY = {"idempotency": 1}
PATIENCE_S = 15.0  # then the next kind has its turn, though this one is not back
GONE_S = 300.0  # a kind that is not back by then never will be
LOOK_S = 0.2
FIRST_CYCLE_S = 8.0  # from a kill to the next: until it was measured


class Redis(Protocol):
    def kill(self) -> None: ...
    def start(self) -> None: ...


@dataclass(slots=True)
class Kills:
    """Of the run, so far."""

    wanted: int
    by_kind: Counter[str] = field(default_factory=Counter)
    back_s: dict[str, list[float]] = field(default_factory=dict)
    cycle_s: float = FIRST_CYCLE_S

    @property
    def left(self) -> int:
        return self.wanted - self.by_kind.total()


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
        installation: Installation,
        redis: Redis | None,
        kills: Kills,
        history: History,
        *,
        weights: Mapping[str, int],
        calls: int,
        seed: int,
        look: Callable[[], None],
    ) -> None:
        """weights: how often which kind. look: called before each kill, while its victim still lives."""
        self._installation = installation
        self._redis = redis
        self._kills = kills
        self._history = history
        self._weights = weights
        self._calls = calls
        self._chance = random.Random(f"{seed}:kills")
        self._look = look
        self._coming_back: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until all are done and back."""
        kinds = [kind for kind in self._weights if kind != "redis" or self._redis]
        weights = [self._weights[kind] for kind in kinds]
        order = kinds[: self._kills.wanted]  # each at least once
        order += self._chance.choices(kinds, weights, k=self._kills.wanted - len(order))
        self._chance.shuffle(order)
        for number, kind in enumerate(order):
            place = (number + self._chance.random()) / (self._kills.wanted + 1)
            while self._history.begun < self._calls * place:  # noqa: ASYNC110 # calls need not know of kills
                await asyncio.sleep(0.02)
            await self._kill(kind)
        for coming_back in self._coming_back.values():
            await coming_back

    async def _kill(self, kind: str) -> None:
        if before := self._coming_back.get(kind):
            await before
        begun_s = time.monotonic()
        if kind == "redis":
            assert self._redis is not None
            await asyncio.to_thread(self._redis.kill)
            coming_back = self._redis_comes_back(self._redis)
        else:
            coming_back = self._comes_back(kind, await self._kill_replica(kind))
        self._kills.by_kind[kind] += 1
        task = self._coming_back[kind] = asyncio.create_task(coming_back)
        await asyncio.wait([task], timeout=PATIENCE_S)
        await asyncio.sleep(self._chance.uniform(0.1, 0.8))
        self._kills.cycle_s += (time.monotonic() - begun_s - self._kills.cycle_s) / 8

    async def _kill_replica(self, kind: str) -> int:
        """Its process id."""
        until_s = time.monotonic() + GONE_S
        while time.monotonic() < until_s:
            await asyncio.to_thread(self._look)
            victims = await asyncio.to_thread(self._installation.replicas, kind)
            if victims:
                victim = self._chance.choice(sorted(victims, key=lambda process: process.pid))
                victim.kill()
                return victim.pid
            await asyncio.sleep(LOOK_S)
        raise ChaosError(f"there was no {kind} replica to kill for {GONE_S:g} s")

    async def _comes_back(self, kind: str, pid: int) -> None:
        """As many run as before, and the killed one is not among them."""
        killed_s = time.monotonic()
        print(f"killed {kind} {pid}", file=sys.stderr, flush=True)
        wanted = INGRESSES if kind == "ingress" else 1
        while time.monotonic() < killed_s + GONE_S:
            await asyncio.sleep(LOOK_S)
            try:
                running = await asyncio.to_thread(self._installation.running, kind)
            except (OSError, ValueError, KeyError):
                continue
            if len(running - {pid}) >= wanted:
                self._is_back(kind, killed_s)
                return
        raise ChaosError(f"{kind} is not back {GONE_S:g} s after it was killed")

    async def _redis_comes_back(self, redis: Redis) -> None:
        killed_s = time.monotonic()
        await asyncio.to_thread(redis.start)
        self._is_back("redis", killed_s)

    def _is_back(self, kind: str, killed_s: float) -> None:
        after_s = time.monotonic() - killed_s
        self._kills.back_s.setdefault(kind, []).append(after_s)
        print(f"{kind} is back after {after_s:.1f} s", file=sys.stderr, flush=True)
