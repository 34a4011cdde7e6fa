"""Which sequences travel together: pending requests -> units of work of about equal cost.

Requests take turns, a quantum of tokens each. The request whose turn it is always gets into the next unit, and being
served or passed over moves nobody behind a later arrival: so a request with p others before it contributes to one of
the next p + 1 units. `dispatch.py` brings the clock and the replicas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]
QUANTUM_TOKENS = 256  # one turn: a short query fits whole, a passage too


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Sequences end to end, without padding. ids: int32 [tokens]; lengths: int32 [sequences], their sum is tokens."""

    ids: TokenIds = field(repr=False)  # whoever has the tokenizer can read them
    lengths: TokenIds

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def slice(self, first: int, count: int) -> Packed:
        start = int(self.lengths[:first].sum())
        lengths = self.lengths[first : first + count]
        return Packed(ids=self.ids[start : start + int(lengths.sum())], lengths=lengths)

    @classmethod
    def join(cls, parts: Sequence[Packed]) -> Packed:
        if len(parts) == 1:
            return parts[0]
        return cls(
            ids=np.concatenate([part.ids for part in parts]), lengths=np.concatenate([part.lengths for part in parts])
        )

    def halves(self) -> tuple[Packed, Packed]:
        middle = len(self.lengths) // 2
        return self.slice(0, middle), self.slice(middle, len(self.lengths) - middle)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive sequences of one request: what it has in one unit."""

    request: int
    first: int
    count: int


@dataclass(slots=True)
class _Pending:
    """The sequences of one request that no unit has taken yet: from `next` on."""

    lengths: Sequence[int]
    next: int = 0

    def take(self, room_tokens: int, room_sequences: int, *, alone: bool) -> tuple[int, int]:
        """(sequences, tokens) of one turn. `alone` = the unit is empty: then one sequence goes in at any length."""
        count = tokens = 0
        for length in self.lengths[self.next : self.next + room_sequences]:
            if tokens + length > room_tokens and not (alone and count == 0):
                break
            count, tokens = count + 1, tokens + length
            if tokens >= QUANTUM_TOKENS:
                break
        self.next += count
        return count, tokens


class PackingQueue:
    """The pending sequences of one model, in turns. Every sequence leaves exactly once: in a unit or by cancel()."""

    def __init__(self) -> None:
        self._pending: dict[int, _Pending] = {}
        self._turns: deque[int] = deque()
        self.sequences = 0
        self.tokens = 0

    def add(self, request: int, lengths: Sequence[int]) -> None:
        """Queue a request's sequences, in order, behind the requests that wait already. lengths: tokens, each >= 1."""
        if request in self._pending:
            raise ValueError(f"request {request} waits already. This is a bug")
        if lengths:
            self._pending[request] = _Pending(lengths)
            self._turns.append(request)
            self.sequences += len(lengths)
            self.tokens += sum(lengths)

    def cancel(self, request: int) -> None:
        """Forget what is pending of a request; nothing if that is nothing."""
        if pending := self._pending.pop(request, None):
            self._turns.remove(request)
            self.sequences -= len(pending.lengths) - pending.next
            self.tokens -= sum(pending.lengths[pending.next :])

    def next_unit(self, max_tokens: int, max_sequences: int) -> list[Span]:
        """At most so many tokens and sequences, one span a request; a longer sequence gets a unit alone. [] = empty.

        A sequence that does not fit leaves its request first in turn, where the next, empty unit has room for it.
        """
        taken: dict[int, list[int]] = {}  # request -> [first, count]
        passed: list[int] = []  # too long for what room was left: first in turn next time
        sated: list[int] = []  # the same, but already in this unit: they have had their turn
        tokens = sequences = 0
        while self._turns and tokens < max_tokens and sequences < max_sequences:
            request = self._turns.popleft()
            pending = self._pending[request]
            first = pending.next
            count, cost = pending.take(max_tokens - tokens, max_sequences - sequences, alone=not taken)
            if count == 0:
                (sated if request in taken else passed).append(request)
                continue
            taken.setdefault(request, [first, 0])[1] += count
            tokens, sequences = tokens + cost, sequences + count
            if pending.next < len(pending.lengths):
                self._turns.append(request)
            else:
                del self._pending[request]
        self._turns.extendleft(reversed(passed))
        self._turns.extend(sated)
        self.tokens -= tokens
        self.sequences -= sequences
        return [Span(request=request, first=first, count=count) for request, (first, count) in taken.items()]


def runs(lengths: Sequence[int], step: int) -> Iterator[tuple[int, int]]:
    """Neighbours whose lengths round up to the same multiple of `step`: (first, count), over sorted lengths."""
    first = 0
    for index in range(1, len(lengths) + 1):
        if index == len(lengths) or -(-lengths[index] // step) != -(-lengths[first] // step):
            yield first, index - first
            first = index
