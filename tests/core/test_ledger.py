from __future__ import annotations

import itertools
import time as clock
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import orjson
import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.core.ledger import (
    SHARDS,
    Kind,
    Recorded,
    UsageEvent,
    UsageLine,
    amount,
    call_event_id,
    cloud_event,
    hour_event_id,
    report,
    shard_of,
)
from serve_app.core.pricing import to_micros

quick = settings(max_examples=100, deadline=None)

NOON_MS = 1_795_608_000_000  # 2026-11-25T12:00:00Z
PER_PRICE = {Kind.TOKENS: 1_000_000, Kind.GPU_TIME: 3_600_000}
HALF_A_STEP = Fraction(1, 2 * 10**15)  # an hour's amount is kept to 1e-15 dollars

PRICES = st.decimals(0, 10**6, places=9).map(str)
TOKENS = st.integers(0, 10**9)
NAMES = st.text("abcxyz019_-/.", min_size=1, max_size=12)


def an_event(**changes: Any) -> UsageEvent:
    fields: dict[str, Any] = {
        "id": call_event_id("ws_1", "call_1"),
        "kind": Kind.TOKENS,
        "workspace": "ws_1",
        "time_ms": NOON_MS,
        "quantity": 8,
        "unit_price": "0.015",
        "rate_card": "default-1",
        "plan": "pro",
        "tier": "flex",
        "model": "BAAI/bge-m3",
        "size_class": "base",
        "api_key": "key_1",
    }
    return UsageEvent(**fields | changes)


def a_line(**changes: Any) -> UsageLine:
    fields: dict[str, Any] = {
        "workspace": "ws_1",
        "day": "2026-11-25",
        "kind": Kind.TOKENS,
        "model": "BAAI/bge-m3",
        "api_key": "key_1",
        "tier": "flex",
        "unit_price": "0.015",
        "events": 1,
        "quantity": 8,
    }
    return UsageLine(**fields | changes)


def exact(kind: Kind, quantity: int, unit_price: str) -> Fraction:
    return Fraction(unit_price) * quantity / PER_PRICE[kind]


EVENTS = st.builds(
    an_event,
    kind=st.sampled_from(list(PER_PRICE)),
    time_ms=st.integers(0, 4 * 10**12),
    quantity=TOKENS,
    unit_price=PRICES,
    model=NAMES,
    api_key=NAMES | st.just(""),
    details=st.dictionaries(NAMES, st.integers(0, 9) | st.text(max_size=9) | st.booleans(), max_size=4),
)


@pytest.fixture
def far_east() -> Iterator[None]:
    """A server that is 14 hours ahead of UTC."""
    with pytest.MonkeyPatch.context() as server:
        server.setenv("TZ", "Pacific/Kiritimati")
        clock.tzset()
        yield
    clock.tzset()


# Amounts


@quick
@given(TOKENS, PRICES)
def test_tokens_cost_exactly_their_share_of_the_price(tokens: int, unit_price: str) -> None:
    assert Fraction(amount(Kind.TOKENS, tokens, unit_price)) == exact(Kind.TOKENS, tokens, unit_price)


@quick
@given(st.integers(0, 10**10), PRICES)
@example(1000, "1")  # a second of a GPU at a dollar an hour: 0.0002777...
def test_gpu_time_costs_its_share_of_the_hour_to_the_nearest_step(milliseconds: int, unit_price: str) -> None:
    kept = Fraction(amount(Kind.GPU_TIME, milliseconds, unit_price))
    assert abs(kept - exact(Kind.GPU_TIME, milliseconds, unit_price)) <= HALF_A_STEP


@quick
@given(st.integers(0, 10_000), PRICES)
def test_whole_gpu_hours_cost_exactly_their_price(hours: int, unit_price: str) -> None:
    assert amount(Kind.GPU_TIME, hours * 3_600_000, unit_price) == Decimal(unit_price) * hours


def test_a_million_tokens_and_a_gpu_hour_cost_the_unit_price() -> None:
    assert an_event(quantity=1_000_000, unit_price="0.015").amount == Decimal("0.015")
    assert an_event(kind=Kind.GPU_TIME, quantity=3_600_000, unit_price="2.7").amount == Decimal("2.7")
    assert an_event(quantity=0).amount == 0


@quick
@given(
    st.sampled_from(list(PER_PRICE)), PRICES, st.lists(st.tuples(TOKENS, st.integers(0, 3)), min_size=1, max_size=20)
)
def test_lines_cost_what_their_events_cost_however_they_were_split(
    kind: Kind, unit_price: str, events: list[tuple[int, int]]
) -> None:
    quantities: dict[int, list[int]] = defaultdict(list)
    for quantity, line in events:
        quantities[line].append(quantity)
    lines = [a_line(kind=kind, unit_price=unit_price, quantity=sum(parts)) for parts in quantities.values()]

    billed = sum((Fraction(line.amount) for line in lines), Fraction(0))
    true = exact(kind, sum(quantity for quantity, _ in events), unit_price)
    if kind is Kind.TOKENS:
        assert billed == true
        assert billed == sum(Fraction(amount(kind, quantity, unit_price)) for quantity, _ in events)
    else:
        assert abs(billed - true) <= HALF_A_STEP * len(lines)


# Events


@quick
@given(EVENTS)
def test_an_event_survives_its_json(event: UsageEvent) -> None:
    again = UsageEvent.from_json(event.to_json())
    assert again == event
    assert again.kind is event.kind
    assert UsageEvent.from_json(event.to_json().decode()) == event


@pytest.mark.parametrize(
    ("time", "day"),
    [
        ("1970-01-01T00:00:00.000", "1970-01-01"),
        ("2026-11-25T23:59:59.999", "2026-11-25"),
        ("2026-11-26T00:00:00.000", "2026-11-26"),
        ("2027-12-31T23:59:59.999", "2027-12-31"),
        ("2028-02-29T00:00:00.001", "2028-02-29"),
    ],
)
def test_a_day_begins_at_midnight_in_utc_wherever_the_server_stands(time: str, day: str, far_east: None) -> None:
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    time_ms = (datetime.fromisoformat(f"{time}+00:00") - epoch) // timedelta(milliseconds=1)
    event = an_event(time_ms=time_ms)
    assert event.day == day
    assert cloud_event(Recorded(sequence=1, event=event), "s")["time"] == f"{time}Z"


def test_an_id_is_the_calls_and_the_workspaces_alone() -> None:
    assert call_event_id("ws_1", "call_1") == call_event_id("ws_1", "call_1")
    ids = {
        call_event_id("ws_1", "call_1"),
        call_event_id("ws_1", "call_2"),
        call_event_id("ws_2", "call_1"),
        call_event_id("ws_1call", "_1"),
        hour_event_id("ws_1", "res_1", 0),
        hour_event_id("ws_1", "res_1", 3_600_000),
        hour_event_id("ws_1", "res_2", 0),
        hour_event_id("ws_2", "res_1", 0),
        call_event_id("ws_1", "res_1\x000"),
    }
    assert len(ids) == 9


@quick
@given(st.tuples(NAMES, NAMES), st.tuples(NAMES, NAMES))
def test_two_calls_have_two_ids(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (call_event_id(*one) == call_event_id(*other)) == (one == other)
    assert len(call_event_id(*one)) == 32
    int(call_event_id(*one), 16)


@pytest.mark.parametrize(("workspace", "shard"), [("ws_1", 1), ("ws_2", 3), ("acme", 6), ("Zürich", 6)])
def test_a_workspace_stays_in_its_shard(workspace: str, shard: int) -> None:
    assert shard_of(workspace) == shard
    assert an_event(workspace=workspace).shard == shard


def test_workspaces_spread_over_all_shards() -> None:
    assert {shard_of(f"ws_{number}") for number in range(200)} == set(range(SHARDS))
    assert SHARDS == 8


# CloudEvents


def as_their_library_reads_it(event: UsageEvent, sequence: int = 1) -> CloudEvent:
    fields = cloud_event(Recorded(sequence=sequence, event=event), "/serve-app/usage")
    read = JSONFormat().read(None, orjson.dumps(fields))
    assert isinstance(read, CloudEvent)
    return read


@quick
@given(EVENTS, st.integers(1, 10**18))
def test_an_event_leaves_as_a_cloud_event(event: UsageEvent, sequence: int) -> None:
    fields = cloud_event(Recorded(sequence=sequence, event=event), "/serve-app/usage")
    assert fields["specversion"] == "1.0"
    assert all(isinstance(value, str) and value for name, value in fields.items() if name != "data")

    read = as_their_library_reads_it(event, sequence)
    assert read.get_id() == event.id
    assert read.get_type() == event.kind.event_type
    assert read.get_subject() == event.workspace
    assert read.get_source() == f"/serve-app/usage/{event.shard}"
    assert read.get_datacontenttype() == "application/json"
    assert int(read.get_extension("sequence")) == sequence
    time = read.get_time()
    assert time is not None
    assert time == datetime.fromtimestamp(event.time_ms // 1000, tz=UTC).replace(
        microsecond=event.time_ms % 1000 * 1000
    )


def test_a_cloud_event_says_what_was_used_and_what_it_cost() -> None:
    event = an_event(quantity=1234, unit_price="0.015", details={"request_id": "req_1"})
    assert as_their_library_reads_it(event).get_data() == {
        "version": "1",
        "workspace": "ws_1",
        "kind": "tokens",
        "quantity": 1234,
        "input_tokens": 1234,
        "unit_price": "0.015",
        "amount": "0.00001851",
        "currency": "USD",
        "rate_card": "default-1",
        "plan": "pro",
        "tier": "flex",
        "model": "BAAI/bge-m3",
        "size_class": "base",
        "api_key": "key_1",
        "request_id": "req_1",
    }


def test_a_gpu_hour_is_another_type_and_has_no_tokens_and_no_key() -> None:
    event = an_event(kind=Kind.GPU_TIME, quantity=3_600_000, unit_price="3", api_key="", tier="active")
    read = as_their_library_reads_it(event)
    data = read.get_data()
    assert isinstance(data, dict)
    assert read.get_type() == "ai.gpu.reservation.v1"
    assert (data["amount"], data["api_key"]) == ("3", None)
    assert "input_tokens" not in data


def test_a_sequence_sorts_as_text_like_its_number() -> None:
    numbers = [1, 9, 10, 99, 100, 10**18]
    texts = [as_their_library_reads_it(an_event(), number).get_extension("sequence") for number in numbers]
    assert texts == sorted(texts)


# Reports

BY = [by for count in range(4) for by in itertools.combinations(("day", "model", "api_key"), count)]
LINES = st.lists(
    st.builds(
        a_line,
        day=st.sampled_from(["2026-11-25", "2026-11-26", "2026-11-27"]),
        kind=st.sampled_from(list(PER_PRICE)),
        model=st.sampled_from(["a/one", "b/two"]),
        api_key=st.sampled_from(["", "key_1", "key_2"]),
        tier=st.sampled_from(["flex", "active"]),
        unit_price=st.sampled_from(["0.015", "0.009", "3", "0.000000001"]),
        events=st.integers(1, 9),
        quantity=st.integers(0, 10**9) | st.integers(0, 200),
    ),
    max_size=12,
)


def part_of(row: dict[str, Any], by: Sequence[str], lines: Sequence[UsageLine]) -> list[UsageLine]:
    return [line for line in lines if all(getattr(line, name) == row[name] for name in (*by, "kind"))]


@quick
@given(LINES, st.sampled_from(BY))
def test_every_line_is_in_one_row_and_a_row_is_rounded_once(lines: list[UsageLine], by: tuple[str, ...]) -> None:
    rows = report(lines, by)
    parts = [part_of(row, by, lines) for row in rows]
    assert sum(len(part) for part in parts) == len(lines)
    assert all(parts)
    for row, part in zip(rows, parts, strict=True):
        true = sum((Fraction(line.amount) for line in part), Fraction(0))
        assert row["amount_micros"] == round(true * 1_000_000)
        if row["kind"] == "tokens":
            assert row["requests"] == sum(line.events for line in part)
            assert row["input_tokens"] == sum(line.quantity for line in part)
        else:
            hours = Fraction(sum(line.quantity for line in part), 3_600_000)
            assert abs(Fraction(row["reserved_gpu_hours"]) - hours) <= Fraction(1, 2 * 10**6)


@quick
@given(LINES)
def test_reports_add_up_to_the_same_whatever_they_are_grouped_by(lines: list[UsageLine]) -> None:
    for by in BY:
        rows = report(lines, by)
        parts = [part_of(row, by, lines) for row in rows]
        true = sum((line.amount for line in lines), Decimal(0))
        assert sum((line.amount for part in parts for line in part), Decimal(0)) == true
        assert abs(sum(row["amount_micros"] for row in rows) - true * 1_000_000) <= Decimal(len(rows)) / 2
        tokens = sum(line.quantity for line in lines if line.kind is Kind.TOKENS)
        assert sum(row.get("input_tokens", 0) for row in rows) == tokens


def test_small_change_is_added_up_before_it_is_rounded() -> None:
    lines = [a_line(day=f"2026-11-{day}", unit_price="0.4", quantity=1) for day in (25, 26, 27)]
    assert [row["amount_micros"] for row in report(lines, ["day"])] == [0, 0, 0]
    assert [row["amount_micros"] for row in report(lines, [])] == [1]  # of 1.2, where rounded days would give 0
    assert [to_micros(line.amount) for line in lines] == [0, 0, 0]


def test_a_report_is_sorted_and_keeps_tokens_and_gpu_time_apart() -> None:
    hour = a_line(kind=Kind.GPU_TIME, quantity=5_400_000, unit_price="3", api_key="", tier="active")
    later, sooner = a_line(day="2026-11-26"), a_line(quantity=12, events=2)
    assert report([later, hour, sooner], ["day"]) == [
        {"day": "2026-11-25", "kind": "gpu_time", "reserved_gpu_hours": "1.5", "amount_micros": 4_500_000},
        {"day": "2026-11-25", "kind": "tokens", "requests": 2, "input_tokens": 12, "amount_micros": 0},
        {"day": "2026-11-26", "kind": "tokens", "requests": 1, "input_tokens": 8, "amount_micros": 0},
    ]


def test_two_prices_are_one_row_and_each_counts_at_its_own() -> None:
    lines = [a_line(quantity=1_000_000), a_line(quantity=1_000_000, tier="active", unit_price="0.009")]
    (row,) = report(lines, ["day", "model", "api_key"])
    assert (row["input_tokens"], row["amount_micros"]) == (2_000_000, 24_000)


def test_nothing_used_is_an_empty_report() -> None:
    assert report([], ["day"]) == []


def test_an_event_costs_what_its_line_costs() -> None:
    event = an_event(quantity=777)
    assert a_line(quantity=777).amount == event.amount
    assert replace(event, quantity=0).amount == 0
