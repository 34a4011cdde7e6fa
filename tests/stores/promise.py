"""What the promise allows a store to answer, written from the outcomes: each says what must have been true before it.

It is no second machine: it never predicts, it holds a store to its word, with times of its own. `model.py` asks the
questions; what a ledger must be like at any time is in `ledger.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from serve_app.core.caps import notices, picos
from serve_app.core.idempotency import (
    Abandon,
    Begin,
    Busy,
    Capped,
    Complete,
    Emit,
    Emitted,
    Fenced,
    Freed,
    Holdings,
    Ignored,
    Mismatch,
    Outcome,
    OverQuota,
    Proceed,
    Record,
    Renew,
    Renewed,
    Replay,
    Settled,
    State,
    Step,
    Stored,
)
from serve_app.core.ledger import SHARDS, UsageEvent, month_of
from serve_app.stores import Store
from tests.stores.ledger import read_ledger, require

HOUR_MS = 60 * 60 * 1000
REMEMBERED_MS = 24 * HOUR_MS + 5 * 60 * 1000


@dataclass(slots=True, kw_only=True)
class Work:
    """An operation that somebody was told to run, and that nobody has finished or given up."""

    op: str
    fingerprint: str
    holder: str  # the attempt that was told last
    attempts: int
    lease_ends_ms: int
    forgotten_ms: int
    bytes: int


@dataclass(slots=True, kw_only=True)
class Success:
    op: str
    fingerprint: str
    reply: Stored
    tokens: int
    forgotten_ms: int
    bytes: int


@dataclass(slots=True, kw_only=True)
class Key:
    """What the world may know of one idempotency key. At most one of the two is there."""

    workspace: str
    work: Work | None = None
    success: Success | None = None

    def forget(self, now_ms: int) -> None:
        if self.work is not None and self.work.forgotten_ms <= now_ms:
            self.work = None
        if self.success is not None and self.success.forgotten_ms <= now_ms:
            self.success = None

    @property
    def kept(self) -> Work | Success | None:
        return self.success or self.work


@dataclass(slots=True)
class Promise:
    """All that was asked and answered so far, as far as it still binds."""

    keys: dict[str, Key] = field(default_factory=dict)  # by claim
    bills: dict[str, UsageEvent] = field(default_factory=dict)  # by event id: what the ledger must hold, and no more
    seen: dict[str, tuple[Stored, int]] = field(default_factory=dict)  # by op: what a client got, and its tokens

    def judge(self, step: Step, outcome: Outcome, now_ms: int) -> None:
        """Raises BrokenPromise if the store must not answer this, at this moment, after all that it answered before."""
        for key in self.keys.values():
            key.forget(now_ms)
        if isinstance(step, Emit):
            self._emitted(step, outcome)
            return
        key = self.keys.setdefault(step.claim, Key(workspace=step.workspace))
        match step:
            case Begin():
                self._begun(key, step, outcome, now_ms)
            case Renew():
                _renewed(key, step, outcome, now_ms)
            case Complete():
                self._completed(key, step, outcome, now_ms)
            case Abandon():
                _abandoned(key, step, outcome)

    def see(self, op: str, reply: Stored, tokens: int) -> None:
        """A client was given this reply."""
        require(self.seen.setdefault(op, (reply, tokens)) == (reply, tokens), "an operation has one reply")

    def spent(self, workspace: str, month: str) -> int:
        """Pico-dollars."""
        return sum(
            picos(bill) for bill in self.bills.values() if (bill.workspace, month_of(bill.day)) == (workspace, month)
        )

    def _capped(self, step: Complete | Emit) -> bool:
        assert step.event is not None
        spent = self.spent(step.event.workspace, month_of(step.event.day))
        return step.cap_micros is not None and spent >= 1_000_000 * step.cap_micros

    def _bill(self, step: Complete | Emit) -> None:
        """The bill, and the warnings that are due with it."""
        assert step.event is not None
        self.bills[step.event.id] = step.event
        if step.cap_micros is not None:
            spent = self.spent(step.event.workspace, month_of(step.event.day))
            due = [it.event for it in notices(step.event, step.cap_micros) if spent >= it.at_picos]
            for notice in due:
                self.bills.setdefault(notice.id, notice)

    def _emitted(self, step: Emit, outcome: Outcome) -> None:
        match outcome:
            case Emitted(new=new):
                require(new == (step.event.id not in self.bills), "an event is written once, and it is told")
                require(not new or not self._capped(step), "past the cap nothing is billed")
                if new:
                    self._bill(step)
            case Capped():
                require(step.event.id not in self.bills and self._capped(step), "a cap stops what is past it")
            case _:
                require(False, "not an answer to Emit")

    def holdings(self, workspace: str) -> Holdings:
        kept = [key.kept for key in self.keys.values() if key.workspace == workspace]
        return Holdings(
            records=sum(it is not None for it in kept), bytes=sum(it.bytes for it in kept if it is not None)
        )

    def moments(self) -> list[int]:
        """When something will lapse."""
        works = [key.work for key in self.keys.values() if key.work is not None]
        kept = [key.kept for key in self.keys.values() if key.kept is not None]
        return sorted({work.lease_ends_ms for work in works} | {it.forgotten_ms for it in kept})

    def _begun(self, key: Key, step: Begin, outcome: Outcome, now_ms: int) -> None:
        work, success, bound = key.work, key.success, key.kept
        held = self.holdings(step.workspace)
        fits = held.records < step.max_records and held.bytes + step.reserve_bytes <= step.max_bytes
        match outcome:
            case Proceed(op=op, attempts=attempts):
                require(success is None, "what succeeded is not run again for 24 hours")
                if work is None:
                    require(fits, "the quota holds")
                    require(op == step.op and attempts == 1, "a new operation goes by the id that was offered")
                    require(op not in self.bills, "a new operation has no bill yet")
                    key.work = Work(
                        op=op,
                        fingerprint=step.fingerprint,
                        holder=step.attempt,
                        attempts=1,
                        lease_ends_ms=now_ms + step.lease_ms,
                        forgotten_ms=now_ms + HOUR_MS,
                        bytes=step.reserve_bytes,
                    )
                    return
                require(work.fingerprint == step.fingerprint, "a key that runs is not given to another request")
                require(op == work.op, "an operation keeps its id when it is taken over")
                if work.holder != step.attempt:
                    require(work.lease_ends_ms <= now_ms, "two attempts never hold live leases")
                    work.holder, work.attempts = step.attempt, work.attempts + 1
                require(attempts == work.attempts, "attempts are counted")
                work.lease_ends_ms, work.forgotten_ms = now_ms + step.lease_ms, now_ms + HOUR_MS
            case Replay():
                require(success is not None, "only a success is replayed")
                assert success is not None
                require(success.fingerprint == step.fingerprint, "another request is not given the reply")
                require(outcome == Replay(reply=success.reply, op=success.op), "the first reply is the one")
            case Mismatch():
                require(bound is not None and bound.fingerprint != step.fingerprint, "an equal request is no mismatch")
            case Busy(lease_left_ms=left_ms):
                require(work is not None, "only what runs is busy")
                assert work is not None
                require(work.fingerprint == step.fingerprint, "another request is a mismatch at once")
                require(work.holder != step.attempt, "an attempt does not wait for itself")
                require(left_ms == work.lease_ends_ms - now_ms > 0, "a lease that has lapsed stops nobody")
            case OverQuota():
                require(bound is None and not fits, "a quota stops what is new and does not fit")
                require(outcome.holdings == held, "a refusal says what is held")
            case _:
                require(False, "not an answer to Begin")

    def _completed(self, key: Key, step: Complete, outcome: Outcome, now_ms: int) -> None:
        work, success = key.work, key.success
        match outcome:
            case Settled():
                require(success is None, "a second success does not count")
                require(work is not None and work.op == step.op, "only the operation that runs is settled")
                require(step.op not in self.bills, "an operation has at most one bill")
                assert work is not None
                assert step.event is not None
                require(not self._capped(step), "past the cap nothing is billed")
                self._bill(step)
                key.work, key.success = (
                    None,
                    Success(
                        op=step.op,
                        fingerprint=work.fingerprint,
                        reply=step.reply,
                        tokens=step.event.quantity,
                        forgotten_ms=now_ms + REMEMBERED_MS,
                        bytes=step.bytes,
                    ),
                )
            case Replay():
                require(success is not None and success.op == step.op, "only what succeeded is replayed to its runner")
                assert success is not None
                require(outcome == Replay(reply=success.reply, op=success.op), "the first reply is the one")
            case Capped():
                require(success is None, "what succeeded is replayed, whatever was spent since")
                require(work is not None and work.op == step.op, "only the operation that runs is stopped")
                require(self._capped(step), "a cap stops what is past it")
                key.work = None
            case Fenced():
                bound = key.kept
                require(bound is None or bound.op != step.op, "who holds the operation is not fenced")
            case _:
                require(False, "not an answer to Complete")

    async def audit(self, store: Store, now_ms: int, shards: Sequence[int] = range(SHARDS)) -> None:
        """What the store keeps is what it promised: ledger, sums, holdings, records."""
        for key in self.keys.values():
            key.forget(now_ms)
        events = await read_ledger(store, shards)
        require({event.id: event for event in events} == self.bills, "the ledger is what was settled and emitted")
        require(len(events) == len(self.bills), "no event is there twice")
        for workspace, month in {(it.workspace, month_of(it.day)) for it in self.bills.values()}:
            require(await store.spent(workspace, month) == self.spent(workspace, month), "what was spent is counted")
        for op, (_, tokens) in self.seen.items():
            require(op in self.bills and self.bills[op].quantity == tokens, "who has a reply has its bill, once")
        for workspace in {key.workspace for key in self.keys.values()}:
            require(await store.holdings(workspace) == self.holdings(workspace), "holdings are what lives")
        kept = {claim: key for claim, key in self.keys.items() if key.kept is not None}
        records = [record async for record in store.records()]
        require(sorted(record.claim for record in records) == sorted(kept), "records are what lives")
        for record in records:
            _same(record, kept[record.claim])


def _renewed(key: Key, step: Renew, outcome: Outcome, now_ms: int) -> None:
    work = key.work
    holds = work is not None and work.holder == step.attempt
    match outcome:
        case Renewed():
            require(holds, "only who holds the key renews")
            assert work is not None
            work.lease_ends_ms, work.forgotten_ms = now_ms + step.lease_ms, now_ms + HOUR_MS
        case Fenced():
            require(key.success is None and not holds, "who holds the key may renew")
        case Ignored():
            require(key.success is not None, "only what is done needs no lease")
        case _:
            require(False, "not an answer to Renew")


def _abandoned(key: Key, step: Abandon, outcome: Outcome) -> None:
    holds = key.work is not None and key.work.holder == step.attempt
    match outcome:
        case Freed():
            require(holds, "only who holds the key gives it up, and never a success")
            key.work = None
        case Ignored():
            require(not holds, "who holds the key may give it up")
        case _:
            require(False, "not an answer to Abandon")


def _same(record: Record, key: Key) -> None:
    bound = key.kept
    assert bound is not None
    require(
        (record.workspace, record.op, record.fingerprint, record.bytes)
        == (key.workspace, bound.op, bound.fingerprint, bound.bytes),
        "a record is its operation's",
    )
    done = isinstance(bound, Success)
    require(record.state is (State.DONE if done else State.RUNNING), "a record says whether it is done")
    require(record.tokens == (bound.tokens if isinstance(bound, Success) else 0), "a record says what was billed")
