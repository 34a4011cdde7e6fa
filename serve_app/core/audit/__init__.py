"""The audit: whether the replies that are kept, the ledger's events and what the sinks acknowledged tell one story.

It is fed in the order of `Audit`'s methods, and keeps ids and counts, never events. What it is fed may have been read
while the store was in use: `cli/audit.py` reads in an order in which what comes first is contained in what comes later.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve_app.core import caps
from serve_app.core.audit.places import Counts, Place, SinkPlace, place_and_mark, repeated
from serve_app.core.audit.report import Fault, Findings, Report, SinkReport
from serve_app.core.audit.sums import Sums
from serve_app.core.idempotency import REPLAY_MS, Record
from serve_app.core.ledger import Recorded, UsageEvent, UsageLine

SPENDING_IS_GOOD_TO = 10**12


@dataclass(slots=True, kw_only=True)
class _Reply:
    claim: str
    workspace: str
    tokens: int
    billed: bool = False


@dataclass(slots=True, kw_only=True)
class _Sink:
    lines: bool
    places: dict[int, SinkPlace] = field(default_factory=dict)
    redelivered: int = 0


class Audit:
    """Feed it replies and sinks; then each shard with its events; then usage, the sinks' lines, and the doubtful."""

    def __init__(self, *, now_ms: int) -> None:
        self._now_ms = now_ms
        self._replies: dict[str, _Reply] = {}  # by op
        self._op_of: dict[str, str] = {}  # by claim
        self._unanswered: dict[str, str] = {}  # op by claim
        self._places: dict[int, Place] = {}
        self._sums = Sums()
        self._sinks: dict[str, _Sink] = {}
        self._checked = 0
        self._found = Findings()

    def reply(self, record: Record, used: int | None = None) -> None:
        """A record that is done. used: the tokens that the reply itself names, if it was read."""
        tokens = record.tokens or used or 0  # a record that was written without its event has no count of its own
        self._replies[record.op] = _Reply(claim=record.claim, workspace=record.workspace, tokens=tokens)
        self._op_of[record.claim] = record.op
        self._checked += used is not None
        if used is not None and used != tokens:
            self._found.add(Fault.UNEQUAL, f"reply {record.op}: it names {used} tokens, its record {tokens}")

    def unreadable(self, record: Record) -> None:
        self._found.add(Fault.UNEQUAL, f"reply {record.op}: what is stored is no reply")

    def sink(self, name: str, shard: int, cursor: Counts, dead: Iterable[Recorded], *, lines: bool) -> None:
        """lines: all that the sink holds will be fed to `line`."""
        sink = self._sinks.setdefault(name, _Sink(lines=lines))
        sink.places[shard] = SinkPlace.of(cursor, dead)

    def shard(self, shard: int, *, last: int, trimmed: Counts, sure: int) -> None:
        """Its state. sure: `last` as it was before `usage` was read."""
        self._places[shard] = Place(last=last, trimmed=trimmed, sure=sure, newest=trimmed.sequence)
        if trimmed.events != trimmed.sequence:
            self._found.add(
                Fault.UNEQUAL, f"shard {shard}: trimmed up to {trimmed.sequence}, and that were {trimmed.events} events"
            )

    def event(self, shard: int, recorded: Recorded) -> None:
        """In order, all that are not trimmed, up to the state's `last`."""
        place, event, sequence = self._places[shard], recorded.event, recorded.sequence
        if sequence <= place.newest:
            self._found.add(Fault.UNEQUAL, f"shard {shard}: event {sequence} comes after event {place.newest}")
            return
        self._gap(shard, place.newest, sequence)
        if event.shard != shard:
            self._found.add(Fault.UNEQUAL, f"shard {shard}: event {sequence} belongs to shard {event.shard}")
        place.add(recorded)
        for sink in self._sinks.values():
            sink.places[shard].pass_by(recorded)
        self._sums.add(event, sure=sequence <= place.sure)
        self._match(event)

    def shard_end(self, shard: int, *, above: int | None, last: int) -> None:
        """above: sequence of an event beyond the state's `last`, if there is one; last: of the state after that."""
        place = self._places[shard]
        self._gap(shard, place.newest, place.last + 1)
        if above is not None and above > last:
            self._found.add(Fault.UNEQUAL, f"shard {shard}: the last is said to be {last}, and there is event {above}")

    def usage(self, lines: Iterable[UsageLine]) -> None:
        """All of them."""
        for what in self._sums.compare(lines, self._places):
            self._found.add(Fault.UNEQUAL, what)

    def spending(
        self, workspace: str, month: str, picos: int, *, before: Sequence[UsageLine], after: Sequence[UsageLine]
    ) -> None:
        """What a spend cap goes by, and the month's usage as it was read before it and after it."""
        rounded = 1 + sum(line.events for line in after) // 2
        least, most = caps.picos_of_lines(before) - rounded, caps.picos_of_lines(after) + rounded
        made_later = most // SPENDING_IS_GOOD_TO  # an older version did not count: its usage was added up in floats
        if not least - made_later <= picos <= most + made_later:
            self._found.add(
                Fault.UNEQUAL, f"spending of {workspace} in {month}: {picos} pico-dollars; its usage: {most - rounded}"
            )

    def line(self, name: str, cloud_event: dict[str, Any]) -> None:
        """One CloudEvent that the sink holds."""
        sink = self._sinks[name]
        try:
            shard, sequence, mark = place_and_mark(cloud_event)
            place, sink_place = self._places[shard], sink.places[shard]
        except (KeyError, TypeError, ValueError, AttributeError):
            self._found.add(Fault.UNEQUAL, f"sink {name}: it holds something that is no event of this ledger")
            return
        if not place.trimmed.sequence < sequence <= place.last:
            return  # older than what is left to compare with, or newer than this audit
        index = place.index(sequence)
        again = index is not None and sink_place.see(place, index)
        if index is None or place.mark(index) != mark:
            self._found.add(Fault.UNEQUAL, f"sink {name}: shard {shard}, event {sequence} is not that of the ledger")
        elif again:
            sink.redelivered += 1

    def broken(self, name: str, why: str) -> None:
        """The sink holds something that cannot be read: what it lacks cannot be told."""
        self._sinks[name].lines = False
        self._found.add(Fault.UNEQUAL, f"sink {name}: {why}")

    def doubtful(self) -> Collection[str]:
        """Claims that are billed, and were not done when replies were read: `reply_again` says what they are now."""
        return self._unanswered.keys()

    def reply_again(self, record: Record) -> None:
        if record.reply is not None and self._unanswered.get(record.claim) == record.op:
            del self._unanswered[record.claim]

    def report(self) -> Report:
        """Once, when everything was fed."""
        for op, reply in self._replies.items():
            if not reply.billed:  # events are kept for days longer than replies
                self._found.add(Fault.LOST, f"reply {op}: there is no event for it")
        for claim, op in self._unanswered.items():
            self._found.add(Fault.UNANSWERED, f"event {op}: no reply is kept for its key (record {claim})")
        for (shard, sequence), (other, its) in repeated(self._places):
            self._found.add(
                Fault.DOUBLE, f"one id for two events: shard {shard}, event {sequence}, and shard {other}, event {its}"
            )
        sinks = [self._sink_report(name, sink) for name, sink in sorted(self._sinks.items())]
        places = self._places.values()
        return Report(
            replies=len(self._replies),
            checked=self._checked,
            events=sum(len(place) + place.trimmed.events for place in places),
            trimmed=sum(place.trimmed.events for place in places),
            quantity=sum(place.quantity + place.trimmed.quantity for place in places),
            faults=self._found.counts(),
            differences=self._found.shown,
            sinks=sinks,
        )

    def _gap(self, shard: int, newest: int, following: int) -> None:
        if missing := max(0, following - newest - 1):
            self._found.add(Fault.LOST, f"shard {shard}: no events from {newest + 1} to {following - 1}", missing)

    def _match(self, event: UsageEvent) -> None:
        claim = str(event.details.get("idempotency") or "")
        if reply := self._replies.get(event.id):
            reply.billed = True
            if (reply.tokens, reply.workspace) != (event.quantity, event.workspace):
                self._found.add(
                    Fault.UNEQUAL,
                    f"event {event.id}: {event.quantity} of {event.workspace};"
                    f" its reply: {reply.tokens} of {reply.workspace}",
                )
            if claim != reply.claim:
                self._found.add(Fault.UNEQUAL, f"event {event.id}: it names another key than its reply")
        elif claim and event.time_ms > self._now_ms - REPLAY_MS:
            if claim in self._op_of or claim in self._unanswered:
                self._found.add(Fault.DOUBLE, f"event {event.id}: another one billed its key, too (record {claim})")
            else:
                self._unanswered[claim] = event.id

    def _sink_report(self, name: str, sink: _Sink) -> SinkReport:
        never_offered = 0
        for shard, at in sink.places.items():
            place, cursor = self._places[shard], at.cursor
            if cursor.sequence > place.last:
                self._found.add(
                    Fault.UNEQUAL,
                    f"sink {name}: it acknowledged shard {shard} up to {cursor.sequence}, and the last is {place.last}",
                )
            events, quantity = at.lacks(place.trimmed)
            if 0 < events <= place.trimmed.events and 0 < quantity <= place.trimmed.quantity:
                never_offered += events
            elif events or quantity:
                self._found.add(
                    Fault.UNEQUAL,
                    f"sink {name}: it acknowledged {cursor.events} events, {cursor.quantity} of shard {shard};"
                    f" the ledger has {cursor.events + events}, {cursor.quantity + quantity}",
                )
            for sequence in at.missing(place) if sink.lines else ():
                self._found.add(
                    Fault.LOST, f"sink {name}: it acknowledged shard {shard}, event {sequence}, and does not hold it"
                )
        return SinkReport(
            name=name,
            acknowledged=sum(at.cursor.events for at in sink.places.values()),
            pending=sum(self._places[shard].after(at.cursor) for shard, at in sink.places.items()),
            dead=sum(len(at.dead) for at in sink.places.values()),
            redelivered=sink.redelivered,
            never_offered=never_offered,
        )
