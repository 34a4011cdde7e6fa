"""Whether requests come faster than this process can handle them: then it refuses some, before they wait unseen.

What waits for a model is counted in `dispatch.py`, and refused there. What waits for a turn of the event loop nobody
counts; it shows as a timer that fires late. One late beat is a pause, of the machine or of a large body; several in a
row are a queue that does not get shorter by itself. Refusing costs a part of answering, so the queue then empties, and
whoever was let in before is answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from serve_app.core.errors import AtCapacity

BEAT_S = 0.05
LATE_S = 1.0  # a beat this late counts; 256 callers of short texts, who wait for their answers, make it half as late
IN_A_ROW = 3  # late beats, before anything is refused
AGAIN_S = 10.0  # so long after the last refusal one late beat is enough


class Pulse:
    """Of one event loop. Until `run` has begun, nothing is refused."""

    def __init__(self, now_s: Callable[[], float] = time.perf_counter) -> None:
        self._now_s = now_s
        self._late_s = 0.0  # the last beat
        self._in_a_row = 0
        self._refused_s = -AGAIN_S

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            due_s = self._now_s() + BEAT_S
            await asyncio.sleep(BEAT_S)
            self.beat(self._now_s() - due_s)

    def beat(self, late_s: float) -> None:
        self._late_s = late_s
        self._in_a_row = self._in_a_row + 1 if late_s > LATE_S else 0

    def check(self) -> None:
        """Raises AtCapacity while this process is behind; `Retry-After`: for as long as its last beat was late."""
        if not self._in_a_row:
            return
        now_s = self._now_s()
        if self._in_a_row >= IN_A_ROW or now_s - self._refused_s < AGAIN_S:
            self._refused_s = now_s
            raise AtCapacity(
                f"More requests come than this process can take in: it is {self._late_s:.1f} s behind.",
                retry_after_s=self._late_s,
            )
