"""One request, top to bottom: the file to read first.

Every step is a call that returns a value or raises an error of `core/errors.py`; nobody calls back up. `api.py` above
it speaks HTTP; below it are the live models (`Models`, filled in by `deployments/`) and everything in `core/`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from serve_app.core import schema, vectors
from serve_app.core.catalog import ModelCard, check_dimensions, check_strings, check_tokens
from serve_app.core.errors import RequestTimeout
from serve_app.core.packing import Packed
from serve_app.core.truncation import Tokenized
from serve_app.dispatch import Encoded


class LiveModel(Protocol):
    """A model that answers."""

    @property
    def card(self) -> ModelCard: ...

    async def tokenize(self, texts: Sequence[str]) -> Tokenized: ...

    async def encode(self, packed: Packed) -> Encoded: ...


class Models(Protocol):
    """The models that are deployed right now."""

    def resolve(self, name: str) -> LiveModel:
        """By id or canonical name, in any case. Raises ModelNotFound or ModelLoading."""
        ...

    def cards(self) -> list[ModelCard]:
        """Of all models that answer."""
        ...

    def states(self) -> dict[str, schema.ModelState]:
        """Of all models that are deployed, by id."""
        ...


@dataclass(slots=True, kw_only=True)
class Call:
    """What is known of one HTTP request so far: its response headers tell it, whether it succeeds or fails."""

    request_id: str
    started_s: float
    fingerprint: str | None = None
    tokenize_s: float | None = None
    queue_s: float | None = None
    compute_s: float | None = None


class Service:
    def __init__(self, models: Models, *, request_timeout_s: float) -> None:
        self._models = models
        self._request_timeout_s = request_timeout_s

    @asynccontextmanager
    async def deadline(self) -> AsyncIterator[None]:
        """Around a whole request, its body's arrival included. Raises RequestTimeout; what was begun is dropped."""
        try:
            async with asyncio.timeout(self._request_timeout_s):
                yield
        except TimeoutError:
            raise RequestTimeout(f"No answer within {self._request_timeout_s:g} s; the work was dropped.") from None

    # A key is checked, its rate charged and a replay looked up between these steps once the service has keys: before
    # `parse` (key, rate) and before `_tokenize` (replay). Settling the bill is the step after `_encode`.

    async def embed(self, call: Call, body: bytes) -> bytes:
        """`POST /v1/embeddings`: the response's body."""
        request = schema.parse(schema.EmbeddingsRequest, body)
        model = self._resolve(call, request.model)
        dimensions = check_dimensions(model.card, request.dimensions)
        tokenized = await self._tokenize(call, model, request.input)
        check_tokens(model.card, tokenized.packed.tokens)
        encoded = await self._encode(call, model, tokenized)
        return vectors.render(
            vectors.cut(encoded.vectors, dimensions),
            model=model.card.name,
            usage=tokenized.usage(),
            encoding_format=request.encoding_format,
        )

    async def tokenize(self, call: Call, body: bytes) -> dict[str, Any]:
        """`POST /v1/tokenize`: the exact billable count, before sending."""
        request = schema.parse(schema.TokenizeRequest, body)
        model = self._resolve(call, request.model)
        tokenized = await self._tokenize(call, model, request.input)
        counts, usage = tokenized.counts(), tokenized.usage()
        return {"object": "list", "data": counts, "model": model.card.name, "usage": usage}

    def list_models(self) -> dict[str, Any]:
        """`GET /v1/models`."""
        return {"object": "list", "data": [_model(card, card.id) for card in self._models.cards()]}

    def retrieve_model(self, call: Call, name: str) -> dict[str, Any]:
        """`GET /v1/models/{id}`: answers under the name that was asked for."""
        return _model(self._resolve(call, name).card, name)

    def readiness(self) -> dict[str, Any]:
        """`GET /ready`: ready = at least one model is deployed, and every one answered its self-test or sleeps."""
        states = self._models.states()
        ready = bool(states) and all(state.state in ("ready", "asleep") for state in states.values())
        return {
            "status": "ready" if ready else "not_ready",
            "models": {id: state.model_dump() for id, state in states.items()},
        }

    def _resolve(self, call: Call, name: str) -> LiveModel:
        model = self._models.resolve(name)
        call.fingerprint = model.card.fingerprint
        return model

    async def _tokenize(self, call: Call, model: LiveModel, texts: Sequence[str]) -> Tokenized:
        check_strings(model.card, len(texts))
        started_s = time.perf_counter()
        tokenized = await model.tokenize(texts)
        call.tokenize_s = time.perf_counter() - started_s
        return tokenized

    async def _encode(self, call: Call, model: LiveModel, tokenized: Tokenized) -> Encoded:
        encoded = await model.encode(tokenized.packed)
        call.queue_s, call.compute_s = encoded.queue_s, encoded.compute_s
        return encoded


def _model(card: ModelCard, id: str) -> dict[str, Any]:
    return {
        "id": id,
        "object": "model",
        "created": card.created,
        "owned_by": card.name.partition("/")[0],
        "canonical_name": card.name,
        "dimensions": card.native_dimensions,
        "max_tokens": card.max_tokens,
    }
