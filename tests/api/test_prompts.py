"""Prompts: asked for by a field or by the model's name, part of the text from then on, and otherwise not there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx2 as httpx
import pytest

from serve_app.api import build_app
from serve_app.core.prompts import Prompts
from tests.service.fakes import AUTHORIZATION, CARD, FakeModel, FakeModels, bundled_tokenizer, card, service_over

PROMPTS = Prompts(query="search for this: ", document="a passage: ")
ASYMMETRIC = card(id="one-sided", name="tests/one-sided", prompts=Prompts(query="search for this: "))
PROMPTED = card(id="prompted", name="tests/prompted", prompts=PROMPTS)
OF_ITS_OWN = card(id="odd-query", name="tests/odd-query")
TEXT = "the quick brown fox"
EMBEDDINGS, TOKENIZE = "/v1/embeddings", "/v1/tokenize"


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    models = FakeModels(*(FakeModel(it) for it in (CARD, PROMPTED, ASYMMETRIC, OF_ITS_OWN)), loading={"late": 3.0})
    app = build_app(service_over(models), max_body_bytes=100_000)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=AUTHORIZATION) as client:
        yield client


async def embedded(client: httpx.AsyncClient, text: str = TEXT, **fields: Any) -> tuple[str, int, dict[str, str]]:
    """The vector, what was counted, and the headers that tell of a replay."""
    headers = {"Idempotency-Key": fields.pop("key")} if "key" in fields else {}
    body = {"model": "prompted", "input": text, "encoding_format": "base64", **fields}
    reply = await client.post(EMBEDDINGS, json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    assert answer["model"] in ("tests/prompted", "tests/one-sided")
    return answer["data"][0]["embedding"], answer["usage"]["total_tokens"], dict(reply.headers)


def count(text: str) -> int:
    return int(bundled_tokenizer()([text]).packed.tokens)


async def test_nothing_is_added_unless_it_is_asked_for(client: httpx.AsyncClient) -> None:
    vector, tokens, _ = await embedded(client)
    assert tokens == count(TEXT)
    assert (await embedded(client, input_type=None))[:2] == (vector, tokens)


@pytest.mark.parametrize(
    "asked",
    [
        {"input_type": "query"},
        {"model": "prompted-query"},
        {"model": "tests/Prompted-QUERY"},
        {"model": "prompted-query", "input_type": "query"},
    ],
)
async def test_a_query_is_what_its_prompt_and_it_are_together(client: httpx.AsyncClient, asked: dict[str, str]) -> None:
    together = await embedded(client, f"search for this: {TEXT}")
    assert (await embedded(client, **asked))[:2] == together[:2]
    assert together[1] == count(f"search for this: {TEXT}") > count(TEXT)


@pytest.mark.parametrize("asked", [{"input_type": "document"}, {"model": "prompted-passage"}])
async def test_a_document_is_what_its_prompt_and_it_are_together(
    client: httpx.AsyncClient, asked: dict[str, str]
) -> None:
    assert (await embedded(client, **asked))[:2] == (await embedded(client, f"a passage: {TEXT}"))[:2]


async def test_every_text_of_a_request_gets_it(client: httpx.AsyncClient) -> None:
    texts = [TEXT, "jumps", "over"]
    body = {"model": "prompted", "input": [f"search for this: {text}" for text in texts]}
    right = (await client.post(EMBEDDINGS, json=body)).json()
    got = (await client.post(EMBEDDINGS, json={"model": "prompted", "input": texts, "input_type": "query"})).json()
    assert got == right


async def test_a_model_may_have_a_prompt_for_queries_alone(client: httpx.AsyncClient) -> None:
    plain = await embedded(client, model="one-sided")
    assert (await embedded(client, model="one-sided", input_type="document"))[:2] == plain[:2]
    assert (await embedded(client, model="one-sided-passage"))[:2] == plain[:2]
    assert (await embedded(client, model="one-sided-query"))[0] != plain[0]


async def test_a_text_is_cut_behind_its_prompt(client: httpx.AsyncClient) -> None:
    reply = await client.post(EMBEDDINGS, json={"model": "prompted", "input": "ba " * 400, "input_type": "query"})
    (warning,) = reply.json()["usage"]["warnings"]
    assert (warning["kept"], warning["tokens"]) == (256, count("search for this: ") - 2 + 400 + 2)


async def test_tokenize_counts_what_will_be_billed(client: httpx.AsyncClient) -> None:
    for asked in ({"input_type": "query"}, {"model": "prompted-query"}):
        reply = await client.post(TOKENIZE, json={"model": "prompted", "input": TEXT, **asked})
        assert reply.json()["usage"]["total_tokens"] == (await embedded(client, **asked))[1]


@pytest.mark.parametrize("path", [EMBEDDINGS, TOKENIZE])
@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"model": CARD.id, "input_type": "query"}, 400, "unsupported_parameter", "input_type"),
        ({"model": "prompted", "input_type": "question"}, 400, "unsupported_parameter", "input_type"),
        ({"model": "prompted", "input_type": ["query"]}, 400, "unsupported_parameter", "input_type"),
        ({"model": "prompted-query", "input_type": "document"}, 400, "unsupported_parameter", "input_type"),
        ({"model": f"{CARD.id}-query"}, 404, "model_not_found", "model"),
        ({"model": "nowhere-query"}, 404, "model_not_found", "model"),
        ({"model": "-query"}, 404, "model_not_found", "model"),
        ({"model": "prompted-query-query"}, 404, "model_not_found", "model"),
        ({"model": "late-query"}, 503, "model_loading", "model"),
    ],
)
async def test_what_cannot_be_meant_is_refused(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    reply = await client.post(path, json={"input": TEXT, **body})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param)


async def test_too_many_inputs_are_counted_whatever_they_are(client: httpx.AsyncClient) -> None:
    body = {"model": "prompted-query", "input": ["a"] * 2_048 + [5]}
    error = (await client.post(EMBEDDINGS, json=body)).json()["error"]
    assert error["code"] == "too_many_inputs"


async def test_a_models_own_name_goes_before_a_suffix(client: httpx.AsyncClient) -> None:
    reply = await client.post(EMBEDDINGS, json={"model": "odd-query", "input": TEXT})
    assert reply.json()["usage"]["total_tokens"] == count(TEXT)
    assert reply.json()["model"] == "tests/odd-query"


async def test_models_tell_what_may_be_asked_for(client: httpx.AsyncClient) -> None:
    listed = {model["id"]: model["input_types"] for model in (await client.get("/v1/models")).json()["data"]}
    assert listed["prompted"] == ["query", "document"]
    assert listed[CARD.id] == []
    assert (await client.get("/v1/models/prompted-query")).json()["id"] == "prompted-query"


async def test_another_input_type_is_another_body_to_an_idempotency_key(client: httpx.AsyncClient) -> None:
    first = await embedded(client, key="prompts-1", input_type="query")
    again = await embedded(client, key="prompts-1", input_type="query")
    assert again[0] == first[0]
    assert again[2]["idempotent-replayed"] == "true"
    body = {"model": "prompted", "input": TEXT, "encoding_format": "base64"}
    other = await client.post(EMBEDDINGS, json=body, headers={"Idempotency-Key": "prompts-1"})
    assert other.json()["error"]["code"] == "idempotency_conflict"
