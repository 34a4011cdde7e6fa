from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from serve_app.accounts import Accounts
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


def test_a_key_is_for_what_it_was_made_for(run: Run, url: str, workspace: str) -> None:
    options = ("--model", "bge-m3", "--model", "BAAI/bge-m3", "--endpoint", "/v1/embeddings")
    rates = ("--requests-per-minute", 200, "--tokens-per-minute", 9_000)
    text = run("key", "create", workspace, *options, *rates, "--store", url).stdout.strip()
    key = found(url, text)[0]
    assert (key.models, key.endpoints) == (("bge-m3", "BAAI/bge-m3"), ("/v1/embeddings",))
    assert (key.requests_per_minute, key.tokens_per_minute) == (200, 9_000)
    shown = run("key", "list", workspace, "--store", url).stdout
    assert "/v1/embeddings, bge-m3, BAAI/bge-m3, 200 requests/min, 9,000 tokens/min" in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--endpoint", "/v1/rerankings"), "There are: /v1/embeddings, "),
        (("--model", "no name"), "its canonical name"),
        (("--requests-per-minute", 0), "for '--requests-per-minute'"),
    ],
)
def test_a_scope_that_nothing_has_is_refused(
    run: Run, url: str, workspace: str, words: tuple[str, ...], says: str
) -> None:
    result = run("key", "create", workspace, *words, "--store", url)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert says in result.stderr
    assert listed(run, url, workspace) == []


def test_a_rate_above_the_ceiling_is_said_to_be(run: Run, url: str, workspace: str) -> None:
    result = run("key", "create", workspace, "--requests-per-minute", 1_001, "--store", url)
    assert result.exit_code == 0
    assert "The pro plan's ceiling is 1,000 requests a minute" in result.stderr


def test_a_rotated_key_and_its_successor_both_work_for_a_while(run: Run, url: str, workspace: str) -> None:
    made = ("--name", "ci", "--model", "bge-m3", "--expires-days", 10, "--requests-per-minute", 7)
    text = run("key", "create", workspace, *made, "--store", url).stdout.strip()
    old, before_ms = found(url, text)[0], now_ms()
    rotated = run("key", "rotate", old.id, "--grace-hours", 2, "--store", url)
    assert rotated.exit_code == 0
    new = found(url, rotated.stdout.strip())[0]
    assert (new.name, new.models, new.requests_per_minute) == ("ci", ("bge-m3",), 7)
    assert new.id != old.id
    assert new.expires_ms is not None
    assert new.expires_ms - new.created_ms == 864_000_000
    old = found(url, text)[0]
    assert old.expires_ms is not None
    assert old.valid_at(now_ms())
    assert 0 <= old.expires_ms - before_ms - 7_200_000 < 60_000


def test_a_rotated_key_lives_no_longer_than_it_would_have(run: Run, url: str, workspace: str) -> None:
    text = run("key", "create", workspace, "--expires-days", 0.5, "--store", url).stdout.strip()
    old = found(url, text)[0]
    assert run("key", "rotate", old.id, "--grace-hours", 48, "--store", url).exit_code == 0
    assert found(url, text)[0].expires_ms == old.expires_ms


def test_a_rotation_without_grace_ends_the_old_key(run: Run, url: str, workspace: str) -> None:
    text = run("key", "create", workspace, "--store", url).stdout.strip()
    rotated = run("key", "rotate", found(url, text)[0].id, "--grace-hours", 0, "--json", "--store", url)
    assert not found(url, text)[0].valid_at(now_ms())
    assert found(url, orjson.loads(rotated.stdout)["key"])[0].valid_at(now_ms())


@pytest.mark.parametrize("end", ["revoked", "expired"])
def test_a_key_that_ended_is_not_rotated(run: Run, url: str, workspace: str, end: str) -> None:
    days = ("--expires-days", 0) if end == "expired" else ()
    text = run("key", "create", workspace, *days, "--store", url).stdout.strip()
    key = found(url, text)[0]
    if end == "revoked":
        run("key", "revoke", key.id, "--store", url)
    result = run("key", "rotate", key.id, "--store", url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"is {end}" in result.stderr
    assert len(listed(run, url, workspace)) == 1


def test_a_list_tells_when_a_key_was_last_used(run: Run, url: str, workspace: str) -> None:
    text = run("key", "create", workspace, "--store", url).stdout.strip()
    key = found(url, text)[0]
    assert [row["last_used_ms"] for row in listed(run, url, workspace)] == [None]

    async def use() -> None:
        store = await open_store(url)
        known = Accounts(store, now_ms=lambda: 1_764_115_200_000, patience_s=10)
        await known.authenticate(f"Bearer {text}")
        await known.close()
        await store.close()

    asyncio.run(use())
    assert [row["last_used_ms"] for row in listed(run, url, workspace)] == [1_764_115_200_000]
    assert "2025-11-26 00:00:00Z" in run("key", "list", workspace, "--store", url).stdout
    assert found(url, text)[0] == key, "a use writes nothing that a revocation could be lost under"


def test_json_holds_the_text_once_and_a_list_never(run: Run, url: str, workspace: str) -> None:
    made = orjson.loads(run("key", "create", workspace, "--json", "--store", url).stdout)
    assert keys.well_formed(made["key"])
    assert made["id"] == found(url, made["key"])[0].id
    revoked = orjson.loads(run("key", "revoke", made["id"], "--json", "--store", url).stdout)
    assert revoked["state"] == "revoked"
    assert "key" not in revoked


def test_starter_has_no_keys(run: Run, url: str) -> None:
    workspace = run("workspace", "create", "Free", "--plan", "starter", "--store", url).stdout.strip()
    result = run("key", "create", workspace, "--store", url)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "starter" in result.stderr
    assert listed(run, url, workspace) == []


@pytest.mark.parametrize(
    "words",
    [
        ("create", "ws_0000000000000000"),
        ("list", "ws_0000000000000000"),
        ("revoke", "key_0000000000000000"),
        ("rotate", "key_0000000000000000"),
    ],
)
def test_what_is_not_there_is_one_line(run: Run, url: str, workspace: str, words: tuple[str, str]) -> None:
    result = run("key", *words, "--store", url)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def now_ms() -> int:
    return time.time_ns() // 1_000_000
