"""What is counted of a request, however it ends."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import httpx2 as httpx
import pytest

from serve_app.api import build_app
from serve_app.core.metrics import IngressMetrics, Labels, Metric
from serve_app.dispatch import EXPRESS_TOKENS
from serve_app.stores import Store
from tests.service.fakes import (
    AUTHORIZATION,
    CAPPED_KEY,
    CARD,
    WORKSPACE,
    FakeModel,
    FakeModels,
    add_workspace,
    never_answers,
    service_over,
)

BODY: dict[str, Any] = {"model": CARD.id, "input": "hello"}
TOKENS = 3  # of "hello", with the special ones


def taken(metric: Metric) -> dict[Labels, float]:
    """Of a histogram, how many."""
    name = metric.series[-1].name
    return {labels: value for series, labels, value in metric.take() if series.name == name}


@pytest.fixture
def metrics() -> IngressMetrics:
    return IngressMetrics()


@pytest.fixture
async def http(metrics: IngressMetrics) -> AsyncIterator[httpx.AsyncClient]:
    async with client(metrics, FakeModel()) as http:
        yield http


def client(metrics: IngressMetrics, model: FakeModel, **settings: Any) -> httpx.AsyncClient:
    service = service_over(FakeModels(model), metrics=metrics, **settings)
    app = build_app(service, max_body_bytes=100_000, metrics=metrics)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=AUTHORIZATION)


async def test_a_success_is_counted_with_its_model_tokens_and_times(
    http: httpx.AsyncClient, metrics: IngressMetrics
) -> None:
    await http.post("/v1/embeddings", json=BODY)
    await http.post("/v1/embeddings", json=BODY | {"input": ["word " * 100] * 3})
    assert taken(metrics.requests) == {("/v1/embeddings", CARD.name, "200", "ok"): 2}
    assert taken(metrics.request_seconds) == {("/v1/embeddings", CARD.name): 2}
    assert taken(metrics.tokens) == {("/v1/embeddings", CARD.name): TOKENS + 3 * 102}
    assert EXPRESS_TOKENS > 102, "equal texts are one, so both are short"
    assert taken(metrics.queue_seconds) == taken(metrics.compute_seconds) == {(CARD.name, "express"): 2}
    assert taken(metrics.settle_seconds) == {("bill",): 2}


async def test_lanes_are_told_apart(http: httpx.AsyncClient, metrics: IngressMetrics) -> None:
    await http.post("/v1/embeddings", json=BODY | {"input": ["word " * number for number in range(1, 60)]})
    assert taken(metrics.compute_seconds) == {(CARD.name, "bulk"): 1}


async def test_errors_are_counted_by_their_codes_and_have_no_times(
    http: httpx.AsyncClient, metrics: IngressMetrics
) -> None:
    await http.post("/v1/embeddings", json=BODY | {"model": "no-such-model"})
    await http.post("/v1/embeddings", json=BODY | {"input": ""})
    await http.post("/v1/embeddings", content=b"{", headers={"Content-Type": "application/json"})
    await http.post("/v1/embeddings", json=BODY, headers={"Authorization": "Bearer nonsense"})
    await http.get("/v1/embeddings")
    assert taken(metrics.requests) == {
        ("/v1/embeddings", "", "404", "model_not_found"): 1,
        ("/v1/embeddings", "", "400", "invalid_input"): 1,
        ("/v1/embeddings", "", "400", "invalid_json"): 1,
        ("/v1/embeddings", "", "401", "invalid_api_key"): 1,
        ("/v1/embeddings", "", "405", "method_not_allowed"): 1,
    }
    assert taken(metrics.request_seconds) == taken(metrics.tokens) == taken(metrics.settle_seconds) == {}


async def test_a_path_that_somebody_made_up_makes_no_label(http: httpx.AsyncClient, metrics: IngressMetrics) -> None:
    for path in ("/health", "/v1/models", f"/v1/models/{CARD.id}", "/v1/models/zephyrine", "/zephyrine", "/v2/rerank"):
        await http.get(path)
    routes = {labels[0] for labels in taken(metrics.requests)}
    assert routes == {"/health", "/v1/models", "/v1/models/{id}", "/v1/rerank", "other"}


async def test_a_call_with_a_key_is_counted_by_what_became_of_it(
    http: httpx.AsyncClient, metrics: IngressMetrics
) -> None:
    key = {"Idempotency-Key": "counted-1"}
    for body in (BODY, BODY, BODY | {"input": "another"}):
        await http.post("/v1/embeddings", json=body, headers=key)
    assert taken(metrics.claims) == {("proceed",): 1, ("replay",): 1, ("mismatch",): 1}
    assert taken(metrics.settle_seconds) == {("reply",): 1}
    assert taken(metrics.tokens) == {("/v1/embeddings", CARD.name): TOKENS}, "a replay computes none"
    codes = {labels[3]: count for labels, count in taken(metrics.requests).items()}
    assert codes == {"ok": 2, "idempotency_conflict": 1}


async def test_what_was_refused_for_a_budget_says_for_which(metrics: IngressMetrics, own_store: Store) -> None:
    capped = dataclasses.replace(WORKSPACE, id="ws_capped", monthly_cap_micros=0)
    await add_workspace(own_store, capped, CAPPED_KEY)
    plans = ("pro", "team", "enterprise")
    slow = {"plans": {plan: {"requests_per_minute": 20} for plan in plans}}
    many = {"plans": {plan: {"requests_per_minute": 20_000, "tokens_per_minute": 100} for plan in plans}}
    async with client(metrics, FakeModel(), limits=slow, store=own_store) as http:
        for _ in range(3):
            answer = await http.post("/v1/embeddings", json=BODY)
        assert answer.status_code == 429
    assert taken(metrics.refusals) == {("requests",): 1}
    async with client(metrics, FakeModel(), limits=many, replay_records=0, store=own_store) as http:
        await http.post("/v1/embeddings", json=BODY, headers={"Idempotency-Key": "counted-2"})
        await http.post("/v1/embeddings", json=BODY, headers={"Authorization": f"Bearer {CAPPED_KEY}"})
        for _ in range(2):
            await http.post("/v1/embeddings", json=BODY | {"input": "hello " * 50})
    assert taken(metrics.refusals) == {("tokens",): 1, ("replays",): 1, ("spend",): 1}


async def test_a_client_that_hangs_up_is_counted_as_one(metrics: IngressMetrics) -> None:
    model = FakeModel(send=never_answers)
    async with client(metrics, model) as http:
        call = asyncio.create_task(http.post("/v1/embeddings", json=BODY))
        while not model.units:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    assert taken(metrics.requests) == {("/v1/embeddings", CARD.name, "499", "hung_up"): 1}


async def test_what_breaks_is_counted_as_our_fault(metrics: IngressMetrics) -> None:
    async def breaks(*_: Any) -> Any:
        raise ZeroDivisionError

    async with client(metrics, FakeModel(tokenize=breaks)) as http:
        await http.post("/v1/embeddings", json=BODY)
    assert taken(metrics.requests) == {("/v1/embeddings", CARD.name, "500", "internal_error"): 1}
