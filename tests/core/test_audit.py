from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.core.audit import Audit
from serve_app.core.audit.places import Place, repeated
from serve_app.core.audit.report import SHOWN, Report
from serve_app.core.idempotency import GRACE_MS, REPLAY_MS, Record, Stored
from serve_app.core.ledger import SHARDS, Kind, Recorded, UsageEvent, UsageLine, cloud_event, shard_of

NOW_MS = 1_764_115_200_000
DAY_MS = 24 * 3600 * 1000
NONE = {"double": 0, "lost": 0, "unequal": 0, "unanswered": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class At:
    sequence: int = 0
    events: int = 0
    quantity: int = 0


def event(id: str, quantity: int = 7, workspace: str = "ws", claim: str | None = None, **other: Any) -> UsageEvent:
    fields: dict[str, Any] = {
        "kind": Kind.TOKENS,
        "time_ms": NOW_MS - 1000,
        "unit_price": "0.012",
        "rate_card": "card",
        "plan": "team",
        "tier": "flex",
        "model": "m",
        "size_class": "small",
        "details": {"idempotency": claim} if claim else {},
    }
    return UsageEvent(id=id, workspace=workspace, quantity=quantity, **fields | other)


def record(claim: str, op: str, tokens: int = 7, workspace: str = "ws") -> Record:
    return Record(
        claim=claim,
        workspace=workspace,
        fingerprint="print",
        op=op,
        attempt="first",
        attempts=1,
        lease_ms=0,
        expires_ms=NOW_MS + REPLAY_MS + GRACE_MS,
        bytes=1,
        reply=Stored(blob="b"),
        tokens=tokens,
    )


def lines_of(events: Sequence[UsageEvent]) -> list[UsageLine]:
    """As a store adds them up."""
    sums: dict[tuple[Any, ...], list[int]] = {}
    for it in events:
        key = (it.workspace, it.day, it.kind, it.model, it.api_key, it.tier, it.unit_price)
        total = sums.setdefault(key, [0, 0])
        total[0] += 1
        total[1] += it.quantity
    names = ("workspace", "day", "kind", "model", "api_key", "tier", "unit_price")
    return [
        UsageLine(**dict(zip(names, key, strict=True)), events=count, quantity=quantity)
        for key, (count, quantity) in sums.items()
    ]


@dataclass(kw_only=True, slots=True)
class Books:
    """Events of the workspace `ws`, and what else the audit is fed: right, unless a test says otherwise."""

    events: list[UsageEvent]
    records: Sequence[Record] = ()
    again: Sequence[Record] = ()
    lines: list[UsageLine] | None = None
    trimmed: At = At()
    sure: int | None = None
    cursor: At | None = None
    dead: Sequence[int] = ()
    delivered: list[dict[str, Any]] | None = None

    def recorded(self) -> list[Recorded]:
        return [Recorded(sequence=at, event=it) for at, it in enumerate(self.events, self.trimmed.sequence + 1)]

    def cloud_events(self) -> list[dict[str, Any]]:
        return [cloud_event(it, "/s") for it in self.recorded()]

    def audit(self, *, without: int | None = None) -> Report:
        """without: a sequence that is left out."""
        audit, home = Audit(now_ms=NOW_MS), shard_of("ws")
        for reply in self.records:
            audit.reply(reply)
        recorded = self.recorded()
        last = recorded[-1].sequence if recorded else self.trimmed.sequence
        if self.cursor is not None:
            for shard in range(SHARDS):
                here = shard == home
                letters = [it for it in recorded if here and it.sequence in self.dead]
                cursor = self.cursor if here else At()
                audit.sink("sink", shard, cursor, letters, lines=self.delivered is not None)
        for shard in range(SHARDS):
            if shard == home:
                audit.shard(shard, last=last, trimmed=self.trimmed, sure=last if self.sure is None else self.sure)
                for it in recorded:
                    if it.sequence != without:
                        audit.event(shard, it)
                audit.shard_end(shard, above=None, last=last)
            else:
                audit.shard(shard, last=0, trimmed=At(), sure=0)
                audit.shard_end(shard, above=None, last=0)
        audit.usage(lines_of(self.events) if self.lines is None else self.lines)
        for line in self.delivered or ():
            audit.line("sink", line)
        doubtful = set(audit.doubtful())
        for reply in self.again:
            if reply.claim in doubtful:
                audit.reply_again(reply)
        return audit.report()


def plain(count: int) -> list[UsageEvent]:
    return [event(f"id-{at}", quantity=at + 1) for at in range(count)]


def test_a_reply_and_its_event_agree() -> None:
    report = Books(events=[event("op", claim="c")], records=[record("c", "op")]).audit()
    assert report.clean
    assert (report.replies, report.events, report.quantity) == (1, 1, 7)


def test_a_running_record_is_no_reply() -> None:
    running = replace(record("c", "op"), reply=None)
    report = Books(events=[event("op", claim="c")], again=[running]).audit()
    assert report.faults == NONE | {"unanswered": 1}


def test_a_reply_that_came_while_the_events_were_read_is_looked_at_again() -> None:
    assert Books(events=[event("op", claim="c")], again=[record("c", "op")]).audit().clean
    report = Books(events=[event("op", claim="c")], again=[record("c", "other-op")]).audit()
    assert report.faults == NONE | {"unanswered": 1}


@pytest.mark.parametrize(("age_ms", "unanswered"), [(DAY_MS - 1, 1), (DAY_MS, 0)])
def test_the_reply_of_an_event_may_be_gone_after_24_hours(age_ms: int, unanswered: int) -> None:
    report = Books(events=[event("op", claim="c", time_ms=NOW_MS - age_ms)]).audit()
    assert report.faults["unanswered"] == unanswered


def test_a_key_may_be_used_anew_after_24_hours() -> None:
    events = [event("old", claim="c", time_ms=NOW_MS - DAY_MS), event("op", claim="c")]
    assert Books(events=events, records=[record("c", "op")]).audit().clean


def test_a_key_that_was_billed_twice_within_24_hours_is_double() -> None:
    events = [event("old", claim="c", time_ms=NOW_MS - DAY_MS + 1), event("op", claim="c")]
    assert Books(events=events, records=[record("c", "op")]).audit().faults == NONE | {"double": 1}


@pytest.mark.parametrize("other", [{"tokens": 8}, {"workspace": "other"}, {"claim": "other"}])
def test_a_reply_that_is_not_as_its_event_says_is_unequal(other: dict[str, Any]) -> None:
    fields = {"claim": "c", "op": "op"} | other
    assert Books(events=[event("op", claim="c")], records=[record(**fields)]).audit().faults == NONE | {"unequal": 1}


def test_an_event_in_the_wrong_shard_is_unequal() -> None:
    events = [event("id", workspace=next(f"ws{at}" for at in range(99) if shard_of(f"ws{at}") != shard_of("ws")))]
    assert Books(events=events).audit().faults == NONE | {"unequal": 1}


def test_a_gap_counts_each_event_that_is_lost() -> None:
    report = Books(events=plain(3)).audit(without=2)
    assert report.faults["lost"] == 1
    assert Books(events=plain(3)).audit(without=3).faults["lost"] == 1
    assert Books(events=plain(3), trimmed=At(sequence=4, events=4, quantity=9)).audit(without=5).faults["lost"] == 1


def test_trimmed_sequences_must_be_as_many_as_trimmed_events() -> None:
    lines = lines_of([*plain(3), event("gone", quantity=9)])
    assert Books(events=plain(3), lines=lines, trimmed=At(sequence=1, events=1, quantity=9)).audit().clean
    assert not Books(events=plain(3), lines=lines, trimmed=At(sequence=2, events=1, quantity=9)).audit().clean


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 12), st.data())
@settings(max_examples=200, deadline=None)
def test_sums_may_hold_what_came_while_they_were_read_and_what_was_trimmed(
    quantities: list[int], gone: int, data: st.DataObject
) -> None:
    everything = [event(f"id-{at}", quantity=it + 1, model=f"m{it % 3}") for at, it in enumerate(quantities)]
    trimmed, left = everything[:gone], everything[gone:]
    counts = At(sequence=len(trimmed), events=len(trimmed), quantity=sum(it.quantity for it in trimmed))
    sure = data.draw(st.integers(0, len(left)))
    seen = data.draw(st.integers(sure, len(left)))
    books = Books(events=left, trimmed=counts, sure=len(trimmed) + sure)
    books.lines = lines_of(trimmed + left[:seen])
    assert books.audit().clean
    if books.lines and sure == len(left):
        at = data.draw(st.integers(0, len(books.lines) - 1))
        wrong = data.draw(st.sampled_from([{"events": 1}, {"events": -1}, {"quantity": 1}, {"quantity": -1}]))
        line = books.lines[at]
        books.lines[at] = replace(line, **{name: getattr(line, name) + by for name, by in wrong.items()})
        assert books.audit().faults["unequal"] >= 1


@pytest.mark.parametrize("wrong", [{"events": 1}, {"events": 3}, {"quantity": 2}, {"quantity": 4}])
@pytest.mark.parametrize("trimmed", [0, 1])
def test_a_line_of_other_sums_is_unequal(trimmed: int, wrong: dict[str, Any]) -> None:
    events = [event("1", quantity=1), event("2", quantity=2)]
    gone = [event("gone", quantity=9)] * trimmed
    counts = At(sequence=trimmed, events=trimmed, quantity=9 * trimmed)
    (line,) = lines_of(events + gone)
    wrong = {name: value + {"events": 1, "quantity": 9}[name] * trimmed for name, value in wrong.items()}
    assert Books(events=events, lines=[line], trimmed=counts).audit().clean
    assert Books(events=events, lines=[replace(line, **wrong)], trimmed=counts).audit().faults["unequal"] >= 1


def test_what_one_line_has_too_much_another_cannot_lack() -> None:
    events = [event("1", model="a"), event("2", model="b")]
    gone = event("gone", model="a")
    low, high = lines_of([*events, gone])[1], lines_of([*events, gone, gone])[0]
    lines = [high, replace(low, events=0, quantity=0)]
    assert Books(events=events, lines=lines, trimmed=At(sequence=1, events=1, quantity=7)).audit().faults["unequal"]


def test_a_line_that_is_missing_is_unequal() -> None:
    assert Books(events=plain(2), lines=[]).audit().faults == NONE | {"unequal": 1}


def test_a_line_without_events_is_unequal() -> None:
    lines = lines_of([*plain(2), event("x", model="other")])
    assert Books(events=plain(2), lines=lines).audit().faults == NONE | {"unequal": 1}


def test_a_sink_counts_what_it_acknowledged_without_dead_letters() -> None:
    cursor = At(sequence=3, events=2, quantity=1 + 3)
    report = Books(events=plain(5), cursor=cursor, dead=[2]).audit()
    assert report.clean
    (sink,) = report.sinks
    assert (sink.acknowledged, sink.pending, sink.dead) == (2, 2, 1)


def test_a_dead_letter_beyond_the_cursor_was_written_after_the_cursor_was_read() -> None:
    assert Books(events=plain(5), cursor=At(sequence=3, events=3, quantity=6), dead=[4]).audit().clean


@pytest.mark.parametrize(
    "wrong",
    [
        At(sequence=3, events=2, quantity=6),
        At(sequence=3, events=4, quantity=6),
        At(sequence=3, events=3, quantity=5),
        At(sequence=2, events=3, quantity=6),
    ],
)
def test_a_cursor_that_counts_otherwise_is_unequal(wrong: At) -> None:
    assert Books(events=plain(5), cursor=wrong).audit().faults == NONE | {"unequal": 1}


def test_a_cursor_beyond_the_last_event_is_unequal() -> None:
    report = Books(events=plain(3), cursor=At(sequence=4, events=3, quantity=6)).audit()
    assert report.faults == NONE | {"unequal": 1}


def test_a_sink_may_hold_more_than_it_acknowledged() -> None:
    books = Books(events=plain(5), cursor=At(sequence=3, events=3, quantity=6))
    books.delivered = books.cloud_events()
    assert books.audit().clean


def test_a_sink_must_hold_what_it_acknowledged() -> None:
    books = Books(events=plain(5), cursor=At(sequence=3, events=2, quantity=5), dead=[1])
    books.delivered = books.cloud_events()[2:]
    assert books.audit().faults == NONE | {"lost": 1}


def test_a_sink_may_hold_an_event_twice_if_it_is_the_same() -> None:
    books = Books(events=plain(2), cursor=At(sequence=2, events=2, quantity=3))
    books.delivered = books.cloud_events() * 2
    report = books.audit()
    assert report.clean
    assert report.sinks[0].redelivered == 2


@pytest.mark.parametrize(
    "other",
    [
        {"id": "other"},
        {"subject": "other"},
        {"sequence": "00000000000000000001"},
        {"data": {"quantity": 3, "amount": "1"}},
        {"data": {"quantity": 4, "amount": "0.000000036"}},
        {"source": "/s/99"},
        {"source": None},
        {"sequence": "first"},
        {"data": "nothing"},
    ],
)
def test_a_sink_must_hold_it_as_it_is(other: dict[str, Any]) -> None:
    books = Books(events=plain(3), cursor=At(sequence=2, events=2, quantity=3))
    books.delivered = books.cloud_events()
    books.delivered[2] |= other
    assert books.audit().faults == NONE | {"unequal": 1}


def test_what_a_sink_holds_of_trimmed_events_cannot_be_compared() -> None:
    books = Books(events=plain(2), cursor=At(sequence=3, events=3, quantity=12))
    books.trimmed = At(sequence=1, events=1, quantity=9)
    books.lines = lines_of([*plain(2), event("gone", quantity=9)])
    gone = cloud_event(Recorded(sequence=1, event=event("gone", quantity=1)), "/s")
    books.delivered = [gone, *books.cloud_events()]
    assert books.audit().clean


def test_what_a_sink_never_got_to_see_is_counted_and_no_difference() -> None:
    books = Books(events=plain(2), cursor=At(sequence=4, events=3, quantity=9))  # it began with the second
    books.trimmed = At(sequence=2, events=2, quantity=9 + 6)
    books.lines = lines_of([*plain(2), event("gone", quantity=9), event("gone, too", quantity=6)])
    report = books.audit()
    assert report.clean
    assert report.sinks[0].never_offered == 1


@pytest.mark.parametrize("quantity", [0, 2, 20])
def test_what_a_sink_lacks_may_not_be_more_than_was_trimmed(quantity: int) -> None:
    books = Books(events=[event("1", quantity=40)])
    books.trimmed = At(sequence=1, events=1, quantity=1)
    books.lines = lines_of([*books.events, event("gone", quantity=1)])
    books.cursor = At(sequence=2, events=1, quantity=41 - quantity)
    assert books.audit().faults == NONE | {"unequal": 1}


def test_only_so_many_differences_are_told_and_all_are_counted() -> None:
    records = [record(f"c{at}", f"op{at}") for at in range(SHOWN + 5)]
    report = Books(events=[], records=records).audit()
    assert report.faults["lost"] == SHOWN + 5
    assert len(report.differences) == SHOWN


@given(st.lists(st.lists(st.integers(0, 30), max_size=8), max_size=4))
@settings(max_examples=200, deadline=None)
def test_every_repeated_id_is_found_once_for_each_time_it_repeats(shards: list[list[int]]) -> None:
    places = {}
    for shard, ids in enumerate(shards):
        places[shard] = Place(last=len(ids), trimmed=At(), sure=0, newest=0)
        for sequence, id in enumerate(ids, 1):
            places[shard].add(Recorded(sequence=sequence, event=event(str(id))))
    found = list(repeated(places))
    everything = [id for ids in shards for id in ids]
    assert len(found) == len(everything) - len(set(everything))
    for (shard, sequence), (other, its) in found:
        assert (shard, sequence) != (other, its)
        assert shards[shard][sequence - 1] == shards[other][its - 1]
