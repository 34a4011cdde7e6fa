"""A reply as a value, vectors or scores: rendered once for its caller, and again, byte for byte, for a replay.

What is kept is the vectors' float32 bytes and the few words around them: a half to a quarter of the rendered JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import orjson

from serve_app.core import vectors
from serve_app.core.vectors import Vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """vectors: float32 [inputs, dimensions], as they are sent; [documents, 1] if they are scores."""

    vectors: Vectors
    model: str
    usage: dict[str, Any]
    encoding_format: Literal["float", "base64"]
    fingerprint: str
    request_id: str  # of the first call

    def render(self) -> bytes:
        """The body of the response to `POST /v1/embeddings`. That of scores is made by `ranking.render`."""
        return vectors.render(self.vectors, model=self.model, usage=self.usage, encoding_format=self.encoding_format)

    def pack(self) -> bytes:
        """A line of JSON, then the vectors."""
        head = {
            "shape": self.vectors.shape,
            "model": self.model,
            "usage": self.usage,
            "encoding_format": self.encoding_format,
            "fingerprint": self.fingerprint,
            "request_id": self.request_id,
        }
        return orjson.dumps(head) + b"\n" + self.vectors.astype("<f4", copy=False).tobytes()

    @classmethod
    def unpack(cls, packed: bytes) -> Reply:
        """Raises ValueError on what `pack` did not make."""
        line, _, rows = packed.partition(b"\n")
        try:
            head = orjson.loads(line)
            inputs, dimensions = head.pop("shape")
            if len(rows) != 4 * inputs * dimensions:
                raise ValueError("a stored reply is cut short")
            vectors = np.frombuffer(rows, "<f4").reshape(inputs, dimensions).astype(np.float32, copy=False)
            return cls(vectors=vectors, **head)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("not a stored reply") from error
