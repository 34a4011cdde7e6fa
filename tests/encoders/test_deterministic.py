"""`deterministic: true`: the same vector to the bit. Without it, rows differ in their last bits, on most CPUs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from serve_app.core.packing import Packed
from serve_app.core.vectors import Vectors
from serve_app.encoders.linear import PRODUCT_ROWS, FixedRowsLinear, fix_rows
from serve_app.encoders.packed import BUCKET, Bucket, PackedForward
from tests.checkpoints import make_checkpoint, reference
from tests.encoders.determinism import BUNDLED, compare, in_batches, opened, some_texts

CHECKPOINTS = {
    "bert": "cls",
    "xlm-roberta": "mean",
    "modernbert": "mean",
    "nomic_bert": "mean",
    "mistral": "lasttoken",
    "qwen3": "lasttoken",
    "mpnet": "mean",  # served by padded batches
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {kind: make_checkpoint(folder / kind, kind, pooling=pooling) for kind, pooling in CHECKPOINTS.items()}
    return {"bundled": BUNDLED, **{kind: str(path) for kind, path in made.items()}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["bundled", *CHECKPOINTS])
def test_alone_and_in_any_company_a_text_has_the_same_bits(sources: dict[str, str], model: str, dtype: str) -> None:
    encoder, tokenizer = opened(sources[model], dtype=dtype, deterministic=True)
    texts = some_texts(40, seed=1)
    alone = np.concatenate([encoder.encode(tokenizer([text]).packed) for text in texts])
    for seed in (1, 2):
        assert np.array_equal(in_batches(encoder, tokenizer, texts, seed), alone)


def test_a_replica_in_another_process_gives_the_same_bits() -> None:
    figures = compare("auto", deterministic=True, texts=some_texts(30, seed=2), seed=2, threads=1)
    assert (figures.different, figures.largest) == (0, 0)


@pytest.mark.parametrize("model", CHECKPOINTS)
def test_it_says_what_sentence_transformers_says(sources: dict[str, str], model: str) -> None:
    encoder, tokenizer = opened(sources[model], dtype="float32", deterministic=True)
    texts = some_texts(20, seed=3)
    expected = reference(Path(sources[model])).encode(texts, normalize_embeddings=True, show_progress_bar=False)
    cosines = (encoder.encode(tokenizer(texts).packed) * expected).sum(axis=1)
    assert cosines.min() >= 0.999999


def test_another_setting_is_another_fingerprint(sources: dict[str, str]) -> None:
    fixed, free = (opened(sources["bert"], dtype="float32", deterministic=setting)[0] for setting in (True, False))
    assert fixed.card.fingerprint != free.card.fingerprint


def test_every_product_has_the_same_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    linear = functional.linear

    def counted(rows: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return linear(rows, *rest)

    layer = torch.nn.Linear(8, 3)
    inputs = [torch.randn(1, rows, 8) for rows in (1, PRODUCT_ROWS - 1, PRODUCT_ROWS, 3 * PRODUCT_ROWS + 5)]
    expected = [layer(rows) for rows in inputs]
    fix_rows(layer)
    monkeypatch.setattr("serve_app.encoders.linear.functional.linear", counted)
    for rows, right in zip(inputs, expected, strict=True):
        torch.testing.assert_close(layer(rows), right)
    assert seen == [PRODUCT_ROWS] * (1 + 1 + 1 + 4)


def test_a_layer_whose_rows_cannot_be_fixed_is_refused() -> None:
    class Special(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Special(2, 2))
    with pytest.raises(ValueError, match="1 is a Special"):
        fix_rows(model)
    fixed = torch.nn.Sequential(torch.nn.Linear(2, 2))
    fix_rows(fixed)
    fix_rows(fixed)
    assert isinstance(fixed[0], FixedRowsLinear)


def test_attention_sees_a_sequence_at_a_width_that_is_its_own(
    sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: set[tuple[int, int]] = set()
    cut = PackedForward._buckets

    def watched(forward: PackedForward, lengths: np.ndarray[tuple[int], np.dtype[np.int32]]) -> list[Bucket]:
        buckets = cut(forward, lengths)
        counts = iter(lengths.tolist())
        for bucket in buckets:
            widths.update((next(counts), bucket.index.shape[1]) for _ in range(len(bucket.index)))
        return buckets

    encoder, _ = opened(sources["bert"], dtype="float32", deterministic=True)
    monkeypatch.setattr(PackedForward, "_buckets", watched)
    lengths = np.array([3, 16, 17, 20, 31, 90], np.int32)
    encoder.encode(Packed(ids=np.full(lengths.sum(), 7, np.int32), lengths=lengths))
    assert widths == {(length, -(-length // BUCKET) * BUCKET) for length in lengths.tolist()}


def test_a_packed_forward_whose_bits_depend_on_company_is_not_used(
    sources: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = PackedForward.__call__

    def almost(forward: PackedForward, packed: Packed) -> Vectors:
        vectors = right(forward, packed)
        vectors[0, 0] += 1e-6 * len(packed.lengths)
        return vectors

    monkeypatch.setattr(PackedForward, "__call__", almost)
    opened(sources["bert"], dtype="float32", deterministic=False)
    assert "serving padded batches" not in caplog.text
    encoder, tokenizer = opened(sources["bert"], dtype="float32", deterministic=True)
    assert "a vector's last bits depend on what shares its unit" in caplog.text
    texts = some_texts(40, seed=4)
    alone = np.concatenate([encoder.encode(tokenizer([text]).packed) for text in texts])
    assert np.array_equal(in_batches(encoder, tokenizer, texts, 4), alone)
