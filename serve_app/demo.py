"""The first start of the embedded store: a workspace to try the service with, and its key in a file beside the store.

Made once, if the store has no workspace at all; the key's file is the only place where its text is.
"""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

from serve_app.core import keys
from serve_app.core.keys import ApiKey, Plan, Workspace
from serve_app.stores import Store
from serve_app.stores.sqlite import path_of

WORKSPACE = Workspace(id="ws_demo", name="demo", plan=Plan.TEAM, created_ms=0)

logger = logging.getLogger(__name__)


def key_path(store_url: str) -> Path:
    """Where the demo key lies: beside the SQLite file."""
    return path_of(store_url).with_name("demo-key")


async def make(store: Store, path: Path, *, now_ms: int) -> None:
    """The demo workspace and its key, if this store is new, or was left without the key by a crash."""
    await store.add_workspace(WORKSPACE, only_if_first=True)
    if WORKSPACE not in await store.workspaces() or await store.keys(WORKSPACE.id):
        return
    text = keys.mint(secrets.token_bytes(keys.SECRET_BYTES))
    _write(path, text)
    key = ApiKey(id="key_demo", workspace=WORKSPACE.id, name="demo", digest=keys.digest(text), created_ms=now_ms)
    await store.put_key(key)
    logger.info("This store is new: a demo workspace was made, and its key is in %s", path)


def _write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")
