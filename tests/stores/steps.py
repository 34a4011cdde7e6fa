"""Steps and events of made-up requests, for the tests of stores."""

from __future__ import annotations

from typing import Any

from serve_app.core.idempotency import Abandon, Begin, Complete, Emit, Renew, Stored
from serve_app.core.ledger import Kind, UsageEvent

NOW_MS = 1_764_115_200_000  # 2025-11-26, midnight in UTC
LEASE_MS = 20_000
BODY = b"reply\n\x00\xff"


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now_ms = NOW_MS

    def __call__(self) -> int:
        return self.now_ms

    def tick(self, ms: int) -> None:
        self.now_ms += ms


def begin(claim: str = "claim", attempt: str = "first", workspace: str = "ws", **other: Any) -> Begin:
    fields: dict[str, Any] = {
        "fingerprint": "print",
        "op": f"op-of-{attempt}",
        "lease_ms": LEASE_MS,
        "reserve_bytes": 100,
        "max_bytes": 1_000_000,
        "max_records": 1_000,
    }
    return Begin(claim=claim, workspace=workspace, attempt=attempt, **fields | other)


def renew(claim: str = "claim", attempt: str = "first", workspace: str = "ws") -> Renew:
    return Renew(claim=claim, workspace=workspace, attempt=attempt, lease_ms=LEASE_MS)


def complete(
    claim: str = "claim",
    op: str = "op-of-first",
    workspace: str = "ws",
    reply: Stored | None = None,
    size: int = 60,
    tokens: int = 7,
) -> Complete:
    return Complete(
        claim=claim,
        workspace=workspace,
        op=op,
        reply=reply or Stored(body=BODY),
        bytes=size,
        event=event(op, workspace, tokens),
    )


def abandon(claim: str = "claim", attempt: str = "first", workspace: str = "ws") -> Abandon:
    return Abandon(claim=claim, workspace=workspace, attempt=attempt)


def emit(id: str, workspace: str = "ws", quantity: int = 7, **other: Any) -> Emit:
    return Emit(event=event(id, workspace, quantity, **other))


def event(id: str, workspace: str = "ws", quantity: int = 7, **other: Any) -> UsageEvent:
    fields: dict[str, Any] = {
        "kind": Kind.TOKENS,
        "time_ms": NOW_MS,
        "unit_price": "0.012",
        "rate_card": "card-1",
        "plan": "team",
        "tier": "flex",
        "model": "small-model",
        "size_class": "small",
        "api_key": "key-1",
        "details": {"inputs": 2, "request": "ré"},
    }
    return UsageEvent(id=id, workspace=workspace, quantity=quantity, **fields | other)
