"""Rate limits in the stores: each driver decides as `core.limits.decide` does."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
from pathlib import Path

import pytest

from serve_app.core.limits import FULL, NOTHING, Buckets, Budget, Charge, Cost, Limit, Verdict, decide
from serve_app.stores import Store, open_store
from serve_app.stores.redis_scripts import BUCKET_SLACK_MS
from tests.arrivals import arrive
from tests.redis_server import RedisServer
from tests.stores.steps import Clock

PRO = Limit(requests=Budget(per_minute=500))
BOTH = Limit(requests=Budget(per_minute=500), tokens=Budget(per_minute=7_000))
ONE = Cost(requests=1)


def charge(key: str = "key", limit: Limit = PRO, cost: Cost = ONE, owed: Cost = NOTHING) -> Charge:
    return Charge(key=key, limit=limit, cost=cost, owed=owed)


async def test_fifty_are_admitted_and_the_next_is_told_how_long(store: Store, clock: Clock) -> None:
    verdicts = await store.charge([charge()] * 51)
    assert [verdict.admitted for verdict in verdicts] == [True] * 50 + [False]
    assert verdicts[-1].wait.requests_us == pytest.approx(120_000)
    clock.tick(119)
    (verdict,) = await store.charge([charge()])
    assert not verdict.admitted
    clock.tick(1)
    (verdict,) = await store.charge([charge()])
    assert verdict.admitted


async def test_keys_have_buckets_of_their_own(store: Store) -> None:
    await store.charge([charge("one")] * 50)
    one, other = await store.charge([charge("one"), charge("other")])
    assert (one.admitted, other.admitted) == (False, True)


async def test_nothing_to_decide(store: Store) -> None:
    assert await store.charge([]) == []


async def test_two_processes_share_a_bucket(url: str, clock: Clock, store: Store) -> None:
    other = await open_store(url, clock=clock)
    try:
        verdicts = await asyncio.gather(*(each.charge([charge()] * 10) for each in (store, other) * 3))
        assert sum(verdict.admitted for batch in verdicts for verdict in batch) == 50
    finally:
        await other.close()


@pytest.mark.parametrize("seed", range(5))
async def test_it_decides_as_the_rule_says(store: Store, clock: Clock, seed: int) -> None:
    chance = random.Random(seed)
    buckets: dict[str, Buckets] = {}
    admitted = 0
    for _ in range(40):
        passed_ms = chance.choice([0, 0, 7, 400, 9_000])
        clock.tick(passed_ms)
        buckets = {
            key: Buckets(*(max(0.0, left_us - 1000 * passed_ms) for left_us in left)) for key, left in buckets.items()
        }
        batch = [
            charge(
                key=chance.choice("ab"),
                limit=chance.choice([PRO, BOTH]),
                cost=chance.choice([NOTHING, ONE, Cost(tokens=300), Cost(3, 2_000), Cost(20, 100)]),
                owed=chance.choice([NOTHING, NOTHING, Cost(2, 100), Cost(requests=-1)]),
            )
            for _ in range(chance.randint(1, 6))
        ]
        for ours, theirs in zip(batch, await store.charge(batch), strict=True):
            wanted = decide(buckets.get(ours.key, FULL), ours)
            buckets[ours.key] = wanted.buckets
            _same(theirs, wanted)
            admitted += wanted.admitted
    assert admitted > 20


def _same(one: Verdict, other: Verdict) -> None:
    # Unix microseconds in a float are good to a quarter of one, and each charge rounds.
    assert one.admitted == other.admitted
    assert one.wait == pytest.approx(other.wait, abs=50)
    assert one.buckets == pytest.approx(other.buckets, abs=50)


async def test_a_minute_on_a_real_store(store: Store, clock: Clock) -> None:
    figures = await arrive(clock, store=store, replicas=3, per_minute=500, load=1.5, minutes=1, seed=2)
    assert abs(figures.admitted - figures.ideal) <= 0.02 * figures.ideal
    assert figures.beyond <= figures.bound


async def test_full_buckets_are_forgotten(store: Store, clock: Clock) -> None:
    await store.charge([charge(owed=Cost(requests=10))])
    clock.tick(60_000)
    await store.purge(100)
    (verdict,) = await store.charge([charge(cost=NOTHING)])
    assert verdict == Verdict(wait=FULL, buckets=FULL)


async def test_full_rows_leave_the_file(tmp_path: Path, clock: Clock) -> None:
    store = await open_store(f"sqlite:{tmp_path / 'store.db'}", clock=clock)
    await store.charge([charge("gone"), charge("stays", cost=Cost(requests=50))])
    clock.tick(1_000)
    await store.purge(100)
    await store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db")) as db:
        assert db.execute("select key from buckets").fetchall() == [("stays",)]


async def test_redis_lets_them_expire(redis_server: RedisServer) -> None:
    store = await open_store(redis_server.url)
    await store.charge([charge(cost=Cost(requests=50))])
    await store.close()
    left_ms = int(redis_server.command("PTTL", "serve-app:{limits}:key").removeprefix(":"))
    assert 0 < left_ms <= BUCKET_SLACK_MS + 6_000
