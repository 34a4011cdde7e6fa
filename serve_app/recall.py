"""What is not computed twice: equal texts of one request, and, if the model's entry says so, what came before.

Stands in front of `dispatch.py`. Tokens are counted before, so usage and the bill are the same whatever is found here.
A workspace finds what it sent itself, never another's: how fast an answer comes would tell what others send.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from enum import StrEnum

import numpy as np

from serve_app.core.packing import Packed, Share
from serve_app.core.vectors import Vectors
from serve_app.dispatch import Encoded

ENTRY_BYTES = 200  # what an entry costs beside its row: two objects and a place in the table

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
        """cache_bytes: 0 = nothing is kept. count: told of each request's texts, by how they were answered."""
        self._encode = encode
        self._rows = _Rows(cache_bytes) if cache_bytes else None
        self._count = count

    @property
    def bytes(self) -> int:
        return self._rows.bytes if self._rows else 0

    def _tell(self, **texts: int) -> None:
        for how, number in texts.items():
            if number:
                self._count(Answered(how), number)

    async def encode(self, packed: Packed, share: Share, *, no_store: bool) -> Encoded:
        """As `Dispatcher.encode`. no_store: nothing is taken from what came before, and nothing kept."""
        rows = None if no_store else self._rows
        if packed.firsts is not None or (rows is None and len(packed.lengths) == 1):
            self._tell(encoded=len(packed.lengths))
            return await self._encode(packed, share)
        key = hashlib.sha256(share.workspace.encode()).digest()
        ends = np.cumsum(packed.lengths).tolist()
        starts = [0, *ends[:-1]]
        names = [_name(packed, start, end, key) for start, end in zip(starts, ends, strict=True)]
        places = {name: at for at, name in reversed([*enumerate(names)])}  # of the first of equals
        found = {name: row for name in places if rows and (row := rows.get(name)) is not None}
        missing = sorted(at for name, at in places.items() if name not in found)
        self._tell(encoded=len(missing), cached=len(found), duplicate=len(names) - len(places))
        if len(missing) == len(names):
            encoded = await self._encode(packed, share)
        elif missing:
            ids = np.concatenate([packed.ids[starts[at] : ends[at]] for at in missing])
            encoded = await self._encode(Packed(ids=ids, lengths=packed.lengths[missing]), share)
        else:
            encoded = Encoded(vectors=np.empty((0, 0), np.float32), queue_s=0.0, compute_s=0.0)
        made = {names[at]: row for at, row in zip(missing, encoded.vectors, strict=True)}
        if rows:
            for name, row in made.items():
                rows.put(name, row)
        if len(missing) == len(names):
            return encoded
        vectors = np.stack([made[name] if name in made else found[name] for name in names])
        return Encoded(vectors=vectors, queue_s=encoded.queue_s, compute_s=encoded.compute_s)


def _name(packed: Packed, start: int, end: int, key: bytes) -> bytes:
    """Of a sequence, in one workspace: nobody can look for a text of which the workspace is not known."""
    return hashlib.blake2b(packed.ids[start:end].tobytes(), digest_size=16, key=key).digest()


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
