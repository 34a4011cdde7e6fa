"""What a caller sees of its budget: headers on every answer, 429 when it is spent, and when to come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from starlette.testclient import TestClient

from serve_app.api import build_app
from serve_app.core import keys
from serve_app.core.keys import ApiKey, Plan, Workspace
from serve_app.stores import Store, open_store
from tests.service.fakes import CARD, FakeModel, FakeModels, now_ms, service_over
from tests.stores.steps import Clock

KEY = keys.mint(bytes([7] * keys.SECRET_BYTES))
SLOW: dict[str, Any] = {"plans": {plan: {"requests_per_minute": 500} for plan in ("pro", "team", "enterprise")}}
BODY = {"model": CARD.id, "input": "hello"}
TOKENS = 3  # of "hello", with the special ones


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[Store]:
    store = await open_store(f"sqlite:{tmp_path / 'store.db'}", clock=clock)
    yield store
    await store.close()


async def client(
    store: Store, clock: Clock | None = None, *, tokens_per_minute: int | None = None
) -> httpx.AsyncClient:
    await store.add_workspace(Workspace(id="ws", name="test", plan=Plan.PRO, created_ms=0))
    key = ApiKey(
        id="key",
        workspace="ws",
        name="test",
        digest=keys.digest(KEY),
        created_ms=0,
        tokens_per_minute=tokens_per_minute,
    )
    await store.put_key(key)
    service = service_over(FakeModels(FakeModel()), store=store, clock=clock or now_ms, limits=SLOW)
    app = build_app(service, max_body_bytes=100_000)
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=headers)


async def embed(http: httpx.AsyncClient, **headers: str) -> httpx.Response:
    return await http.post("/v1/embeddings", json=BODY, headers=headers)


def standing(answer: httpx.Response, suffix: str = "") -> tuple[int, int]:
    names = ("limit", "remaining")
    return tuple(int(answer.headers[f"x-ratelimit-{name}{suffix}"]) for name in names)  # type: ignore[return-value]


async def test_every_answer_tells_how_the_budget_stands(store: Store, clock: Clock) -> None:
    before_s = time.time()
    async with await client(store, clock) as http:
        answer = await embed(http)
    assert answer.status_code == 200
    assert standing(answer) == (500, 49)
    # The key's first request fills the bucket again within 120 ms; the header is in whole seconds, rounded up.
    assert before_s < int(answer.headers["x-ratelimit-reset"]) <= time.time() + 1.2
    assert "x-ratelimit-limit-tokens" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/embeddings", 415),
        ("POST", "/v1/tokenize", 415),
        ("GET", "/v1/usage", 200),
        ("GET", "/v1/nowhere", 404),
        ("DELETE", "/v1/embeddings", 405),
        ("GET", "/openapi.json", 200),
    ],
)
async def test_whatever_a_key_asks_costs_a_request(
    store: Store, clock: Clock, method: str, path: str, status: int
) -> None:
    async with await client(store, clock) as http:
        answer = await http.request(method, path)
    assert (answer.status_code, *standing(answer)) == (status, 500, 49)


@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{CARD.id}", "/v1/models/none"])
async def test_the_models_cost_nothing(store: Store, clock: Clock, path: str) -> None:
    async with await client(store, clock) as http:
        for _ in range(60):
            answer = await http.get(path)
            assert answer.status_code == (404 if path.endswith("none") else 200)
        assert standing(answer) == (500, 50)


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_open_routes_tell_nothing(store: Store, clock: Clock, path: str) -> None:
    async with await client(store, clock) as http:
        answer = await http.get(path)
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


async def test_a_wrong_key_is_told_nothing(store: Store, clock: Clock) -> None:
    async with await client(store, clock) as http:
        answer = await embed(http, Authorization="Bearer none")
    assert answer.status_code == 401
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


async def test_fifty_at_once_pass_and_the_sixtieth_is_refused(store: Store, clock: Clock) -> None:
    async with await client(store, clock) as http:
        answers = [await http.get("/v1/nowhere") for _ in range(50)]
        assert {answer.status_code for answer in answers} == {404}
        refused = [await embed(http) for _ in range(10)]
    assert {answer.status_code for answer in refused} == {429}
    last = refused[-1]
    assert last.json()["error"] == {
        "message": "This key may send 500 requests a minute, 50 of them at once.",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert last.headers["retry-after"] == "2", "ten wait, one every 120 ms"
    assert standing(last) == (500, 0)


async def test_tokens_are_charged_before_inference_and_told_beside_requests(store: Store, clock: Clock) -> None:
    async with await client(store, clock, tokens_per_minute=10 * 2 * TOKENS) as http:
        answers = [await embed(http) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert standing(answers[0], "-tokens") == (60, 3)
    assert standing(answers[1], "-tokens") == (60, 0)
    assert "60 tokens a minute, 6 of them at once" in answers[2].json()["error"]["message"]
    assert int(answers[0].headers["x-ratelimit-reset-tokens"]) >= time.time()
    assert standing(answers[2]) == (500, 48), "a request that is refused for its tokens is given back"


async def test_a_replay_costs_a_request_and_no_tokens(store: Store, clock: Clock) -> None:
    async with await client(store, clock, tokens_per_minute=100_000) as http:
        first = await embed(http, **{"Idempotency-Key": "one"})
        again = await embed(http, **{"Idempotency-Key": "one"})
    assert again.headers["idempotent-replayed"] == "true"
    assert again.content == first.content
    assert standing(first)[1] - standing(again)[1] == 1
    assert standing(again, "-tokens")[1] >= standing(first, "-tokens")[1]


async def test_a_key_that_was_refused_for_its_tokens_is_free_to_be_used_again(store: Store, clock: Clock) -> None:
    async with await client(store, clock, tokens_per_minute=10 * TOKENS) as http:
        assert (await embed(http)).status_code == 200
        assert (await embed(http, **{"Idempotency-Key": "one"})).status_code == 429
        clock.tick(60_000)
        other = await http.post("/v1/embeddings", json=BODY | {"input": "other"}, headers={"Idempotency-Key": "one"})
        assert other.status_code == 200, "and not 409: nothing was stored under it"


def test_the_sdk_gets_everything_through_in_five_retries(tmp_path: Path) -> None:
    """120 calls at once, of which 50 may come at once, on the real clock."""

    async def make() -> Store:
        store = await open_store(f"sqlite:{tmp_path / 'store.db'}")
        async with await client(store):
            return store

    store = asyncio.run(make())
    app = build_app(service_over(FakeModels(FakeModel()), store=store, limits=SLOW), max_body_bytes=100_000)
    with TestClient(app) as http, ThreadPoolExecutor(120) as threads:
        sdk = openai.OpenAI(api_key=KEY, base_url="http://testserver/v1", http_client=http, max_retries=5)
        answers = list(
            threads.map(lambda n: sdk.embeddings.create(model=CARD.id, input=f"text {n}", timeout=60), range(120))
        )
    assert len(answers) == 120
    asyncio.run(store.close())
