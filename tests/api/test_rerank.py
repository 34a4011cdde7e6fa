"""`POST /v1/rerank` over HTTP: what is asked, answered, refused, replayed and billed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from serve_app.core.ledger import shard_of
from serve_app.encoders.tokenizer import PairTokenizer
from serve_app.stores import Store
from tests.service.fakes import (
    CARD,
    RERANKER,
    WORKSPACE,
    FakeModel,
    bundled_tokenizer_json,
    scored,
)

QUERY = "which animal jumps"
TEXTS = ["a quick brown fox", "a lazy dog " * 40, "an invoice", "a quick brown fox"]
PATH = "/v1/rerank"


@pytest.fixture
def model() -> FakeModel:
    return FakeModel(RERANKER)


@pytest.fixture
def own_models(model: FakeModel) -> list[FakeModel]:
    return [model, FakeModel()]


def asking(**fields: Any) -> dict[str, Any]:
    return {"model": "reranker", "query": QUERY, **({} if "documents" in fields else {"texts": TEXTS}), **fields}


def right(texts: list[str] = TEXTS, query: str = QUERY, most: int | None = None) -> tuple[list[float], list[int]]:
    """Scores, and tokens of each pair."""
    packed = PairTokenizer(bundled_tokenizer_json(), RERANKER.max_tokens).query(query, most)(texts).packed
    return [float(score) for score in scored(packed)[:, 0]], packed.lengths.tolist()


async def test_every_document_has_a_score_and_the_best_stands_first(own_client: httpx.AsyncClient) -> None:
    reply = await own_client.post(PATH, json=asking())
    assert reply.status_code == 200
    body, (scores, lengths) = reply.json(), right()
    assert [it["index"] for it in body["scores"]] == [0, 1, 2, 3]
    assert [it["score"] for it in body["scores"]] == pytest.approx(scores, abs=1e-7)
    assert [it["index"] for it in body["rankings"]] == np.argsort(-np.array(scores), kind="stable").tolist()
    assert body["results"] == body["rankings"]
    assert body["model"] == body["upstream_model"] == RERANKER.name
    assert body["document_count"] == 4
    assert body["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}
    assert reply.headers["x-model-fingerprint"] == RERANKER.fingerprint
    for step in ("tokenize", "queue", "compute"):
        assert f"{step};dur=" in reply.headers["server-timing"]


async def test_documents_may_be_objects_and_their_ids_come_back(own_client: httpx.AsyncClient) -> None:
    documents = [{"id": "fox", "text": TEXTS[0]}, {"text": TEXTS[1]}, TEXTS[2], {"id": None, "text": TEXTS[3]}]
    body = (await own_client.post(PATH, json=asking(documents=documents, return_documents=True))).json()
    plain = (await own_client.post(PATH, json=asking())).json()
    assert body["scores"] == plain["scores"]
    by_index = {it["index"]: it for it in body["rankings"]}
    assert by_index[0]["id"] == "fox"
    assert not any("id" in by_index[index] for index in (1, 2, 3))
    assert [by_index[index]["text"] for index in range(4)] == TEXTS
    for ranking, result in zip(body["rankings"], body["results"], strict=True):
        words = {"relevance_score": ranking["score"], "document": {"text": ranking["text"]}}
        assert result == ranking | words
    assert "relevance_score" not in plain["results"][0]


@pytest.mark.parametrize("path", ["/v2/rerank", PATH])
async def test_coheres_path_is_the_same_route(own_client: httpx.AsyncClient, path: str, own_store: Store) -> None:
    headers = {"Idempotency-Key": "one"}
    reply = await own_client.post(path, json=asking(documents=TEXTS, top_n=2), headers=headers)
    assert reply.status_code == 200
    again = await own_client.post("/v1/rerank", json=asking(documents=TEXTS, top_n=2), headers=headers)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.content == reply.content
    (recorded,) = await own_store.events(shard_of(WORKSPACE.id), 0, 10)
    assert recorded.event.details["endpoint"] == "/v1/rerank"


async def test_the_document_is_cut_never_the_query_and_the_answer_says_so(own_client: httpx.AsyncClient) -> None:
    long = "dog " * 400
    body = (await own_client.post(PATH, json=asking(texts=["fox", long]))).json()
    (warning,) = body["usage"]["warnings"]
    own = right(["dog"])[1][0] - 1  # what a pair has beside the document
    assert warning == {"code": "input_truncated", "index": 1, "tokens": own + 400, "kept": RERANKER.max_tokens}
    assert body["usage"]["total_tokens"] == sum(right(["fox", long])[1])


async def test_documents_may_be_cut_shorter(own_client: httpx.AsyncClient) -> None:
    texts = ["fox", "dog dog dog dog"]
    body = (await own_client.post(PATH, json=asking(texts=texts, max_tokens_per_doc=2))).json()
    assert [it["score"] for it in body["scores"]] == pytest.approx(right(["fox", "dog dog"])[0], abs=1e-7)
    assert [(it["index"], it["tokens"] - it["kept"]) for it in body["usage"]["warnings"]] == [(1, 2)]


async def test_a_success_is_billed_once_by_the_tokens_of_all_pairs(
    own_client: httpx.AsyncClient, own_store: Store
) -> None:
    headers = {"Idempotency-Key": "one"}
    first = await own_client.post(PATH, json=asking(user="u1"), headers=headers)
    second = await own_client.post(PATH, json=asking(user="u1", top_n=None), headers=headers)
    assert second.content == first.content
    assert second.headers["idempotent-replayed"] == "true"
    await own_client.post(PATH, json=asking())
    events = [it.event for it in await own_store.events(shard_of(WORKSPACE.id), 0, 10)]
    assert [event.quantity for event in events] == [sum(right()[1])] * 2
    assert [event.model for event in events] == [RERANKER.name] * 2
    assert events[0].details["inputs"] == 4
    assert events[0].details["user"] == "u1"


async def test_a_key_belongs_to_one_request(own_client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "one"}
    assert (await own_client.post(PATH, json=asking(), headers=headers)).status_code == 200
    assert (await own_client.post(PATH, json=asking(top_n=None), headers=headers)).status_code == 200
    for other in ({"query": "another"}, {"top_n": 1}, {"documents": TEXTS, "texts": None}, {"return_documents": True}):
        reply = await own_client.post(PATH, json=asking() | other, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "idempotency_conflict"), other
    reply = await own_client.post("/v1/embeddings", json={"model": CARD.id, "input": "a"}, headers=headers)
    assert reply.status_code == 200  # another route


def kept_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir() if path.is_file())


async def test_a_replay_repeats_texts_and_ids_that_the_store_does_not_have(
    own_client: httpx.AsyncClient, model: FakeModel, tmp_path: Path
) -> None:
    documents = [{"id": "id-swordfish", "text": "text-swordfish"}, "a dog"]
    asked = asking(documents=documents, return_documents=True)
    first, second = [await own_client.post(PATH, json=asked, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert second.content == first.content
    assert b"text-swordfish" in second.content
    assert len(model.units) == 1
    assert b"swordfish" not in kept_in(tmp_path)


async def test_a_whole_number_may_be_written_as_any(own_client: httpx.AsyncClient) -> None:
    replies = [await own_client.post(PATH, json=asking(top_n=top_n)) for top_n in (2, 2.0)]
    assert [reply.status_code for reply in replies] == [200, 200]
    assert replies[0].content == replies[1].content


async def test_a_query_may_leave_room_for_one_token(own_client: httpx.AsyncClient) -> None:
    assert (await own_client.post(PATH, json=asking(query="dog " * 252))).status_code == 200


@pytest.mark.parametrize(
    "documents",
    [
        b'[{"text": "a", "text": "b"}]',
        b'["a", {"text": "a", "id": "1", "id": "2"}]',
        b'[{"text": "a", "t\\u0065xt": "b"}]',
    ],
)
async def test_a_document_that_says_two_things_is_refused(own_client: httpx.AsyncClient, documents: bytes) -> None:
    body = b'{"model": "reranker", "query": "a", "documents": %b}' % documents
    reply = await own_client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_json")


async def test_texts_that_look_like_names_are_texts(own_client: httpx.AsyncClient) -> None:
    documents = [{"text": 'a "text" with "id"', "id": "text"}, "text", {"text": "id", "id": "id"}]
    assert (await own_client.post(PATH, json=asking(documents=documents, query="text"))).status_code == 200


MANY = ["a"] * 501


@pytest.mark.parametrize(
    ("body", "code", "param", "says"),
    [
        ({"query": ""}, "invalid_input", "query", "query is an empty string"),
        ({"query": ["a"]}, "invalid_input", "query", "query is not a string"),
        ({"query": None}, "invalid_input", "query", "query is not a string"),
        ({"query": "a\0"}, "invalid_input", "query", "NUL"),
        ({"texts": None}, "missing_required_field", "documents", "One of texts and documents is required"),
        ({"documents": ["a"]}, "invalid_input", "documents", "Send one of texts and documents, not both"),
        ({"texts": []}, "invalid_input", "texts", "empty array"),
        ({"texts": "a"}, "invalid_input", "texts", "must be an array"),
        ({"texts": ["a", ""]}, "invalid_input", "texts[1]", "empty string"),
        ({"texts": [{"text": "a"}]}, "invalid_input", "texts[0]", "not a string"),
        ({"texts": None, "documents": [{"id": "a"}]}, "missing_required_field", "documents[0].text", "is required"),
        ({"texts": None, "documents": [{"text": "a", "txt": "b"}]}, "unknown_parameter", "documents[0].txt", "'text'"),
        ({"texts": None, "documents": [{"text": "a", "b c": 1}]}, "unknown_parameter", None, "no parameter"),
        ({"texts": None, "documents": [["a"]]}, "invalid_input", "documents[0]", "not a string"),
        ({"texts": None, "documents": ["a", {"text": 7}]}, "invalid_input", "documents[1].text", "not a string"),
        ({"texts": None, "documents": [{"text": "a", "id": 7}]}, "invalid_input", "documents[0].id", "1 to 512"),
        ({"texts": None, "documents": [{"text": "a", "id": "x" * 513}]}, "invalid_input", "documents[0].id", "512"),
        ({"texts": MANY}, "too_many_inputs", "texts", "501 documents; tests/reranker ranks at most 500"),
        ({"texts": None, "documents": MANY}, "too_many_inputs", "documents", "at most 500"),
        ({"top_n": 0}, "unsupported_parameter", "top_n", "integer from 1"),
        ({"top_n": 2.5}, "unsupported_parameter", "top_n", "integer from 1"),
        ({"top_n": 1e308}, "unsupported_parameter", "top_n", "integer from 1"),
        ({"top_n": True}, "unsupported_parameter", "top_n", "integer from 1"),
        ({"top_n": "3"}, "unsupported_parameter", "top_n", "integer from 1"),
        ({"top_n": 10**6 + 1}, "unsupported_parameter", "top_n", "to 1,000,000"),
        ({"max_tokens_per_doc": -1}, "unsupported_parameter", "max_tokens_per_doc", "integer from 1"),
        ({"return_documents": "yes"}, "unsupported_parameter", "return_documents", "true or false"),
        ({"document": ["a"]}, "unknown_parameter", "document", "documents"),
        ({"query": "dog " * 253}, "too_many_tokens", "query", "The query has 253 tokens; .* room beside 252"),
        ({"model": CARD.id}, "unsupported_parameter", "model", "embeds texts: send them to POST /v1/embeddings"),
        ({"model": "reranker-query"}, "model_not_found", "model", "no model"),
    ],
)
async def test_what_cannot_be_ranked_is_refused(
    own_client: httpx.AsyncClient, own_store: Store, body: dict[str, Any], code: str, param: str | None, says: str
) -> None:
    reply = await own_client.post(PATH, json=asking(texts=["a"]) | body)
    assert reply.status_code == (404 if code == "model_not_found" else 400)
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert re.search(says, error["message"])
    assert not await own_store.events(shard_of(WORKSPACE.id), 0, 10)


async def test_the_tokens_of_all_pairs_are_within_the_class(own_client: httpx.AsyncClient, model: FakeModel) -> None:
    limit = RERANKER.size_class.limits.tokens
    model.card = dataclasses.replace(RERANKER, max_tokens=1024)
    body = asking(texts=["dog " * 450] * 500, query="dog " * 100)
    reply = await own_client.post(PATH, json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "too_many_tokens")
    assert f"{limit:,}" in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"] == "texts"


async def test_tokenize_counts_what_will_be_billed(own_client: httpx.AsyncClient) -> None:
    asked: dict[str, Any]
    for asked in ({"texts": TEXTS}, {"documents": [{"text": "dog " * 400}, "fox"], "max_tokens_per_doc": 300}):
        counted = await own_client.post("/v1/tokenize", json={"model": "reranker", "query": QUERY, **asked})
        assert counted.status_code == 200, counted.text
        ranked = (await own_client.post(PATH, json={"model": "reranker", "query": QUERY, **asked})).json()
        assert counted.json()["usage"] == ranked["usage"]
        cut = [it["index"] for it in counted.json()["data"] if it["truncated"]]
        assert cut == [it["index"] for it in ranked["usage"].get("warnings", [])]
    for wrong, param in (({"texts": ["a"], "top_n": 1}, "top_n"), ({"input": "a", "texts": ["a"]}, "input")):
        refused = await own_client.post("/v1/tokenize", json={"model": "reranker", "query": "a", **wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    refused = await own_client.post("/v1/tokenize", json={"model": CARD.id, "query": "a", "texts": ["a"]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/tokenize"])
async def test_a_reranker_embeds_nothing(own_client: httpx.AsyncClient, path: str) -> None:
    reply = await own_client.post(path, json={"model": "reranker", "input": "a"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported_parameter")
    assert reply.json()["error"]["param"] == "model"
    assert "POST /v1/rerank" in reply.json()["error"]["message"]


async def test_a_lone_surrogate_is_named_where_it_stands(own_client: httpx.AsyncClient) -> None:
    for field, param in (
        (b'"query": "\\ud800", "texts": ["a"]', "query"),
        (b'"query": "a", "texts": ["a", "\\ud800"]', "texts[1]"),
        (b'"query": "a", "documents": ["a", {"text": "\\ud800"}]', "documents[1].text"),
    ):
        body = b'{"model": "reranker", %b}' % field
        reply = await own_client.post(PATH, content=body, headers={"Content-Type": "application/json"})
        assert (reply.json()["error"]["code"], reply.json()["error"]["param"]) == ("invalid_input", param)


async def test_the_list_tells_what_a_model_is_for(own_client: httpx.AsyncClient) -> None:
    listed = {model["id"]: model for model in (await own_client.get("/v1/models")).json()["data"]}
    assert (listed["reranker"]["task"], listed["reranker"]["dimensions"]) == ("rerank", None)
    assert (listed[CARD.id]["task"], listed[CARD.id]["dimensions"]) == ("embed", 384)
