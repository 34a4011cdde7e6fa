from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_app.core.errors import InvalidIdempotencyKey
from serve_app.core.idempotency import (
    GRACE_MS,
    REPLAY_MS,
    RULES,
    RUNNING_MS,
    Abandon,
    Begin,
    Busy,
    Capped,
    ClaimStep,
    Complete,
    Decision,
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
    Rule,
    Settled,
    Situation,
    State,
    Stored,
    always,
    claim_id,
    decide,
    fingerprint,
    op_id,
    parse_key,
)
from serve_app.core.ledger import Kind, UsageEvent

quick = settings(max_examples=100, deadline=None)

NOW = 1_795_608_000_000
LEASE = 30_000
EMPTY = Holdings(records=0, bytes=0)
FIRST, SECOND = Stored(body=b"first"), Stored(blob="second")


def event_of(op: str, *, tokens: int = 8) -> UsageEvent:
    return UsageEvent(
        id=op,
        kind=Kind.TOKENS,
        workspace="ws_1",
        time_ms=NOW,
        quantity=tokens,
        unit_price="0.015",
        rate_card="default-1",
        plan="pro",
        tier="flex",
        model="BAAI/bge-m3",
        size_class="base",
    )


def begin(attempt: str = "a1", **changes: Any) -> Begin:
    fields: dict[str, Any] = {
        "claim": "c1",
        "workspace": "ws_1",
        "fingerprint": "f1",
        "attempt": attempt,
        "op": f"op-{attempt}",
        "lease_ms": LEASE,
        "reserve_bytes": 100,
        "max_bytes": 1000,
        "max_records": 10,
    }
    return Begin(**fields | changes)


def renew(attempt: str) -> Renew:
    return Renew(claim="c1", workspace="ws_1", attempt=attempt, lease_ms=LEASE)


def complete(op: str, reply: Stored = FIRST) -> Complete:
    return Complete(claim="c1", workspace="ws_1", op=op, reply=reply, bytes=60, event=event_of(op))


def abandon(attempt: str) -> Abandon:
    return Abandon(claim="c1", workspace="ws_1", attempt=attempt)


RUNNING = Record(
    claim="c1",
    workspace="ws_1",
    fingerprint="f1",
    op="op-a1",
    attempt="a1",
    attempts=1,
    lease_ms=NOW + 10_000,
    expires_ms=NOW + 50_000,
    bytes=100,
)
LAPSED = replace(RUNNING, lease_ms=NOW)
TAKEN_OVER = replace(RUNNING, attempt="a2", attempts=2)
DONE = replace(RUNNING, reply=FIRST, bytes=60, tokens=8)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One thing that happens at NOW. becomes: the record, "unchanged" being what an illegal step leaves."""

    record: Record | None
    step: ClaimStep
    outcome: Outcome
    becomes: Record | None
    event: UsageEvent | None = None
    holdings: Holdings = EMPTY


FRESH = replace(RUNNING, lease_ms=NOW + LEASE, expires_ms=NOW + RUNNING_MS)
FULL = Holdings(records=10, bytes=0)

EXAMPLES = {
    "a first attempt runs under its own op": Example(
        record=None, step=begin("a1"), outcome=Proceed(op="op-a1", attempts=1), becomes=FRESH
    ),
    "a workspace over its quota is refused before anything runs": Example(
        record=None, step=begin(), holdings=FULL, outcome=OverQuota(holdings=FULL), becomes=None
    ),
    "nobody can renew what is not there": Example(record=None, step=renew("a1"), outcome=Fenced(), becomes=None),
    "nobody can complete what is not there": Example(
        record=None, step=complete("op-a1"), outcome=Fenced(), becomes=None
    ),
    "to abandon what is not there changes nothing": Example(
        record=None, step=abandon("a1"), outcome=Ignored(), becomes=None
    ),
    "another request with the key of a running one is a mismatch": Example(
        record=RUNNING, step=begin("a2", fingerprint="f2"), outcome=Mismatch(), becomes=RUNNING
    ),
    "an attempt that asks again proceeds again, with a whole lease": Example(
        record=RUNNING, step=begin("a1"), outcome=Proceed(op="op-a1", attempts=1), becomes=FRESH
    ),
    "an attempt proceeds again even if its lease has lapsed": Example(
        record=LAPSED, step=begin("a1"), outcome=Proceed(op="op-a1", attempts=1), becomes=FRESH
    ),
    "a lapsed lease is taken over, and the op stays": Example(
        record=LAPSED,
        step=begin("a2"),
        outcome=Proceed(op="op-a1", attempts=2),
        becomes=replace(FRESH, attempt="a2", attempts=2),
    ),
    "a lapsed lease is no way to another request": Example(
        record=LAPSED, step=begin("a2", fingerprint="f2"), outcome=Mismatch(), becomes=LAPSED
    ),
    "a second attempt waits while the first runs": Example(
        record=RUNNING, step=begin("a2"), outcome=Busy(lease_left_ms=10_000), becomes=RUNNING
    ),
    "a full workspace may still take over and ask again": Example(
        record=RUNNING, step=begin("a1"), holdings=FULL, outcome=Proceed(op="op-a1", attempts=1), becomes=FRESH
    ),
    "whoever runs it may renew": Example(record=RUNNING, step=renew("a1"), outcome=Renewed(), becomes=FRESH),
    "a stalled attempt that nobody took over may still renew": Example(
        record=LAPSED, step=renew("a1"), outcome=Renewed(), becomes=FRESH
    ),
    "an attempt that was taken over cannot renew": Example(
        record=TAKEN_OVER, step=renew("a1"), outcome=Fenced(), becomes=TAKEN_OVER
    ),
    "the first to finish stores its reply and the event": Example(
        record=RUNNING,
        step=complete("op-a1"),
        outcome=Settled(),
        becomes=replace(DONE, expires_ms=NOW + REPLAY_MS + GRACE_MS),
        event=event_of("op-a1"),
    ),
    "an attempt that was taken over may finish first": Example(
        record=TAKEN_OVER,
        step=complete("op-a1", SECOND),
        outcome=Settled(),
        becomes=replace(TAKEN_OVER, reply=SECOND, bytes=60, tokens=8, expires_ms=NOW + REPLAY_MS + GRACE_MS),
        event=event_of("op-a1"),
    ),
    "past its cap a call is not billed, and its key is free": Example(
        record=RUNNING, step=replace(complete("op-a1"), cap_micros=0), outcome=Capped(), becomes=None
    ),
    "another op cannot finish a running one": Example(
        record=RUNNING, step=complete("op-a0"), outcome=Fenced(), becomes=RUNNING
    ),
    "whoever runs it may give it up, and the key is free": Example(
        record=RUNNING, step=abandon("a1"), outcome=Freed(), becomes=None
    ),
    "an attempt that was taken over cannot give it up": Example(
        record=TAKEN_OVER, step=abandon("a1"), outcome=Ignored(), becomes=TAKEN_OVER
    ),
    "another request with the key of a finished one is a mismatch": Example(
        record=DONE, step=begin("a2", fingerprint="f2"), outcome=Mismatch(), becomes=DONE
    ),
    "a retry gets the first reply": Example(
        record=DONE, step=begin("a2"), outcome=Replay(reply=FIRST, op="op-a1"), becomes=DONE
    ),
    "a retry gets it even if the workspace is full": Example(
        record=DONE, step=begin("a2"), holdings=FULL, outcome=Replay(reply=FIRST, op="op-a1"), becomes=DONE
    ),
    "to renew what is done changes nothing": Example(record=DONE, step=renew("a1"), outcome=Ignored(), becomes=DONE),
    "the second to finish gets the first reply, and bills nothing": Example(
        record=DONE, step=complete("op-a1", SECOND), outcome=Replay(reply=FIRST, op="op-a1"), becomes=DONE
    ),
    "another op cannot finish what is done": Example(
        record=DONE, step=complete("op-a0"), outcome=Fenced(), becomes=DONE
    ),
    "to abandon what is done changes nothing": Example(
        record=DONE, step=abandon("a1"), outcome=Ignored(), becomes=DONE
    ),
}
UNCHANGING = (Busy, Mismatch, OverQuota, Replay, Fenced, Ignored)


def state_of(record: Record | None) -> State:
    return State.FREE if record is None else record.state


def rule_for(at: Example) -> Rule:
    situation = Situation(record=at.record, step=at.step, now_ms=NOW, holdings=at.holdings)
    fitting = (
        rule
        for rule in RULES
        if rule.state is state_of(at.record) and type(at.step) is rule.step and rule.when(situation)
    )
    return next(fitting)


# The table


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_the_machine(example: Example) -> None:
    decision = decide(example.record, example.step, NOW, example.holdings)
    assert decision == Decision(record=example.becomes, outcome=example.outcome, event=example.event)
    assert state_of(decision.record) is rule_for(example).to


REFUSED = {sentence: example for sentence, example in EXAMPLES.items() if isinstance(example.outcome, UNCHANGING)}


@pytest.mark.parametrize("example", REFUSED.values(), ids=REFUSED.keys())
def test_a_step_that_is_refused_leaves_the_record_as_it_was_and_bills_nothing(example: Example) -> None:
    decision = decide(example.record, example.step, NOW, example.holdings)
    assert decision.record is example.record
    assert decision.event is None


def test_every_rule_has_its_sentence() -> None:
    shown = [rule_for(example) for example in EXAMPLES.values()]
    assert [rule for rule in RULES if rule not in shown] == []


@pytest.mark.parametrize(("state", "step"), list(itertools.product(State, get_args(ClaimStep))))
def test_something_is_always_decided(state: State, step: type[ClaimStep]) -> None:
    rules = [rule for rule in RULES if rule.state is state and rule.step is step]
    assert [rule.when is always for rule in rules] == [False] * (len(rules) - 1) + [True]


def test_the_table_is_sorted_by_state_and_step_so_that_it_can_be_read() -> None:
    order = list(itertools.product(State, get_args(ClaimStep)))
    places = [order.index((rule.state, rule.step)) for rule in RULES]
    assert places == sorted(places)


# Its edges in time and size


@pytest.mark.parametrize("record", [RUNNING, DONE], ids=["running", "done"])
def test_a_record_is_gone_in_the_millisecond_in_which_it_expires(record: Record) -> None:
    alive, gone = record.expires_ms - 1, record.expires_ms
    renewed = begin("a2", fingerprint="f2")
    assert decide(record, renewed, alive, EMPTY) == Decision(record=record, outcome=Mismatch())
    assert decide(record, renewed, gone, EMPTY).outcome == Proceed(op="op-a2", attempts=1)


@pytest.mark.parametrize("record", [RUNNING, DONE], ids=["running", "done"])
@pytest.mark.parametrize(
    ("step", "outcome"), [(renew("a1"), Fenced()), (complete("op-a1"), Fenced()), (abandon("a1"), Ignored())]
)
def test_an_expired_record_counts_as_none(record: Record, step: ClaimStep, outcome: Outcome) -> None:
    assert decide(record, step, record.expires_ms, EMPTY) == Decision(record=None, outcome=outcome)


def test_an_expired_record_is_forgotten_even_if_the_next_is_refused() -> None:
    assert decide(DONE, begin("a2"), DONE.expires_ms, FULL) == Decision(record=None, outcome=OverQuota(holdings=FULL))


def test_a_renewed_lease_is_not_taken_over() -> None:
    record = decide(RUNNING, renew("a1"), NOW + 9_999, EMPTY).record
    assert decide(record, begin("a2"), NOW + 10_000, EMPTY).outcome == Busy(lease_left_ms=LEASE - 1)


def test_a_lease_lapses_in_its_last_millisecond_and_not_before() -> None:
    assert decide(RUNNING, begin("a2"), RUNNING.lease_ms - 1, EMPTY).outcome == Busy(lease_left_ms=1)
    assert decide(RUNNING, begin("a2"), RUNNING.lease_ms, EMPTY).outcome == Proceed(op="op-a1", attempts=2)


def test_a_reply_is_kept_for_24_hours_and_a_little_more_from_success() -> None:
    record = decide(RUNNING, complete("op-a1"), NOW + 5_000, EMPTY).record
    assert record is not None
    assert record.expires_ms == NOW + 5_000 + 24 * 3_600_000 + 300_000
    assert decide(record, begin("a2"), record.expires_ms - 1, EMPTY).record is record  # a replay prolongs nothing


@pytest.mark.parametrize("step", [begin("a1"), renew("a1")], ids=["begin", "renew"])
def test_a_record_does_not_expire_under_a_living_lease(step: ClaimStep) -> None:
    record = decide(RUNNING, step, RUNNING.expires_ms - 1, EMPTY).record
    assert record is not None
    assert record.lease_ms <= record.expires_ms


@pytest.mark.parametrize(
    ("holdings", "fits"),
    [
        (Holdings(records=9, bytes=900), True),
        (Holdings(records=10, bytes=0), False),
        (Holdings(records=0, bytes=901), False),
        (Holdings(records=0, bytes=10**12), False),
    ],
)
def test_a_quota_may_be_used_up_but_not_passed(holdings: Holdings, fits: bool) -> None:
    outcome = decide(None, begin(), NOW, holdings).outcome
    assert outcome == (Proceed(op="op-a1", attempts=1) if fits else OverQuota(holdings=holdings))


def test_what_was_reserved_is_set_right_when_it_is_done() -> None:
    record = decide(RUNNING, complete("op-a1"), NOW, EMPTY).record
    assert record is not None
    assert (RUNNING.bytes, record.bytes, record.tokens) == (100, 60, 8)


def test_after_a_release_the_next_attempt_is_a_new_operation_and_a_late_finisher_is_fenced() -> None:
    freed = decide(RUNNING, abandon("a1"), NOW, EMPTY).record
    again = decide(freed, begin("a2"), NOW, EMPTY)
    assert again.outcome == Proceed(op="op-a2", attempts=1)
    assert decide(again.record, complete("op-a1"), NOW, EMPTY).outcome == Fenced()
    assert decide(again.record, complete("op-a2"), NOW, EMPTY).outcome == Settled()


# Any sequence of steps


@dataclass
class Attempt:
    """What one attempt knows: the op it was told, and until when it believes that it alone runs it."""

    id: str
    fingerprint: str
    op: str | None = None
    lease_ms: int = 0


WAITS = st.sampled_from([0, 1, LEASE - 1, LEASE, RUNNING_MS - 1, RUNNING_MS, REPLAY_MS, REPLAY_MS + GRACE_MS])


class OneKey(RuleBasedStateMachine):
    """One key through any steps of any attempts, at any moments; lost answers are attempts that ask again."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = NOW
        self.record: Record | None = None
        self.attempts: list[Attempt] = []
        self.events: Counter[str] = Counter()
        self.first_reply: dict[str, Stored] = {}
        self.settled_ms: int | None = None

    def living(self) -> Record | None:
        return self.record if self.record and self.record.expires_ms > self.now_ms else None

    def take(self, step: ClaimStep) -> Outcome:
        before = self.living()
        decision = decide(self.record, step, self.now_ms, EMPTY)
        self.record = decision.record

        if isinstance(decision.outcome, UNCHANGING):
            assert (decision.record, decision.event) == (before, None)
        if isinstance(decision.outcome, Replay):
            assert decision.outcome.reply == self.first_reply[decision.outcome.op]
        if before and decision.record:
            assert decision.record.op == before.op
        assert (decision.event is not None) == isinstance(decision.outcome, Settled)
        if decision.event:
            self.events[decision.event.id] += 1
        return decision.outcome

    def ask(self, attempt: Attempt) -> None:
        outcome = self.take(begin(attempt.id, fingerprint=attempt.fingerprint))
        if isinstance(outcome, Proceed):
            others = [other for other in self.attempts if other is not attempt]
            assert not any(other.lease_ms > self.now_ms for other in others), "two attempts run at once"
            assert self.settled_ms is None or self.settled_ms + REPLAY_MS < self.now_ms, "it had run before"
            attempt.op, attempt.lease_ms = outcome.op, self.now_ms + LEASE

    def one_of(self, data: st.DataObject) -> Attempt:
        return data.draw(st.sampled_from(self.attempts), label="attempt")

    @rule(fingerprint=st.sampled_from(["f1", "f1", "f1", "f2"]))
    def somebody_asks(self, fingerprint: str) -> None:
        attempt = Attempt(id=f"a{len(self.attempts)}", fingerprint=fingerprint)
        self.attempts.append(attempt)
        self.ask(attempt)

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def somebody_asks_again(self, data: st.DataObject) -> None:
        attempt = self.one_of(data)
        if not self.events[f"op-{attempt.id}"]:  # who was answered asks no more
            self.ask(attempt)

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def somebody_renews(self, data: st.DataObject) -> None:
        attempt = self.one_of(data)
        if isinstance(self.take(renew(attempt.id)), Renewed):
            attempt.lease_ms = self.now_ms + LEASE

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def somebody_finishes(self, data: st.DataObject) -> None:
        attempt = self.one_of(data)
        if attempt.op is None:
            return
        reply = Stored(body=attempt.id.encode())
        if isinstance(self.take(complete(attempt.op, reply)), Settled):
            self.first_reply[attempt.op], self.settled_ms = reply, self.now_ms
        attempt.lease_ms = 0

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def somebody_gives_up(self, data: st.DataObject) -> None:
        attempt = self.one_of(data)
        self.take(abandon(attempt.id))
        attempt.lease_ms = 0

    @rule(wait_ms=WAITS)
    def time_passes(self, wait_ms: int) -> None:
        self.now_ms += wait_ms

    @invariant()
    def no_operation_is_billed_twice(self) -> None:
        assert set(self.events.values()) <= {1}

    @invariant()
    def what_is_done_was_billed_and_what_runs_was_not(self) -> None:
        if record := self.living():
            assert self.events[record.op] == (record.state is State.DONE)


OneKey.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestOneKey = OneKey.TestCase


# Keys


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("k", "k"),
        ("8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        ('"k"', "k"),
        ('"two words"', "two words"),
        ("two words", "two words"),
        (" k ", " k "),
        ('" "', " "),
        (r'"a\"b"', 'a"b'),
        (r'"a\\b"', r"a\b"),
        (r'"\\\""', r"\""),
        (r'"\\\\"', r"\\"),
        (r"a\b", r"a\b"),
        ('"', '"'),
        ('"""', '"'),
        ('"k', '"k'),
        ('k"', 'k"'),
        ("!~", "!~"),
        ("k" * 255, "k" * 255),
        ('"' + "k" * 255 + '"', "k" * 255),
        ('"' + r"\"" * 255 + '"', '"' * 255),
    ],
    ids=itertools.count(),
)
def test_a_key_is_what_was_sent_with_or_without_quotes(header: str, key: str) -> None:
    assert parse_key([header]) == key


def test_no_header_is_no_key() -> None:
    assert parse_key([]) is None


@pytest.mark.parametrize(
    "header",
    [
        "",
        '""',
        "k" * 256,
        '"' + "k" * 256 + '"',
        "k" * 100_000,
        "a\0b",
        "a\tb",
        "a\nb",
        "a\x1fb",
        "a\x7fb",
        "a\x80b",
        "é",
        '"é"',
        "ключ",
        "k\u200b",
        "\ud800",
    ],
    ids=itertools.count(),
)
def test_any_other_key_is_refused_and_not_repeated(header: str) -> None:
    with pytest.raises(InvalidIdempotencyKey, match="1 to 255 printable ASCII") as error:
        parse_key([header])
    assert not header or header not in error.value.message
    assert error.value.__cause__ is None


@pytest.mark.parametrize("headers", [["k", "k"], ["k", "other"], ["", ""]], ids=["the same", "two", "empty"])
def test_several_keys_are_refused(headers: list[str]) -> None:
    with pytest.raises(InvalidIdempotencyKey, match="several"):
        parse_key(headers)


@quick
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=255))
def test_any_printable_key_can_be_quoted(key: str) -> None:
    quoted = '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
    assert parse_key([quoted]) == key


@quick
@given(st.text(st.characters(exclude_categories=()), max_size=300))
def test_a_key_is_printable_ascii_or_refused(header: str) -> None:
    try:
        key = parse_key([header])
    except InvalidIdempotencyKey:
        return
    assert key is not None
    assert 1 <= len(key) <= 255
    assert key.isascii()
    assert key.isprintable()


# Ids


def test_a_key_is_another_record_in_another_workspace_or_route() -> None:
    claims = [
        claim_id(*parts)
        for parts in [
            ("ws_1", "/v1/embeddings", "k"),
            ("ws_2", "/v1/embeddings", "k"),
            ("ws_1", "/v1/rerank", "k"),
            ("ws_1", "/v1/embeddings", "k2"),
            ("ws_1/v1", "/embeddings", "k"),
            ("ws_1", "/v1/embeddingsk", ""),
        ]
    ]
    assert len(set(claims)) == len(claims)
    assert claims[0] == claim_id("ws_1", "/v1/embeddings", "k")
    assert all(len(claim) == 64 and "k" not in claim for claim in claims)


def test_an_operation_is_of_its_claim_and_its_first_attempt() -> None:
    ops = {op_id("c1", "a1"), op_id("c1", "a2"), op_id("c2", "a1"), op_id("c1a", "1")}
    assert len(ops) == 4
    assert all(len(op) == 32 for op in ops)
    assert op_id("c1", "a1") in ops


def test_a_fingerprint_is_of_the_request_under_its_key() -> None:
    prints = {fingerprint("k", b"a"), fingerprint("k", b"b"), fingerprint("k2", b"a"), fingerprint("k", b"")}
    assert len(prints) == 4
    assert fingerprint("k", b"a") in prints
