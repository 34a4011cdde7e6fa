"""The Encoder protocol and `open_encoder`: the one folder that knows torch.

An encoder turns packed token ids into unit vectors and knows what its model's files say; batching, HTTP and Ray are
elsewhere. `packed.py` is the padding-free one; what cannot take it falls back to `sentence-transformers` itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from serve_app.core.catalog import ModelCard, ModelSpec
from serve_app.core.packing import Packed, TokenIds
from serve_app.core.vectors import Vectors

SAME_LOGIT = 0.25  # what a reranker's may differ by from batch to batch, in bfloat16; another model's differs by more


def logits_apart(found: Vectors, expected: Vectors) -> float:
    """The largest difference between the logits of two sets of scores: near 0 and 1 all scores are alike."""
    one, other = (scores.astype(np.float64).clip(1e-7, 1 - 1e-7) for scores in (found, expected))
    return float(np.abs(np.log(one / (1 - one)) - np.log(other / (1 - other))).max())


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """Bytes: what tensors take, and what PyTorch holds for more of them."""

    allocated: int
    reserved: int


class Encoder(Protocol):
    @property
    def card(self) -> ModelCard: ...

    @property
    def tokenizer_json(self) -> str:
        """The fast tokenizer, whole: `Tokenizer.from_str` reads it."""
        ...

    @property
    def weights(self) -> dict[str, str]:
        """SHA-256 of each weight file, by its path."""
        ...

    def computed_tokens(self, lengths: TokenIds) -> int:
        """What `encode` computes of sequences of these lengths: their tokens, and those that are padding."""
        ...

    def gpu_memory(self) -> GpuMemory | None:
        """Of this process, on its GPU; None on a CPU."""
        ...

    def encode(self, packed: Packed) -> Vectors:
        """float32 [sequences, native dimensions], finite; the same whatever shares the batch.

        Of a model that embeds: of unit length. Of one that ranks: [pairs, 1], the score, 0 to 1.

        Blocking; several threads may call it at once. Raises RuntimeError, or MemoryError when a GPU has too little.
        """
        ...


def open_encoder(spec: ModelSpec) -> Encoder:
    """Load the model that the entry names, check it against its own files, and warm it up: ready when this returns.

    Raises ValueError with both values where the entry contradicts the files, OSError where the files are missing.
    """
    from serve_app.encoders.loading import load  # torch takes seconds: only who encodes pays

    return load(spec)
