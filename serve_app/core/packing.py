"""Which sequences travel together: pending requests -> units of work of about equal cost.

Workspaces take turns in tokens, by their weights, and within one its requests do, a quantum each: deficit round robin
twice. Whose turn it is always gets into the next unit, and being served or passed over moves nobody behind a later
arrival: a request with p others of its workspace before it, alone there, contributes to one of the next p + 1 units.
What a workspace did not use it does not save. `dispatch.py` brings the clock and the replicas.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]
QUANTUM_TOKENS = 256  # one turn of a request: a short query fits whole, a passage too
TURN_TOKENS = 64  # of a workspace of weight 1: a few short queries, so that many workspaces are in one unit
LOOKED_AT = 64  # requests that are tried for the last bit of room: a unit must not cost more, the more wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Sequences end to end, without padding. ids: int32 [tokens]; lengths: int32 [sequences], their sum is tokens.

    firsts: int32 [sequences], of pairs alone: how many of a sequence's tokens are of the first text's type.
    """

    ids: TokenIds = field(repr=False)  # whoever has the tokenizer can read them
    lengths: TokenIds
    firsts: TokenIds | None = None

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def types(self) -> TokenIds:
        """int32 [tokens]: 0, and of pairs 1 where it is the second text's."""
        types = np.zeros(len(self.ids), np.int32)
        if self.firsts is not None:
            ends = np.cumsum(self.lengths)
            for first, end in zip((ends - self.lengths + self.firsts).tolist(), ends.tolist(), strict=True):
                types[first:end] = 1
        return types

    def slice(self, first: int, count: int) -> Packed:
        start = int(self.lengths[:first].sum())
        lengths = self.lengths[first : first + count]
        firsts = None if self.firsts is None else self.firsts[first : first + count]
        return Packed(ids=self.ids[start : start + int(lengths.sum())], lengths=lengths, firsts=firsts)

    def some(self, places: Sequence[int]) -> Packed:
        """These sequences, in this order."""
        ends = np.cumsum(self.lengths).tolist()
        starts = [0, *ends[:-1]]
        return Packed(
            ids=np.concatenate([self.ids[starts[at] : ends[at]] for at in places]),
            lengths=self.lengths[places],
            firsts=None if self.firsts is None else self.firsts[places],
        )

    @classmethod
    def join(cls, parts: Sequence[Packed]) -> Packed:
        if len(parts) == 1:
            return parts[0]
        firsts = [part.firsts for part in parts if part.firsts is not None]
        if firsts and len(firsts) < len(parts):
            raise ValueError("single texts beside pairs. This is a bug")
        return cls(
            ids=np.concatenate([part.ids for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            firsts=np.concatenate(firsts) if firsts else None,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Whose request it is, how many tokens its workspace gets in a round, relative to the others, and its time.

    within_s: seconds from now after which nobody waits for the answer any more.
    """

    workspace: str = ""
    weight: int = 1
    within_s: float = math.inf


ALONE = Share()


@dataclass(slots=True)
class _Tenant:
    """The requests of one workspace that wait, in turns. credit: tokens left of its turn; below 0, it overdrew."""

    workspace: str
    weight: int
    credit: int = 0
    tokens: int = 0
    turns: deque[int] = field(default_factory=deque)


@dataclass(slots=True)
class _Pending:
    """The sequences of one request that no unit has taken yet: from `next` on."""

    lengths: Sequence[int]
    tenant: _Tenant
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


@dataclass(slots=True)
class _Unit:
    """What goes into it, by request: [first, count]."""

    tokens_left: int
    sequences_left: int
    taken: dict[int, list[int]] = field(default_factory=dict)

    @property
    def has_room(self) -> bool:
        return self.tokens_left > 0 and self.sequences_left > 0

    def add(self, request: int, first: int, count: int, tokens: int) -> None:
        self.taken.setdefault(request, [first, 0])[1] += count
        self.tokens_left -= tokens
        self.sequences_left -= count


class PackingQueue:
    """The pending sequences of one model, in turns. Every sequence leaves exactly once: in a unit or by cancel()."""

    def __init__(self) -> None:
        self._pending: dict[int, _Pending] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._round: deque[_Tenant] = deque()
        self.sequences = 0
        self.tokens = 0

    def add(self, request: int, lengths: Sequence[int], share: Share = ALONE) -> None:
        """Queue a request's sequences, in order, behind those of its workspace. lengths: tokens, each >= 1."""
        if request in self._pending:
            raise ValueError(f"request {request} waits already. This is a bug")
        if not lengths:
            return
        tenant = self._tenants.get(share.workspace)
        if tenant is None:
            tenant = self._tenants[share.workspace] = _Tenant(share.workspace, share.weight)
            self._round.append(tenant)
        tenant.weight = share.weight
        tenant.turns.append(request)
        self._pending[request] = _Pending(lengths, tenant)
        self._count(tenant, len(lengths), sum(lengths))

    def cancel(self, request: int) -> None:
        """Forget what is pending of a request; nothing if that is nothing."""
        if pending := self._pending.get(request):
            left = pending.lengths[pending.next :]
            self._count(pending.tenant, -len(left), -sum(left))
            self._drop(request)

    def tokens_of(self, workspace: str) -> int:
        """What waits of this workspace."""
        tenant = self._tenants.get(workspace)
        return tenant.tokens if tenant else 0

    def weights(self) -> dict[str, int]:
        """Of the workspaces of which anything waits."""
        return {name: tenant.weight for name, tenant in self._tenants.items()}

    def next_unit(self, max_tokens: int, max_sequences: int) -> list[Span]:
        """At most so many tokens and sequences, one span a request; a longer sequence gets a unit alone. [] = empty.

        A sequence that does not fit leaves its request first in turn, where the next, empty unit has room for it.
        """
        unit = _Unit(max_tokens, max_sequences)
        while self._round and unit.has_room:
            tenant = self._round[0]
            if tenant.credit <= 0:
                tenant.credit += TURN_TOKENS * tenant.weight
            if tenant.credit <= 0:  # it overdrew by more than a turn
                self._round.rotate(-1)
                continue
            request = tenant.turns[0]
            if not self._take(unit, request):
                self._fill(unit)
                break
            if tenant.turns and tenant.turns[0] == request:
                tenant.turns.rotate(-1)
            if tenant.credit <= 0 and self._round and self._round[0] is tenant:
                self._round.rotate(-1)
        return [Span(request=request, first=first, count=count) for request, (first, count) in unit.taken.items()]

    def _fill(self, unit: _Unit) -> None:
        """What room is left goes to what fits, which is charged for it, and to nobody's place in turn."""
        waiting = (request for tenant in self._round for request in tenant.turns)
        for request in [*itertools.islice(waiting, LOOKED_AT)]:
            while request in self._pending and unit.has_room and self._take(unit, request):
                pass

    def _take(self, unit: _Unit, request: int) -> bool:
        """One turn of a request. False: its next sequence does not fit."""
        pending = self._pending[request]
        first, tenant = pending.next, pending.tenant
        count, cost = pending.take(unit.tokens_left, unit.sequences_left, alone=not unit.taken)
        if count == 0:
            return False
        unit.add(request, first, count, cost)
        tenant.credit -= cost
        self._count(tenant, -count, -cost)
        if pending.next == len(pending.lengths):
            self._drop(request)
        return True

    def _drop(self, request: int) -> None:
        tenant = self._pending.pop(request).tenant
        tenant.turns.remove(request)
        if not tenant.turns:
            self._round.remove(tenant)
            del self._tenants[tenant.workspace]

    def _count(self, tenant: _Tenant, sequences: int, tokens: int) -> None:
        self.sequences += sequences
        self.tokens += tokens
        tenant.tokens += tokens


def runs(lengths: Sequence[int], step: int) -> Iterator[tuple[int, int]]:
    """Neighbours whose lengths round up to the same multiple of `step`: (first, count), over sorted lengths."""
    first = 0
    for index in range(1, len(lengths) + 1):
        if index == len(lengths) or -(-lengths[index] // step) != -(-lengths[first] // step):
            yield first, index - first
            first = index
