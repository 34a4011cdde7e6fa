"""The leaky bucket: what comes at once, what comes after, and when a refused call may come again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.limits import FULL, NOTHING, Buckets, Budget, Charge, Cost, Limit, decide

PRO = Budget(per_minute=500)
SECOND_US = 1_000_000


class Bucket:
    """One key's buckets over simulated time."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.left = FULL

    def pass_us(self, us: float) -> None:
        self.left = Buckets(*(max(0.0, left_us - us) for left_us in self.left))

    def ask(self, cost: Cost, owed: Cost = NOTHING) -> Buckets:
        """What it has to wait for; nothing: it was taken."""
        verdict = decide(self.left, Charge(key="key", limit=self.limit, cost=cost, owed=owed))
        self.left = verdict.buckets
        return verdict.wait

    def admits(self, requests: int = 0, tokens: int = 0) -> bool:
        return not any(self.ask(Cost(requests, tokens)))


def test_fifty_come_at_once_and_then_one_every_120_ms() -> None:
    bucket = Bucket(Limit(requests=PRO))
    assert [bucket.admits(requests=1) for _ in range(60)] == [True] * 50 + [False] * 10
    bucket.pass_us(120_000)
    assert [bucket.admits(requests=1) for _ in range(2)] == [True, False]


def test_a_refused_call_is_told_to_the_microsecond_when_it_may_come() -> None:
    bucket = Bucket(Limit(requests=PRO))
    assert bucket.admits(requests=50)
    bucket.pass_us(20_000)
    wait_us, _ = bucket.ask(Cost(requests=1))
    assert wait_us == pytest.approx(100_000)
    bucket.pass_us(wait_us - 1)
    assert not bucket.admits(requests=1)
    bucket.pass_us(1)
    assert bucket.admits(requests=1)


def test_a_slow_key_still_gets_one() -> None:
    bucket = Bucket(Limit(requests=Budget(per_minute=1)))
    assert [bucket.admits(requests=1) for _ in range(2)] == [True, False]
    assert bucket.ask(Cost(requests=1)).requests_us == pytest.approx(60 * SECOND_US)


@pytest.mark.parametrize("short", ["requests", "tokens"])
def test_both_budgets_are_charged_or_neither(short: str) -> None:
    bucket = Bucket(Limit(requests=PRO, tokens=Budget(per_minute=10_000)))
    bucket.ask(Cost(requests=50) if short == "requests" else Cost(tokens=1_000))
    before = bucket.left
    wait = bucket.ask(Cost(requests=1, tokens=100))
    assert bucket.left == before
    assert bool(wait.requests_us) == (short == "requests")
    assert bool(wait.tokens_us) == (short == "tokens")


def test_more_than_the_bucket_holds_goes_once_it_is_full_and_is_paid_for_afterwards() -> None:
    bucket = Bucket(Limit(requests=PRO, tokens=Budget(per_minute=60_000)))
    assert bucket.admits(tokens=30_000)
    wait_us = bucket.ask(Cost(tokens=30_000)).tokens_us
    assert wait_us == pytest.approx(30 * SECOND_US)
    assert bucket.ask(Cost(tokens=1)).tokens_us == pytest.approx(24.001 * SECOND_US)
    assert bucket.ask(NOTHING).tokens_us == pytest.approx(24 * SECOND_US), "a bucket that owes gives nothing"
    bucket.pass_us(wait_us)
    assert bucket.admits(tokens=30_000)


def test_tokens_are_not_counted_where_they_are_not_limited() -> None:
    assert Bucket(Limit(requests=PRO)).admits(requests=1, tokens=10**9)


def test_what_is_owed_is_taken_even_from_an_empty_bucket() -> None:
    bucket = Bucket(Limit(requests=PRO))
    assert bucket.ask(Cost(requests=1), owed=Cost(requests=52)).requests_us == pytest.approx(3 * 120_000)
    assert bucket.left.requests_us == pytest.approx(52 * 120_000)


def test_what_is_given_back_may_be_taken_again_but_fills_no_more_than_the_bucket() -> None:
    bucket = Bucket(Limit(requests=PRO))
    assert bucket.admits(requests=50)
    assert not any(bucket.ask(Cost(requests=1), owed=Cost(requests=-1)))
    assert not bucket.admits(requests=1)
    bucket.pass_us(60 * SECOND_US)
    bucket.ask(NOTHING, owed=Cost(requests=-10))
    assert bucket.admits(requests=50)
    assert not bucket.admits(requests=1)


@given(
    per_minute=st.integers(1, 1_000_000),
    gaps=st.lists(st.tuples(st.floats(0, 5_000_000), st.integers(1, 40)), min_size=1, max_size=60),
)
def test_never_more_than_the_burst_and_what_has_come_back(per_minute: int, gaps: list[tuple[float, int]]) -> None:
    budget = Budget(per_minute=per_minute)
    bucket, passed_us, taken = Bucket(Limit(requests=budget)), 0.0, 0
    for gap_us, cost in gaps:
        bucket.pass_us(gap_us)
        passed_us += gap_us
        cost = min(cost, budget.at_once)
        remaining = budget.remaining(bucket.left.requests_us)
        admitted = bucket.admits(requests=cost)
        assert admitted == (cost <= remaining)
        taken += cost * admitted
    assert taken <= budget.at_once + passed_us / budget.each_us + len(gaps) / budget.each_us


@given(per_minute=st.integers(1, 100_000_000), left_us=st.floats(0, 1e9), cost=st.integers(0, 1_000_000))
def test_who_waits_as_told_is_admitted(per_minute: int, left_us: float, cost: int) -> None:
    budget = Budget(per_minute=per_minute)
    wait_us = budget.wait_us(left_us, cost)
    assert budget.wait_us(left_us - wait_us, cost) == 0
