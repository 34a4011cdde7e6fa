"""Linear layers for the padding-free forwards: weights laid out once for a CPU's kernels, or products of fixed rows.

torch lays weights out anew at every call, and in float32 does without oneDNN. The operators that take them laid out
are what torch's compiler emits; they are private, so they stand here alone, and `can_prepack` says whether they work.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

PRODUCT_ROWS = 64  # of one product of a deterministic model


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this torch has the operators, and this CPU can run them in this dtype."""
    try:
        if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        if dtype not in (torch.bfloat16, torch.float32):
            return False
        rows = torch.ones(2, 16, dtype=dtype)
        layer = Prepacked(torch.ones(16, 16, dtype=dtype), torch.ones(16, dtype=dtype))
        return float(layer.plus(layer(rows), rows)[0, 0]) == 16 * 17 + 2
    except (AttributeError, RuntimeError):
        return False


class Prepacked:
    """weight [out, in] and bias [out], laid out. Calls: [rows, in] -> [rows, out]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self._bias = None if bias is None else bias.detach()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._with("none", rows)

    def gelu(self, rows: torch.Tensor) -> torch.Tensor:
        """And then the exact GELU."""
        return self._with("gelu", rows, "none")

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """And then other added: [rows, out]."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(rows, other, self._weight, self._bias, "add")
        return result

    def _with(self, behind: str, rows: torch.Tensor, algorithm: str = "") -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, behind, [], algorithm)
        return result


class PrepackedLinear(torch.nn.Linear):
    """A linear layer whose weight is kept laid out, and in no other way."""

    laid_out: Prepacked

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.laid_out(input)


def prepack(model: torch.nn.Module) -> Callable[[], None]:
    """Makes every plain linear layer a PrepackedLinear, in place. What it returns puts them back as they were."""
    before = [(layer, layer.weight) for layer in model.modules() if type(layer) is torch.nn.Linear]
    for layer, weight in before:
        layer.laid_out = Prepacked(weight, layer.bias)  # type: ignore[assignment]
        layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
        layer.__class__ = PrepackedLinear

    def undo() -> None:
        for layer, weight in before:
            layer.__class__ = torch.nn.Linear
            layer.weight = weight
            del layer.laid_out

    return undo


class FixedRowsLinear(torch.nn.Linear):
    """A linear layer that multiplies `PRODUCT_ROWS` rows at a time: their number may decide how a row is computed."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.reshape(-1, self.in_features)
        padded = functional.pad(rows, (0, 0, 0, -len(rows) % PRODUCT_ROWS))
        products = [functional.linear(some, self.weight, self.bias) for some in torch.split(padded, PRODUCT_ROWS)]
        return torch.cat(products)[: len(rows)].view(*input.shape[:-1], self.out_features)


def fix_rows(model: torch.nn.Module) -> None:
    """Makes every linear layer a FixedRowsLinear, in place. Raises ValueError for a kind that it does not know."""
    for name, layer in model.named_modules():
        if type(layer) is torch.nn.Linear:
            layer.__class__ = FixedRowsLinear
        elif isinstance(layer, torch.nn.Linear) and type(layer) is not FixedRowsLinear:
            raise ValueError(f"{name} is a {type(layer).__name__}, whose number of rows is not fixed here")
