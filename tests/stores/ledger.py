"""A store's ledger, read whole: what must be true of it at any time, whatever happened before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from serve_app.core.ledger import SHARDS, UsageEvent, UsageLine
from serve_app.stores import Store


class BrokenPromise(AssertionError):
    """The store answered, or kept, what it must not."""


def require(kept: bool, promise: str) -> None:
    if not kept:
        raise BrokenPromise(promise)


async def read_ledger(store: Store, shards: Sequence[int] = range(SHARDS)) -> list[UsageEvent]:
    """All events. Raises BrokenPromise if a sequence has gaps, or the sums are not theirs."""
    events: list[UsageEvent] = []
    for shard in shards:
        recorded = await store.events(shard, 0, 1_000_000)
        require([it.sequence for it in recorded] == list(range(1, len(recorded) + 1)), "sequences have no gaps")
        require((await store.shard_state(shard)).last == len(recorded), "a shard knows its last sequence")
        require(all(it.event.shard == shard for it in recorded), "an event lies in its shard")
        events += [it.event for it in recorded]
    sums = Counter(await store.usage(None, "0000-01-01", "9999-12-31"))
    require(sums == Counter(_lines(events)), "the sums are the sums of the events")
    return events


def _lines(events: list[UsageEvent]) -> list[UsageLine]:
    counts: Counter[tuple[str, ...]] = Counter()
    quantities: Counter[tuple[str, ...]] = Counter()
    for event in events:
        group = (event.workspace, event.day, event.kind, event.model, event.api_key, event.tier, event.unit_price)
        counts[group] += 1
        quantities[group] += event.quantity
    names = ("workspace", "day", "kind", "model", "api_key", "tier", "unit_price")
    return [
        UsageLine(**dict(zip(names, group, strict=True)), events=counts[group], quantity=quantities[group])  # type: ignore[arg-type]
        for group in counts
    ]
