"""The ingress replica: `api.py` over the live models, inside Serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api import build_app
from serve_app.core.settings import IngressSettings
from serve_app.deployments.models import LiveModels
from serve_app.service import Service


class IngressReplica:
    """See `app.ingress` for the deployment."""

    def __init__(self, settings: IngressSettings) -> None:
        self._settings = settings

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve calls this once, on the replica's event loop, and serves what it returns."""
        models = LiveModels(max_pending_tokens=self._settings.max_pending_tokens)
        service = Service(models, request_timeout_s=self._settings.request_timeout_s)

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            await models.start()
            watch = asyncio.create_task(models.watch())
            yield
            watch.cancel()

        return _without_request_id(build_app(service, max_body_bytes=self._settings.max_body_bytes, lifespan=lifespan))


def _without_request_id(app: ASGIApp) -> ASGIApp:
    """Serve appends X-Request-Id itself, with the same value: it is Serve that gave it to the request."""

    # A plain function, not an object with __call__: uvicorn takes bound methods for ASGI 2.
    async def serve_adds_it(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
            await send(message)

        await app(scope, receive, send_without)

    return serve_adds_it
