"""A monthly spend cap: how a workspace's spending is counted, and what is said when little of it is left.

A store counts in the write that adds a bill, in whole pico-dollars: what is rounded is a billion times smaller than
what a line of an invoice is. A bill is refused once the cap is reached, so at most the one that reaches it exceeds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal

from serve_app.core.ledger import Kind, UsageEvent, UsageLine, month_of, notice_event_id

PICOS_PER_MICRO = 1_000_000
_PICO = Decimal("1e-12")
WARNINGS = (80, 100)  # per cent of the cap


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """What to add to the ledger, once, when the month's spending has come so far."""

    at_picos: int
    event: UsageEvent


def picos(event: UsageEvent) -> int:
    """What it costs, rounded half to even."""
    return _picos(event.amount)


def picos_of_lines(lines: Sequence[UsageLine]) -> int:
    """What the events behind these lines cost, but for their rounding: half a pico-dollar each, at most."""
    return _picos(sum((line.amount for line in lines), Decimal(0)))


def by_month(lines: Sequence[UsageLine]) -> dict[tuple[str, str], list[UsageLine]]:
    """By workspace and month."""
    months: dict[tuple[str, str], list[UsageLine]] = {}
    for line in lines:
        months.setdefault((line.workspace, month_of(line.day)), []).append(line)
    return months


def notices(event: UsageEvent, cap_micros: int) -> list[Notice]:
    """The warnings that may be due with this bill."""
    return [
        Notice(at_picos=cap_micros * PICOS_PER_MICRO * percent // 100, event=_notice(event, cap_micros, percent))
        for percent in WARNINGS
    ]


def _notice(event: UsageEvent, cap_micros: int, percent: int) -> UsageEvent:
    month = month_of(event.day)
    return UsageEvent(
        id=notice_event_id(event.workspace, month, cap_micros, percent),
        kind=Kind.NOTICE,
        workspace=event.workspace,
        time_ms=event.time_ms,
        quantity=0,
        unit_price="0",
        rate_card=event.rate_card,
        plan=event.plan,
        tier="",
        model="",
        size_class="",
        details={"month": month, "cap_micros": cap_micros, "percent_spent": percent},
    )


def _picos(dollars: Decimal) -> int:
    return int(dollars.quantize(_PICO, rounding=ROUND_HALF_EVEN).scaleb(12))
