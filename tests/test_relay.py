from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from serve_app.core.idempotency import Emit
from serve_app.core.ledger import SHARDS, Recorded
from serve_app.relay import MAX_PAUSE_S, POLL_S, TRIM_INTERVAL_MS, Lag, Relay
from serve_app.sinks import MAX_BATCH, Refused, Sink, SinkDown
from serve_app.sinks.jsonl import JsonlSink, read
from serve_app.stores import Cursor, Store, StoreDown, open_store
from tests.sinks.events import DAY_MS, NOON_MS, ids, usage_event


class Time:
    """Passes only when somebody sleeps; `due` runs whatever is to happen meanwhile."""

    def __init__(self) -> None:
        self.s = NOON_MS / 1000
        self.slept: list[float] = []
        self.due: Callable[[], Awaitable[None]] | None = None

    def now_ms(self) -> int:
        return int(self.s * 1000)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.s += seconds
        if self.due:
            await self.due()
        await asyncio.sleep(0)


class Receiver:
    """A sink that keeps what it takes; refuses the ids of `poison`, and is down while `down` says so."""

    def __init__(self) -> None:
        self.taken: list[Recorded] = []
        self.calls: list[tuple[int, list[str]]] = []
        self.poison: set[str] = set()
        self.down: Callable[[int], SinkDown | Exception | None] = lambda shard: None
        self.hold: asyncio.Event | None = None

    async def deliver(self, shard: int, batch: Sequence[Recorded]) -> list[Refused]:
        self.calls.append((shard, ids(batch)))
        if self.hold:
            await self.hold.wait()
        if error := self.down(shard):
            raise error
        self.taken += [each for each in batch if each.event.id not in self.poison]
        return [Refused(recorded=each, reason="HTTP 400") for each in batch if each.event.id in self.poison]

    async def close(self) -> None: ...

    def of(self, shard: int) -> list[str]:
        return ids([each for each in self.taken if each.event.shard == shard])


class Faulty:
    """The store, whose next calls of a method fail: before they do anything, or when they have done it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.fail: dict[str, list[str]] = {}

    def __getattr__(self, name: str) -> object:
        method = getattr(self._store, name)
        if name not in self.fail:
            return method

        async def call(*arguments: object) -> object:
            when = self.fail[name].pop(0) if self.fail[name] else ""
            if when == "before":
                raise StoreDown("before")
            result = await method(*arguments)
            if when == "after":
                raise StoreDown("after")
            return result

        return call


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(f"sqlite:{tmp_path}/ledger.db")
    yield store
    await store.close()


@pytest.fixture
def time() -> Time:
    return Time()


def relay_of(store: Store | Faulty, time: Time, random: float = 1.0, **sinks: Sink) -> Relay:
    return Relay(store, sinks, now_ms=time.now_ms, sleep=time.sleep, random=lambda: random)  # type: ignore[arg-type]


async def emit(store: Store, numbers: Iterable[int], *, shard: int = 0, time_ms: int = NOON_MS) -> None:
    await store.run([Emit(event=usage_event(number, shard=shard, time_ms=time_ms)) for number in numbers])


@contextlib.asynccontextmanager
async def running(relay: Relay) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(relay.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(50):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def caught_up(store: Store, *sinks: str) -> None:
    """Every sink has acknowledged everything, or has it as a dead letter."""
    async with asyncio.timeout(50):
        for shard in range(SHARDS):
            for sink in sinks:
                while (await store.cursor(sink, shard)).sequence < (await store.shard_state(shard)).last:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)


async def test_every_shard_arrives_in_order(store: Store, time: Time) -> None:
    receiver = Receiver()
    for shard in range(SHARDS):
        await emit(store, range(1, 21), shard=shard)
    async with running(relay_of(store, time, hook=receiver)):
        await caught_up(store, "hook")
    for shard in range(SHARDS):
        assert receiver.of(shard) == [f"{shard}-{number}" for number in range(1, 21)]
        assert await store.cursor("hook", shard) == Cursor(sequence=20, events=20, quantity=140)


async def test_a_batch_is_no_larger_than_agreed(store: Store, time: Time) -> None:
    receiver = Receiver()
    waits: list[int] = []

    def delivered(_: int) -> None:
        waits.append(len(time.slept))

    receiver.down = delivered
    await emit(store, range(1, MAX_BATCH + 2))
    async with running(relay_of(store, time, hook=receiver)):
        await caught_up(store, "hook")
    assert [len(batch) for _, batch in receiver.calls] == [MAX_BATCH, 1]
    assert waits == [0, 0], "it does not wait while there is more"


async def test_new_events_are_found_by_looking_now_and_then(store: Store, time: Time) -> None:
    receiver = Receiver()
    async with running(relay_of(store, time, hook=receiver)):
        await until(lambda: len(time.slept) > 3)
        assert set(time.slept) == {POLL_S}
        await emit(store, [1])
        await caught_up(store, "hook")
    assert receiver.of(0) == ["0-1"]


async def test_without_sinks_it_runs_and_waits(store: Store, time: Time) -> None:
    async with running(relay_of(store, time)) as task:
        await asyncio.sleep(0.01)
        assert not task.done()


async def test_a_relay_goes_on_where_the_last_one_stopped(store: Store, time: Time) -> None:
    first, second = Receiver(), Receiver()
    await emit(store, [1, 2])
    async with running(relay_of(store, time, hook=first)):
        await caught_up(store, "hook")
    await emit(store, [3])
    async with running(relay_of(store, time, hook=second)):
        await caught_up(store, "hook")
    assert (first.of(0), second.of(0)) == (["0-1", "0-2"], ["0-3"])


async def test_a_sink_that_is_down_for_an_hour_gets_everything_once_and_in_order(store: Store, time: Time) -> None:
    """Thousands of events arrive meanwhile, and no more of them than one batch are ever in memory."""
    receiver, until_s = Receiver(), time.s + 3600
    arrived = most_in_memory = 0

    def down(shard: int) -> SinkDown | None:
        nonlocal most_in_memory
        in_memory = sum(type(each) is Recorded for each in gc.get_objects()) - len(receiver.taken)
        most_in_memory = max(most_in_memory, in_memory)
        return SinkDown("away") if time.s < until_s else None

    async def traffic() -> None:
        nonlocal arrived
        numbers = range(arrived + 1, arrived + 51)
        await store.run([Emit(event=usage_event(n, shard=shard)) for shard in range(SHARDS) for n in numbers])
        arrived += 50

    await traffic()
    receiver.down, time.due = down, traffic
    gc.freeze()  # what is there already is not counted
    async with running(relay_of(store, time, hook=receiver)):
        await until(lambda: time.s > until_s)
        time.due = None
        await caught_up(store, "hook")
    gc.unfreeze()
    assert arrived * SHARDS > 5000
    assert 50 < most_in_memory <= MAX_BATCH
    assert 10 < len([pause for pause in time.slept if pause > POLL_S]) < 30
    assert max(time.slept) == MAX_PAUSE_S
    for shard in range(SHARDS):
        assert receiver.of(shard) == [f"{shard}-{number}" for number in range(1, arrived + 1)]
        assert [each.sequence for each in receiver.taken if each.event.shard == shard] == list(range(1, arrived + 1))


async def test_pauses_grow_with_jitter_from_a_second_to_five_minutes(store: Store, time: Time) -> None:
    await emit(store, [1])
    for random, expected in ((1.0, [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]), (0.0, [1, 2, 4, 8, 16, 32, 64, 128])):
        time.slept.clear()
        receiver = Receiver()
        receiver.down = lambda shard: SinkDown("away")
        async with running(relay_of(store, time, random, hook=receiver)):
            await until(lambda: len([pause for pause in time.slept if pause != POLL_S]) >= 10)
        pauses = [pause for pause in time.slept if pause != POLL_S]
        assert pauses[: len(expected)] == expected


@pytest.mark.parametrize(("asked_s", "pause_s"), [(0.0, 2.0), (40.0, 40.0), (float("inf"), 3600.0)])
async def test_a_receiver_may_ask_for_a_longer_pause(store: Store, time: Time, asked_s: float, pause_s: float) -> None:
    await emit(store, [1])
    receiver = Receiver()
    receiver.down = lambda shard: SinkDown("busy", retry_after_s=asked_s)
    async with running(relay_of(store, time, hook=receiver)):
        await until(lambda: bool(time.slept))
    assert time.slept[0] == pause_s


async def test_pauses_start_anew_after_a_success(store: Store, time: Time) -> None:
    receiver = Receiver()
    failures = [SinkDown("away")] * 3 + [None] + [SinkDown("away")] * 2
    receiver.down = lambda shard: failures.pop(0) if failures else None
    await emit(store, [1])
    async with running(relay_of(store, time, hook=receiver)):
        await caught_up(store, "hook")
        await emit(store, [2])
        await caught_up(store, "hook")
    assert [pause for pause in time.slept if pause != POLL_S] == [2, 4, 8, 2, 4]


async def test_a_shard_that_cannot_be_delivered_does_not_starve_the_others(store: Store, time: Time) -> None:
    receiver = Receiver()
    receiver.down = lambda shard: SinkDown("chokes on this one") if shard == 0 else None
    for shard in range(SHARDS):
        await emit(store, [1], shard=shard)
    async with running(relay_of(store, time, hook=receiver)):
        await until(lambda: len(receiver.taken) == SHARDS - 1)
    assert await store.cursor("hook", 0) == Cursor()


@pytest.mark.parametrize("dead", ["is down", "hangs", "is wrong"])
async def test_a_dead_sink_does_not_slow_the_others(store: Store, time: Time, dead: str) -> None:
    broken, healthy = Receiver(), Receiver()
    if dead == "hangs":
        broken.hold = asyncio.Event()
    broken.down = lambda shard: SinkDown("away") if dead == "is down" else TypeError("a mistake")
    await emit(store, range(1, 1201))
    async with running(relay_of(store, time, broken=broken, healthy=healthy)) as task:
        await caught_up(store, "healthy")
        await until(lambda: bool(broken.calls))
        assert not task.done()
    assert healthy.of(0) == [f"0-{number}" for number in range(1, 1201)]
    assert await store.cursor("broken", 0) == Cursor()


async def test_a_mistake_in_a_sink_is_logged_without_its_words(
    store: Store, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = Receiver()
    receiver.down = lambda shard: TypeError("a caller's text")
    await emit(store, [1])
    async with running(relay_of(store, time, hook=receiver)):
        await until(lambda: len(receiver.calls) > 1)
    assert "TypeError" in caplog.text
    assert "deliver" in caplog.text, "and where it happened"
    assert "caller's" not in caplog.text


async def test_a_poison_event_becomes_a_dead_letter_and_the_rest_goes_on(
    store: Store, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = Receiver()
    receiver.poison = {"0-2"}
    await emit(store, [1, 2, 3])
    with caplog.at_level(logging.ERROR):
        async with running(relay_of(store, time, hook=receiver)):
            await caught_up(store, "hook")
            await emit(store, [4])
            await caught_up(store, "hook")
    assert receiver.of(0) == ["0-1", "0-3", "0-4"]
    (letter,) = await store.dead_letters("hook")
    assert (letter.shard, letter.recorded.sequence, letter.recorded.event.id) == (0, 2, "0-2")
    assert letter.reason == "HTTP 400"
    assert await store.cursor("hook", 0) == Cursor(sequence=4, events=3, quantity=21)
    assert "0-2" in caplog.text


@pytest.mark.parametrize("method", ["cursor", "events", "advance"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_store_that_is_down_is_asked_again(store: Store, time: Time, method: str, when: str) -> None:
    faulty, receiver = Faulty(store), Receiver()
    faulty.fail[method] = [when, when, when]
    await emit(store, range(1, 2 * MAX_BATCH + 2))  # three batches
    async with running(relay_of(faulty, time, hook=receiver)):
        await until(lambda: not faulty.fail[method])
        await caught_up(store, "hook")
    assert list(dict.fromkeys(receiver.of(0))) == [f"0-{number}" for number in range(1, 1002)]
    assert await store.cursor("hook", 0) == Cursor(sequence=1001, events=1001, quantity=7007)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_crash_while_the_cursor_moves_loses_no_dead_letter(store: Store, time: Time, when: str) -> None:
    faulty, receiver = Faulty(store), Receiver()
    receiver.poison = {"0-2"}
    faulty.fail["advance"] = [when]
    await emit(store, [1, 2, 3])
    async with running(relay_of(faulty, time, hook=receiver)):
        await until(lambda: not faulty.fail["advance"])  # and this relay dies
    again = Receiver()
    again.poison = {"0-2"}
    async with running(relay_of(store, time, hook=again)):
        await caught_up(store, "hook")
    assert ids([letter.recorded for letter in await store.dead_letters("hook")]) == ["0-2"]
    assert await store.cursor("hook", 0) == Cursor(sequence=3, events=2, quantity=14)


async def test_a_dead_letter_is_sent_again_and_buried_when_it_is_taken(store: Store, time: Time) -> None:
    receiver = Receiver()
    receiver.poison = {"0-2", "1-1"}
    await emit(store, [1, 2, 3])
    await emit(store, [1], shard=1)
    relay = relay_of(store, time, hook=receiver)
    async with running(relay):
        await caught_up(store, "hook")
    receiver.poison = {"1-1"}
    assert await relay.retry_dead("hook") == 1
    assert receiver.of(0) == ["0-1", "0-3", "0-2"]
    assert ids([letter.recorded for letter in await store.dead_letters("hook")]) == ["1-1"]
    assert await store.cursor("hook", 0) == Cursor(sequence=3, events=3, quantity=21)
    assert await relay.retry_dead("hook") == 0


async def test_a_dead_letter_stays_while_the_sink_is_down_or_the_store_forgets_to_bury_it(
    store: Store, time: Time
) -> None:
    faulty, receiver = Faulty(store), Receiver()
    receiver.poison = {"0-1"}
    await emit(store, [1])
    relay = relay_of(faulty, time, hook=receiver)
    async with running(relay):
        await caught_up(store, "hook")
    receiver.poison, receiver.down = set(), lambda shard: SinkDown("away")
    with pytest.raises(SinkDown):
        await relay.retry_dead("hook")
    receiver.down = lambda shard: None
    faulty.fail["bury"] = ["before"]
    with pytest.raises(StoreDown):
        await relay.retry_dead("hook")
    assert len(await store.dead_letters("hook")) == 1
    assert await relay.retry_dead("hook") == 1
    assert await store.dead_letters("hook") == []


async def test_dead_letters_and_new_events_take_turns(store: Store, time: Time) -> None:
    """Burying counts in the cursor that a delivery under way is about to write."""
    receiver = Receiver()
    receiver.poison = {"0-1"}
    await emit(store, [1])
    relay = relay_of(store, time, hook=receiver)
    async with running(relay):
        await caught_up(store, "hook")
        receiver.poison, receiver.hold = set(), asyncio.Event()
        await emit(store, [2])
        await until(lambda: (0, ["0-2"]) in receiver.calls)
        retry = asyncio.create_task(relay.retry_dead("hook"))
        await asyncio.sleep(0.02)
        receiver.hold.set()
        assert await retry == 1
        await caught_up(store, "hook")
    assert await store.cursor("hook", 0) == Cursor(sequence=2, events=2, quantity=14)


async def test_what_another_process_buries_during_a_delivery_is_counted(store: Store, time: Time) -> None:
    receiver = Receiver()
    receiver.poison = {"0-1"}
    await emit(store, [1])
    async with running(relay_of(store, time, hook=receiver)):
        await caught_up(store, "hook")
        receiver.hold = asyncio.Event()
        await emit(store, [2])
        await until(lambda: (0, ["0-2"]) in receiver.calls)
        await relay_of(store, time, hook=Receiver()).retry_dead("hook")
        receiver.hold.set()
        await caught_up(store, "hook")
    assert await store.cursor("hook", 0) == Cursor(sequence=2, events=2, quantity=14)


async def test_two_relays_at_once_deliver_everything_and_count_it_once(store: Store, time: Time) -> None:
    one, two = Receiver(), Receiver()
    await emit(store, range(1, 1201))
    async with running(relay_of(store, time, hook=one)), running(relay_of(store, time, hook=two)):
        await caught_up(store, "hook")
    assert set(one.of(0)) | set(two.of(0)) == {f"0-{number}" for number in range(1, 1201)}
    assert await store.cursor("hook", 0) == Cursor(sequence=1200, events=1200, quantity=8400)


async def test_the_lag_is_what_is_not_acknowledged_and_since_when(store: Store, time: Time) -> None:
    await emit(store, range(1, 6))
    await emit(store, range(1, 4), shard=2)
    started_s, away = time.s, Receiver()
    away.down = lambda shard: SinkDown("away")
    relay = relay_of(store, time, hook=away)
    assert await relay.lag() == {"hook": Lag(events=8, since_s=0)}
    async with running(relay):
        await until(lambda: time.s > started_s + 600)
    lag = await relay.lag()
    assert lag == {"hook": Lag(events=8, since_s=time.s - started_s)}, "though its empty shards were looked at"
    relay = relay_of(store, time, hook=Receiver())
    async with running(relay):
        await caught_up(store, "hook")
        time.s += 1000  # with nothing to do
        polls = len(time.slept)
        await until(lambda: len(time.slept) > polls + 3)
    lag = await relay.lag()
    assert lag["hook"].events == 0
    assert lag["hook"].since_s <= POLL_S


async def acknowledge(store: Store, sequences: Mapping[str, int]) -> None:
    for sink, sequence in sequences.items():
        await store.advance(
            sink, 0, await store.cursor(sink, 0), Cursor(sequence=sequence, events=sequence, quantity=7 * sequence)
        )


async def test_only_what_every_sink_has_acknowledged_and_is_old_is_trimmed(store: Store, time: Time) -> None:
    await emit(store, range(1, 1301), time_ms=NOON_MS - 3 * DAY_MS)
    await emit(store, range(1301, 1501), time_ms=NOON_MS)
    relay = relay_of(store, time, hook=Receiver(), files=Receiver())
    assert await relay.trim(DAY_MS) == 0
    await acknowledge(store, {"hook": 1500, "files": 1100})
    time.s += TRIM_INTERVAL_MS / 1000
    assert await relay.trim(DAY_MS) == 1100
    assert (await store.events(0, 0, 1))[0].sequence == 1101
    await acknowledge(store, {"files": 1500})
    time.s += TRIM_INTERVAL_MS / 1000
    assert await relay.trim(DAY_MS) == 200, "the rest is too young"
    assert (await store.shard_state(0)).trimmed == Cursor(sequence=1300, events=1300, quantity=9100)


async def test_a_ledger_is_trimmed_at_most_hourly_and_in_steps(store: Store, time: Time) -> None:
    await emit(store, range(1, 1101), time_ms=NOON_MS - DAY_MS)
    await acknowledge(store, {"hook": 1100})
    faulty = Faulty(store)
    relay = relay_of(faulty, time, hook=Receiver())
    faulty.fail["trim"] = ["after"]
    with pytest.raises(StoreDown):
        await relay.trim(1000)
    assert await relay.trim(1000) == 600, "a failure does not cost an hour"
    await emit(store, [1101], time_ms=NOON_MS - DAY_MS)
    await acknowledge(store, {"hook": 1101})
    assert await relay.trim(1000) == 0
    time.s += TRIM_INTERVAL_MS / 1000
    assert await relay.trim(1000) == 1


async def test_without_sinks_nothing_is_trimmed(store: Store, time: Time) -> None:
    await emit(store, [1], time_ms=NOON_MS - DAY_MS)
    assert await relay_of(store, time).trim(1000) == 0
    assert len(await store.events(0, 0, 10)) == 1


async def test_a_dead_letter_outlives_its_event(store: Store, time: Time) -> None:
    receiver = Receiver()
    receiver.poison = {"0-1"}
    await emit(store, [1, 2], time_ms=NOON_MS - DAY_MS)
    relay = relay_of(store, time, hook=receiver)
    async with running(relay):
        await caught_up(store, "hook")
    assert await relay.trim(1000) == 2
    receiver.poison.clear()
    assert await relay.retry_dead("hook") == 1
    assert receiver.of(0) == ["0-2", "0-1"]


async def test_files_hold_each_event_once_though_the_cursor_is_lost_again_and_again(
    store: Store, time: Time, tmp_path: Path
) -> None:
    faulty = Faulty(store)
    faulty.fail["advance"] = ["before", "after", "before", "before", "after", "before"]
    await emit(store, range(1, 1501))
    for left in (4, 2, 0):
        sink = JsonlSink(tmp_path / "usage", source="/test")
        async with running(relay_of(faulty, time, files=sink)):
            await until(lambda left=left: len(faulty.fail["advance"]) <= left)  # type: ignore[misc]
        await sink.close()  # and this relay dies
    sink = JsonlSink(tmp_path / "usage", source="/test")
    async with running(relay_of(store, time, files=sink)):
        await caught_up(store, "files")
    await sink.close()
    assert [event["id"] for event in read(tmp_path / "usage")] == [f"0-{number}" for number in range(1, 1501)]
