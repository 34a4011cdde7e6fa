"""The models that are deployed right now, as Serve's status tells it: there is no second list.

Serve is asked every second. A model that runs is asked once for its card and tokenizer; from then on requests reach it
through one cached handle. One that loads, sleeps, failed or went has its own answer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ReplicaState, ServeStatus

from serve_app.core.catalog import ModelCard, names_in
from serve_app.core.errors import ModelLoading, ModelNotFound, did_you_mean, shown
from serve_app.core.packing import Packed
from serve_app.core.schema import ModelState
from serve_app.core.settings import nearest
from serve_app.core.truncation import Tokenized
from serve_app.deployments.encoder import Description, OtherFingerprint
from serve_app.dispatch import Dispatcher, Encoded, Unit, UnitReply
from serve_app.encoders.tokenizer import Tokenizer, join
from serve_app.service import LiveModel

REFRESH_S = 1.0
SHORT_CHARACTERS = 4_096  # a request this short has a tokenizing thread of its own
SLICE_CHARACTERS = 32_768  # one turn in a tokenizing thread, about 20 ms: what one long request may delay another

logger = logging.getLogger(__name__)


class Threads:
    """Where tokenizing runs: a short text never waits behind a long one."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(1, thread_name_prefix="tokenize-short")
        self._long = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2), thread_name_prefix="tokenize-long")

    async def tokenize(self, tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenized:
        thread = self._short if sum(map(len, texts)) <= SHORT_CHARACTERS else self._long
        loop = asyncio.get_running_loop()
        return join([await loop.run_in_executor(thread, tokenizer, piece) for piece in _slices(texts)])


def _slices(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Consecutive pieces of at most `SLICE_CHARACTERS`; a longer text is a piece of its own."""
    first = size = 0
    for index, text in enumerate(texts):
        if size and size + len(text) > SLICE_CHARACTERS:
            yield texts[first:index]
            first, size = index, 0
        size += len(text)
    yield texts[first:]


class Ready:
    """A model that answers: see `service.LiveModel`."""

    def __init__(
        self, handle: DeploymentHandle, description: Description, threads: Threads, *, max_pending_tokens: int
    ) -> None:
        card = self.card = description.card
        self._handle = handle
        self._tokenizer = Tokenizer(description.tokenizer_json, card.max_tokens)
        self._threads = threads
        self.stale = False
        self.dispatcher = Dispatcher(
            self._send,
            fingerprint=card.fingerprint,
            dimensions=card.native_dimensions,
            unit_tokens=card.unit_tokens,
            unit_sequences=card.unit_sequences,
            max_pending_tokens=max_pending_tokens,
        )

    async def tokenize(self, texts: Sequence[str]) -> Tokenized:
        return await self._threads.tokenize(self._tokenizer, texts)

    async def encode(self, packed: Packed) -> Encoded:
        return await self.dispatcher.encode(packed)

    async def _send(self, unit: Unit) -> UnitReply:
        """To a replica that Serve chooses. Encoding is pure: what a dying replica lost is sent once more."""
        try:
            try:
                return await self._call(unit)
            except RayActorError:
                return await self._call(unit)
        except OtherFingerprint:
            self.stale = True
            raise ModelLoading(f"{self.card.name} is being replaced.", retry_after_s=REFRESH_S) from None
        except (DeploymentUnavailableError, RayServeException):
            self.stale = True
            raise ModelNotFound(f"{self.card.name} is not served any more.", param="model") from None

    async def _call(self, unit: Unit) -> UnitReply:
        response = self._handle.encode.remote(unit)
        try:
            reply: UnitReply = await response
            return reply
        except asyncio.CancelledError:
            response.cancel()  # nobody waits for it: it leaves the replica's gate, too
            raise


@dataclass(slots=True, kw_only=True)
class _Deployed:
    """One application that holds an encoder, whatever its state."""

    app: str
    id: str
    name: str
    status: ApplicationStatus = ApplicationStatus.NOT_STARTED
    deployed_at: float = 0.0
    replicas: int = 0
    model: Ready | None = None
    described_at: float = 0.0  # the `deployed_at` that `model` belongs to
    loading_since_s: float = field(default_factory=time.monotonic)
    asking: asyncio.Task[None] | None = None

    @property
    def state(self) -> str:
        healthy = self.status == ApplicationStatus.RUNNING
        if self.model is not None and (self.replicas or healthy):
            return "ready"  # also with no replica at all: it sleeps, and has answered before
        if self.status == ApplicationStatus.DEPLOY_FAILED:
            return "failed"
        return "asleep" if healthy and not self.replicas else "loading"


class LiveModels:
    """See `service.Models`. Lives in the ingress, on its event loop."""

    def __init__(self, *, max_pending_tokens: int) -> None:
        self._max_pending_tokens = max_pending_tokens
        self._threads = Threads()
        self._apps: dict[str, _Deployed] = {}
        self._names: dict[str, _Deployed] = {}  # lower case id or canonical name
        self._load_s: dict[str, float] = {}  # measured, by id

    def resolve(self, name: str) -> LiveModel:
        deployed = self._names.get(name.lower())
        if deployed is None:
            guess = nearest(name[:64], self._names)
            hint = did_you_mean(self._names[guess].id if guess else None)
            raise ModelNotFound(f"There is no model {shown(name)} here.{hint}", param="model")
        if deployed.model is not None:
            return deployed.model
        if deployed.state == "asleep":
            self._ask(deployed)  # a request is what wakes it
        what = "failed to start" if deployed.state == "failed" else "is loading"
        raise ModelLoading(f"{deployed.name} {what}.", param="model", retry_after_s=self._load_left_s(deployed))

    def cards(self) -> list[ModelCard]:
        return [deployed.model.card for deployed in self._apps.values() if deployed.model is not None]

    def states(self) -> dict[str, ModelState]:
        return {
            deployed.id: ModelState(
                state=deployed.state,
                replicas=deployed.replicas,
                pending_sequences=deployed.model.dispatcher.pending_sequences if deployed.model else 0,
            )
            for deployed in self._apps.values()
        }

    async def watch(self) -> None:
        """For ever: ask Serve, once a second. Serve not answering changes nothing that is known."""
        while True:
            try:
                self._learn(await asyncio.to_thread(serve.status))
            except Exception as error:
                logger.warning("Serve's status cannot be read now: %s", type(error).__name__)
            await asyncio.sleep(REFRESH_S)

    def _learn(self, status: ServeStatus) -> None:
        apps: dict[str, _Deployed] = {}
        for app, overview in sorted(status.applications.items()):
            if overview.status == ApplicationStatus.DELETING:
                continue
            if overview.status == ApplicationStatus.DEPLOY_FAILED and not overview.deployments:
                apps[app] = self._update(app, (app, app), overview, replicas=0)  # its entry was refused: no names
            for deployment, detail in overview.deployments.items():
                if names := names_in(deployment):
                    replicas = detail.replica_states.get(ReplicaState.RUNNING, 0)
                    apps[app] = self._update(app, names, overview, replicas=replicas)
        self._apps = apps
        self._names = {}
        for deployed in apps.values():
            for name in (deployed.id.lower(), deployed.name.lower()):
                if self._names.setdefault(name, deployed) is not deployed:
                    other = self._names[name]
                    logger.warning("%s is served by application %s; %s is ignored", name, other.app, deployed.app)

    def _update(
        self, app: str, names: tuple[str, str], overview: ApplicationStatusOverview, *, replicas: int
    ) -> _Deployed:
        deployed = self._apps.get(app)
        if deployed is None or (deployed.id, deployed.name) != names:
            deployed = _Deployed(app=app, id=names[0], name=names[1])
        deployed.status, deployed.deployed_at = overview.status, overview.last_deployed_time_s
        deployed.replicas = replicas
        if deployed.model is not None:
            deployed.model.dispatcher.replicas = deployed.replicas
        running = overview.status == ApplicationStatus.RUNNING and deployed.replicas
        known = deployed.model and not deployed.model.stale and deployed.described_at == deployed.deployed_at
        if running and not known:
            self._ask(deployed)
        return deployed

    def _ask(self, deployed: _Deployed) -> None:
        if deployed.asking is None or deployed.asking.done():
            deployed.asking = asyncio.create_task(self._describe(deployed))

    async def _describe(self, deployed: _Deployed) -> None:
        """Card and tokenizer, from any replica. By reference: a tokenizer may be larger than a message may."""
        deployed_at, watched = deployed.deployed_at, deployed.model is None
        try:
            handle = await asyncio.to_thread(serve.get_app_handle, deployed.app)
            description = await handle.options(_by_reference=True).describe.remote()
            model = await asyncio.to_thread(
                Ready, handle, description, self._threads, max_pending_tokens=self._max_pending_tokens
            )
        except Exception as error:  # it went, or broke: the next status tells, and asks again if need be
            logger.warning("%s did not describe itself: %s", deployed.id, type(error).__name__)
            return
        same = deployed.model is not None and deployed.model.card.fingerprint == model.card.fingerprint
        if not same or deployed.model is None:
            model.dispatcher.replicas = deployed.replicas
            deployed.model = model
        else:
            deployed.model.stale = False
        deployed.described_at = deployed_at
        if watched:
            self._load_s[deployed.id] = time.monotonic() - deployed.loading_since_s

    def _load_left_s(self, deployed: _Deployed) -> float:
        """From how long it took last time; the first time, as long again as it has been loading."""
        passed_s = time.monotonic() - deployed.loading_since_s
        return max(1.0, self._load_s.get(deployed.id, 2 * passed_s) - passed_s)
