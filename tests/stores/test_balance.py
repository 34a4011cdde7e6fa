"""The ledger's events against the sums of usage, by their counts, in both stores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serve_app.balance import DAY_MS, Balance
from serve_app.core.idempotency import Emit
from serve_app.core.ledger import UsageLine, shard_of
from serve_app.stores import Store
from tests.cli.tamper import Tamper, tamper_with
from tests.stores.steps import NOW_MS, Clock, emit, event


@pytest.fixture
def balance(store: Store, clock: Clock) -> Balance:
    return Balance(store, now_ms=clock)


@pytest.fixture
def tamper(url: str, store: Store) -> Iterator[Tamper]:
    with tamper_with(url) as tamper:
        yield tamper


async def test_what_is_billed_balances_notices_and_trimmed_events_too(
    store: Store, clock: Clock, balance: Balance
) -> None:
    assert await balance.difference() == 0
    for day in range(5):
        bills = [emit(f"{day}-{number}", workspace=f"ws-{number % 3}", time_ms=clock()) for number in range(20)]
        capped = Emit(event=event(f"{day}-capped", quantity=10**9, time_ms=clock()), cap_micros=10**6)
        await store.run([*bills, capped])
        assert await balance.difference() == 0
        clock.tick(DAY_MS)
    for shard in range(8):
        await store.trim(shard, (await store.shard_state(shard)).last)
    assert await balance.difference() == 0
    assert await Balance(store, now_ms=clock).difference() == 0


@pytest.mark.parametrize("looks_before", [0, 1, 3])
async def test_a_sum_or_an_event_that_is_missing_shows(
    store: Store, clock: Clock, balance: Balance, tamper: Tamper, looks_before: int
) -> None:
    for day in range(1 + looks_before):
        await store.run([emit(f"{day}-{number}", time_ms=clock()) for number in range(3)])
        if day < looks_before:
            assert await balance.difference() == 0
        clock.tick(DAY_MS)
    lines = 1 + looks_before
    tamper.change_usage("ws", events=2)
    assert await balance.difference() == 2 * lines
    tamper.change_last(shard_of("ws"), 2 * lines)
    assert await balance.difference() == 0
    tamper.change_last(shard_of("ws"), 3)
    assert await balance.difference() == -3


async def test_a_bill_for_a_day_long_gone_is_no_difference(store: Store, clock: Clock, balance: Balance) -> None:
    await store.run([emit("first")])
    for _ in range(3):
        assert await balance.difference() == 0
        clock.tick(20 * DAY_MS)
    await store.run([emit("late", time_ms=NOW_MS + DAY_MS), emit("new", time_ms=clock())])
    assert await balance.difference() == 0


async def test_bills_that_come_while_it_looks_are_no_difference(
    store: Store, balance: Balance, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = store.usage
    asked: list[str] = []

    async def busy_usage(workspace: str | None, first_day: str, last_day: str) -> list[UsageLine]:
        asked.append(first_day)
        await store.run([emit(f"before-{len(asked)}")])
        lines = await usage(workspace, first_day, last_day)
        await store.run([emit(f"after-{len(asked)}")])
        return lines

    monkeypatch.setattr(store, "usage", busy_usage)
    for _ in range(4):
        assert await balance.difference() == 0
    assert len(asked) == 4, "none had to be looked at again"
    assert asked[0] < asked[1] == asked[3], "and later ones not whole"
