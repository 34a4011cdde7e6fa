"""Reserved GPU hours: what a workspace pays for keeping replicas warm, from start and stop records.

The rule: a reservation is billed by the hour of the clock (UTC), an hour once it is over or the reservation ended in
it, in whole seconds, the begun second not counted, times the GPUs kept. `deployments/usage.py` sees starts and stops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal

import orjson

from serve_app.core import pricing
from serve_app.core.keys import Workspace
from serve_app.core.ledger import Kind, UsageEvent, hour_event_id
from serve_app.core.pricing import RateCard, Tier

HOUR_MS = 3600 * 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """GPUs kept for a workspace, in thousandths: half a GPU for each of two replicas is 1,000. Unix milliseconds."""

    id: str
    workspace: str
    model: str  # canonical name
    size_class: str
    milli_gpus: int
    started_ms: int
    seen_ms: int  # when it was last known to be there
    stopped_ms: int | None = None
    billed_ms: int = 0  # up to when

    def to_json(self) -> bytes:
        return orjson.dumps(self)

    @classmethod
    def from_json(cls, text: bytes | str) -> Reservation:
        return cls(**orjson.loads(text))

    @property
    def settled(self) -> bool:
        """Over, and billed to its end."""
        return self.stopped_ms is not None and self.billed_ms >= self.stopped_ms


def bill(
    reservation: Reservation, workspace: Workspace, rates: RateCard, now_ms: int
) -> tuple[Reservation, list[UsageEvent]]:
    """The reservation as billed up to now, and one event for each hour that became due. Doing it again adds nothing."""
    events, billed_ms = [], max(reservation.billed_ms, reservation.started_ms)
    end_ms = reservation.stopped_ms if reservation.stopped_ms is not None else now_ms - now_ms % HOUR_MS
    while billed_ms < end_ms:
        hour_ms = billed_ms - billed_ms % HOUR_MS
        until_ms = min(hour_ms + HOUR_MS, end_ms)
        if seconds := (until_ms - billed_ms) // 1000:
            events.append(_hour(reservation, workspace, rates, hour_ms, until_ms, seconds))
        billed_ms = until_ms
    return replace(reservation, billed_ms=billed_ms), events


def _hour(
    reservation: Reservation, workspace: Workspace, rates: RateCard, hour_ms: int, until_ms: int, seconds: int
) -> UsageEvent:
    return UsageEvent(
        id=hour_event_id(workspace.id, reservation.id, hour_ms),
        kind=Kind.GPU_TIME,
        workspace=workspace.id,
        time_ms=until_ms - 1,  # the last moment that it bills belongs to its day
        quantity=reservation.milli_gpus * seconds,
        unit_price=pricing.plain(rates.gpu_hour_price(workspace.plan)),
        rate_card=rates.version,
        plan=workspace.plan.value,
        tier=Tier.ACTIVE.value,
        model=reservation.model,
        size_class=reservation.size_class,
        details={
            "reservation": reservation.id,
            "gpus": pricing.plain(Decimal(reservation.milli_gpus) / 1000),
            "hour_start_ms": hour_ms,
            "seconds": seconds,
        },
    )
