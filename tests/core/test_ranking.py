"""The answer of `/v1/rerank`: every score once in order, the documents best first, in each client's words."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.core import schema
from serve_app.core.ranking import Document, render
from serve_app.core.replies import Reply
from serve_app.core.vectors import Vectors

USAGE = {"prompt_tokens": 9, "total_tokens": 9}
DOCUMENTS = [Document(text="first"), Document(text="second", id="b"), Document(text="third", id="c")]
SCORES = np.array([0.25, 0.1, 0.9], np.float32)


def answer(
    scores: Vectors = SCORES,
    documents: list[Document] = DOCUMENTS,
    *,
    top_n: int | None = None,
    texts: bool = False,
    cohere: bool = False,
) -> dict[str, Any]:
    options: dict[str, Any] = {"top_n": top_n, "texts": texts, "cohere": cohere}
    body: dict[str, Any] = json.loads(render(scores, documents, model="BAAI/it", usage=USAGE, **options))
    schema.RerankResponse.model_validate(body)
    return body


def test_scores_stand_in_the_order_of_the_documents_and_rankings_best_first() -> None:
    assert answer() == {
        "object": "runinfra.rerank",
        "model": "BAAI/it",
        "upstream_model": "BAAI/it",
        "scores": [{"index": 0, "score": 0.25}, {"index": 1, "score": 0.1}, {"index": 2, "score": 0.9}],
        "rankings": (
            rankings := [
                {"index": 2, "score": 0.9, "id": "c"},
                {"index": 0, "score": 0.25},
                {"index": 1, "score": 0.1, "id": "b"},
            ]
        ),
        "results": rankings,
        "document_count": 3,
        "usage": USAGE,
    }


def test_top_n_cuts_the_ranking_and_not_the_scores() -> None:
    for top_n, kept in ((1, [2]), (2, [2, 0]), (3, [2, 0, 1]), (99, [2, 0, 1])):
        body = answer(top_n=top_n)
        assert [it["index"] for it in body["rankings"]] == [it["index"] for it in body["results"]] == kept
        assert len(body["scores"]) == body["document_count"] == 3


def test_texts_are_repeated_only_when_they_are_asked_for() -> None:
    assert [it["text"] for it in answer(texts=True)["rankings"]] == ["third", "first", "second"]
    assert "first" not in json.dumps(answer())


def test_coheres_words_stand_in_the_results_beside_the_others() -> None:
    body = answer(cohere=True, texts=True, top_n=1)
    assert body["rankings"] == [{"index": 2, "score": 0.9, "id": "c", "text": "third"}]
    (result,) = body["results"]
    assert result == body["rankings"][0] | {"relevance_score": 0.9, "document": {"text": "third"}}
    assert "document" not in answer(cohere=True)["results"][0]


@pytest.mark.parametrize("scores", [[0.5, 0.5, 0.5], [0.1, 0.7, 0.7]])
def test_equals_stand_in_the_order_in_which_they_came(scores: list[float]) -> None:
    order = [it["index"] for it in answer(np.array(scores, np.float32))["rankings"]]
    assert order == sorted(range(3), key=lambda index: (-scores[index], index))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), st.none() | st.integers(1, 50))
def test_any_scores_are_ranked_and_the_same_bytes_come_again(numbers: list[float], top_n: int | None) -> None:
    scores, documents = np.array(numbers, np.float32), [Document(text="x")] * len(numbers)
    body = answer(scores, documents, top_n=top_n)
    found = [it["score"] for it in body["scores"]]
    assert np.array_equal(np.array(found, np.float32), scores)
    assert [it["score"] for it in body["rankings"]] == sorted(found, reverse=True)[:top_n]
    reply = Reply(
        vectors=scores[:, None], model="it", usage=USAGE, encoding_format="float", fingerprint="f", request_id="r"
    )
    kept = Reply.unpack(reply.pack()).vectors[:, 0]
    once, again = [
        render(it, documents, model="it", usage=USAGE, top_n=top_n, texts=True, cohere=True) for it in (scores, kept)
    ]
    assert once == again
