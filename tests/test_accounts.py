"""Who may come in, and for how long a key is remembered."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from serve_app import accounts, demo
from serve_app.accounts import Accounts
from serve_app.core import keys
from serve_app.core.errors import InvalidAPIKey, StoreUnavailable
from serve_app.core.keys import ApiKey, Plan, Workspace
from serve_app.stores import Store, StoreDown, open_store

TEXT, OTHER = keys.mint(bytes(32)), keys.mint(bytes([1] * 32))
WORKSPACE = Workspace(id="ws_1", name="one", plan=Plan.PRO, created_ms=0)
KEY = ApiKey(id="key_1", workspace="ws_1", name="one", digest=keys.digest(TEXT), created_ms=0)
NOW_MS = 1_000_000


class Counted:
    """A store that counts look-ups, and can be down."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.asked = 0
        self.down = False

    async def find_key(self, digest: str) -> tuple[ApiKey, Workspace] | None:
        self.asked += 1
        if self.down:
            raise StoreDown("down")
        return await self.store.find_key(digest)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(f"sqlite:{tmp_path}/store.db")
    await store.add_workspace(WORKSPACE)
    await store.put_key(KEY)
    yield store
    await store.close()


@pytest.fixture
def counted(store: Store) -> Counted:
    return Counted(store)


@pytest.fixture
def known(counted: Counted) -> Accounts:
    return Accounts(counted, now_ms=lambda: NOW_MS, patience_s=0.1)  # type: ignore[arg-type]


async def test_a_key_names_its_workspace(known: Accounts) -> None:
    caller = await known.authenticate(f"Bearer {TEXT}")
    assert (caller.workspace, caller.key) == (WORKSPACE, KEY)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", f"Basic {TEXT}", TEXT, f"Bearer {TEXT}x", f"Bearer {OTHER}"]
)
async def test_whatever_else_it_may_be_is_refused_in_the_same_words(known: Accounts, header: str | None) -> None:
    with pytest.raises(InvalidAPIKey) as refused:
        await known.authenticate(header)
    assert refused.value.message == accounts.REFUSAL


async def test_what_was_never_a_key_does_not_reach_the_store(known: Accounts, counted: Counted) -> None:
    with pytest.raises(InvalidAPIKey):
        await known.authenticate(f"Bearer {TEXT[:-1]}x")
    assert counted.asked == 0


@pytest.mark.parametrize("change", [{"revoked_ms": NOW_MS}, {"expires_ms": NOW_MS}])
async def test_a_key_past_its_time_is_refused(known: Accounts, store: Store, change: dict[str, Any]) -> None:
    await store.put_key(dataclasses.replace(KEY, **change))
    with pytest.raises(InvalidAPIKey):
        await known.authenticate(f"Bearer {TEXT}")


async def test_a_key_is_looked_up_once_and_remembered_for_less_than_five_seconds(
    known: Accounts, counted: Counted, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        await known.authenticate(f"Bearer {TEXT}")
    assert counted.asked == 1
    await store.put_key(dataclasses.replace(KEY, revoked_ms=1))
    assert accounts.KNOWN_S < 5
    real = time.monotonic
    monkeypatch.setattr("serve_app.accounts.time.monotonic", lambda: real() + accounts.KNOWN_S)
    with pytest.raises(InvalidAPIKey):
        await known.authenticate(f"Bearer {TEXT}")


async def test_no_more_keys_are_remembered_than_there_is_room_for(
    known: Accounts, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.accounts.MOST_KNOWN", 10)
    for number in range(50):
        with pytest.raises(InvalidAPIKey):
            await known.authenticate(f"Bearer {keys.mint(bytes([number, 7] + [0] * 30))}")
    assert counted.asked == 50
    assert len(known._known) == 10


async def test_a_store_that_is_down_is_not_a_wrong_key(known: Accounts, counted: Counted) -> None:
    counted.down = True
    with pytest.raises(StoreUnavailable) as unavailable:
        await known.authenticate(f"Bearer {TEXT}")
    assert unavailable.value.headers()["Retry-After"] == "1"
    counted.down = False
    assert (await known.authenticate(f"Bearer {TEXT}")).key == KEY


async def test_a_new_store_gets_a_demo_workspace_whose_key_works_and_is_made_once(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path}/new/store.db"
    store = await open_store(url)
    path = demo.key_path(url)
    await demo.make(store, path, now_ms=NOW_MS)
    text = path.read_text().strip()
    assert path.stat().st_mode & 0o777 == 0o600
    await demo.make(store, path, now_ms=NOW_MS + 1)
    assert path.read_text().strip() == text
    known = Accounts(store, now_ms=lambda: NOW_MS, patience_s=1)
    assert (await known.authenticate(f"Bearer {text}")).workspace == demo.WORKSPACE
    await store.close()
    assert text.encode() not in b"".join(file.read_bytes() for file in path.parent.glob("store.db*"))


async def test_a_demo_workspace_that_a_crash_left_without_a_key_gets_one(store: Store, tmp_path: Path) -> None:
    store = await open_store(f"sqlite:{tmp_path}/crashed.db")
    await store.add_workspace(demo.WORKSPACE)
    await demo.make(store, tmp_path / "demo-key", now_ms=NOW_MS)
    assert len(await store.keys(demo.WORKSPACE.id)) == 1
    await store.close()


async def test_a_store_with_workspaces_of_its_own_gets_no_demo(store: Store, tmp_path: Path) -> None:
    await demo.make(store, tmp_path / "demo-key", now_ms=NOW_MS)
    assert await store.workspaces() == [WORKSPACE]
    assert not (tmp_path / "demo-key").exists()
