"""The padding-free forward of BERT, RoBERTa and XLM-RoBERTa on a CPU, in as few operators as torch has for it.

Each layer is four products, with what follows them fused in, two norms, and attention over sequences of equal length,
which lie end to end: nothing is padded, masked or gathered. `loading.py` holds it against the model's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from serve_app.core.packing import runs
from serve_app.encoders.linear import Prepacked, can_prepack
from serve_app.encoders.packed import PackedForward, Tokens

KINDS = ("bert", "roberta", "xlm-roberta")

# Tokens of a sequence whose attention is two products around a softmax, its scores laid out whole: below, the calls
# cost more than they save, and above, the scores want memory (16 heads x 512 x 512 in float32 are 17 MB).
WHOLE_FROM, WHOLE_TO = 48, 512


def fits(model: Any) -> bool:
    """Whether it is such a model, on a CPU that can run it."""
    config = model[0].auto_model.config
    return (
        getattr(config, "model_type", None) in KINDS
        and getattr(config, "hidden_act", None) == "gelu"
        and not getattr(config, "is_decoder", False)
        and model.device.type == "cpu"
        and can_prepack(model.dtype)
    )


class BertForward(PackedForward):
    """`forward(Packed)`. Once it is in use, `release` frees the weights that it has in another layout."""

    def __init__(self, model: Any) -> None:
        """Raises ValueError if a layer is not what it is in those models."""
        super().__init__(model, fixed_rows=True)
        config = self._transformer.config
        self._heads, self._width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self._whole = model.dtype is torch.bfloat16 and not torch.cpu._is_amx_tile_supported()
        self._embeddings = self._transformer.embeddings
        self._layers = [_Layer(layer) for layer in self._transformer.encoder.layer]

    def release(self) -> None:
        self._transformer.encoder = None

    def _through(self, tokens: Tokens) -> torch.Tensor:
        types = torch.zeros_like(tokens.ids) if tokens.types is None else tokens.types
        embedded = self._embeddings(input_ids=tokens.ids, position_ids=tokens.positions, token_type_ids=types)
        rows: torch.Tensor = embedded[0]
        places, start = [], 0
        for first, count in runs(tokens.lengths, 1):
            places.append((start, count, tokens.lengths[first]))
            start += count * tokens.lengths[first]
        for layer in self._layers:
            context = self._attend(layer.query_key_value(rows), places)
            rows = layer.attended(layer.out.plus(context, rows))
            rows = layer.fed(layer.down.plus(layer.up.gelu(rows), rows))
        return rows

    def _attend(self, rows: torch.Tensor, places: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """rows: queries, keys and values of each token, [tokens, 3 x heads x width] -> [tokens, heads x width]."""
        context = rows.new_zeros(len(rows), self._heads * self._width)
        for start, count, length in places:
            end, shape = start + count * length, (count, length, self._heads, self._width)
            query, key, value = rows[start:end].view(count, length, 3, *shape[2:]).permute(2, 0, 3, 1, 4)
            into = context[start:end].view(shape).transpose(1, 2)
            if self._whole and WHOLE_FROM <= length <= WHOLE_TO:
                for each in range(count):
                    into[each].copy_(attended_whole(query[each], key[each], value[each]))
            else:
                into.copy_(functional.scaled_dot_product_attention(query, key, value))
        return context


def attended_whole(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of one sequence, [heads, tokens, width] all of them.

    torch's own on a CPU without AMX cuts the queries of such a sequence into blocks of 32, whose products are too
    small: in bfloat16 it takes 1.4 to 2.2 times as long.
    """
    scores = torch.baddbmm(query.new_empty(1), query, key.transpose(1, 2), beta=0, alpha=query.shape[-1] ** -0.5)
    return torch.bmm(scores.float().softmax(-1).to(value.dtype), value)


class _Layer:
    """Its four products and two norms."""

    def __init__(self, layer: Any) -> None:
        three = [getattr(layer.attention.self, name) for name in ("query", "key", "value")]
        out, up, down = layer.attention.output.dense, layer.intermediate.dense, layer.output.dense
        for linear in (*three, out, up, down):
            if type(linear) is not torch.nn.Linear:
                raise ValueError(f"a {type(linear).__name__} where a Linear should be")
        self.query_key_value = Prepacked(
            torch.cat([linear.weight for linear in three]), torch.cat([linear.bias for linear in three])
        )
        self.out, self.up, self.down = (Prepacked(linear.weight, linear.bias) for linear in (out, up, down))
        self.attended, self.fed = layer.attention.output.LayerNorm, layer.output.LayerNorm
