"""What a service has billed, by its ledger."""

from __future__ import annotations

from serve_app.core.ledger import SHARDS, Kind
from serve_app.stores import open_store

PAGE = 500


async def billed(url: str) -> tuple[int, int]:
    """Events of tokens in the store at this url, and their sum."""
    store, events, tokens = await open_store(url), 0, 0
    for shard in range(SHARDS):
        place = 0
        while page := await store.events(shard, place, PAGE):
            quantities = [it.event.quantity for it in page if it.event.kind is Kind.TOKENS]
            events, tokens, place = events + len(quantities), tokens + sum(quantities), page[-1].sequence
    await store.close()
    return events, tokens
