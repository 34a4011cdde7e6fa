"""What to do while the store, or an actor before it, is down: try again for a while, then say so.

Only calls that may be repeated belong here; every step of `core/idempotency.py` may.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from serve_app.core.errors import StoreUnavailable
from serve_app.stores import StoreDown

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0

T = TypeVar("T")


async def patiently(attempt: Callable[[], Awaitable[T]], *, for_s: float) -> T:
    """The answer of the first attempt that raises no StoreDown. Raises StoreUnavailable after `for_s` seconds."""
    started_s, pause_s = time.monotonic(), FIRST_PAUSE_S
    try:
        async with asyncio.timeout(for_s):
            while True:
                try:
                    return await attempt()
                except StoreDown:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    except TimeoutError:
        waited_s = time.monotonic() - started_s
        raise StoreUnavailable(
            f"Nothing could be recorded for {waited_s:.0f} s, so nothing was done.", retry_after_s=waited_s
        ) from None
