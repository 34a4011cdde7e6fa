"""What the audit found, as values."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

SHOWN = 100  # differences that are told one by one; all are counted


class Fault(StrEnum):
    """What a difference means to whoever pays."""

    DOUBLE = "double"
    """Billed twice."""
    LOST = "lost"
    """Served, but not billed; or billed, but not where it was said to be."""
    UNEQUAL = "unequal"
    """Two places tell different things."""
    UNANSWERED = "unanswered"
    """Billed, but the reply is not kept: a retry would be billed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    fault: Fault
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkReport:
    """Counts of events. redelivered: held more than once, with equal contents. never_offered: trimmed before the sink
    was there; what its cursors lack is no difference, if it may be that."""

    name: str
    acknowledged: int
    pending: int
    dead: int
    redelivered: int
    never_offered: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """events, quantity: with the trimmed ones. checked: replies that were read, and name as many tokens as their record
    or are counted as unequal. quantity: tokens and GPU-milliseconds."""

    replies: int
    checked: int
    events: int
    trimmed: int
    quantity: int
    faults: dict[str, int]
    differences: list[Difference]
    sinks: list[SinkReport]

    @property
    def clean(self) -> bool:
        return not any(self.faults.values())


class Findings:
    """Differences as they are found."""

    def __init__(self) -> None:
        self._counts: Counter[Fault] = Counter()
        self.shown: list[Difference] = []

    def add(self, fault: Fault, what: str, times: int = 1) -> None:
        self._counts[fault] += times
        if len(self.shown) < SHOWN:
            self.shown.append(Difference(fault=fault, what=what))

    def counts(self) -> dict[str, int]:
        """By fault: 0 for those that there are none of."""
        return {fault.value: self._counts[fault] for fault in Fault}
