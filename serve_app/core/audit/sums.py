"""Whether the sums of `Store.usage` are those of the events, and of what was trimmed from them.

Trimmed events left only a count for each shard, so in a shard that lost some, a line may exceed its events, as long as
all lines together exceed them by just that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from serve_app.core.audit.places import Counts, Place
from serve_app.core.ledger import UsageEvent, UsageLine, shard_of

Line = tuple[str, ...]


@dataclass(slots=True)
class Sum:
    events: int = 0
    quantity: int = 0

    def add(self, events: int, quantity: int) -> None:
        self.events += events
        self.quantity += quantity

    def exceeds(self, other: Sum | Counts) -> bool:
        return self.events > other.events or self.quantity > other.quantity


class Sums:
    """Of the events: those that the lines must hold, and those that came while the lines were read."""

    def __init__(self) -> None:
        self._sure: dict[Line, Sum] = {}
        self._late: dict[Line, Sum] = {}

    def add(self, event: UsageEvent, *, sure: bool) -> None:
        sums = self._sure if sure else self._late
        sums.setdefault(_line(event), Sum()).add(1, event.quantity)

    def compare(self, lines: Iterable[UsageLine], places: dict[int, Place]) -> Iterator[str]:
        """What is different, in words. lines: of all workspaces and days."""
        seen: set[Line] = set()
        least_beyond = {shard: Sum() for shard in places}
        most_beyond = {shard: Sum() for shard in places}
        for line in lines:
            key, shard = _line(line), shard_of(line.workspace)
            seen.add(key)
            sure, late = self._sure.get(key, Sum()), self._late.get(key, Sum())
            most = Sum(line.events - sure.events, line.quantity - sure.quantity)
            least = Sum(most.events - late.events, most.quantity - late.quantity)
            most_beyond[shard].add(most.events, most.quantity)
            least_beyond[shard].add(least.events, least.quantity)
            if Sum().exceeds(most) or least.exceeds(places[shard].trimmed):
                yield (
                    f"usage of {' '.join(key)}: {line.events} events, {line.quantity};"
                    f" the ledger has {sure.events}, {sure.quantity}"
                )
        for key in self._sure.keys() - seen:
            yield f"usage of {' '.join(key)}: none; the ledger has {self._sure[key].events} events"
        for shard, place in places.items():
            least, most, trimmed = least_beyond[shard], most_beyond[shard], place.trimmed
            if trimmed.sequence and (least.exceeds(trimmed) or Sum(trimmed.events, trimmed.quantity).exceeds(most)):
                yield (
                    f"usage exceeds the events of shard {shard} by {most.events}, {most.quantity};"
                    f" trimmed were {trimmed.events}, {trimmed.quantity}"
                )


def _line(of: UsageEvent | UsageLine) -> Line:
    return (of.workspace, of.day, of.kind.value, of.model, of.api_key, of.tier, of.unit_price)
