"""A model whose entry keeps vectors: the same answer and the same bill, from fewer forwards."""

from __future__ import annotations

import httpx2 as httpx
import pytest

from serve_app.core.ledger import shard_of
from serve_app.recall import Answered
from serve_app.stores import Store
from tests.service.fakes import (
    CARD,
    WORKSPACE,
    FakeModel,
    card,
)

BODY = {"model": CARD.id, "input": ["the quick", "brown fox", "the quick"], "encoding_format": "base64"}


@pytest.fixture
def model() -> FakeModel:
    return FakeModel(card(cache_bytes=1_000_000))


@pytest.fixture
def own_models(model: FakeModel) -> list[FakeModel]:
    return [model]


async def test_what_is_found_is_answered_counted_and_billed_as_what_is_computed(
    own_client: httpx.AsyncClient, model: FakeModel, own_store: Store
) -> None:
    first, second = [await own_client.post("/v1/embeddings", json=BODY) for _ in range(2)]
    assert first.status_code == second.status_code == 200
    assert first.content == second.content
    assert sum(len(unit.packed.lengths) for unit in model.units) == 2
    assert model.answered == {Answered.ENCODED: 2, Answered.DUPLICATE: 2, Answered.CACHED: 2}
    recorded = await own_store.events(shard_of(WORKSPACE.id), 0, 10)
    assert [it.event.quantity for it in recorded] == [first.json()["usage"]["total_tokens"]] * 2


@pytest.mark.parametrize("directives", ["no-store", "No-Store", "max-age=0, no-store"])
async def test_no_store_is_obeyed(own_client: httpx.AsyncClient, model: FakeModel, directives: str) -> None:
    for headers in ({"Cache-Control": directives}, {}, {"Cache-Control": directives}):
        assert (await own_client.post("/v1/embeddings", json=BODY, headers=headers)).status_code == 200
    assert model.answered == {Answered.ENCODED: 6, Answered.DUPLICATE: 3}


async def test_other_directives_change_nothing(own_client: httpx.AsyncClient, model: FakeModel) -> None:
    for _ in range(2):
        await own_client.post("/v1/embeddings", json=BODY, headers={"Cache-Control": "no-cache, x-no-store-x"})
    assert model.answered[Answered.CACHED] == 2
