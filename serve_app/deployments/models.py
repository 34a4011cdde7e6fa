"""The models that are deployed right now, as Serve's status tells it: there is no second list.

Serve is asked every second. A model that runs is asked once for its card and tokenizer; from then on requests reach it
through one cached handle. One that loads, sleeps, failed or went has its own answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, replace

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ReplicaState, ServeStatus

from serve_app.core.catalog import ModelCard, names_in
from serve_app.core.errors import ModelLoading, ModelNotFound, did_you_mean, nearest, shown
from serve_app.core.metrics import IngressMetrics, lane_name
from serve_app.core.schema import ModelState
from serve_app.deployments.encoder import Description
from serve_app.deployments.model import Ready, Threads
from serve_app.service import LiveModel

REFRESH_S = 1.0
PLAIN = "pickle"  # units are plain data: cloudpickle, the default, costs a lone request an eighth of its CPU
START_S = 10.0  # what a new ingress replica waits for the models' cards before it takes requests

logger = logging.getLogger(__name__)


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

    def __init__(
        self, metrics: IngressMetrics, *, max_pending_tokens: int, max_workspace_tokens: int, load_wait_s: float
    ) -> None:
        """load_wait_s: what a request waits for a model that loads or sleeps."""
        self._metrics = metrics
        self._max_pending_tokens = max_pending_tokens
        self._max_workspace_tokens = max_workspace_tokens
        self._load_wait_s = load_wait_s
        self._news = asyncio.Event()  # set, and replaced, when a model may have come up
        self._threads = Threads()
        self._apps: dict[str, _Deployed] | None = None  # None: Serve has not been heard yet
        self._names: dict[str, _Deployed] = {}  # lower case id or canonical name
        self._leaving: dict[str, Ready] = {}  # by application: their replicas may still answer what they have
        self._load_s: dict[str, float] = {}  # measured, by id

    def names(self, name: str) -> tuple[str, str]:
        deployed = self._named(name)
        return deployed.id, deployed.name

    def resolve(self, name: str) -> LiveModel:
        deployed = self._named(name)
        if deployed.model is not None:
            return deployed.model
        raise self._loading(deployed)

    async def awake(self, name: str) -> LiveModel:
        """Not waited for: what failed, or is known to take longer than the wait. It is woken all the same."""
        until_s = time.monotonic() + self._load_wait_s
        while True:
            deployed, left_s = self._named(name), until_s - time.monotonic()
            if deployed.model is not None and deployed.replicas:
                return deployed.model
            if deployed.state in ("asleep", "ready"):
                self._wake(deployed)
            measured = deployed.id in self._load_s
            if deployed.state == "failed" or left_s <= 0 or (measured and self._load_left_s(deployed) > left_s):
                raise self._loading(deployed)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._news.wait()

    def _named(self, name: str) -> _Deployed:
        if self._apps is None:
            raise ModelLoading("The service is starting.", param="model", retry_after_s=REFRESH_S)
        deployed = self._names.get(name.lower())
        if deployed is None:
            guess = nearest(name[:64], self._names)
            hint = did_you_mean(self._names[guess].id if guess else None)
            raise ModelNotFound(f"There is no model {shown(name)} here.{hint}", param="model")
        return deployed

    def _loading(self, deployed: _Deployed) -> ModelLoading:
        what = "failed to start" if deployed.state == "failed" else "is loading"
        return ModelLoading(f"{deployed.name} {what}.", param="model", retry_after_s=self._load_left_s(deployed))

    def _tell(self) -> None:
        """Those who wait look again."""
        self._news.set()
        self._news = asyncio.Event()

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

    def measure(self) -> None:
        """What each model keeps and has waiting now, into the metrics."""
        models = [deployed.model for deployed in (self._apps or {}).values() if deployed.model is not None]
        self._metrics.cache_bytes.show({(model.card.name,): model.cache_bytes for model in models})
        self._metrics.pending_tokens.show(
            {
                (model.card.name, lane_name(express)): tokens
                for model in models
                for express, tokens in model.dispatcher.waiting_tokens.items()
            }
        )

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
        self._leaving |= {app: known.model for app, known in before.items() if known.model and app not in apps}
        for app in self._leaving.keys() - status.applications.keys():
            self._leaving.pop(app).gone()
        self._apps, names_before = apps, self._names
        self._tell()
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
        deployed.replicas = max(1, deployed.replicas)  # it answered: nobody waits for the next status
        self._tell()
        if deployed.loading_since_s is not None:
            self._load_s[deployed.id] = time.monotonic() - deployed.loading_since_s
            deployed.loading_since_s = None

    def _open(self, deployed: _Deployed, handle: DeploymentHandle, description: Description) -> Ready:
        async def is_deployed() -> bool:
            await self._refresh()
            return deployed.app in (self._apps or {})

        return Ready(
            handle.options(request_serialization=PLAIN, response_serialization=PLAIN),
            description,
            self._threads,
            is_deployed=is_deployed,
            max_pending_tokens=self._max_pending_tokens,
            max_workspace_tokens=self._max_workspace_tokens,
            metrics=self._metrics,
        )

    def _load_left_s(self, deployed: _Deployed) -> float:
        """From how long it took last time; the first time, as long again as it has been loading."""
        passed_s = time.monotonic() - (deployed.loading_since_s or time.monotonic())
        return max(1.0, self._load_s.get(deployed.id, 2 * passed_s) - passed_s)


def _same(one: ModelCard, other: ModelCard) -> bool:
    """The same model under the same limits, whichever replica told."""
    return replace(one, created=other.created) == other
