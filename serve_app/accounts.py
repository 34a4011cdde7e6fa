"""Who is calling: the key of a request, looked up in the store and remembered for a few seconds.

A key that is revoked stops working everywhere within `KNOWN_S`, because no replica remembers longer. Missing,
malformed, unknown, expired and revoked keys get one and the same answer.
"""

from __future__ import annotations

import hmac
import time
from collections import OrderedDict
from dataclasses import dataclass

from serve_app.core import keys
from serve_app.core.errors import InvalidAPIKey
from serve_app.core.keys import ApiKey, Workspace
from serve_app.stores import Clock, Store
from serve_app.stores.patience import patiently

KNOWN_S = 4.0  # the contract says 5: a second is left for the look-up itself
MOST_KNOWN = 10_000  # keys, right or wrong, that are remembered at once
REFUSAL = "The API key is missing, malformed, unknown, expired or revoked. Send Authorization: Bearer <key>."


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whose request it is, and which key said so."""

    workspace: Workspace
    key: ApiKey


class Accounts:
    """The keys that one ingress knows at the moment."""

    def __init__(self, store: Store, *, now_ms: Clock, patience_s: float) -> None:
        self._store = store
        self._now_ms = now_ms
        self._patience_s = patience_s
        self._known: OrderedDict[str, tuple[float, Caller | None]] = OrderedDict()  # by digest: until when, and whom

    async def authenticate(self, authorization: str | None) -> Caller:
        """The caller that an `Authorization` header names. Raises InvalidAPIKey, StoreUnavailable."""
        text = keys.bearer(authorization)
        caller = await self._find(keys.digest(text)) if text else None
        if caller is None or not caller.key.valid_at(self._now_ms()):
            raise InvalidAPIKey(REFUSAL)
        return caller

    async def _find(self, digest: str) -> Caller | None:
        until_s, caller = self._known.get(digest, (0.0, None))
        if time.monotonic() < until_s:
            return caller
        asked_s = time.monotonic()  # before the answer: a revocation meanwhile must not be remembered longer
        found = await patiently(lambda: self._store.find_key(digest), for_s=self._patience_s)
        caller = None
        if found and hmac.compare_digest(found[0].digest, digest):
            caller = Caller(key=found[0], workspace=found[1])
        self._known[digest] = (asked_s + KNOWN_S, caller)
        self._known.move_to_end(digest)
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        return caller
