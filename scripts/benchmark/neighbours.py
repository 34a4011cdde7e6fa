"""What nine polite workspaces feel of a tenth that floods: short queries alone, and beside floods of two kinds.

The polite ones send at set moments (an open loop); the flood is a process of its own that never waits, whatever it is
answered. Phases alternate, so that a noisy minute hits all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmark.client import Connection, Route, percentile_ms
from benchmark.server import UNLIMITED, serving
from benchmark.workloads import passages, short_queries
from serve_app.core import keys
from serve_app.core.keys import ApiKey, Plan, Workspace
from serve_app.stores import open_store

MODEL = "all-MiniLM-L6-v2"
POLITE = 9
FLOODS = {"alone": 0, "beside a flood of short queries": 32, "beside a flood of 64 passages a call": 16}  # connections
SETTLE_S = 8.0  # longer than a burst of a plan's rate lasts


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench neighbours", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of every phase; medians are printed (default: 3)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement (default: 15)")
    parser.add_argument("--per-second", type=float, default=1.0, help="of each polite workspace (default: 1)")
    parser.add_argument("--unlimited", action="store_true", help="without the plans' rates: turns alone protect")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, root: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        url = f"sqlite:{folder}/data/serve-app.db"
        texts = asyncio.run(_accounts(url))
        config = yaml.safe_load((root / "deployments.yaml").read_text())
        terms = {"limits": UNLIMITED} if options.unlimited else {}
        config["applications"][0]["deployments"] = [{"name": "ingress", "user_config": terms}]
        path = folder / "bench.yaml"
        path.write_text(yaml.safe_dump(config))
        seen: dict[str, list[list[float]]] = {flood: [] for flood in FLOODS}
        answers: dict[str, Counter[str]] = {flood: Counter() for flood in FLOODS}
        with serving(path, root, folder) as server:
            routes = [Route.parse(server.url, model=MODEL, format="base64", api_key=key) for key in texts]
            asyncio.run(_polite(routes[:POLITE], 3.0, options.per_second, options.seed))
            for number in range(options.rounds):
                for flood in FLOODS:
                    print(f"round {number + 1}/{options.rounds}: {flood}", file=sys.stderr)
                    with _flooded(routes[POLITE], flood) as answered:
                        if FLOODS[flood]:
                            time.sleep(SETTLE_S)
                        seen[flood].append(
                            asyncio.run(_polite(routes[:POLITE], options.seconds, options.per_second, number))
                        )
                    answers[flood] += answered
    rates = "no rate limits" if options.unlimited else "the Pro plan's rates"
    plan = f"{options.seconds:g} s a phase, {rates}"
    print(f"{POLITE} polite workspaces, {options.per_second:g} short queries/s each, {plan}.")
    print("| | p50 ms | p99 ms | p99 to alone | the flood was answered |\n|---|---|---|---|---|")
    alone = median(percentile_ms(it, 99) for it in seen["alone"])
    for flood, rounds in seen.items():
        p50, p99 = (median(percentile_ms(it, at) for it in rounds) for at in (50, 99))
        told = ", ".join(f"{count:,} x {status}" for status, count in sorted(answers[flood].items()))
        print(f"| {flood} | {p50:.1f} | {p99:.1f} | {p99 / alone:.2f} | {told} |")


async def _accounts(url: str) -> list[str]:
    """A key of each workspace; the last is the flood's."""
    store, texts = await open_store(url), []
    for number in range(POLITE + 1):
        text = keys.mint(os.urandom(keys.SECRET_BYTES))
        workspace = Workspace(id=f"ws_{number}", name=f"{number}", plan=Plan.PRO, created_ms=1)
        await store.add_workspace(workspace)
        key = ApiKey(id=f"key_{number}", workspace=workspace.id, name="", digest=keys.digest(text), created_ms=1)
        await store.put_key(key)
        texts.append(text)
    await store.close()
    return texts


async def _polite(routes: Sequence[Route], seconds: float, per_second: float, seed: int) -> list[float]:
    """Seconds from the moment that each query was due to its answer."""
    return [
        latency
        for one in await asyncio.gather(
            *(_one(route, seconds, per_second, random.Random(f"{seed}-{at}")) for at, route in enumerate(routes))
        )
        for latency in one
    ]


async def _one(route: Route, seconds: float, per_second: float, chance: random.Random) -> list[float]:
    texts = short_queries(chance.randrange(10**6))
    start_s, at_s, asked = time.perf_counter(), 0.0, []
    idle: list[Connection] = []

    async def ask(due_s: float) -> float:
        connection = idle.pop() if idle else await _connect(route)
        await connection.post(route.request(texts.take(1)[0]))
        idle.append(connection)
        return time.perf_counter() - due_s

    while (at_s := at_s + chance.expovariate(per_second)) < seconds:
        await asyncio.sleep(max(0.0, start_s + at_s - time.perf_counter()))
        asked.append(asyncio.create_task(ask(start_s + at_s)))
    latencies = await asyncio.gather(*asked)
    for connection in idle:
        connection.close()
    return latencies


async def _connect(route: Route) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, route.host, route.port)
    return connection


@contextmanager
def _flooded(route: Route, flood: str) -> Iterator[Counter[str]]:
    answered: Counter[str] = Counter()
    if not FLOODS[flood]:
        yield answered
        return
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_flood, args=(route, flood, theirs), daemon=True)
    process.start()
    try:
        yield answered
        ours.send("stop")
        if ours.poll(60):
            answered.update(ours.recv())
    finally:
        process.terminate()
        process.join()


def _flood(route: Route, flood: str, stop: Pipe) -> None:
    asyncio.run(_flood_until(route, flood, stop))


async def _flood_until(route: Route, flood: str, stop: Pipe) -> None:
    answered: Counter[str] = Counter()
    bulk = "passages" in flood
    requests = [route.request(passages(at).take(64) if bulk else short_queries(at).take(1)[0]) for at in range(8)]

    async def loop(number: int) -> None:
        connection = await _connect(route)
        while True:
            answer = await connection.ask(requests[number % len(requests)])
            answered[str(answer.status)] += 1

    tasks = [asyncio.create_task(loop(number)) for number in range(FLOODS[flood])]
    await asyncio.to_thread(stop.poll, None)
    for task in tasks:
        task.cancel()
    results: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
    broken = [result for result in results if not isinstance(result, asyncio.CancelledError)]
    answered["broken connections"] += len(broken)
    with contextlib.suppress(BrokenPipeError):
        stop.send(+answered)
