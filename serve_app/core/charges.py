"""What a request costs: the usage event of one that succeeded.

Its price follows from the workspace's plan, the model's class, and whether that workspace reserved the model; nothing a
caller sends has a say. `reservations.py` bills the reserved GPUs themselves.
"""

from __future__ import annotations

from typing import Any

from serve_app.core import pricing
from serve_app.core.catalog import ModelCard
from serve_app.core.keys import ApiKey, Workspace
from serve_app.core.ledger import Kind, UsageEvent
from serve_app.core.pricing import RateCard, Tier


def tier_of(card: ModelCard, workspace: Workspace) -> Tier:
    """Active for whoever reserved the model, flex for everybody else."""
    return Tier.ACTIVE if card.reserved_by == workspace.id else Tier.FLEX


def token_event(
    *,
    id: str,
    workspace: Workspace,
    key: ApiKey,
    card: ModelCard,
    rates: RateCard,
    tokens: int,
    time_ms: int,
    details: dict[str, Any],
) -> UsageEvent:
    """One successful request to this model, of so many tokens as its `usage` says."""
    tier = tier_of(card, workspace)
    return UsageEvent(
        id=id,
        kind=Kind.TOKENS,
        workspace=workspace.id,
        time_ms=time_ms,
        quantity=tokens,
        unit_price=pricing.plain(rates.token_price(workspace.plan, card.size_class, tier)),
        rate_card=rates.version,
        plan=workspace.plan.value,
        tier=tier.value,
        model=card.name,
        size_class=card.size_class.value,
        api_key=key.id,
        details={name: value for name, value in details.items() if value is not None},
    )
