"""Duplicates wait for the first call, bounded in number and time; what is remembered here is in the store, too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from serve_app.core.idempotency import Busy, Freed, Mismatch, Outcome, Proceed, Replay, Settled, Step
from serve_app.desk import Desk
from serve_app.stores import Store, StoreDown, open_store
from tests.stores.steps import abandon, begin, complete


class Watched:
    """A store that counts the steps it is asked."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.steps: list[Step] = []
        self.writes = 0
        self.down = False

    async def run(self, steps: Sequence[Step]) -> list[Outcome]:
        self.steps += steps
        self.writes += 1
        if self.down:
            raise StoreDown("down")
        return await self.store.run(steps)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Watched]:
    store = await open_store(f"sqlite:{tmp_path}/store.db")
    yield Watched(store)
    await store.close()


def desk_of(store: Watched, *, cache_bytes: int = 1_000_000, per_key: int = 100, waiters: int = 1_000) -> Desk:
    return Desk(store, cache_bytes=cache_bytes, waiters_per_key=per_key, waiters=waiters)  # type: ignore[arg-type]


async def test_duplicates_are_told_of_the_first_calls_reply(store: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.desk.LOOK_AGAIN_S", 1_000)
    desk = desk_of(store)
    assert isinstance((await desk.run([begin(lease_ms=1_000_000)]))[0], Proceed)
    others = [asyncio.create_task(desk.wait(begin(attempt=f"other-{n}"), 1_000)) for n in range(64)]
    await asyncio.sleep(0.1)
    assert await desk.run([complete()]) == [Settled()]
    async with asyncio.timeout(20):
        replies = await asyncio.gather(*others)
    assert {type(reply) for reply in replies} == {Replay}
    assert len({reply.reply for reply in replies if isinstance(reply, Replay)}) == 1


async def test_when_the_first_call_fails_one_duplicate_runs_and_the_others_go_on_waiting(store: Watched) -> None:
    desk = desk_of(store)
    await desk.run([begin()])
    others = [asyncio.create_task(desk.wait(begin(attempt=f"other-{n}"), 30)) for n in range(3)]
    await asyncio.sleep(0.05)
    assert await desk.run([abandon()]) == [Freed()]
    done, waiting = await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.sleep(0.3)
    (second,) = done
    outcome = second.result()
    assert isinstance(outcome, Proceed)
    assert [other.done() for other in waiting] == [False, False]
    await desk.run([complete(op=outcome.op)])
    assert {type(reply) for reply in await asyncio.gather(*waiting)} == {Replay}


async def test_a_duplicate_waits_no_longer_than_it_may(store: Watched) -> None:
    desk = desk_of(store)
    await desk.run([begin(lease_ms=1_000_000)])
    started_s = time.monotonic()
    async with asyncio.timeout(20):
        outcome = await desk.wait(begin(attempt="other"), 0.2)
    assert isinstance(outcome, Busy)
    assert time.monotonic() - started_s >= 0.2


@pytest.mark.parametrize(("per_key", "waiters"), [(2, 100), (100, 2)])
async def test_one_too_many_does_not_wait(store: Watched, per_key: int, waiters: int) -> None:
    desk = desk_of(store, per_key=per_key, waiters=waiters)
    await desk.run([begin()])
    waiting = [asyncio.create_task(desk.wait(begin(attempt=f"other-{n}"), 30)) for n in range(2)]
    await asyncio.sleep(0.05)
    assert isinstance(await asyncio.wait_for(desk.wait(begin(attempt="third"), 30), 20), Busy)
    await desk.run([complete()])
    assert {type(reply) for reply in await asyncio.gather(*waiting)} == {Replay}


async def test_who_stops_waiting_leaves_the_place_to_another(store: Watched) -> None:
    desk = desk_of(store, per_key=1)
    await desk.run([begin()])
    gone = asyncio.create_task(desk.wait(begin(attempt="gone"), 30))
    await asyncio.sleep(0.05)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    stays = asyncio.create_task(desk.wait(begin(attempt="stays"), 30))
    await asyncio.sleep(0.05)
    await desk.run([complete()])
    assert isinstance(await stays, Replay)
    assert not desk._waiting
    assert not desk._news


async def test_a_call_that_is_finished_at_another_desk_is_noticed(store: Watched) -> None:
    desk, other = desk_of(store), desk_of(store)
    await desk.run([begin()])
    waiting = asyncio.create_task(desk.wait(begin(attempt="other"), 30))
    await asyncio.sleep(0.05)
    await other.run([complete()])
    assert isinstance(await asyncio.wait_for(waiting, 20), Replay)


async def test_steps_of_one_moment_are_one_write(store: Watched) -> None:
    desk = desk_of(store)
    await desk.run([begin(claim=f"claim-{n}", op=f"op-{n}") for n in range(32)])
    await desk.run([complete(claim=f"claim-{n}", op=f"op-{n}") for n in range(32)])
    assert len(store.steps) == 64
    assert store.writes <= 4


async def test_a_reply_is_served_from_memory_and_only_to_the_same_request(store: Watched) -> None:
    desk = desk_of(store)
    await desk.run([begin()])
    await desk.run([complete()])
    first = await desk.run([begin(attempt="second")])
    asked = len(store.steps)
    assert await desk.run([begin(attempt="third")]) == first
    assert await desk.run([begin(attempt="fourth", fingerprint="another")]) == [Mismatch()]
    assert len(store.steps) == asked


async def test_memory_is_bounded_and_what_is_forgotten_is_in_the_store(store: Watched) -> None:
    desk = desk_of(store, cache_bytes=2_000)
    for n in range(20):
        await desk.run([begin(claim=f"claim-{n}", attempt=f"a-{n}")])
        await desk.run([complete(claim=f"claim-{n}", op=f"op-of-a-{n}")])
        assert isinstance((await desk.run([begin(claim=f"claim-{n}", attempt="again")]))[0], Replay)
    assert desk._replies._bytes <= 2_000
    assert len(desk._replies._kept) == 3
    assert isinstance((await desk.run([begin(claim="claim-0", attempt="later")]))[0], Replay)


async def test_a_store_that_is_down_is_told_to_the_caller_and_forgotten_when_it_is_back(store: Watched) -> None:
    desk = desk_of(store)
    store.down = True
    with pytest.raises(StoreDown):
        await desk.run([begin()])
    store.down = False
    assert isinstance((await desk.run([begin()]))[0], Proceed)
