"""A few ingresses and their part of the replicas, event by event: how large units get, who waits, and what is busy.

Units are formed by `core/packing.py`'s own queue and leave by the rule of `dispatch.py`; batches are as `gate.py` takes
them. Every process is one thread; what is under way at a replica is seen by whoever sends there.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from dataclasses import dataclass, field

from serve_app.core.packing import PackingQueue, Share, Span
from serve_app.dispatch import AT_THE_DOOR, CROWD, CROWD_TOKENS, DOOR_TOKENS, EXPRESS_TOKENS
from simulation.constants import Constants
from simulation.machine import Clock, Machine, Process, Then

TINY_TOKENS = 128  # tokenized on the event loop, as `model.TINY_CHARACTERS` says; else in a thread


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a slice. visible: replicas of the model that an ingress counts with, which may be many more than are here."""

    ingresses: int
    replicas: int
    visible: int
    per_gpu: int = 1
    """Replicas that share one."""
    unit_tokens: int = 16_384
    unit_sequences: int = 682  # of 768 dimensions: 2 MiB
    express_at_once: int = 1
    bulk_at_once: int = 1
    crowded: bool = True
    """Whether several workspaces send short requests: then their units are smaller."""
    cores: int | None = None
    """That all processes share, forwards included; None: one for each process, and a GPU for each replica."""

    def at_once(self, *, express: bool) -> int:
        return self.express_at_once if express else self.bulk_at_once


@dataclass(slots=True, kw_only=True)
class Flight:
    """A request under way. queued_s: when it was tokenized; started_s: the forward of its last unit."""

    lengths: list[int]
    share: Share
    came_s: float
    answered: Then
    missing: int = 0
    queued_s: float = 0.0
    started_s: float = 0.0

    @property
    def express(self) -> bool:
        return sum(self.lengths) <= EXPRESS_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    ingress: Ingress
    express: bool
    tokens: int
    spans: list[Span]


@dataclass(slots=True)
class _Gate:
    """One lane of a replica: what waits there, and the threads that are free."""

    threads: list[Process]
    waiting: deque[Unit] = field(default_factory=deque)


class Replica:
    """batches, texts and tokens: what it has computed."""

    def __init__(self, clock: Clock, shape: Shape, costs: Constants, device: Process, shared: Machine | None) -> None:
        """device: a GPU's stream, which both lanes share; on shared cores each thread computes instead."""
        self._clock, self._shape, self._costs, self._on_cpu = clock, shape, costs, shared is not None
        self.loop = Process(clock, shared)
        self._gates = {
            express: _Gate(
                [Process(clock, shared) if shared else device for _ in range(shape.at_once(express=express))]
            )
            for express in (True, False)
        }
        self.under_way = self.most_under_way = 0
        self.batches = self.tokens = 0

    def take(self, unit: Unit) -> None:
        """A call has come: half of its CPU goes before the forward, half behind it."""
        self.most_under_way = max(self.most_under_way, self.under_way)
        self.loop.do(self._half_call_s, lambda: self._wait(unit))

    @property
    def _half_call_s(self) -> float:
        return (self._costs.hop_ms + self._costs.replica_ms) / 2000

    def _wait(self, unit: Unit) -> None:
        gate = self._gates[unit.express]
        gate.waiting.append(unit)
        self._open(gate)

    def _open(self, gate: _Gate) -> None:
        if not gate.threads or not gate.waiting:
            return
        batch, tokens = list[Unit](), 0
        while gate.waiting and (not batch or tokens + gate.waiting[0].tokens <= self._shape.unit_tokens):
            unit = gate.waiting.popleft()
            batch.append(unit)
            tokens += unit.tokens
        self.batches, self.tokens = self.batches + 1, self.tokens + tokens
        for unit in batch:
            unit.ingress.started(unit)
        thread = gate.threads.pop()
        thread.do(self._forward_s(tokens), lambda: self._computed(gate, thread, batch))

    def _forward_s(self, tokens: int) -> float:
        if self._on_cpu:
            return self._costs.forward_ms / 1000 + self._costs.forward_us / 1e6 * tokens
        return max(self._costs.launch_ms / 1000, tokens / self._costs.gpu_tokens)

    def _computed(self, gate: _Gate, thread: Process, batch: list[Unit]) -> None:
        gate.threads.append(thread)
        for unit in batch:
            self.loop.do(self._half_call_s, lambda unit=unit: self._answer(unit))  # type: ignore[misc]
        self._open(gate)

    def _answer(self, unit: Unit) -> None:
        self.under_way -= 1
        self._clock.after(self._costs.wire_ms / 1000, lambda: unit.ingress.landed(unit))


class Ingress:
    """calls, texts: that it has sent."""

    def __init__(
        self, clock: Clock, shape: Shape, costs: Constants, replicas: list[Replica], seed: int, shared: Machine | None
    ) -> None:
        self._clock, self._shape, self._costs, self._replicas = clock, shape, costs, replicas
        self._rng = random.Random(seed)
        self.loop = Process(clock, shared)
        self.tokenizer = Process(clock, shared)
        self._queues = {True: PackingQueue(), False: PackingQueue()}
        self._under_way = {True: 0, False: 0}
        self._flights: dict[int, Flight] = {}
        self._numbers = itertools.count()
        self.calls = self.texts = 0

    def take(self, flight: Flight) -> None:
        """A request has come."""
        tokens = sum(flight.lengths)
        tokenize_s, half_s = self._costs.tokenize_us / 1e6 * tokens, self._costs.ingress_ms / 2000
        if tokens <= TINY_TOKENS:
            self.loop.do(half_s + tokenize_s, lambda: self._queue(flight))
        else:
            self.loop.do(half_s, lambda: self.tokenizer.do(tokenize_s, lambda: self._queue(flight)))

    def _queue(self, flight: Flight) -> None:
        request = next(self._numbers)
        flight.queued_s, flight.missing = self._clock.now_s, len(flight.lengths)
        self._flights[request] = flight
        self._queues[flight.express].add(request, flight.lengths, flight.share)
        self._pump(express=flight.express)

    def _pump(self, *, express: bool) -> None:
        while self._may_leave(express=express):
            spans = self._queues[express].next_unit(self._size(express=express), self._shape.unit_sequences)
            if not spans:
                return
            tokens = sum(sum(self._lengths(span)) for span in spans)
            unit = Unit(ingress=self, express=express, tokens=tokens, spans=spans)
            self._under_way[express] += 1
            self.calls, self.texts = self.calls + 1, self.texts + sum(span.count for span in spans)
            self.loop.do(self._costs.hop_ms / 2000, lambda unit=unit: self._send(unit))  # type: ignore[misc]

    def _may_leave(self, *, express: bool) -> bool:
        """As `Dispatcher._may_leave`; a test compares what the two send."""
        at_once, under_way = self._shape.at_once(express=express), self._under_way[express]
        many = not express or self._queues[express].tokens >= DOOR_TOKENS
        return under_way < (at_once + (AT_THE_DOOR if many else 0)) * self._shape.visible

    def _size(self, *, express: bool) -> int:
        whole = self._shape.unit_tokens
        return max(1, min(whole // CROWD, CROWD_TOKENS)) if express and self._shape.crowded else whole

    def _lengths(self, span: Span) -> list[int]:
        return self._flights[span.request].lengths[span.first : span.first + span.count]

    def _send(self, unit: Unit) -> None:
        """To the less busy of two, as Serve chooses."""
        one, other = self._rng.choice(self._replicas), self._rng.choice(self._replicas)
        replica = min(one, other, key=lambda it: it.under_way)
        replica.under_way += 1
        self._clock.after(self._costs.wire_ms / 1000, lambda: replica.take(unit))

    def started(self, unit: Unit) -> None:
        for span in unit.spans:
            self._flights[span.request].started_s = self._clock.now_s

    def landed(self, unit: Unit) -> None:
        self.loop.do(self._costs.hop_ms / 2000, lambda: self._land(unit))

    def _land(self, unit: Unit) -> None:
        self._under_way[unit.express] -= 1
        for span in unit.spans:
            flight = self._flights[span.request]
            flight.missing -= span.count
            if flight.missing == 0:
                del self._flights[span.request]
                self._clock.after(self._costs.settle_ms / 1000, lambda flight=flight: self._render(flight))  # type: ignore[misc]
        self._pump(express=unit.express)

    def _render(self, flight: Flight) -> None:
        render_s = self._costs.render_us / 1e6 * len(flight.lengths)
        self.loop.do(self._costs.ingress_ms / 2000 + render_s, flight.answered)
