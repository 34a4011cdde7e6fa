"""Linear layers whose weights are laid out beforehand say what torch's say; where they cannot be, none is touched."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from serve_app.encoders import linear
from serve_app.encoders.linear import Prepacked, PrepackedLinear, can_prepack, prepack

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_prepack(dtype)]  # an old CPU has no bfloat16
SIZES = [(1, 16, 16), (16, 48, 7), (300, 64, 192), (17, 33, 64)]  # rows, in, out


def close(found: torch.Tensor, right: torch.Tensor) -> None:
    tolerance = 1e-5 if found.dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), right.double(), atol=tolerance, rtol=tolerance)


def layer_and_rows(size: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.nn.Linear, torch.Tensor]:
    rows, wide, out = size
    torch.manual_seed(1)
    return torch.nn.Linear(wide, out).to(dtype), torch.randn(rows, wide).to(dtype)


def test_every_cpu_lays_out_float32() -> None:
    assert torch.float32 in DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_it_says_what_a_linear_layer_says(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    layer, rows = layer_and_rows(size, dtype)
    right = functional.linear(rows.double(), layer.weight.double(), layer.bias.double())
    laid_out = Prepacked(layer.weight, layer.bias)
    other = torch.randn_like(right).to(dtype)
    bare = Prepacked(layer.weight, None)
    with torch.inference_mode():
        close(laid_out(rows), right)
        close(laid_out.gelu(rows), functional.gelu(right))
        close(laid_out.plus(rows, other), right + other.double())
        close(bare(rows), right - layer.bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_is_laid_out_in_place_and_keeps_no_other_weights(dtype: torch.dtype) -> None:
    class Special(torch.nn.Linear):
        pass

    layers: list[torch.nn.Module] = [
        torch.nn.Linear(32, 64),
        torch.nn.GELU(),
        torch.nn.Linear(64, 8, bias=False),
        Special(8, 8),
    ]
    model = torch.nn.Sequential(*layers).to(dtype)
    rows = torch.randn(2, 5, 32).to(dtype)
    with torch.inference_mode():
        right = model(rows)
        undo = prepack(model)
        close(model(rows), right)
    assert [type(layer) for layer in model] == [PrepackedLinear, torch.nn.GELU, PrepackedLinear, Special]
    assert [layer.weight.numel() for layer in model if isinstance(layer, torch.nn.Linear)] == [0, 0, 64]
    prepack(model)  # there is nothing left to lay out
    undo()
    assert [type(layer) for layer in model] == [torch.nn.Linear, torch.nn.GELU, torch.nn.Linear, Special]
    with torch.inference_mode():
        assert torch.equal(model(rows), right)


def test_other_dtypes_and_other_torches_lay_out_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_prepack(torch.float16)

    def gone(*_: object) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(linear, "Prepacked", gone)
    assert not can_prepack(torch.float32)


def test_operators_that_do_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prepacked, "plus", lambda self, rows, other: self(rows))
    assert not can_prepack(torch.float32)
