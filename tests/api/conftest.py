"""A store of a test's own, with one workspace and its key; and the service over it, as an HTTP client sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2 as httpx
import pytest

from serve_app.api import build_app
from serve_app.stores import Store, open_store
from tests.service.fakes import AUTHORIZATION, KEY, WORKSPACE, FakeModel, FakeModels, add_workspace, service_over


@pytest.fixture
async def own_store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(f"sqlite:{tmp_path}/test.db")
    await add_workspace(store, WORKSPACE, KEY)
    yield store
    await store.close()


@pytest.fixture
async def own_client(own_models: list[FakeModel], own_store: Store) -> AsyncIterator[httpx.AsyncClient]:
    """own_models: what a test module serves."""
    app = build_app(service_over(FakeModels(*own_models), store=own_store), max_body_bytes=2_000_000)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=AUTHORIZATION) as client:
        yield client
