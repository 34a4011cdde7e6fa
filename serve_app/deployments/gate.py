"""In front of `@serve.batch`: holds the units of one lane while as many batches run as may, and then releases the next.

`@serve.batch` alone forms batches by a timer: it collects nothing while a batch runs, and makes an idle caller wait.
With a wait of zero behind this gate its batches are what came in meanwhile, up to a token budget, and a lone unit goes
straight through.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from serve_app.dispatch import Unit, UnitReply

Run = Callable[[Unit], Awaitable[UnitReply | Exception]]


@dataclass(slots=True, eq=False)
class _Waiting:
    unit: Unit
    reply: asyncio.Future[UnitReply]


class Gate:
    """One a lane and replica. Each of `runs` is a `@serve.batch` function: one call a unit; calls of one tick are one
    batch, and it has one batch at a time."""

    def __init__(self, runs: Sequence[Run], *, max_tokens: int) -> None:
        """max_tokens: of one batch, unless a unit alone has more."""
        self._free = [*runs]
        self._since_s: dict[Run, float] = {}  # of those that are not free
        self._max_tokens = max_tokens
        self._waiting: deque[_Waiting] = deque()
        self._passing: set[asyncio.Task[None]] = set()

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

    @property
    def busy(self) -> Collection[Run]:
        """Those that have a batch now."""
        return self._since_s.keys()

    def busy_s(self) -> float:
        """How long the batch that has been running longest has; 0 when none does."""
        return max((time.monotonic() - since_s for since_s in self._since_s.values()), default=0.0)

    def _open(self) -> None:
        """Start the next batch, if anything is free for it. Units that arrive in the same tick still get in."""
        if self._free and self._waiting:
            run = self._free.pop()
            self._since_s[run] = time.monotonic()
            task = asyncio.get_running_loop().create_task(self._pass(run))
            self._passing.add(task)
            task.add_done_callback(self._passing.discard)

    async def _pass(self, run: Run) -> None:
        try:
            batch = self._take()
            replies = await asyncio.gather(*(run(waiting.unit) for waiting in batch), return_exceptions=True)
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
            del self._since_s[run]
            self._free.append(run)
            self._open()

    def _take(self) -> list[_Waiting]:
        batch, tokens = list[_Waiting](), 0
        while self._waiting and (not batch or tokens + self._waiting[0].unit.packed.tokens <= self._max_tokens):
            waiting = self._waiting.popleft()
            if not waiting.reply.done():  # else cancelled, in this very tick
                batch.append(waiting)
                tokens += waiting.unit.packed.tokens
        return batch
