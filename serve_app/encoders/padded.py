"""The fallback forward: sentence-transformers' own, over padded batches. For what `packed.py` cannot run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from serve_app.core.packing import Packed, TokenIds
from serve_app.core.vectors import Vectors

Row = np.ndarray[Any, np.dtype[np.int32]]

BATCH = 32  # sequences, neighbours in length: sentence-transformers' own default


class PaddedForward:
    def __init__(self, model: Any, *, alone: bool = False) -> None:
        """alone: each sequence in a batch of its own, so that no other one has to do with its vector."""
        self._model = model
        self._batch = 1 if alone else BATCH
        self._padding = model.tokenizer.pad_token_id or 0

    def __call__(self, packed: Packed) -> Vectors:
        """float32 [sequences, dimensions], in the order given."""
        ends = np.cumsum(packed.lengths)[:-1]
        sequences = np.split(packed.ids, ends)
        types = None if packed.firsts is None else np.split(packed.types(), ends)
        order = np.argsort(packed.lengths, kind="stable")
        rows: dict[int, torch.Tensor] = {}
        for first in range(0, len(order), self._batch):
            batch = order[first : first + self._batch]
            vectors = self._forward([sequences[index] for index in batch], types and [types[index] for index in batch])
            rows.update(zip(batch.tolist(), vectors, strict=True))
        return np.stack([rows[index].numpy() for index in range(len(sequences))])

    def computed_tokens(self, lengths: TokenIds) -> int:
        lengths = np.sort(lengths)
        batches = [lengths[first : first + self._batch] for first in range(0, len(lengths), self._batch)]
        return sum(len(batch) * int(batch[-1]) for batch in batches)

    def _forward(self, sequences: list[Row], types: list[Row] | None) -> torch.Tensor:
        longest = max(map(len, sequences))
        ids = np.full((len(sequences), longest), self._padding, np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
        features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if types is not None:
            padded = np.zeros_like(ids)
            for row, of_one in enumerate(types):
                padded[row, : len(of_one)] = of_one
            features["token_type_ids"] = torch.from_numpy(padded)
        transformer, *head = self._model
        output = transformer({name: tensor.to(self._model.device) for name, tensor in features.items()})
        output["token_embeddings"] = output["token_embeddings"].float()  # the heads are kept in float32
        for module in head:
            output = module(output)
        embeddings: torch.Tensor = output["sentence_embedding"]
        return embeddings.cpu()
