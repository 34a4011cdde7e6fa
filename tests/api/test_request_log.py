"""The line that each request has in the log: what it says, and of which requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2 as httpx
import pytest

from serve_app.api import build_app
from serve_app.core.settings import LogLevel
from tests.service.fakes import AUTHORIZATION, CARD, WORKSPACE, FakeModel, FakeModels, service_over

BODY: dict[str, Any] = {"model": CARD.id, "input": ["hello", "there"]}
TIMES = ("tokenize_ms", "queue_ms", "compute_ms", "settle_ms", "total_ms")
Lines = list[Mapping[str, Any]]


def client(lines: Lines, log_from: LogLevel = "info") -> httpx.AsyncClient:
    service = service_over(FakeModels(FakeModel()))
    app = build_app(service, max_body_bytes=100_000, log=lines.append, log_from=log_from)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=AUTHORIZATION)


@pytest.fixture
def lines() -> Lines:
    return []


@pytest.fixture
async def http(lines: Lines) -> AsyncIterator[httpx.AsyncClient]:
    async with client(lines) as http:
        yield http


async def test_a_success_tells_whose_it_was_and_where_the_time_went(http: httpx.AsyncClient, lines: Lines) -> None:
    answer = await http.post("/v1/embeddings", json=BODY)
    (line,) = lines
    assert line["request_id"] == answer.headers["x-request-id"]
    assert (line["levelname"], line["status"], line["code"]) == ("INFO", 200, "ok")
    assert (line["route"], line["model"]) == ("/v1/embeddings", CARD.name)
    assert (line["workspace"], line["key"]) == (WORKSPACE.id, f"key_of_{WORKSPACE.id}")
    assert (line["inputs"], line["tokens"]) == (2, answer.json()["usage"]["total_tokens"])
    assert line["total_ms"] >= sum(line[name] for name in TIMES[:-1]) - 0.05
    assert line["replay_of"] is None


async def test_an_error_tells_its_code_and_a_replay_whose_it_is(http: httpx.AsyncClient, lines: Lines) -> None:
    key = {"Idempotency-Key": "logged"}
    first, _ = [await http.post("/v1/embeddings", json=BODY, headers=key) for _ in range(2)]
    await http.post("/v1/embeddings", json=BODY | {"input": 7})
    await http.post("/v1/embeddings", json=BODY, headers={"Authorization": "Bearer nobody"})
    _, replay, refused, stranger = lines
    assert replay["replay_of"] == first.headers["x-request-id"]
    assert replay["tokens"] is replay["compute_ms"] is None
    assert (refused["levelname"], refused["status"], refused["code"]) == ("WARNING", 400, "invalid_input")
    assert (stranger["code"], stranger["workspace"], stranger["key"]) == ("invalid_api_key", None, None)


async def test_health_checks_and_paths_stay_out_of_it(http: httpx.AsyncClient, lines: Lines) -> None:
    for path in ("/health", "/ready", "/zephyrine?zephyrine=1", "/v1/models/zephyrine"):
        await http.get(path)
    assert [line["route"] for line in lines] == ["other", "/v1/models/{id}"]
    assert "zephyrine" not in str(lines)


@pytest.mark.parametrize(
    ("level", "logged"), [("info", [200, 400, 500]), ("warning", [400, 500]), ("error", [500]), ("off", [])]
)
async def test_a_level_leaves_out_what_is_below(
    level: LogLevel, logged: list[int], lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client(lines, level) as http:
        await http.post("/v1/embeddings", json=BODY)
        await http.post("/v1/embeddings", json={})
        monkeypatch.setattr("serve_app.service.Service.list_models", None)
        await http.get("/v1/models")
    assert [line["status"] for line in lines] == logged
