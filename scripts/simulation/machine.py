"""Simulated time, and what takes it: processes that do one thing after the other, on machines with so many cores.

Every burst of work runs once and to its end, in the order of its process; processes that share a machine take turns,
a burst each.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable

Then = Callable[[], None]


class Clock:
    """Seconds since the start; what happens at the same moment happens in the order it was asked for.

    spread: sigma of a burst's time around its mean, lognormal: equal bursts would march in step, which no machine does.
    """

    def __init__(self, *, spread: float = 0.0, seed: int = 0) -> None:
        self.now_s = 0.0
        self._spread, self._rng = spread, random.Random(f"bursts {seed}")
        self._due: list[tuple[float, int, Then]] = []
        self._numbers = itertools.count()

    def after(self, delay_s: float, then: Then) -> None:
        heapq.heappush(self._due, (self.now_s + delay_s, next(self._numbers), then))

    def varied(self, seconds: float) -> float:
        """What takes so long on average, this time."""
        return seconds * self._rng.lognormvariate(-(self._spread**2) / 2, self._spread) if self._spread else seconds

    def run(self) -> None:
        """Until nothing is due any more."""
        while self._due:
            self.now_s, _, then = heapq.heappop(self._due)
            then()


class Machine:
    """So many cores, which go to the processes that wait, in turn."""

    def __init__(self, cores: int = 1) -> None:
        self._free = cores
        self._waiting: deque[Process] = deque()

    def ask(self, process: Process) -> None:
        self._waiting.append(process)
        self._share()

    def give_back(self) -> None:
        self._free += 1
        self._share()

    def _share(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            self._waiting.popleft().run()


class Process:
    """One thread of execution. busy_s: what it has computed so far, the burst under way included."""

    def __init__(self, clock: Clock, machine: Machine | None = None) -> None:
        """machine: None for a core of its own."""
        self._clock = clock
        self._machine = machine or Machine()
        self._bursts: deque[tuple[float, Then]] = deque()
        self.busy_s = 0.0

    def do(self, seconds: float, then: Then) -> None:
        """Behind what it has to do already; `then` is called when it is done."""
        self._bursts.append((self._clock.varied(seconds), then))
        if len(self._bursts) == 1:
            self._machine.ask(self)

    def run(self) -> None:
        """The machine's to call: a core is free for the next burst."""
        seconds, _ = self._bursts[0]
        self.busy_s += seconds
        self._clock.after(seconds, self._done)

    def _done(self) -> None:
        _, then = self._bursts.popleft()
        if self._bursts:
            self._machine.ask(self)
        self._machine.give_back()
        then()
