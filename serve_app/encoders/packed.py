"""The padding-free forward: all linear layers run over the tokens of a batch end to end, only attention sees bounds.

It plugs into transformers' attention registry under its own name: on a GPU that is one kernel (`varlen.py`); elsewhere
sequences are padded to the next multiple of 16, so that a batch of mixed lengths is a handful of matrix products.
Pooling and what follows it are the model's own modules, run over such buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from serve_app.core.packing import Packed, TokenIds, runs
from serve_app.core.vectors import Vectors
from serve_app.encoders import varlen
from serve_app.encoders.linear import fix_rows

ATTENTION = "packed"
BUCKET = 16  # tokens: finer buckets mean more kernels, coarser ones more padding (measured best of 1, 8, 16, 32)
# A row that pads costs what a real one does, however many they are; a number of rows that is new costs 2 to 4 ms, once.
FINE_STEP, FINE_ROWS, ROW_STEP = 8, 64, 16


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of about one length. `index` [count, padded] points into the packed row; `real` marks the tokens."""

    start: int
    tokens: int
    index: torch.Tensor
    real: torch.Tensor | None  # [count, padded], None if nothing is padded
    _seen: dict[tuple[bool, int | None], torch.Tensor | None] = field(default_factory=dict)

    def seen(self, *, causal: bool, window: int | None) -> torch.Tensor | None:
        """What each token attends to: bool, broadcast to [count, heads, padded, padded]. None = all, or all before it.

        window: only tokens nearer than that. Pads come last, so where tokens look back alone, none sees one.
        """
        window = None if window is None or window >= self.index.shape[1] else window
        if (causal, window) not in self._seen:  # layers of a kind share it
            self._seen[causal, window] = self._mask(causal=causal, window=window)
        return self._seen[causal, window]

    def _mask(self, *, causal: bool, window: int | None) -> torch.Tensor | None:
        real = None if self.real is None or causal else self.real[:, None, None, :]
        if window is None:
            return real
        at = torch.arange(self.index.shape[1], device=self.index.device)
        back = at[:, None] - at
        near = (back >= 0) & (back < window) if causal else back.abs() < window
        return near if real is None else near & real


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: None,
    *,
    buckets: list[Bucket],
    bounds: varlen.Bounds | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention inside each sequence. query, key, value: [1, heads, tokens, width] -> [1, tokens, heads, width]."""
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    causal = is_causal(module)
    if sliding_window is not None and not causal and getattr(module, "is_causal", False):
        sliding_window += 1  # of a decoder made an encoder transformers counts the window's last token in
    if bounds is not None and varlen.fits(rows[0], rows[1], sliding_window):
        attended = varlen.attend(rows[0], rows[1], rows[2], bounds, causal=causal, window=sliding_window, scale=scaling)
        return attended[None], None
    context = torch.zeros_like(rows[0])
    for bucket in buckets:
        q, k, v = (x[bucket.index].transpose(1, 2) for x in rows)
        seen = bucket.seen(causal=causal, window=sliding_window)
        attended = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=seen,
            is_causal=causal and seen is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        ).transpose(1, 2)
        context[bucket.start : bucket.start + bucket.tokens] = (
            attended.flatten(0, 1) if bucket.real is None else attended[bucket.real]
        )
    return context[None], None


def is_causal(layer: torch.nn.Module) -> bool:
    """Whether its tokens see only those before them. A configuration may make an encoder of what was a decoder."""
    return bool(getattr(layer, "is_causal", False)) and getattr(layer.config, "is_causal", True) is not False


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What goes through a transformer: sequences end to end, the shortest first. ids, positions, types: [1, rows]."""

    ids: torch.Tensor
    positions: torch.Tensor
    types: torch.Tensor | None  # of pairs alone
    lengths: Sequence[int]  # of the sequences; rows behind them are padding
    buckets: Sequence[Bucket]
    bounds: varlen.Bounds | None  # where one kernel may attend to all of them


class PackedForward:
    """`forward(Packed)` for one model on one device."""

    def __init__(self, model: Any, *, fixed_rows: bool, deterministic: bool = False) -> None:
        """model: a SentenceTransformer, or a Reranker, which looks like one.

        fixed_rows: pad the packed row to the next of some lengths; on a CPU each new one costs milliseconds once.

        deterministic: a sequence's vector is the same to the bit, whatever shares its unit. Every product has so many
        rows, and attention sees a sequence at a width that is its own.
        """
        if deterministic:
            fix_rows(model)
        transformer, *self._head = model
        self._transformer = transformer.auto_model
        self._device = model.device
        self._fixed_rows = fixed_rows
        self._deterministic = deterministic
        self._first_position = first_position(self._transformer)

    def __call__(self, packed: Packed) -> Vectors:
        """float32 [sequences, dimensions], in the order given."""
        order = np.argsort(packed.lengths, kind="stable")
        lengths = packed.lengths[order]
        starts = np.concatenate(([0], np.cumsum(packed.lengths)[:-1]))[order]
        total = int(lengths.sum())
        rows = self.computed_tokens(packed.lengths)
        offsets = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        chosen = np.repeat(starts, lengths) + offsets
        columns = np.zeros((3, 1, rows), np.int64)
        columns[0, 0, :total] = packed.ids[chosen]
        columns[1, 0, :total] = self._positions(columns[0, 0, :total], lengths, offsets)
        if packed.firsts is not None:
            columns[2, 0, :total] = packed.types()[chosen]
        ids, positions, types = self._tensor(columns)
        tokens = Tokens(
            ids=ids,
            positions=positions + self._first_position,
            types=None if packed.firsts is None else types,
            lengths=lengths.tolist(),
            buckets=self._buckets(lengths),
            bounds=self._bounds(lengths),
        )
        hidden = self._through(tokens)
        pooled = torch.cat([self._pool(hidden, bucket) for bucket in tokens.buckets])
        vectors = np.empty(pooled.shape, np.float32)
        vectors[order] = pooled.cpu().numpy()
        return vectors

    def computed_tokens(self, lengths: TokenIds) -> int:
        """By the linear layers; attention pads a little more."""
        tokens = int(lengths.sum())
        return rows_for(tokens) if self._fixed_rows else tokens

    def _through(self, tokens: Tokens) -> torch.Tensor:
        """[rows, width]: the last hidden states."""
        hidden: torch.Tensor = self._transformer(
            input_ids=tokens.ids,
            position_ids=tokens.positions,
            attention_mask=None,
            buckets=tokens.buckets,
            bounds=tokens.bounds,
            **({} if tokens.types is None else {"token_type_ids": tokens.types}),
        ).last_hidden_state[0]
        return hidden

    def _positions(
        self, ids: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """Of each token in its sequence. RoBERTa and its kin skip padding tokens: a text may quote one."""
        padding = ids == self._first_position - 1
        if not padding.any():
            return offsets
        skipped = np.cumsum(padding)
        before = np.repeat((skipped - padding)[np.cumsum(lengths) - lengths], lengths)
        return np.where(padding, -1, offsets - (skipped - before))

    def _buckets(self, lengths: np.ndarray[Any, np.dtype[np.int32]]) -> list[Bucket]:
        places, indexes, masks, start = [], [], [], 0
        for first, count in runs(lengths.tolist(), BUCKET):
            mine = lengths[first : first + count]
            widest = math.ceil(mine.max() / BUCKET) * BUCKET if self._deterministic else mine.max()
            tokens, column = int(mine.sum()), np.arange(widest)
            real = column < mine[:, None]
            places.append((start, tokens))
            indexes.append(start + (np.cumsum(mine) - mine)[:, None] + np.where(real, column, 0))
            masks.append(real)
            start += tokens
        # A bucket that happens to be full has a mask, too, if bits count: without one another kernel may be chosen.
        return [
            Bucket(start, tokens, index, None if real.all() and not self._deterministic else mask)
            for (start, tokens), index, real, mask in zip(
                places, self._tensors(indexes), masks, self._tensors(masks), strict=True
            )
        ]

    def _bounds(self, lengths: np.ndarray[Any, np.dtype[np.int32]]) -> varlen.Bounds | None:
        """None where the row is padded, or where bits count: how a kernel cuts a sequence may depend on the others."""
        if self._fixed_rows or self._deterministic:
            return None
        starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        return varlen.Bounds(self._tensor(starts), int(lengths.max()))

    def _pool(self, hidden: torch.Tensor, bucket: Bucket) -> torch.Tensor:
        """The model's own pooling or score, and what follows it, in float32."""
        embeddings = hidden[bucket.index].float()
        mask = torch.ones(bucket.index.shape, device=hidden.device) if bucket.real is None else bucket.real.float()
        features = {"token_embeddings": embeddings, "attention_mask": mask}
        for module in self._head:
            features = module(features)
        return features["sentence_embedding"]

    def _tensors(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[torch.Tensor]:
        """In one copy."""
        flat = self._tensor(np.concatenate([array.ravel() for array in arrays]))
        parts = torch.split(flat, [array.size for array in arrays])
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def _tensor(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()  # or the copy waits for all that the GPU still has to do
        return tensor.to(self._device, non_blocking=True)


def first_position(transformer: torch.nn.Module) -> int:
    """0, but RoBERTa and its kin count positions from behind their padding index."""
    table = getattr(getattr(transformer, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def rows_for(tokens: int) -> int:
    """The fixed row count that holds so many tokens."""
    step = FINE_STEP if tokens <= FINE_ROWS else ROW_STEP
    return math.ceil(tokens / step) * step
