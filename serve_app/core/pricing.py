"""What a token and a reserved GPU hour cost: the rate card, and the one rounding rule.

Amounts are integers times a Decimal price, and stay exact; they are rounded once, where they become a line that
somebody reads or pays (`to_micros`). `ledger.py` makes the events, `ledger.UsageLine` the lines.
"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal
from enum import StrEnum
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from serve_app.core.catalog import SizeClass
from serve_app.core.keys import Plan
from serve_app.core.strict import StrictModel

TOKENS_PER_PRICE = 1_000_000
GPU_MILLISECONDS_PER_PRICE = 3_600_000

Price = Annotated[Decimal, Field(ge=0, max_digits=18, decimal_places=9, allow_inf_nan=False)]


class Tier(StrEnum):
    FLEX = "flex"
    """May scale to zero; priced by the token alone."""
    ACTIVE = "active"
    """Always warm: a lower price a token, and an hourly fee for each GPU that is kept."""


class TokenRate(StrictModel):
    """US dollars per million input tokens."""

    flex: Price
    active: Price

    @model_validator(mode="after")
    def _reserving_pays(self) -> TokenRate:
        if self.active > self.flex:
            raise ValueError(f"active ({self.active}) is above flex ({self.flex}): nobody would reserve")
        return self


class PlanRates(StrictModel):
    tokens: dict[SizeClass, TokenRate]
    gpu_hour: Price
    """US dollars per reserved GPU and hour."""

    @field_validator("tokens")
    @classmethod
    def _every_class(cls, tokens: dict[SizeClass, TokenRate]) -> dict[SizeClass, TokenRate]:
        if missing := [size.value for size in SizeClass if size not in tokens]:
            raise ValueError(f"no rate for {', '.join(missing)}: what has no price cannot be served")
        return tokens


def _rates(small: str, base: str, large: str, xl: str, *, gpu_hour: str) -> PlanRates:
    """The default card's pattern: an active deployment pays 60 % of the flex price."""
    prices = dict(zip(SizeClass, map(Decimal, (small, base, large, xl)), strict=True))
    return PlanRates(
        tokens={size: TokenRate(flex=price, active=price * Decimal("0.6")) for size, price in prices.items()},
        gpu_hour=Decimal(gpu_hour),
    )


def _default_plans() -> dict[Plan, PlanRates]:
    return {
        Plan.PRO: _rates("0.010", "0.015", "0.020", "0.100", gpu_hour="3.00"),
        Plan.TEAM: _rates("0.008", "0.012", "0.016", "0.080", gpu_hour="2.70"),
        Plan.ENTERPRISE: _rates("0.006", "0.009", "0.012", "0.060", gpu_hour="2.40"),
    }


class RateCard(StrictModel):
    """Prices by plan, size class and tier. The defaults are examples: set your own before you bill anybody."""

    version: Annotated[str, Field(min_length=1, max_length=64)] = "default-1"
    """Goes into every event: change it with the prices."""
    plans: dict[Plan, PlanRates] = Field(default_factory=_default_plans)

    @field_validator("plans")
    @classmethod
    def _every_plan(cls, plans: dict[Plan, PlanRates]) -> dict[Plan, PlanRates]:
        if missing := [plan.value for plan in Plan if plan.has_keys and plan not in plans]:
            raise ValueError(f"no rates for {', '.join(missing)}: a plan with keys needs prices")
        return plans

    def token_price(self, plan: Plan, size: SizeClass, tier: Tier) -> Decimal:
        """US dollars per million tokens."""
        rate = self.plans[plan].tokens[size]
        return rate.active if tier is Tier.ACTIVE else rate.flex

    def gpu_hour_price(self, plan: Plan) -> Decimal:
        """US dollars per GPU and hour."""
        return self.plans[plan].gpu_hour


def to_micros(dollars: Decimal) -> int:
    """The one rounding rule: half to even, to whole micro-dollars, once for each line of a report or an invoice."""
    return int((dollars * 1_000_000).quantize(Decimal(1), rounding=ROUND_HALF_EVEN))


def plain(price: Decimal) -> str:
    """Without exponent and trailing zeros: one price, one spelling."""
    text = format(price, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
