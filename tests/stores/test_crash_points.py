"""Every call to the store, on its way from a request: lost before or after it was executed, by an ingress that lives
or dies, and tried again at once or after the lease. Never two bills, never none, and always the first answer.

The service, the books and the desk are the real ones; a wrapper around the store makes the calls fail.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import orjson
import pytest

from serve_app.api import build_app
from serve_app.core.idempotency import Abandon, Begin, Complete, Emit, Outcome, Renew, Step
from serve_app.core.ledger import Kind, Recorded, shard_of
from serve_app.dispatch import Unit, UnitReply
from serve_app.stores import Store, StoreDown
from tests.service.fakes import (
    AUTHORIZATION,
    CARD,
    KEY,
    WORKSPACE,
    DeskClerk,
    FakeModel,
    FakeModels,
    add_workspace,
    answers,
    service_over,
)
from tests.stores.steps import Clock, emit

LEASE_S = 1.2  # renewed every 0.4 s
BODY = {"model": CARD.id, "input": ["one text", "and another one"], "encoding_format": "base64"}
TOKENS = 9


class Wire:
    """A store, for one ingress and its desk, that fails once: at the first step of a kind."""

    def __init__(self, store: Store, kind: type[Step], *, executed: bool, dies: bool) -> None:
        self._store = store
        self._kind = kind
        self._executed = executed
        self._dies = dies
        self.failed = asyncio.Event()
        self.dead = False

    async def run(self, steps: Sequence[Step]) -> list[Outcome]:
        if self.dead:
            await asyncio.Event().wait()  # nothing that a dead process does arrives anywhere
        if not self.failed.is_set() and any(isinstance(step, self._kind) for step in steps):
            if self._executed:
                await self._store.run(steps)
            self.failed.set()
            self.dead = self._dies
            if self._dies:
                await asyncio.Event().wait()
            raise StoreDown("lost")
        return await self._store.run(steps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class World:
    """Ingresses over one store, and what their clients saw."""

    def __init__(self, store: Store, clock: Clock, folder: Path) -> None:
        self.store = store
        self.clock = clock
        self.folder = folder
        self.runs = 0

    def ingress(self, store: Any, *, fails_first: bool = False, slow: bool = False) -> httpx.AsyncClient:
        async def send(unit: Unit) -> UnitReply:
            self.runs += 1
            if slow:
                await asyncio.sleep(0.6)
            if fails_first and self.runs <= 2:  # a unit that fails is tried again once, by itself
                raise RuntimeError("the model failed")
            return await answers(unit)

        service = service_over(
            FakeModels(FakeModel(send=send)),
            store=store,
            clerk=DeskClerk(store, cache_bytes=0),
            blobs=self.folder,
            clock=self.clock,
            lease_s=LEASE_S,
            duplicate_wait_s=0.1,
            patience_s=5.0,
        )
        app = build_app(service, max_body_bytes=1_000_000)
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=AUTHORIZATION)

    async def events(self) -> list[Recorded]:
        return await self.store.events(shard_of(WORKSPACE.id), 0, 100)


async def ask(ingress: httpx.AsyncClient, key: str | None = "a-key") -> httpx.Response:
    headers = {"Idempotency-Key": key} if key else {}
    return await ingress.post("/v1/embeddings", json=BODY, headers=headers)


def is_replay(response: httpx.Response) -> bool:
    return response.headers.get("idempotent-replayed") == "true"


@pytest.fixture
async def world(store: Store, clock: Clock, tmp_path: Path) -> World:
    await add_workspace(store, WORKSPACE, KEY)
    return World(store, clock, tmp_path / "blobs")


KEYED = (Begin, Renew, Complete, Abandon)
CASES = [
    pytest.param(kind, executed, dies, later, id=f"{kind.__name__}-{executed=}-{dies=}-{later=}")
    for kind, executed, dies, later in itertools.product(KEYED, (False, True), (False, True), (False, True))
]


@pytest.mark.parametrize(("kind", "executed", "dies", "later"), CASES)
async def test_whatever_is_lost_the_call_is_answered_and_billed_once(
    world: World, kind: type[Step], executed: bool, dies: bool, later: bool
) -> None:
    wire = Wire(world.store, kind, executed=executed, dies=dies)
    first = world.ingress(wire, fails_first=kind is Abandon, slow=kind is Renew)
    call = asyncio.create_task(ask(first))
    await asyncio.wait_for(wire.failed.wait(), 10)
    if dies:
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    else:
        answer = await call  # its ingress asks the store again, by itself
        assert answer.status_code == (500 if kind is Abandon else 200)
    if later:
        world.clock.tick(int(1000 * LEASE_S) + 1)

    second = first if not dies else world.ingress(world.store)
    retry = await ask(second)
    held = (
        dies and not later and not (kind is Begin and not executed) and not (kind in (Complete, Abandon) and executed)
    )
    if held:  # by a claim whose owner is dead, for as long as its lease lasts
        assert (retry.status_code, retry.json()["error"]["code"]) == (409, "idempotency_in_progress")
        world.clock.tick(int(1000 * LEASE_S) + 1)
        retry = await ask(second)
    assert retry.status_code == 200
    assert is_replay(retry) == ((kind is Complete and executed) or (not dies and kind is not Abandon))

    runs = world.runs
    again = await ask(world.ingress(world.store))
    assert is_replay(again)
    assert again.content == retry.content
    assert world.runs == runs
    (recorded,) = await world.events()
    assert recorded.event.quantity == orjson.loads(retry.content)["usage"]["total_tokens"] == TOKENS
    (record,) = [record async for record in world.store.records()]
    assert (record.op, record.tokens) == (recorded.event.id, TOKENS)


@pytest.mark.parametrize("executed", [False, True])
async def test_a_bill_without_a_key_is_written_once_though_the_first_try_was_lost(world: World, executed: bool) -> None:
    wire = Wire(world.store, Emit, executed=executed, dies=False)
    answer = await ask(world.ingress(wire), key=None)
    assert answer.status_code == 200
    (recorded,) = await world.events()
    assert recorded.event.quantity == TOKENS


async def test_a_zombie_that_finishes_after_a_takeover_is_given_the_first_answer(world: World) -> None:
    computing, late = asyncio.Event(), asyncio.Event()

    async def stalls(unit: Unit) -> UnitReply:
        computing.set()
        await late.wait()
        return await answers(unit)

    class Deaf(DeskClerk):
        """A process that is stopped renews no lease."""

        async def run(self, step: Any) -> Outcome:
            if isinstance(step, Renew):
                raise StoreDown("stopped")
            return await super().run(step)

    service = service_over(
        FakeModels(FakeModel(send=stalls)), store=world.store, clerk=Deaf(world.store), clock=world.clock, lease_s=1.0
    )
    app = build_app(service, max_body_bytes=1_000_000)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test", headers=AUTHORIZATION
    ) as zombie:
        call = asyncio.create_task(ask(zombie))
        await computing.wait()
        world.clock.tick(1_001)
        second = await ask(world.ingress(world.store))
        assert (second.status_code, is_replay(second)) == (200, False)
        late.set()
        first = await call
    assert (first.status_code, first.content) == (200, second.content)
    assert len(await world.events()) == 1


# At a spend cap


class Stale(Wire):
    """Its ingress has not heard that anything was spent: only the store itself stops it."""

    async def spent(self, workspace: str, month: str) -> int:
        return 0


async def cap_of(world: World, micros: int | None) -> None:
    await world.store.put_workspace(replace(WORKSPACE, monthly_cap_micros=micros))


@pytest.mark.parametrize(
    ("kind", "executed", "dies"), list(itertools.product((Begin, Complete, Abandon), (False, True), (False, True)))
)
async def test_whatever_is_lost_past_the_cap_nothing_is_billed_and_the_key_is_free_again(
    world: World, kind: type[Step], executed: bool, dies: bool
) -> None:
    await world.store.run([emit("before", WORKSPACE.id, quantity=1_000_000)])
    await cap_of(world, 1)
    wire = Stale(world.store, kind, executed=executed, dies=dies)
    first = world.ingress(wire)
    call = asyncio.create_task(ask(first))
    if kind is not Abandon:
        await asyncio.wait_for(wire.failed.wait(), 30)
    if dies and kind is not Abandon:
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    else:
        answer = await call
        freed_and_lost = kind is Complete and executed  # the same step again finds no claim
        assert code_of(answer) == ("idempotency_in_progress" if freed_and_lost else "plan_limit_exceeded")

    retry = await ask(world.ingress(world.store))
    if code_of(retry) == "idempotency_in_progress":
        world.clock.tick(int(1000 * LEASE_S) + 1)
        retry = await ask(world.ingress(world.store))
    assert code_of(retry) == "plan_limit_exceeded"
    assert [recorded.event.id for recorded in await world.events()] == ["before"]

    await cap_of(world, None)
    world.clock.tick(int(1000 * LEASE_S) + 1)
    paid = await ask(world.ingress(world.store))
    assert (paid.status_code, is_replay(paid)) == (200, False)
    assert len(await world.events()) == 2


@pytest.mark.parametrize(
    ("kind", "executed", "dies"),
    [*itertools.product((Begin, Complete), (False, True), (False, True)), (Emit, False, False), (Emit, True, False)],
)
async def test_whatever_is_lost_at_the_edge_of_the_cap_the_bill_and_its_warnings_are_there_once(
    world: World, kind: type[Step], executed: bool, dies: bool
) -> None:
    await world.store.run([emit("before", WORKSPACE.id, quantity=118, unit_price="0.008")])  # 0.944 micro-dollars
    await cap_of(world, 1)
    key = None if kind is Emit else "a-key"
    wire = Wire(world.store, kind, executed=executed, dies=dies)
    call = asyncio.create_task(ask(world.ingress(wire), key))
    await asyncio.wait_for(wire.failed.wait(), 30)
    if dies:
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        world.clock.tick(int(1000 * LEASE_S) + 1)
        call = asyncio.create_task(ask(world.ingress(world.store), key))
    assert (await call).status_code == 200
    events = [recorded.event for recorded in await world.events()]
    assert [event.kind for event in events] == [Kind.TOKENS, Kind.TOKENS, Kind.NOTICE, Kind.NOTICE]
    assert [event.details["percent_spent"] for event in events[2:]] == [80, 100]
    assert await world.store.spent(WORKSPACE.id, "2025-11") == (118 + TOKENS) * 8_000
    assert code_of(await ask(world.ingress(world.store), "another-key")) == "plan_limit_exceeded"


def code_of(response: httpx.Response) -> str | None:
    return None if response.status_code == 200 else str(response.json()["error"]["code"])
