"""The ingress replica: `api.py` over the live models, the accounts and the books, inside Serve."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import demo
from serve_app.accounts import Accounts
from serve_app.api import Edge, build_app
from serve_app.books import Books
from serve_app.core.metrics import IngressMetrics
from serve_app.core.settings import IngressSettings
from serve_app.deployments.idempotency import Clerks
from serve_app.deployments.logs import RequestLog, join_serve
from serve_app.deployments.metrics import Exporter
from serve_app.deployments.models import LiveModels
from serve_app.deployments.nodes import check_nodes
from serve_app.deployments.terms import LiveTerms
from serve_app.pulse import Pulse
from serve_app.service import Service
from serve_app.stores import Store, is_local, open_store
from serve_app.stores.blobs import Blobs
from serve_app.throttle import Throttle


class IngressReplica:
    """See `app.ingress` for the deployment."""

    def __init__(self, settings: IngressSettings) -> None:
        join_serve()
        self._settings = settings
        self._terms = LiveTerms()
        self._metrics = IngressMetrics()
        self._pulse = Pulse()
        self._service: Service | None = None
        self._edge: Edge | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve calls this once, on the replica's event loop, and serves what it returns."""
        settings = self._settings
        check_nodes(settings.store)
        await asyncio.to_thread(os.makedirs, settings.blobs, 0o700, exist_ok=True)  # the audit looks there, too
        store = await open_store(settings.store)
        if is_local(settings.store):
            await demo.make(store, demo.key_path(settings.store), now_ms=_now_ms())
        models = LiveModels(
            self._metrics,
            max_pending_tokens=settings.max_pending_tokens,
            max_workspace_tokens=settings.max_workspace_tokens,
            load_wait_s=settings.load_wait_s,
        )
        service = self._service = self.service(models, store)
        self._terms.follow(service.change)
        exporter, log = Exporter(self._metrics, models.measure), RequestLog()

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            await models.start()
            tasks = [
                asyncio.create_task(work) for work in (models.watch(), exporter.run(), log.run(), self._pulse.run())
            ]
            yield
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await service.close()
            await store.close()

        app = self._edge = build_app(
            service,
            max_body_bytes=settings.max_body_bytes,
            cors_origins=settings.cors_origins,
            lifespan=lifespan,
            metrics=self._metrics,
            log=log,
            log_from=settings.request_log,
        )
        return _without_request_id(app)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this before the first request, and whenever the terms have changed."""
        self._terms.read(user_config)

    def drain(self) -> int:
        """Nothing more is admitted. Requests under way: to be asked again until there are none."""
        if self._service is None or self._edge is None:
            return 0
        self._service.leave()
        return self._edge.under_way

    def service(self, models: LiveModels, store: Store) -> Service:
        """What answers the requests of this ingress."""
        settings = self._settings
        return Service(
            models,
            Accounts(store, now_ms=_now_ms, patience_s=settings.patience_s),
            Throttle(store, self._terms.now.limits),
            Books(store, Clerks(), Blobs(Path(settings.blobs)), settings, self._metrics),
            self._terms.now,
            now_ms=_now_ms,
            request_timeout_s=settings.request_timeout_s,
            pulse=self._pulse,
        )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _without_request_id(app: ASGIApp) -> ASGIApp:
    """Serve appends the X-Request-Id that the request had when it came here: it would be there twice.

    Where the service put an id of its own in its place, both go out: only ours is in the log and in the ledger.
    """

    # A plain function, not an object with __call__: uvicorn takes bound methods for ASGI 2.
    async def serve_adds_it(scope: Scope, receive: Receive, send: Send) -> None:
        given = [value for name, value in scope.get("headers", ()) if name == b"x-request-id"][:1]

        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    (name, value)
                    for name, value in message["headers"]
                    if name.lower() != b"x-request-id" or value not in given
                ]
            await send(message)

        await app(scope, receive, send_without)

    return serve_adds_it
