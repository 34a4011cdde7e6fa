"""The idempotency actor: one process for each shard of the keys, a Serve deployment, so that Serve brings it back.

`desk.py` does the work. Also here is the ingress's way to it, which finds the shards in Serve's status; a key's shard
is a matter of speed, the store decides every claim.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from serve_app import tracing
from serve_app.core.idempotency import Begin, ClaimStep, Outcome
from serve_app.core.settings import IdempotencySettings
from serve_app.deployments.logs import join_serve
from serve_app.deployments.nodes import check_nodes
from serve_app.desk import Desk
from serve_app.gather import Gather
from serve_app.stores import Store, StoreDown, open_store
from serve_app.stores.blobs import Blobs

UPKEEP_S = 60.0
PURGE = 500  # expired records in one write
BATCH = 32  # steps in one call: at most 64 KiB of a reply each, and gRPC takes 4 MiB
CALL_S = 5.0  # a call that is not answered by then is made again: the actor may have died with it

_SHARD = re.compile(r"idempotency:(\d+)-of-(\d+)")

_Traced = tuple[ClaimStep, str | None]  # a step, and the trace that it belongs to

logger = logging.getLogger(__name__)


def shard_name(shard: int, shards: int) -> str:
    """The Serve deployment's name: it tells the ingress how many there are."""
    return f"idempotency:{shard}-of-{shards}"


class IdempotencyReplica:
    """See `app.idempotency` for the deployments. others: those of the same application, so that Serve starts them."""

    def __init__(self, settings: IdempotencySettings, shard: int, others: list[DeploymentHandle]) -> None:
        join_serve()
        self._settings = settings
        self._blobs = Blobs(Path(settings.blobs))
        self._shard = shard
        self._desk: Desk | None = None
        self._opening = asyncio.Lock()

    async def run(self, steps: list[ClaimStep], traces: dict[int, str] | None = None) -> list[Outcome]:
        return await (await self._open()).run(steps, traces)

    async def wait(self, step: Begin, wait_s: float, trace: str | None = None) -> Outcome:
        return await (await self._open()).wait(step, wait_s, trace)

    async def _open(self) -> Desk:
        async with self._opening:
            if self._desk is None:
                check_nodes(self._settings.store)
                self._store = await self.store()
                self._desk = Desk(
                    self._store,
                    cache_bytes=self._settings.cache_bytes,
                    waiters_per_key=self._settings.waiters_per_key,
                    waiters=self._settings.waiters,
                )
                if self._shard == 0:  # one is enough
                    self._upkeep = asyncio.create_task(self._keep_up())
        return self._desk

    async def store(self) -> Store:
        """Where this shard writes."""
        return await open_store(self._settings.store)

    async def check_health(self) -> None:
        """Opens the store, too: the actor works from its start, and not from its first call."""
        await self._open()

    async def _keep_up(self) -> None:
        """For ever: what has expired goes."""
        while True:
            await asyncio.sleep(UPKEEP_S)
            try:
                while await self._store.purge(PURGE) == PURGE:
                    pass
                await asyncio.to_thread(self._blobs.collect, time.time_ns() // 1_000_000)
            except (StoreDown, OSError) as error:
                logger.warning("upkeep is put off: %s", type(error).__name__)


class Clerks:
    """See `books.Clerk`: to each shard, calls of one moment travel together."""

    def __init__(self) -> None:
        self._handles: list[DeploymentHandle] = []
        self._gathers: list[Gather[_Traced, Outcome]] = []
        self._finding = asyncio.Lock()

    async def run(self, step: ClaimStep) -> Outcome:
        await self._find()
        return await self._gathers[self._shard(step)]((step, tracing.here()))

    async def wait(self, step: Begin, wait_s: float) -> Outcome:
        await self._find()
        asked, trace = (step, wait_s), tracing.here()
        response = self._handles[self._shard(step)].wait.remote(*asked if trace is None else (*asked, trace))
        outcome: Outcome = await _answer(response, wait_s + CALL_S)
        return outcome

    def _shard(self, step: ClaimStep) -> int:
        return int(step.claim[:8], 16) % len(self._handles)

    async def _find(self) -> None:
        async with self._finding:
            if not self._handles:
                self._handles = await asyncio.to_thread(_find_shards)
                self._gathers = [Gather(_Call(handle), max_items=BATCH) for handle in self._handles]


class _Call:
    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def __call__(self, items: list[_Traced]) -> list[Outcome]:
        steps = [step for step, _ in items]
        traces = {at: trace for at, (_, trace) in enumerate(items) if trace is not None}
        outcomes: list[Outcome] = await _answer(self._handle.run.remote(steps, *[traces] if traces else []), CALL_S)
        return outcomes


async def _answer(response: DeploymentResponse, within_s: float) -> Any:
    """Whatever went wrong, the step may be repeated: to whom this happens waits, and asks again."""
    try:
        async with asyncio.timeout(within_s):
            return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except Exception as error:
        response.cancel()
        raise StoreDown(f"the idempotency actor did not answer: {type(error).__name__}") from None


def _find_shards() -> list[DeploymentHandle]:
    """Handles, in the order of the shards. Raises StoreDown while there is no complete set."""
    found: dict[int, tuple[str, str]] = {}
    shards = 0
    for app, overview in serve.status().applications.items():
        for name in overview.deployments:
            if match := _SHARD.fullmatch(name):
                found[int(match[1])], shards = (name, app), int(match[2])
    if not found or sorted(found) != list(range(shards)):
        raise StoreDown("no idempotency actor is deployed")
    return [serve.get_deployment_handle(name, app) for _, (name, app) in sorted(found.items())]
