"""In front of `@serve.batch`: holds the units of one lane while a batch of it runs, and releases the next after it.

`@serve.batch` alone forms batches by a timer: it collects nothing while a batch runs, and makes an idle caller wait.
With a wait of zero behind this gate its batches are what came in meanwhile, up to a token budget, and a lone unit goes
straight through.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from serve_app.dispatch import Unit, UnitReply


@dataclass(slots=True, eq=False)
class _Waiting:
    unit: Unit
    reply: asyncio.Future[UnitReply]


class Gate:
    """One a lane and replica. `run` is its `@serve.batch` method: one call a unit; calls of one tick are one batch."""

    def __init__(self, run: Callable[[Unit], Awaitable[UnitReply | Exception]], *, max_tokens: int) -> None:
        self._run = run
        self._max_tokens = max_tokens
        self._waiting: deque[_Waiting] = deque()
        self._batch: asyncio.Task[None] | None = None
        self._since_s = 0.0

    async def submit(self, unit: Unit) -> UnitReply:
        """The unit's rows, or the exception that it alone caused. Cancelled before its batch, it never runs."""
        reply: asyncio.Future[UnitReply] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(unit, reply)
        self._waiting.append(waiting)
        self._open()
        try:
            return await reply
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    def busy_s(self) -> float:
        """How long the batch that runs now has been running; 0 when none does."""
        return time.monotonic() - self._since_s if self._batch else 0.0

    def _open(self) -> None:
        """Start the next batch, unless one runs. Units that arrive in the same tick still get in."""
        if self._batch is None and self._waiting:
            self._since_s = time.monotonic()
            self._batch = asyncio.get_running_loop().create_task(self._pass())

    async def _pass(self) -> None:
        try:
            batch = self._take()
            replies = await asyncio.gather(*(self._run(waiting.unit) for waiting in batch), return_exceptions=True)
            for waiting, reply in zip(batch, replies, strict=True):
                if waiting.reply.done():
                    continue
                if isinstance(reply, StopIteration):  # the one exception that no future takes
                    waiting.reply.set_exception(RuntimeError("StopIteration"))
                elif isinstance(reply, BaseException):
                    waiting.reply.set_exception(reply)
                else:
                    waiting.reply.set_result(reply)
        finally:
            self._batch = None
            self._open()

    def _take(self) -> list[_Waiting]:
        batch, tokens = list[_Waiting](), 0
        while self._waiting and (not batch or tokens + self._waiting[0].unit.packed.tokens <= self._max_tokens):
            waiting = self._waiting.popleft()
            if not waiting.reply.done():  # else cancelled, in this very tick
                batch.append(waiting)
                tokens += waiting.unit.packed.tokens
        return batch
