"""Where the proofs of a store get an empty one from, again and again: in memory, if there is such a folder.

Nothing here is about what survives a crash; see `cuts.py` for that.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from serve_app.stores import open_store
from tests.redis_server import RedisServer

MEMORY = Path("/dev/shm")


class Home(Protocol):
    def fresh(self) -> str:
        """The URL of an empty store. What the last one kept may be gone."""
        ...


class _SqliteHome:
    def __init__(self, folder: Path) -> None:
        self._empty, self._file = folder / "empty.db", folder / "store.db"
        asyncio.run(_make(f"sqlite:{self._empty}"))

    def fresh(self) -> str:
        for suffix in ("", "-wal", "-shm"):
            self._file.with_name(self._file.name + suffix).unlink(missing_ok=True)
        shutil.copy(self._empty, self._file)
        return f"sqlite:{self._file}"


class _RedisHome:
    def __init__(self, server: RedisServer) -> None:
        self._server = server

    def fresh(self) -> str:
        assert self._server.command("FLUSHALL") == "+OK"
        return self._server.url


@contextmanager
def _sqlite() -> Iterator[Home]:
    with _folder() as folder:
        yield _SqliteHome(folder)


@contextmanager
def _redis() -> Iterator[Home]:
    with _folder() as folder:
        server = RedisServer(folder)
        server.start()
        try:
            yield _RedisHome(server)
        finally:
            server.kill()


HOMES: dict[str, Callable[[], AbstractContextManager[Home]]] = {"sqlite": _sqlite, "redis": _redis}


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="stores-", dir=MEMORY if MEMORY.is_dir() else None) as name:
        yield Path(name)


async def _make(url: str) -> None:
    await (await open_store(url)).close()
