"""What is not computed twice: equal texts of one request, and, if the model's entry says so, what came before.

Stands in front of `dispatch.py`. Tokens are counted before, so usage and the bill are the same whatever is found here.
A workspace finds what it sent itself, never another's: how fast an answer comes would tell what others send.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import replace
from enum import StrEnum
from typing import TypeVar

import numpy as np

from serve_app.core.packing import Packed, Share
from serve_app.core.vectors import Vectors
from serve_app.dispatch import Encoded

ENTRY_BYTES = 200  # what an entry costs beside its row: two objects and a place in the table

ON_THE_LOOP_TOKENS = 16_384  # about a millisecond

Result = TypeVar("Result")
Encode = Callable[[Packed, Share], Awaitable[Encoded]]


class Answered(StrEnum):
    """How a text came by its vector."""

    ENCODED = "encoded"
    CACHED = "cached"
    DUPLICATE = "duplicate"
    """Of another text in the same request."""


class Recall:
    """One model's. Its vectors are of one fingerprint: a model that changes gets a new one, empty."""

    def __init__(self, encode: Encode, *, cache_bytes: int, count: Callable[[Answered, int], None]) -> None:
        """cache_bytes: 0 = nothing is kept. count: told of each answered request's texts, by how."""
        self._encode = encode
        self._rows = _Rows(cache_bytes) if cache_bytes else None
        self._count = count

    @property
    def bytes(self) -> int:
        return self._rows.bytes if self._rows else 0

    async def encode(self, packed: Packed, share: Share, *, no_store: bool) -> Encoded:
        """As `Dispatcher.encode`. no_store: nothing is taken from what came before, and nothing kept."""
        rows = None if no_store or packed.firsts is not None else self._rows
        sequences = len(packed.lengths)
        if rows is None and sequences == 1:
            encoded = await self._encode(packed, share)
            self._count(Answered.ENCODED, 1)
            return encoded
        names = await _off_the_loop(packed, lambda: _names(packed, share.workspace if rows else None))
        firsts: dict[bytes, int] = {}  # of equals, the place of the first
        places = [firsts.setdefault(name, at) for at, name in enumerate(names)]
        found = {at: row for name, at in firsts.items() if rows and (row := rows.get(name)) is not None}
        missing = [at for at in firsts.values() if at not in found]
        if len(missing) == sequences:
            encoded = await self._encode(packed, share)
        elif missing:
            encoded = await self._encode(packed.some(missing), share)
        else:
            encoded = Encoded(vectors=np.empty((0, 0), np.float32), queue_s=0.0, compute_s=0.0)
        if rows:
            for at, row in zip(missing, encoded.vectors, strict=True):
                rows.put(names[at], row)
        self._tell(len(missing), len(found), sequences - len(firsts))
        if len(missing) == sequences:
            return encoded
        made = dict(zip(missing, encoded.vectors, strict=True))
        vectors = await _off_the_loop(
            packed, lambda: np.stack([made[at] if at in made else found[at] for at in places])
        )
        return replace(encoded, vectors=vectors)

    def _tell(self, encoded: int, cached: int, duplicate: int) -> None:
        for how, texts in ((Answered.ENCODED, encoded), (Answered.CACHED, cached), (Answered.DUPLICATE, duplicate)):
            if texts:
                self._count(how, texts)


async def _off_the_loop(packed: Packed, work: Callable[[], Result]) -> Result:
    """In a thread, if there is so much of it that other requests would wait."""
    return await asyncio.to_thread(work) if packed.tokens > ON_THE_LOOP_TOKENS else work()


def _names(packed: Packed, workspace: str | None) -> list[bytes]:
    """Of each sequence: equal for equal ones. What is kept is named by a hash that only the workspace's texts have."""
    ends = np.cumsum(packed.lengths).tolist()
    ids = packed.ids.tobytes()
    size = packed.ids.itemsize
    names = [ids[size * start : size * end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if packed.firsts is not None:
        return [b"%d:%b" % it for it in zip(packed.firsts.tolist(), names, strict=True)]
    if workspace is None:
        return names
    key = hashlib.sha256(workspace.encode()).digest()
    return [hashlib.blake2b(name, digest_size=16, key=key).digest() for name in names]


class _Rows:
    """The rows that were used last, within so many bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[bytes, bytes] = OrderedDict()
        self.bytes = 0

    def get(self, name: bytes) -> Vectors | None:
        row = self._rows.get(name)
        if row is None:
            return None
        self._rows.move_to_end(name)
        return np.frombuffer(row, np.float32)

    def put(self, name: bytes, row: Vectors) -> None:
        if name in self._rows:  # two requests had it computed at once: the first one's stays
            return
        kept = row.tobytes()  # a copy: a view would keep the whole reply
        self._rows[name] = kept
        self.bytes += len(kept) + ENTRY_BYTES
        while self.bytes > self._max_bytes:
            _, oldest = self._rows.popitem(last=False)
            self.bytes -= len(oldest) + ENTRY_BYTES
