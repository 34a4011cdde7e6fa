"""Documents ranked by scores: the answer of `POST /v1/rerank`, in the shapes that its clients read.

The same scores and the same request give the same bytes, always: what is kept for a replay is the scores alone, and the
documents are those of the request that repeats them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from serve_app.core.vectors import Vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What a request wants ranked. id: the caller's name for it."""

    text: str = field(repr=False)
    id: str | None = None


def render(
    scores: Vectors,
    documents: Sequence[Document],
    *,
    model: str,
    usage: dict[str, Any],
    top_n: int | None,
    texts: bool,
    cohere: bool,
) -> bytes:
    """The body of a 200. scores: float32 [documents]; texts: whether to repeat them; cohere: results in its words, too.

    Best first; equals in the order in which they came.
    """
    order = np.argsort(-scores, kind="stable")[:top_n].tolist()
    rankings = [_ranking(index, scores[index], documents[index], text=texts) for index in order]
    results = rankings
    if cohere:
        results = [{**it, "relevance_score": it["score"], **_document(it)} for it in rankings]
    reply = {
        "object": "runinfra.rerank",
        "model": model,
        "upstream_model": model,
        "scores": [{"index": index, "score": score} for index, score in enumerate(scores)],
        "rankings": rankings,
        "results": results,
        "document_count": len(documents),
        "usage": usage,
    }
    return orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)


def _ranking(index: int, score: np.float32, document: Document, *, text: bool) -> dict[str, Any]:
    ranking: dict[str, Any] = {"index": index, "score": score}
    if document.id is not None:
        ranking["id"] = document.id
    if text:
        ranking["text"] = document.text
    return ranking


def _document(ranking: dict[str, Any]) -> dict[str, Any]:
    return {"document": {"text": ranking["text"]}} if "text" in ranking else {}
