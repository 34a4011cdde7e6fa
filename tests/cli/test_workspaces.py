from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from serve_app.core.idempotency import Emit
from serve_app.stores import open_store
from tests.cli.conftest import Run
from tests.stores.steps import event


def test_a_workspace_is_made_and_listed(run: Run, url: str) -> None:
    made = run("workspace", "create", "Search team", "--plan", "team", "--store", url)
    assert made.exit_code == 0
    assert re.fullmatch(r"ws_[0-9a-f]{16}\n", made.stdout)
    run("workspace", "create", "Second", "--store", url)
    listed = run("workspace", "list", "--json", "--store", url)
    rows = orjson.loads(listed.stdout)
    assert [(row["name"], row["plan"]) for row in rows] == [("Search team", "team"), ("Second", "pro")]
    assert rows[0]["id"] == made.stdout.strip()


def test_a_name_is_shown_as_it_is(run: Run, sqlite_url: str) -> None:
    run("workspace", "create", "[red]not markup[/red] :smile:", "--store", sqlite_url)
    assert "[red]not markup[/red] :smile:" in run("workspace", "list", "--store", sqlite_url).stdout


@pytest.mark.parametrize("name", ["", "two\nlines", "x" * 201])
def test_a_name_is_one_line(run: Run, sqlite_url: str, name: str) -> None:
    result = run("workspace", "create", name, "--store", sqlite_url)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_a_workspace_shows_its_cap_and_what_it_spent(run: Run, url: str) -> None:
    made = run("workspace", "create", "Search", "--monthly-cap-usd", "12.5", "--store", url)
    workspace = made.stdout.strip()
    run("key", "create", workspace, "--store", url)
    run("key", "create", workspace, "--expires-days", 0, "--store", url)

    async def spend() -> None:
        store = await open_store(url)
        now_ms = time.time_ns() // 1_000_000
        await store.run([Emit(event=event("a", workspace, quantity=1_500_000, time_ms=now_ms))])
        await store.close()

    asyncio.run(spend())
    shown = orjson.loads(run("workspace", "show", workspace, "--json", "--store", url).stdout)
    assert (shown["monthly_cap_micros"], shown["spent_micros"]) == (12_500_000, 18_000)
    assert (shown["keys"], shown["valid_keys"], shown["plan"]) == (2, 1, "pro")
    text = run("workspace", "show", workspace, "--store", url).stdout
    assert "12.5 US dollars a month" in text
    assert "0.018 US dollars" in text


def test_a_cap_is_set_and_taken_away(run: Run, url: str) -> None:
    workspace = run("workspace", "create", "Search", "--store", url).stdout.strip()
    for words, cap in (("0.000001", 1), ("0", 0), ("1000", 10**9), ("none", None)):
        assert run("workspace", "cap", workspace, words, "--store", url).exit_code == 0
        (row,) = orjson.loads(run("workspace", "list", "--json", "--store", url).stdout)
        assert row["monthly_cap_micros"] == cap


@pytest.mark.parametrize("amount", ["ten", "-1", "0.0000001", "nan", "inf", "1e30"])
def test_a_cap_is_an_amount(run: Run, sqlite_url: str, amount: str) -> None:
    workspace = run("workspace", "create", "Search", "--store", sqlite_url).stdout.strip()
    result = run("workspace", "cap", "--store", sqlite_url, "--", workspace, amount)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "US dollars" in result.stderr


def test_a_workspace_that_is_not_there_is_one_line(run: Run, url: str) -> None:
    run("workspace", "create", "Search", "--store", url)
    for words in (("show", "ws_none"), ("cap", "ws_none", "1")):
        result = run("workspace", *words, "--store", url)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_the_store_may_be_named_by_the_environment(sqlite_url: str) -> None:
    command = [sys.executable, "-m", "serve_app.cli", "workspace", "create", "Search"]
    subprocess.run(command, check=True, capture_output=True, env={"SERVE_APP_STORE": sqlite_url})
    assert Path(sqlite_url.removeprefix("sqlite:")).is_file()


@pytest.mark.parametrize(
    "words",
    [
        ("workspace", "list"),
        ("key", "create", "ws_1"),
        ("key", "list", "ws_1"),
        ("key", "revoke", "key_1"),
        ("ledger", "audit"),
        ("ledger", "tail"),
        ("ledger", "export"),
        ("ledger", "usage"),
        ("ledger", "dead", "files"),
        ("ledger", "retry", "files", "--url", "jsonl:files"),
    ],
)
def test_no_other_command_makes_a_store(run: Run, sqlite_url: str, tmp_path: Path, words: tuple[str, ...]) -> None:
    result = run(*words, "--store", sqlite_url)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "There is no store" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["mysql:x", "redis://127.0.0.1:1/0"])
def test_a_store_that_does_not_answer_is_one_line(run: Run, url: str) -> None:
    result = run("workspace", "list", "--store", url)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_a_store_of_something_else_is_one_line(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"this is no database, and it is long enough to be one" * 100)
    result = run("workspace", "list", "--store", f"sqlite:{path}")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_exit_codes_are_told(run: Run) -> None:
    help_text = " ".join(run("--help").stdout.split())
    assert "Exit codes: 0 done; 1 done, and something is wrong" in help_text
    assert "Exit code 0: they agree; 1: they do not; 2: it could not be done" in " ".join(
        run("ledger", "audit", "--help").stdout.split()
    )


def test_ray_is_not_needed() -> None:
    code = "import sys, serve_app.cli; sys.exit(any(name in sys.modules for name in ('ray', 'torch', 'fastapi')))"
    subprocess.run([sys.executable, "-c", code], check=True)
