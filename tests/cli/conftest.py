"""A ledger in use, in a store of each driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from serve_app.cli import app
from tests.cli.books import Books, Originals
from tests.cli.tamper import Tamper, tamper_with
from tests.redis_server import RedisServer

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """Of a store that is not there."""
    return f"sqlite:{tmp_path / 'store.db'}"


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, sqlite_url: str) -> str:
    """Of an empty store."""
    if request.param == "sqlite":
        return sqlite_url
    server: RedisServer = request.getfixturevalue("shared_redis")
    assert server.command("FLUSHALL") == "+OK"
    return server.url


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    return Originals(tmp_path_factory.mktemp("books"))


@pytest.fixture
def books(url: str, tmp_path: Path, originals: Originals) -> Books:
    return originals.copy(url, tmp_path)


@pytest.fixture
def tamper(url: str) -> Iterator[Tamper]:
    with tamper_with(url) as it:
        yield it


@pytest.fixture
def run() -> Run:
    """The command, with these words."""

    def invoke(*words: object) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words], env={"SERVE_APP_STORE": None, "COLUMNS": "200"})

    return invoke
