from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.core.errors import AtCapacity, InternalError, ModelLoading
from serve_app.core.packing import Packed, Share
from serve_app.core.vectors import Vectors
from serve_app.dispatch import (
    AT_THE_DOOR,
    CROWD,
    CROWD_S,
    DOOR_TOKENS,
    EXPRESS_TOKENS,
    Dispatcher,
    Encoded,
    Unit,
    UnitReply,
)

UNITS_PER_REPLICA = 1 + AT_THE_DOOR  # of one that computes one at a time
LONG = EXPRESS_TOKENS + 44  # one sequence that makes its request travel in the bulk lane


def request(first_id: int, *lengths: int) -> Packed:
    """Each sequence repeats an id of its own: first_id, first_id + 1, ..."""
    ids = np.repeat(np.arange(first_id, first_id + len(lengths), dtype=np.int32), lengths)
    return Packed(ids=ids, lengths=np.array(lengths, np.int32))


def rows_of(packed: Packed) -> Vectors:
    """One row a sequence: [its id, its length]."""
    starts = np.cumsum(packed.lengths) - packed.lengths
    return np.stack([packed.ids[starts], packed.lengths], axis=1).astype(np.float32)


class Replica:
    """Answers at once, or when its lane is released; fails on the ids that it is told to."""

    def __init__(self) -> None:
        self.units: list[Unit] = []
        self.under_way: Counter[bool] = Counter()
        self.most_under_way: Counter[bool] = Counter()
        self.cancelled: list[Unit] = []
        self.errors: dict[int, Exception] = {}
        self._held: dict[bool, asyncio.Event] = {}

    async def __call__(self, unit: Unit) -> UnitReply:
        self.units.append(unit)
        self.under_way[unit.express] += 1
        self.most_under_way |= self.under_way
        try:
            if held := self._held.get(unit.express):
                await held.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.append(unit)
            raise
        finally:
            self.under_way[unit.express] -= 1
        for poison in self.errors.keys() & set(unit.packed.ids.tolist()):
            raise self.errors[poison]
        return UnitReply(vectors=rows_of(unit.packed), compute_s=0.0)

    def hold(self, *, express: bool = False) -> None:
        self._held[express] = asyncio.Event()

    def release(self, *, express: bool = False) -> None:
        self._held.pop(express).set()

    def sent(self) -> list[list[int]]:
        """The ids in each unit so far."""
        return [sorted(set(unit.packed.ids.tolist())) for unit in self.units]


def dispatcher(
    send: Callable[[Unit], Awaitable[UnitReply]],
    *,
    unit_tokens: int = 1000,
    unit_sequences: int = 100,
    units_at_once: int = 1,
    max_pending_tokens: int = 10**6,
    max_workspace_tokens: int | None = None,
) -> Dispatcher:
    return Dispatcher(
        send,
        fingerprint="0123",
        dimensions=2,
        unit_tokens=unit_tokens,
        unit_sequences=unit_sequences,
        at_once=lambda express: units_at_once,
        max_pending_tokens=max_pending_tokens,
        max_workspace_tokens=max_workspace_tokens,
    )


def start(coroutine: Coroutine[Any, Any, Encoded]) -> asyncio.Task[Encoded]:
    return asyncio.get_running_loop().create_task(coroutine)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def outcome(task: asyncio.Task[Encoded]) -> Encoded | BaseException:
    (result,) = await asyncio.gather(task, return_exceptions=True)
    return result


async def filled_up(dispatch: Dispatcher, *, express: bool = False) -> list[asyncio.Task[Encoded]]:
    """As many units under way in a lane as may be: what comes next has to wait."""
    length = DOOR_TOKENS if express else LONG
    blockers = [
        start(dispatch.encode(request(9000 + number, length)))
        for number in range(UNITS_PER_REPLICA * dispatch.replicas)
    ]
    await settle()
    return blockers


async def test_a_request_in_one_unit_comes_back_in_order() -> None:
    replica = Replica()
    packed = request(10, 3, 1, 2)
    encoded = await dispatcher(replica).encode(packed)
    assert encoded.vectors.tolist() == [[10, 3], [11, 1], [12, 2]]
    assert len(replica.units) == 1
    assert replica.units[0].fingerprint == "0123"


async def test_a_request_of_many_units_comes_back_in_order() -> None:
    replica = Replica()
    packed = request(10, *[LONG] * 20)
    encoded = await dispatcher(replica).encode(packed)
    assert encoded.vectors.tolist() == rows_of(packed).tolist()
    assert len(replica.units) > 5
    assert all(unit.packed.tokens <= 1000 for unit in replica.units)


async def test_requests_that_wait_travel_together_and_part_again() -> None:
    replica = Replica()
    dispatch = dispatcher(replica)
    replica.hold(express=True)
    blockers = await filled_up(dispatch, express=True)
    waiting = [start(dispatch.encode(request(10 * number, 3, 5))) for number in range(1, 5)]
    await settle()
    replica.release(express=True)

    for number, encoded in enumerate(await asyncio.gather(*waiting), start=1):
        assert encoded.vectors.tolist() == [[10 * number, 3], [10 * number + 1, 5]]
    assert replica.sent()[len(blockers) :] == [[10, 11, 20, 21, 30, 31, 40, 41]]
    await asyncio.gather(*blockers)


async def test_short_requests_wait_for_company_while_others_are_computed() -> None:
    replica = Replica()
    dispatch = dispatcher(replica)
    replica.hold(express=True)
    tasks = [start(dispatch.encode(request(10, 20)))]
    await settle()
    tasks += [start(dispatch.encode(request(20 + number, 20))) for number in range(DOOR_TOKENS // 20)]
    await settle()
    assert replica.sent() == [[10]], "an idle replica gets the first at once; what is too little waits here"
    tasks.append(start(dispatch.encode(request(99, 20))))
    await settle()
    assert [len(unit.packed.lengths) for unit in replica.units] == [1, DOOR_TOKENS // 20 + 1]
    tasks.append(start(dispatch.encode(request(100, 20))))
    await settle()
    replica.release(express=True)
    await asyncio.gather(*tasks)
    assert replica.sent()[2:] == [[100]], "and goes as soon as a place is free, however little it is"


async def test_bulk_work_waits_at_the_door_however_little_it_is() -> None:
    replica = Replica()
    dispatch = dispatcher(replica)
    replica.hold()
    tasks = [start(dispatch.encode(request(10 + number, LONG))) for number in range(3)]
    await settle()
    assert replica.sent() == [[10], [11]]
    replica.release()
    await asyncio.gather(*tasks)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=8), min_size=1, max_size=6),
    st.integers(1, 500),
    st.integers(1, 5),
    st.integers(1, 3),
)
async def test_whatever_is_merged_and_split_every_request_gets_its_own_rows(
    requests: list[list[int]], unit_tokens: int, unit_sequences: int, replicas: int
) -> None:
    replica = Replica()
    dispatch = dispatcher(replica, unit_tokens=unit_tokens, unit_sequences=unit_sequences)
    dispatch.replicas = replicas
    texts = [request(100 * number, *lengths) for number, lengths in enumerate(requests)]

    results = await asyncio.gather(*map(dispatch.encode, texts))
    for packed, encoded in zip(texts, results, strict=True):
        assert encoded.vectors.tolist() == rows_of(packed).tolist()
    assert dispatch.pending_sequences == 0
    assert max(replica.most_under_way.values()) <= UNITS_PER_REPLICA * replicas


@pytest.mark.parametrize("at_once", [1, 2, 8])
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("express", [True, False])
async def test_so_many_units_of_a_lane_are_under_way_for_each_replica_and_no_more(
    replicas: int, express: bool, at_once: int
) -> None:
    replica, most = Replica(), (at_once + AT_THE_DOOR) * replicas
    dispatch = dispatcher(replica, unit_tokens=300, units_at_once=at_once)
    dispatch.replicas = replicas
    replica.hold(express=express)
    requests = [
        start(dispatch.encode(request(10 * number, *([100] if express else [100] * 9)))) for number in range(40)
    ]
    await settle()
    assert replica.under_way == Counter({express: most})
    replica.release(express=express)
    await asyncio.gather(*requests)
    assert replica.most_under_way == Counter({express: most})


async def test_each_unit_tells_what_its_ingress_holds_back_in_both_lanes() -> None:
    replica = Replica()
    replica.hold()
    dispatch, other = dispatcher(replica, unit_tokens=LONG), dispatcher(replica)
    waiting = [start(dispatch.encode(request(at, LONG))) for at in range(4)]
    await settle()
    assert [unit.queued_tokens for unit in replica.units] == [2 * LONG, 2 * LONG]
    waiting.append(start(dispatch.encode(request(9, 5))))
    await settle()
    assert replica.units[-1].queued_tokens == 2 * LONG
    replica.release()
    await asyncio.gather(*waiting, other.encode(request(1, 1)))
    told = {unit.ingress: unit.queued_tokens for unit in replica.units}
    assert sorted(told.values()) == [0, 0]  # two ingresses


async def test_a_model_that_lost_its_replicas_still_has_a_place_for_one() -> None:
    replica = Replica()
    dispatch = dispatcher(replica)
    dispatch.replicas = 0
    assert len((await dispatch.encode(request(1, 5))).vectors) == 1


async def test_a_short_request_travels_beside_bulk_work() -> None:
    replica = Replica()
    dispatch = dispatcher(replica)
    replica.hold()
    bulk = start(dispatch.encode(request(100, *[LONG] * 50)))
    await settle()

    encoded = await dispatch.encode(request(1, EXPRESS_TOKENS))
    assert encoded.vectors.tolist() == [[1, EXPRESS_TOKENS]]
    assert not bulk.done()
    replica.release()
    await bulk


@pytest.mark.parametrize(("tokens", "express"), [(EXPRESS_TOKENS, True), (EXPRESS_TOKENS + 1, False)])
async def test_the_whole_request_decides_its_lane(tokens: int, express: bool) -> None:
    replica = Replica()
    await dispatcher(replica).encode(request(1, tokens - 1, 1))
    assert {unit.express for unit in replica.units} == {express}


async def test_a_caller_that_gives_up_while_waiting_leaves_the_queue() -> None:
    replica = Replica()
    dispatch = dispatcher(replica)
    replica.hold()
    blockers = await filled_up(dispatch)
    waiting = start(dispatch.encode(request(1, LONG, LONG)))
    await settle()
    assert dispatch.pending_sequences == len(blockers) + 2

    waiting.cancel()
    await settle()
    assert waiting.cancelled()
    assert dispatch.pending_sequences == len(blockers)
    replica.release()
    await asyncio.gather(*blockers)
    assert dispatch.pending_sequences == 0
    assert [1] not in replica.sent()


async def test_a_unit_whose_every_request_left_is_cancelled_and_its_place_is_free() -> None:
    replica = Replica()
    dispatch = dispatcher(replica)
    replica.hold()
    blockers = await filled_up(dispatch)
    waiting = start(dispatch.encode(request(1, LONG)))
    blockers[0].cancel()
    await settle()
    assert [unit.packed.ids[0] for unit in replica.cancelled] == [9000]
    assert replica.sent()[-1] == [1]

    for task in [*blockers, waiting]:
        task.cancel()
    await settle()
    assert dispatch.pending_sequences == 0
    assert len(replica.cancelled) == 3


async def test_a_unit_that_someone_still_waits_for_goes_on() -> None:
    replica = Replica()
    dispatch = dispatcher(replica)
    replica.hold()
    blockers = await filled_up(dispatch)
    gone, stayed = (start(dispatch.encode(request(first_id, LONG))) for first_id in (1, 2))
    await settle()
    for blocker in blockers:
        blocker.cancel()
    await settle()
    assert replica.sent()[-1] == [1, 2]

    gone.cancel()
    await settle()
    assert dispatch.pending_sequences == 1
    replica.release()
    assert (await stayed).vectors.tolist() == [[2, LONG]]
    assert [1, 2] not in [sorted(unit.packed.ids.tolist()) for unit in replica.cancelled]
    assert dispatch.pending_sequences == 0


async def failing_beside(error: Exception) -> tuple[Replica, list[Encoded | BaseException]]:
    """Requests 10, 20 and 30 share a unit; 20 makes the replica fail."""
    replica = Replica()
    dispatch = dispatcher(replica)
    replica.hold()
    blockers = await filled_up(dispatch)
    tasks = [start(dispatch.encode(request(first_id, LONG))) for first_id in (10, 20, 30)]
    await settle()
    replica.errors[20] = error
    replica.release()
    outcomes = [await outcome(task) for task in tasks]
    await asyncio.gather(*blockers)
    assert dispatch.pending_sequences == 0
    return replica, outcomes


async def test_of_a_unit_that_fails_only_the_guilty_request_fails() -> None:
    replica, (first, guilty, last) = await failing_beside(RuntimeError("the words of a caller"))
    assert isinstance(first, Encoded)
    assert isinstance(last, Encoded)
    assert first.vectors.tolist() == [[10, LONG]]
    assert last.vectors.tolist() == [[30, LONG]]
    assert isinstance(guilty, InternalError)
    assert "words" not in guilty.message
    assert replica.sent()[UNITS_PER_REPLICA:] == [[10, 20, 30], [10], [20], [30]]


async def test_an_error_for_the_caller_passes_through_unchanged_and_is_not_tried_again() -> None:
    loading = ModelLoading("BAAI/bge-m3 is being replaced.", retry_after_s=3)
    replica, outcomes = await failing_beside(loading)
    assert outcomes == [loading, loading, loading]
    assert replica.sent()[UNITS_PER_REPLICA:] == [[10, 20, 30]]


async def test_who_gives_up_before_the_second_try_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    replica = Replica()
    dispatch = dispatcher(replica)
    replica.hold()
    blockers = await filled_up(dispatch)
    stayed, gone = (start(dispatch.encode(request(first_id, LONG))) for first_id in (10, 20))
    await settle()
    replica.errors[20] = RuntimeError("no")
    replica.release()
    replica.hold()
    await settle()
    assert replica.sent()[UNITS_PER_REPLICA:] == [[10, 20]]
    replica.release()
    replica.hold()
    await settle()
    assert replica.sent()[UNITS_PER_REPLICA:] == [[10, 20], [10]]

    gone.cancel()
    await settle()
    replica.release()
    assert (await stayed).vectors.tolist() == [[10, LONG]]
    await asyncio.gather(*blockers)
    await settle()
    assert replica.sent()[UNITS_PER_REPLICA:] == [[10, 20], [10]]
    assert len(caplog.records) == 1


async def test_an_error_for_the_caller_may_also_come_from_the_second_try() -> None:
    errors = iter([RuntimeError("once"), ModelLoading("Starting.", retry_after_s=3)])

    async def send(unit: Unit) -> UnitReply:
        raise next(errors)

    with pytest.raises(ModelLoading):
        await dispatcher(send).encode(request(1, 5))


async def test_a_failure_that_passes_is_not_noticed() -> None:
    replica = Replica()
    failures = iter([RuntimeError("once")])

    async def send(unit: Unit) -> UnitReply:
        for failure in failures:
            raise failure
        return await replica(unit)

    assert (await dispatcher(send).encode(request(1, 5))).vectors.tolist() == [[1, 5]]


async def test_the_words_of_a_failure_are_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    await failing_beside(RuntimeError("the words of a caller"))
    assert "a unit failed: RuntimeError" in caplog.text
    assert "words of a caller" not in caplog.text


async def test_a_request_that_failed_in_one_unit_takes_no_more_places() -> None:
    replica = Replica()
    dispatch = dispatcher(replica)
    replica.errors[1] = ModelLoading("Starting.", retry_after_s=3)
    with pytest.raises(ModelLoading):
        await dispatch.encode(request(1, *[LONG] * 60))
    await settle()
    assert dispatch.pending_sequences == 0
    assert len(replica.units) == UNITS_PER_REPLICA


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("serve_app.dispatch.time", clock)
    return clock


async def refused(dispatch: Dispatcher, packed: Packed) -> AtCapacity:
    with pytest.raises(AtCapacity) as refusal:
        await dispatch.encode(packed)
    return refusal.value


@pytest.mark.parametrize("unit_s", [0.1, 1.0, 10.0])
async def test_a_full_queue_says_how_long_it_needs_at_the_measured_rate(clock: Clock, unit_s: float) -> None:
    replica = Replica()
    dispatch = dispatcher(replica, max_pending_tokens=20_000)
    for first_id in range(3):
        replica.hold()
        measured = start(dispatch.encode(request(first_id, 1000)))
        await settle()
        clock.now_s += unit_s
        replica.release()
        await measured
        clock.now_s += 1000  # idle time tells nothing about the rate

    replica.hold()
    tasks = await filled_up(dispatch)
    tasks.append(start(dispatch.encode(request(1, *[500] * 40))))
    await settle()
    refusal = await refused(dispatch, request(1, 1))
    assert "20,000 tokens wait" in refusal.message
    assert refusal.retry_after_s == pytest.approx(20 * unit_s, rel=0.1)

    replica.release()
    await asyncio.gather(*tasks)
    assert dispatch.pending_sequences == 0


async def test_before_anything_was_measured_a_full_queue_says_a_second() -> None:
    replica = Replica()
    dispatch = dispatcher(replica, max_pending_tokens=LONG)
    replica.hold()
    tasks = await filled_up(dispatch)
    tasks.append(start(dispatch.encode(request(1, LONG))))
    await settle()
    refusal = await refused(dispatch, request(1, 1))
    assert refusal.headers() == {"Retry-After": "1"}
    replica.release()
    await asyncio.gather(*tasks)


async def test_who_gives_up_makes_room_in_a_full_queue() -> None:
    replica = Replica()
    dispatch = dispatcher(replica, max_pending_tokens=2 * LONG)
    replica.hold()
    tasks = await filled_up(dispatch)
    waiting = start(dispatch.encode(request(1, LONG, LONG)))
    await settle()
    await refused(dispatch, request(2, LONG))
    waiting.cancel()
    await settle()
    tasks.append(start(dispatch.encode(request(2, LONG))))
    await settle()
    replica.release()
    assert (await asyncio.gather(*tasks))[-1].vectors.tolist() == [[2, LONG]]


async def test_an_idle_queue_takes_a_request_of_any_size() -> None:
    packed = request(1, *[LONG] * 20)
    encoded = await dispatcher(Replica(), max_pending_tokens=1).encode(packed)
    assert encoded.vectors.tolist() == rows_of(packed).tolist()


async def test_queueing_is_what_was_not_computing(clock: Clock) -> None:
    async def send(unit: Unit) -> UnitReply:
        clock.now_s += 5.0
        return UnitReply(vectors=rows_of(unit.packed), compute_s=2.0)

    encoded = await dispatcher(send).encode(request(1, 7))
    assert (encoded.compute_s, encoded.queue_s) == (2.0, 3.0)


CALLER = contextvars.ContextVar("CALLER", default="nobody")


async def test_no_unit_runs_in_the_context_of_one_of_its_callers() -> None:
    replica = Replica()
    seen = []

    async def send(unit: Unit) -> UnitReply:
        seen.append(CALLER.get())
        if len(seen) == 1:
            raise RuntimeError("and once more")
        return await replica(unit)

    CALLER.set("the caller")
    await dispatcher(send).encode(request(1, *[LONG] * 20))
    assert set(seen) == {"nobody"}
    assert len(seen) > UNITS_PER_REPLICA + 1


@pytest.mark.parametrize("shape", [(0, 2), (1, 2), (2, 2), (4, 2), (3, 1), (3, 3)])
async def test_a_reply_of_another_shape_than_asked_for_is_no_answer(shape: tuple[int, int]) -> None:
    async def send(unit: Unit) -> UnitReply:
        return UnitReply(vectors=np.ones(shape, np.float32), compute_s=0.0)

    with pytest.raises(InternalError):
        await dispatcher(send).encode(request(1, 5, 5, 5))


async def test_rows_that_came_twice_do_not_stand_for_rows_that_never_came() -> None:
    replica, late = Replica(), asyncio.Event()

    async def send(unit: Unit) -> UnitReply:
        ids = set(unit.packed.ids.tolist())
        if 12 in ids:
            await late.wait()
        reply = await replica(unit)
        return UnitReply(vectors=reply.vectors[:-1], compute_s=0.0) if {10, 20} <= ids else reply

    dispatch = dispatcher(send)
    replica.hold()
    blockers = await filled_up(dispatch)
    split, whole = start(dispatch.encode(request(10, *[LONG] * 4))), start(dispatch.encode(request(20, LONG)))
    await settle()
    replica.release()
    await settle()
    assert (await whole).vectors.tolist() == [[20, LONG]]
    assert replica.sent()[UNITS_PER_REPLICA:] == [[10, 11, 20], [10, 11], [20]]
    assert not split.done()

    late.set()
    assert (await split).vectors.tolist() == [[10 + index, LONG] for index in range(4)]
    await asyncio.gather(*blockers)


# Workspaces beside each other


def of(workspace: str, weight: int = 1) -> Share:
    return Share(workspace=workspace, weight=weight)


async def test_express_units_are_full_while_a_workspace_is_alone_and_small_while_several_send_short_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock_s = 100.0
    monkeypatch.setattr("serve_app.dispatch.time.perf_counter", lambda: clock_s)
    replica = Replica()
    dispatch = dispatcher(replica, unit_tokens=CROWD * 40)

    async def most_in_a_unit() -> int:
        """Of 64 short requests that come at once, 20 tokens each."""
        replica.units.clear()
        await asyncio.gather(*(dispatch.encode(request(100, 20), of("flood")) for _ in range(64)))
        return max(len(unit.packed.lengths) for unit in replica.units)

    assert await most_in_a_unit() == CROWD * 2, "its own short requests crowd nobody"
    await dispatch.encode(request(1, 5), of("polite"))
    assert await most_in_a_unit() == 2
    clock_s += CROWD_S + 0.01
    assert await most_in_a_unit() == CROWD * 2

    replica.units.clear()
    replica.hold(express=True)
    tasks = [start(dispatch.encode(request(100, 20), of(f"ws-{number % 2}"))) for number in range(40)]
    await settle()
    clock_s += CROWD_S + 0.01
    replica.release(express=True)
    await asyncio.gather(*tasks)
    *many, last = [len(unit.packed.lengths) for unit in replica.units]
    assert max(many) == 2, "they wait, however long ago they came"
    assert last <= CROWD * 2, "of one workspace alone"


async def test_bulk_units_are_full_whoever_sends_short_requests() -> None:
    """Short requests have a thread of their own at the replica: nobody waits behind a bulk unit but bulk work."""
    replica = Replica()
    dispatch = dispatcher(replica, unit_tokens=8 * LONG)
    await dispatch.encode(request(1, 5), of("polite"))
    await dispatch.encode(request(100, *[LONG] * 16), of("flood"))
    assert [len(unit.packed.lengths) for unit in replica.units if not unit.express] == [8, 8]


async def test_a_polite_request_waits_for_what_is_under_way_and_no_longer() -> None:
    """Nine polite workspaces and one that floods both lanes: in units, not in seconds."""
    replica = Replica()
    dispatch = dispatcher(replica, unit_tokens=1000)
    replica.hold(express=True)
    flood = [start(dispatch.encode(request(1000, 20), of("flood"))) for _ in range(300)]
    flood += [start(dispatch.encode(request(2000, *[LONG] * 20), of("flood"))) for _ in range(20)]
    await settle()
    polite = [start(dispatch.encode(request(10 + number, 20), of(f"polite-{number}"))) for number in range(9)]
    await settle()
    before = [unit.express for unit in replica.units].count(True)
    replica.release(express=True)
    await asyncio.gather(*polite)
    express = [unit for unit in replica.units if unit.express][before:]
    needed = next(
        n for n in range(len(express)) if set(range(10, 19)) <= {i for u in express[: n + 1] for i in u.packed.ids}
    )
    assert needed <= 9 * 20 * CROWD // 1000 + 1
    await asyncio.gather(*flood)


async def test_a_full_queue_takes_what_is_a_workspaces_part_of_it_and_refuses_who_has_more() -> None:
    replica = Replica()
    dispatch = dispatcher(replica, max_pending_tokens=10 * LONG)
    replica.hold()
    blockers = await filled_up(dispatch)
    flood = [start(dispatch.encode(request(100, *[LONG] * 5), of("flood"))) for _ in range(2)]
    await settle()
    with pytest.raises(AtCapacity):
        await dispatch.encode(request(1, LONG), of("flood"))
    polite = start(dispatch.encode(request(200, *[LONG] * 5), of("polite")))
    await settle()
    assert not polite.done()
    with pytest.raises(AtCapacity):
        await dispatch.encode(request(300, LONG), of("polite"))
    replica.release()
    await asyncio.gather(*blockers, *flood, polite)


async def test_a_heavier_workspace_has_a_larger_part_of_a_full_queue() -> None:
    replica = Replica()
    dispatch = dispatcher(replica, max_pending_tokens=12 * LONG)
    replica.hold()
    blockers = await filled_up(dispatch)
    flood = start(dispatch.encode(request(100, *[LONG] * 12), of("flood")))
    await settle()
    with pytest.raises(AtCapacity):
        await dispatch.encode(request(1, *[LONG] * 8), of("light"))
    heavy = start(dispatch.encode(request(1, *[LONG] * 8), of("heavy", 2)))
    await settle()
    assert not heavy.done()
    replica.release()
    await asyncio.gather(*blockers, flood, heavy)


async def test_however_many_come_late_no_more_than_twice_as_much_waits() -> None:
    replica = Replica()
    dispatch = dispatcher(replica, max_pending_tokens=10 * LONG)
    replica.hold()
    tasks = await filled_up(dispatch)
    tasks += [start(dispatch.encode(request(100, *[LONG] * 10), of("flood")))]
    for number in range(20):
        tasks += [start(dispatch.encode(request(200, *[LONG]), of(f"late-{number}", weight=10**number)))]
    await settle()
    assert sum(lane.queue.tokens for lane in dispatch._lanes.values()) <= 20 * LONG
    replica.release()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(result, AtCapacity) for result in results) == 10


async def measured(dispatch: Dispatcher, replica: Replica, clock: Clock, *, tokens_per_s: float) -> None:
    """One unit at this rate."""
    replica.hold()
    unit = start(dispatch.encode(request(1, 1000)))
    await settle()
    clock.now_s += 1000 / tokens_per_s
    replica.release()
    await unit


async def test_a_workspace_alone_does_not_fill_the_queue_and_is_told_how_long_its_own_takes(clock: Clock) -> None:
    replica = Replica()
    dispatch = dispatcher(replica, max_pending_tokens=100 * LONG, max_workspace_tokens=10 * LONG)
    await measured(dispatch, replica, clock, tokens_per_s=LONG)
    replica.hold()
    blockers = await filled_up(dispatch)
    flood = start(dispatch.encode(request(100, *[LONG] * 25), of("flood")))  # of one request any size, if none waits
    await settle()
    with pytest.raises(AtCapacity, match="of your workspace") as refused:
        await dispatch.encode(request(1, 1), of("flood"))
    assert refused.value.retry_after_s == pytest.approx(25, rel=0.1)
    polite = start(dispatch.encode(request(200, *[LONG] * 9), of("polite")))
    await settle()
    assert not polite.done()
    with pytest.raises(AtCapacity, match="of your workspace") as refused:
        await dispatch.encode(request(1, LONG, LONG), of("polite"))
    assert refused.value.retry_after_s == pytest.approx(2 * 9, rel=0.1)  # every second turn is another's
    replica.release()
    await asyncio.gather(*blockers, flood, polite)


async def test_what_would_come_too_late_is_refused_at_once_and_takes_nobodys_time(clock: Clock) -> None:
    replica = Replica()
    dispatch = dispatcher(replica)
    await measured(dispatch, replica, clock, tokens_per_s=LONG)
    replica.hold()
    tasks = await filled_up(dispatch)
    tasks.append(start(dispatch.encode(request(100, *[LONG] * 20), Share(workspace="flood"))))
    await settle()
    with pytest.raises(AtCapacity, match="your time is 15 s") as refused:
        await dispatch.encode(request(1, LONG), Share(workspace="flood", within_s=15))
    assert refused.value.retry_after_s == pytest.approx(21 - 15, rel=0.1)
    tasks.append(start(dispatch.encode(request(1, LONG), Share(workspace="flood", within_s=25))))
    # It has every second turn, and short requests have a queue of their own.
    tasks.append(start(dispatch.encode(request(2, LONG), Share(workspace="polite", within_s=15))))
    tasks.append(start(dispatch.encode(request(3, 10), Share(workspace="flood", within_s=1))))
    await settle()
    replica.release()
    await asyncio.gather(*tasks)


async def test_before_anything_was_measured_nobody_is_too_late() -> None:
    replica = Replica()
    dispatch = dispatcher(replica)
    replica.hold()
    tasks = [*await filled_up(dispatch), start(dispatch.encode(request(1, *[LONG] * 20)))]
    await settle()
    tasks.append(start(dispatch.encode(request(2, LONG), Share(workspace="another", within_s=0.01))))
    await settle()
    replica.release()
    await asyncio.gather(*tasks)
