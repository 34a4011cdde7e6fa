"""Where the audit's events lie: 32 bytes for each, found by its sequence; and how far each sink came.

An event's mark is a digest of what must be the same wherever it is told: place, id, workspace, quantity, amount.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from serve_app.core import pricing
from serve_app.core.ledger import Recorded

ID_BYTES, MARK_BYTES = 16, 8


class Counts(Protocol):
    """How far, and how much that was: `stores.Cursor`."""

    @property
    def sequence(self) -> int: ...
    @property
    def events(self) -> int: ...
    @property
    def quantity(self) -> int: ...


@dataclass(slots=True, kw_only=True)
class Place:
    """One shard's events, in order."""

    last: int
    trimmed: Counts
    sure: int
    newest: int
    quantity: int = 0
    _sequences: array[int] = field(default_factory=lambda: array("q"))
    _ids: bytearray = field(default_factory=bytearray)
    _marks: bytearray = field(default_factory=bytearray)

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, recorded: Recorded) -> None:
        event, sequence = recorded.event, recorded.sequence
        self.newest = sequence
        self.quantity += event.quantity
        self._sequences.append(sequence)
        self._ids += _digest(ID_BYTES, event.id)
        self._marks += _mark(sequence, event.id, event.workspace, event.quantity, pricing.plain(event.amount))

    def index(self, sequence: int) -> int | None:
        at = bisect_left(self._sequences, sequence)
        return at if at < len(self._sequences) and self._sequences[at] == sequence else None

    def mark(self, index: int) -> bytes:
        return bytes(self._marks[MARK_BYTES * index : MARK_BYTES * (index + 1)])

    def sequence(self, index: int) -> int:
        return self._sequences[index]

    def sequences(self) -> Iterator[int]:
        return iter(self._sequences)

    def ids(self) -> bytes:
        return bytes(self._ids)

    def after(self, cursor: Counts) -> int:
        """How many events are still to come to a sink."""
        return max(0, self.last - max(cursor.sequence, self.trimmed.sequence))


@dataclass(slots=True, kw_only=True)
class SinkPlace:
    """How far a sink came in one shard, what the ledger has up to there, and which events the sink was seen to hold."""

    cursor: Counts
    dead: dict[int, int]  # sequence: quantity
    events: int = 0
    quantity: int = 0
    _seen: bytearray = field(default_factory=bytearray)  # by index in the shard

    @classmethod
    def of(cls, cursor: Counts, dead: Iterable[Recorded]) -> SinkPlace:
        """Dead letters above the cursor were written after it was read."""
        letters = {letter.sequence: letter.event.quantity for letter in dead if letter.sequence <= cursor.sequence}
        return cls(cursor=cursor, dead=letters)

    def pass_by(self, recorded: Recorded) -> None:
        if recorded.sequence <= self.cursor.sequence:
            self.events += 1
            self.quantity += recorded.event.quantity

    def lacks(self, trimmed: Counts) -> tuple[int, int]:
        """Events and quantity that the ledger has up to the cursor, and the cursor does not count."""
        return (
            trimmed.events + self.events - len(self.dead) - self.cursor.events,
            trimmed.quantity + self.quantity - sum(self.dead.values()) - self.cursor.quantity,
        )

    def see(self, place: Place, index: int) -> bool:
        """Whether that event was seen before."""
        if not self._seen:
            self._seen = bytearray(len(place))
        before, self._seen[index] = self._seen[index], 1
        return bool(before)

    def missing(self, place: Place) -> Iterator[int]:
        """Sequences that were acknowledged and not seen."""
        seen = self._seen or bytes(len(place))
        for sequence, here in zip(place.sequences(), seen, strict=True):
            if sequence <= self.cursor.sequence and not here and sequence not in self.dead:
                yield sequence


def place_and_mark(cloud_event: dict[str, Any]) -> tuple[int, int, bytes]:
    """Shard, sequence and mark as a sink tells them. Raises KeyError, TypeError, ValueError, AttributeError."""
    sequence, data = int(cloud_event["sequence"]), cloud_event["data"]
    mark = _mark(sequence, cloud_event["id"], cloud_event["subject"], data["quantity"], data["amount"])
    return int(cloud_event["source"].rpartition("/")[2]), sequence, mark


def repeated(places: dict[int, Place]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of (shard, sequence) whose events bear one id."""
    if not any(map(len, places.values())):
        return
    ids = np.frombuffer(b"".join(place.ids() for place in places.values()), np.dtype((np.void, ID_BYTES)))
    order = np.argsort(ids, kind="stable")
    starts = np.cumsum([0, *map(len, places.values())])
    shards = list(places)

    def where(index: int) -> tuple[int, int]:
        at = int(np.searchsorted(starts, index, side="right")) - 1
        return shards[at], places[shards[at]].sequence(index - int(starts[at]))

    for at in np.flatnonzero(ids[order[1:]] == ids[order[:-1]]):
        yield where(int(order[at])), where(int(order[at + 1]))


def _mark(*parts: object) -> bytes:
    return _digest(MARK_BYTES, "\0".join(map(str, parts)))


def _digest(size: int, text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest()
