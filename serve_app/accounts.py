"""Who is calling: the key of a request, looked up in the store and remembered for a few seconds.

A key that is revoked stops working everywhere within five seconds: no replica goes by an answer that it asked for more
than `KNOWN_S` ago. Missing, malformed, unknown, expired and revoked keys get one and the same answer.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from serve_app.apart import apart
from serve_app.core import keys
from serve_app.core.errors import InvalidAPIKey
from serve_app.core.keys import ApiKey, Workspace
from serve_app.stores import Clock, Store, StoreDown
from serve_app.stores.patience import patiently

KNOWN_S = 4.0  # the contract says 5: a second is left for the look-up itself
MOST_KNOWN = 10_000  # keys that are remembered at once
MOST_WRONG = 10_000  # and digests that belong to none: whoever guesses must not push out who knows
USED_MS = 60_000  # how exactly the time of a key's last use is kept
TELL_S = 5.0  # uses go to the store together
T = TypeVar("T")
REFUSAL = "The API key is missing, malformed, unknown, expired or revoked. Send Authorization: Bearer <key>."


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whose request it is, and which key said so."""

    workspace: Workspace
    key: ApiKey


class Accounts:
    """The keys that one ingress knows at the moment."""

    def __init__(self, store: Store, *, now_ms: Clock, patience_s: float, tell_s: float = TELL_S) -> None:
        self._store = store
        self._now_ms = now_ms
        self._patience_s = patience_s
        self._known: _Remembered[Caller] = _Remembered(lambda: MOST_KNOWN)
        self._wrong: _Remembered[None] = _Remembered(lambda: MOST_WRONG)
        self._asked: dict[str, asyncio.Task[Caller | None]] = {}
        self._uses = _Uses(store, tell_s)

    async def authenticate(self, authorization: str | None) -> Caller:
        """The caller that an `Authorization` header names. Raises InvalidAPIKey, StoreUnavailable."""
        text = keys.bearer(authorization)
        caller = await self._find(keys.digest(text)) if text else None
        now_ms = self._now_ms()  # not before: the look-up may have taken as long as the key was still to live
        if caller is None or not caller.key.valid_at(now_ms):
            raise InvalidAPIKey(REFUSAL)
        self._uses.note(caller.key.id, now_ms)
        return caller

    async def close(self) -> None:
        """Tell the store what is left to tell."""
        await self._uses.close()

    async def _find(self, digest: str) -> Caller | None:
        if known := self._known.get(digest) or self._wrong.get(digest):
            return known[0]
        return await patiently(lambda: self._ask(digest), for_s=self._patience_s)

    async def _ask(self, digest: str) -> Caller | None:
        """One question to the store for all who wait for the same answer."""
        task = self._asked.get(digest)
        if task is None:
            task = self._asked[digest] = apart(self._look_up(digest))
            task.add_done_callback(lambda _: self._asked.pop(digest))
        return await asyncio.shield(task)

    async def _look_up(self, digest: str) -> Caller | None:
        asked_s = time.monotonic()  # before the answer: a revocation meanwhile must not be remembered longer
        found = await self._store.find_key(digest)
        if time.monotonic() >= asked_s + KNOWN_S:
            raise StoreDown("the answer is too old to go by")
        if found and hmac.compare_digest(found[0].digest, digest):
            caller = Caller(key=found[0], workspace=found[1])
            self._known.put(digest, caller, asked_s + KNOWN_S)
            return caller
        self._wrong.put(digest, None, asked_s + KNOWN_S)
        return None


class _Remembered(Generic[T]):
    """What was last learnt, each for a while, of a limited number."""

    def __init__(self, most: Callable[[], int]) -> None:
        self._most = most
        self._values: OrderedDict[str, tuple[float, T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, name: str) -> tuple[T] | None:
        """The value, if it may still be gone by."""
        until_s, *value = self._values.get(name, (0.0,))
        return (value[0],) if time.monotonic() < until_s else None

    def put(self, name: str, value: T, until_s: float) -> None:
        self._values[name] = (until_s, value)
        self._values.move_to_end(name)
        while len(self._values) > self._most():
            self._values.popitem(last=False)


class _Uses:
    """When keys were last used, told to the store every few seconds, and never in a request's way."""

    def __init__(self, store: Store, tell_s: float) -> None:
        self._store = store
        self._tell_s = tell_s
        self._told: OrderedDict[str, int] = OrderedDict()
        self._new: dict[str, int] = {}
        self._telling: asyncio.Task[None] | None = None
        self._closed = False

    def note(self, key_id: str, now_ms: int) -> None:
        if now_ms - self._told.get(key_id, -USED_MS) < USED_MS:
            return
        self._told[key_id] = self._new[key_id] = now_ms
        self._told.move_to_end(key_id)
        while len(self._told) > MOST_KNOWN:
            self._told.popitem(last=False)
        if self._telling is None and not self._closed:
            self._telling = apart(self._tell_later())

    async def close(self) -> None:
        self._closed = True
        if self._telling is not None:
            self._telling.cancel()
        await self._tell()

    async def _tell_later(self) -> None:
        try:
            await asyncio.sleep(self._tell_s)
            await self._tell()
        finally:
            self._telling = None

    async def _tell(self) -> None:
        uses, self._new = self._new, {}
        try:
            if uses:
                await self._store.touch(uses)
        except StoreDown:  # not worth a retry: the next use tells it
            for key_id in uses:
                self._told.pop(key_id, None)
