"""What every store promises. A new driver is done when it passes this, with its URL among `conftest.url`'s."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from serve_app.core.idempotency import (
    GRACE_MS,
    REPLAY_MS,
    RULES,
    RUNNING_MS,
    Busy,
    Capped,
    Emit,
    Emitted,
    Fenced,
    Freed,
    Holdings,
    Ignored,
    Mismatch,
    Outcome,
    OverQuota,
    Proceed,
    Record,
    Renewed,
    Replay,
    Rule,
    Settled,
    Situation,
    State,
    Step,
    Stored,
    decide,
)
from serve_app.core.keys import ApiKey, Plan, Workspace
from serve_app.core.ledger import SHARDS, Kind, Recorded, UsageEvent, UsageLine, shard_of
from serve_app.core.reservations import Reservation
from serve_app.stores import Cursor, DeadLetter, ShardState, Store, StoreUnfit, open_store
from tests.stores.steps import BODY, LEASE_MS, NOW_MS, Clock, abandon, begin, complete, emit, event, renew

KEPT_MS = REPLAY_MS + GRACE_MS
WS = shard_of("ws")


async def one(store: Store, step: Step) -> Outcome:
    (outcome,) = await store.run([step])
    return outcome


async def records(store: Store) -> dict[str, Record]:
    """By claim; without the bodies, which a store may leave out here."""
    return {record.claim: _without_body(record) async for record in store.records()}


def _without_body(record: Record) -> Record:
    return replace(record, reply=replace(record.reply, body=None)) if record.reply else record


async def all_events(store: Store) -> dict[int, list[Recorded]]:
    return {shard: await store.events(shard, 0, 100_000) for shard in range(SHARDS)}


async def contents(store: Store) -> tuple[object, ...]:
    """All that steps may change."""
    return await records(store), await all_events(store), await store.holdings("ws")


# The table, rule by rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """After `before`, and a while, `step` is answered with `outcome`."""

    sentence: str
    before: Sequence[Step] = ()
    while_ms: int = 0
    step: Any
    outcome: Outcome
    unchanged: bool = False


RUNNING: Sequence[Step] = [begin()]
DONE: Sequence[Step] = [begin(), complete()]
TABLE = [
    Case(
        sentence="a free key over quota is refused",
        step=begin(max_records=0),
        outcome=OverQuota(holdings=Holdings(records=0, bytes=0)),
        unchanged=True,
    ),
    Case(
        sentence="a free key proceeds under the op it brings",
        step=begin(),
        outcome=Proceed(op="op-of-first", attempts=1),
    ),
    Case(sentence="what is free cannot be renewed", step=renew(), outcome=Fenced(), unchanged=True),
    Case(sentence="what is free cannot be completed", step=complete(), outcome=Fenced(), unchanged=True),
    Case(sentence="what is free cannot be abandoned", step=abandon(), outcome=Ignored(), unchanged=True),
    Case(
        sentence="a running key is not for another request",
        before=RUNNING,
        step=begin(attempt="second", fingerprint="other"),
        outcome=Mismatch(),
        unchanged=True,
    ),
    Case(
        sentence="an attempt whose answer was lost proceeds again",
        before=RUNNING,
        while_ms=5,
        step=begin(op="another"),
        outcome=Proceed(op="op-of-first", attempts=1),
    ),
    Case(
        sentence="a lapsed lease is taken over under the same op",
        before=RUNNING,
        while_ms=LEASE_MS,
        step=begin(attempt="second"),
        outcome=Proceed(op="op-of-first", attempts=2),
    ),
    Case(
        sentence="a running key is busy for others",
        before=RUNNING,
        while_ms=LEASE_MS - 1,
        step=begin(attempt="second"),
        outcome=Busy(lease_left_ms=1),
        unchanged=True,
    ),
    Case(sentence="its attempt renews a lease", before=RUNNING, while_ms=5, step=renew(), outcome=Renewed()),
    Case(
        sentence="another attempt does not renew it",
        before=RUNNING,
        step=renew(attempt="second"),
        outcome=Fenced(),
        unchanged=True,
    ),
    Case(
        sentence="its op does not settle it past the cap, and it is free again",
        before=RUNNING,
        step=replace(complete(), cap_micros=0),
        outcome=Capped(),
    ),
    Case(sentence="its op settles it", before=RUNNING, while_ms=5, step=complete(), outcome=Settled()),
    Case(
        sentence="another op does not settle it",
        before=RUNNING,
        step=complete(op="other"),
        outcome=Fenced(),
        unchanged=True,
    ),
    Case(sentence="its attempt frees it", before=RUNNING, step=abandon(), outcome=Freed()),
    Case(
        sentence="another attempt does not free it",
        before=RUNNING,
        step=abandon(attempt="second"),
        outcome=Ignored(),
        unchanged=True,
    ),
    Case(
        sentence="a done key is not for another request",
        before=DONE,
        step=begin(fingerprint="other"),
        outcome=Mismatch(),
        unchanged=True,
    ),
    Case(
        sentence="a done key is replayed",
        before=DONE,
        step=begin(attempt="second"),
        outcome=Replay(reply=Stored(body=BODY), op="op-of-first"),
        unchanged=True,
    ),
    Case(sentence="a done key has no lease to renew", before=DONE, step=renew(), outcome=Ignored(), unchanged=True),
    Case(
        sentence="a second finisher gets the first one's reply",
        before=DONE,
        step=complete(reply=Stored(body=b"another"), tokens=99),
        outcome=Replay(reply=Stored(body=BODY), op="op-of-first"),
        unchanged=True,
    ),
    Case(
        sentence="another op does not touch what is done",
        before=DONE,
        step=complete(op="other"),
        outcome=Fenced(),
        unchanged=True,
    ),
    Case(sentence="what is done cannot be abandoned", before=DONE, step=abandon(), outcome=Ignored(), unchanged=True),
]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.sentence)
async def test_the_table(store: Store, clock: Clock, case: Case) -> None:
    await store.run(case.before)
    clock.tick(case.while_ms)
    before, held = await records(store), await store.holdings("ws")
    untouched = await contents(store)

    assert await one(store, case.step) == case.outcome

    decision = decide(before.get("claim"), case.step, clock(), held)
    expected = {"claim": _without_body(decision.record)} if decision.record else {}
    assert await records(store) == expected
    if case.unchanged:
        assert await contents(store) == untouched


def test_the_table_has_a_sentence_for_every_rule() -> None:
    assert {RULES.index(_rule(case)) for case in TABLE} == set(range(len(RULES)))


def _rule(case: Case) -> Rule:
    record: Record | None = None
    nothing = Holdings(records=0, bytes=0)
    for step in case.before:
        assert not isinstance(step, Emit)
        record = decide(record, step, NOW_MS, nothing).record
    at = Situation(record=record, step=case.step, now_ms=NOW_MS + case.while_ms, holdings=nothing)
    state = record.state if record else State.FREE
    return next(rule for rule in RULES if rule.state is state and isinstance(at.step, rule.step) and rule.when(at))


@pytest.mark.parametrize("seed", range(3))
async def test_a_long_walk_ends_where_the_table_says(store: Store, clock: Clock, seed: int) -> None:
    chance, model = random.Random(seed), Model()
    for _ in range(80):
        clock.tick(chance.choice([0, 0, 1, LEASE_MS, RUNNING_MS // 2, KEPT_MS // 2]))
        batch = [_any_step(chance, model) for _ in range(chance.randint(1, 9))]
        assert await store.run(batch) == [model.apply(step, clock()) for step in batch]

    assert await records(store) == {c: _without_body(r) for c, r in model.records.items() if r.expires_ms > clock()}
    found = await all_events(store)
    assert {shard: [recorded.event for recorded in found[shard]] for shard in found} == model.events()
    for workspace in WORKSPACES:
        assert await store.holdings(workspace) == model.holdings(workspace, clock())
    assert sorted(map(_line, await store.usage(None, "0000", "9999"))) == _sums(model.ledger)


WORKSPACES = ["ws", "ws two", "wß", "w4"]


def _any_step(chance: random.Random, model: Model) -> Step:
    workspace = chance.choice(WORKSPACES)
    claim, attempt = f"{workspace}:{chance.randint(1, 3)}", chance.choice(["a", "b", "c"])
    new_op, blob = chance.randbytes(16).hex(), Stored(blob="b" * 32)
    op = model.records[claim].op if claim in model.records and chance.random() < 0.8 else "other"
    steps: list[Step] = [
        begin(claim, attempt, workspace, op=new_op, max_records=2, fingerprint=chance.choice("xxxy")),
        begin(claim, attempt, workspace, op=new_op, max_bytes=250),
        renew(claim, attempt, workspace),
        complete(claim, op, workspace, reply=chance.choice([None, blob]), size=chance.randint(1, 90)),
        complete(claim, op, workspace, tokens=chance.randint(0, 9)),
        abandon(claim, attempt, workspace),
        emit(f"{workspace}-{chance.randint(1, 40)}", workspace, chance.randint(0, 9), model=chance.choice("mn")),
    ]
    return chance.choice(steps)


@dataclass
class Model:
    """What a store should hold: `decide`, a dict and a list."""

    records: dict[str, Record] = field(default_factory=dict)
    ledger: list[UsageEvent] = field(default_factory=list)

    def apply(self, step: Step, now_ms: int) -> Outcome:
        if isinstance(step, Emit):
            new = step.event.id not in {known.id for known in self.ledger}
            self.ledger += [step.event] if new else []
            return Emitted(new=new)
        decision = decide(self.records.get(step.claim), step, now_ms, self.holdings(step.workspace, now_ms))
        self.records.pop(step.claim, None)
        if decision.record:
            self.records[step.claim] = decision.record
        self.ledger += [decision.event] if decision.event else []
        return decision.outcome

    def holdings(self, workspace: str, now_ms: int) -> Holdings:
        held = [r for r in self.records.values() if r.workspace == workspace and r.expires_ms > now_ms]
        return Holdings(records=len(held), bytes=sum(record.bytes for record in held))

    def events(self) -> dict[int, list[UsageEvent]]:
        return {shard: [known for known in self.ledger if known.shard == shard] for shard in range(SHARDS)}


def _sums(events: Sequence[UsageEvent]) -> list[tuple[Any, ...]]:
    groups: dict[tuple[Any, ...], list[UsageEvent]] = {}
    for e in events:
        groups.setdefault((e.workspace, e.day, e.kind, e.model, e.api_key, e.tier, e.unit_price), []).append(e)
    return sorted((*group, len(found), sum(e.quantity for e in found)) for group, found in groups.items())


def _line(line: UsageLine) -> tuple[Any, ...]:
    price = (line.kind, line.model, line.api_key, line.tier, line.unit_price)
    return (line.workspace, line.day, *price, line.events, line.quantity)


# Steps, beyond the table


async def test_a_batch_of_mixed_steps_is_answered_in_order(store: Store) -> None:
    assert await store.run(
        [
            begin("a", workspace="ws"),
            begin("b", workspace="w2"),
            emit("call", workspace="w3"),
            complete("a", workspace="ws"),
            renew("b", workspace="w2"),
            begin("a", "second", workspace="ws"),
            abandon("b", workspace="w2"),
            begin("b", "second", workspace="w2"),
        ]
    ) == [
        Proceed(op="op-of-first", attempts=1),
        Proceed(op="op-of-first", attempts=1),
        Emitted(new=True),
        Settled(),
        Renewed(),
        Replay(reply=Stored(body=BODY), op="op-of-first"),
        Freed(),
        Proceed(op="op-of-second", attempts=1),
    ]


async def test_no_steps_have_no_outcomes(store: Store) -> None:
    assert await store.run([]) == []


async def test_a_batch_may_be_repeated_whole(store: Store) -> None:
    """As after StoreDown, when nobody knows what was done."""
    batch: list[Step] = [begin("a"), complete("a"), emit("call"), begin("b"), abandon("b")]
    await store.run(batch)
    before = await contents(store)

    await store.run(batch)

    assert await contents(store) == before


async def test_a_reply_comes_back_byte_for_byte(store: Store) -> None:
    body = bytes(range(256)) * 256
    await store.run([begin(), complete(reply=Stored(body=body), size=len(body))])

    assert await one(store, begin(attempt="second")) == Replay(reply=Stored(body=body), op="op-of-first")


async def test_a_reply_may_be_the_name_of_a_blob(store: Store) -> None:
    blob = Stored(blob="ab" * 16 + "-" + "cd" * 16)
    await store.run([begin(), complete(reply=blob)])

    assert await one(store, begin(attempt="second")) == Replay(reply=blob, op="op-of-first")
    assert (await records(store))["claim"].reply == blob


async def test_who_finishes_first_after_a_takeover_settles_it_once(store: Store, clock: Clock) -> None:
    await store.run([begin()])
    clock.tick(LEASE_MS)
    await store.run([begin(attempt="second")])

    slow, fast = await store.run([complete(reply=Stored(body=b"slow")), complete(reply=Stored(body=b"fast"))])

    assert slow == Settled()
    assert fast == Replay(reply=Stored(body=b"slow"), op="op-of-first")
    assert len(await store.events(WS, 0, 10)) == 1


async def test_a_renewed_lease_is_not_taken_over(store: Store, clock: Clock) -> None:
    await store.run([begin()])
    clock.tick(LEASE_MS - 1)
    await store.run([renew()])
    clock.tick(LEASE_MS - 1)

    assert await one(store, begin(attempt="second")) == Busy(lease_left_ms=1)


async def test_a_freed_key_starts_afresh_under_a_new_op(store: Store) -> None:
    await store.run([begin(), abandon()])

    assert await one(store, begin(attempt="second")) == Proceed(op="op-of-second", attempts=1)
    assert await one(store, complete()) == Fenced()
    assert await one(store, complete(op="op-of-second")) == Settled()


async def test_a_reply_is_kept_for_24_hours_and_5_minutes(store: Store, clock: Clock) -> None:
    await store.run([begin(), complete()])
    clock.tick(KEPT_MS - 1)
    assert isinstance(await one(store, begin(attempt="second")), Replay)
    assert len(await records(store)) == 1

    clock.tick(1)

    assert await records(store) == {}
    assert await one(store, complete()) == Fenced()
    assert await one(store, begin(attempt="second")) == Proceed(op="op-of-second", attempts=1)


async def test_a_replay_does_not_lengthen_it(store: Store, clock: Clock) -> None:
    await store.run([begin(), complete()])
    clock.tick(KEPT_MS - 1)
    await store.run([begin(attempt="second"), complete(), renew(), abandon()])
    clock.tick(1)

    assert await one(store, renew()) == Fenced()


async def test_what_nobody_finishes_is_forgotten_after_an_hour(store: Store, clock: Clock) -> None:
    await store.run([begin()])
    clock.tick(RUNNING_MS - 1)
    assert len(await records(store)) == 1
    clock.tick(1)

    assert await one(store, complete()) == Fenced()


@pytest.mark.parametrize(
    "step", [renew(), begin(), begin(attempt="second")], ids=["a renewal", "a lost answer", "a takeover"]
)
async def test_the_hour_starts_again(store: Store, clock: Clock, step: Step) -> None:
    await store.run([begin()])
    clock.tick(RUNNING_MS - 1)
    await store.run([step])
    clock.tick(RUNNING_MS - 1)
    assert len(await records(store)) == 1
    assert await store.holdings("ws") == Holdings(records=1, bytes=100)

    clock.tick(1)

    assert await records(store) == {}
    assert await store.holdings("ws") == Holdings(records=0, bytes=0)


# Quota


async def test_a_quota_counts_records(store: Store) -> None:
    await store.run([begin("a", max_records=2), begin("b", max_records=2)])

    refused = OverQuota(holdings=Holdings(records=2, bytes=200))
    assert await one(store, begin("c", max_records=2)) == refused
    assert "c" not in await records(store)


async def test_a_quota_counts_bytes(store: Store) -> None:
    await store.run([begin("a", reserve_bytes=400, max_bytes=1000), begin("b", reserve_bytes=600, max_bytes=1000)])

    refused = OverQuota(holdings=Holdings(records=2, bytes=1000))
    assert await one(store, begin("c", reserve_bytes=1, max_bytes=1000)) == refused


async def test_a_quota_is_a_workspaces_own(store: Store) -> None:
    await store.run([begin("a", max_records=1)])

    assert isinstance(await one(store, begin("b", workspace="w2", max_records=1)), Proceed)
    assert await store.holdings("w2") == Holdings(records=1, bytes=100)


async def test_what_is_kept_does_not_need_room(store: Store, clock: Clock) -> None:
    await store.run([begin()])
    clock.tick(LEASE_MS)

    assert isinstance(await one(store, begin(attempt="second", max_records=0)), Proceed)
    await store.run([complete()])
    assert isinstance(await one(store, begin(attempt="third", max_records=0)), Replay)


async def test_a_finished_record_counts_its_exact_bytes(store: Store) -> None:
    await store.run([begin(reserve_bytes=100), complete(size=60)])

    assert await store.holdings("ws") == Holdings(records=1, bytes=60)


async def test_an_abandoned_record_gives_its_room_back(store: Store) -> None:
    await store.run([begin("a", max_records=1), abandon("a")])

    assert await store.holdings("ws") == Holdings(records=0, bytes=0)
    assert isinstance(await one(store, begin("b", max_records=1)), Proceed)


@pytest.mark.parametrize(("finished", "kept_ms"), [(False, RUNNING_MS), (True, KEPT_MS)], ids=["running", "done"])
async def test_an_expired_record_gives_its_room_back(store: Store, clock: Clock, finished: bool, kept_ms: int) -> None:
    await store.run([begin("a"), begin("b"), *([complete("a"), complete("b", tokens=1)] if finished else [])])
    clock.tick(kept_ms)

    assert await store.holdings("ws") == Holdings(records=0, bytes=0)
    assert isinstance(await one(store, begin("c", max_records=1, max_bytes=100)), Proceed)
    assert await store.holdings("ws") == Holdings(records=1, bytes=100)


async def test_an_expired_record_does_not_stand_in_its_own_way(store: Store, clock: Clock) -> None:
    await store.run([begin(max_records=1)])
    clock.tick(RUNNING_MS)

    assert await one(store, begin(attempt="second", max_records=1)) == Proceed(op="op-of-second", attempts=1)


async def test_purge_forgets_expired_records_up_to_a_limit(store: Store, clock: Clock) -> None:
    await store.run([begin(f"{workspace}{n}", workspace=workspace) for workspace in ("ws", "w2") for n in range(5)])
    clock.tick(RUNNING_MS)
    await store.run([begin("fresh", workspace="w3")])

    assert [await store.purge(7), await store.purge(7), await store.purge(7)] == [7, 3, 0]
    assert set(await records(store)) == {"fresh"}


# The ledger


async def test_settling_puts_the_event_into_the_ledger(store: Store) -> None:
    await store.run([begin(), complete(tokens=11)])

    assert await store.events(WS, 0, 10) == [Recorded(sequence=1, event=event("op-of-first", quantity=11))]
    assert (await records(store))["claim"].tokens == 11


async def test_a_step_that_is_refused_leaves_no_event(store: Store) -> None:
    await store.run([begin(), complete(op="other"), complete("nobody")])

    assert await store.events(WS, 0, 10) == []
    assert await store.usage(None, "0000", "9999") == []


async def test_emitting_twice_is_emitting_once(store: Store) -> None:
    assert await one(store, emit("call")) == Emitted(new=True)
    assert await store.run([emit("call"), emit("call")]) == [Emitted(new=False), Emitted(new=False)]

    assert await store.events(WS, 0, 10) == [Recorded(sequence=1, event=event("call"))]


async def test_sequences_have_no_gaps_when_many_write_at_once(store: Store, url: str, clock: Clock) -> None:
    other = await open_store(url, clock=clock)
    names = [f"{task}-{n}" for task in range(8) for n in range(10)]
    await asyncio.gather(
        *(
            (store, other)[at % 2].run(
                [begin(name), emit(name), complete(name, tokens=at), emit(name, workspace="w2"), complete(name)]
            )
            for at, name in enumerate(names)
        )
    )
    await other.close()

    found = await all_events(store)
    for shard in range(SHARDS):
        assert [recorded.sequence for recorded in found[shard]] == list(range(1, len(found[shard]) + 1))
        assert (await store.shard_state(shard)).last == len(found[shard])
    billed = [recorded.event for shard in found.values() for recorded in shard]
    assert sorted(map(_line, await store.usage(None, "0000", "9999"))) == _sums(billed)


async def test_events_are_read_from_where_one_stopped(store: Store) -> None:
    await store.run([emit(f"call-{n}") for n in range(1, 6)])

    assert [r.sequence for r in await store.events(WS, 0, 2)] == [1, 2]
    assert [r.sequence for r in await store.events(WS, 2, 10)] == [3, 4, 5]
    assert await store.events(WS, 5, 10) == []


async def test_events_lie_in_the_shard_of_their_workspace(store: Store) -> None:
    names = [f"w{n}" for n in range(30)]
    await store.run([emit(f"call-{name}", workspace=name) for name in names])

    found = await all_events(store)
    assert {r.event.workspace: shard for shard in found for r in found[shard]} == {n: shard_of(n) for n in names}
    assert all(found.values())


async def test_usage_is_added_up_by_day_model_key_and_price(store: Store) -> None:
    day_ms = 24 * 3600 * 1000
    await store.run(
        [
            emit("1", quantity=1),
            emit("2", quantity=2),
            emit("3", quantity=4, model="large-model"),
            emit("4", quantity=8, api_key="key-2"),
            emit("5", quantity=16, unit_price="0.0072", tier="active"),
            emit("6", quantity=32, kind=Kind.GPU_TIME),
            emit("7", quantity=64, time_ms=NOW_MS + day_ms),
            emit("8", quantity=128, time_ms=NOW_MS - 1),
            emit("9", quantity=256, workspace="w2"),
        ]
    )

    def quantities(lines: Sequence[UsageLine]) -> list[tuple[int, int]]:
        return sorted((line.events, line.quantity) for line in lines)

    assert quantities(await store.usage("ws", "2025-11-26", "2025-11-26")) == [(1, 4), (1, 8), (1, 16), (1, 32), (2, 3)]
    assert quantities(await store.usage("ws", "2025-11-25", "2025-11-25")) == [(1, 128)]
    assert quantities(await store.usage("ws", "2025-11-27", "2025-12-31")) == [(1, 64)]
    assert quantities(await store.usage("w2", "2025-11-01", "2025-11-30")) == [(1, 256)]
    assert await store.usage("w", "0000", "9999") == []
    assert sum(line.quantity for line in await store.usage(None, "2025-11-25", "2025-11-27")) == 511


async def test_trimming_removes_the_oldest_and_counts_them(store: Store) -> None:
    await store.run([emit(f"call-{n}", quantity=n) for n in range(1, 6)])
    usage = await store.usage("ws", "0000", "9999")

    await store.trim(WS, 2)
    assert await store.shard_state(WS) == ShardState(last=5, trimmed=Cursor(sequence=2, events=2, quantity=3))
    await store.trim(WS, 1)
    await store.trim(WS, 5)
    assert await store.shard_state(WS) == ShardState(last=5, trimmed=Cursor(sequence=5, events=5, quantity=15))

    assert await store.events(WS, 0, 10) == []
    assert await store.usage("ws", "0000", "9999") == usage
    await store.run([emit("call-6")])
    assert [r.sequence for r in await store.events(WS, 0, 10)] == [6]


async def test_an_empty_shard_is_at_its_beginning(store: Store) -> None:
    await store.trim(WS, 10)

    assert await store.shard_state(WS) == ShardState()


# Workspaces and keys

ACME = Workspace(id="ws", name="Acmé", plan=Plan.TEAM, created_ms=NOW_MS)
KEY = ApiKey(id="key-1", workspace="ws", name="ci", digest="d1", created_ms=NOW_MS)


async def test_workspaces_are_listed_oldest_first(store: Store) -> None:
    older = replace(ACME, id="w2", created_ms=NOW_MS - 1)

    assert await store.add_workspace(ACME)
    assert await store.add_workspace(older)
    assert not await store.add_workspace(replace(ACME, name="another"))
    assert await store.workspaces() == [older, ACME]


async def test_only_one_of_many_makes_the_first_workspace(store: Store, url: str, clock: Clock) -> None:
    other = await open_store(url, clock=clock)
    added = await asyncio.gather(
        *((store, other)[n % 2].add_workspace(replace(ACME, id=f"w{n}"), only_if_first=True) for n in range(10))
    )
    await other.close()

    assert sorted(added) == [False] * 9 + [True]
    assert len(await store.workspaces()) == 1


async def test_a_key_is_found_by_its_digest(store: Store) -> None:
    await store.add_workspace(ACME)
    await store.put_key(KEY)

    assert await store.find_key("d1") == (KEY, ACME)
    assert await store.find_key("d2") is None


async def test_a_key_without_a_workspace_is_none(store: Store) -> None:
    await store.put_key(KEY)

    assert await store.find_key("d1") is None


async def test_a_key_is_replaced_by_its_digest(store: Store) -> None:
    await store.add_workspace(ACME)
    await store.put_key(KEY)
    revoked = replace(KEY, revoked_ms=NOW_MS, expires_ms=NOW_MS + 1)
    await store.put_key(revoked)

    assert await store.find_key("d1") == (revoked, ACME)
    assert await store.keys("ws") == [revoked]


async def test_keys_are_listed_oldest_first_by_workspace(store: Store) -> None:
    older = replace(KEY, id="key-2", digest="d2", created_ms=NOW_MS - 1)
    for key in (KEY, older, replace(KEY, id="key-3", digest="d3", workspace="w2")):
        await store.put_key(key)

    assert await store.keys("ws") == [older, KEY]
    assert await store.keys("w3") == []


# Sinks


NOWHERE = Cursor()


async def test_a_cursor_moves_from_where_it_stands_only(store: Store) -> None:
    assert await store.cursor("sink", 3) == Cursor()
    there = Cursor(sequence=10, events=9, quantity=90)
    await store.advance("sink", 3, NOWHERE, there)
    await store.advance("sink", 3, NOWHERE, Cursor(sequence=4, events=4, quantity=40))
    await store.advance("sink", 3, NOWHERE, Cursor(sequence=12, events=12, quantity=120))
    await store.advance("sink", 3, Cursor(sequence=12), Cursor(sequence=13, events=1, quantity=10))

    assert await store.cursor("sink", 3) == there
    assert await store.cursor("sink", 4) == Cursor()
    assert await store.cursor("other", 3) == Cursor()


async def test_a_letter_that_is_buried_during_a_delivery_is_counted_with_it(store: Store) -> None:
    before = Cursor(sequence=10, events=8, quantity=80)
    await store.advance("sink", 3, NOWHERE, before, [letter(9), letter(10)])
    await store.bury("sink", 3, 9)
    await store.advance("sink", 3, before, Cursor(sequence=12, events=10, quantity=100))

    assert await store.cursor("sink", 3) == Cursor(sequence=12, events=11, quantity=109)


def letter(sequence: int, shard: int = 3) -> DeadLetter:
    recorded = Recorded(sequence=sequence, event=event(f"call-{sequence}", quantity=sequence))
    return DeadLetter(shard=shard, recorded=recorded, reason="refüsed:\ntwo lines")


async def test_dead_letters_are_kept_with_the_cursor(store: Store) -> None:
    await store.advance("sink", 3, NOWHERE, Cursor(sequence=10, events=8, quantity=80), [letter(10), letter(9)])
    await store.advance("sink", 1, NOWHERE, Cursor(sequence=1), [letter(1, shard=1)])

    assert await store.dead_letters("sink") == [letter(1, shard=1), letter(9), letter(10)]
    assert await store.dead_letters("other") == []


async def test_a_cursor_that_does_not_move_brings_no_dead_letters(store: Store) -> None:
    await store.advance("sink", 3, NOWHERE, Cursor(sequence=10))
    await store.advance("sink", 3, NOWHERE, Cursor(sequence=9), [letter(9)])

    assert await store.dead_letters("sink") == []


async def test_a_buried_letter_is_acknowledged_once(store: Store) -> None:
    await store.advance("sink", 3, NOWHERE, Cursor(sequence=10, events=8, quantity=80), [letter(9), letter(10)])

    for _ in range(2):
        await store.bury("sink", 3, 9)
    await store.bury("sink", 3, 7)

    assert await store.dead_letters("sink") == [letter(10)]
    assert await store.cursor("sink", 3) == Cursor(sequence=10, events=9, quantity=89)


# Reserved GPUs

HOURS = Reservation(
    id="res-1",
    workspace="ws",
    model="small-model",
    size_class="small",
    milli_gpus=500,
    started_ms=NOW_MS,
    seen_ms=NOW_MS,
)


async def test_a_reservation_is_there_until_it_is_settled(store: Store) -> None:
    other = replace(HOURS, id="res-2", workspace="w2")
    for reservation in (other, HOURS):
        await store.put_reservation(reservation)
    assert await store.reservations() == [HOURS, other]

    await store.put_reservation(stopped := replace(HOURS, stopped_ms=NOW_MS + 5, seen_ms=NOW_MS + 5))
    assert await store.reservations() == [stopped, other]
    await store.put_reservation(replace(stopped, billed_ms=NOW_MS + 5))

    assert await store.reservations() == [other]


async def test_a_reserved_hour_is_billed_once(store: Store) -> None:
    hours = [event(f"hour-{n}", quantity=500, kind=Kind.GPU_TIME) for n in range(3)]
    await store.put_reservation(replace(HOURS, billed_ms=2), hours[:2])
    await store.put_reservation(replace(HOURS, billed_ms=3), hours[1:])

    assert [recorded.event for recorded in await store.events(WS, 0, 10)] == hours
    assert await store.reservations() == [replace(HOURS, billed_ms=3)]
    assert [line.quantity for line in await store.usage("ws", "0000", "9999")] == [1500]


# One truth, however many look at it


async def everything(store: Store) -> list[object]:
    return [
        await contents(store),
        await store.usage(None, "0000", "9999"),
        [await store.shard_state(shard) for shard in range(SHARDS)],
        [await store.cursor("sink", shard) for shard in range(SHARDS)],
        await store.dead_letters("sink"),
        await store.reservations(),
        await store.workspaces(),
        await store.keys("ws"),
    ]


async def fill(store: Store) -> None:
    await store.run([begin("a"), begin("b"), complete("a"), *(emit(f"call-{n}") for n in range(5))])
    await store.trim(WS, 2)
    await store.advance("sink", WS, NOWHERE, Cursor(sequence=3, events=2, quantity=14), [letter(3, shard=WS)])
    await store.put_reservation(HOURS, [event("hour", kind=Kind.GPU_TIME)])
    await store.add_workspace(ACME)
    await store.put_key(KEY)


async def test_two_stores_see_each_other(store: Store, url: str, clock: Clock) -> None:
    await fill(store)
    other = await open_store(url, clock=clock)

    assert await everything(other) == await everything(store)
    assert isinstance(await one(other, begin("b", "second")), Busy)
    assert await one(other, complete("b", tokens=1)) == Settled()
    assert isinstance(await one(store, begin("b", "third")), Replay)
    await other.close()


async def test_everything_is_there_when_it_is_opened_again(url: str, clock: Clock) -> None:
    store = await open_store(url, clock=clock)
    await fill(store)
    before = await everything(store)
    await store.close()

    store = await open_store(url, clock=clock)
    assert await everything(store) == before
    await store.close()


async def test_without_a_clock_it_uses_its_own(url: str) -> None:
    store = await open_store(url)
    await store.run([begin(), complete()])

    assert isinstance(await one(store, begin(attempt="second")), Replay)
    assert await store.holdings("ws") == Holdings(records=1, bytes=60)
    assert len(await records(store)) == 1
    assert await store.purge(10) == 0
    await store.close()


async def test_a_url_of_no_store_is_refused() -> None:
    with pytest.raises(StoreUnfit):
        await open_store("postgres://nowhere")
