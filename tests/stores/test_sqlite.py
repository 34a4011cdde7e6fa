"""The file itself: several processes have it open at once, and any of them may close it or die."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

from serve_app.core.keys import Plan, Workspace
from serve_app.stores import open_store

LOOK = """
import asyncio, sys
from serve_app.stores import open_store

async def look():
    store = await open_store(sys.argv[1])
    print(*(workspace.id for workspace in await store.workspaces()))
    await store.close()

asyncio.run(look())
"""


def seen_by_another_process(url: str) -> list[str]:
    """The workspaces that a process sees which opens the file now; it closes it again."""
    command = [sys.executable, "-c", LOOK, url]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=50).stdout.split()


def workspace(id: str, created_ms: int) -> Workspace:
    return Workspace(id=id, name=id, plan=Plan.PRO, created_ms=created_ms)


async def test_a_process_that_comes_and_goes_takes_nothing_away_from_one_that_stays(tmp_path: Path) -> None:
    """What stays must keep its locks: the last to close a file folds its log in and deletes it, under any other."""
    url = f"sqlite:{tmp_path / 'store.db'}"
    stays = await open_store(url)
    await stays.add_workspace(workspace("first", 1))
    await stays.workspaces()  # opens the connection that reads ...
    await stays.touch({"key": 1})  # ... and the third
    assert seen_by_another_process(url) == ["first"]
    await stays.add_workspace(workspace("second", 2))
    assert seen_by_another_process(url) == ["first", "second"]
    await stays.close()
    assert seen_by_another_process(url) == ["first", "second"]


async def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    store = await open_store(f"sqlite:{tmp_path / 'folder' / 'store.db'}")
    await store.add_workspace(workspace("first", 1))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "folder").iterdir()}
    assert modes == {"store.db": 0o600, "store.db-wal": 0o600, "store.db-shm": 0o600}
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700
    await store.close()
