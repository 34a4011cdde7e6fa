"""What a plan allows: requests and tokens per minute for each key, and its share of turns among workspaces.

Configuration with the contract's defaults; prices by plan are in `pricing.py`. `limits.py` counts what this allows.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from serve_app.core.keys import ApiKey, Plan
from serve_app.core.strict import StrictModel

PerMinute = Annotated[int, Field(ge=1, le=100_000_000)]


class PlanLimits(StrictModel):
    """For each key of a workspace on this plan."""

    requests_per_minute: PerMinute
    """A key's rate, unless the key has one of its own."""
    ceiling: PerMinute | None = None
    """The most requests per minute that a key of its own may be given. None: no ceiling."""
    tokens_per_minute: PerMinute | None = None
    """A token budget beside it, unless the key has one of its own. None: tokens are not limited."""
    weight: Annotated[int, Field(ge=1, le=1000)] = 1
    """Tokens of this plan's workspaces that go in one round of turns, relative to others'."""

    @model_validator(mode="after")
    def _below_its_ceiling(self) -> PlanLimits:
        if self.ceiling is not None and self.requests_per_minute > self.ceiling:
            raise ValueError(f"requests_per_minute ({self.requests_per_minute}) is above ceiling ({self.ceiling})")
        return self


def _default_plans() -> dict[Plan, PlanLimits]:
    return {
        Plan.PRO: PlanLimits(requests_per_minute=500, ceiling=1_000),
        Plan.TEAM: PlanLimits(requests_per_minute=5_000, ceiling=10_000, weight=2),
        Plan.ENTERPRISE: PlanLimits(requests_per_minute=10_000, weight=4),
    }


class Limits(StrictModel):
    """By plan."""

    plans: dict[Plan, PlanLimits] = Field(default_factory=_default_plans)

    @field_validator("plans")
    @classmethod
    def _every_plan(cls, plans: dict[Plan, PlanLimits]) -> dict[Plan, PlanLimits]:
        if missing := [plan.value for plan in Plan if plan.has_keys and plan not in plans]:
            raise ValueError(f"no limits for {', '.join(missing)}: a plan with keys needs them")
        return plans

    def weight(self, plan: Plan) -> int:
        """Relative share of turns of a workspace on this plan."""
        return self.plans[plan].weight

    def requests_per_minute(self, plan: Plan, key: ApiKey) -> int:
        """What this key may ask for: its own rate, at most the plan's ceiling, or the plan's."""
        limits = self.plans[plan]
        if key.requests_per_minute is None:
            return limits.requests_per_minute
        return min(key.requests_per_minute, limits.ceiling or key.requests_per_minute)

    def tokens_per_minute(self, plan: Plan, key: ApiKey) -> int | None:
        """None: not limited."""
        return key.tokens_per_minute or self.plans[plan].tokens_per_minute
