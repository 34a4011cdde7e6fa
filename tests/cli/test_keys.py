from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from serve_app.core import keys
from serve_app.core.keys import ApiKey, Workspace
from serve_app.stores import open_store
from tests.cli.conftest import Run


@pytest.fixture
def workspace(run: Run, url: str) -> str:
    return run("workspace", "create", "Search", "--store", url).stdout.strip()


def found(url: str, text: str) -> tuple[ApiKey, Workspace]:
    """As the service looks it up."""

    async def find() -> tuple[ApiKey, Workspace] | None:
        store = await open_store(url)
        key = await store.find_key(keys.digest(text))
        await store.close()
        return key

    key = asyncio.run(find())
    assert key is not None
    return key


def listed(run: Run, url: str, workspace: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = orjson.loads(run("key", "list", workspace, "--json", "--store", url).stdout)
    return rows


def test_a_key_is_alone_on_its_line_and_works(run: Run, url: str, workspace: str) -> None:
    made = run("key", "create", workspace, "--name", "ci", "--store", url)
    text = made.stdout.removesuffix("\n")
    assert keys.well_formed(text)
    assert re.match(r"key_[0-9a-f]{16}: ", made.stderr)
    key, owner = found(url, text)
    assert (owner.id, key.name, key.expires_ms) == (workspace, "ci", None)
    assert key.valid_at(now_ms())


def test_two_keys_differ(run: Run, url: str, workspace: str) -> None:
    texts = {run("key", "create", workspace, "--store", url).stdout for _ in range(2)}
    assert len(texts) == 2


def test_a_keys_text_is_nowhere_in_the_store(run: Run, tmp_path: Path, sqlite_url: str) -> None:
    workspace = run("workspace", "create", "Search", "--store", sqlite_url).stdout.strip()
    text = run("key", "create", workspace, "--store", sqlite_url).stdout.strip()
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(keys.digest(text).encode() in content for content in files)
    secret = text.removeprefix(keys.PREFIX)
    assert not any(secret[at : at + 12].encode() in content for content in files for at in range(len(secret) - 12))


def test_a_list_shows_neither_text_nor_digest(run: Run, url: str, workspace: str) -> None:
    text = run("key", "create", workspace, "--store", url).stdout.strip()
    for words in (("key", "list", workspace), ("key", "list", workspace, "--json")):
        shown = run(*words, "--store", url).stdout
        assert "key_" in shown
        assert text not in shown
        assert keys.digest(text) not in shown


def test_a_revoked_key_works_no_more(run: Run, url: str, workspace: str) -> None:
    text = run("key", "create", workspace, "--store", url).stdout.strip()
    key = found(url, text)[0]
    assert run("key", "revoke", key.id, "--store", url).exit_code == 0
    revoked = found(url, text)[0]
    assert not revoked.valid_at(now_ms())
    assert [row["state"] for row in listed(run, url, workspace)] == ["revoked"]
    assert run("key", "revoke", key.id, "--store", url).exit_code == 0
    assert found(url, text)[0] == revoked  # as when it was first


def test_a_key_may_expire(run: Run, url: str, workspace: str) -> None:
    before = now_ms()
    text = run("key", "create", workspace, "--expires-days", "1.5", "--store", url).stdout.strip()
    expires_ms = found(url, text)[0].expires_ms
    assert expires_ms is not None
    assert 0 <= expires_ms - before - 129_600_000 < 60_000
    text = run("key", "create", workspace, "--expires-days", "0", "--store", url).stdout.strip()
    assert not found(url, text)[0].valid_at(now_ms())
    assert [row["state"] for row in listed(run, url, workspace)] == ["valid", "expired"]


def test_starter_has_no_keys(run: Run, url: str) -> None:
    workspace = run("workspace", "create", "Free", "--plan", "starter", "--store", url).stdout.strip()
    result = run("key", "create", workspace, "--store", url)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "starter" in result.stderr
    assert listed(run, url, workspace) == []


@pytest.mark.parametrize(
    "words", [("create", "ws_0000000000000000"), ("list", "ws_0000000000000000"), ("revoke", "key_0000000000000000")]
)
def test_what_is_not_there_is_one_line(run: Run, url: str, workspace: str, words: tuple[str, str]) -> None:
    result = run("key", *words, "--store", url)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def now_ms() -> int:
    return time.time_ns() // 1_000_000
