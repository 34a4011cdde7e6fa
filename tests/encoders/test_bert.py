"""The fused forward of BERT and its kin: where it serves, what does not fit it, and what becomes of a wrong one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from serve_app.core.catalog import ModelSpec
from serve_app.encoders import Encoder, bert, open_encoder
from serve_app.encoders.bert import BertForward
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
    assert lowest_cosine(encoder, folders[kind]) >= 0.999999


def test_attention_with_its_scores_whole_says_the_same(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, whole = list[int](), bert.attended_whole
    monkeypatch.setattr(bert, "WHOLE_FROM", 8)

    def counted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        calls.append(query.shape[1])
        return whole(query, key, value)

    monkeypatch.setattr(bert, "attended_whole", counted)
    encoder = opened(folders["bert"])
    assert not calls, "in float32 torch's own is as fast"
    forward_of(encoder)._whole = True
    assert lowest_cosine(encoder, folders["bert"]) >= 0.999999
    assert min(calls) == 8
    assert max(calls) > 16


def test_memory_bounds_what_is_attended_whole(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bert, "WHOLE_FROM", 8)
    monkeypatch.setattr(bert, "WHOLE_TO", 16)
    monkeypatch.setattr(bert, "attended_whole", lambda query, *_: query.fill_(query.shape[1]))
    forward = forward_of(opened(folders["bert"]))
    forward._whole = True
    rows = torch.zeros(7 + 8 + 16 + 17, 3 * forward._heads * forward._width)
    attended = forward._attend(rows, [(0, 1, 7), (7, 1, 8), (15, 1, 16), (31, 1, 17)])
    assert attended[:, 0].tolist() == [0] * 7 + [8] * 8 + [16] * 16 + [0] * 17


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 47, 48, 170, 512])
def test_a_sequence_attended_whole(tokens: int, dtype: torch.dtype) -> None:
    query, key, value = 2 * torch.randn(3, 12, tokens, 32, generator=torch.Generator().manual_seed(tokens))
    expected = functional.scaled_dot_product_attention(query, key, value)
    attended = bert.attended_whole(query.to(dtype), key.to(dtype), value.to(dtype))
    assert attended.dtype == dtype
    agreement = functional.cosine_similarity(attended.float(), expected, dim=-1).min()
    assert agreement >= (0.999999 if dtype == torch.float32 else 0.99)


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
    config = model[0].auto_model.config
    config.hidden_act = "relu"
    assert not bert.fits(model)
    model[0].auto_model.config = SimpleNamespace(model_type="bert")  # of somebody's own code
    assert not bert.fits(model)


def test_a_fused_forward_that_disagrees_is_not_used(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = BertForward._attend

    def to_the_left(self: BertForward, rows: torch.Tensor, places: Any) -> torch.Tensor:
        return right(self, rows, places).roll(1, dims=0)

    monkeypatch.setattr(BertForward, "_attend", to_the_left)
    encoder = opened(folders["bert"])
    assert "the fused forward does not fit this model (cosine 0." in caplog.text
    assert "serving padded batches" not in caplog.text
    assert type(forward_of(encoder)) is PackedForward
    assert lowest_cosine(encoder, folders["bert"]) >= 0.999999


def test_a_layer_that_only_looks_linear_is_not_fused(folders: dict[str, Path]) -> None:
    class Adapted(torch.nn.Linear):
        pass

    model = reference(folders["bert"])
    model[0].auto_model.encoder.layer[1].output.dense.__class__ = Adapted
    with pytest.raises(ValueError, match="a Adapted where a Linear should be"):
        BertForward(model)


def test_weights_that_a_models_own_code_reads_stay_as_they_are(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.models.distilbert.modeling_distilbert import FFN

    def by_hand(self: Any, rows: torch.Tensor) -> torch.Tensor:
        wide = functional.linear(rows, self.lin1.weight, self.lin1.bias)
        return functional.linear(functional.gelu(wide), self.lin2.weight, self.lin2.bias)

    monkeypatch.setattr(FFN, "forward", by_hand)
    encoder = opened(folders["distilbert"])
    assert "serving padded batches" not in caplog.text
    assert type(forward_of(encoder)) is PackedForward
    layers = [it for it in forward_of(encoder)._transformer.modules() if isinstance(it, torch.nn.Linear)]
    assert {type(it) for it in layers} == {torch.nn.Linear}
    assert lowest_cosine(encoder, folders["distilbert"]) >= 0.999999
