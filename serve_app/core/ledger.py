"""The ledger: usage events, where they lie, how they leave, and the lines they add up to.

One event for each successful request that is no replay, and one for each reserved hour; an event's id is derived from
what it bills, so writing it twice is writing it once. `stores/` keep events in shards with gap-free sequence numbers,
`sinks/` carry them out, `audit.py` compares all of it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Any

import orjson

from serve_app.core import pricing

SHARDS = 8  # of the ledger. Not to be changed: a workspace's events keep their order within one shard
EVENT_VERSION = "1"
FIRST_DAY, LAST_DAY = "0000-01-01", "9999-12-31"  # of all sums that there can be


class Kind(StrEnum):
    """What a quantity counts."""

    TOKENS = "tokens"
    GPU_TIME = "gpu_time"
    """GPU-milliseconds of reserved GPUs."""
    NOTICE = "notice"
    """Nothing: it costs nothing, and tells how much of a spend cap is used."""

    @property
    def event_type(self) -> str:
        """The CloudEvents type."""
        return {
            Kind.TOKENS: "ai.embeddings.usage.v1",
            Kind.GPU_TIME: "ai.gpu.reservation.v1",
            Kind.NOTICE: "ai.workspace.spend_notice.v1",
        }[self]

    @property
    def per_price(self) -> int:
        """How much of the quantity the unit price buys."""
        return {
            Kind.TOKENS: pricing.TOKENS_PER_PRICE,
            Kind.GPU_TIME: pricing.GPU_MILLISECONDS_PER_PRICE,
            Kind.NOTICE: 1,
        }[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageEvent:
    """One billable fact, or a notice. Plan, tier and price are the service's own, never from a request."""

    id: str
    kind: Kind
    workspace: str
    time_ms: int  # Unix milliseconds: when the request succeeded, or the hour ended
    quantity: int  # tokens, or GPU-milliseconds
    unit_price: str  # US dollars per million tokens, or per GPU and hour; a decimal
    rate_card: str
    plan: str
    tier: str
    model: str  # canonical name
    size_class: str
    api_key: str = ""  # the key's id, never its text
    details: dict[str, Any] = field(default_factory=dict, repr=False)  # what is of interest, but prices nothing

    @property
    def amount(self) -> Decimal:
        """US dollars, exact."""
        return amount(self.kind, self.quantity, self.unit_price)

    @property
    def shard(self) -> int:
        return shard_of(self.workspace)

    @property
    def day(self) -> str:
        """Of `time_ms`, in UTC: 2026-11-25."""
        return day_of(self.time_ms)

    def to_json(self) -> bytes:
        return orjson.dumps(self)

    @classmethod
    def from_json(cls, text: bytes | str) -> UsageEvent:
        fields = orjson.loads(text)
        return cls(**fields | {"kind": Kind(fields["kind"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """An event in its place: `sequence` counts from 1 in each shard, without gaps."""

    sequence: int
    event: UsageEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageLine:
    """What a workspace used on one day, of one model, through one key, at one price."""

    workspace: str
    day: str
    kind: Kind
    model: str
    api_key: str
    tier: str
    unit_price: str
    events: int
    quantity: int

    @property
    def amount(self) -> Decimal:
        """US dollars, exact."""
        return amount(self.kind, self.quantity, self.unit_price)


def amount(kind: Kind, quantity: int, unit_price: str) -> Decimal:
    """US dollars, exact: no rounding before `pricing.to_micros`."""
    if kind is Kind.TOKENS:
        return Decimal(unit_price) * quantity / kind.per_price
    # Thirds have no end: an hour's price is kept as the nearest 1e-15 dollar, a billionth of what a line is rounded to.
    return (Decimal(unit_price) * quantity / kind.per_price).quantize(Decimal("1e-15"))


def day_of(time_ms: int) -> str:
    """In UTC: 2026-11-25."""
    return _utc(time_ms).date().isoformat()


def month_of(day: str) -> str:
    """2026-11."""
    return day[:7]


def shard_of(workspace: str) -> int:
    return zlib.crc32(workspace.encode()) % SHARDS


def call_event_id(workspace: str, call: str) -> str:
    """For a request without an Idempotency-Key. call: minted by the service; a caller's X-Request-Id may repeat."""
    return _derived("call", workspace, call)


def hour_event_id(workspace: str, reservation: str, hour_start_ms: int) -> str:
    return _derived("hour", workspace, reservation, str(hour_start_ms))


def notice_event_id(workspace: str, month: str, cap_micros: int, percent: int) -> str:
    return _derived("notice", workspace, month, str(cap_micros), str(percent))


def cloud_event(recorded: Recorded, source: str) -> dict[str, Any]:
    """CloudEvents 1.0, as JSON fields. `source` + `id` are unique; `sequence` has no gaps within a `source`."""
    event = recorded.event
    data = event.details | {  # in this order: no detail may pass for what is billed
        "version": EVENT_VERSION,
        "workspace": event.workspace,
        "kind": event.kind.value,
        "quantity": event.quantity,
        "unit_price": event.unit_price,
        "amount": pricing.plain(event.amount),
        "currency": "USD",
        "rate_card": event.rate_card,
        "plan": event.plan,
        "tier": event.tier,
        "model": event.model,
        "size_class": event.size_class,
        "api_key": event.api_key or None,
    }
    if event.kind is Kind.TOKENS:
        data["input_tokens"] = event.quantity
    return {
        "specversion": "1.0",
        "id": event.id,
        "source": f"{source}/{event.shard}",
        "type": event.kind.event_type,
        "subject": event.workspace,
        "time": _utc(event.time_ms).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "sequence": f"{recorded.sequence:020d}",  # as text, in the order of numbers
        "data": data,
    }


def report(lines: Sequence[UsageLine], by: Sequence[str]) -> list[dict[str, Any]]:
    """Lines added up by any of day, model, api_key: the rows of `GET /v1/usage`. Each row is rounded once."""
    return [_row(by, group, found) for group, found in grouped(lines, (*by, "kind")).items()]


def grouped(lines: Sequence[UsageLine], by: Sequence[str]) -> dict[tuple[str, ...], list[UsageLine]]:
    """By the values of these fields, in their order; notices are no usage."""
    groups: dict[tuple[str, ...], list[UsageLine]] = {}
    for line in lines:
        if line.kind is Kind.NOTICE:
            continue
        groups.setdefault(tuple(getattr(line, name) for name in by), []).append(line)
    return dict(sorted(groups.items()))


def total_micros(lines: Sequence[UsageLine]) -> int:
    """All of it, exact and then rounded: the sum of rounded rows may differ by half a micro-dollar a row."""
    return pricing.to_micros(sum((line.amount for line in lines), Decimal(0)))


def _row(by: Sequence[str], group: tuple[str, ...], lines: Sequence[UsageLine]) -> dict[str, Any]:
    events, quantity = sum(line.events for line in lines), sum(line.quantity for line in lines)
    if lines[0].kind is Kind.TOKENS:
        used: dict[str, Any] = {"requests": events, "input_tokens": quantity}
    else:
        hours = Decimal(quantity) / Kind.GPU_TIME.per_price
        used = {"reserved_gpu_hours": pricing.plain(hours.quantize(Decimal("1e-6")))}
    exact = sum((line.amount for line in lines), Decimal(0))
    return dict(zip((*by, "kind"), group, strict=True)) | used | {"amount_micros": pricing.to_micros(exact)}


def _derived(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _utc(time_ms: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(time_ms / 1000, tz=dt.UTC)
