"""Who may come in, and for how long a key is remembered."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
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
        self.before: Callable[[], Awaitable[None]] | None = None  # what comes between a question and its answer
        self.told: list[dict[str, int]] = []

    async def find_key(self, digest: str) -> tuple[ApiKey, Workspace] | None:
        self.asked += 1
        if self.down:
            raise StoreDown("down")
        found = await self.store.find_key(digest)
        if self.before:
            await self.before()
        return found

    async def touch(self, used: Mapping[str, int]) -> None:
        if self.down:
            raise StoreDown("down")
        self.told.append(dict(used))


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
    monkeypatch.setattr("serve_app.accounts.MOST_WRONG", 10)
    await known.authenticate(f"Bearer {TEXT}")
    counted.asked = 0
    for number in range(50):
        with pytest.raises(InvalidAPIKey):
            await known.authenticate(f"Bearer {keys.mint(bytes([number, 7] + [0] * 30))}")
    assert counted.asked == 50
    assert len(known._wrong) == 10
    await known.authenticate(f"Bearer {TEXT}")
    assert counted.asked == 50, "who guesses pushes out nobody who knows"


async def test_a_store_that_is_down_is_not_a_wrong_key(known: Accounts, counted: Counted) -> None:
    counted.down = True
    with pytest.raises(StoreUnavailable) as unavailable:
        await known.authenticate(f"Bearer {TEXT}")
    assert unavailable.value.headers()["Retry-After"] == "1"
    counted.down = False
    assert (await known.authenticate(f"Bearer {TEXT}")).key == KEY


async def test_an_answer_that_took_too_long_is_not_gone_by(
    known: Accounts, counted: Counted, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is revoked while the store takes its time over the answer that it was valid."""
    late_s, real = 0.0, time.monotonic

    async def revoke() -> None:
        nonlocal late_s
        counted.before = None
        late_s = accounts.KNOWN_S
        await store.put_key(dataclasses.replace(KEY, revoked_ms=1))

    counted.before = revoke
    monkeypatch.setattr("serve_app.accounts.time.monotonic", lambda: real() + late_s)
    patient = Accounts(counted, now_ms=lambda: NOW_MS, patience_s=30)  # type: ignore[arg-type]
    with pytest.raises(InvalidAPIKey):
        await patient.authenticate(f"Bearer {TEXT}")
    assert counted.asked == 2


async def test_a_key_that_expires_while_it_is_looked_up_is_refused(counted: Counted, store: Store) -> None:
    now_ms = NOW_MS

    async def wait() -> None:
        nonlocal now_ms
        now_ms += 1000

    counted.before = wait
    await store.put_key(dataclasses.replace(KEY, expires_ms=NOW_MS + 500))
    known = Accounts(counted, now_ms=lambda: now_ms, patience_s=30)  # type: ignore[arg-type]
    with pytest.raises(InvalidAPIKey):
        await known.authenticate(f"Bearer {TEXT}")


async def test_many_that_come_at_once_are_one_question(known: Accounts, counted: Counted) -> None:
    callers = await asyncio.gather(*(known.authenticate(f"Bearer {TEXT}") for _ in range(50)))
    assert counted.asked == 1
    assert {caller.key for caller in callers} == {KEY}


async def test_who_hangs_up_does_not_take_the_others_answer_away(counted: Counted) -> None:
    gate = asyncio.Event()

    async def wait() -> None:
        await gate.wait()

    counted.before = wait
    known = Accounts(counted, now_ms=lambda: NOW_MS, patience_s=30)  # type: ignore[arg-type]
    first, second = (asyncio.create_task(known.authenticate(f"Bearer {TEXT}")) for _ in range(2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    gate.set()
    assert (await second).key == KEY
    assert counted.asked == 1
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_the_last_use_is_told_when_the_ingress_ends_and_once_a_minute(counted: Counted) -> None:
    now_ms = NOW_MS
    known = Accounts(counted, now_ms=lambda: now_ms, patience_s=1, tell_s=1e9)  # type: ignore[arg-type]
    for _ in range(3):
        await known.authenticate(f"Bearer {TEXT}")
    now_ms += accounts.USED_MS
    await known.authenticate(f"Bearer {TEXT}")
    now_ms += accounts.USED_MS - 1
    await known.authenticate(f"Bearer {TEXT}")
    await known.close()
    assert counted.told == [{KEY.id: NOW_MS + accounts.USED_MS}]


async def test_a_refused_key_was_not_used(counted: Counted, store: Store) -> None:
    await store.put_key(dataclasses.replace(KEY, revoked_ms=1))
    known = Accounts(counted, now_ms=lambda: NOW_MS, patience_s=1)  # type: ignore[arg-type]
    with pytest.raises(InvalidAPIKey):
        await known.authenticate(f"Bearer {TEXT}")
    await known.close()
    assert counted.told == []


async def test_uses_are_told_without_being_asked_for(counted: Counted) -> None:
    told = asyncio.Event()
    touch = counted.touch

    async def touch_and_tell(used: Mapping[str, int]) -> None:
        await touch(used)
        told.set()

    counted.touch = touch_and_tell  # type: ignore[method-assign]
    known = Accounts(counted, now_ms=lambda: NOW_MS, patience_s=1, tell_s=0.01)  # type: ignore[arg-type]
    await known.authenticate(f"Bearer {TEXT}")
    async with asyncio.timeout(30):
        await told.wait()
    assert counted.told == [{KEY.id: NOW_MS}]
    await known.close()


async def test_a_use_that_could_not_be_told_is_told_by_the_next(counted: Counted) -> None:
    known = Accounts(counted, now_ms=lambda: NOW_MS, patience_s=1, tell_s=1e9)  # type: ignore[arg-type]
    await known.authenticate(f"Bearer {TEXT}")
    counted.down = True
    await known._uses._tell()
    counted.down = False
    await known.authenticate(f"Bearer {TEXT}")
    await known.close()
    assert counted.told == [{KEY.id: NOW_MS}]


@pytest.mark.parametrize("trial", range(5))
async def test_a_revoked_key_is_refused_everywhere_within_five_seconds(
    store: Store, monkeypatch: pytest.MonkeyPatch, trial: int
) -> None:
    """Three ingresses, each asked every tenth of a second: `scripts/prove keys` does the same on the real clock."""
    clock_s, chance = 1000.0, random.Random(trial)
    monkeypatch.setattr("serve_app.accounts.time.monotonic", lambda: clock_s)
    ingresses = [Accounts(store, now_ms=lambda: NOW_MS, patience_s=30) for _ in range(3)]
    for ingress in ingresses:
        clock_s += 3 * chance.random()
        await ingress.authenticate(f"Bearer {TEXT}")
    revoked_s = clock_s
    await store.put_key(dataclasses.replace(KEY, revoked_ms=1))
    refused: dict[int, float] = {}
    while len(refused) < 3:
        for at, ingress in enumerate(ingresses):
            try:
                await ingress.authenticate(f"Bearer {TEXT}")
            except InvalidAPIKey:
                refused.setdefault(at, clock_s - revoked_s)
        clock_s += 0.1
    assert max(refused.values()) <= 5
    for ingress in ingresses:
        await ingress.close()


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
