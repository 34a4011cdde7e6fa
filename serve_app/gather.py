"""Many small calls made into few: what arrives while a call is under way travels with the next one.

An idle `Gather` sends at once, with no timer; a busy one has a batch ready when the answer comes. Three hops use it:
the ingress to the store, the ingress to the idempotency actor, and that actor to the store.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from serve_app.apart import apart

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Gather(Generic[Item, Answer]):
    """send: takes up to `max_items` items, returns an answer for each, in order."""

    def __init__(self, send: Callable[[list[Item]], Awaitable[Sequence[Answer]]], *, max_items: int) -> None:
        self._send = send
        self._max_items = max_items
        self._waiting: deque[tuple[Item, asyncio.Future[Answer]]] = deque()
        self._under_way: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Answer:
        """The item's answer, or what `send` raised. Cancelled before its batch leaves, it is not sent."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        if self._under_way is None:
            self._under_way = apart(self._drain())
        return await answer

    async def _drain(self) -> None:
        try:
            while batch := self._take():
                await self._carry(batch)
        finally:
            self._under_way = None

    def _take(self) -> list[tuple[Item, asyncio.Future[Answer]]]:
        batch: list[tuple[Item, asyncio.Future[Answer]]] = []
        while self._waiting and len(batch) < self._max_items:
            item, answer = self._waiting.popleft()
            if not answer.done():
                batch.append((item, answer))
        return batch

    async def _carry(self, batch: list[tuple[Item, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self._send([item for item, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
