"""The idempotency actor's work, without Ray: claims in batches to the store, and duplicates that wait in memory.

It holds nothing that the store does not: what waits here asks again elsewhere, and the cache holds replies that are
stored. The store decides every claim, so two desks for one key are slow, not wrong. `books.py` is the client.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence

from serve_app import tracing
from serve_app.core.idempotency import (
    Abandon,
    Begin,
    Busy,
    Capped,
    ClaimStep,
    Complete,
    Fenced,
    Freed,
    Mismatch,
    Outcome,
    Replay,
    Settled,
    Step,
)
from serve_app.gather import Gather
from serve_app.stores import Store

BATCH = 64  # steps in one write to the store
LOOK_AGAIN_S = 1.0  # the call that is waited for may have been finished at another desk
FRESH_S = 600.0  # how long a reply may be served from memory


class Desk:
    """One shard of the keys."""

    def __init__(self, store: Store, *, cache_bytes: int, waiters_per_key: int, waiters: int) -> None:
        self._write: Gather[Step, Outcome] = Gather(store.run, max_items=BATCH)
        self._claim: Gather[Step, Outcome] = Gather(store.run, max_items=BATCH)  # apart: a full Redis refuses no more
        self._replies = _Replies(cache_bytes)
        self._waiters_per_key = waiters_per_key
        self._most_waiters = waiters
        self._waiting: Counter[str] = Counter()
        self._news: dict[str, asyncio.Event] = {}  # by claim: something happened to it

    async def run(self, steps: Sequence[ClaimStep], traces: Mapping[int, str] | None = None) -> list[Outcome]:
        """Each step's outcome, durable. Raises StoreDown. traces: of the steps that have one, by their places."""
        traces = traces or {}
        return list(await asyncio.gather(*(self._run(step, traces.get(at)) for at, step in enumerate(steps))))

    async def wait(self, step: Begin, wait_s: float, trace: str | None = None) -> Outcome:
        """As `run`, but while another attempt holds the claim, wait: at most so long, and not as one too many."""
        until_s = time.monotonic() + wait_s
        with tracing.span("wait", trace):
            while True:
                outcome = await self._run(step)
                left_s = until_s - time.monotonic()
                if not isinstance(outcome, Busy) or left_s <= 0 or not self._may_wait(step.claim):
                    return outcome
                await self._hear(step.claim, min(left_s, outcome.lease_left_ms / 1000, LOOK_AGAIN_S))

    async def _run(self, step: ClaimStep, trace: str | None = None) -> Outcome:
        with tracing.span(type(step).__name__.lower(), trace):
            return await self._take(step)

    async def _take(self, step: ClaimStep) -> Outcome:
        if isinstance(step, Begin) and (known := self._replies.find(step)):
            return known
        with tracing.span("store"):
            outcome = await (self._claim if isinstance(step, Begin) else self._write)(step)
        if isinstance(step, Begin) and isinstance(outcome, Replay):
            self._replies.keep(step.claim, step.fingerprint, outcome)
        if isinstance(step, Complete | Abandon) and isinstance(outcome, Settled | Replay | Freed | Fenced | Capped):
            self._tell(step.claim)
        return outcome

    def _may_wait(self, claim: str) -> bool:
        return self._waiting[claim] < self._waiters_per_key and self._waiting.total() < self._most_waiters

    async def _hear(self, claim: str, at_most_s: float) -> None:
        news = self._news.setdefault(claim, asyncio.Event())
        self._waiting[claim] += 1
        try:
            async with asyncio.timeout(at_most_s):
                await news.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting[claim] -= 1
            if not self._waiting[claim]:
                del self._waiting[claim]
                self._news.pop(claim, None)

    def _tell(self, claim: str) -> None:
        if news := self._news.pop(claim, None):
            news.set()


class _Replies:
    """The replies that were asked for last, up to so many bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, tuple[float, str, Replay]] = OrderedDict()

    def find(self, step: Begin) -> Replay | Mismatch | None:
        until_s, fingerprint, reply = self._kept.get(step.claim, (0.0, "", None))
        if reply is None:
            return None
        if time.monotonic() > until_s:
            self._drop(step.claim)
            return None
        self._kept.move_to_end(step.claim)
        return reply if fingerprint == step.fingerprint else Mismatch()

    def keep(self, claim: str, fingerprint: str, reply: Replay) -> None:
        self._drop(claim)
        self._kept[claim] = (time.monotonic() + FRESH_S, fingerprint, reply)
        self._bytes += _size(reply)
        while self._bytes > self._most_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, claim: str) -> None:
        if gone := self._kept.pop(claim, None):
            self._bytes -= _size(gone[2])


def _size(reply: Replay) -> int:
    return 512 + len(reply.reply.body or b"")  # 512: the words around it
