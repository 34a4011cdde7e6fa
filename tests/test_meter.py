"""Reserved GPUs: what was seen is billed, by the hour, once, whatever happens to the meter."""

from __future__ import annotations

from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path

import pytest

from serve_app.core.catalog import ModelCard
from serve_app.core.keys import Plan, Workspace
from serve_app.core.ledger import SHARDS, UsageEvent
from serve_app.core.pricing import RateCard
from serve_app.meter import Meter
from serve_app.stores import Store, open_store
from tests.service.fakes import card

WORKSPACE = Workspace(id="ws_1", name="one", plan=Plan.PRO, created_ms=0)
NOON_MS = 1_764_158_400_000  # 2025-11-26, in UTC
MINUTE_MS = 60_000
HALF_A_GPU = card(reserved_by="ws_1", reserved_milli_gpus=500)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(f"sqlite:{tmp_path}/store.db")
    await store.add_workspace(WORKSPACE)
    yield store
    await store.close()


async def watch(store: Store, warm: list[ModelCard], first_minute: int, last_minute: int, *, every: int = 10) -> None:
    """A meter, new each time, that looks every so many minutes after noon."""
    meter = Meter(store)
    for minute in range(first_minute, last_minute + 1, every):
        await meter.look(warm, RateCard(), NOON_MS + minute * MINUTE_MS)


async def events(store: Store) -> list[UsageEvent]:
    return [recorded.event for shard in range(SHARDS) for recorded in await store.events(shard, 0, 1000)]


async def test_an_hour_is_billed_once_it_is_over(store: Store) -> None:
    await watch(store, [HALF_A_GPU], 0, 50)
    assert await events(store) == []
    await watch(store, [HALF_A_GPU], 60, 60)
    (hour,) = await events(store)
    assert (hour.workspace, hour.tier, hour.unit_price, hour.details["gpus"]) == ("ws_1", "active", "3", "0.5")
    assert hour.amount == Decimal("1.5")


async def test_the_hours_of_a_day_add_up_to_the_time_that_it_was_kept(store: Store) -> None:
    await watch(store, [HALF_A_GPU], 17, 437)
    await watch(store, [], 447, 447)
    billed = await events(store)
    assert len(billed) == 8  # 12:17 to 19:17
    assert sum(event.quantity for event in billed) == 500 * 7 * 3600
    assert await store.reservations() == []


async def test_a_meter_that_comes_back_goes_on_with_the_same_reservation(store: Store) -> None:
    await watch(store, [HALF_A_GPU], 0, 40)
    await watch(store, [HALF_A_GPU], 150, 150)  # nobody looked for nearly two hours
    assert [event.quantity for event in await events(store)] == [500 * 3600] * 2
    (reservation,) = await store.reservations()
    assert reservation.started_ms == NOON_MS


async def test_what_ended_unseen_ended_when_it_was_seen_last(store: Store) -> None:
    await watch(store, [HALF_A_GPU], 0, 40)
    await watch(store, [], 150, 150)
    (event,) = await events(store)
    assert event.quantity == 500 * 40 * 60


async def test_looking_twice_or_by_two_meters_bills_nothing_twice(store: Store) -> None:
    for _ in range(2):
        await watch(store, [HALF_A_GPU], 0, 180, every=30)
    await watch(store, [HALF_A_GPU], 180, 180)
    assert sum(event.quantity for event in await events(store)) == 500 * 3 * 3600


async def test_another_number_of_gpus_is_another_reservation(store: Store) -> None:
    await watch(store, [HALF_A_GPU], 0, 30)
    await watch(store, [card(reserved_by="ws_1", reserved_milli_gpus=2000)], 30, 60)
    await watch(store, [], 60, 60)
    assert sorted(event.quantity for event in await events(store)) == [500 * 30 * 60, 2000 * 30 * 60]


async def test_models_that_nobody_reserved_or_on_no_gpu_are_not_metered(store: Store) -> None:
    await watch(store, [card(), card(reserved_by="ws_1")], 0, 120)
    assert await store.reservations() == []
    assert await events(store) == []


async def test_a_workspace_that_does_not_exist_stops_nobody_elses_meter(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    unknown = card(id="other", name="other", reserved_by="ws_unknown", reserved_milli_gpus=1000)
    await store.add_workspace(Workspace(id="ws_starter", name="s", plan=Plan.STARTER, created_ms=1))
    starter = card(id="third", name="third", reserved_by="ws_starter", reserved_milli_gpus=1000)
    await watch(store, [unknown, starter, HALF_A_GPU], 0, 60, every=60)
    assert len(await events(store)) == 1
    assert caplog.text.count("which is no workspace on a plan") == 4
