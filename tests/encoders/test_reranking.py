"""Scores are those of sentence-transformers' CrossEncoder, in any company; what is no such model is refused."""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder

from serve_app.core.catalog import ModelSpec
from serve_app.core.packing import Packed, TokenIds
from serve_app.core.vectors import Vectors
from serve_app.encoders import Encoder, bert, loading, open_encoder, reranking, self_test
from serve_app.encoders.tokenizer import PairTokenizer
from tests.checkpoints import make_checkpoint, make_reranker, prose

ARCHITECTURES = ["bert", "roberta", "xlm-roberta"]
DTYPES = {"float32": 1e-4, "bfloat16": 0.05}  # how far a score may be from CrossEncoder's in float32
QUERIES, DOCUMENTS = 8, 25  # for each: 200 pairs, of which many are cut
CONTEXT = 128


def some_pairs() -> list[tuple[str, str]]:
    chance = random.Random(7)
    lengths = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144)
    queries = [prose(chance.choice(lengths[:6]), chance) for _ in range(QUERIES)]
    return [(query, prose(chance.choice(lengths), chance)) for query in queries for _ in range(DOCUMENTS)]


PAIRS = some_pairs()


def opened(folder: Path, **settings: Any) -> Encoder:
    entry = {"id": "under-test", "name": "tests/under-test", "source": str(folder), "class": "large", "task": "rerank"}
    usual = {"unit_tokens": 64, "threads": 1, "dtype": "float32"}
    return open_encoder(ModelSpec.model_validate({**entry, **usual, **settings}))


def tokenized(encoder: Encoder, pairs: Sequence[tuple[str, str]]) -> Packed:
    tokenizer = PairTokenizer(encoder.tokenizer_json, encoder.card.max_tokens)
    return Packed.join([tokenizer.query(query)([document]).packed for query, document in pairs])


def scores(encoder: Encoder, pairs: Sequence[tuple[str, str]]) -> Vectors:
    return encoder.encode(tokenized(encoder, pairs))


@dataclass(frozen=True, kw_only=True)
class Subject:
    folder: Path
    judge: Any
    expected: Vectors  # [pairs, 1]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    found = {}
    for kind in ARCHITECTURES:
        folder = make_reranker(tmp_path_factory.mktemp("rerankers") / kind, kind, context=CONTEXT)
        judge = CrossEncoder(str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32})
        expected = judge.predict(PAIRS, show_progress_bar=False)[:, None]
        found[kind] = Subject(folder=folder, judge=judge, expected=expected)
    return found


def test_the_pairs_tell_models_apart(subjects: dict[str, Subject]) -> None:
    """Else a forward that always said the same would pass."""
    assert len(PAIRS) == 200
    for kind in ARCHITECTURES:
        expected = subjects[kind].expected
        assert expected.std() > 0.05
        assert np.unique(expected.round(3)).size > 100
        lengths = tokenized(opened(subjects[kind].folder), PAIRS).lengths
        assert 20 < (lengths == CONTEXT).sum() < 150


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_are_those_of_a_cross_encoder_alone_together_and_shuffled(
    subjects: dict[str, Subject], kind: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, expected = opened(subjects[kind].folder, dtype=dtype), subjects[kind].expected
    assert "serving padded batches" not in caplog.text
    together = scores(encoder, PAIRS)
    assert together.shape == (200, 1)
    assert together.dtype == np.float32
    assert np.abs(together - expected).max() < DTYPES[dtype]
    order = np.random.default_rng(3).permutation(len(PAIRS))
    assert np.abs(scores(encoder, [PAIRS[at] for at in order]) - expected[order]).max() < DTYPES[dtype]
    for size in (1, 3, 17, 64):
        rows = [scores(encoder, PAIRS[first : first + size]) for first in range(0, len(PAIRS), size)]
        assert np.abs(np.concatenate(rows) - expected).max() < DTYPES[dtype]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_padded_batches_give_the_same_scores(
    subjects: dict[str, Subject], kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Mistaken(loading.PackedForward):  # type: ignore[misc, name-defined]
        def __call__(self, packed: Packed) -> Vectors:
            rows: Vectors = super().__call__(packed)
            return 1 - rows

    monkeypatch.setattr(bert, "fits", lambda model: False)
    monkeypatch.setattr(loading, "PackedForward", Mistaken)
    encoder = opened(subjects[kind].folder)
    assert "serving padded batches" in caplog.text
    assert "from the padded one's" in caplog.text
    assert np.abs(scores(encoder, PAIRS) - subjects[kind].expected).max() < 1e-4


def test_a_forward_that_takes_the_documents_for_the_query_is_not_used(
    subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Mistaken(loading.PackedForward):  # type: ignore[misc, name-defined]
        def __call__(self, packed: Packed) -> Vectors:
            rows: Vectors = super().__call__(Packed(ids=packed.ids, lengths=packed.lengths))
            return rows

    monkeypatch.setattr(bert, "fits", lambda model: False)
    monkeypatch.setattr(loading, "PackedForward", Mistaken)
    opened(subjects["bert"].folder)
    assert "serving padded batches" in caplog.text


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_deterministic_means_the_same_bits_in_any_company(subjects: dict[str, Subject], kind: str, dtype: str) -> None:
    encoder = opened(subjects[kind].folder, dtype=dtype, deterministic=True)
    pairs = PAIRS[::5]
    alone = np.concatenate([scores(encoder, [pair]) for pair in pairs])
    assert np.array_equal(scores(encoder, pairs), alone)
    assert np.array_equal(scores(encoder, pairs[::-1]), alone[::-1])
    assert np.abs(alone - subjects[kind].expected[::5]).max() < DTYPES[dtype]


def ids_and_types(judge: Any, pairs: Sequence[tuple[str, str]]) -> tuple[TokenIds, TokenIds]:
    features = judge.preprocess(pairs)
    real = features["attention_mask"].numpy().astype(bool)
    ids = features["input_ids"].numpy()
    types = features["token_type_ids"].numpy() if "token_type_ids" in features else np.zeros_like(ids)
    return ids[real], types[real]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_tokens_and_types_are_those_of_a_cross_encoder(subjects: dict[str, Subject], kind: str) -> None:
    odd = [("ba [SEP] ce", "</s> di"), ("Grüße", "東京 🙂"), (" ", " "), ("a", "b" * 400)]
    packed = tokenized(opened(subjects[kind].folder), [*PAIRS, *odd])
    ids, types = ids_and_types(subjects[kind].judge, [*PAIRS, *odd])
    assert packed.ids.tolist() == ids.tolist()
    assert packed.types().tolist() == types.tolist()
    assert bool(types.any()) == (kind == "bert")


def test_a_long_document_in_little_room_costs_what_it_has_tokens(subjects: dict[str, Subject]) -> None:
    """Not the query times its pieces: what `tokenizers` keeps of a cut text holds the query in every piece."""
    tokenizer_json = opened(subjects["xlm-roberta"].folder).tokenizer_json
    query, document = "ba ce di fo " * 500, "la me ni po " * 2_000
    before = psutil.Process().memory_info().rss
    pairs = PairTokenizer(tokenizer_json, 8192).query(query, max_document_tokens=1)([document] * 4)
    assert psutil.Process().memory_info().rss - before < 100 * 2**20
    cut_off = pairs.found - pairs.packed.lengths
    assert cut_off.min() == cut_off.max() > 7_000


# What is no cross-encoder


def copy_of(subject: Subject, tmp_path: Path) -> Path:
    shutil.copytree(subject.folder, tmp_path / "copy")
    return tmp_path / "copy"


def biased(folder: Path, bias: float) -> Path:
    """All its logits moved by so much."""
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] += bias
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_embedder_is_refused_as_a_reranker(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "embedder", "bert")
    with pytest.raises(ValueError, match=r"model under-test: its files have no classifier\.\w+.* no cross-encoder's"):
        opened(folder)


def test_a_reranker_is_refused_as_an_embedder(subjects: dict[str, Subject]) -> None:
    with pytest.raises(ValueError, match=r"model under-test: its files are a classifier's.*task: rerank"):
        opened(subjects["bert"].folder, task="embed")


def test_more_labels_than_one_are_no_score(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="say 3 labels: a reranker has one"):
        opened(make_reranker(tmp_path / "three", "bert", labels=3))


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"its architecture is modernbert: .* bert, roberta and xlm-roberta are known"):
        opened(make_reranker(tmp_path / "modern", "modernbert"))


@pytest.mark.parametrize("bias", [0.0, -10.0])
def test_a_head_that_is_not_the_models_own_is_refused(
    subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bias: float
) -> None:
    """Also where all its scores are near 0."""
    right, folder = reranking._head, biased(copy_of(subjects["bert"], tmp_path), bias)
    opened(folder)

    def without_tanh(model: Any) -> Any:
        head: Any = right(model)
        head[0].activation = torch.nn.Identity()
        return head

    monkeypatch.setattr(reranking, "_head", without_tanh)
    with pytest.raises(ValueError, match="a BertForSequenceClassification makes its score in a way"):
        opened(folder)


def test_a_context_that_its_files_do_not_have_is_refused(subjects: dict[str, Subject]) -> None:
    with pytest.raises(ValueError, match="the entry says max_tokens 129, its files allow 128"):
        opened(subjects["xlm-roberta"].folder, max_tokens=129)


# The self-test


def started(folder: Path, **settings: Any) -> None:
    entry = {"id": "under-test", "name": "tests/under-test", "source": str(folder), "class": "large", "task": "rerank"}
    usual = {"unit_tokens": 64, "threads": 1, "dtype": "float32", "self_tests": str(folder.parent / "kept")}
    spec = ModelSpec.model_validate({**entry, **usual, **settings})
    self_test.hold(spec, open_encoder(spec))


def rewrite(folder: Path, change: Callable[[list[str]], list[str]]) -> None:
    """The scores that are recorded of the model there."""
    record = folder.parent / "kept" / "under-test.json"
    kept = json.loads(record.read_text())
    assert kept["entry"]["task"] == "rerank"
    record.write_text(json.dumps({**kept, "vectors": change(kept["vectors"])}))


def test_the_self_test_tells_models_apart_whose_scores_are_near_nothing(
    subjects: dict[str, Subject], tmp_path: Path
) -> None:
    def quartered(rows: list[str]) -> list[str]:
        scores = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
        assert max(float(score[0]) for score in scores) < 0.02
        return [base64.b64encode((score / 4).astype("<f4").tobytes()).decode() for score in scores]

    folder = biased(copy_of(subjects["bert"], tmp_path), -10)
    started(folder)
    rewrite(folder, quartered)
    with pytest.raises(ValueError, match=r"logits are 1\.3\d+ from those recorded"):
        started(folder)


def test_the_self_test_holds_a_reranker_to_its_scores(subjects: dict[str, Subject], tmp_path: Path) -> None:
    folder = copy_of(subjects["bert"], tmp_path)
    started(folder)
    started(folder)
    rewrite(folder, lambda rows: rows[::-1])
    with pytest.raises(ValueError, match=r"failed its self-test: it gives scores whose logits are \d\.\d+ from those"):
        started(folder)


def test_a_rerankers_damaged_weights_and_tokens_are_refused(subjects: dict[str, Subject], tmp_path: Path) -> None:
    folder = copy_of(subjects["bert"], tmp_path)
    started(folder)
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"].view(torch.int32)[0, 3] ^= 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="reads weight files that are not those recorded"):
        started(folder)
    shutil.copy(subjects["bert"].folder / "model.safetensors", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="makes other tokens of the same texts than were recorded"):
        started(folder)
