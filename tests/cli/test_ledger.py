from __future__ import annotations

import asyncio
import csv
import io
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from decimal import Decimal
from pathlib import Path

import orjson
import pytest

from serve_app.core.idempotency import Emit
from serve_app.core.ledger import SHARDS, Recorded, UsageEvent
from serve_app.stores import open_store
from serve_app.stores.sqlite import path_of
from tests.cli import books as made
from tests.cli.books import NEW, OLD, Books
from tests.cli.conftest import Run


def events_of(url: str) -> list[Recorded]:
    """All that are left."""

    async def read() -> list[Recorded]:
        store = await open_store(url)
        found = [it for shard in range(SHARDS) for it in await store.events(shard, 0, 10_000)]
        await store.close()
        return found

    return asyncio.run(read())


def add(url: str, events: Sequence[UsageEvent]) -> None:
    async def write() -> None:
        store = await open_store(url)
        await store.run([Emit(event=event) for event in events])
        await store.close()

    asyncio.run(write())


def test_an_export_is_all_events_in_order_as_cloud_events(run: Run, books: Books) -> None:
    result = run("ledger", "export", "--store", books.url)
    assert result.exit_code == 0
    lines = [orjson.loads(line) for line in result.stdout.splitlines()]
    events = events_of(books.url)
    assert [line["id"] for line in lines] == [it.event.id for it in events]
    assert [Decimal(line["data"]["amount"]) for line in lines] == [it.event.amount for it in events]
    assert {line["source"].rpartition("/")[0] for line in lines} == {"/serve-app"}
    assert result.stderr == "The 5 oldest events are no more in the ledger; its usage sums count them.\n"


def test_an_export_as_csv_has_the_same_amounts_to_the_last_digit(run: Run, books: Books) -> None:
    result = run("ledger", "export", "--format", "csv", "--store", books.url)
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    events = events_of(books.url)
    assert [row["id"] for row in rows] == [it.event.id for it in events]
    assert [Decimal(row["amount"]) for row in rows] == [it.event.amount for it in events]
    assert [(int(row["quantity"]), row["workspace"], int(row["sequence"])) for row in rows] == [
        (it.event.quantity, it.event.workspace, it.sequence) for it in events
    ]
    assert all("E" not in row["amount"] for row in rows)


def test_an_export_is_filtered_by_workspace_and_day(run: Run, sqlite_url: str) -> None:
    day_ms = 24 * 3600 * 1000
    add(sqlite_url, [made.event(f"{who}-{day}", who, 1, day * day_ms) for who in (OLD, NEW) for day in range(5)])
    words = ("--workspace", NEW, "--from", "1970-01-02", "--to", "1970-01-04", "--store", sqlite_url)
    result = run("ledger", "export", *words)
    assert [orjson.loads(line)["id"] for line in result.stdout.splitlines()] == [f"{NEW}-{day}" for day in (1, 2, 3)]
    assert result.stderr == ""


def test_an_export_reads_page_by_page(run: Run, sqlite_url: str) -> None:
    add(sqlite_url, [made.event(f"id-{at}", NEW, at, at) for at in range(1201)])
    lines = run("ledger", "export", "--store", sqlite_url).stdout.splitlines()
    assert [orjson.loads(line)["id"] for line in lines] == [f"id-{at}" for at in range(1201)]
    tail = run("ledger", "tail", "-n", "700", "--json", "--workspace", NEW, "--store", sqlite_url).stdout.splitlines()
    assert tail == lines[-700:]
    assert run("ledger", "tail", "-n", "0", "--store", sqlite_url).stdout == ""


def test_a_file_appears_when_it_is_complete(run: Run, books: Books, tmp_path: Path) -> None:
    out = tmp_path / "out" / "usage.jsonl"
    result = run("ledger", "export", "--out", out, "--store", books.url)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)  # no such folder
    out.parent.mkdir()
    assert run("ledger", "export", "--out", out, "--store", books.url).exit_code == 0
    assert [path.name for path in out.parent.iterdir()] == ["usage.jsonl"]
    assert out.read_text() == run("ledger", "export", "--store", books.url).stdout


def test_a_draft_that_fails_leaves_what_was_there(
    run: Run, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(sqlite_url, [made.event("id", NEW, 1, 1)])
    out = tmp_path / "usage.jsonl"
    out.write_text("before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    result = run("ledger", "export", "--out", out, "--store", sqlite_url)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert out.read_text() == "before"
    assert not list(tmp_path.glob("*.part"))


def test_a_tail_is_the_newest_events(run: Run, books: Books) -> None:
    lines = run("ledger", "tail", "-n", "3", "--workspace", NEW, "--store", books.url).stdout.splitlines()
    assert len(lines) == 3
    assert all(NEW in line for line in lines)
    assert "5 tokens" in lines[-1]
    everything = run("ledger", "tail", "--json", "--store", books.url).stdout.splitlines()
    assert {orjson.loads(line)["id"] for line in everything} == {it.event.id for it in events_of(books.url)}


def test_a_tail_follows_until_ctrl_c(sqlite_url: str) -> None:
    add(sqlite_url, [made.event("first", NEW, 1, 1)])
    command = [sys.executable, "-m", "serve_app.cli", "ledger", "tail", "--follow", "--json", "--store", sqlite_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        assert tail.stderr is not None
        assert orjson.loads(tail.stdout.readline())["id"] == "first"
        add(sqlite_url, [made.event("other", OLD, 1, 1), made.event("second", NEW, 1, 1)])
        assert {orjson.loads(tail.stdout.readline())["id"] for _ in range(2)} == {"other", "second"}
        tail.send_signal(signal.SIGINT)
        assert tail.wait() == 0
        assert (tail.stdout.read(), tail.stderr.read()) == ("", "")


def test_usage_is_added_up_as_asked(run: Run, books: Books) -> None:
    told = orjson.loads(run("ledger", "usage", "--by", "workspace", "--json", "--store", books.url).stdout)
    assert [(row["workspace"], row["kind"]) for row in told["rows"]] == [
        (OLD, "tokens"),
        (NEW, "gpu_time"),
        (NEW, "tokens"),
    ]
    assert [row.get("input_tokens") for row in told["rows"]] == [100, None, 103]
    assert told["rows"][1]["reserved_gpu_hours"] == "0.5"
    assert told["total_micros"] == 1_200_000 + 2  # 203 tokens at 0.009 dollars a million are 1.827 micro-dollars


def test_usage_is_a_table(run: Run, books: Books) -> None:
    result = run("ledger", "usage", "--workspace", NEW, "--store", books.url)
    assert result.exit_code == 0
    assert "BAAI/bge-m3" in result.stdout
    assert "103" in result.stdout


def test_usage_of_other_days_is_none(run: Run, books: Books) -> None:
    told = run("ledger", "usage", "--to", "2020-01-01", "--json", "--store", books.url).stdout
    assert orjson.loads(told) == {"rows": [], "total_micros": 0}


@pytest.mark.parametrize("words", [("usage", "--by", "colour"), ("usage", "--from", "yesterday"), ("tail", "-n", "-1")])
def test_what_cannot_be_asked_is_refused(run: Run, books: Books, words: tuple[str, ...]) -> None:
    assert run("ledger", *words, "--store", books.url).exit_code == 2


def test_dead_letters_are_shown(run: Run, books: Books) -> None:
    result = run("ledger", "dead", "hooks", "--store", books.url)
    assert result.stdout.count("unlucky") == 2
    letters = orjson.loads(run("ledger", "dead", "hooks", "--json", "--store", books.url).stdout)
    assert [letter["recorded"]["event"]["id"] for letter in letters] == ["new-1", "old-3"]
    assert orjson.loads(run("ledger", "dead", "files", "--json", "--store", books.url).stdout) == []


def test_dead_letters_are_sent_again(run: Run, books: Books, tmp_path: Path) -> None:
    words = ("hooks", "--url", f"jsonl:{tmp_path / 'mended'}", "--store", books.url)
    result = run("ledger", "retry", *words)
    assert (result.exit_code, result.stdout) == (0, "2 taken, 0 left\n")
    lines = [line for path in (tmp_path / "mended").glob("*.jsonl") for line in path.read_bytes().splitlines()]
    assert {orjson.loads(line)["id"] for line in lines} == {"old-3", "new-1"}
    report = orjson.loads(run(*books.audit(), "--json").stdout)
    assert report["clean"]
    assert report["report"]["sinks"][1]["acknowledged"] == 12


def test_dead_letters_that_are_refused_again_stay(run: Run, books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.cli.ledger.open_sink", lambda settings, source: made.Hooks())
    words = ("ledger", "retry", "hooks", "--url", "https://hooks.example", "--store", books.url)
    result = run(*words)
    assert (result.exit_code, result.stdout) == (1, "0 taken, 2 left\n")
    assert orjson.loads(run(*words, "--json").stdout) == {"taken": 0, "left": 2}


@pytest.mark.parametrize(
    "words",
    [
        ("hooks", "--url", "ftp:x"),
        ("hooks", "--url", "https://x.example", "--secret", "whsec_AAAA"),
        ("hooks", "--url", "https://x.example", "--secret", "env:NOT_SET_ANYWHERE"),
        ("Not a name", "--url", "jsonl:x"),
    ],
)
def test_a_sink_that_cannot_be_opened_is_one_line(run: Run, books: Books, words: tuple[str, ...]) -> None:
    result = run("ledger", "retry", *words, "--store", books.url)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "whsec_AAAA" not in result.stderr


def test_a_store_that_holds_something_else_is_one_line(run: Run, sqlite_url: str) -> None:
    add(sqlite_url, [made.event("id", NEW, 1, 1)])
    with closing(sqlite3.connect(path_of(sqlite_url))) as db, db:
        db.execute("update events set body = 'secret text'")
    result = run("ledger", "audit", "--store", sqlite_url)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "secret text" not in result.stderr
