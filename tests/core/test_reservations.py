from __future__ import annotations

from collections import Counter
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.core.keys import Plan, Workspace
from serve_app.core.ledger import Kind, UsageEvent
from serve_app.core.pricing import RateCard, Tier
from serve_app.core.reservations import HOUR_MS, Reservation, bill

quick = settings(max_examples=150, deadline=None)

RATES = RateCard()
TEN = 1_795_600_800_000  # 2026-11-25T10:00:00Z
MINUTE_MS, SECOND_MS = 60_000, 1000


def workspace(plan: Plan = Plan.PRO) -> Workspace:
    return Workspace(id="ws_1", name="Acme", plan=plan, created_ms=0)


def reserved(*, started_ms: int, stopped_ms: int | None = None, milli_gpus: int = 1000) -> Reservation:
    return Reservation(
        id="res_1",
        workspace="ws_1",
        model="BAAI/bge-m3",
        size_class="base",
        milli_gpus=milli_gpus,
        started_ms=started_ms,
        seen_ms=started_ms,
        stopped_ms=stopped_ms,
    )


def billed(reservation: Reservation, now_ms: int) -> tuple[Reservation, list[UsageEvent]]:
    return bill(reservation, workspace(), RATES, now_ms)


def seconds(events: list[UsageEvent]) -> list[int]:
    return [event.details["seconds"] for event in events]


def test_a_whole_hour_is_billed_once_it_is_over() -> None:
    reservation = reserved(started_ms=TEN)
    assert billed(reservation, TEN + HOUR_MS - 1) == (replace(reservation, billed_ms=TEN), [])

    reservation, (event,) = billed(reservation, TEN + HOUR_MS)
    assert reservation.billed_ms == TEN + HOUR_MS
    assert not reservation.settled
    assert event.kind is Kind.GPU_TIME
    assert event.quantity == HOUR_MS
    assert event.amount == RATES.gpu_hour_price(Plan.PRO) == Decimal("3.00")
    assert event.details == {"reservation": "res_1", "gpus": "1", "hour_start_ms": TEN, "seconds": 3600}


def test_an_event_says_whose_gpus_they_were_and_what_an_hour_costs() -> None:
    _, (event,) = billed(reserved(started_ms=TEN), TEN + HOUR_MS)
    assert (event.workspace, event.plan, event.tier) == ("ws_1", "pro", Tier.ACTIVE.value)
    assert (event.model, event.size_class) == ("BAAI/bge-m3", "base")
    assert (event.unit_price, event.rate_card) == ("3", RATES.version)


def test_a_first_hour_counts_from_the_start_and_a_last_one_to_the_stop() -> None:
    start, stop = TEN + 15 * MINUTE_MS, TEN + 2 * HOUR_MS + 20 * MINUTE_MS
    reservation, events = billed(reserved(started_ms=start, stopped_ms=stop), stop)
    assert seconds(events) == [45 * 60, 3600, 20 * 60]
    assert [event.details["hour_start_ms"] for event in events] == [TEN, TEN + HOUR_MS, TEN + 2 * HOUR_MS]
    assert reservation.settled


def test_a_stop_inside_the_first_hour_is_billed_at_once() -> None:
    start, stop = TEN + 10 * MINUTE_MS, TEN + 25 * MINUTE_MS
    reservation, events = billed(reserved(started_ms=start, stopped_ms=stop), stop)
    assert seconds(events) == [15 * 60]
    assert reservation.settled


def test_a_stop_on_the_hour_leaves_no_empty_hour_behind() -> None:
    reservation, events = billed(reserved(started_ms=TEN, stopped_ms=TEN + HOUR_MS), TEN + HOUR_MS)
    assert seconds(events) == [3600]
    assert reservation.settled


@pytest.mark.parametrize(
    ("lasted_ms", "billed_s"), [(0, []), (1, []), (999, []), (1000, [1]), (1999, [1]), (2000, [2])]
)
def test_the_begun_second_is_not_counted(lasted_ms: int, billed_s: list[int]) -> None:
    start = TEN + 123
    reservation, events = billed(reserved(started_ms=start, stopped_ms=start + lasted_ms), start + lasted_ms)
    assert seconds(events) == billed_s
    assert reservation.settled


def test_an_hour_across_midnight_belongs_to_two_days() -> None:
    midnight = TEN + 14 * HOUR_MS
    start, stop = midnight - 30 * MINUTE_MS, midnight + 30 * MINUTE_MS
    _, events = billed(reserved(started_ms=start, stopped_ms=stop), stop)
    assert [(event.day, event.details["seconds"]) for event in events] == [("2026-11-25", 1800), ("2026-11-26", 1800)]


def test_the_hour_that_ends_at_midnight_belongs_to_the_day_before() -> None:
    midnight = TEN + 14 * HOUR_MS
    _, (event,) = billed(reserved(started_ms=midnight - HOUR_MS), midnight)
    assert event.day == "2026-11-25"


def test_hours_that_nobody_billed_in_time_are_billed_later_each_for_itself() -> None:
    _, events = billed(reserved(started_ms=TEN + 30 * MINUTE_MS), TEN + 30 * HOUR_MS + 1)
    assert seconds(events) == [1800] + [3600] * 29
    assert len({event.id for event in events}) == 30


def test_billing_again_adds_nothing() -> None:
    now = TEN + 3 * HOUR_MS + MINUTE_MS
    reservation, events = billed(reserved(started_ms=TEN), now)
    assert len(events) == 3
    assert billed(reservation, now) == (reservation, [])
    assert billed(reservation, TEN) == (reservation, [])  # a clock that was put back

    stopped = replace(reservation, stopped_ms=now)
    reservation, events = billed(stopped, now)
    assert seconds(events) == [60]
    assert billed(reservation, now + 9 * HOUR_MS) == (reservation, [])


def test_half_a_gpu_costs_half() -> None:
    _, (event,) = billed(reserved(started_ms=TEN, milli_gpus=500), TEN + HOUR_MS)
    assert event.quantity == HOUR_MS // 2
    assert event.amount == Decimal("1.50")
    assert event.details["gpus"] == "0.5"


@pytest.mark.parametrize("plan", [plan for plan in Plan if plan.has_keys])
def test_the_plan_sets_the_price(plan: Plan) -> None:
    _, (event,) = bill(reserved(started_ms=TEN, milli_gpus=2000), workspace(plan), RATES, TEN + HOUR_MS)
    assert event.plan == plan.value
    assert event.amount == RATES.gpu_hour_price(plan) * 2


def test_two_reservations_of_one_hour_are_two_events() -> None:
    one = reserved(started_ms=TEN)
    ids = {billed(reservation, TEN + HOUR_MS)[1][0].id for reservation in (one, replace(one, id="res_2"))}
    assert len(ids) == 2


def test_a_reservation_survives_its_json() -> None:
    for reservation in (reserved(started_ms=TEN), reserved(started_ms=TEN, stopped_ms=TEN + 5, milli_gpus=250)):
        assert Reservation.from_json(reservation.to_json()) == reservation


STARTS = st.integers(0, 3 * HOUR_MS)
LASTING = st.one_of(
    st.integers(0, 3 * SECOND_MS), st.integers(0, 30 * HOUR_MS), st.sampled_from([HOUR_MS, 24 * HOUR_MS])
)
CALLS = st.lists(st.tuples(st.integers(0, 40 * HOUR_MS), st.booleans()), max_size=12)


@quick
@given(STARTS, LASTING, CALLS, st.sampled_from([1, 250, 1000, 8000]))
@example(999, HOUR_MS + 2, [], 1000)  # loses most of a second at both ends
def test_however_often_it_is_billed_no_hour_comes_twice_and_only_begun_seconds_are_lost(
    start: int, lasting: int, calls: list[tuple[int, bool]], milli_gpus: int
) -> None:
    """Calls come in any order and at any moment, and what one computed may be lost before it is stored."""
    start_ms = TEN + start
    stop_ms = start_ms + lasting
    reservation = reserved(started_ms=start_ms, milli_gpus=milli_gpus)
    stored: list[UsageEvent] = []
    made: dict[str, UsageEvent] = {}
    for moment, lost in [*calls, (40 * HOUR_MS, False)]:
        now_ms = start_ms + moment
        if now_ms >= stop_ms:
            reservation = replace(reservation, stopped_ms=stop_ms)
        after, events = billed(reservation, now_ms)
        for event in events:
            assert made.setdefault(event.id, event) == event, "an hour was billed in two ways"
        if not lost:
            reservation = after
            stored += events

    assert reservation.settled
    assert set(Counter(event.details["hour_start_ms"] for event in stored).values()) <= {1}
    assert len({event.id for event in stored}) == len(stored)
    total_s = sum(seconds(stored))
    assert 0 <= lasting - 1000 * total_s < 2000  # less than a second of the first hour, and of the last
    assert sum(event.quantity for event in stored) == milli_gpus * total_s
    for event in stored:
        hour_ms = event.details["hour_start_ms"]
        assert hour_ms % HOUR_MS == 0
        assert hour_ms <= event.time_ms < hour_ms + HOUR_MS
