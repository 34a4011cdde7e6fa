"""What is measured, in which order: rounds of server and ceiling in turn, so that a noisy minute hits both.

A `Run` is one measurement as it came; `report.py` makes medians of them.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from benchmark import BenchError
from benchmark.ceiling import Ceiling
from benchmark.client import Client, Replies, Route, closed_loop, open_loop, vectors_in
from benchmark.machine import Meter, Reading, Usage
from benchmark.workloads import Workload, passages, short_queries

BATCH, CONCURRENCY = 64, 4  # a bulk import
IN_FLIGHT = 32  # many small callers
SINGLES_PER_S = 5.0  # beside the bulk import
FIRST_BATCHES = 4  # from which the rate is guessed
SINGLE_TEXTS = 2048  # different short queries; then they come again
LEAD_S = 0.5  # the bulk import is under way before the first single query counts
SAMPLE = 16  # texts of each workload whose vectors are compared
SAME = 0.999  # cosine; bfloat16 differs from itself by about 1e-4 when the batch around a text changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measurement. texts: answered within `wall_s`; latencies_s: of the requests, or of the single ones."""

    what: str
    workload: str
    round: int
    texts: int
    wall_s: float
    usage: Usage
    tokens: int = 0
    ceiling_cpu_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    lateness_s: list[float] = field(default_factory=list)

    @property
    def texts_per_s(self) -> float:
        return self.texts / self.wall_s


class Bench:
    def __init__(
        self, route: Route, ceiling: Ceiling, meter: Meter, *, workloads: list[Workload], seconds: float, seed: int
    ) -> None:
        """seconds: about how long one measurement takes."""
        self._route, self._ceiling, self._meter = route, ceiling, meter
        self._workloads, self._seconds, self._seed = workloads, seconds, seed
        self._bulk: dict[str, list[bytes]] = {}  # workload name -> requests of BATCH texts
        self._singles = [route.request(text) for text in short_queries(seed + 1).take(SINGLE_TEXTS)]
        texts = passages(seed + 1).take(16 * BATCH)
        self._passages = [route.request(batch) for batch in _batches(texts)]

    def check(self) -> tuple[float, int]:
        """The lowest cosine of the server's vectors to the in-process ones, and how many were compared.

        Each text once in a batch, and one of each workload alone. Raises BenchError below `SAME`.
        """
        samples = [workload.take(SAMPLE) for workload in self._workloads]
        requests = [texts for sample in samples for texts in (sample, sample[:1])]
        expected = self._ceiling.vectors([text for texts in requests for text in texts])
        replies = asyncio.run(_one_by_one(self._route, map(self._route.request, requests)))
        got = np.concatenate([vectors_in(reply) for reply in replies])
        if got.shape != expected.shape:
            raise BenchError(f"the server sent vectors of shape {got.shape}; in-process it is {expected.shape}")
        norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
        lowest = float(((got * expected).sum(axis=1) / norms).min())
        if not lowest >= SAME:  # nan too
            raise BenchError(f"the server's vectors are not the model's: lowest cosine {lowest:.6f}, {SAME} is needed")
        return lowest, len(got)

    def prepare(self) -> None:
        """Cuts each workload to about `seconds`, by the rate of a first, untimed pass; then both sides get the same."""
        for workload in self._workloads:
            texts = workload.take(FIRST_BATCHES * BATCH)
            self._ceiling.hold(workload.name, texts)
            first = self._ceiling.measure(workload.name)
            wanted = max(2 * CONCURRENCY, round(self._seconds * first.texts / first.wall_s / BATCH))
            texts += workload.take(BATCH * (wanted - FIRST_BATCHES))
            self._ceiling.hold(workload.name, texts)
            self._bulk[workload.name] = [self._route.request(batch) for batch in _batches(texts)]

    def rounds(self, count: int) -> Iterator[Run]:
        for number in range(1, count + 1):
            for workload in self._workloads:
                print(f"round {number}/{count}: {workload.name}", file=sys.stderr)
                yield asyncio.run(self._bulk_run(workload.name, number))
                yield self._ceiling_run(workload.name, number)
            print(f"round {number}/{count}: single queries", file=sys.stderr)
            for in_flight in (1, IN_FLIGHT):
                yield asyncio.run(self._singles_run(in_flight, number))
            print(f"round {number}/{count}: fairness", file=sys.stderr)
            yield asyncio.run(self._alone_run(number))
            yield from asyncio.run(self._beside_bulk_run(number))

    async def _bulk_run(self, workload: str, number: int) -> Run:
        client, requests = Client(self._route), self._bulk[workload]
        await self._connect(client, CONCURRENCY)
        start = self._meter.read()
        replies = await closed_loop(client, iter(requests), CONCURRENCY)
        return _run("bulk", workload, number, replies, self._done(client, start), BATCH)

    def _ceiling_run(self, workload: str, number: int) -> Run:
        start = self._meter.read()
        timing = self._ceiling.measure(workload)
        return Run(
            what="ceiling",
            workload=workload,
            round=number,
            texts=timing.texts,
            wall_s=timing.wall_s,
            usage=self._meter.since(start, ceiling_s=timing.cpu_s),
            tokens=timing.tokens,
            ceiling_cpu_s=timing.cpu_s,
        )

    async def _singles_run(self, in_flight: int, number: int) -> Run:
        client, requests = Client(self._route), itertools.cycle(self._singles)
        await self._connect(client, in_flight)
        start = self._meter.read()
        until_s = time.perf_counter() + self._seconds
        replies = await closed_loop(client, requests, in_flight, stop=lambda: time.perf_counter() > until_s)
        return _run(f"singles x{in_flight}", "short", number, replies, self._done(client, start), 1)

    async def _alone_run(self, number: int) -> Run:
        client = Client(self._route)
        await self._connect(client, 1)
        start = self._meter.read()
        replies = await self._arrivals(client, number)
        return _run("singles alone", "short", number, replies, self._done(client, start), 1)

    async def _beside_bulk_run(self, number: int) -> tuple[Run, Run]:
        """The same arrivals as alone, while passages keep the server busy."""
        client, finished = Client(self._route), asyncio.Event()
        await self._connect(client, CONCURRENCY + 1)
        start = self._meter.read()
        bulk = asyncio.create_task(
            closed_loop(client, itertools.cycle(self._passages), CONCURRENCY, stop=finished.is_set)
        )
        try:
            await asyncio.sleep(LEAD_S)
            replies = await self._arrivals(client, number)
        finally:
            finished.set()
        bulk_replies = await bulk
        usage = self._done(client, start)
        return (
            _run("singles beside bulk", "short", number, replies, usage, 1),
            _run("bulk beside singles", "passages", number, bulk_replies, usage, BATCH),
        )

    async def _arrivals(self, client: Client, number: int) -> Replies:
        rng = random.Random(f"arrivals {self._seed} {number}")
        # Twice as long as the rest: at this rate a measurement has few of them.
        return await open_loop(client, itertools.cycle(self._singles), SINGLES_PER_S, 2 * self._seconds, rng)

    async def _connect(self, client: Client, connections: int) -> None:
        """A few untimed requests: connections are open, and what idled is awake."""
        await closed_loop(client, iter(self._singles[: 2 * connections]), connections)

    def _done(self, client: Client, start: Reading) -> Usage:
        usage = self._meter.since(start)
        client.close()
        return usage


def _run(what: str, workload: str, number: int, replies: Replies, usage: Usage, batch: int) -> Run:
    if (got := len(vectors_in(replies.last))) != batch:
        raise BenchError(f"the server answered {batch} texts with {got} vectors")
    return Run(
        what=what,
        workload=workload,
        round=number,
        texts=batch * len(replies.latencies_s),
        wall_s=replies.wall_s,
        usage=usage,
        latencies_s=replies.latencies_s,
        lateness_s=replies.lateness_s,
    )


async def _one_by_one(route: Route, requests: Iterable[bytes]) -> list[bytes]:
    client = Client(route)
    replies = [await client.post(request) for request in requests]
    client.close()
    return replies


def _batches(texts: list[str]) -> Iterator[list[str]]:
    return (texts[first : first + BATCH] for first in range(0, len(texts), BATCH))
