"""Headers on every response, what a browser may do, and what of a caller's headers goes any further."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx2 as httpx
import pytest
from starlette.types import Message

from serve_app.api import CORS_RESPONSE_HEADERS, build_app
from tests.service.fakes import AUTHORIZATION, CARD, FakeModel, FakeModels, never_answers, service_over
from tests.service.test_idempotency import Served, served

__all__ = ["served"]

PAGE = "https://app.example.com"
HELLO = {"model": CARD.id, "input": "hello"}


def http_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=AUTHORIZATION)


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """Of a service that no web page may call."""
    async with http_of(build_app(service_over(FakeModels(FakeModel())), max_body_bytes=10_000)) as client:
        yield client


@pytest.fixture
async def from_page() -> AsyncIterator[httpx.AsyncClient]:
    """Of one that a page may call; the client is such a page, without a key yet."""
    app = build_app(service_over(FakeModels(FakeModel())), max_body_bytes=10_000, cors_origins=[PAGE])
    async with http_of(app) as client:
        client.headers = httpx.Headers({"Origin": PAGE})
        yield client


async def cannot_tokenize(texts: Any) -> Any:
    raise ValueError("broken")


def check_security_headers(response: httpx.Response) -> None:
    assert response.headers.get_list("x-content-type-options") == ["nosniff"]
    assert response.headers.get_list("cache-control") == ["no-store"]
    assert response.headers.get_list("content-security-policy") == ["default-src 'none'; frame-ancestors 'none'"]
    assert response.headers.get_list("referrer-policy") == ["no-referrer"]
    assert "server" not in response.headers
    assert "x-powered-by" not in response.headers


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/health", {}, 200),
        ("GET", "/ready", {}, 200),
        ("GET", "/v1/models", {}, 200),
        ("GET", "/openapi.json", {}, 200),
        ("POST", "/v1/embeddings", {}, 200),
        ("POST", "/v1/embeddings", {"Content-Type": "text/plain"}, 415),
        ("POST", "/v1/embeddings", {"Content-Length": "99999"}, 413),
        ("GET", "/v1/embeddings", {}, 405),
        ("GET", "/nothing", {}, 404),
        ("GET", "/nothing", {"Authorization": ""}, 401),
        ("OPTIONS", "/v1/models", {"Authorization": ""}, 401),
    ],
)
async def test_every_response_has_the_security_headers(
    http: httpx.AsyncClient, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    response = await http.request(method, path, json=HELLO, headers=headers)
    assert response.status_code == status
    check_security_headers(response)


@pytest.mark.parametrize(
    ("model", "settings", "status"),
    [
        (FakeModel(tokenize=cannot_tokenize), {}, 500),
        (FakeModel(send=never_answers), {"request_timeout_s": 0.05}, 504),
    ],
)
async def test_responses_of_a_service_that_fails_have_them_too(
    model: FakeModel, settings: dict[str, Any], status: int
) -> None:
    async with http_of(build_app(service_over(FakeModels(model), **settings), max_body_bytes=10_000)) as http:
        response = await http.post("/v1/embeddings", json=HELLO)
    assert response.status_code == status
    check_security_headers(response)


# Browsers


def asks_for(method: str = "POST", headers: str = "authorization,content-type") -> dict[str, str]:
    return {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}


async def test_no_page_may_call_unless_it_is_named(http: httpx.AsyncClient) -> None:
    answers = [
        await http.options("/v1/embeddings", headers={"Origin": PAGE} | asks_for()),
        await http.post("/v1/embeddings", json=HELLO, headers={"Origin": PAGE}),
        await http.get("/health", headers={"Origin": PAGE}),
    ]
    assert [answer.status_code for answer in answers] == [405, 200, 200]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]


async def test_a_named_page_asks_whether_it_may_without_a_key(from_page: httpx.AsyncClient) -> None:
    sends = "authorization,cache-control,content-type,idempotency-key,x-request-id"
    response = await from_page.options("/v1/embeddings", headers=asks_for(headers=sends))
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert response.headers["access-control-allow-methods"] == "GET, POST"
    assert "access-control-allow-credentials" not in response.headers
    assert len(response.headers.get_list("x-request-id")) == 1
    check_security_headers(response)


@pytest.mark.parametrize("refused", [asks_for("DELETE"), asks_for(headers="x-other")])
async def test_it_may_do_no_more_than_the_api_has(from_page: httpx.AsyncClient, refused: dict[str, str]) -> None:
    assert (await from_page.options("/v1/embeddings", headers=refused)).status_code == 400


async def test_it_reads_answers_errors_and_headers_but_needs_a_key(from_page: httpx.AsyncClient) -> None:
    good = await from_page.post("/v1/embeddings", json=HELLO, headers=AUTHORIZATION)
    bad = await from_page.post("/v1/embeddings", json={}, headers=AUTHORIZATION)
    without_key = await from_page.post("/v1/embeddings", json=HELLO)
    assert [answer.status_code for answer in (good, bad, without_key)] == [200, 400, 401]
    for answer in (good, bad, without_key):
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["vary"] == "Origin"
        assert answer.headers["access-control-expose-headers"] == ", ".join(CORS_RESPONSE_HEADERS)
        check_security_headers(answer)
    assert {name for name in good.headers if name.startswith("x-")} <= {
        *(name.lower() for name in CORS_RESPONSE_HEADERS),
        "x-content-type-options",
    }


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "https://app.example.com.evil.example", "http://app.example.com", ""]
)
async def test_no_other_page_is_told_anything(from_page: httpx.AsyncClient, origin: str) -> None:
    answers = [
        await from_page.options("/v1/embeddings", headers={"Origin": origin} | asks_for()),
        await from_page.post("/v1/embeddings", json=HELLO, headers={"Origin": origin}),
    ]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/nothing", "/openapi.json"])
@pytest.mark.parametrize("method", ["OPTIONS", "GET", "POST", "HEAD"])
async def test_naming_a_page_opens_nothing_but_its_question(
    from_page: httpx.AsyncClient, method: str, path: str
) -> None:
    assert (await from_page.request(method, path)).status_code == 401


async def test_a_web_socket_is_closed_before_it_is_open() -> None:
    app = build_app(service_over(FakeModels(FakeModel())), max_body_bytes=10_000)
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "websocket", "path": "/v1/embeddings", "headers": []}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


# Request ids


@pytest.mark.parametrize("given", ["a", "req-1", "A.b_c-9", "0" * 128])
async def test_a_callers_request_id_is_taken(http: httpx.AsyncClient, given: str) -> None:
    for path in ("/health", "/nothing"):
        response = await http.get(path, headers={"X-Request-Id": given})
        assert response.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize(
    "given",
    ["", " ", "two words", "0" * 129, "x" * 5000, "a\nb", "a\r\nSet-Cookie: x", "a\0", "{}", "%s", "../x", "ü", "a\t"],
)
async def test_what_is_no_request_id_is_replaced(served: Served, given: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    served.model.fails = 2  # a unit that fails is tried again once
    ingress = served.ingress()
    raw = [(b"X-Request-Id", given.encode()), *ingress.headers.raw]
    answers = [await ingress.post("/v1/embeddings", json=HELLO, headers=raw) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [500, 200]
    for answer in answers:
        (ours,) = answer.headers.get_list("x-request-id")
        assert len(ours) == 32
        assert ours.isalnum()
    (event,) = await served.events()
    assert event.details["request_id"] == answers[1].headers["x-request-id"]


async def test_an_idempotency_key_goes_into_no_header(served: Served) -> None:
    for _ in range(2):
        answer = await served.ingress().post("/v1/embeddings", json=HELLO, headers={"Idempotency-Key": "order-4711"})
        assert "4711" not in str(answer.headers.multi_items())
