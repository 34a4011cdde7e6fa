"""The idempotency machine: what a key's record may become, as one table of rules.

A record is free, running or done. Its operation id `op` is made by the first `Begin`, kept when another attempt takes
over, and is the id of its bill: so `Complete`, which stores the reply and the event in one atomic write, happens once
however often it is tried. Every step is idempotent by its attempt. The drivers in `stores/` apply `decide` (or the same
table, in Lua) to what they keep; `desk.py` brings the waiting.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from serve_app.core.caps import PICOS_PER_MICRO
from serve_app.core.errors import InvalidIdempotencyKey
from serve_app.core.ledger import UsageEvent

REPLAY_MS = 24 * 3600 * 1000  # from success
GRACE_MS = 5 * 60 * 1000  # clients count their 24 hours from when the answer reached them
RUNNING_MS = 3600 * 1000  # a record that nobody finishes or takes over is forgotten
MAX_KEY_CHARACTERS = 255


class State(StrEnum):
    FREE = "free"
    """There is no record, or an expired one."""
    RUNNING = "running"
    """An attempt holds it until its lease lapses."""
    DONE = "done"
    """The first success, and its reply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A reply as it is kept: in the record (`body`), or in a blob that the record names."""

    body: bytes | None = None
    blob: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One key of one workspace and route. Times are Unix milliseconds."""

    claim: str
    workspace: str
    fingerprint: str
    op: str
    attempt: str  # which attempt holds it, or held it last
    attempts: int
    lease_ms: int  # until when
    expires_ms: int
    bytes: int  # counted against the workspace's quota: reserved while running, exact when done
    reply: Stored | None = None  # None: running
    tokens: int = 0  # what the bill says, once done

    @property
    def state(self) -> State:
        return State.RUNNING if self.reply is None else State.DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """What a workspace keeps now: records and their bytes."""

    records: int
    bytes: int


# Steps: what may be asked of a record. `Emit` needs none: the bill of a request without a key.


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    claim: str
    workspace: str
    fingerprint: str
    attempt: str
    op: str  # used if this is the first attempt
    lease_ms: int  # for how long
    reserve_bytes: int
    max_bytes: int  # the workspace's quota
    max_records: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Renew:
    claim: str
    workspace: str
    attempt: str
    lease_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete:
    claim: str
    workspace: str
    op: str
    reply: Stored
    bytes: int
    event: UsageEvent | None  # None only in a build that is not atomic, to show that the audit notices
    cap_micros: int | None = None  # what the workspace may spend in the event's month


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    claim: str
    workspace: str
    attempt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Emit:
    event: UsageEvent
    cap_micros: int | None = None  # as of `Complete`


ClaimStep = Begin | Renew | Complete | Abandon
Step = ClaimStep | Emit


# Outcomes: what a step is answered with.


@dataclass(frozen=True, slots=True, kw_only=True)
class Proceed:
    """Run it, under this op."""

    op: str
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """It ran before: here is the reply."""

    reply: Stored
    op: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """Another attempt runs it, for so long at least unless it finishes."""

    lease_left_ms: int


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The key belongs to another request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverQuota:
    """The workspace keeps too much already."""

    holdings: Holdings


@dataclass(frozen=True, slots=True)
class Settled:
    """Reply and event are stored, by this step."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """The record is another operation's, or gone: what this attempt computed counts for nothing."""


@dataclass(frozen=True, slots=True)
class Capped:
    """The month's spending has reached the cap: nothing is written, and a key is free again."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """The lease is longer now."""


@dataclass(frozen=True, slots=True)
class Freed:
    """The record is gone: the next attempt starts afresh, with a new op."""


@dataclass(frozen=True, slots=True)
class Ignored:
    """Not this attempt's to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitted:
    """The event is in the ledger. new: by this step."""

    new: bool


Outcome = (
    Proceed | Replay | Busy | Mismatch | OverQuota | Settled | Fenced | Capped | Renewed | Freed | Ignored | Emitted
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The record after the step (None: no record), the answer, and the event to append in the same atomic write."""

    record: Record | None
    outcome: Outcome
    event: UsageEvent | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """All that a rule may look at."""

    record: Record | None
    step: ClaimStep
    now_ms: int
    holdings: Holdings
    spent_picos: int = 0  # in the month of the step's event


Condition = Callable[[Situation], bool]
Action = Callable[[Situation], Decision]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """In `state`, on `step`, if `when` holds: `then`, which leaves the record in `to`."""

    state: State
    step: type[ClaimStep]
    when: Condition
    then: Action
    to: State


def decide(record: Record | None, step: ClaimStep, now_ms: int, holdings: Holdings, spent_picos: int = 0) -> Decision:
    """The first rule that fits. An expired record counts as none; holdings: without it, in that case."""
    if record is not None and record.expires_ms <= now_ms:
        record = None
    state = State.FREE if record is None else record.state
    situation = Situation(record=record, step=step, now_ms=now_ms, holdings=holdings, spent_picos=spent_picos)
    for rule in RULES:
        if rule.state is state and isinstance(step, rule.step) and rule.when(situation):
            return rule.then(situation)
    raise AssertionError(f"no rule for {type(step).__name__} in state {state}. This is a bug")


def always(_: Situation) -> bool:
    return True


def over_quota(at: Situation) -> bool:
    """With this one it would be too much."""
    step = _begin(at)
    return at.holdings.records + 1 > step.max_records or at.holdings.bytes + step.reserve_bytes > step.max_bytes


def other_request(at: Situation) -> bool:
    return not hmac.compare_digest(_record(at).fingerprint, _begin(at).fingerprint)


def same_attempt(at: Situation) -> bool:
    """It asked before, and the answer was lost."""
    assert not isinstance(at.step, Complete)
    return _record(at).attempt == at.step.attempt


def lease_lapsed(at: Situation) -> bool:
    """Whoever ran it has died, or stalls."""
    return _record(at).lease_ms <= at.now_ms


def same_op(at: Situation) -> bool:
    assert isinstance(at.step, Complete)
    return _record(at).op == at.step.op


def over_cap(at: Situation) -> bool:
    """Its bill would come after the cap was reached."""
    assert isinstance(at.step, Complete)
    return same_op(at) and is_capped(at.step.cap_micros, at.spent_picos)


def is_capped(cap_micros: int | None, spent_picos: int) -> bool:
    return cap_micros is not None and spent_picos >= cap_micros * PICOS_PER_MICRO


def claim(at: Situation) -> Decision:
    step = _begin(at)
    record = Record(
        claim=step.claim,
        workspace=step.workspace,
        fingerprint=step.fingerprint,
        op=step.op,
        attempt=step.attempt,
        attempts=1,
        lease_ms=at.now_ms + step.lease_ms,
        expires_ms=at.now_ms + RUNNING_MS,
        bytes=step.reserve_bytes,
    )
    return Decision(record=record, outcome=Proceed(op=record.op, attempts=1))


def proceed_again(at: Situation) -> Decision:
    record = replace(_record(at), lease_ms=at.now_ms + _begin(at).lease_ms, expires_ms=at.now_ms + RUNNING_MS)
    return Decision(record=record, outcome=Proceed(op=record.op, attempts=record.attempts))


def take_over(at: Situation) -> Decision:
    """The op stays: whoever finishes first, finishes the same operation."""
    step, record = _begin(at), _record(at)
    record = replace(
        record,
        attempt=step.attempt,
        attempts=record.attempts + 1,
        lease_ms=at.now_ms + step.lease_ms,
        expires_ms=at.now_ms + RUNNING_MS,
    )
    return Decision(record=record, outcome=Proceed(op=record.op, attempts=record.attempts))


def extend(at: Situation) -> Decision:
    assert isinstance(at.step, Renew)
    record = replace(_record(at), lease_ms=at.now_ms + at.step.lease_ms, expires_ms=at.now_ms + RUNNING_MS)
    return Decision(record=record, outcome=Renewed())


def finish(at: Situation) -> Decision:
    step = at.step
    assert isinstance(step, Complete)
    record = replace(
        _record(at),
        reply=step.reply,
        bytes=step.bytes,
        tokens=step.event.quantity if step.event else 0,
        expires_ms=at.now_ms + REPLAY_MS + GRACE_MS,
    )
    return Decision(record=record, outcome=Settled(), event=step.event)


def replay(at: Situation) -> Decision:
    record = _record(at)
    assert record.reply is not None
    return Decision(record=record, outcome=Replay(reply=record.reply, op=record.op))


def free(_: Situation) -> Decision:
    return Decision(record=None, outcome=Freed())


def cap(_: Situation) -> Decision:
    return Decision(record=None, outcome=Capped())


def busy(at: Situation) -> Decision:
    return Decision(record=at.record, outcome=Busy(lease_left_ms=_record(at).lease_ms - at.now_ms))


def refuse(at: Situation) -> Decision:
    return Decision(record=at.record, outcome=OverQuota(holdings=at.holdings))


def mismatch(at: Situation) -> Decision:
    return Decision(record=at.record, outcome=Mismatch())


def fence(at: Situation) -> Decision:
    return Decision(record=at.record, outcome=Fenced())


def ignore(at: Situation) -> Decision:
    return Decision(record=at.record, outcome=Ignored())


# The first rule that fits, per state and step. `scripts/readme` prints this table.
RULES: Sequence[Rule] = (
    Rule(state=State.FREE, step=Begin, when=over_quota, then=refuse, to=State.FREE),
    Rule(state=State.FREE, step=Begin, when=always, then=claim, to=State.RUNNING),
    Rule(state=State.FREE, step=Renew, when=always, then=fence, to=State.FREE),
    Rule(state=State.FREE, step=Complete, when=always, then=fence, to=State.FREE),
    Rule(state=State.FREE, step=Abandon, when=always, then=ignore, to=State.FREE),
    Rule(state=State.RUNNING, step=Begin, when=other_request, then=mismatch, to=State.RUNNING),
    Rule(state=State.RUNNING, step=Begin, when=same_attempt, then=proceed_again, to=State.RUNNING),
    Rule(state=State.RUNNING, step=Begin, when=lease_lapsed, then=take_over, to=State.RUNNING),
    Rule(state=State.RUNNING, step=Begin, when=always, then=busy, to=State.RUNNING),
    Rule(state=State.RUNNING, step=Renew, when=same_attempt, then=extend, to=State.RUNNING),
    Rule(state=State.RUNNING, step=Renew, when=always, then=fence, to=State.RUNNING),
    Rule(state=State.RUNNING, step=Complete, when=over_cap, then=cap, to=State.FREE),
    Rule(state=State.RUNNING, step=Complete, when=same_op, then=finish, to=State.DONE),
    Rule(state=State.RUNNING, step=Complete, when=always, then=fence, to=State.RUNNING),
    Rule(state=State.RUNNING, step=Abandon, when=same_attempt, then=free, to=State.FREE),
    Rule(state=State.RUNNING, step=Abandon, when=always, then=ignore, to=State.RUNNING),
    Rule(state=State.DONE, step=Begin, when=other_request, then=mismatch, to=State.DONE),
    Rule(state=State.DONE, step=Begin, when=always, then=replay, to=State.DONE),
    Rule(state=State.DONE, step=Renew, when=always, then=ignore, to=State.DONE),
    Rule(state=State.DONE, step=Complete, when=same_op, then=replay, to=State.DONE),
    Rule(state=State.DONE, step=Complete, when=always, then=fence, to=State.DONE),
    Rule(state=State.DONE, step=Abandon, when=always, then=ignore, to=State.DONE),
)


def parse_key(headers: Sequence[str]) -> str | None:
    """The key in the `Idempotency-Key` headers of a request, None if there is none. Raises InvalidIdempotencyKey.

    Bare, or quoted as RFC 8941 writes strings; both spell the same key.
    """
    if not headers:
        return None
    if len(headers) > 1:
        raise InvalidIdempotencyKey("There are several Idempotency-Key headers; send one.")
    key = headers[0]
    if len(key) >= 2 and key.startswith('"') and key.endswith('"'):
        key = key[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    if not 1 <= len(key) <= MAX_KEY_CHARACTERS or not all(" " <= char <= "~" for char in key):
        raise InvalidIdempotencyKey(
            f"An Idempotency-Key is 1 to {MAX_KEY_CHARACTERS} printable ASCII characters. Make one for each request."
        )
    return key


def claim_id(workspace: str, route: str, key: str) -> str:
    """Which record: keys are a workspace's own, for each route. The key itself is stored nowhere."""
    return hashlib.sha256("\0".join((workspace, route, key)).encode()).hexdigest()


def op_id(claim: str, attempt: str) -> str:
    """The operation's id, and its bill's: of the key, and of the attempt that was first in these 24 hours."""
    return hashlib.sha256(f"{claim}\0{attempt}".encode()).hexdigest()[:32]


def fingerprint(key: str, canonical: bytes) -> str:
    """Of the parsed request. Keyed with the idempotency key, so that nobody with the store can guess short texts."""
    return hmac.digest(key.encode(), canonical, "sha256").hex()


def _record(at: Situation) -> Record:
    assert at.record is not None
    return at.record


def _begin(at: Situation) -> Begin:
    assert isinstance(at.step, Begin)
    return at.step
