"""A monthly spend cap as a caller meets it: 403 once it is reached, at most one request late, and still replays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from serve_app import books
from serve_app.api import build_app
from serve_app.core.keys import Plan, Workspace
from serve_app.core.ledger import Kind, UsageEvent, shard_of
from serve_app.stores import Store, open_store
from tests.service.fakes import CARD, KEY, DeskClerk, FakeModel, FakeModels, add_workspace, service_over
from tests.stores.steps import Clock

CAPPED = Workspace(id="ws_capped", name="capped", plan=Plan.TEAM, created_ms=0, monthly_cap_micros=1)
# At 0.008 US dollars for a million tokens: 0.008 micro-dollars a token, and 50 of these reach one micro-dollar.
TEXT = "a"
TO_THE_CAP = 42  # calls of three tokens
DAY_MS = 24 * 3600 * 1000


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[Store]:
    store = await open_store(f"sqlite:{tmp_path / 'store.db'}", clock=clock)
    await add_workspace(store, CAPPED, KEY)
    yield store
    await store.close()


class Ingress:
    def __init__(self, store: Store, clock: Clock, blobs: Path | None = None) -> None:
        self.model = FakeModel()
        service = service_over(FakeModels(self.model), store=store, clerk=DeskClerk(store), clock=clock, blobs=blobs)
        app = build_app(service, max_body_bytes=100_000)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", headers={"Authorization": f"Bearer {KEY}"}
        )

    async def ask(self, key: str | None = None, input: Any = TEXT) -> httpx.Response:
        headers = {"Idempotency-Key": key} if key else {}
        return await self.http.post("/v1/embeddings", json={"model": CARD.id, "input": input}, headers=headers)


@pytest.fixture
async def ingress(store: Store, clock: Clock) -> AsyncIterator[Ingress]:
    ingress = Ingress(store, clock)
    yield ingress
    await ingress.http.aclose()


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was spent is asked for each time."""
    monkeypatch.setattr(books, "SPENT_S", -1.0)


@pytest.fixture
def sure_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was spent is asked for once."""
    monkeypatch.setattr(books, "SPENT_S", 1e9)


async def events(store: Store) -> list[UsageEvent]:
    return [recorded.event for recorded in await store.events(shard_of(CAPPED.id), 0, 1000)]


async def bills(store: Store) -> list[UsageEvent]:
    return [event for event in await events(store) if event.kind is Kind.TOKENS]


def refused(answer: httpx.Response) -> bool:
    if answer.status_code == 200:
        return False
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "plan_limit_exceeded")
    assert "retry-after" not in answer.headers
    return True


@pytest.mark.parametrize("key", [None, "key-{}"])
async def test_the_call_that_reaches_the_cap_is_the_last(store: Store, ingress: Ingress, key: str | None) -> None:
    answers = [await ingress.ask(key and key.format(at)) for at in range(TO_THE_CAP + 10)]
    assert [refused(answer) for answer in answers] == [False] * TO_THE_CAP + [True] * 10
    billed = await bills(store)
    assert len(billed) == TO_THE_CAP
    assert (
        sum(event.amount for event in billed[:-1]) * 1_000_000 < 1 <= sum(event.amount for event in billed) * 1_000_000
    )


@pytest.mark.usefixtures("forgetful")
async def test_what_is_refused_is_not_computed(store: Store, ingress: Ingress) -> None:
    await ingress.ask(input=[TEXT] * TO_THE_CAP)
    computed = len(ingress.model.units)
    assert refused(await ingress.ask())
    assert refused(await ingress.ask("key"))
    assert len(ingress.model.units) == computed


@pytest.mark.usefixtures("sure_of_itself")
@pytest.mark.parametrize("key", [None, "key-{}"])
async def test_of_32_that_compute_at_the_edge_one_gets_over(
    store: Store, clock: Clock, ingress: Ingress, key: str | None
) -> None:
    """Two ingresses, neither of which has heard of what the other bills."""
    other = Ingress(store, clock)
    await ingress.ask(input=[TEXT] * (TO_THE_CAP - 1))
    answers = await asyncio.gather(
        *((ingress, other)[at % 2].ask(key and key.format(at), input=[TEXT] * TO_THE_CAP) for at in range(32))
    )
    assert sum(not refused(answer) for answer in answers) == 1
    assert len(await bills(store)) == 2
    await other.http.aclose()


@pytest.mark.usefixtures("forgetful")
async def test_a_success_is_replayed_after_the_cap(store: Store, ingress: Ingress) -> None:
    first = await ingress.ask("key", input=[TEXT] * TO_THE_CAP)
    again = await ingress.ask("key", input=[TEXT] * TO_THE_CAP)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.content == first.content
    assert len(await bills(store)) == 1


@pytest.mark.usefixtures("forgetful")
async def test_a_key_that_was_refused_is_free_once_the_cap_is_raised(
    store: Store, clock: Clock, ingress: Ingress
) -> None:
    await ingress.ask(input=[TEXT] * TO_THE_CAP)
    assert refused(await ingress.ask("key"))
    await store.put_workspace(replace(CAPPED, monthly_cap_micros=100))
    raised = Ingress(store, clock)
    answer = await raised.ask("key", input="another text, and no conflict")
    assert not refused(answer)
    assert "idempotent-replayed" not in answer.headers
    await raised.http.aclose()


@pytest.mark.usefixtures("forgetful")
async def test_next_month_it_may_spend_again(ingress: Ingress, clock: Clock) -> None:
    await ingress.ask(input=[TEXT] * TO_THE_CAP)
    assert refused(await ingress.ask())
    clock.tick(5 * DAY_MS)
    assert not refused(await ingress.ask())


async def test_the_workspace_is_told_at_80_and_at_100_per_cent(store: Store, ingress: Ingress) -> None:
    for _ in range(TO_THE_CAP + 5):
        await ingress.ask()
    told = [(at, event) for at, event in enumerate(await events(store)) if event.kind is Kind.NOTICE]
    assert [event.details["percent_spent"] for _, event in told] == [80, 100]
    assert [at for at, _ in told] == [34, TO_THE_CAP + 1], "behind the bill that was due it: 34 x 0.024 is above 0.8"


async def test_notices_are_no_usage(ingress: Ingress) -> None:
    await ingress.ask(input=[TEXT] * TO_THE_CAP)
    report = (await ingress.http.get("/v1/usage")).json()
    assert [(row["kind"], row["requests"]) for row in report["data"]] == [("tokens", 1)]


async def test_tokens_may_be_counted_and_usage_read_past_the_cap(ingress: Ingress) -> None:
    await ingress.ask(input=[TEXT] * TO_THE_CAP)
    assert (await ingress.http.post("/v1/tokenize", json={"model": CARD.id, "input": TEXT})).status_code == 200
    assert (await ingress.http.get("/v1/usage")).status_code == 200


@pytest.mark.usefixtures("forgetful")
async def test_a_success_whose_reply_was_lost_is_answered_after_the_cap(
    store: Store, clock: Clock, tmp_path: Path
) -> None:
    """It was billed when it was computed first, and is not billed again."""
    large, blobs = [TEXT] * 50, tmp_path / "blobs"
    ingress = Ingress(store, clock, blobs)
    first = await ingress.ask("key", input=large)
    (file,) = [path for path in blobs.rglob("*") if path.is_file()]
    file.unlink()
    assert refused(await ingress.ask())
    again = await ingress.ask("key", input=large)
    assert (again.status_code, again.content) == (200, first.content)
    assert len(await bills(store)) == 1
    await ingress.http.aclose()
