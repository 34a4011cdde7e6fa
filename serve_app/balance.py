"""Whether the ledger's events and the sums that usage is read from count alike, looked at while both grow.

One write adds to both, so anything but 0 is a bug or somebody's hand. The audit compares line by line and reads every
event; this reads counts alone, of the last days, and can be asked every few minutes.
"""

from __future__ import annotations

from collections.abc import Callable

from serve_app.core.ledger import FIRST_DAY, LAST_DAY, SHARDS, day_of
from serve_app.stores import Store

DAY_MS = 24 * 3600 * 1000


class Balance:
    def __init__(self, store: Store, *, now_ms: Callable[[], int]) -> None:
        self._store = store
        self._now_ms = now_ms
        self._since = FIRST_DAY  # what was counted of earlier days is in `_earlier`
        self._earlier = 0

    async def difference(self) -> int:
        """Events that the sums count more than the ledger has; below 0, fewer. Raises StoreDown.

        The first look reads all sums, a later one those since the day before it was last asked. If they differ, all
        are read again: a reserved hour may be billed, for a day long gone, weeks after it.
        """
        difference = await self._look()
        if difference and self._since != FIRST_DAY:
            self._since, self._earlier = FIRST_DAY, 0
            difference = await self._look()
        return difference

    async def _look(self) -> int:
        """Events may come meanwhile: the sums are right if they lie between what the ledger had before and after."""
        recent = day_of(self._now_ms() - DAY_MS)  # a bill that was tried again may belong to yesterday
        before = await self._events()
        lines = await self._store.usage(None, self._since, LAST_DAY)
        after = await self._events()
        counted = self._earlier + sum(line.events for line in lines)
        self._earlier += sum(line.events for line in lines if line.day < recent)
        self._since = max(self._since, recent)
        return counted - min(max(counted, before), after)

    async def _events(self) -> int:
        """All that ever were: sequence numbers have no gaps, and what is trimmed was counted."""
        return sum([(await self._store.shard_state(shard)).last for shard in range(SHARDS)])
