"""The padding-free forward of BERT, RoBERTa and XLM-RoBERTa on a CPU, in as few operators as torch has for it.

Each layer is four products, with what follows them fused in, two norms, and attention over sequences of equal length,
which lie end to end: nothing is padded, masked or gathered. `loading.py` holds it against the model's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from serve_app.core.packing import Packed, runs
from serve_app.core.vectors import Vectors
from serve_app.encoders.linear import Prepacked, can_prepack
from serve_app.encoders.packed import PackedForward, Tokens

KINDS = ("bert", "roberta", "xlm-roberta")
FEW_TOKENS = 64  # up to here torch's own attention is faster: it is one operator
SQUARED_SCALE = 2.0**-60  # of squared exponentials: they stay below bfloat16's largest for scores up to 129


def fits(model: Any) -> bool:
    """Whether it is such a model, on a CPU that can run it."""
    config = model[0].auto_model.config
    return (
        config.model_type in KINDS
        and config.hidden_act == "gelu"
        and not config.is_decoder
        and model.device.type == "cpu"
        and can_prepack(model.dtype)
    )


class BertForward(PackedForward):
    """`forward(Packed)`. Once it is in use, `release` frees the weights that it has in another layout."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, fixed_rows=True)
        config = self._transformer.config
        self._heads, self._width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self._embeddings = self._transformer.embeddings
        self._layers = [_Layer(layer, self._width) for layer in self._transformer.encoder.layer]
        self._squares = model.dtype is torch.bfloat16

    def release(self) -> None:
        self._transformer.encoder = None

    def __call__(self, packed: Packed) -> Vectors:
        if not self._squares:
            return self._run(packed, partial(self._through_layers, squares=False))
        vectors = self._run(packed, partial(self._through_layers, squares=True))
        if np.isfinite(vectors).all():
            return vectors
        return self._run(packed, partial(self._through_layers, squares=False))  # scores beyond what squares can hold

    def _through_layers(self, tokens: Tokens, *, squares: bool) -> torch.Tensor:
        types = torch.zeros_like(tokens.ids) if tokens.types is None else tokens.types
        embedded = self._embeddings(input_ids=tokens.ids, position_ids=tokens.positions, token_type_ids=types)
        rows: torch.Tensor = embedded[0]
        places, start = [], 0
        for first, count in runs(tokens.lengths, 1):
            places.append((start, count, tokens.lengths[first]))
            start += count * tokens.lengths[first]
        for layer in self._layers:
            context = self._attend(layer.query_key_value(rows), places, squares=squares)
            rows = layer.attended(layer.out.plus(context, rows))
            rows = layer.fed(layer.down.plus(layer.up.gelu(rows), rows))
        return rows

    def _attend(self, rows: torch.Tensor, places: Sequence[tuple[int, int, int]], *, squares: bool) -> torch.Tensor:
        """rows: queries, keys and values of each token, [tokens, 3 x heads x width] -> [tokens, heads x width]."""
        context = rows.new_zeros(len(rows), self._heads * self._width)
        for start, count, length in places:
            end = start + count * length
            shape = (count, length, self._heads, self._width)
            query, key, value = rows[start:end].view(count, length, 3, *shape[2:]).permute(2, 0, 3, 1, 4)
            to = context[start:end].view(shape).transpose(1, 2)
            if squares and end - start > FEW_TOKENS:
                attention_by_squares(query, key, value, out=to)
            else:
                to.copy_(functional.scaled_dot_product_attention(query, key, value, scale=2.0))
        return context


class _Layer:
    """Its four products and two norms. Queries come out halved and scaled: see `attention_by_squares`."""

    def __init__(self, layer: Any, width: int) -> None:
        attention = layer.attention.self
        scale = width**-0.5 / 2
        three = attention.query, attention.key, attention.value
        scales = scale, 1.0, 1.0
        self.query_key_value = Prepacked(
            *(
                torch.cat([getattr(it, name) * by for it, by in zip(three, scales, strict=True)])
                for name in ("weight", "bias")
            )
        )
        self.out, self.attended = _prepacked(layer.attention.output.dense), layer.attention.output.LayerNorm
        self.up = _prepacked(layer.intermediate.dense)
        self.down, self.fed = _prepacked(layer.output.dense), layer.output.LayerNorm


def _prepacked(layer: torch.nn.Linear) -> Prepacked:
    return Prepacked(layer.weight, layer.bias)


def attention_by_squares(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, out: torch.Tensor) -> None:
    """softmax(2 query key') value, all [count, heads, length, width] in bfloat16, for a CPU.

    torch's softmax costs more there than both products. Exponentials need no largest score to be looked for, if they
    neither overflow nor vanish: those of half the scores do neither, and their squares are scaled while they are
    computed. Keys are taken relative to the first one, which no softmax sees: so each row has a score of 0, and its
    largest is no less. One more column of the values, of ones, makes the sums. A row beyond comes out as not finite.
    """
    count, heads, length, width = query.shape
    relative = (key - key[:, :, :1]).reshape(count * heads, length, width)
    values = value.new_ones(count, heads, length, width + 2)  # an even number: kernels take columns in pairs
    values[..., :width] = value
    halves = torch.bmm(query.reshape(count * heads, length, width), relative.transpose(1, 2)).exp_()
    squares = torch.addcmul(halves.new_zeros(()), halves, halves, value=SQUARED_SCALE, out=halves)
    sums = torch.bmm(squares, values.view(count * heads, length, width + 2)).view(values.shape)
    torch.div(sums[..., :width], sums[..., width : width + 1], out=out)
