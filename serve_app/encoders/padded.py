"""The fallback forward: sentence-transformers' own, over padded batches. For what `packed.py` cannot run."""

from __future__ import annotations

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch.nn import functional

from serve_app.core.packing import Packed
from serve_app.core.vectors import Vectors

BATCH = 32  # sequences, neighbours in length: sentence-transformers' own default


class PaddedForward:
    def __init__(self, model: SentenceTransformer, *, alone: bool = False) -> None:
        """alone: each sequence in a batch of its own, so that no other one has to do with its vector."""
        self._model = model
        self._batch = 1 if alone else BATCH
        self._padding = model.tokenizer.pad_token_id or 0

    def __call__(self, packed: Packed) -> Vectors:
        """float32 [sequences, dimensions], unit length, in the order given."""
        sequences = np.split(packed.ids, np.cumsum(packed.lengths)[:-1])
        order = np.argsort(packed.lengths, kind="stable")
        rows: dict[int, torch.Tensor] = {}
        for first in range(0, len(order), self._batch):
            batch = order[first : first + self._batch]
            rows.update(zip(batch.tolist(), self._forward([sequences[index] for index in batch]), strict=True))
        return np.stack([rows[index].numpy() for index in range(len(sequences))])

    def _forward(self, sequences: list[np.ndarray[tuple[int], np.dtype[np.int32]]]) -> torch.Tensor:
        longest = max(map(len, sequences))
        ids = np.full((len(sequences), longest), self._padding, np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
        features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        transformer, *head = self._model
        output = transformer({name: tensor.to(self._model.device) for name, tensor in features.items()})
        output["token_embeddings"] = output["token_embeddings"].float()  # the heads are kept in float32
        for module in head:
            output = module(output)
        return functional.normalize(output["sentence_embedding"]).cpu()
