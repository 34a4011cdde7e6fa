"""One kernel for the attention of a whole batch: used where it applies, and then it says what the loop says.

The kernel needs a GPU: here a reference stands in for it, one sequence after the other, that takes only what the kernel
takes and is called only as the kernel may be called.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from serve_app.core.packing import Packed
from serve_app.core.vectors import Vectors
from serve_app.encoders import varlen
from serve_app.encoders.packed import ATTENTION, PackedForward
from serve_app.encoders.varlen import Bounds
from tests.checkpoints import make_checkpoint, reference
from tests.encoders.determinism import some_texts

KINDS = {  # and how its layers call the kernel: (window, grouped)
    "bert": {((-1, -1), False)},
    "xlm-roberta": {((-1, -1), False)},
    "nomic_bert": {((-1, -1), False)},
    "modernbert": {((-1, -1), False), ((16, 16), False)},
    "mistral": {((31, 0), True)},
    "qwen2": {((-1, 0), True)},
    "qwen3": {((-1, 0), True)},
}
SIGNATURE = inspect.signature(varlen_attn)
TEXTS = some_texts(24, seed=3)


class Kernel:
    """What stands in for it. calls: how layers called it."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, int], bool]] = []

    def __call__(self, *arguments: Any, **settings: Any) -> torch.Tensor:
        call = SIGNATURE.bind(*arguments, **settings)
        call.apply_defaults()
        query, key, value = (call.arguments[name] for name in ("query", "key", "value"))
        starts, (back, ahead) = call.arguments["cu_seq_q"], call.arguments["window_size"]
        grouped, scale = call.arguments["enable_gqa"], call.arguments["scale"]
        lengths = starts.diff()
        assert query.is_floating_point()
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        assert starts.dtype is torch.int32
        assert torch.equal(starts, call.arguments["cu_seq_k"])
        assert int(starts[0]) == 0
        assert int(starts[-1]) == len(query) == len(key) == len(value)
        assert int(lengths.max()) == call.arguments["max_q"] == call.arguments["max_k"]
        assert grouped == (query.shape[1] != key.shape[1])
        self.calls.append(((back, ahead), grouped))
        context = torch.empty_like(query)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=False):
            at = torch.arange(length)
            distance = at[:, None] - at
            seen = torch.ones(length, length, dtype=torch.bool)
            if back >= 0:
                seen &= distance <= back
            if ahead >= 0:
                seen &= -distance <= ahead
            q, k, v = (rows[start : start + length].transpose(0, 1)[None] for rows in (query, key, value))
            attended = functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=grouped)
            context[start : start + length] = attended[0].transpose(0, 1)
        return context


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    stands_in = Kernel()
    yield from _installed(monkeypatch, stands_in)


def _installed(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> Iterator[Any]:
    varlen._works.cache_clear()
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    yield kernel
    varlen._works.cache_clear()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make_checkpoint(tmp_path_factory.mktemp("models") / kind, kind) for kind in KINDS}


def packed_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = reference(folder)
    model[0].auto_model.to(dtype).set_attn_implementation(ATTENTION)
    return model


def packed(model: Any) -> Packed:
    rows = [row[real.bool()].numpy() for row, real in zip(*_features(model), strict=True)]
    return Packed(ids=np.concatenate(rows).astype(np.int32), lengths=np.array([len(row) for row in rows], np.int32))


def _features(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    features = model.preprocess(TEXTS)
    return features["input_ids"], features["attention_mask"]


def vectors(model: Any, *, fixed_rows: bool = False, deterministic: bool = False) -> Vectors:
    with torch.inference_mode():
        return PackedForward(model, fixed_rows=fixed_rows, deterministic=deterministic)(packed(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_every_kind_is_what_sentence_transformers_says(
    folders: dict[str, Path], kernel: Kernel, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))  # in which nothing but a mistake makes a difference
    model = packed_model(folders[kind])
    found = vectors(model)
    right = reference(folders[kind]).encode(TEXTS, show_progress_bar=False)
    assert set(kernel.calls) >= KINDS[kind]
    assert (found * right).sum(axis=1).min() >= 0.999999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bert", "qwen2"])
def test_it_attends_for_every_layer_of_a_half_precision_model(
    folders: dict[str, Path], kernel: Kernel, kind: str, dtype: torch.dtype
) -> None:
    model = packed_model(folders[kind], dtype)
    vectors(model)  # tries it out first
    kernel.calls.clear()
    found, layers = vectors(model), model[0].auto_model.config.num_hidden_layers
    assert kernel.calls == [*KINDS[kind]] * layers
    looped = vectors(model, fixed_rows=True)
    assert len(kernel.calls) == layers
    assert (found * looped).sum(axis=1).min() >= 0.999


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"fixed_rows": True}),
        (torch.bfloat16, {"deterministic": True}),
    ],
    ids=["float32", "padded rows", "deterministic"],
)
def test_it_is_not_asked_where_it_does_not_apply(
    folders: dict[str, Path], kernel: Kernel, dtype: torch.dtype, settings: dict[str, bool]
) -> None:
    model = packed_model(folders["bert"], dtype)
    right = reference(folders["bert"]).encode(TEXTS, show_progress_bar=False)
    assert (vectors(model, **settings) * right).sum(axis=1).min() >= 0.999
    assert kernel.calls == []


@pytest.mark.parametrize("width", [12, 264])
def test_heads_that_it_does_not_take_are_looped_over(kernel: Kernel, width: int) -> None:
    rows = torch.zeros(4, 2, width, dtype=torch.bfloat16)
    assert not varlen.fits(rows, rows, None)
    assert kernel.calls == []


def _refuses(*_: object, **__: object) -> torch.Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def _knows_no_windows(query: torch.Tensor, *_: object, window_size: tuple[int, int], **__: object) -> torch.Tensor:
    if window_size != (-1, -1):
        raise RuntimeError("window attention is not supported")
    return query


def _is_wrong(query: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return 2 * query


@pytest.mark.parametrize("broken", [_refuses, _is_wrong])
def test_a_kernel_that_refuses_or_errs_is_not_used(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, broken: Any
) -> None:
    for _ in _installed(monkeypatch, broken):
        model = packed_model(folders["bert"], torch.bfloat16)
        right = reference(folders["bert"]).encode(TEXTS, show_progress_bar=False)
        assert (vectors(model) * right).sum(axis=1).min() >= 0.999


def test_a_kernel_without_windows_is_used_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(4, 2, 64, dtype=torch.bfloat16)
    for _ in _installed(monkeypatch, _knows_no_windows):
        assert varlen.fits(rows, rows, None)
        assert not varlen.fits(rows, rows, 128)


def test_a_cpu_has_no_such_kernel() -> None:
    rows = torch.zeros(4, 2, 64, dtype=torch.bfloat16)
    varlen._works.cache_clear()
    assert not varlen.fits(rows, rows, None)


def test_a_window_counts_the_token_itself(kernel: Kernel) -> None:
    rows = torch.randn(7, 1, 8, dtype=torch.bfloat16)
    bounds = Bounds(torch.tensor([0, 3, 7], dtype=torch.int32), 4)
    alone = varlen.attend(rows, rows, rows, bounds, causal=True, window=1, scale=None)
    assert torch.equal(alone, rows)
