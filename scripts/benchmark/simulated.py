"""Encoder replicas on devices that are all alike: a forward is a sleep, so that as many of them as wanted fit here.

All else is the product's own: replica, gates, batches and what they tell. `scaling.py` measures with them.
"""

# No `from __future__ import annotations`: Serve validates `args` against the builder's annotation if it is a type.
import hashlib
import threading
import time
from typing import Annotated

import numpy as np
from pydantic import Field
from ray import serve
from ray.serve import Application

from serve_app import app
from serve_app.core.catalog import ModelCard, ModelSpec
from serve_app.core.packing import Packed
from serve_app.core.vectors import Vectors
from serve_app.deployments import encoder
from serve_app.deployments.encoder import EncoderReplica
from serve_app.encoders import GpuMemory
from serve_app.encoders.sources import fetch

DIMENSIONS = 384


class SimulatedSpec(ModelSpec):
    """A model entry, and what a forward of it costs. Its `source` is where the tokenizer is from."""

    forward_s: Annotated[float, Field(ge=0)] = 0.0
    token_s: Annotated[float, Field(ge=0)] = 0.0


class Simulated:
    """An Encoder. Its device computes one unit at a time, whichever lane it is from."""

    def __init__(self, spec: SimulatedSpec) -> None:
        self._spec = spec
        self._device = threading.Lock()
        self.tokenizer_json = (fetch(spec) / "tokenizer.json").read_text()
        self.weights: dict[str, str] = {}
        self.card = ModelCard(
            id=spec.id,
            name=spec.name,
            size_class=spec.size_class,
            native_dimensions=DIMENSIONS,
            other_dimensions=(),
            max_tokens=spec.max_tokens or 512,
            unit_tokens=spec.unit_tokens or 4096,
            dtype="float32",
            created=int(time.time()),
            fingerprint=hashlib.sha256(spec.id.encode()).hexdigest()[:12],
            units_at_once=1,  # as on a GPU
        )

    def computed_tokens(self, packed: Packed) -> int:
        return packed.tokens

    def gpu_memory(self) -> GpuMemory | None:
        return None

    def encode(self, packed: Packed) -> Vectors:
        """Unit vectors that depend on a sequence's first and last token and its length alone."""
        cost_s = self._spec.forward_s + self._spec.token_s * packed.tokens
        if cost_s:
            with self._device:
                time.sleep(cost_s)  # without the interpreter's lock, as a GPU would
        ends = np.cumsum(packed.lengths)
        vectors = np.zeros((len(packed.lengths), DIMENSIONS), np.float32)
        vectors[:, 0] = 1 + packed.lengths
        vectors[:, 1] = packed.ids[ends - packed.lengths]
        vectors[:, 2] = packed.ids[ends - 1]
        rows: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return rows


class SimulatedReplica(EncoderReplica):
    def __init__(self, spec: SimulatedSpec) -> None:
        # In this process, which has this replica alone.
        encoder.open_encoder = Simulated  # type: ignore[assignment, attr-defined]
        super().__init__(spec)


def model(spec: SimulatedSpec) -> Application:
    app._encoder = serve.deployment(SimulatedReplica)  # in this process: the one that builds
    return app.model(spec)
