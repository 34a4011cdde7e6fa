"""From requests to units of work and back: keeps each model's pending sequences and ships them to its replicas.

A replica has at most one unit of a lane more than it computes at once: enough that it never idles, few enough that who
goes next is decided here, in turns; and smaller express ones while workspaces get in each other's way. What a unit
holds, `core/packing.py` decides; `send` is the only way out.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field, fields

import numpy as np

from serve_app import tracing
from serve_app.core.errors import AtCapacity, InternalError, ServiceError
from serve_app.core.packing import ALONE, Packed, PackingQueue, Share, Span
from serve_app.core.vectors import Vectors

AT_THE_DOOR = 1  # units that wait at a replica for those that it computes
EXPRESS_TOKENS = 256  # a request this short travels in the express lane: beside bulk work, not behind it
DOOR_TOKENS = (
    256  # of short requests that wait, before some leave for a replica that still computes others: see _may_leave
)
CROWD = 4  # an express unit is so much smaller while several workspaces send short requests,
CROWD_TOKENS = 2_048  # and no larger than this
CROWD_S = 1.0  # for how long after the last of them
RATE_HALF_LIFE_S = 10.0  # of the measured tokens per second, which `Retry-After` is made from

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One call to a replica. `fingerprint` is of the model whose tokenizer made the ids.

    ingress: whose call; queued_tokens: what waits there, in both lanes, when it left. The autoscaler goes by them.
    """

    packed: Packed
    express: bool
    fingerprint: str
    ingress: str = ""
    queued_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedUnit(Unit):
    """One with requests that are traced. A class of its own: no other unit grows by a byte."""

    traces: tuple[str, ...]

    @classmethod
    def of(cls, unit: Unit, traces: tuple[str, ...]) -> TracedUnit:
        return cls(traces=traces, **{it.name: getattr(unit, it.name) for it in fields(Unit)})


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitReply:
    """vectors: float32 [sequences, dimensions], the encoder's. compute_s: of the batch that the unit was part of."""

    vectors: Vectors
    compute_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The rows of one request, in its order, and where the time went: its longest batch, and all that was waiting.

    express: the lane that it took; None: nothing had to be computed.
    """

    vectors: Vectors
    queue_s: float
    compute_s: float
    express: bool | None = None


@dataclass(slots=True, kw_only=True)
class _Flight:
    """A request whose rows are not all there yet."""

    packed: Packed
    vectors: Vectors
    missing: int
    done: asyncio.Future[None]
    came_s: float
    trace: str | None
    compute_s: float = 0.0

    def land(self, span: Span, rows: Vectors, compute_s: float) -> None:
        self.vectors[span.first : span.first + span.count] = rows
        self.missing -= span.count
        self.compute_s = max(self.compute_s, compute_s)
        if self.missing == 0 and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: ServiceError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(slots=True, kw_only=True)
class _Lane:
    """One of a model's two queues, and its units under way. at_once: units that a replica computes."""

    express: bool
    at_once: int
    queue: PackingQueue = field(default_factory=PackingQueue)
    under_way: dict[asyncio.Task[None], list[Span]] = field(default_factory=dict)


class Dispatcher:
    """All requests of this process for one model."""

    def __init__(
        self,
        send: Callable[[Unit], Awaitable[UnitReply]],
        *,
        fingerprint: str,
        dimensions: int,
        unit_tokens: int,
        unit_sequences: int,
        at_once: Callable[[bool], int],
        max_pending_tokens: int,
        max_workspace_tokens: int | None = None,
    ) -> None:
        """at_once: units that a replica computes in a lane, express or not. max_workspace_tokens: that may wait."""
        self.replicas = 1  # kept up to date by whoever knows
        self._send = send
        self._ingress = uuid.uuid4().hex
        self._fingerprint = fingerprint
        self._dimensions = dimensions
        self._unit_tokens = unit_tokens
        self._unit_sequences = unit_sequences
        self._max_pending_tokens = max_pending_tokens
        self._max_workspace_tokens = max_workspace_tokens or max_pending_tokens
        self._lanes = {express: _Lane(express=express, at_once=at_once(express)) for express in (True, False)}
        self._flights: dict[int, _Flight] = {}
        self._numbers = itertools.count()
        self._rate = _Rate()
        self._crowd = _Crowd()

    @property
    def _queued_tokens(self) -> int:
        return sum(lane.queue.tokens for lane in self._lanes.values())

    @property
    def pending_sequences(self) -> int:
        """Sequences of requests that are not answered yet, under way or not."""
        return sum(flight.missing for flight in self._flights.values())

    @property
    def waiting_tokens(self) -> dict[bool, int]:
        """Tokens that no unit has taken yet, by lane: express or not."""
        return {express: lane.queue.tokens for express, lane in self._lanes.items()}

    async def encode(self, packed: Packed, share: Share = ALONE) -> Encoded:
        """Vectors in the order of the sequences. A caller that is cancelled leaves the queue. Raises ServiceError."""
        lane = self._lanes[packed.tokens <= EXPRESS_TOKENS]
        self._admit(lane, packed, share)
        start, request = time.perf_counter(), next(self._numbers)
        flight = self._flights[request] = _Flight(
            packed=packed,
            vectors=np.empty((len(packed.lengths), self._dimensions), np.float32),
            missing=len(packed.lengths),
            done=asyncio.get_running_loop().create_future(),
            came_s=start,
            trace=tracing.here(),
        )
        try:
            lane.queue.add(request, packed.lengths.tolist(), share)
            if lane.express:
                self._crowd.came(share.workspace, start)
            self._pump(lane)
            await flight.done
        finally:
            self._leave(lane, request)
        waited_s = time.perf_counter() - start
        return Encoded(
            vectors=flight.vectors,
            queue_s=max(0.0, waited_s - flight.compute_s),
            compute_s=flight.compute_s,
            express=lane.express,
        )

    def abandon(self, error: ServiceError) -> None:
        """Fail every request that is not answered yet: nobody is left to answer it."""
        for flight in self._flights.values():
            flight.fail(error)

    def _admit(self, lane: _Lane, packed: Packed, share: Share) -> None:
        """An idle queue takes any request; a full one says how long it needs at the measured rate.

        A full one, too, takes what keeps a workspace within its part of it: so at worst twice as much waits. What would
        be computed after its caller's time is over, is refused at once: that time belongs to those who still wait.
        """
        waiting = self._queued_tokens
        if not waiting:
            return
        if waiting + packed.tokens > self._max_pending_tokens and not self._has_room(packed, share):
            raise AtCapacity(
                f"{waiting:,} tokens wait for this model; with yours they were more than {self._max_pending_tokens:,}.",
                retry_after_s=self._rate.seconds_for(waiting),
            )
        own = self._queued_tokens_of(share.workspace)
        if own and own + packed.tokens > self._max_workspace_tokens:
            raise AtCapacity(
                f"{own:,} tokens of your workspace wait for this model; with these they were more than "
                f"{self._max_workspace_tokens:,}.",
                retry_after_s=self._turn_s(self._lanes.values(), share),
            )
        if self._rate.measured and self._rate.seconds_for(lane.queue.tokens + packed.tokens) > share.within_s:
            wait_s = self._turn_s([lane], share, packed.tokens)  # behind all of them it were too late
            if wait_s > share.within_s:
                raise AtCapacity(
                    f"This model is busy: you would wait {wait_s:.0f} s, and your time is {share.within_s:.0f} s.",
                    retry_after_s=wait_s - share.within_s,
                )

    def _turn_s(self, lanes: Collection[_Lane], share: Share, more: int = 0) -> float:
        """How long what waits of a workspace there takes, and so many tokens more: it gets its part of the turns."""
        part = share.weight / sum(self._weights(lanes, share).values())
        own = sum(lane.queue.tokens_of(share.workspace) for lane in lanes)
        every = sum(lane.queue.tokens for lane in lanes)
        return self._rate.seconds_for(min(every + more, round((own + more) / part)))

    def _has_room(self, packed: Packed, share: Share) -> bool:
        weights = self._weights(self._lanes.values(), share)
        part = self._max_pending_tokens * share.weight / sum(weights.values())
        if len(weights) == 1 or self._queued_tokens + packed.tokens > 2 * self._max_pending_tokens:
            return False
        return self._queued_tokens_of(share.workspace) + packed.tokens <= part

    def _weights(self, lanes: Collection[_Lane], share: Share) -> dict[str, int]:
        """Of the workspaces that take turns there, this one included."""
        weights = {share.workspace: share.weight}
        for lane in lanes:
            weights |= lane.queue.weights()
        return weights

    def _queued_tokens_of(self, workspace: str) -> int:
        return sum(lane.queue.tokens_of(workspace) for lane in self._lanes.values())

    def _leave(self, lane: _Lane, request: int) -> None:
        """Answered, failed or given up: nothing of this request is worth a place at a replica any more."""
        del self._flights[request]
        lane.queue.cancel(request)
        for task, spans in lane.under_way.items():
            if not any(span.request in self._flights for span in spans):
                task.cancel()

    def _pump(self, lane: _Lane) -> None:
        while self._may_leave(lane):
            spans = lane.queue.next_unit(self._size(lane), self._unit_sequences)
            if not spans:
                return
            # In a context of its own: Serve cancels what was called on behalf of a request that ends, and a unit is
            # called on behalf of all its requests.
            task = asyncio.get_running_loop().create_task(self._ship(lane, spans), context=contextvars.Context())
            lane.under_way[task] = spans
            task.add_done_callback(lambda done: self._next(lane, done))
            self._rate.departed(time.perf_counter())

    def _may_leave(self, lane: _Lane) -> bool:
        """Whether a unit may: for a replica that is free, or to wait at the door of one that is not.

        What waits at a door cannot grow any more. Of short requests the first would go alone, and cost a call and a
        forward of its own: while all replicas compute, they wait here until they are many.
        """
        replicas, under_way = max(1, self.replicas), len(lane.under_way)
        if under_way < lane.at_once * replicas:
            return True
        many = not lane.express or lane.queue.tokens >= DOOR_TOKENS
        return many and under_way < (lane.at_once + AT_THE_DOOR) * replicas

    def _size(self, lane: _Lane) -> int:
        """Tokens of the next unit: what is being computed, nobody of its lane can overtake."""
        crowded = lane.express and self._crowd.beside(lane.queue.weights().keys(), time.perf_counter())
        return max(1, min(self._unit_tokens // CROWD, CROWD_TOKENS)) if crowded else self._unit_tokens

    def _next(self, lane: _Lane, done: asyncio.Task[None]) -> None:
        spans = lane.under_way.pop(done)
        if done.cancelled():  # by _leave, and then nobody is left; or by whoever had the unit
            self._fail(spans, InternalError("The model dropped this request."))
        self._rate.landed(time.perf_counter())
        self._pump(lane)

    async def _ship(self, lane: _Lane, spans: list[Span]) -> None:
        """One unit, out and back. If it fails, its requests are tried once more, each alone: one may be to blame."""
        try:
            await self._carry(lane, spans)
        except ServiceError as error:
            self._fail(spans, error)
        except Exception as error:
            _log("a unit failed", error)
            for span in spans:
                await self._carry_alone(lane, span)

    async def _carry_alone(self, lane: _Lane, span: Span) -> None:
        try:
            await self._carry(lane, [span])
        except ServiceError as error:
            self._fail([span], error)
        except Exception as error:
            _log("a unit of one request failed again", error)
            self._fail([span], InternalError("The model failed on this request."))

    async def _carry(self, lane: _Lane, spans: list[Span]) -> None:
        wanted = [span for span in spans if span.request in self._flights]
        if not wanted:
            return
        packed = Packed.join([self._flights[span.request].packed.slice(span.first, span.count) for span in wanted])
        unit = Unit(
            packed=packed,
            express=lane.express,
            fingerprint=self._fingerprint,
            ingress=self._ingress,
            queued_tokens=self._queued_tokens,
        )
        flights = [self._flights[span.request] for span in wanted]
        traced = {it.trace: it.came_s for it in flights if it.trace is not None}
        for trace, came_s in traced.items():
            tracing.past("queue", trace, time.perf_counter() - came_s)
        with tracing.spans("dispatch", [*traced], tokens=packed.tokens, requests=len(wanted)) as traces:
            reply = await self._send(TracedUnit.of(unit, traces) if traces else unit)
        if reply.vectors.shape != (len(packed.lengths), self._dimensions):
            raise RuntimeError(f"a reply of shape {reply.vectors.shape}. This is a bug")
        self._rate.carried(packed.tokens, time.perf_counter())
        row = 0
        for span in wanted:
            if flight := self._flights.get(span.request):
                flight.land(span, reply.vectors[row : row + span.count], reply.compute_s)
            row += span.count

    def _fail(self, spans: list[Span], error: ServiceError) -> None:
        for span in spans:
            if flight := self._flights.get(span.request):
                flight.fail(error)


class _Crowd:
    """The workspaces that sent a short request within the last `CROWD_S`."""

    def __init__(self) -> None:
        self._came_s: dict[str, float] = {}  # oldest first

    def came(self, workspace: str, now_s: float) -> None:
        self._came_s.pop(workspace, None)
        self._came_s[workspace] = now_s

    def beside(self, waiting: Collection[str], now_s: float) -> bool:
        """Whether, with those whose requests wait, they are several."""
        while self._came_s and now_s - self._came_s[oldest := next(iter(self._came_s))] > CROWD_S:
            del self._came_s[oldest]
        return len(self._came_s.keys() | set(waiting)) > 1


class _Rate:
    """Tokens per second while anything is under way, over about the last `RATE_HALF_LIFE_S` of such time."""

    def __init__(self) -> None:
        self._tokens = self._busy_s = self._last_s = 0.0
        self._under_way = 0

    def departed(self, now_s: float) -> None:
        self._advance(now_s)
        self._under_way += 1

    def landed(self, now_s: float) -> None:
        self._advance(now_s)
        self._under_way -= 1

    def carried(self, tokens: int, now_s: float) -> None:
        self._advance(now_s)
        self._tokens += tokens

    @property
    def measured(self) -> bool:
        return self._tokens > 0

    def seconds_for(self, tokens: int) -> float:
        """How long so many tokens take; before anything was measured, a second."""
        return tokens * self._busy_s / self._tokens if self._tokens else 1.0

    def _advance(self, now_s: float) -> None:
        if self._under_way:
            passed_s = now_s - self._last_s
            fade = 0.5 ** (passed_s / RATE_HALF_LIFE_S)
            self._tokens, self._busy_s = self._tokens * fade, self._busy_s * fade + passed_s
        self._last_s = now_s


def _log(what: str, error: Exception) -> None:
    """Type and place, never the exception's own words: they may quote a caller."""
    logger.error("%s: %s\n%s", what, type(error).__qualname__, "".join(traceback.format_tb(error.__traceback__)))
