"""Meters reserved GPUs: start and stop records of what is kept warm, and a bill for each hour of it.

What is there at one look and at the next was there in between; what ended while nobody looked, ended when it was seen
last. The store keeps the record and its bills in one write, so a meter that dies bills nothing twice.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from dataclasses import replace

from serve_app.core.catalog import ModelCard
from serve_app.core.pricing import RateCard
from serve_app.core.reservations import Reservation, bill
from serve_app.stores import Store

logger = logging.getLogger(__name__)


class Meter:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def look(self, warm: Sequence[ModelCard], rates: RateCard, now_ms: int) -> None:
        """One look at the models that are warm now. rates: of the hours that became due. Raises StoreDown."""
        workspaces = {workspace.id: workspace for workspace in await self._store.workspaces()}
        known = await self._store.reservations()
        going_on = {_what(it): it for it in known if it.stopped_ms is None}
        there = {
            (card.reserved_by, card.name, card.reserved_milli_gpus): card for card in warm if card.reserved_milli_gpus
        }
        after = [it for it in known if it.stopped_ms is not None]
        for what, reservation in going_on.items():
            after.append(
                replace(reservation, seen_ms=now_ms)
                if what in there
                else replace(reservation, stopped_ms=reservation.seen_ms)
            )
        after += [_started(there[what], now_ms) for what in there.keys() - going_on.keys()]
        for reservation in after:
            workspace = workspaces.get(reservation.workspace)
            if workspace is None or not workspace.plan.has_keys:
                logger.error(
                    "%s is reserved by %s, which is no workspace on a plan", reservation.model, reservation.workspace
                )
                continue
            billed, events = bill(reservation, workspace, rates, now_ms)
            await self._store.put_reservation(billed, events, cap_micros=workspace.monthly_cap_micros)


def _what(reservation: Reservation) -> tuple[str, str, int]:
    return reservation.workspace, reservation.model, reservation.milli_gpus


def _started(card: ModelCard, now_ms: int) -> Reservation:
    assert card.reserved_by is not None
    return Reservation(
        id=uuid.uuid4().hex,
        workspace=card.reserved_by,
        model=card.name,
        size_class=card.size_class.value,
        milli_gpus=card.reserved_milli_gpus,
        started_ms=now_ms,
        seen_ms=now_ms,
    )
