"""One live model, seen from the ingress: its tokenizer, its queue, and the handle to its replicas.

What went wrong on the way to a replica becomes an error of `core/errors.py` here, and nowhere else. `models.py` decides
which models there are.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve_app.core.catalog import ModelCard, check_tokens
from serve_app.core.errors import AtCapacity, InternalError, ModelLoading, ModelNotFound
from serve_app.core.known import Task
from serve_app.core.metrics import IngressMetrics
from serve_app.core.packing import Packed, Share
from serve_app.core.truncation import Tokenized
from serve_app.deployments.encoder import Description, OtherFingerprint
from serve_app.dispatch import Dispatcher, Encoded, Unit, UnitReply
from serve_app.encoders.tokenizer import PairTokenizer, Tokenizer, join
from serve_app.recall import Answered, Recall

REPLACED_S = 1.0  # after a replica of another kind has answered: the next look at Serve's status is due by then
TINY_CHARACTERS = 512  # a request this short takes at most 0.1 ms: less than the way to a thread and back
SHORT_CHARACTERS = 4_096  # a request this short has a tokenizing thread of its own
SLICE_CHARACTERS = 32_768  # one turn in a tokenizing thread, about 20 ms; a longer text has a thread apart


class Threads:
    """Where tokenizing runs: a short request never waits behind a long one, nor that behind one endless text.

    What is less work than handing it over is done at once.
    """

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(1, thread_name_prefix="tokenize-short")
        self._long = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2), thread_name_prefix="tokenize-long")
        self._endless = ThreadPoolExecutor(1, thread_name_prefix="tokenize-endless")

    async def tokenize(self, tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenized:
        return await self._in_slices(tokenizer, texts, beside=0)

    async def tokenize_pairs(
        self,
        tokenizer: PairTokenizer,
        card: ModelCard,
        query: str,
        documents: Sequence[str],
        max_document_tokens: int | None,
    ) -> Tokenized:
        """Raises TooManyTokens before a document is looked at, if the query is too long for so many."""
        if len(query) <= TINY_CHARACTERS:
            pairs = tokenizer.query(query, max_document_tokens)
        else:
            thread = self._thread_for([query], short=len(query) <= SHORT_CHARACTERS)
            loop = asyncio.get_running_loop()
            pairs = await loop.run_in_executor(thread, tokenizer.query, query, max_document_tokens)
        check_tokens(card, len(documents) * pairs.least_tokens, param="query")
        return await self._in_slices(pairs, documents, beside=len(query))

    async def _in_slices(
        self, tokenizer: Callable[[Sequence[str]], Tokenized], texts: Sequence[str], *, beside: int
    ) -> Tokenized:
        """beside: characters that come with each text."""
        characters = sum(map(len, texts)) + beside * len(texts)
        if characters <= TINY_CHARACTERS:
            return tokenizer(texts)
        loop = asyncio.get_running_loop()
        parts = [
            await loop.run_in_executor(self._thread_for(piece, short=characters <= SHORT_CHARACTERS), tokenizer, piece)
            for piece in _slices(texts, beside)
        ]
        return join(parts)

    def _thread_for(self, piece: Sequence[str], *, short: bool) -> ThreadPoolExecutor:
        endless = len(piece) == 1 and len(piece[0]) > SLICE_CHARACTERS  # it cannot be sliced: its count is exact
        return self._endless if endless else self._short if short else self._long


def _slices(texts: Sequence[str], beside: int) -> Iterator[Sequence[str]]:
    """Consecutive pieces of at most `SLICE_CHARACTERS`; a longer text is a piece of its own."""
    first = size = 0
    for index, text in enumerate(texts):
        length = len(text) + beside
        if size and size + length > SLICE_CHARACTERS:
            yield texts[first:index]
            first, size = index, 0
        size += length
    yield texts[first:]


class Ready:
    """A model that answers: see `service.LiveModel`."""

    def __init__(
        self,
        handle: DeploymentHandle,
        description: Description,
        threads: Threads,
        *,
        is_deployed: Callable[[], Awaitable[bool]],
        max_pending_tokens: int,
        max_workspace_tokens: int,
        metrics: IngressMetrics,
    ) -> None:
        card = self.card = description.card
        self._handle = handle
        self._is_deployed = is_deployed
        kind = PairTokenizer if card.task is Task.RERANK else Tokenizer
        self._tokenizer: Any = kind(description.tokenizer_json, card.max_tokens)
        self._threads = threads
        self._metrics = metrics
        self.stale = False
        self.dispatcher = Dispatcher(
            self._send,
            fingerprint=card.fingerprint,
            dimensions=card.native_dimensions,
            unit_tokens=card.unit_tokens,
            unit_sequences=card.unit_sequences,
            at_once=lambda express: card.at_once(express=express),
            max_pending_tokens=max_pending_tokens,
            max_workspace_tokens=max_workspace_tokens,
        )
        self._recall = Recall(self.dispatcher.encode, cache_bytes=card.cache_bytes, count=self._answered)

    async def tokenize(self, texts: Sequence[str]) -> Tokenized:
        return await self._threads.tokenize(self._tokenizer, texts)

    async def tokenize_pairs(self, query: str, documents: Sequence[str], max_document_tokens: int | None) -> Tokenized:
        return await self._threads.tokenize_pairs(self._tokenizer, self.card, query, documents, max_document_tokens)

    async def encode(self, packed: Packed, share: Share, *, no_store: bool) -> Encoded:
        return await self._recall.encode(packed, share, no_store=no_store)

    @property
    def cache_bytes(self) -> int:
        """What cached vectors take now."""
        return self._recall.bytes

    def gone(self) -> None:
        """No replica is left, not even one that drains: Serve's handle would let what is under way wait for ever."""
        self.dispatcher.abandon(ModelNotFound(f"{self.card.name} is not served any more.", param="model"))

    def _answered(self, how: Answered, texts: int) -> None:
        self._metrics.texts.add(self.card.name, how.value, by=texts)

    async def _send(self, unit: Unit) -> UnitReply:
        """To a replica that Serve chooses. Encoding is pure: what one replica could not do, another is asked once."""
        try:
            return await self._call(unit)
        except (RayActorError, OtherFingerprint) as error:
            self.stale = self.stale or isinstance(error, OtherFingerprint)
        try:
            return await self._call(unit)
        except RayActorError:
            raise InternalError("Two replicas of the model died with this request.") from None
        except OtherFingerprint:
            raise ModelLoading(f"{self.card.name} is being replaced.", retry_after_s=REPLACED_S) from None

    async def _call(self, unit: Unit) -> UnitReply:
        response = self._handle.encode.remote(unit)
        try:
            reply: UnitReply = await response
        except asyncio.CancelledError:
            response.cancel()  # nobody waits for it: it leaves the replica's gate, too
            raise
        except BackPressureError as error:
            raise AtCapacity("The model's replicas are full.", retry_after_s=error.retry_after_s or 1.0) from None
        except DeploymentUnavailableError:
            if await self._is_deployed():
                raise ModelLoading(f"{self.card.name} is not up.", param="model", retry_after_s=REPLACED_S) from None
            raise ModelNotFound(f"{self.card.name} is not served any more.", param="model") from None
        return reply
