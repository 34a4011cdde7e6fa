"""The fused forward of BERT and its kin: where it serves, what odd scores do to it, and what becomes of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.core.catalog import ModelSpec
from serve_app.encoders import Encoder, bert, open_encoder
from serve_app.encoders.bert import BertForward, attention_by_squares
from serve_app.encoders.linear import can_prepack
from serve_app.encoders.packed import PackedForward
from serve_app.encoders.tokenizer import Tokenizer
from tests.checkpoints import make_checkpoint, reference
from tests.encoders.determinism import some_texts

TEXTS = some_texts(60, seed=5)


def opened(folder: Path, **settings: Any) -> Encoder:
    entry = {"id": "under-test", "name": "tests/under-test", "source": str(folder), "class": "small"}
    usual = {"unit_tokens": 64, "threads": 1, "dtype": "float32"}
    return open_encoder(ModelSpec.model_validate({**entry, **usual, **settings}))


def forward_of(encoder: Encoder) -> Any:
    return encoder._forward  # type: ignore[attr-defined]


def lowest_cosine(encoder: Encoder, folder: Path) -> float:
    expected = reference(folder).encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    packed = Tokenizer(encoder.tokenizer_json, encoder.card.max_tokens)(TEXTS).packed
    return float((encoder.encode(packed) * expected).sum(axis=1).min())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = ("bert", "roberta", "xlm-roberta", "nomic_bert", "distilbert")
    return {kind: make_checkpoint(tmp_path_factory.mktemp("models") / kind, kind) for kind in kinds}


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_it_serves_its_kinds_and_holds_their_weights_once(folders: dict[str, Path], kind: str) -> None:
    encoder = opened(folders[kind])
    assert type(forward_of(encoder)) is BertForward
    assert forward_of(encoder)._transformer.encoder is None


@pytest.mark.parametrize("kind", ["nomic_bert", "distilbert"])
def test_others_are_packed_with_weights_laid_out(folders: dict[str, Path], kind: str) -> None:
    encoder = opened(folders[kind])
    assert type(forward_of(encoder)) is PackedForward
    layers = [it for it in forward_of(encoder)._transformer.modules() if isinstance(it, torch.nn.Linear)]
    assert {type(it).__name__ for it in layers} == {"PrepackedLinear"}
    assert lowest_cosine(encoder, folders[kind]) >= 0.999999


def test_deterministic_is_not_fused(folders: dict[str, Path]) -> None:
    assert type(forward_of(opened(folders["bert"], deterministic=True))) is PackedForward


def test_another_activation_is_not_fused(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = tmp_path / "other"
    folder.symlink_to(folders["bert"])
    model = reference(folder)
    assert bert.fits(model)
    model[0].auto_model.config.hidden_act = "relu"
    assert not bert.fits(model)


def test_a_fused_forward_that_disagrees_is_not_used(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = BertForward._attend

    def to_the_left(self: BertForward, rows: torch.Tensor, places: Any, *, squares: bool) -> torch.Tensor:
        return right(self, rows, places, squares=squares).roll(1, dims=0)

    monkeypatch.setattr(BertForward, "_attend", to_the_left)
    encoder = opened(folders["bert"])
    assert "the fused forward does not fit this model (cosine 0." in caplog.text
    assert "serving padded batches" not in caplog.text
    assert type(forward_of(encoder)) is PackedForward
    assert lowest_cosine(encoder, folders["bert"]) >= 0.999999


def softmax_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = 2 * query.double() @ key.double().transpose(-1, -2)
    return scores.softmax(-1) @ value.double()


def random_three(length: int, spread: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(length)
    query, key, value = torch.randn(3, 2, 4, length, 16).unbind(0)
    return (spread * query).bfloat16(), key.bfloat16(), value.bfloat16()


@pytest.mark.parametrize("length", [1, 2, 15, 64, 300])
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
def test_squares_are_a_softmax(length: int, spread: float) -> None:
    query, key, value = random_three(length, spread)
    out = torch.empty_like(value)
    attention_by_squares(query, key, value, out=out)
    right = softmax_of(query, key, value)
    assert float((out.double() - right).norm() / right.norm()) < 0.03  # of what scores in bfloat16 are good for


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_what_all_scores_of_a_row_have_in_common_changes_nothing(shift: float) -> None:
    """A bias of the keys: as they are, exponentials of these vanish or overflow."""
    query, key, value = random_three(20, 0.3)
    query[..., 0], key[..., 0] = 1.0, key[..., 0] + shift / 2
    out = torch.empty_like(value)
    attention_by_squares(query, key, value, out=out)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.double(), softmax_of(query, key, value), atol=0.3, rtol=0.1)


@pytest.mark.parametrize(("largest", "finite"), [(100.0, True), (125.0, True), (200.0, False)])
def test_a_score_beyond_what_squares_hold_shows(largest: float, finite: bool) -> None:
    query, key, value = torch.zeros(3, 1, 1, 9, 16, dtype=torch.bfloat16).unbind(0)
    value = torch.randn_like(value)
    query[..., 4, 0], key[..., 2, 0], key[..., 3, 0] = 8.0, largest / 16, -largest / 16
    out = torch.empty_like(value)
    attention_by_squares(query, key, value, out=out)
    assert bool(torch.isfinite(out).all()) == finite
    if finite:
        torch.testing.assert_close(out[0, 0, 4], value[0, 0, 2], atol=0.02, rtol=0.02)


def test_a_model_with_such_scores_is_served_all_the_same(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "steep", "bert")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.weight"] *= 40
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    encoder = opened(folder, dtype="bfloat16")
    fused = can_prepack(torch.bfloat16)  # where it is emulated, it is not
    assert type(forward_of(encoder)) is (BertForward if fused else PackedForward)
    tried: list[bool] = []
    through = BertForward._through_layers

    def watched(self: BertForward, tokens: Any, *, squares: bool) -> torch.Tensor:
        tried.append(squares)
        return through(self, tokens, squares=squares)

    monkeypatch.setattr(BertForward, "_through_layers", watched)
    packed = Tokenizer(encoder.tokenizer_json, encoder.card.max_tokens)(TEXTS).packed
    assert np.isfinite(encoder.encode(packed)).all()
    assert tried == ([True, False] if fused else [])
    assert lowest_cosine(encoder, folder) >= 0.99
