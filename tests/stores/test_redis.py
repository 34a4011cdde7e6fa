"""What is Redis's alone: a server that is unfit, full, gone, or back again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.core.idempotency import (
    RUNNING_MS,
    Emitted,
    Holdings,
    OverQuota,
    Proceed,
    Renewed,
    Replay,
    Settled,
    Step,
    Stored,
)
from serve_app.core.ledger import SHARDS
from serve_app.stores import Store, StoreDown, StoreUnfit, open_store
from serve_app.stores.redis_client import SETTINGS, unfit
from serve_app.stores.redis_wire import prefix
from tests.redis_server import RedisServer
from tests.stores.steps import BODY, Clock, abandon, begin, complete, emit, renew
from tests.stores.test_contract import WS, everything, fill, one


@pytest.fixture
async def store(redis_server: RedisServer, clock: Clock) -> AsyncIterator[Store]:
    store = await open_store(redis_server.url, clock=clock)
    yield store
    await store.close()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Of this test alone, which may do to it what it likes."""
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


# Unfit


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("appendonly", "no"),
        ("appendfsync", "everysec"),
        ("no-appendfsync-on-rewrite", "yes"),
        ("maxmemory-policy", "allkeys-lru"),
    ],
)
async def test_a_setting_that_may_lose_a_write_is_refused(own_redis: RedisServer, name: str, value: str) -> None:
    assert own_redis.command("CONFIG", "SET", name, value) == "+OK"

    with pytest.raises(StoreUnfit, match=rf"{name} {SETTINGS[name]}; this one has {value}"):
        await open_store(own_redis.url)


async def test_a_replica_is_refused(own_redis: RedisServer) -> None:
    own_redis.command("REPLICAOF", "127.0.0.1", "1")

    with pytest.raises(StoreUnfit, match="replicaof no one"):
        await open_store(own_redis.url)


async def test_settings_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis", rename_command='CONFIG ""')
    server.start()
    try:
        with pytest.raises(StoreUnfit, match=r"permit INFO and CONFIG GET.*cannot be checked"):
            await open_store(server.url)
    finally:
        server.stop()


GOOD = {"redis_version": "7.0.0", "redis_mode": "standalone", "role": "master"}


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"redis_version": "6.2.14"}, "version 7.0 or newer; this one is 6.2.14"),
        ({"redis_mode": "cluster"}, "cluster-enabled no"),
    ],
)
def test_a_server_of_another_kind_is_refused(info: dict[str, str], reason: str) -> None:
    assert unfit(GOOD, SETTINGS) is None
    assert reason in str(unfit(GOOD | info, SETTINGS))


@pytest.mark.parametrize("version", ["7.0.15", "7.4.1", "8.0.3", "10.0.0"])
def test_a_newer_version_is_fit(version: str) -> None:
    assert unfit(GOOD | {"redis_version": version}, SETTINGS) is None


async def test_a_url_that_cannot_be_read_is_refused_without_repeating_it() -> None:
    with pytest.raises(StoreUnfit) as refused:
        await open_store("redis://:secret@host:port/0")

    assert "secret" not in str(refused.value)


# Down


async def test_nobody_at_the_port_is_store_down() -> None:
    with pytest.raises(StoreDown):
        await open_store("redis://127.0.0.1:1/0")


async def test_it_is_down_while_redis_is_and_works_again_with_it(own_redis: RedisServer, clock: Clock) -> None:
    store = await open_store(own_redis.url, clock=clock)
    await store.run([begin()])

    own_redis.kill()
    for ask in (lambda: store.run([renew()]), lambda: store.holdings("ws"), lambda: store.events(WS, 0, 1)):
        with pytest.raises(StoreDown, match="Redis: ConnectionError") as down:
            await ask()
        assert down.value.__suppress_context__
    own_redis.start()

    assert await one(store, complete()) == Settled()
    await store.close()


async def test_everything_is_there_after_a_kill(own_redis: RedisServer, clock: Clock) -> None:
    store = await open_store(own_redis.url, clock=clock)
    await fill(store)
    before = await everything(store)

    await asyncio.to_thread(own_redis.restart)

    assert await everything(store) == before
    assert await one(store, emit("call-4")) == Emitted(new=False)
    await store.close()


async def test_what_was_answered_survives_kills_in_the_middle(own_redis: RedisServer, clock: Clock) -> None:
    store = await open_store(own_redis.url, clock=clock)
    settled = 0

    async def call(name: str) -> None:
        nonlocal settled
        steps: list[Step] = [begin(name, op=name), complete(name, op=name, tokens=1)]
        while True:
            with contextlib.suppress(StoreDown):
                await store.run(steps)
                settled += 1
                return
            await asyncio.sleep(0.01)

    async def caller(task: int) -> None:
        for n in range(60):
            await call(f"{task}-{n}")

    callers = asyncio.gather(*map(caller, range(4)))
    for _ in range(3):
        await asyncio.sleep(0.05)
        await asyncio.to_thread(own_redis.restart)
    await callers

    events = await store.events(WS, 0, 1000)
    assert settled == 240
    assert sorted(r.event.id for r in events) == sorted(f"{task}-{n}" for task in range(4) for n in range(60))
    assert [r.sequence for r in events] == list(range(1, 241))
    assert [(line.events, line.quantity) for line in await store.usage("ws", "0000", "9999")] == [(240, 240)]
    await store.close()


async def test_a_redis_that_comes_back_with_other_settings_is_refused(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    store = await open_store(own_redis.url)
    await store.run([begin()])
    await asyncio.to_thread(own_redis.restart, appendfsync="everysec")

    with caplog.at_level(logging.ERROR), pytest.raises(StoreDown, match="appendfsync always"):
        await store.run([complete()])
    assert "Redis must have appendfsync always; this one has everysec." in caplog.text

    await asyncio.to_thread(own_redis.restart, appendfsync="always")
    assert await one(store, complete()) == Settled()
    await store.close()


async def test_a_redis_that_does_not_answer_is_down(
    own_redis: RedisServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.stores.redis_client.ANSWER_S", 1.0)
    store = await open_store(own_redis.url, clock=clock)
    own_redis.command("CLIENT", "PAUSE", "30000", "WRITE")

    with pytest.raises(StoreDown, match="Redis: TimeoutError"):
        await store.run([begin()])

    own_redis.command("CLIENT", "UNPAUSE")
    assert isinstance(await one(store, begin()), Proceed)
    await store.close()


async def test_a_caller_that_goes_away_leaves_nobody_its_replies(store: Store) -> None:
    for n in range(20):
        going = asyncio.create_task(store.run([begin(f"gone-{n}-{i}") for i in range(20)]))
        await asyncio.sleep(0.0002 * n)
        going.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await going

        assert await store.run([emit(f"call-{n}"), begin(f"here-{n}")]) == [
            Emitted(new=True),
            Proceed(op="op-of-first", attempts=1),
        ]


async def test_scripts_that_redis_forgot_are_sent_again(store: Store, redis_server: RedisServer) -> None:
    await store.run([begin("a")])
    redis_server.command("SCRIPT", "FLUSH")

    assert await store.run([complete("a"), emit("call")]) == [Settled(), Emitted(new=True)]


async def test_an_unexpected_answer_is_down_and_quotes_nothing(store: Store, redis_server: RedisServer) -> None:
    redis_server.command("SET", f"serve-app:{{s{WS}}}:record:claim", "text")

    with pytest.raises(StoreDown) as down:
        await store.run([renew()])

    assert str(down.value) in ("Redis: WRONGTYPE", "Redis: ResponseError")


async def test_a_write_that_fails_half_way_leaves_nothing(store: Store, redis_server: RedisServer) -> None:
    """A script has no rollback: the event's write, which may fail, comes before all others."""
    await store.run([begin()])
    redis_server.command("SET", events := f"serve-app:{{s{WS}}}:events", "text")
    with pytest.raises(StoreDown):
        await store.run([complete()])
    redis_server.command("DEL", events)

    assert (await store.shard_state(WS)).last == 0
    assert await store.usage("ws", "0000", "9999") == []
    assert await one(store, complete()) == Settled()
    assert [recorded.sequence for recorded in await store.events(WS, 0, 10)] == [1]


# Full


async def test_when_memory_is_full_nothing_begins_and_everything_ends(own_redis: RedisServer, clock: Clock) -> None:
    store = await open_store(own_redis.url, clock=clock)
    await store.run([begin("a"), begin("b"), begin("c")])
    own_redis.command("CONFIG", "SET", "maxmemory", "1")

    with pytest.raises(StoreDown, match="OutOfMemory"):
        await store.run([begin("d")])
    assert await one(store, renew("a")) == Renewed()
    assert await one(store, complete("a")) == Settled()
    await store.run([abandon("b"), emit("call")])
    await store.trim(WS, 1)
    clock.tick(RUNNING_MS)
    assert await store.purge(10) == 1

    own_redis.command("CONFIG", "SET", "maxmemory", "0")
    assert await one(store, begin("a", "second")) == Replay(reply=Stored(body=BODY), op="op-of-first")
    assert isinstance(await one(store, begin("d")), Proceed)
    await store.close()


async def test_a_quota_never_counts_the_expired_however_many(store: Store, clock: Clock) -> None:
    await store.run([begin(f"old-{n}") for n in range(200)])
    clock.tick(RUNNING_MS)
    await store.run([begin("fresh", max_bytes=100)])

    refused = OverQuota(holdings=Holdings(records=1, bytes=100))
    assert await one(store, begin("more", max_records=1)) == refused


async def test_a_record_is_dropped_by_redis_itself_some_time_after_it_expired(
    store: Store, redis_server: RedisServer
) -> None:
    await store.run([begin(), complete()])

    left_ms = int(redis_server.command("PTTL", f"serve-app:{{s{WS}}}:record:claim").removeprefix(":"))
    assert 25 * 3600 * 1000 < left_ms < 26 * 3600 * 1000


async def test_all_keys_of_a_shard_lie_in_one_slot(store: Store, redis_server: RedisServer) -> None:
    await fill(store)
    keys = await _client(store).ask(("KEYS", "*"))

    of_the_opening = {f"{prefix(shard)}counted".encode() for shard in range(SHARDS)}
    tags = {key.decode().partition("{")[2].partition("}")[0] for key in keys[0] if key not in of_the_opening}
    assert tags == {f"s{WS}", "accounts"}
    assert all(key.startswith(b"serve-app:{") for key in keys[0])


def _client(store: Any) -> Any:
    return store._client
