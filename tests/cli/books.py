"""A store as days of service leave it: trimmed events, expired and living records, dead letters, two sinks."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import redis

from serve_app.core.idempotency import Begin, Complete, Emit, Stored
from serve_app.core.ledger import SHARDS, Kind, Recorded, UsageEvent, shard_of
from serve_app.core.replies import Reply
from serve_app.core.reservations import Reservation
from serve_app.relay import Relay
from serve_app.sinks import Refused, SinkSettings, open_sink
from serve_app.stores import Store, open_store
from serve_app.stores.blobs import Blobs

HOUR_MS = 3600 * 1000
OLD, NEW = "ws_00000000000000aa", "ws_00000000000000ab"  # the first has trimmed events
OLD_SHARD, NEW_SHARD = shard_of(OLD), shard_of(NEW)
assert OLD_SHARD != NEW_SHARD
CLAIM, BLOB_CLAIM, RUNNING_CLAIM, LATE_CLAIM = "claim-1", "claim-2", "claim-3", "claim-4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    url: str
    files: Path  # of the sink `files`, which has all but LATE_CLAIM's event
    blobs: Path

    def audit(self) -> list[str]:
        """The words of the command."""
        sinks = ["--sink", f"files=jsonl:{self.files}", "--sink", "hooks"]
        return ["ledger", "audit", "--store", self.url, "--blobs", str(self.blobs), *sinks]


class Originals:
    """Books of each driver, made once and copied: most tests want some of their own to spoil."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._dumps: dict[bytes, tuple[bytes, int]] = {}

    def copy(self, url: str, folder: Path) -> Books:
        """url: of an empty store."""
        scheme = url.partition(":")[0]
        original = self._folder / scheme
        if not original.exists():
            asyncio.run(make(f"sqlite:{original / 'store.db'}" if scheme == "sqlite" else url, original))
            if scheme == "redis":
                self._dump(url)
        elif scheme == "redis":
            self._restore(url)
        shutil.copytree(original, folder, dirs_exist_ok=True)
        return Books(url=url, files=folder / "usage", blobs=folder / "blobs")

    def _dump(self, url: str) -> None:
        with closing(redis.Redis.from_url(url)) as client:
            client_: Any = client
            self._dumps = {key: (client_.dump(key), max(0, client_.pttl(key))) for key in client_.scan_iter()}

    def _restore(self, url: str) -> None:
        with closing(redis.Redis.from_url(url)) as client:
            for key, (dump, ttl_ms) in self._dumps.items():
                client.restore(key, ttl_ms, dump)


class Hooks:
    """Refuses what is of 13 tokens."""

    async def deliver(self, shard: int, batch: Sequence[Recorded]) -> list[Refused]:
        return [Refused(recorded=it, reason="unlucky") for it in batch if it.event.quantity == 13]

    async def close(self) -> None: ...


class Clock:
    def __init__(self, now_ms: int) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms


def op_of(claim: str) -> str:
    return hashlib.sha256(claim.encode()).hexdigest()[:32]


def event(id: str, workspace: str, quantity: int, time_ms: int, **other: Any) -> UsageEvent:
    fields: dict[str, Any] = {
        "kind": Kind.TOKENS,
        "unit_price": "0.009",
        "rate_card": "default-1",
        "plan": "enterprise",
        "tier": "flex",
        "model": "BAAI/bge-m3",
        "size_class": "base",
        "api_key": "key_1",
    }
    return UsageEvent(id=id, workspace=workspace, quantity=quantity, time_ms=time_ms, **fields | other)


def packed(tokens: int) -> bytes:
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    vectors = np.ones((1, 4), np.float32)
    return Reply(
        vectors=vectors, model="m", usage=usage, encoding_format="base64", fingerprint="f", request_id="r"
    ).pack()


async def make(url: str, folder: Path) -> Books:
    clock = Clock(time.time_ns() // 1_000_000 - 80 * HOUR_MS)
    books = Books(url=url, files=folder / "usage", blobs=folder / "blobs")
    store = await open_store(url, clock=clock)
    files = open_sink(SinkSettings(name="files", url=f"jsonl:{books.files}"), source="/serve-app")
    relay = Relay(store, {"files": files, "hooks": Hooks()}, now_ms=clock, sleep=_no_sleep)
    for at in range(4):
        await store.run([Emit(event=event(f"old-{at}", OLD, 10 + at, clock()))])
    await call(store, "claim-0", OLD, clock(), tokens=21)
    await bring(relay)
    clock.now_ms += 78 * HOUR_MS
    assert await relay.trim(48 * HOUR_MS) == 5
    await call(store, CLAIM, OLD, clock(), tokens=33)
    await store.run([Emit(event=event(f"new-{at}", NEW, 12 + at, clock())) for at in range(4)])
    blobs = Blobs(books.blobs)
    name = f"{op_of(BLOB_CLAIM)}-{'0' * 32}"
    blobs.write(name, packed(44))
    await call(store, BLOB_CLAIM, NEW, clock(), tokens=44, reply=Stored(blob=name))
    hour = event("hour", NEW, 1_800_000, clock(), kind=Kind.GPU_TIME, unit_price="2.4", api_key="")
    reservation = Reservation(
        id="r",
        workspace=NEW,
        model="BAAI/bge-m3",
        size_class="base",
        milli_gpus=500,
        started_ms=clock(),
        seen_ms=clock(),
    )
    await store.put_reservation(reservation, [hour])
    await store.run([begin(RUNNING_CLAIM, NEW)])
    await bring(relay)
    await call(store, LATE_CLAIM, NEW, clock(), tokens=5)
    await files.close()
    await store.close()
    return books


async def call(
    store: Store, claim: str, workspace: str, now_ms: int, *, tokens: int, reply: Stored | None = None
) -> None:
    """A request with a key."""
    bill = event(op_of(claim), workspace, tokens, now_ms, details={"idempotency": claim})
    done = Complete(
        claim=claim,
        workspace=workspace,
        op=op_of(claim),
        reply=reply or Stored(body=packed(tokens)),
        bytes=100,
        event=bill,
    )
    await store.run([begin(claim, workspace), done])


async def bring(relay: Relay) -> None:
    """All that there is."""
    for name in ("files", "hooks"):
        for shard in range(SHARDS):
            while await relay._bring(name, shard):
                pass


def begin(claim: str, workspace: str) -> Begin:
    return Begin(
        claim=claim,
        workspace=workspace,
        fingerprint="print",
        attempt="first",
        op=op_of(claim),
        lease_ms=10_000,
        reserve_bytes=100,
        max_bytes=10_000,
        max_records=10,
    )


async def _no_sleep(_: float) -> None: ...
