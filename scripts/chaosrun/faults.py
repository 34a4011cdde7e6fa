"""What is done to the service, one kind each: killed, held up, starved of disk, misled about the time.

A fault strikes, and then is over: what was killed is back, what was held up goes on. Nothing here decides when.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sqlite3
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Protocol

import psutil

from chaosrun import ChaosError, clock
from chaosrun.cluster import Cluster
from chaosrun.installation import LEASE_S, Installation
from serve_app.stores import sqlite
from tests.redis_server import RedisServer

GONE_S = 300.0  # a kind that is not back by then never will be
LOOK_S = 0.2
HELD_UP_S = LEASE_S + 2  # whoever was stopped finds its leases taken
FULL_S = 5.0
SLOW_S, STOPPED_S, GOING_S = 5.0, 0.09, 0.01  # for so long the store works a tenth of the time
OFF_S, LONGEST_STEP_S = 5.0, 3600.0
CONTROLLER = "ray::ServeController"


class Fault(Protocol):
    kills: bool

    async def strike(self, chance: random.Random) -> Awaitable[None]:
        """Returns what ends when it is over. Raises ChaosError if there is nothing to strike."""
        ...


class Replica:
    """One of a kind is killed. It is over when as many run as before, and the killed one is not among them."""

    kills = True

    def __init__(self, installation: Installation, kind: str) -> None:
        self._installation = installation
        self._kind = kind

    async def strike(self, chance: random.Random) -> Awaitable[None]:
        victim = await one_of(lambda: self._installation.replicas(self._kind), self._kind, chance)
        victim.kill()
        return self._over(victim.pid)

    async def _over(self, pid: int) -> None:
        async def back() -> bool:
            running = await asyncio.to_thread(self._installation.running, self._kind)
            return len(running - {pid}) >= self._installation.wanted(self._kind)

        await until(back, self._kind)


class Controller:
    kills = True

    def __init__(self, installation: Installation) -> None:
        self._installation = installation

    async def strike(self, chance: random.Random) -> Awaitable[None]:
        victim = await one_of(lambda: self._installation.titled(CONTROLLER), "controller", chance)
        victim.kill()
        return self._over(victim.pid)

    async def _over(self, pid: int) -> None:
        async def back() -> bool:
            if not {it.pid for it in self._installation.titled(CONTROLLER)} - {pid}:
                return False
            return bool(await asyncio.to_thread(self._installation.running, "ingress"))

        await until(back, "controller")


class HAProxy:
    """All of its processes: one that was replaced may still be draining."""

    kills = True

    def __init__(self, installation: Installation) -> None:
        self._installation = installation

    async def strike(self, chance: random.Random) -> Awaitable[None]:
        await one_of(self._processes, "haproxy", chance)
        killed = {process.pid for process in self._processes()}
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        return self._over(killed)

    def _processes(self) -> list[psutil.Process]:
        return self._installation.titled("haproxy")

    async def _over(self, killed: Collection[int]) -> None:
        async def back() -> bool:
            if not {process.pid for process in self._processes()} - {*killed}:
                return False
            status, _ = await asyncio.to_thread(self._installation.server.readiness)
            return status == 200

        await until(back, "haproxy")


class Redis:
    kills = True

    def __init__(self, redis: RedisServer) -> None:
        self._redis = redis

    async def strike(self, chance: random.Random) -> Awaitable[None]:
        await asyncio.to_thread(self._redis.kill)
        return asyncio.to_thread(self._redis.start)


class Node:
    """A worker with all that is on it. Another takes its place at once; it is over when all is back where it may be."""

    kills = True

    def __init__(self, installation: Installation, cluster: Cluster) -> None:
        self._installation = installation
        self._cluster = cluster

    async def strike(self, chance: random.Random) -> Awaitable[None]:
        number = chance.choice(self._cluster.workers)
        killed = await asyncio.to_thread(self._cluster.kill, number)
        self._cluster.add(number)
        return self._over(killed)

    async def _over(self, killed: Collection[int]) -> None:
        async def back() -> bool:
            self._cluster.revive()
            for kind in self._installation.titles():
                running = await asyncio.to_thread(self._installation.running, kind)
                if len(running - {*killed}) < self._installation.wanted(kind):
                    return False
            return True

        await until(back, "node")


class Stopped:
    """A replica that does not run for longer than a lease lasts, and then goes on as if nothing had been."""

    kills = False

    def __init__(self, installation: Installation, kind: str) -> None:
        self._installation = installation
        self._kind = kind

    async def strike(self, chance: random.Random) -> Awaitable[None]:
        victim = await one_of(lambda: self._installation.replicas(self._kind), self._kind, chance)
        victim.suspend()
        return self._over(victim)

    async def _over(self, victim: psutil.Process) -> None:
        try:
            await asyncio.sleep(HELD_UP_S)
        finally:
            with contextlib.suppress(psutil.Error):
                victim.resume()


class SlowRedis:
    kills = False

    def __init__(self, redis: RedisServer) -> None:
        self._redis = redis

    async def strike(self, chance: random.Random) -> Awaitable[None]:
        return self._over()

    async def _over(self) -> None:
        until_s = time.monotonic() + SLOW_S
        while time.monotonic() < until_s:
            self._redis.signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(STOPPED_S)
            finally:
                self._redis.signal(signal.SIGCONT)
            await asyncio.sleep(GOING_S)


class SlowSqlite:
    """Somebody else writes most of the time."""

    kills = False

    def __init__(self, url: str) -> None:
        self._path = sqlite.path_of(url)

    async def strike(self, chance: random.Random) -> Awaitable[None]:
        return asyncio.to_thread(self._write)

    def _write(self) -> None:
        with contextlib.closing(sqlite3.connect(self._path, timeout=GONE_S, isolation_level=None)) as other:
            until_s = time.monotonic() + SLOW_S
            while time.monotonic() < until_s:
                other.execute("begin immediate")
                time.sleep(STOPPED_S)
                other.execute("rollback")
                time.sleep(GOING_S)


class FullDisk:
    """Of the store, the large replies and the usage files. A Redis that cannot write ends itself."""

    kills = False

    def __init__(self, folder: Path, redis: RedisServer | None) -> None:
        self._folder = folder
        self._redis = redis

    async def strike(self, chance: random.Random) -> Awaitable[None]:
        filler = self._folder / "filler"
        await asyncio.to_thread(_fill, filler)
        return self._over(filler)

    async def _over(self, filler: Path) -> None:
        try:
            await asyncio.sleep(FULL_S)
        finally:
            filler.unlink()  # noqa: ASYNC240 # whatever happens to this task
        if self._redis is not None and not self._redis.running:
            await asyncio.to_thread(self._redis.start)


class SteppedClock:
    """A replica's wall clock is up to an hour off, and then right again: two steps."""

    kills = False

    def __init__(self, installation: Installation) -> None:
        self._installation = installation

    async def strike(self, chance: random.Random) -> Awaitable[None]:
        kind = chance.choice(("ingress", "idempotency", "usage"))
        victim = await one_of(lambda: self._installation.replicas(kind), kind, chance)
        by_s = chance.choice((-1, 1)) * chance.uniform(2 * LEASE_S, LONGEST_STEP_S)
        clock.step(self._installation.clocks, victim.pid, by_s)
        return self._over(victim.pid)

    async def _over(self, pid: int) -> None:
        await asyncio.sleep(OFF_S)
        clock.step(self._installation.clocks, pid, 0.0)


def kinds(installation: Installation, redis: RedisServer | None) -> dict[str, Fault]:
    """All that this installation can be struck by."""
    found: dict[str, Fault] = {kind: Replica(installation, kind) for kind in installation.titles()}
    found |= {"controller": Controller(installation), "haproxy": HAProxy(installation)}
    found |= {f"{kind} stopped": Stopped(installation, kind) for kind in installation.titles()}
    found |= {"clock stepped": SteppedClock(installation)}
    found["store slow"] = SlowRedis(redis) if redis else SlowSqlite(installation.store_url)
    if installation.small_disk:
        found["disk full"] = FullDisk(installation.disk, redis)
    if redis:
        found["redis"] = Redis(redis)
    if installation.cluster:
        found["node"] = Node(installation, installation.cluster)
    return found


def _fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))


async def one_of(victims: Callable[[], list[psutil.Process]], kind: str, chance: random.Random) -> psutil.Process:
    until_s = time.monotonic() + GONE_S
    while time.monotonic() < until_s:
        if found := await asyncio.to_thread(victims):
            return chance.choice(sorted(found, key=lambda process: process.pid))
        await asyncio.sleep(LOOK_S)
    raise ChaosError(f"there was no {kind} to strike for {GONE_S:g} s")


async def until(over: Callable[[], Awaitable[bool]], what: str) -> None:
    until_s = time.monotonic() + GONE_S
    while time.monotonic() < until_s:
        await asyncio.sleep(LOOK_S)
        with contextlib.suppress(OSError, ValueError, KeyError):  # nobody answers yet
            if await over():
                return
    raise ChaosError(f"{what} is not back {GONE_S:g} s after it was killed")
