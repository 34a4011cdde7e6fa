"""The service's builders around subclasses whose clocks can be stepped, one of which is watched, and one wrong.

The ingress appends a line to a journal before each computation for a key, and changes nothing else. The wrong actor
stores a reply first and its bill a moment later: the control, which the audit must find out.
"""

# No `from __future__ import annotations`: Serve validates `args` against the builder's annotation if it is a type.
import asyncio
import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve import Application

from chaosrun import clock
from serve_app import app
from serve_app.books import Claim
from serve_app.core.catalog import ModelCard
from serve_app.core.idempotency import Complete, Emit, Outcome, Settled, Step
from serve_app.core.packing import Packed, Share
from serve_app.core.replies import Reply
from serve_app.core.settings import IdempotencySettings, IngressSettings
from serve_app.core.truncation import Tokenized
from serve_app.deployments.idempotency import IdempotencyReplica
from serve_app.deployments.ingress import IngressReplica
from serve_app.deployments.models import LiveModels
from serve_app.deployments.usage import UsageReplica
from serve_app.dispatch import Encoded
from serve_app.service import Call, Job, LiveModel, Service
from serve_app.sinks.settings import UsageSettings
from serve_app.stores import Store

JOURNAL = "CHAOS_JOURNAL"  # in the environment of everything that the run starts: the file's path
TORN_S = 0.05  # between a reply and its bill, in the control


class WatchedModel:
    """A model that writes down when it starts to compute, and for which claim."""

    def __init__(self, model: LiveModel, claim: str, journal: int) -> None:
        self._model = model
        self._claim = claim
        self._journal = journal

    @property
    def card(self) -> ModelCard:
        return self._model.card

    async def tokenize(self, texts: Sequence[str]) -> Tokenized:
        return await self._model.tokenize(texts)

    async def tokenize_pairs(self, query: str, documents: Sequence[str], max_document_tokens: int | None) -> Tokenized:
        return await self._model.tokenize_pairs(query, documents, max_document_tokens)

    async def encode(self, packed: Packed, share: Share, *, no_store: bool) -> Encoded:
        # The monotonic clock is one for all processes of a machine. A short line is appended whole, and outlives us.
        os.write(self._journal, f"{self._claim} {time.monotonic_ns()}\n".encode())
        return await self._model.encode(packed, share, no_store=no_store)


class WatchedService(Service):
    journal: int

    async def _fulfil(self, call: Call, job: Job, claim: Claim) -> Reply:
        watched = dataclasses.replace(job, model=WatchedModel(job.model, claim.id, self.journal))
        return await super()._fulfil(call, watched, claim)


class WatchedIngress(IngressReplica):
    def __init__(self, settings: IngressSettings) -> None:
        clock.can_be_stepped()
        super().__init__(settings)

    def service(self, models: LiveModels, store: Store) -> Service:
        service = super().service(models, store)
        service.__class__ = WatchedService  # the product's own object, made as it makes it
        assert isinstance(service, WatchedService)
        service.journal = os.open(os.environ[JOURNAL], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return service


class TornStore:
    """A store without the one promise: reply and bill are two writes."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def run(self, steps: Sequence[Step]) -> list[Outcome]:
        bare = [dataclasses.replace(step, event=None) if isinstance(step, Complete) else step for step in steps]
        outcomes = await self._store.run(bare)
        bills = [
            Emit(event=step.event)
            for step, outcome in zip(steps, outcomes, strict=True)
            if isinstance(step, Complete) and isinstance(outcome, Settled) and step.event is not None
        ]
        if bills:
            await asyncio.sleep(TORN_S)
            await self._store.run(bills)
        return outcomes


class SteppedIdempotency(IdempotencyReplica):
    def __init__(self, *arguments: Any) -> None:
        clock.can_be_stepped()
        super().__init__(*arguments)


class SteppedUsage(UsageReplica):
    def __init__(self, settings: UsageSettings) -> None:
        clock.can_be_stepped()
        super().__init__(settings)


class TornIdempotency(SteppedIdempotency):
    async def store(self) -> Store:
        return TornStore(await super().store())


def ingress(settings: IngressSettings) -> Application:
    app._ingress = serve.deployment(serve.ingress()(WatchedIngress))  # in this process: the one that builds
    return app.ingress(settings)


def idempotency(settings: IdempotencySettings) -> Application:
    app._idempotency = serve.deployment(SteppedIdempotency)
    return app.idempotency(settings)


def usage(settings: UsageSettings) -> Application:
    app._usage = serve.deployment(SteppedUsage)
    return app.usage(settings)


def torn_idempotency(settings: IdempotencySettings) -> Application:
    app._idempotency = serve.deployment(TornIdempotency)
    return app.idempotency(settings)
