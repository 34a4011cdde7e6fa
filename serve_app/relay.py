"""Brings usage events from the ledger to the sinks: in order within a shard, at least once, and none is ever dropped.

Each sink has a task, a back-off and a cursor a shard of its own, so that one that is slow or down holds nobody up, and
one batch in memory at most. What a sink refuses for good becomes a dead letter in the write that moves its cursor.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from serve_app.core.ledger import SHARDS, Recorded
from serve_app.sinks import MAX_BATCH, Refused, Sink, SinkDown
from serve_app.stores import Cursor, DeadLetter, Store, StoreDown

POLL_S = 0.5  # between looks at a ledger that has nothing new
STORE_RETRY_S = 1.0
MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 300.0  # of a sink that is down
MAX_RETRY_AFTER_S = 3600.0  # a receiver may ask for a longer pause than ours, but not for ever
TRIM_INTERVAL_MS = 3600 * 1000
TRIM_PAUSE_S = 0.05  # between two batches, for those who write

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """events: not yet acknowledged, without dead letters. since_s: since the sink last took what there was to take."""

    events: int
    since_s: float


class Relay:
    """Opens and closes nothing: store and sinks are its owner's."""

    def __init__(
        self,
        store: Store,
        sinks: Mapping[str, Sink],
        *,
        now_ms: Callable[[], int],
        sleep: Callable[[float], Awaitable[None]],
        random: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._sinks = sinks
        self._now_ms = now_ms
        self._sleep = sleep
        self._random = random
        self._turns = {name: asyncio.Lock() for name in sinks}  # cursors are read, moved on and written back
        self._up_ms = dict.fromkeys(sinks, now_ms())
        self._trimmed_ms: int | None = None

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for name in self._sinks:
                tasks.create_task(self._feed(name), name=f"sink {name}")
            await asyncio.Event().wait()  # without sinks, too

    async def _feed(self, name: str) -> None:
        failures = empty = 0
        for shard in itertools.cycle(range(SHARDS)):  # a shard that cannot be delivered does not starve the others
            pause_s = 0.0
            try:
                brought = await self._bring(name, shard)
                failures, empty = (0, 0) if brought else (failures, empty + 1)
                if brought or empty == SHARDS:
                    self._up_ms[name] = self._now_ms()
            except Exception as error:
                failures += not isinstance(error, StoreDown)
                pause_s = self._pause_s(failures, error)
                _report(name, error, pause_s)
                traceback.clear_frames(error.__traceback__)  # they hold the batch, for as long as the error is there
            if pause_s or empty == SHARDS:
                empty = 0
                await self._sleep(pause_s or POLL_S)

    async def _bring(self, name: str, shard: int) -> bool:
        """One batch. False: there is nothing new."""
        async with self._turns[name]:
            cursor = await self._store.cursor(name, shard)
            batch = await self._store.events(shard, cursor.sequence, MAX_BATCH)
            if batch:
                refused = await self._sinks[name].deliver(shard, batch)
                await self._store.advance(name, shard, cursor, _after(cursor, batch, refused), _dead(shard, refused))
                for refusal in refused:
                    logger.error("sink %s refuses event %s: %s", name, refusal.recorded.event.id, refusal.reason)
        return bool(batch)

    def _pause_s(self, failures: int, error: Exception) -> float:
        if isinstance(error, StoreDown):
            return STORE_RETRY_S
        longest_s = min(MAX_PAUSE_S, MIN_PAUSE_S * 2.0 ** min(failures, 16))
        asked_s = (error.retry_after_s or 0.0) if isinstance(error, SinkDown) else 0.0
        return max(longest_s * (0.5 + self._random() / 2), min(asked_s, MAX_RETRY_AFTER_S))

    async def retry_dead(self, name: str) -> int:
        """Send the dead letters again, and bury those that are taken now: how many. Raises SinkDown, StoreDown."""
        taken = 0
        for letter in await self._store.dead_letters(name):
            async with self._turns[name]:
                if not await self._sinks[name].deliver(letter.shard, [letter.recorded]):
                    await self._store.bury(name, letter.shard, letter.recorded.sequence)
                    taken += 1
        return taken

    async def lag(self) -> dict[str, Lag]:
        """By sink. Raises StoreDown."""
        states = [await self._store.shard_state(shard) for shard in range(SHARDS)]
        lags = {}
        for name in self._sinks:
            events = 0
            for shard, state in enumerate(states):
                cursor = await self._store.cursor(name, shard)
                events += max(0, state.last - max(cursor.sequence, state.trimmed.sequence))
            lags[name] = Lag(events=events, since_s=(self._now_ms() - self._up_ms[name]) / 1000)
        return lags

    async def trim(self, keep_ms: int) -> int:
        """Remove events older than that which every sink has acknowledged: how many. Without sinks, none.

        Does nothing when it did so within the hour. Raises StoreDown.
        """
        now_ms = self._now_ms()
        if not self._sinks or (self._trimmed_ms is not None and now_ms - self._trimmed_ms < TRIM_INTERVAL_MS):
            return 0
        removed = sum([await self._trim_shard(shard, now_ms - keep_ms) for shard in range(SHARDS)])
        self._trimmed_ms = now_ms
        return removed

    async def _trim_shard(self, shard: int, before_ms: int) -> int:
        acknowledged = min([(await self._store.cursor(name, shard)).sequence for name in self._sinks])
        after, removed = (await self._store.shard_state(shard)).trimmed.sequence, 0
        while batch := await self._store.events(shard, after, MAX_BATCH):
            old = list(
                itertools.takewhile(lambda it: it.sequence <= acknowledged and it.event.time_ms < before_ms, batch)
            )
            if not old:
                break
            after, removed = old[-1].sequence, removed + len(old)
            await self._store.trim(shard, after)
            if len(old) < len(batch):
                break
            await self._sleep(TRIM_PAUSE_S)
        return removed


def _after(cursor: Cursor, batch: Sequence[Recorded], refused: Sequence[Refused]) -> Cursor:
    dead = {refusal.recorded.sequence for refusal in refused}
    taken = [recorded.event.quantity for recorded in batch if recorded.sequence not in dead]
    return Cursor(sequence=batch[-1].sequence, events=cursor.events + len(taken), quantity=cursor.quantity + sum(taken))


def _dead(shard: int, refused: Sequence[Refused]) -> list[DeadLetter]:
    return [DeadLetter(shard=shard, recorded=refusal.recorded, reason=refusal.reason) for refusal in refused]


def _report(name: str, error: Exception, pause_s: float) -> None:
    if isinstance(error, SinkDown | StoreDown):
        logger.warning("sink %s: %s; next try in %.0f s", name, error, pause_s)
    else:  # a mistake of ours; not its message, which may quote what we must not log
        where = "".join(traceback.format_tb(error.__traceback__))
        logger.error("sink %s: %s; next try in %.0f s\n%s", name, type(error).__qualname__, pause_s, where)
