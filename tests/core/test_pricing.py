from __future__ import annotations

import itertools
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serve_app.core.catalog import SizeClass
from serve_app.core.keys import Plan
from serve_app.core.pricing import RateCard, Tier, TokenRate, plain, to_micros

quick = settings(max_examples=200, deadline=None)

DOLLARS = st.decimals(0, 10**9, places=15)
PAYING = [plan for plan in Plan if plan.has_keys]


def a_card(**changes: Any) -> dict[str, Any]:
    """What an operator writes, as YAML gives it."""
    tokens = {size.value: {"flex": "0.02", "active": "0.01"} for size in SizeClass}
    return {"version": "2026-11", "plans": {plan.value: {"tokens": tokens, "gpu_hour": 3} for plan in PAYING}} | changes


@pytest.mark.parametrize(("plan", "size"), list(itertools.product(PAYING, SizeClass)))
def test_the_default_card_prices_every_plan_and_class_and_rewards_a_reservation(plan: Plan, size: SizeClass) -> None:
    card = RateCard()
    flex, active = (card.token_price(plan, size, tier) for tier in (Tier.FLEX, Tier.ACTIVE))
    assert 0 < active < flex
    assert active == flex * Decimal("0.6")
    assert card.gpu_hour_price(plan) > 0


def test_larger_models_and_smaller_plans_cost_more() -> None:
    card = RateCard()
    for plan in PAYING:
        prices = [card.token_price(plan, size, Tier.FLEX) for size in SizeClass]
        assert prices == sorted(set(prices))
    for size in SizeClass:
        prices = [card.token_price(plan, size, Tier.FLEX) for plan in PAYING]
        assert prices == sorted(set(prices), reverse=True)


def test_a_card_is_what_the_operator_wrote() -> None:
    card = RateCard.model_validate(a_card())
    assert card.version == "2026-11"
    assert card.token_price(Plan.TEAM, SizeClass.XL, Tier.FLEX) == Decimal("0.02")
    assert card.token_price(Plan.TEAM, SizeClass.XL, Tier.ACTIVE) == Decimal("0.01")
    assert card.gpu_hour_price(Plan.TEAM) == 3


@pytest.mark.parametrize("plan", PAYING)
def test_a_plan_with_keys_needs_prices(plan: Plan) -> None:
    plans = {name: rates for name, rates in a_card()["plans"].items() if name != plan.value}
    with pytest.raises(ValidationError, match=f"no rates for {plan.value}"):
        RateCard.model_validate(a_card(plans=plans))


@pytest.mark.parametrize("size", list(SizeClass))
def test_every_class_needs_a_price(size: SizeClass) -> None:
    plans = a_card()["plans"]
    del plans["pro"]["tokens"][size.value]
    with pytest.raises(ValidationError, match=f"no rate for {size.value}"):
        RateCard.model_validate(a_card(plans=plans))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("verison: x", "did you mean 'version'"),
        ("plan: {}", "did you mean 'plans'"),
        ("plans: {pro: {token: {}, gpu_hour: 3}}", "did you mean 'tokens'"),
        ("plans: {pro: {tokens: {}, gpu_hours: 3}}", "did you mean 'gpu_hour'"),
        ("plans: {pro: {tokens: {small: {flex: 1, activ: 1}}, gpu_hour: 3}}", "did you mean 'active'"),
        ("plans: {prro: {tokens: {}, gpu_hour: 3}}", "'starter', 'pro', 'team' or 'enterprise'"),
        ("plans: {pro: {tokens: {smal: {flex: 1, active: 1}}, gpu_hour: 3}}", "'small', 'base', 'large' or '7b'"),
        ("version: ''", "at least 1 character"),
    ],
)
def test_what_nobody_knows_is_refused_with_what_is_known(text: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RateCard.model_validate(yaml.safe_load(text))


def test_a_reservation_that_does_not_pay_is_refused() -> None:
    TokenRate(flex=Decimal("0.02"), active=Decimal("0.02"))
    with pytest.raises(ValidationError, match="nobody would reserve"):
        TokenRate(flex=Decimal("0.02"), active=Decimal("0.020000001"))


@pytest.mark.parametrize(
    "price",
    [
        -1,
        -1e-9,
        "-0.01",
        math.nan,
        math.inf,
        "NaN",
        "sNaN",
        "Infinity",
        0.0000000001,
        0.1 + 0.2,
        "0.0000000001",
        10**9,
        "1e18",
        True,
        None,
        "",
        "three",
        "3,00",
        [3],
    ],
)
def test_what_is_no_price_is_refused(price: Any) -> None:
    with pytest.raises(ValidationError):
        TokenRate.model_validate({"flex": price, "active": 0})
    plans = a_card()["plans"]
    plans["pro"]["gpu_hour"] = price
    with pytest.raises(ValidationError):
        RateCard.model_validate(a_card(plans=plans))


@pytest.mark.parametrize("price", ["0.1", "0.02", "0.012", "2.70", "3.00", "0", "0.000000001", "123456.789", "1.0e-05"])
def test_a_number_and_its_text_are_the_same_price(price: str) -> None:
    as_number, as_text = yaml.safe_load(f"[{price}, '{price}']")
    assert isinstance(as_number, int | float)
    number, text = (TokenRate.model_validate({"flex": value, "active": 0}).flex for value in (as_number, as_text))
    assert number == text == Decimal(price)
    assert plain(number) == plain(text)


@quick
@given(DOLLARS)
@example(Decimal("0.0000005"))
@example(Decimal("0.0000015"))
@example(Decimal("0.0000025"))
@example(Decimal("0.000000500000001"))
@example(Decimal("0.000000499999999"))
def test_micros_are_the_nearest_and_of_two_the_even_one(dollars: Decimal) -> None:
    assert to_micros(dollars) == round(Fraction(dollars) * 1_000_000)


@quick
@given(DOLLARS, DOLLARS)
def test_more_dollars_are_never_fewer_micros(one: Decimal, other: Decimal) -> None:
    less, more = sorted((one, other))
    assert to_micros(less) <= to_micros(more)


@quick
@given(st.integers(0, 10**15))
def test_whole_micros_stay_what_they_are(micros: int) -> None:
    assert to_micros(Decimal(micros) / 1_000_000) == micros


@quick
@given(st.decimals(0, 10**9, places=9), st.integers(0, 6))
def test_a_price_has_one_spelling(price: Decimal, zeros: int) -> None:
    spelled = plain(price)
    assert Decimal(spelled) == price
    assert "E" not in spelled
    assert plain(price.quantize(Decimal(10) ** -(9 + zeros))) == plain(price.normalize()) == spelled


@pytest.mark.parametrize(
    ("price", "text"),
    [
        ("3.00", "3"),
        ("0.0060", "0.006"),
        ("0", "0"),
        ("0.000", "0"),
        ("100", "100"),
        ("1E+2", "100"),
        ("1E-9", "0.000000001"),
    ],
)
def test_a_price_is_spelled_without_exponent_and_trailing_zeros(price: str, text: str) -> None:
    assert plain(Decimal(price)) == text
