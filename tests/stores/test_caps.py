"""A monthly spend cap in the stores: counted with the bill, refused once it is reached, and told of once."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.core import caps, pricing
from serve_app.core.idempotency import Capped, Complete, Emit, Emitted, Fenced, Proceed, Replay, Settled, Stored
from serve_app.core.keys import Plan, Workspace
from serve_app.core.ledger import Kind, UsageEvent, UsageLine, shard_of
from serve_app.core.reservations import Reservation
from serve_app.stores import Store, open_store
from serve_app.stores.redis import RedisStore
from serve_app.stores.redis_client import Client
from serve_app.stores.sqlite_schema import SCHEMA
from tests.redis_server import RedisServer
from tests.stores.ledger import read_ledger
from tests.stores.steps import BODY, NOW_MS, Clock, begin, complete, event

MONTH = "2025-11"
DAY_MS = 24 * 3600 * 1000
MILLION = 1_000_000  # tokens, at 0.012 US dollars: 12,000 micro-dollars
PICOS = 12_000 * caps.PICOS_PER_MICRO


def emit(id: str, cap_micros: int | None, quantity: int = MILLION, **other: Any) -> Emit:
    return Emit(event=event(id, quantity=quantity, **other), cap_micros=cap_micros)


async def notices(store: Store) -> list[UsageEvent]:
    return [it for it in await read_ledger(store) if it.kind is Kind.NOTICE]


async def test_spending_is_counted_by_workspace_and_month(store: Store) -> None:
    december_ms = NOW_MS + 5 * DAY_MS
    await store.run(
        [
            emit("a", None),
            *[emit("b", 10**9)] * 2,
            emit("c", None, time_ms=december_ms),
            Emit(event=event("d", workspace="other", quantity=1)),
        ]
    )
    assert await store.spent("ws", MONTH) == 2 * PICOS
    assert await store.spent("ws", "2025-12") == PICOS
    assert await store.spent("other", MONTH) == 12_000
    assert await store.spent("nobody", MONTH) == 0


async def test_the_bill_that_reaches_the_cap_is_the_last(store: Store) -> None:
    cap = 30_000
    outcomes = await store.run([emit(str(at), cap) for at in range(5)])
    assert outcomes == [Emitted(new=True)] * 3 + [Capped()] * 2
    assert await store.run([emit("0", cap)]) == [Emitted(new=False)], "what is billed is billed"
    assert await store.run([emit("more", 40_000)]) == [Emitted(new=True)]
    assert await store.run([emit("january", cap, time_ms=NOW_MS + 40 * DAY_MS)]) == [Emitted(new=True)]
    assert await store.run([emit("free", None)]) == [Emitted(new=True)]


async def test_a_cap_that_is_reached_exactly_is_reached(store: Store) -> None:
    assert await store.run([emit("a", 12_000), emit("b", 12_000)]) == [Emitted(new=True), Capped()]


async def test_a_cap_of_nothing_stops_everything(store: Store) -> None:
    assert await store.run([emit("a", 0)]) == [Capped()]
    assert await read_ledger(store) == []


async def test_a_capped_call_writes_nothing_and_frees_its_key(store: Store) -> None:
    await store.run([emit("a", None), begin()])
    capped = replace(complete(), cap_micros=12_000)
    assert await store.run([capped]) == [Capped()]
    assert [it.id for it in await read_ledger(store)] == ["a"]
    assert (await store.holdings("ws")).records == 0
    assert await store.run([capped, begin(attempt="second")]) == [Fenced(), Proceed(op="op-of-second", attempts=1)]


async def test_a_success_is_replayed_whatever_was_spent_since(store: Store) -> None:
    done = replace(complete(tokens=MILLION), cap_micros=12_000)
    await store.run([begin()])
    assert await store.run([done]) == [Settled()]
    assert await store.run([done]) == [Replay(reply=Stored(body=BODY), op="op-of-first")]
    assert await store.run([begin(attempt="second")]) == [Replay(reply=Stored(body=BODY), op="op-of-first")]


async def test_of_32_at_the_edge_one_gets_over(store: Store, url: str, clock: Clock) -> None:
    other = await open_store(url, clock=clock)
    await store.run([emit("before", 24_000, quantity=MILLION * 2 - 1)])
    try:
        steps = [emit(f"edge-{at}", 24_000) for at in range(32)]
        batches = [steps[at : at + 4] for at in range(0, 32, 4)]
        outcomes = await asyncio.gather(*((store, other)[at % 2].run(batch) for at, batch in enumerate(batches)))
    finally:
        await other.close()
    flat = [outcome for batch in outcomes for outcome in batch]
    assert sorted(map(repr, flat)) == sorted(map(repr, [Emitted(new=True)] + [Capped()] * 31))


async def test_it_is_told_once_at_80_and_once_at_100_per_cent(store: Store) -> None:
    cap = 100_000
    await store.run([emit(str(at), cap) for at in range(6)])
    assert await notices(store) == []
    await store.run([emit("6", cap), emit("6", cap)])
    (warning,) = await notices(store)
    assert (warning.workspace, warning.quantity, pricing.to_micros(warning.amount)) == ("ws", 0, 0)
    assert warning.details == {"month": MONTH, "cap_micros": cap, "percent_spent": 80}
    await store.run([emit(str(at), cap) for at in range(7, 20)])
    assert [it.details["percent_spent"] for it in await notices(store)] == [80, 100]
    assert [it.id for it in await read_ledger(store, [shard_of("ws")])][6:8] == ["6", warning.id], (
        "right behind its bill"
    )


async def test_one_bill_may_be_due_both(store: Store) -> None:
    await store.run([begin()])
    await store.run([replace(complete(tokens=MILLION), cap_micros=12_000)])
    assert [it.details["percent_spent"] for it in await notices(store)] == [80, 100]
    await store.run([begin("another"), replace(complete("another", tokens=MILLION), cap_micros=12_000)])
    assert len(await notices(store)) == 2


async def test_another_cap_is_told_of_anew(store: Store) -> None:
    await store.run([emit("a", 12_000), emit("b", 20_000)])
    assert [(it.details["cap_micros"], it.details["percent_spent"]) for it in await notices(store)] == [
        (12_000, 80),
        (12_000, 100),
        (20_000, 80),
        (20_000, 100),
    ]


async def test_reserved_hours_count_and_are_never_refused(store: Store) -> None:
    reservation = Reservation(
        id="r", workspace="ws", model="m", size_class="small", milli_gpus=1000, started_ms=NOW_MS, seen_ms=NOW_MS
    )
    hour = event("hour", quantity=3_600_000, kind=Kind.GPU_TIME, unit_price="2.70")
    for _ in range(2):
        await store.put_reservation(reservation, [hour])
    assert await store.spent("ws", MONTH) == 2_700_000 * caps.PICOS_PER_MICRO
    assert await store.run([emit("a", 2_700_000)]) == [Capped()]


async def test_a_reserved_hour_is_told_of_when_it_uses_up_the_cap(store: Store) -> None:
    """Else a workspace that keeps GPUs would come to its end unwarned."""
    reservation = Reservation(
        id="r", workspace="ws", model="m", size_class="small", milli_gpus=1000, started_ms=NOW_MS, seen_ms=NOW_MS
    )
    hours = [event(f"hour-{at}", quantity=3_600_000, kind=Kind.GPU_TIME, unit_price="2.70") for at in range(4)]
    for _ in range(2):
        await store.put_reservation(reservation, hours[:3], cap_micros=10_000_000)
    (warning,) = await notices(store)
    assert warning.details == {"month": MONTH, "cap_micros": 10_000_000, "percent_spent": 80}
    await store.put_reservation(reservation, hours[3:], cap_micros=10_000_000)
    await store.put_reservation(reservation, cap_micros=10_000_000)
    assert [it.details["percent_spent"] for it in await notices(store)] == [80, 100]
    assert await store.spent("ws", MONTH) == 10_800_000 * caps.PICOS_PER_MICRO


@pytest.mark.parametrize("before_it_reads", [True, False])
async def test_of_two_that_open_an_older_redis_one_is_heeded(redis_server: RedisServer, before_it_reads: bool) -> None:
    store = await open_store(redis_server.url)
    await store.run([Emit(event=event("a"))])
    await store.close()
    shard = f"serve-app:{{s{shard_of('ws')}}}:"
    redis_server.command("DEL", f"{shard}counted", f"{shard}spent:ws")

    class Overtaken(RedisStore):
        async def usage(self, workspace: str | None, first_day: str, last_day: str) -> list[UsageLine]:
            if before_it_reads:
                await another_opens_and_writes()
            lines = await super().usage(workspace, first_day, last_day)
            if not before_it_reads:
                await another_opens_and_writes()
            return lines

    async def another_opens_and_writes() -> None:
        other = await open_store(redis_server.url)
        await other.run([Emit(event=event("b"))])
        await other.close()

    slow = Overtaken(Client(redis_server.url), None)
    await slow.upgrade()
    assert await slow.spent("ws", MONTH) == 2 * 7 * 12_000
    await slow.close()


async def test_a_workspace_can_be_changed(store: Store) -> None:
    workspace = Workspace(id="ws", name="one", plan=Plan.PRO, created_ms=1)
    await store.add_workspace(workspace)
    changed = replace(workspace, monthly_cap_micros=5)
    await store.put_workspace(changed)
    assert await store.workspaces() == [changed]


async def test_an_older_sqlite_file_is_counted_when_it_is_opened(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "old.db")) as db:
        for statement in SCHEMA[0]:
            db.execute(statement)
        lines = [
            ("ws", "2025-11-01", "tokens", "m", "k", "flex", "0.012", 3, 7_000_001),
            ("ws", "2025-11-30", "gpu_time", "m", "", "active", "2.70", 1, 3_600_000),
            ("ws", "2025-12-01", "tokens", "m", "k", "flex", "0.008", 1, 14),
            ("ws two", "2025-11-01", "tokens", "m", "k", "flex", "0.1", 1, 1),
        ]
        db.executemany("insert into usage_days values (?, ?, ?, ?, ?, ?, ?, ?, ?)", lines)
        db.execute("pragma user_version=1")
        db.commit()
    store = await open_store(f"sqlite:{tmp_path / 'old.db'}")
    try:
        found = await store.usage(None, "", "9")
        for (workspace, month), of_month in caps.by_month(found).items():
            assert await store.spent(workspace, month) == pytest.approx(caps.picos_of_lines(of_month), rel=1e-12)
        assert await store.spent("ws", "2025-12") == 112_000
    finally:
        await store.close()


async def test_an_older_redis_is_counted_when_it_is_opened(redis_server: RedisServer) -> None:
    store = await open_store(redis_server.url)
    await store.run([Emit(event=event("a")), Emit(event=event("b", quantity=MILLION))])
    await store.close()
    shard = f"serve-app:{{s{shard_of('ws')}}}:"
    redis_server.command("DEL", f"{shard}counted", f"{shard}spent:ws")
    for _ in range(2):
        store = await open_store(redis_server.url)
        assert await store.spent("ws", MONTH) == PICOS + 7 * 12_000
        await store.close()


async def test_a_month_may_cost_more_than_an_integer_of_64_bits_can_count(store: Store) -> None:
    large = [emit(f"large-{at}", 10**15, quantity=2**53 + 1, unit_price="0.009") for at in range(3)]
    await store.run(large)
    assert await store.spent("ws", MONTH) == 3 * caps.picos(large[0].event) > 2**63
    assert await store.run([emit("small", 10**6), emit("free", 10**15, quantity=1)]) == [Capped(), Emitted(new=True)]
    assert await notices(store) == []


async def test_pico_dollars_are_carried(store: Store) -> None:
    await store.run([emit(f"call-{at}", None, quantity=83 + at) for at in range(40)])
    assert await store.spent("ws", MONTH) == sum(83 + at for at in range(40)) * 12_000


def test_what_is_rounded_is_a_trillionth_of_a_dollar() -> None:
    dearest = event("a", quantity=1, unit_price="999999999.999999999")
    assert caps.picos(dearest) == 1_000_000_000_000_000
    assert caps.picos(event("a", quantity=1, unit_price="0.000000001")) == 0
    assert caps.picos(event("a", quantity=1_000, unit_price="0.000000001")) == 1


def test_a_step_without_its_bill_has_no_cap() -> None:
    assert Complete(claim="c", workspace="w", op="o", reply=Stored(), bytes=0, event=None).cap_micros is None
