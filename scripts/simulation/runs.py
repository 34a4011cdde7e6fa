"""A slice under load, and what came of it: requests that come by themselves, or each behind an answer.

Every request that comes is answered before a run ends; what is measured is what came after the first tenth.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from serve_app.core.packing import Share
from simulation.constants import Constants
from simulation.load import Mix, arrivals
from simulation.machine import Clock, Machine, Process, Then
from simulation.slice import Flight, Ingress, Replica, Shape

WARM = 0.1  # of a run
GROWS = 1.4  # times the wait in the third before
TICK_S = 0.01  # how often what is idle otherwise takes its part of a core


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Over the measured part of a run. Times in seconds, of requests; use: the part of the time something was busy."""

    seconds: float
    arrived: int
    answered: list[int]
    """Times each request was, over the whole run."""
    latencies_s: list[float]
    waits_s: list[float]
    """From tokenized to the forward of the last unit."""
    in_flight: float
    """Requests, on average over time."""
    calls: float
    """Of Ray, per request."""
    texts: float
    """In a call."""
    batch_tokens: float
    fill: float
    """Of a batch: its tokens, to the most that a unit may have."""
    ingress_use: float
    tokenizer_use: float
    replica_use: float
    device_use: float
    most_units: int
    """Under way at a replica at once."""

    @property
    def per_s(self) -> float:
        return self.arrived / self.seconds

    @property
    def settles(self) -> bool:
        """Whether waits stop growing; else the load is too much, and they are those of a run so short."""
        third = len(self.waits_s) // 3
        return not third or percentile(self.waits_s[-third:], 50) < GROWS * percentile(self.waits_s[third:-third], 50)


def percentile(values: list[float], percent: float) -> float:
    """Of at least one value."""
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def open_loop(
    shape: Shape, mix: Mix, costs: Constants, *, per_s: float, burst: float, seconds: float, seed: int
) -> Outcome:
    """Requests that come to a random ingress, whatever is answered."""
    bench = _Bench(shape, mix, costs, seconds, seed)
    moments = arrivals(random.Random(f"moments {seed}"), per_s, burst=burst)
    bench.come(itertools.takewhile(lambda moment: moment < seconds, moments))
    return bench.run()


def closed_loop(shape: Shape, mix: Mix, costs: Constants, *, in_flight: int, seconds: float, seed: int) -> Outcome:
    """So many clients, each with its next request once it has an answer, on the same cores as the service."""
    bench = _Bench(shape, mix, costs, seconds, seed)
    bench.ask_on(in_flight)
    return bench.run()


class _Bench:
    def __init__(self, shape: Shape, mix: Mix, costs: Constants, seconds: float, seed: int) -> None:
        self._shape, self._mix, self._costs, self._seconds = shape, mix, costs, seconds
        self._clock = Clock(spread=costs.spread, seed=seed)
        self._rng = random.Random(f"requests {seed}")
        shared = Machine(shape.cores) if shape.cores else None
        self._gpus = [Process(self._clock) for _ in range(-(-shape.replicas // shape.per_gpu))]
        self._replicas = [
            Replica(self._clock, shape, costs, self._gpus[number // shape.per_gpu], shared)
            for number in range(shape.replicas)
        ]
        self._ingresses = [
            Ingress(self._clock, shape, costs, self._replicas, seed * 1000 + number, shared)
            for number in range(shape.ingresses)
        ]
        self._client, self._proxy = Process(self._clock, shared), Process(self._clock, shared)
        self._idle = Process(self._clock, shared)
        self._answered: list[int] = []
        self._flights: list[Flight] = []
        self._ended_s: list[float] = []
        self._before = self._after = self._count()

    def come(self, moments: Iterator[float]) -> None:
        def next_one() -> None:
            if (moment := next(moments, None)) is not None:
                self._clock.after(moment - self._clock.now_s, came)

        def came() -> None:
            self._ask(lambda: None)
            next_one()

        next_one()

    def ask_on(self, in_flight: int) -> None:
        def again() -> None:
            if self._clock.now_s < self._seconds:
                self._client.do(self._costs.client_ms / 1000, lambda: self._ask(again))

        def tick() -> None:
            self._idle.do(self._costs.idle_cores * TICK_S, lambda: None)
            if self._clock.now_s < self._seconds:
                self._clock.after(TICK_S, tick)

        tick()
        for _ in range(in_flight):
            again()

    def run(self) -> Outcome:
        self._clock.after(WARM * self._seconds, lambda: setattr(self, "_before", self._count()))
        self._clock.after(self._seconds, lambda: setattr(self, "_after", self._count()))
        self._clock.run()
        return self._outcome()

    def _ask(self, then: Then) -> None:
        number = len(self._flights)
        lengths, workspace = self._mix.request(self._rng)

        def answered() -> None:
            self._answered[number] += 1
            self._ended_s[number] = self._clock.now_s
            then()

        flight = Flight(lengths=lengths, share=Share(workspace=workspace), came_s=self._clock.now_s, answered=answered)
        self._flights.append(flight)
        self._answered.append(0)
        self._ended_s.append(0.0)
        ingress = self._rng.choice(self._ingresses)
        self._proxy.do(self._costs.haproxy_ms / 1000 if self._shape.cores else 0.0, lambda: ingress.take(flight))

    def _count(self) -> dict[str, float]:
        replicas, ingresses = self._replicas, self._ingresses
        return {
            "ingress": sum(it.loop.busy_s for it in ingresses) / len(ingresses),
            "tokenizer": sum(it.tokenizer.busy_s for it in ingresses) / len(ingresses),
            "replica": sum(it.loop.busy_s for it in replicas) / len(replicas),
            "device": sum(it.busy_s for it in self._gpus) / len(self._gpus),
            "calls": sum(it.calls for it in ingresses),
            "texts": sum(it.texts for it in ingresses),
            "batches": sum(it.batches for it in replicas),
            "tokens": sum(it.tokens for it in replicas),
        }

    def _outcome(self) -> Outcome:
        start_s, end_s = WARM * self._seconds, self._seconds
        seconds = end_s - start_s
        measured = [number for number, it in enumerate(self._flights) if start_s <= it.came_s < end_s]
        spans = zip((it.came_s for it in self._flights), self._ended_s, strict=True)
        inside_s = sum(max(0.0, min(ended, end_s) - max(came, start_s)) for came, ended in spans)
        done = {name: self._after[name] - self._before[name] for name in self._after}
        batch_tokens = done["tokens"] / max(1, done["batches"])
        return Outcome(
            seconds=seconds,
            arrived=len(measured),
            answered=self._answered,
            latencies_s=[self._ended_s[number] - self._flights[number].came_s for number in measured],
            waits_s=[self._flights[number].started_s - self._flights[number].queued_s for number in measured],
            in_flight=inside_s / seconds,
            calls=done["calls"] / max(1, len(measured)),
            texts=done["texts"] / max(1, done["calls"]),
            batch_tokens=batch_tokens,
            fill=batch_tokens / self._shape.unit_tokens,
            ingress_use=done["ingress"] / seconds,
            tokenizer_use=done["tokenizer"] / seconds,
            replica_use=done["replica"] / seconds,
            device_use=done["device"] / seconds,
            most_units=max(it.most_under_way for it in self._replicas),
        )
