"""What a model's example does to a store: attempts of two ingresses that stall, crash and ask again, while time leaps.

Every answer is held against `promise.py`. `model.py` draws the moves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from serve_app.core.idempotency import (
    Abandon,
    Begin,
    Complete,
    Emit,
    Outcome,
    Proceed,
    Renew,
    Replay,
    Settled,
    Step,
    Stored,
    claim_id,
    op_id,
)
from serve_app.core.ledger import Kind, UsageEvent
from serve_app.stores import Store, open_store
from tests.stores.ledger import require
from tests.stores.promise import HOUR_MS, Promise

START_MS = 4_102_444_800_000  # the year 2100: nothing that a server dates by its own clock lapses during a test
LEASE_MS = 30_000
QUOTA_BYTES = 650
WORKSPACES, KEYLESS = ("ws-1", "ws-10"), "ws-2"
SHARDS = (5, 7)  # the two lie in the first, the third in the other
CAPS = {"ws-10": 8, "ws-2": 25}  # micro-dollars a month; a bill is six or ten
KEYS = tuple((workspace, key) for workspace in WORKSPACES for key in ("key-1", "key-2"))  # the same texts in both
BODIES = ("body-1", "body-2")

T = TypeVar("T")


class Turn(StrEnum):
    """What an attempt may do after its first begin."""

    COMPLETE = "complete"
    COMPLETE_ALL = "complete all"
    ABANDON = "abandon"
    RENEW = "renew"
    BEGIN_AGAIN = "begin again"


class Sent(StrEnum):
    """How a message and its answer travel. The store has done what was asked, each time."""

    ONCE = "once"
    TWICE = "twice"
    UNANSWERED = "unanswered"


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One try of one ingress. What it knows is what answers reached it."""

    number: int
    begin: Begin
    born_ms: int
    op: str | None = None  # it was told to run this
    complete: Complete | None = None  # it has sent this, at least once
    answered: bool = False  # its client has an answer


class _Message(Protocol):
    def __call__(self, at: int, attempts: Sequence[Attempt], *, lost: bool) -> object: ...


@dataclass(slots=True)
class World:
    """A store as two ingresses see it, and the promise that it gave."""

    url: str
    loop: asyncio.AbstractEventLoop
    now_ms: int = START_MS
    promise: Promise = field(default_factory=Promise)
    attempts: list[Attempt] = field(default_factory=list)
    emits: list[Emit] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    last_key: tuple[str, str] = KEYS[0]

    def __post_init__(self) -> None:
        self._open()
        self._open()

    def close(self) -> None:
        while self.stores:
            self._wait(self.stores.pop().close())

    # Moves

    def begin(self, key: tuple[str, str] | None, bodies: Sequence[str], small: bool, at: int, sent: Sent) -> None:
        """As many new attempts as bodies, in one batch. key: None for the last one."""
        attempts = [self._attempt(key, body, reserve_bytes=100 if small else 600) for body in bodies]
        self._send(self._begin, at, attempts, sent)

    def go_on(self, what: Turn, which: int, at: int, sent: Sent) -> None:
        """Whoever was told to run may finish, however long ago that was, and whatever he did since."""
        running, waiting = self._running(), self._waiting()
        match what:
            case Turn.COMPLETE if running:
                self._send(self._complete, at, [_pick(running, which)], sent)
            case Turn.COMPLETE_ALL if running:
                self._send(self._complete, at, running, sent)
            case Turn.BEGIN_AGAIN if waiting:
                self._send(self._begin, at, [_pick(waiting, which)], sent)
            case Turn.RENEW if self.attempts:
                begin = _pick(self.attempts, which).begin
                step = Renew(claim=begin.claim, workspace=begin.workspace, attempt=begin.attempt, lease_ms=LEASE_MS)
                self._ask(at, [step])
            case Turn.ABANDON if self.attempts:
                begin = _pick(self.attempts, which).begin
                self._ask(at, [Abandon(claim=begin.claim, workspace=begin.workspace, attempt=begin.attempt)])

    def sleep(self, leap_ms: int) -> None:
        self.now_ms += leap_ms

    def sleep_until_something_lapses(self, which: int, early_ms: int) -> None:
        moments = [it - early_ms for it in self.promise.moments() if it - early_ms >= self.now_ms]
        if moments:
            self.now_ms = moments[which % len(moments)]

    def emit(self, workspace: str, again: int | None, at: int) -> None:
        """again: which one; None: a new one."""
        if again is None or not self.emits:
            number = len(self.emits)
            event = self._event(f"request-{number}", workspace, number)
            self.emits.append(Emit(event=event, cap_micros=CAPS.get(workspace)))
        self._ask(at, [_pick(self.emits, again or 0)])

    def purge(self, limit: int, at: int) -> None:
        require(self._wait(self.stores[at].purge(limit)) <= limit, "a purge has a limit")

    def restart(self, at: int) -> None:
        """One of the ingresses; the new one looks whether all is there."""
        self._wait(self.stores.pop(at).close())
        self._open()
        self._audit()

    def end(self) -> None:
        """Every lease has lapsed: each key is either free to run, or has its reply."""
        self.now_ms += LEASE_MS
        bound = {claim: key.kept.fingerprint for claim, key in self.promise.keys.items() if key.kept is not None}
        attempts = [self._attempt(key, BODIES[0], reserve_bytes=0) for key in KEYS]
        for it in attempts:
            it.begin = replace(it.begin, fingerprint=bound.get(it.begin.claim, BODIES[0]))
        outcomes = self._begin(0, attempts, lost=False)
        require(all(isinstance(it, Proceed | Replay) for it in outcomes), "after its lease, a key moves on")
        self._complete(1, [it for it in attempts if it.op is not None], lost=False)
        self._audit()

    # What the moves are made of

    def _send(self, message: _Message, at: int, attempts: Sequence[Attempt], sent: Sent) -> None:
        if sent is not Sent.ONCE:
            message(at, attempts, lost=True)
        if sent is not Sent.UNANSWERED:
            message(at, attempts, lost=False)

    def _begin(self, at: int, attempts: Sequence[Attempt], *, lost: bool) -> list[Outcome]:
        outcomes = self._ask(at, [attempt.begin for attempt in attempts])
        for attempt, outcome in zip(attempts, outcomes, strict=True):
            if isinstance(outcome, Proceed) and not lost:
                attempt.op = outcome.op
            elif isinstance(outcome, Replay) and not lost:
                self._show(attempt, outcome.op, outcome.reply)
        return outcomes

    def _complete(self, at: int, attempts: Sequence[Attempt], *, lost: bool) -> None:
        steps = [attempt.complete or self._finish(attempt) for attempt in attempts]
        for attempt, step, outcome in zip(attempts, steps, self._ask(at, steps), strict=True):
            if isinstance(outcome, Settled) and not lost:
                self._show(attempt, step.op, step.reply)
            elif isinstance(outcome, Replay) and not lost:
                self._show(attempt, outcome.op, outcome.reply)
            attempt.answered = attempt.answered or not lost

    def _show(self, attempt: Attempt, op: str, reply: Stored) -> None:
        attempt.answered = True
        (tokens,) = {
            it.complete.event.quantity
            for it in self.attempts
            if it.complete is not None and it.complete.event is not None and it.complete.reply == reply
        }
        self.promise.see(op, reply, tokens)

    def _attempt(self, key: tuple[str, str] | None, body: str, *, reserve_bytes: int) -> Attempt:
        self.last_key = workspace, name = key or self.last_key
        number = len(self.attempts)
        claim, attempt = claim_id(workspace, "/v1/embeddings", name), f"attempt-{number}"
        begin = Begin(
            claim=claim,
            workspace=workspace,
            fingerprint=body,
            attempt=attempt,
            op=op_id(claim, attempt),
            lease_ms=LEASE_MS,
            reserve_bytes=reserve_bytes,
            max_bytes=QUOTA_BYTES,
            max_records=len(KEYS),
        )
        self.attempts.append(Attempt(number=number, begin=begin, born_ms=self.now_ms))
        return self.attempts[-1]

    def _finish(self, attempt: Attempt) -> Complete:
        """Every attempt computes a reply of its own, and counts other tokens, so that no two can be mixed up."""
        begin, op, number = attempt.begin, attempt.op, attempt.number
        assert op is not None
        body = Stored(body=b"\0\xff\r\n" + attempt.begin.attempt.encode())
        attempt.complete = Complete(
            claim=begin.claim,
            workspace=begin.workspace,
            op=op,
            reply=Stored(blob=f"{op}-{number:032}") if number % 3 == 2 else body,
            bytes=50 + number,
            event=self._event(op, begin.workspace, number),
            cap_micros=CAPS.get(begin.workspace),
        )
        return attempt.complete

    def _event(self, id: str, workspace: str, number: int) -> UsageEvent:
        return UsageEvent(
            id=id,
            kind=Kind.TOKENS,
            workspace=workspace,
            time_ms=self.now_ms,
            quantity=1000 + number,
            unit_price=("0.01", "0.006")[number % 2],
            rate_card="default-1",
            plan="pro",
            tier=("flex", "active")[number % 2],
            model="all-MiniLM-L6-v2",
            size_class="small",
            api_key=("", "key-1", "key-2")[number % 3],
            details={"request_id": f"request {number}"},
        )

    def _waiting(self) -> list[Attempt]:
        """Those that ask again: no answer has reached them, or they wait their turn. A request never lasts an hour."""
        young_ms = self.now_ms - HOUR_MS
        return [it for it in self.attempts if it.op is None and not it.answered and it.born_ms > young_ms]

    def _running(self) -> list[Attempt]:
        """Those that compute, or have computed: some of them long after somebody else took over."""
        return [it for it in self.attempts if it.op is not None and not it.answered]

    def _ask(self, at: int, steps: Sequence[Step]) -> list[Outcome]:
        outcomes = self._wait(self.stores[at].run(steps))
        for step, outcome in zip(steps, outcomes, strict=True):
            self.promise.judge(step, outcome, self.now_ms)
        return outcomes

    def _audit(self) -> None:
        self._wait(self.promise.audit(self.stores[-1], self.now_ms, shards=SHARDS))

    def _open(self) -> None:
        self.stores.append(self._wait(open_store(self.url, clock=lambda: self.now_ms)))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)


def _pick(them: Sequence[T], which: int) -> T:
    """Counted from the newest."""
    return them[-1 - which % len(them)]
