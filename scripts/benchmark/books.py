"""What keys and bills cost: short queries without bills, with them, and with an Idempotency-Key, on both stores.

Services are started one after the other, round by round, so that a noisy minute hits all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import yaml

from benchmark import BenchError
from benchmark.client import Client, Route, closed_loop, percentile_ms
from benchmark.machine import Meter
from benchmark.server import Server, serving
from benchmark.workloads import short_queries
from serve_app.core import keys
from serve_app.core.idempotency import Begin, Complete, Stored
from serve_app.core.keys import ApiKey, Plan, Workspace
from serve_app.core.ledger import Kind, UsageEvent
from serve_app.stores import open_store

MODEL = "all-MiniLM-L6-v2"
WORKSPACE = Workspace(id="ws_bench", name="bench", plan=Plan.TEAM, created_ms=0)
IN_FLIGHT = 32
BATCH = 32  # steps in one write, as the actor's way there has it
REPLY_BYTES = 1536  # one vector of 384 dimensions
REDIS = ("appendonly yes", "appendfsync always", "maxmemory-policy noeviction", 'save ""', "bind 127.0.0.1")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench books", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of everything; medians are printed (default: 3)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement (default: 8)")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, root: Path) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        redis = stack.enter_context(_redis(folder / "redis"))
        stores = {"sqlite": f"sqlite:{folder}/pairs.db", "redis": redis}
        pairs: dict[str, list[float]] = {name: [] for name in stores}
        seen: dict[str, list[dict[str, float]]] = {}
        for number in range(options.rounds):
            for name, url in stores.items():
                pairs[name].append(asyncio.run(_pairs_per_s(url, options.seconds)))
            for what in ("without bills", "sqlite", "redis"):
                print(f"round {number + 1}/{options.rounds}: {what}", file=sys.stderr)
                here = folder / f"{number}-{what.replace(' ', '-')}"
                here.mkdir()
                for row, figures in _service(what, redis, root, here, options.seconds):
                    seen.setdefault(row, []).append(figures)
    print(f"Short queries, {options.seconds:g} s a measurement. Median (lowest-highest) of {options.rounds} rounds.\n")
    print("| | req/s | p50 ms | p99 ms | server CPU ms/request |\n|---|---|---|---|---|")
    for row, rounds in seen.items():
        cells = [_spread([figures[name] for figures in rounds], form) for name, form in FORMS.items()]
        print(f"| {row} | {' | '.join(cells)} |")
    print("\nbegin and complete, in batches of 32, from one process, straight to the store:")
    for name, rates in pairs.items():
        print(f"  {name:7} {_spread(rates, '{:,.0f}')} pairs/s")


FORMS = {"per_s": "{:.0f}", "p50_ms": "{:.1f}", "p99_ms": "{:.0f}", "cpu_ms": "{:.2f}"}


def _service(what: str, redis: str, root: Path, folder: Path, seconds: float) -> Iterator[tuple[str, dict[str, float]]]:
    config = yaml.safe_load((root / "deployments.yaml").read_text())
    if what == "without bills":
        config["applications"][0]["import_path"] = "benchmark.unbilled:ingress"
    url = redis if what == "redis" else f"sqlite:{folder}/data/serve-app.db"
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(config))
    key = asyncio.run(_account(url))
    before = {name: os.environ.get(name) for name in ("SERVE_APP_STORE", "PYTHONPATH")}
    os.environ |= {"SERVE_APP_STORE": url, "PYTHONPATH": str(root / "scripts")}
    try:
        with serving(path, root, folder) as server:
            route = Route.parse(server.url, model=MODEL, format="base64", api_key=key)
            yield from _measurements(what, route, server, seconds)
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _measurements(what: str, route: Route, server: Server, seconds: float) -> Iterator[tuple[str, dict[str, float]]]:
    texts = short_queries(1).take(2048)
    plain = [route.request(text) for text in texts]
    yield f"{what}, {IN_FLIGHT} in flight", _load(route, server, itertools.cycle(plain), IN_FLIGHT, seconds)
    yield f"{what}, one at a time", _load(route, server, itertools.cycle(plain), 1, seconds)
    if what == "without bills":
        return
    fresh = (route.request(text, idempotency_key=uuid.uuid4().hex) for text in itertools.cycle(texts))
    yield f"{what}, each with a key, {IN_FLIGHT} in flight", _load(route, server, fresh, IN_FLIGHT, seconds)
    yield f"{what}, each with a key, one at a time", _load(route, server, fresh, 1, seconds)
    again = [route.request(text, idempotency_key=uuid.uuid4().hex) for text in texts[:64]]
    _load(route, server, iter(again), 1, seconds)
    yield f"{what}, replays, one at a time", _load(route, server, itertools.cycle(again), 1, seconds)


def _load(route: Route, server: Server, requests: Iterator[bytes], in_flight: int, seconds: float) -> dict[str, float]:
    async def run() -> dict[str, float]:
        client, meter = Client(route), Meter(server.processes)
        await closed_loop(client, itertools.islice(requests, 2 * in_flight), in_flight)
        start, until_s = meter.read(), time.perf_counter() + seconds
        replies = await closed_loop(client, requests, in_flight, stop=lambda: time.perf_counter() > until_s)
        usage = meter.since(start)
        client.close()
        done = max(1, len(replies.latencies_s))
        return {
            "per_s": done / max(replies.wall_s, 1e-9),
            "p50_ms": percentile_ms(replies.latencies_s or [0.0], 50),
            "p99_ms": percentile_ms(replies.latencies_s or [0.0], 99),
            "cpu_ms": 1000 * (usage.server_s or 0.0) / done,
        }

    return asyncio.run(run())


async def _account(url: str) -> str:
    """A workspace and a key of it, before the service starts."""
    text = keys.mint(os.urandom(keys.SECRET_BYTES))
    store = await open_store(url)
    await store.add_workspace(WORKSPACE)
    key = ApiKey(id=uuid.uuid4().hex, workspace=WORKSPACE.id, name="bench", digest=keys.digest(text), created_ms=0)
    await store.put_key(key)
    await store.close()
    return text


async def _pairs_per_s(url: str, seconds: float) -> float:
    store, done = await open_store(url), 0
    start_s = time.perf_counter()
    while time.perf_counter() < start_s + seconds:
        claims = [uuid.uuid4().hex for _ in range(BATCH)]
        await store.run([_begin(claim) for claim in claims])
        await store.run([_complete(claim) for claim in claims])
        done += BATCH
    rate = done / (time.perf_counter() - start_s)
    await store.close()
    return rate


def _begin(claim: str) -> Begin:
    return Begin(
        claim=claim,
        workspace=WORKSPACE.id,
        fingerprint=claim,
        attempt=claim,
        op=claim,
        lease_ms=15_000,
        reserve_bytes=REPLY_BYTES,
        max_bytes=2**40,
        max_records=10**9,
    )


def _complete(claim: str) -> Complete:
    event = UsageEvent(
        id=claim,
        kind=Kind.TOKENS,
        workspace=WORKSPACE.id,
        time_ms=time.time_ns() // 1_000_000,
        quantity=14,
        unit_price="0.008",
        rate_card="bench",
        plan="team",
        tier="flex",
        model=MODEL,
        size_class="small",
        details={"idempotency": claim},
    )
    reply = Stored(body=bytes(REPLY_BYTES))
    return Complete(claim=claim, workspace=WORKSPACE.id, op=claim, reply=reply, bytes=REPLY_BYTES, event=event)


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    program = shutil.which("redis-server")
    if program is None:
        raise BenchError("redis-server is needed. On Debian: apt-get install redis-server")
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "redis.conf").write_text("\n".join([*REDIS, f"port {port}", f"dir {folder}", ""]))
    process = subprocess.Popen([program, str(folder / "redis.conf")], stdout=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        if process.poll() is not None:
            raise BenchError("redis-server did not start")
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait()


def _spread(values: Sequence[float], form: str) -> str:
    return f"{form.format(median(values))} ({form.format(min(values))}-{form.format(max(values))})"
