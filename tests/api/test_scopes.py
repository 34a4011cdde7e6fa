"""What a key is for: endpoints and models outside of its scope are closed to it, and it is told of no other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from starlette.routing import Route

from serve_app.api import ALIASES, OPEN, build_app
from serve_app.core import keys
from serve_app.core.keys import ENDPOINTS, ApiKey, Plan, Workspace
from serve_app.stores import Store, open_store
from tests.service.fakes import RERANKER, FakeModel, FakeModels, card, service_over

KEY = keys.mint(bytes([9] * keys.SECRET_BYTES))
ONE, OTHER = card(), card(id="bge-m3", name="BAAI/bge-m3", fingerprint="ba9876543210")
REQUESTS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "/v1/embeddings": ("POST", {"model": ONE.id, "input": "hello"}),
    "/v1/rerank": ("POST", {"model": RERANKER.id, "query": "hello", "texts": ["hello"]}),
    "/v1/tokenize": ("POST", {"model": ONE.id, "input": "hello"}),
    "/v1/models": ("GET", None),
    "/v1/usage": ("GET", None),
}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(f"sqlite:{tmp_path / 'store.db'}")
    await store.add_workspace(Workspace(id="ws", name="test", plan=Plan.PRO, created_ms=0))
    yield store
    await store.close()


async def client(store: Store, **scope: Any) -> httpx.AsyncClient:
    key = ApiKey(id="key", workspace="ws", name="test", digest=keys.digest(KEY), created_ms=0, **scope)
    await store.put_key(key)
    service = service_over(FakeModels(FakeModel(ONE), FakeModel(OTHER), FakeModel(RERANKER)), store=store)
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(build_app(service, max_body_bytes=100_000)),
        base_url="http://test",
        headers={"Authorization": f"Bearer {KEY}"},
    )


def code(answer: httpx.Response) -> str | None:
    return None if answer.status_code == 200 else answer.json()["error"]["code"]


@pytest.mark.parametrize("allowed", [(), *((endpoint,) for endpoint in ENDPOINTS), ENDPOINTS, None])
async def test_a_key_reaches_its_endpoints_and_no_other(store: Store, allowed: tuple[str, ...] | None) -> None:
    async with await client(store, endpoints=allowed) as http:
        for path, (method, body) in REQUESTS.items():
            answer = await http.request(method, path, json=body)
            assert code(answer) == (None if allowed is None or path in allowed else "endpoint_not_allowed"), path


@pytest.mark.parametrize(("alias", "path"), ALIASES.items())
async def test_an_alias_is_the_route_that_it_stands_for(store: Store, alias: str, path: str) -> None:
    method, body = REQUESTS[path]
    async with await client(store, endpoints=(path,)) as http:
        assert code(await http.request(method, alias, json=body)) is None
    async with await client(store, endpoints=("/v1/models", alias)) as http:
        assert code(await http.request(method, alias, json=body)) == "endpoint_not_allowed"


@pytest.mark.parametrize("path", ["/v1/models/bge-m3", "/v1/models/BAAI/bge-m3"])
async def test_an_endpoint_includes_what_lies_below_it_and_nothing_beside_it(store: Store, path: str) -> None:
    async with await client(store, endpoints=("/v1/models",)) as http:
        assert code(await http.get(path)) is None
        assert code(await http.get("/v1/modelsfoo")) == "endpoint_not_allowed"
        assert code(await http.get("/openapi.json")) == "endpoint_not_allowed"


@pytest.mark.parametrize("allowed", ["bge-m3", "BGE-M3", "BAAI/bge-m3", "baai/BGE-m3"])
async def test_a_key_uses_its_models_by_any_of_their_names_and_no_other(store: Store, allowed: str) -> None:
    async with await client(store, models=(allowed,)) as http:
        for endpoint in ("/v1/embeddings", "/v1/tokenize"):
            for name in (OTHER.id, OTHER.name, OTHER.name.lower()):
                assert code(await http.post(endpoint, json={"model": name, "input": "hello"})) is None
            for name in (ONE.id, ONE.name, ONE.id.upper()):
                refused = await http.post(endpoint, json={"model": name, "input": "hello"})
                assert (refused.status_code, code(refused)) == (403, "model_not_allowed")
                assert refused.json()["error"]["param"] == "model"
        assert [model["id"] for model in (await http.get("/v1/models")).json()["data"]] == [OTHER.id]
        assert code(await http.get(f"/v1/models/{OTHER.id}")) is None
        assert code(await http.get(f"/v1/models/{ONE.id}")) == "model_not_allowed"


async def test_a_model_that_is_not_there_is_not_found_whatever_the_scope(store: Store) -> None:
    async with await client(store, models=("bge-m3",)) as http:
        answer = await http.post("/v1/embeddings", json={"model": "none", "input": "hello"})
    assert code(answer) == "model_not_found"


async def test_a_refused_call_is_not_billed(store: Store) -> None:
    async with await client(store, models=("bge-m3",)) as http:
        await http.post("/v1/embeddings", json={"model": ONE.id, "input": "hello"})
        assert (await http.get("/v1/usage")).json()["data"] == []


def test_every_route_that_takes_a_key_can_be_given_to_one() -> None:
    app: Any = build_app(service_over(FakeModels(FakeModel())), max_body_bytes=1000).app
    paths = {route.path.partition("/{")[0] for route in app.routes if isinstance(route, Route)}
    assert paths - OPEN - {"/openapi.json"} == set(ENDPOINTS)


async def test_a_key_wakes_no_model_that_it_may_not_use(store: Store) -> None:
    key = ApiKey(id="key", workspace="ws", name="test", digest=keys.digest(KEY), created_ms=0, models=(ONE.id,))
    await store.put_key(key)
    models = FakeModels(FakeModel(ONE), FakeModel(OTHER))
    transport = httpx.ASGITransport(build_app(service_over(models, store=store), max_body_bytes=100_000))
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as http:
        for name in (OTHER.id, OTHER.name, f"{OTHER.id}-query"):
            refused = await http.post("/v1/embeddings", json={"model": name, "input": "hello"})
            assert code(refused) == "model_not_allowed"
    assert models.asked == []
