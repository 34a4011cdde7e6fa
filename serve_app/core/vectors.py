"""Rows of float32 to JSON bytes, without one Python object per number.

The same rows give the same bytes, always: a stored reply is rendered again from its vectors.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


def cut(vectors: Vectors, dimensions: int) -> Vectors:
    """[n, native] -> [n, dimensions], unit length again (Matryoshka; float32 throughout)."""
    if dimensions == vectors.shape[1]:
        return vectors
    kept = vectors[:, :dimensions]
    return np.ascontiguousarray(kept / np.linalg.norm(kept, axis=1, keepdims=True).clip(min=1e-12))


def render(
    vectors: Vectors, *, model: str, usage: dict[str, Any], encoding_format: Literal["float", "base64"]
) -> bytes:
    """The body of a 200 to `POST /v1/embeddings`. vectors: [n, dimensions], C-contiguous, finite."""
    import orjson  # who only makes vectors needs none

    rows = (
        (b64encode(row).decode("ascii") for row in _little_endian(vectors)) if encoding_format == "base64" else vectors
    )
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    reply = {"object": "list", "data": data, "model": model, "usage": usage}
    return orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)


def _little_endian(vectors: Vectors) -> Vectors:
    return vectors.astype("<f4", copy=False)
