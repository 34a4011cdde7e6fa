"""SentenceTransformer.encode on the same texts, at the batch size that suits it best: stands beside `encoder.py`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

BATCHES = (16, 32, 64, 128, 256, 512, 1024)
FIRST_TEXTS = 64  # from which the rate is guessed


def best(
    folder: Path, device: str, dtype: torch.dtype, texts: Sequence[str], tokens: Sequence[int], seconds: float
) -> tuple[float, int]:
    """(tokens a second, texts in a batch), tokenizing included. tokens: of each text. seconds: of each batch size.

    It gets all texts of a measurement at once, and sorts them by length.
    """
    model = SentenceTransformer(str(folder), device=device, local_files_only=True, model_kwargs={"dtype": dtype})
    found: list[tuple[float, int]] = []
    for batch in BATCHES:
        if batch > len(texts):
            break
        try:
            first_s = _encode_s(model, texts[:FIRST_TEXTS], batch)
            count = max(batch, round(FIRST_TEXTS * seconds / first_s))
            found.append((sum(tokens[:count]) / _encode_s(model, texts[:count], batch), batch))
        except torch.OutOfMemoryError:
            break
    return max(found)


def _encode_s(model: SentenceTransformer, texts: Sequence[str], batch: int) -> float:
    start_s = time.perf_counter()
    model.encode([*texts], batch_size=batch, normalize_embeddings=True, show_progress_bar=False)
    return time.perf_counter() - start_s
