"""Hours at a part of what the service can do: whether memory, files, queues or latencies grow.

What it can do is measured first, in a closed loop; then requests of 1 to 8 texts of mixed lengths arrive at a share of
it (Poisson), nine of ten with an Idempotency-Key, and one in ten of those is a key again that was answered before.
Memory is USS, what would be free if the process ended. Slopes are straight lines through the samples after the first
quarter, for what is filled once, grows once. At the end the ledger must hold the tokens of the answers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import sys
import tempfile
import time
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import orjson
import psutil
import yaml

from benchmark import BenchError, machine
from benchmark.bills import billed
from benchmark.client import Client, Route, percentile_ms
from benchmark.machine import Meter
from benchmark.processes import ALL, kind_of
from benchmark.report import table
from benchmark.server import Server, serving, settings
from benchmark.workloads import mixed

MODEL = "all-MiniLM-L6-v2"
IN_FLIGHT = 32  # that fill the service
MOST_TEXTS = 8  # a request
POOL = 2048  # different requests; then they come again
KEYED, REPEATED = 0.9, 0.1
REMEMBERED = 5_000  # keys that may come again
WARM_UP_S, CAPACITY_S = 5.0, 30.0
WINDOWS = 8  # of the whole, whose latencies are printed


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench soak", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=120.0, help="(default: 120)")
    add("--share", type=float, default=0.7, help="of what is answered at most (default: 0.7)")
    add("--every", type=float, default=30.0, metavar="S", help="a sample is taken (default: 30 s)")
    add("--seed", type=int, default=1, help="of the texts and the arrivals (default: 1)")
    add("--json", type=Path, metavar="FILE", help="write all samples and latencies there")
    options = parser.parse_args(arguments)
    if min(options.minutes, options.share, options.every) <= 0:
        parser.error("--minutes, --share and --every must be positive")
    if options.minutes * 60 < 8 * options.every:
        parser.error("there must be at least eight samples")
    return options


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of all processes of a kind. uss: MiB."""

    processes: int = 0
    uss: float = 0.0
    files: int = 0
    threads: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(
            processes=self.processes + other.processes,
            uss=self.uss + other.uss,
            files=self.files + other.files,
            threads=self.threads + other.threads,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """at_s: since the load began. pending: sequences that are not answered."""

    at_s: float
    pending: int
    in_flight: int
    sizes: dict[str, Size]


@dataclass(slots=True, kw_only=True)
class Seen:
    """By the clients. Each latency with the second, since the load began, in which its request was due."""

    latencies: list[tuple[float, float]] = field(default_factory=list)
    lateness_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    replays: int = 0
    tokens: int = 0
    answers: int = 0  # that were no replays
    in_flight: int = 0


def measure(options: argparse.Namespace, root: Path) -> None:
    print(f"machine  {machine.description()}\nserver   serve run, ", end="")
    print(" ".join(f"{name}={value}" for name, value in settings().items()), end="\n\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        print("starting the server", file=sys.stderr)
        with serving(_config(root, folder), root, folder) as server:
            soak = _Soak(options, server)
            asyncio.run(soak.run())
        events, tokens = asyncio.run(billed(f"sqlite:{folder}/data/serve-app.db"))
    print(soak.report())
    print(f"\nbills    {soak.seen.answers:,} answers with {soak.seen.tokens:,} tokens; ", end="")
    print(f"the ledger has {events:,} events of {tokens:,} tokens")
    if options.json:
        raw = {"samples": [asdict(it) for it in soak.samples], "latencies_s": soak.seen.latencies}
        options.json.write_bytes(orjson.dumps(raw))
    if (events, tokens) != (soak.seen.answers, soak.seen.tokens):
        raise BenchError("what was billed is not what was answered")


def _config(root: Path, folder: Path) -> Path:
    """The usual one, with room for all the replies of hours."""
    config = yaml.safe_load((root / "deployments.yaml").read_text())
    for application in config["applications"]:
        if application["name"] == "ingress":
            application["args"] |= {"replay_bytes": 2**40, "replay_records": 10**9}
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class _Soak:
    def __init__(self, options: argparse.Namespace, server: Server) -> None:
        self._options, self._server = options, server
        self._chance = random.Random(f"soak {options.seed}")
        self._route = Route.parse(server.url, model=MODEL, format="base64", api_key=server.api_key)
        source = mixed(options.seed)
        self._texts = itertools.cycle([source.take(self._chance.randint(1, MOST_TEXTS)) for _ in range(POOL)])
        self._answered: deque[bytes] = deque(maxlen=REMEMBERED)
        self._most_per_s = self._wall_s = self._cpu_s = 0.0
        self.seen = Seen()
        self.samples: list[Sample] = []

    async def run(self) -> None:
        client = Client(self._route)
        try:
            self._most_per_s = await self._most(client)
            per_s = self._options.share * self._most_per_s
            print(f"{self._most_per_s:.1f} requests/s at most; {per_s:.1f} now", file=sys.stderr)
            meter = Meter(self._server.processes)
            start, watch = meter.read(), asyncio.create_task(self._watch(time.perf_counter()))
            await self._load(client, per_s)
            usage = meter.since(start)
            self._wall_s, self._cpu_s = usage.wall_s, usage.server_s or 0.0
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        finally:
            client.close()

    async def _most(self, client: Client) -> float:
        for seconds in (WARM_UP_S, CAPACITY_S):
            begun_s, before = time.perf_counter(), self.seen.statuses.total()

            async def caller(until_s: float = begun_s + seconds) -> None:
                while time.perf_counter() < until_s:
                    await self._ask(client)

            await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
        return (self.seen.statuses.total() - before) / (time.perf_counter() - begun_s)

    async def _load(self, client: Client, per_s: float) -> None:
        begun_s = time.perf_counter()
        tasks, due_s = set[asyncio.Task[None]](), begun_s
        while (due_s := due_s + self._chance.expovariate(per_s)) < begun_s + 60 * self._options.minutes:
            await asyncio.sleep(due_s - time.perf_counter())
            self.seen.lateness_s.append(time.perf_counter() - due_s)
            task = asyncio.create_task(self._arrive(client, due_s, begun_s))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def _arrive(self, client: Client, due_s: float, begun_s: float) -> None:
        self.seen.in_flight += 1
        try:
            await self._ask(client)
        finally:
            self.seen.in_flight -= 1
        self.seen.latencies.append((due_s - begun_s, time.perf_counter() - due_s))

    async def _ask(self, client: Client) -> None:
        request, fresh = self._request()
        answer = await client.ask(request)
        self.seen.statuses[answer.status] += 1
        if answer.status != 200:
            return
        if answer.header("idempotent-replayed"):
            self.seen.replays += 1
            return
        self.seen.answers += 1
        self.seen.tokens += int(orjson.loads(answer.body)["usage"]["prompt_tokens"])
        if fresh:
            self._answered.append(request)

    def _request(self) -> tuple[bytes, bool]:
        """And whether its key is new."""
        if self._chance.random() >= KEYED:
            return self._route.request(next(self._texts)), False
        if self._answered and self._chance.random() < REPEATED:
            return self._chance.choice(self._answered), False
        return self._route.request(next(self._texts), idempotency_key=uuid.uuid4().hex), True

    async def _watch(self, begun_s: float) -> None:
        for number in itertools.count():
            await asyncio.sleep(begun_s + number * self._options.every - time.perf_counter())
            sizes, (_, ready) = await asyncio.gather(
                asyncio.to_thread(_sizes, self._server), asyncio.to_thread(self._server.readiness)
            )
            sample = Sample(
                at_s=time.perf_counter() - begun_s,
                pending=ready["models"][MODEL]["pending_sequences"],
                in_flight=self.seen.in_flight,
                sizes=sizes,
            )
            self.samples.append(sample)
            all_ = sizes[ALL]
            print(
                f"{sample.at_s:6.0f} s  {all_.uss:,.0f} MiB, {all_.files:,} files, {all_.threads:,} threads, "
                f"{sample.pending} sequences pending, {sample.in_flight} in flight, {dict(self.seen.statuses)}",
                file=sys.stderr,
                flush=True,
            )

    def report(self) -> str:
        minutes, per_s = self._options.minutes, len(self.seen.latencies) / (60 * self._options.minutes)
        statuses = ", ".join(f"{count:,} x {status}" for status, count in sorted(self.seen.statuses.items()))
        late_ms = percentile_ms(self.seen.lateness_s, 99)
        share = f"{per_s / self._most_per_s:.0%} of the {self._most_per_s:.1f} that are answered at most"
        parts = [
            f"{minutes:g} minutes, {per_s:.1f} requests/s, {share}. {statuses}, {self.seen.replays:,} of them replays. "
            f"Server CPU {1000 * self._cpu_s / len(self.seen.latencies):.1f} ms a request. "
            f"The client sent up to {late_ms:.1f} ms late (p99).",
            table(self._size_rows()),
            table(self._latency_rows()),
        ]
        return "\n\n".join(parts)

    def _size_rows(self) -> list[list[str]]:
        rows = [
            [
                "",
                "processes",
                "USS MiB, first",
                "a quarter on",
                "last",
                "slope MiB/h",
                "files",
                "last",
                "threads",
                "last",
            ]
        ]
        settled = self.samples[len(self.samples) // 4 :]
        first, last = self.samples[0].sizes, self.samples[-1].sizes
        for kind in sorted(last, key=lambda kind: (kind == ALL, kind)):
            sizes = [sample.sizes.get(kind, Size()) for sample in settled]
            slope = np.polyfit([sample.at_s / 3600 for sample in settled], [size.uss for size in sizes], 1)[0]
            before, after = first.get(kind, Size()), last[kind]
            uss = [f"{size.uss:,.1f}" for size in (before, sizes[0], after)]
            counts = [str(it) for it in (before.files, after.files, before.threads, after.threads)]
            rows.append([kind, str(after.processes), *uss, f"{slope:+.1f}", *counts])
        return rows

    def _latency_rows(self) -> list[list[str]]:
        window_s = 60 * self._options.minutes / WINDOWS
        rows = [["from minute", "requests", "p50 ms", "p95 ms", "p99 ms", "sequences pending, mean", "most"]]
        for number in range(WINDOWS):
            low, high = number * window_s, (number + 1) * window_s
            mine = [took for at, took in self.seen.latencies if low <= at < high]
            pending = [sample.pending for sample in self.samples if low <= sample.at_s < high]
            of = [f"{percentile_ms(mine, at):.0f}" for at in (50, 95, 99)]
            rows.append([f"{low / 60:.1f}", f"{len(mine):,}", *of, f"{np.mean(pending):.1f}", str(max(pending))])
        return rows


def _sizes(server: Server) -> dict[str, Size]:
    """By kind, and of all together. Whoever ends meanwhile is left out."""
    sizes: dict[str, Size] = {}
    for process in server.processes():
        with contextlib.suppress(psutil.Error):
            if words := process.cmdline():
                uss = process.memory_full_info().uss / 2**20
                size = Size(processes=1, uss=uss, files=process.num_fds(), threads=process.num_threads())
                for kind in (kind_of(words), ALL):
                    sizes[kind] = sizes.get(kind, Size()) + size
    return sizes
