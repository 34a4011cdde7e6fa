"""The spans of a request: which there are, what hangs below what, and that nothing of what it held is in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2 as httpx
import pytest

from serve_app import tracing
from serve_app.api import build_app
from serve_app.dispatch import TracedUnit, Unit, UnitReply
from tests.service.fakes import AUTHORIZATION, CARD, KEY, WORKSPACE, FakeModel, FakeModels, answers, service_over
from tests.spans import CLIENT, NOT_SAMPLED, SAMPLED, TRACE, Spans, recorded

BODY: dict[str, Any] = {"model": CARD.id, "input": ["zephyrine", "quixotic"], "user": "mallory"}
SECRETS = ("zephyrine", "quixotic", "mallory", "chosen-key", KEY, "traceparent")


@pytest.fixture
def spans() -> Iterator[Spans]:
    with recorded() as spans:
        yield spans


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
async def http(model: FakeModel) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(service_over(FakeModels(model)), max_body_bytes=100_000)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=AUTHORIZATION) as http:
        yield http


async def test_a_request_with_a_key_is_one_trace_from_admission_to_settlement(
    http: httpx.AsyncClient, spans: Spans
) -> None:
    await http.post("/v1/embeddings", json=BODY, headers=SAMPLED | {"Idempotency-Key": "chosen-key-1"})
    assert {f"{span.context.trace_id:032x}" for span in spans.all()} == {TRACE}
    assert spans.tree() == {
        "client": ["POST /v1/embeddings"],
        "POST /v1/embeddings": ["admit", "claim", "tokenize", "encode", "settle"],
        "claim": ["begin"],
        "begin": ["store"],
        "encode": ["queue", "dispatch"],
        "settle": ["complete"],
        "complete": ["store"],
    }


async def test_one_without_a_key_is_billed_straight_into_the_store(http: httpx.AsyncClient, spans: Spans) -> None:
    await http.post("/v1/embeddings", json=BODY, headers=SAMPLED)
    tree = spans.tree()
    assert tree["POST /v1/embeddings"] == ["admit", "tokenize", "encode", "settle"]
    assert tree["settle"] == ["store"]


async def test_the_first_span_says_what_the_log_says(http: httpx.AsyncClient, spans: Spans) -> None:
    headers = SAMPLED | {"X-Request-Id": "mine"}
    answer = await http.post("/v1/embeddings", json=BODY, headers=headers)
    (root,) = spans.named("POST /v1/embeddings")
    assert dict(root.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/embeddings",
        "http.response.status_code": 200,
        "serve_app.code": "ok",
        "serve_app.request_id": "mine",
        "serve_app.workspace": WORKSPACE.id,
        "serve_app.model": CARD.name,
        "serve_app.inputs": 2,
        "serve_app.tokens": answer.json()["usage"]["total_tokens"],
        "serve_app.replayed": False,
    }
    assert root.kind.name == "SERVER"
    assert root.status.is_ok


async def test_a_replay_is_told_apart_and_encodes_nothing(http: httpx.AsyncClient, spans: Spans) -> None:
    key = {"Idempotency-Key": "chosen-key-2"}
    await http.post("/v1/embeddings", json=BODY, headers=key)
    assert spans.all() == []
    await http.post("/v1/embeddings", json=BODY, headers=SAMPLED | key)
    (root,) = spans.named("POST /v1/embeddings")
    assert (root.attributes or {})["serve_app.replayed"] is True
    assert spans.tree()["POST /v1/embeddings"] == ["admit", "claim"]


async def test_nothing_that_was_sent_or_came_out_is_in_any_span(
    http: httpx.AsyncClient, model: FakeModel, spans: Spans
) -> None:
    async def breaks(unit: Unit) -> UnitReply:
        raise ValueError("zephyrine makes the model stumble")

    for key in ("chosen-key-3", "chosen-key-3", "chosen-key-4"):
        answer = await http.post("/v1/embeddings", json=BODY, headers=SAMPLED | {"Idempotency-Key": key})
        assert answer.status_code == 200
    value = str(answer.json()["data"][0]["embedding"][0])
    model._answer = breaks
    assert (await http.post("/v1/embeddings", json=BODY, headers=SAMPLED)).status_code == 500
    await http.post("/v1/embeddings", json=BODY | {"model": "zephyrine"}, headers=SAMPLED)
    await http.post("/v1/embeddings", json=BODY, headers=SAMPLED | {"Authorization": "Bearer zephyrine"})
    await http.request("ZEPHYRINE", "/zephyrine?q=zephyrine", headers=SAMPLED)
    assert [word for word in (*SECRETS, value) if word.lower() in spans.text().lower()] == []
    assert [span.name for span in spans.all() if span.events] == []
    assert {span.name for span in spans.all() if span.kind.name == "SERVER"} == {"POST /v1/embeddings", "_OTHER other"}


async def test_what_fails_says_so_by_its_kind_alone(http: httpx.AsyncClient, model: FakeModel, spans: Spans) -> None:
    async def breaks(unit: Unit) -> UnitReply:
        raise ValueError("zephyrine")

    model._answer = breaks
    await http.post("/v1/embeddings", json=BODY, headers=SAMPLED)
    failed = {
        span.name: ((span.attributes or {}).get("error.type"), span.status.description)
        for span in spans.all()
        if not span.status.is_ok
    }
    assert failed == {
        "dispatch": ("ValueError", None),
        "encode": ("InternalError", None),
        "POST /v1/embeddings": ("internal_error", None),
    }


async def test_requests_that_share_a_unit_have_a_span_of_it_each(
    http: httpx.AsyncClient, model: FakeModel, spans: Spans
) -> None:
    """Two at the model fill it; what comes meanwhile leaves together."""
    free = asyncio.Event()
    others = [f"00-{n:032x}-{CLIENT}-01" for n in range(1, 4)]
    sent: list[str | None] = [None, *others, None]

    async def held(unit: Unit) -> UnitReply:
        await free.wait()
        return await answers(unit)

    model._answer = held
    calls = [
        asyncio.create_task(http.post("/v1/embeddings", json=BODY, headers={"traceparent": parent} if parent else {}))
        for parent in sent
    ]
    async with asyncio.timeout(20):
        while model.dispatcher.pending_sequences < 2 * len(sent):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        free.set()
        await asyncio.gather(*calls)
    shared = [span for span in spans.named("dispatch") if (span.attributes or {})["serve_app.requests"] == 4]
    assert {f"{span.context.trace_id:032x}" for span in shared} == {f"{n:032x}" for n in range(1, 4)}
    assert len({(span.attributes or {})["serve_app.batch"] for span in shared}) == 1
    alone, together = model.units
    assert type(alone) is Unit
    assert isinstance(together, TracedUnit)
    below = {f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01" for span in shared}
    assert {*together.traces} == below


@pytest.mark.parametrize(
    "headers", [{}, NOT_SAMPLED, {"traceparent": "zephyrine"}, {"traceparent": f"00-{'0' * 32}-{CLIENT}-01"}]
)
async def test_what_is_not_sampled_is_neither_recorded_nor_carried_on(
    headers: dict[str, str], http: httpx.AsyncClient, model: FakeModel, spans: Spans
) -> None:
    await http.post("/v1/embeddings", json=BODY, headers=headers | {"Idempotency-Key": "chosen-key-5"})
    assert spans.all() == []
    assert {type(unit) for unit in model.units} <= {Unit}


async def test_a_trace_begins_here_if_the_ratio_says_so(http: httpx.AsyncClient) -> None:
    with recorded(ratio=1.0) as spans:
        await http.post("/v1/embeddings", json=BODY)
        await http.post("/v1/embeddings", json=BODY, headers=NOT_SAMPLED)
    (root,) = [span for span in spans.all() if span.parent is None]
    assert root.name == "POST /v1/embeddings"


async def test_health_checks_are_not_traced(http: httpx.AsyncClient) -> None:
    with recorded(ratio=1.0) as spans:
        for path in ("/health", "/ready"):
            await http.get(path, headers=SAMPLED)
    assert spans.all() == []


async def test_switched_off_there_is_nothing(http: httpx.AsyncClient, model: FakeModel) -> None:
    with recorded() as spans:
        tracing.switch_on(None)
        answer = await http.post("/v1/embeddings", json=BODY, headers=SAMPLED | {"Idempotency-Key": "chosen-key-6"})
    assert answer.status_code == 200
    assert spans.all() == []
    assert [type(unit) for unit in model.units] == [Unit]
    assert tracing.here() is None
