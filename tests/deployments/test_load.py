from __future__ import annotations

import numpy as np
import pytest

from serve_app.core.packing import Packed
from serve_app.core.scaling import BUSY, QUEUED_TOKENS, TOKENS_PER_S
from serve_app.deployments.load import HEARD_S, Load
from serve_app.dispatch import Unit

EXPRESS, BULK = True, False


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def load(clock: Clock) -> Load:
    return Load({EXPRESS: 1, BULK: 2}, clock=clock)


def compute(load: Load, clock: Clock, lane: bool, seconds: float, tokens: int = 0) -> None:
    with load.computing(lane, tokens):
        clock.now_s += seconds


def from_ingress(name: str, queued_tokens: int) -> Unit:
    packed = Packed(ids=np.zeros(1, np.int32), lengths=np.ones(1, np.int32))
    return Unit(packed=packed, express=True, fingerprint="", ingress=name, queued_tokens=queued_tokens)


def test_who_does_nothing_is_not_busy_and_knows_no_rate(load: Load, clock: Clock) -> None:
    clock.now_s += 5
    assert load.report() == {BUSY: 0.0, QUEUED_TOKENS: 0.0, TOKENS_PER_S: 0.0}
    assert load.report()[BUSY] == 0.0  # at the same moment


@pytest.mark.parametrize(("lane", "busy"), [(EXPRESS, 0.5), (BULK, 0.25)])
def test_a_lane_is_as_busy_as_of_all_it_could_compute(load: Load, clock: Clock, lane: bool, busy: float) -> None:
    compute(load, clock, lane, 2)
    clock.now_s += 2
    assert load.report()[BUSY] == pytest.approx(busy)


def test_the_busier_lane_counts(load: Load, clock: Clock) -> None:
    with load.computing(EXPRESS, 10), load.computing(BULK, 10):
        clock.now_s += 1
    assert load.report()[BUSY] == pytest.approx(1.0)


def test_batches_that_overlap_fill_a_lane_and_make_one_rate(load: Load, clock: Clock) -> None:
    with load.computing(BULK, 300):
        clock.now_s += 1
        compute(load, clock, BULK, 1, tokens=100)
    clock.now_s += 2
    report = load.report()
    assert report[BUSY] == pytest.approx(3 / (2 * 4))
    assert report[TOKENS_PER_S] == pytest.approx(400 / 2)


def test_a_batch_that_still_runs_counts_so_far(load: Load, clock: Clock) -> None:
    with load.computing(EXPRESS, 100):
        clock.now_s += 4
        assert load.report()[BUSY] == pytest.approx(1.0)
        clock.now_s += 1
    clock.now_s += 1
    report = load.report()
    assert report[BUSY] == pytest.approx(0.5)
    assert report[TOKENS_PER_S] == pytest.approx(100 / 5)


def test_the_rate_stays_while_nothing_is_computed(load: Load, clock: Clock) -> None:
    compute(load, clock, BULK, 2, tokens=1000)
    assert load.report()[TOKENS_PER_S] == load.report()[TOKENS_PER_S] == pytest.approx(500)


def test_a_batch_that_fails_is_over(load: Load, clock: Clock) -> None:
    with pytest.raises(KeyError), load.computing(EXPRESS, 10):
        raise KeyError
    load.report()
    clock.now_s += 1
    assert load.report()[BUSY] == 0.0


def test_what_waits_is_what_each_ingress_said_last_and_not_long_ago(load: Load, clock: Clock) -> None:
    load.heard(from_ingress("one", 5000))
    load.heard(from_ingress("one", 300))
    clock.now_s += HEARD_S - 1
    load.heard(from_ingress("two", 40))
    assert load.report()[QUEUED_TOKENS] == 340
    clock.now_s += 2
    assert load.report()[QUEUED_TOKENS] == 40
