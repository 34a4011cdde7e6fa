"""The models that are deployed right now, as Serve's status tells it: there is no second list.

Serve is asked every second. A model that runs is asked once for its card and tokenizer; from then on requests reach it
through one cached handle. One that loads, sleeps, failed or went has its own answer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ReplicaState, ServeStatus

from serve_app.core.catalog import ModelCard, names_in
from serve_app.core.errors import AtCapacity, InternalError, ModelLoading, ModelNotFound, did_you_mean, shown
from serve_app.core.packing import Packed
from serve_app.core.schema import ModelState
from serve_app.core.settings import nearest
from serve_app.core.truncation import Tokenized
from serve_app.deployments.encoder import Description, OtherFingerprint
from serve_app.dispatch import Dispatcher, Encoded, Unit, UnitReply
from serve_app.encoders.tokenizer import Tokenizer, join
from serve_app.service import LiveModel

REFRESH_S = 1.0
START_S = 10.0  # what a new ingress replica waits for the models' cards before it takes requests
SHORT_CHARACTERS = 4_096  # a request this short has a tokenizing thread of its own
SLICE_CHARACTERS = 32_768  # one turn in a tokenizing thread, about 20 ms; a longer text has a thread apart

logger = logging.getLogger(__name__)


class Threads:
    """Where tokenizing runs: a short request never waits behind a long one, nor that behind one endless text."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(1, thread_name_prefix="tokenize-short")
        self._long = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2), thread_name_prefix="tokenize-long")
        self._endless = ThreadPoolExecutor(1, thread_name_prefix="tokenize-endless")

    async def tokenize(self, tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenized:
        loop, short = asyncio.get_running_loop(), sum(map(len, texts)) <= SHORT_CHARACTERS
        parts = []
        for piece in _slices(texts):
            endless = len(piece) == 1 and len(piece[0]) > SLICE_CHARACTERS  # it cannot be sliced: its count is exact
            thread = self._endless if endless else self._short if short else self._long
            parts.append(await loop.run_in_executor(thread, tokenizer, piece))
        return join(parts)


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
        self,
        handle: DeploymentHandle,
        description: Description,
        threads: Threads,
        *,
        is_deployed: Callable[[], Awaitable[bool]],
        max_pending_tokens: int,
    ) -> None:
        card = self.card = description.card
        self._handle = handle
        self._is_deployed = is_deployed
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
            raise ModelLoading(f"{self.card.name} is being replaced.", retry_after_s=REFRESH_S) from None

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
                raise ModelLoading(f"{self.card.name} is not up.", param="model", retry_after_s=REFRESH_S) from None
            raise ModelNotFound(f"{self.card.name} is not served any more.", param="model") from None
        return reply


@dataclass(slots=True, kw_only=True)
class _Deployed:
    """One application that holds an encoder, whatever its state."""

    app: str
    id: str
    name: str
    status: ApplicationStatus = ApplicationStatus.NOT_STARTED
    version: tuple[float, bool] = (0.0, False)  # when it was deployed last, and whether that is done
    replicas: int = 0
    model: Ready | None = None
    described: tuple[float, bool] | None = None  # the `version` that `model` belongs to
    loading_since_s: float | None = None  # None: nobody saw it load
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
        self._apps: dict[str, _Deployed] | None = None  # None: Serve has not been heard yet
        self._names: dict[str, _Deployed] = {}  # lower case id or canonical name
        self._load_s: dict[str, float] = {}  # measured, by id

    def resolve(self, name: str) -> LiveModel:
        if self._apps is None:
            raise ModelLoading("The service is starting.", param="model", retry_after_s=REFRESH_S)
        deployed = self._names.get(name.lower())
        if deployed is None:
            guess = nearest(name[:64], self._names)
            hint = did_you_mean(self._names[guess].id if guess else None)
            raise ModelNotFound(f"There is no model {shown(name)} here.{hint}", param="model")
        if deployed.model is not None:
            return deployed.model
        if deployed.state == "asleep":
            self._wake(deployed)
        what = "failed to start" if deployed.state == "failed" else "is loading"
        raise ModelLoading(f"{deployed.name} {what}.", param="model", retry_after_s=self._load_left_s(deployed))

    def cards(self) -> list[ModelCard]:
        return [deployed.model.card for deployed in (self._apps or {}).values() if deployed.model is not None]

    def states(self) -> dict[str, ModelState]:
        return {
            deployed.id: ModelState(
                state=deployed.state,
                replicas=deployed.replicas,
                pending_sequences=deployed.model.dispatcher.pending_sequences if deployed.model else 0,
            )
            for deployed in (self._apps or {}).values()
        }

    async def start(self) -> None:
        """Before the first request: what is deployed, and the cards of what runs, if they come soon."""
        await self._refresh()
        if asking := [deployed.asking for deployed in (self._apps or {}).values() if deployed.asking]:
            await asyncio.wait(asking, timeout=START_S)

    async def watch(self) -> None:
        """For ever: ask Serve, once a second."""
        while True:
            await asyncio.sleep(REFRESH_S)
            await self._refresh()

    async def _refresh(self) -> None:
        """Serve not answering changes nothing that is known."""
        try:
            self.learn(await asyncio.to_thread(serve.status))
        except Exception as error:
            logger.warning("Serve's status cannot be read now: %s", type(error).__name__)

    def learn(self, status: ServeStatus) -> None:
        """What Serve says is deployed now. A model that is known stays known while Serve rebuilds its application."""
        before, apps = self._apps or {}, dict[str, _Deployed]()
        for app, overview in sorted(status.applications.items()):
            if overview.status == ApplicationStatus.DELETING:
                continue
            found = [(names_in(name), detail) for name, detail in overview.deployments.items()]
            for names, detail in found:
                if names:
                    known = before.get(app)
                    same = known is not None and (known.id, known.name) == names
                    apps[app] = known if known and same else _Deployed(app=app, id=names[0], name=names[1])
                    apps[app].replicas = detail.replica_states.get(ReplicaState.RUNNING, 0)
            if not found and app in before:
                apps[app] = before[app]  # being rebuilt, or refused: the replicas that run go on
            if app in apps:
                self._update(apps[app], overview)
        self._apps, names_before = apps, self._names
        self._names = {}
        for deployed in apps.values():
            for name in (deployed.id.lower(), deployed.name.lower()):
                holder = self._names.setdefault(name, deployed)
                if holder is not deployed and names_before.get(name) is not holder:
                    logger.warning("%s is served by application %s; %s is ignored", name, holder.app, deployed.app)

    def _update(self, deployed: _Deployed, overview: ApplicationStatusOverview) -> None:
        deployed.status = overview.status
        deployed.version = (overview.last_deployed_time_s, overview.status == ApplicationStatus.RUNNING)
        if deployed.model is not None:
            deployed.model.dispatcher.replicas = deployed.replicas
        if not deployed.replicas:
            if deployed.status != ApplicationStatus.RUNNING:
                deployed.loading_since_s = deployed.loading_since_s or time.monotonic()
        elif deployed.model is None or deployed.model.stale or deployed.described != deployed.version:
            self._ask(deployed)

    def _wake(self, deployed: _Deployed) -> None:
        """A call is what makes Serve start a first replica."""
        deployed.loading_since_s = deployed.loading_since_s or time.monotonic()
        self._ask(deployed)

    def _ask(self, deployed: _Deployed) -> None:
        if deployed.asking is None or deployed.asking.done():
            deployed.asking = asyncio.get_running_loop().create_task(self._describe(deployed))

    async def _describe(self, deployed: _Deployed) -> None:
        """Card and tokenizer, from any replica. By reference: a tokenizer may be larger than a message may."""
        version = deployed.version
        try:
            handle = await asyncio.to_thread(serve.get_app_handle, deployed.app)
            description: Description = await handle.options(_by_reference=True).describe.remote()
            if deployed.model is None or not _same(deployed.model.card, description.card):
                deployed.model = await asyncio.to_thread(self._open, deployed, handle, description)
                deployed.model.dispatcher.replicas = deployed.replicas
        except Exception as error:  # it went, or broke: the next status tells, and asks again if need be
            logger.warning("%s did not describe itself: %s", deployed.id, type(error).__name__)
            return
        deployed.model.stale, deployed.described = False, version
        if deployed.loading_since_s is not None:
            self._load_s[deployed.id] = time.monotonic() - deployed.loading_since_s
            deployed.loading_since_s = None

    def _open(self, deployed: _Deployed, handle: DeploymentHandle, description: Description) -> Ready:
        async def is_deployed() -> bool:
            await self._refresh()
            return deployed.app in (self._apps or {})

        return Ready(
            handle,
            description,
            self._threads,
            is_deployed=is_deployed,
            max_pending_tokens=self._max_pending_tokens,
        )

    def _load_left_s(self, deployed: _Deployed) -> float:
        """From how long it took last time; the first time, as long again as it has been loading."""
        passed_s = time.monotonic() - (deployed.loading_since_s or time.monotonic())
        return max(1.0, self._load_s.get(deployed.id, 2 * passed_s) - passed_s)


def _same(one: ModelCard, other: ModelCard) -> bool:
    """The same model under the same limits, whichever replica told."""
    return replace(one, created=other.created) == other
