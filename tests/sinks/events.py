"""Usage events for the tests of sinks and of the relay."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence

from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from serve_app.core.ledger import SHARDS, Kind, Recorded, UsageEvent, shard_of

NOON_MS = int(dt.datetime(2026, 11, 25, 12, tzinfo=dt.UTC).timestamp() * 1000)
DAY_MS = 24 * 3600 * 1000


def workspace_of(shard: int) -> str:
    """A workspace whose events lie in that shard."""
    return next(name for number in range(1000) if shard_of(name := f"ws-{number}") == shard)


WORKSPACES = [workspace_of(shard) for shard in range(SHARDS)]


def usage_event(number: int, *, shard: int = 0, time_ms: int = NOON_MS, quantity: int = 7) -> UsageEvent:
    return UsageEvent(
        id=f"{shard}-{number}",
        kind=Kind.TOKENS,
        workspace=WORKSPACES[shard],
        time_ms=time_ms,
        quantity=quantity,
        unit_price="0.01",
        rate_card="default-1",
        plan="pro",
        tier="flex",
        model="acme/model",
        size_class="small",
        api_key="key-1",
        details={"request_id": f"req-{number}"},
    )


def recorded(sequence: int, *, shard: int = 0, time_ms: int = NOON_MS) -> Recorded:
    return Recorded(sequence=sequence, event=usage_event(sequence, shard=shard, time_ms=time_ms))


def batch(sequences: Iterable[int], *, shard: int = 0, time_ms: int = NOON_MS) -> list[Recorded]:
    return [recorded(sequence, shard=shard, time_ms=time_ms) for sequence in sequences]


def as_cloud_event(text: bytes) -> CloudEvent:
    """As the CloudEvents SDK reads it: it raises if the event is not one."""
    event = JSONFormat().read(CloudEvent, text)
    assert isinstance(event, CloudEvent)
    return event


def ids(events: Sequence[Recorded]) -> list[str]:
    return [each.event.id for each in events]
