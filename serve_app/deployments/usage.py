"""The usage actor: carries committed events to the sinks, and meters reserved GPUs. It may be away for an hour.

Everything it knows is in the store: a new one goes on where the old one stopped. `relay.py` carries the events,
`meter.py` bills the hours; which models are reserved is what their replicas say.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ray import serve
from ray.serve.schema import ApplicationStatus

from serve_app.balance import Balance
from serve_app.core.catalog import ModelCard, names_in
from serve_app.core.metrics import UsageMetrics
from serve_app.deployments.logs import join_serve
from serve_app.deployments.metrics import Exporter
from serve_app.deployments.nodes import check_nodes
from serve_app.deployments.terms import LiveTerms
from serve_app.meter import Meter
from serve_app.relay import Lag, Relay
from serve_app.sinks import open_sink
from serve_app.sinks.settings import UsageSettings
from serve_app.stores import open_store

DAY_MS = 24 * 3600 * 1000
TRIM_S = 600.0
LAG_S = 5.0
BALANCE_S = 300.0

logger = logging.getLogger(__name__)


class UsageReplica:
    """See `app.usage` for the deployment."""

    def __init__(self, settings: UsageSettings) -> None:
        join_serve()
        self._settings = settings
        self._terms = LiveTerms()
        self._opening = asyncio.Lock()
        self._relay: Relay | None = None
        self._metrics = UsageMetrics()
        self._tasks: list[asyncio.Task[None]] = []

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this before the first health check, and whenever the terms have changed."""
        self._terms.read(user_config)

    async def check_health(self) -> None:
        """Starts the work, too. A part of it that ended makes the actor unhealthy, and Serve starts a new one."""
        async with self._opening:
            if self._relay is None:
                await self._start()
        for task in self._tasks:
            if task.done():
                raise RuntimeError("a part of the usage actor has ended")

    async def lag(self) -> dict[str, Lag]:
        """Per sink, what is not delivered yet."""
        return await self._relay.lag() if self._relay else {}

    async def _start(self) -> None:
        check_nodes(self._settings.store)
        store = await open_store(self._settings.store)
        sinks = {sink.name: open_sink(sink, source=self._settings.source) for sink in self._settings.sinks}
        relay = self._relay = Relay(store, sinks, now_ms=_now_ms, sleep=asyncio.sleep)
        meter, reserved = Meter(store), Reserved()
        balance = Balance(store, now_ms=_now_ms)
        keep_ms = int(self._settings.keep_days * DAY_MS)

        async def look() -> None:
            await meter.look(await reserved.cards(), self._terms.now.rates, _now_ms())

        async def trim() -> None:
            await relay.trim(keep_ms)

        async def measure_lag() -> None:
            lags = await relay.lag()
            self._metrics.sink_lag_events.show({(sink,): lag.events for sink, lag in lags.items()})
            self._metrics.sink_lag_seconds.show({(sink,): lag.since_s for sink, lag in lags.items()})

        async def weigh() -> None:
            self._metrics.ledger_difference_events.show({(): await balance.difference()})

        self._tasks = [
            asyncio.create_task(relay.run()),
            asyncio.create_task(_for_ever(look, every_s=self._settings.meter_s)),
            asyncio.create_task(_for_ever(trim, every_s=TRIM_S)),
            asyncio.create_task(_for_ever(measure_lag, every_s=LAG_S)),
            asyncio.create_task(_for_ever(weigh, every_s=BALANCE_S)),
            asyncio.create_task(Exporter(self._metrics, lambda: None).run()),
        ]


class Reserved:
    """The models that are reserved and run now. A replica is asked once for each deployment of its model."""

    def __init__(self) -> None:
        self._cards: dict[str, tuple[float, ModelCard]] = {}  # by application: when it was deployed, and its card

    async def cards(self) -> list[ModelCard]:
        """Raises whatever Serve raises: then nobody knows what runs, and nothing is taken for gone."""
        status = await asyncio.to_thread(serve.status)
        found = {}
        for app, overview in status.applications.items():
            if overview.status == ApplicationStatus.RUNNING and any(map(names_in, overview.deployments)):
                deployed_s, card = self._cards.get(app, (0.0, None))
                if card is None or deployed_s != overview.last_deployed_time_s:
                    handle = await asyncio.to_thread(serve.get_app_handle, app)
                    card = await handle.card.remote()
                found[app] = (overview.last_deployed_time_s, card)
        self._cards = found
        return [card for _, card in found.values()]


async def _for_ever(work: Callable[[], Awaitable[None]], *, every_s: float) -> None:
    while True:
        try:
            await work()
        except Exception as error:
            logger.warning("the usage actor will try again: %s", type(error).__name__)
        await asyncio.sleep(every_s)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
