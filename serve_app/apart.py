"""Work that goes on though the request that asked for it ends."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_tasks: set[asyncio.Task[Any]] = set()  # else one that nobody waits for could be collected while it runs


def apart(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task in a context of its own, because Serve cancels what a request has called when that request ends."""
    task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
    _tasks.add(task)
    task.add_done_callback(_seen)
    return task


def _seen(task: asyncio.Task[Any]) -> None:
    _tasks.discard(task)
    if not task.cancelled():
        task.exception()  # whoever waits gets it, too; without a look asyncio would log it, in its own words
