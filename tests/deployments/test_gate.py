from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.core.packing import Packed
from serve_app.deployments.gate import Gate
from serve_app.dispatch import Unit, UnitReply

MAX_TOKENS = 100


def unit(tokens: int) -> Unit:
    packed = Packed(ids=np.zeros(tokens, np.int32), lengths=np.array([tokens], np.int32))
    return Unit(packed=packed, express=False, fingerprint="0123")


def reply_to(unit: Unit) -> UnitReply:
    return UnitReply(vectors=np.full((1, 1), unit.packed.tokens, np.float32), compute_s=0.0)


class Device:
    """Runs a batch until it is told to finish; returns an exception for the sizes that it is told to fail on."""

    def __init__(self) -> None:
        self.batches: list[list[Unit]] = []
        self.returned: dict[int, Exception] = {}
        self.raised: dict[int, BaseException] = {}
        self.running = 0
        self._finished = asyncio.Event()

    async def run(self, unit: Unit) -> UnitReply | Exception:
        if not self.running:
            self.batches.append([])
        self.batches[-1].append(unit)
        self.running += 1
        try:
            await self._finished.wait()
        finally:
            self.running -= 1
        if error := self.raised.get(unit.packed.tokens):
            raise error
        return self.returned.get(unit.packed.tokens) or reply_to(unit)

    async def finish(self) -> None:
        """The batch that runs now; the next one starts."""
        self._finished.set()
        self._finished = asyncio.Event()
        await settle()

    def sizes(self) -> list[list[int]]:
        return [[unit.packed.tokens for unit in batch] for batch in self.batches]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def start(coroutine: Coroutine[Any, Any, UnitReply]) -> asyncio.Task[UnitReply]:
    return asyncio.get_running_loop().create_task(coroutine)


async def submitted(gate: Gate, *units: Unit) -> list[asyncio.Task[UnitReply]]:
    tasks = [start(gate.submit(unit)) for unit in units]
    await settle()
    return tasks


async def outcomes(tasks: list[asyncio.Task[UnitReply]]) -> list[float | BaseException]:
    """What each unit got: its row's one number, which is its size, or its exception."""
    async with asyncio.timeout(20):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    return [result if isinstance(result, BaseException) else float(result.vectors[0, 0]) for result in results]


@pytest.fixture
async def device() -> Device:
    return Device()


@pytest.fixture
async def gate(device: Device) -> Gate:
    return Gate([device.run], max_tokens=MAX_TOKENS)


async def test_a_lone_unit_goes_straight_through(gate: Gate, device: Device) -> None:
    tasks = await submitted(gate, unit(7))
    assert device.sizes() == [[7]]
    await device.finish()
    assert await outcomes(tasks) == [7]


async def test_units_of_one_tick_are_one_batch(gate: Gate, device: Device) -> None:
    tasks = await submitted(gate, unit(1), unit(2), unit(3))
    assert device.sizes() == [[1, 2, 3]]
    await device.finish()
    assert await outcomes(tasks) == [1, 2, 3]


async def test_what_arrives_while_a_batch_runs_is_the_next_batch(gate: Gate, device: Device) -> None:
    tasks = await submitted(gate, unit(1))
    tasks += await submitted(gate, unit(2))
    tasks += await submitted(gate, unit(3))
    assert device.sizes() == [[1]]
    await device.finish()
    assert device.sizes() == [[1], [2, 3]]
    await device.finish()
    assert await outcomes(tasks) == [1, 2, 3]


async def test_a_batch_keeps_the_token_budget_and_the_order(gate: Gate, device: Device) -> None:
    tasks = await submitted(gate, *map(unit, [60, 40, 1, 99, 150, 2]))
    for _ in range(4):
        await device.finish()
    assert device.sizes() == [[60, 40], [1, 99], [150], [2]]
    assert await outcomes(tasks) == [60, 40, 1, 99, 150, 2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 130), st.booleans()), min_size=1, max_size=25))
async def test_however_units_arrive_each_runs_once_and_in_its_turn(arrivals: list[tuple[int, bool]]) -> None:
    device = Device()
    units = [unit(tokens) for tokens, _ in arrivals]
    gate = Gate([device.run], max_tokens=MAX_TOKENS)
    tasks: list[asyncio.Task[UnitReply]] = []
    for arriving, (_, finishes) in zip(units, arrivals, strict=True):
        tasks += await submitted(gate, arriving)
        if finishes:
            await device.finish()
    while not all(task.done() for task in tasks):
        await device.finish()

    assert await outcomes(tasks) == [tokens for tokens, _ in arrivals]
    assert [id(unit) for batch in device.batches for unit in batch] == [*map(id, units)]
    for batch in device.batches:
        assert len(batch) == 1 or sum(unit.packed.tokens for unit in batch) <= MAX_TOKENS


async def test_a_unit_that_is_cancelled_while_it_waits_never_runs(gate: Gate, device: Device) -> None:
    tasks = await submitted(gate, unit(1))
    tasks += await submitted(gate, unit(2), unit(3), unit(4))
    for task in (tasks[1], tasks[3]):
        task.cancel()
    await settle()
    await device.finish()
    await device.finish()
    assert device.sizes() == [[1], [3]]
    assert await outcomes([tasks[0], tasks[2]]) == [1, 3]


async def test_a_unit_that_is_cancelled_as_the_batch_before_it_ends_never_runs(gate: Gate, device: Device) -> None:
    async def first_ends() -> UnitReply:
        reply = await gate.submit(unit(1))
        second.cancel()
        return reply

    first = start(first_ends())
    await settle()
    second, third = await submitted(gate, unit(2), unit(3))
    await device.finish()
    await device.finish()
    assert device.sizes() == [[1], [3]]
    assert await outcomes([first, third]) == [1, 3]


async def test_a_lone_unit_that_is_cancelled_in_its_first_tick_never_runs(gate: Gate, device: Device) -> None:
    task = start(gate.submit(unit(1)))
    await asyncio.sleep(0)
    task.cancel()
    await settle()
    assert device.sizes() == []
    (after,) = await submitted(gate, unit(2))
    await device.finish()
    assert await outcomes([after]) == [2]


async def test_a_unit_that_is_cancelled_while_it_runs_disturbs_no_other(gate: Gate, device: Device) -> None:
    tasks = await submitted(gate, unit(1), unit(2))
    tasks += await submitted(gate, unit(3))
    tasks[0].cancel()
    await settle()
    assert device.sizes() == [[1, 2]]
    await device.finish()
    await device.finish()
    assert device.sizes() == [[1, 2], [3]]
    assert await outcomes(tasks[1:]) == [2, 3]


async def test_when_everyone_who_waits_gives_up_the_gate_is_free_again(gate: Gate, device: Device) -> None:
    tasks = await submitted(gate, unit(1))
    tasks += await submitted(gate, unit(2), unit(3))
    for task in tasks:
        task.cancel()
    await settle()
    await device.finish()
    assert gate.busy_s() == 0
    (after,) = await submitted(gate, unit(4))
    await device.finish()
    assert device.sizes() == [[1], [4]]
    assert await outcomes([after]) == [4]


async def test_an_exception_that_is_returned_for_a_unit_fails_only_that_unit(gate: Gate, device: Device) -> None:
    device.returned[2] = MemoryError("too long")
    tasks = await submitted(gate, unit(1), unit(2), unit(3))
    await device.finish()
    assert await outcomes(tasks) == [1, device.returned[2], 3]


async def test_an_exception_that_is_raised_fails_those_it_was_raised_for_and_the_next_batch_runs(
    gate: Gate, device: Device
) -> None:
    device.raised[1] = device.raised[2] = RuntimeError("the device is gone")
    tasks = await submitted(gate, unit(1), unit(2))
    tasks += await submitted(gate, unit(3))
    await device.finish()
    await device.finish()
    assert await outcomes(tasks) == [device.raised[1], device.raised[2], 3]


async def test_a_run_that_is_cancelled_leaves_nobody_waiting(gate: Gate, device: Device) -> None:
    device.raised[2] = asyncio.CancelledError()
    tasks = await submitted(gate, unit(1), unit(2), unit(3))
    await device.finish()
    first, cancelled, third = await outcomes(tasks)
    assert (first, third) == (1, 3)
    assert isinstance(cancelled, asyncio.CancelledError)


async def test_an_exception_that_no_future_can_hold_leaves_nobody_waiting(gate: Gate, device: Device) -> None:
    """StopIteration, which a `next()` too many in a model's code raises."""
    device.returned[2] = StopIteration()
    tasks = await submitted(gate, unit(1), unit(2), unit(3))
    await device.finish()
    first, failed, third = await outcomes(tasks)
    assert (first, third) == (1, 3)
    assert isinstance(failed, Exception)
    assert not isinstance(failed, TimeoutError)


async def test_the_gate_is_busy_only_while_a_batch_runs(gate: Gate, device: Device) -> None:
    assert gate.busy_s() == 0
    await submitted(gate, unit(1))
    await asyncio.sleep(0.002)
    assert gate.busy_s() >= 0.001
    await device.finish()
    assert gate.busy_s() == 0


async def test_the_clock_starts_again_with_each_batch(gate: Gate, device: Device) -> None:
    await submitted(gate, unit(1))
    await submitted(gate, unit(2))
    await asyncio.sleep(0.05)
    await device.finish()
    assert device.sizes() == [[1], [2]]
    assert 0 < gate.busy_s() < 0.05
    await device.finish()


# Several at once


async def test_batches_run_beside_each_other_where_they_may_and_what_comes_then_waits() -> None:
    devices = [Device(), Device()]
    gate = Gate([device.run for device in devices], max_tokens=MAX_TOKENS)
    tasks = await submitted(gate, *map(unit, [90, 80, 70, 5]))
    assert sorted(device.sizes() for device in devices) == [[[80]], [[90]]]
    tasks += await submitted(gate, unit(6))
    first = next(device for device in devices if device.sizes() == [[90]])
    await first.finish()
    assert first.sizes() == [[90], [70, 5, 6]]
    assert len(gate.busy) == 2
    for device in devices:
        await device.finish()
    assert await outcomes(tasks) == [90, 80, 70, 5, 6]
    assert not gate.busy
    assert gate.busy_s() == 0


async def test_small_units_of_one_tick_are_one_batch_though_more_might_run() -> None:
    devices = [Device(), Device()]
    gate = Gate([device.run for device in devices], max_tokens=MAX_TOKENS)
    tasks = await submitted(gate, unit(1), unit(2))
    assert sorted(device.sizes() for device in devices) == [[], [[1, 2]]]
    tasks += await submitted(gate, unit(3))
    assert sorted(device.sizes() for device in devices) == [[[1, 2]], [[3]]]
    for device in devices:
        await device.finish()
    assert await outcomes(tasks) == [1, 2, 3]


async def test_the_gate_is_as_busy_as_its_oldest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr("serve_app.deployments.gate.time.monotonic", lambda: now_s)
    devices = [Device(), Device()]
    gate = Gate([device.run for device in devices], max_tokens=MAX_TOKENS)
    await submitted(gate, unit(100))
    now_s += 5
    await submitted(gate, unit(99))
    now_s += 1
    assert gate.busy_s() == 6
    await next(device for device in devices if device.sizes() == [[100]]).finish()
    assert gate.busy_s() == 1
