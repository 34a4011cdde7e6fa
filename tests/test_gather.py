"""Calls that arrive while one is under way travel together; each caller gets its own answer, or the error."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from serve_app.gather import Gather


class Line:
    """Takes numbers, answers with their squares, and notes what travelled together. `open` lets calls through."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = asyncio.Event()
        self.open.set()

    async def send(self, items: list[int]) -> Sequence[int]:
        self.batches.append(items)
        await self.open.wait()
        if 13 in items:
            raise ValueError("thirteen")
        return [item * item for item in items]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_an_idle_gather_sends_at_once() -> None:
    line = Line()
    gather = Gather(line.send, max_items=10)
    assert await gather(3) == 9
    assert await gather(4) == 16
    assert line.batches == [[3], [4]]


async def test_what_comes_while_a_call_is_under_way_travels_with_the_next() -> None:
    line = Line()
    line.open.clear()
    gather = Gather(line.send, max_items=10)
    first = asyncio.create_task(gather(1))
    await settle()
    others = [asyncio.create_task(gather(number)) for number in (2, 3, 4)]
    await settle()
    line.open.set()
    assert await asyncio.gather(first, *others) == [1, 4, 9, 16]
    assert line.batches == [[1], [2, 3, 4]]


async def test_a_batch_is_no_longer_than_allowed() -> None:
    line = Line()
    gather = Gather(line.send, max_items=2)
    assert await asyncio.gather(*(gather(number) for number in range(5))) == [0, 1, 4, 9, 16]
    assert [len(batch) for batch in line.batches] == [2, 2, 1]


async def test_an_error_reaches_everybody_in_the_batch_and_nobody_else() -> None:
    line = Line()
    gather = Gather(line.send, max_items=2)
    answers = await asyncio.gather(*(gather(number) for number in (13, 2, 3)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [ValueError, ValueError, int]


async def test_what_is_cancelled_before_it_leaves_is_not_sent_and_the_rest_is() -> None:
    line = Line()
    line.open.clear()
    gather = Gather(line.send, max_items=10)
    first = asyncio.create_task(gather(1))
    await settle()
    gone, stays = asyncio.create_task(gather(2)), asyncio.create_task(gather(3))
    await settle()
    gone.cancel()
    line.open.set()
    assert await stays == 9
    assert await first == 1
    assert line.batches == [[1], [3]]
    with pytest.raises(asyncio.CancelledError):
        await gone


async def test_the_caller_that_started_a_batch_may_go_without_it() -> None:
    line = Line()
    line.open.clear()
    gather = Gather(line.send, max_items=10)
    first = asyncio.create_task(gather(1))
    await settle()
    second = asyncio.create_task(gather(2))
    await settle()
    first.cancel()
    line.open.set()
    assert await second == 4
