"""How long a revoked key goes on working: three ingress replicas behind the proxy, each with what it remembers.

A key is used until every replica knows it, and on for as long as chance will have it: what a replica knows may be new
or seconds old. Then it is revoked in the store, and used on for longer than any replica may remember, each time over a
new connection.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from benchmark import BenchError
from benchmark.server import serving
from serve_app.accounts import KNOWN_S
from serve_app.core import keys
from serve_app.core.keys import ApiKey, Plan, Workspace
from serve_app.stores import Store, open_store

WORKSPACE = Workspace(id="ws_bench", name="bench", plan=Plan.PRO, created_ms=1)
EVERY_S = 0.15  # a use of a key
KNOWN_AFTER_S = 3.0  # some twenty uses: every replica has had one
WATCHED_S = 7.0
AT_ONCE = 5


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench revocation", description=__doc__)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--replicas", type=int, default=3, help="of the ingress (default: 3)")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, root: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        config = yaml.safe_load((root / "deployments.yaml").read_text())
        config["applications"][0]["args"] = {"replicas": options.replicas}
        path = folder / "bench.yaml"
        path.write_text(yaml.safe_dump(config))
        url = f"sqlite:{folder}/data/serve-app.db"
        asyncio.run(_workspace(url))
        with serving(path, root, folder) as server:
            took = sorted(asyncio.run(_trials(url, urlsplit(server.url).port or 80, options.trials)))
    print(
        f"{options.replicas} ingress replicas, {len(took)} trials: a revoked key was last let in after "
        f"{took[len(took) // 2]:.2f} s (median), {took[-1]:.2f} s at most"
    )


async def _workspace(url: str) -> None:
    store = await open_store(url)
    await store.add_workspace(WORKSPACE)
    await store.close()


async def _trials(url: str, port: int, trials: int) -> list[float]:
    store, took = await open_store(url), list[float]()
    while len(took) < trials:
        took += await asyncio.gather(*(_trial(store, port) for _ in range(min(AT_ONCE, trials - len(took)))))
        print(f"{len(took)}/{trials}: at most {max(took):.2f} s", file=sys.stderr)
    await store.close()
    return took


async def _trial(store: Store, port: int) -> float:
    """Seconds from the revocation to the last answer that let the key in."""
    text, now_ms = keys.mint(os.urandom(keys.SECRET_BYTES)), time.time_ns() // 1_000_000
    digest = keys.digest(text)
    key = ApiKey(id=f"key_{digest[:16]}", workspace=WORKSPACE.id, name="", digest=digest, created_ms=now_ms)
    await store.put_key(key)
    until_s = time.monotonic() + KNOWN_AFTER_S + KNOWN_S * random.random()
    while time.monotonic() < until_s:
        if await _use(port, text) != 200:
            raise BenchError("a valid key was refused")
        await asyncio.sleep(EVERY_S)
    await store.put_key(replace(key, revoked_ms=time.time_ns() // 1_000_000))
    revoked_s, last_s = time.monotonic(), 0.0
    while (passed_s := time.monotonic() - revoked_s) < WATCHED_S:
        if await _use(port, text) == 200:
            last_s = time.monotonic() - revoked_s
        await asyncio.sleep(EVERY_S)
    if passed_s - last_s < EVERY_S:
        raise BenchError(f"a key was still let in {last_s:.1f} s after it was revoked")
    return last_s


async def _use(port: int, text: str) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = ("GET /v1/models HTTP/1.1", "Host: x", f"Authorization: Bearer {text}", "Connection: close", "", "")
        writer.write("\r\n".join(head).encode())
        return int((await reader.readline()).split(None, 2)[1])
    finally:
        writer.close()
