from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from serve_app.core.idempotency import Abandon, Complete, Emit, Stored
from serve_app.core.ledger import shard_of
from serve_app.relay import Relay
from serve_app.stores import open_store
from tests.cli import books as made
from tests.cli.books import CLAIM, LATE_CLAIM, NEW, NEW_SHARD, OLD, OLD_SHARD, Books, op_of
from tests.cli.conftest import Run
from tests.cli.tamper import Tamper, change_line

NONE = {"double": 0, "lost": 0, "unequal": 0, "unanswered": 0}


def report_of(run: Run, books: Books) -> tuple[int, dict[str, Any]]:
    result = run(*books.audit(), "--json")
    return result.exit_code, orjson.loads(result.stdout)["report"]


def test_it_is_silent_where_all_is_well(run: Run, books: Books) -> None:
    code, report = report_of(run, books)
    assert (code, report["differences"], report["faults"]) == (0, [], NONE)
    assert (report["replies"], report["checked"], report["events"], report["trimmed"]) == (3, 3, 13, 5)
    assert report["quantity"] == (10 + 11 + 12 + 13 + 21) + 33 + (12 + 13 + 14 + 15) + 44 + 1_800_000 + 5
    none = {"never_offered": 0, "redelivered": 0}
    assert report["sinks"] == [
        {"name": "files", "acknowledged": 12, "pending": 1, "dead": 0} | none,
        {"name": "hooks", "acknowledged": 10, "pending": 1, "dead": 2} | none,
    ]


def test_it_tells_people_the_same(run: Run, books: Books) -> None:
    result = run(*books.audit())
    assert result.exit_code == 0
    assert "verdict: no difference" in result.stdout
    assert "files" in result.stdout


def test_it_changes_nothing(run: Run, books: Books) -> None:
    before = report_of(run, books)
    assert report_of(run, books) == before


PLANTS: dict[str, tuple[str, int, str, Callable[[Tamper], object]]] = {
    "an event without its reply": (
        *("unanswered", 1, op_of(CLAIM)),
        lambda it: it.remove_record(CLAIM, OLD),
    ),
    "a reply without its event": (
        *("lost", 1, op_of(LATE_CLAIM)),
        lambda it: it.change_event(NEW_SHARD, 7, id="another", details={}),
    ),
    "other tokens in a record": (
        *("unequal", 2, op_of(CLAIM)),  # than in its event, and than in the reply
        lambda it: it.change_record(CLAIM, OLD, tokens=34),
    ),
    "a key that was billed twice": (
        *("double", 1, CLAIM),
        lambda it: it.change_event(NEW_SHARD, 1, details={"idempotency": CLAIM}),
    ),
    "an event under the wrong key": (
        *("unequal", 1, op_of(CLAIM)),
        lambda it: it.change_event(OLD_SHARD, 6, details={"idempotency": "other"}),
    ),
    "an id for two events": (
        *("double", 1, f"shard {NEW_SHARD}, event 1"),
        lambda it: it.change_event(NEW_SHARD, 7, id="new-0", details={}),
    ),
    "a gap": (
        *("lost", 2, f"shard {NEW_SHARD}: no events from 2 to 3"),
        lambda it: it.remove_events(NEW_SHARD, 2, 3),
    ),
    "a gap after what was trimmed": (
        *("lost", 1, f"shard {OLD_SHARD}: no events from 6 to 6"),
        lambda it: it.remove_events(OLD_SHARD, 6),
    ),
    "a state ahead of the events": (
        *("lost", 1, f"shard {NEW_SHARD}: no events from 8 to 8"),
        lambda it: it.change_last(NEW_SHARD, 1),
    ),
    "a state behind the events": (
        *("unequal", 1, "there is event 7"),
        lambda it: it.change_last(NEW_SHARD, -1),
    ),
    "sums that are too high": (
        *("unequal", 1, f"usage of {NEW}"),
        lambda it: it.change_usage(NEW, quantity=1),
    ),
    "sums that are too low": (
        *("unequal", 1, f"usage of {NEW}"),
        lambda it: it.change_usage(NEW, events=-1),
    ),
    "sums that are too high where some were trimmed": (
        *("unequal", 1, f"usage exceeds the events of shard {OLD_SHARD}"),
        lambda it: it.change_usage(OLD, quantity=1),
    ),
    "sums that are too low where some were trimmed": (
        *("unequal", 1, f"usage exceeds the events of shard {OLD_SHARD}"),
        lambda it: it.change_usage(OLD, events=-1),
    ),
    "another quantity trimmed": (
        *("unequal", 1, f"usage exceeds the events of shard {OLD_SHARD}"),
        lambda it: it.change_trimmed(OLD_SHARD, quantity=1),
    ),
    "an event of another quantity": (
        *("unequal", 1, f"shard {NEW_SHARD}, event 1 is not that of the ledger"),
        lambda it: it.change_event(NEW_SHARD, 1, quantity=1200),
    ),
    "a cursor that counts too many events": (
        *("unequal", 1, "sink hooks: it acknowledged"),
        lambda it: it.change_cursor("hooks", NEW_SHARD, events=1),
    ),
    "a cursor that counts too few events": (
        *("unequal", 1, "sink hooks: it acknowledged"),
        lambda it: it.change_cursor("hooks", NEW_SHARD, events=-1),
    ),
    "a cursor that counts another quantity": (
        *("unequal", 1, "sink files: it acknowledged"),
        lambda it: it.change_cursor("files", OLD_SHARD, quantity=7),
    ),
    "a cursor beyond the last": (
        *("unequal", 1, "up to 9, and the last is 7"),
        lambda it: it.change_cursor("hooks", NEW_SHARD, sequence=3, events=1, quantity=5),
    ),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_it_notices(run: Run, books: Books, tamper: Tamper, plant: str) -> None:
    fault, count, words, change = PLANTS[plant]
    change(tamper)
    code, report = report_of(run, books)
    assert code == 1
    told = [difference["what"] for difference in report["differences"] if difference["fault"] == fault]
    assert any(words in what for what in told), report["differences"]
    assert report["faults"][fault] >= count


def test_what_is_told_are_all_the_faults_there_are(run: Run, books: Books, tamper: Tamper) -> None:
    tamper.change_record(CLAIM, OLD, tokens=34)
    assert report_of(run, books)[1]["faults"] == NONE | {"unequal": 2}
    tamper.remove_record(CLAIM, OLD)
    assert report_of(run, books)[1]["faults"] == NONE | {"unanswered": 1}


def test_a_bill_that_is_written_twice_is_noticed(run: Run, books: Books, tamper: Tamper) -> None:
    again = made.event("again", NEW, 5, now_ms())
    tamper.add_event(NEW_SHARD, 8, again)
    tamper.change_last(NEW_SHARD, 1)
    tamper.change_event(NEW_SHARD, 8, id=op_of(LATE_CLAIM), details={"idempotency": LATE_CLAIM})
    code, report = report_of(run, books)
    assert code == 1
    assert report["faults"]["double"] == 1


def test_a_key_whose_record_was_lost_and_that_ran_again_is_noticed(
    run: Run, books: Books, tamper: Tamper, url: str
) -> None:
    tamper.remove_record(CLAIM, OLD)

    async def once_more() -> None:
        store = await open_store(url)
        again = made.event("again", OLD, 33, now_ms(), details={"idempotency": CLAIM})
        begin = made.begin(CLAIM, OLD)
        done = Complete(
            claim=CLAIM, workspace=OLD, op="again", reply=Stored(body=made.packed(33)), bytes=1, event=again
        )
        await store.run([Abandon(claim=CLAIM, workspace=OLD, attempt="first"), replace(begin, op="again"), done])
        await store.close()

    asyncio.run(once_more())
    assert report_of(run, books)[1]["faults"] == NONE | {"double": 1}


@pytest.mark.parametrize("emitted", [True, False])
def test_a_build_that_stores_reply_and_event_apart_is_noticed_once_it_died_between(
    run: Run, books: Books, url: str, emitted: bool
) -> None:
    bill = made.event(op_of("apart"), NEW, 9, now_ms(), details={"idempotency": "apart"})
    reply = Stored(body=made.packed(9))

    async def call() -> None:
        store = await open_store(url)
        done = Complete(claim="apart", workspace=NEW, op=bill.id, reply=reply, bytes=1, event=None)
        await store.run([made.begin("apart", NEW), done, *([Emit(event=bill)] if emitted else [])])
        await store.close()

    asyncio.run(call())
    assert report_of(run, books)[1]["faults"] == NONE | {"lost": 0 if emitted else 1}


def test_a_reply_that_names_other_tokens_is_noticed(run: Run, books: Books) -> None:
    (blob,) = books.blobs.glob("*/*")
    blob.write_bytes(made.packed(45))
    assert report_of(run, books)[1]["faults"] == NONE | {"unequal": 1}
    blob.write_bytes(b"torn")
    assert report_of(run, books)[1]["faults"] == NONE | {"unequal": 1}


def test_a_blob_that_is_gone_is_no_difference(run: Run, books: Books) -> None:
    shutil.rmtree(books.blobs)
    books.blobs.mkdir()
    code, report = report_of(run, books)
    assert (code, report["replies"], report["checked"]) == (0, 3, 2)


def test_a_line_that_a_sink_lost_is_noticed(run: Run, books: Books) -> None:
    path = file_of(books, NEW_SHARD)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    code, report = report_of(run, books)
    assert (code, report["faults"]) == (1, NONE | {"lost": 1})
    assert f"shard {NEW_SHARD}, event 3" in report["differences"][0]["what"]


@pytest.mark.parametrize("other", [{"quantity": 1}, {"amount": "1"}])
def test_a_line_that_was_changed_is_noticed(run: Run, books: Books, other: dict[str, object]) -> None:
    change_line(file_of(books, NEW_SHARD), 2, **other)
    code, report = report_of(run, books)
    assert (code, report["faults"]) == (1, NONE | {"unequal": 1})


def test_a_line_that_comes_again_is_counted_and_no_difference(run: Run, books: Books) -> None:
    path = file_of(books, NEW_SHARD)
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[-1])
    code, report = report_of(run, books)
    assert (code, report["faults"], report["sinks"][0]["redelivered"]) == (0, NONE, 1)


def test_a_line_that_comes_again_with_other_contents_is_noticed(run: Run, books: Books) -> None:
    path = file_of(books, NEW_SHARD)
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[2])
    change_line(path, -1, quantity=1)
    assert report_of(run, books)[1]["faults"] == NONE | {"unequal": 1}


def test_lines_that_were_not_acknowledged_yet_are_no_difference(run: Run, books: Books) -> None:
    exported = run("ledger", "export", "--store", books.url, "--workspace", NEW)
    file_of(books, NEW_SHARD).write_text(exported.stdout)
    assert len(exported.stdout.splitlines()) == 7
    assert report_of(run, books)[1]["faults"] == NONE


def test_a_file_that_cannot_be_read_is_noticed(run: Run, books: Books) -> None:
    file_of(books, NEW_SHARD).write_bytes(b"what?\n")
    code, report = report_of(run, books)
    assert (code, report["faults"]) == (1, NONE | {"unequal": 1})


def test_a_sink_that_began_after_some_were_trimmed_is_no_difference(run: Run, books: Books) -> None:
    result = run("ledger", "audit", "--store", books.url, "--sink", "later", "--json")
    assert result.exit_code == 0
    (sink,) = orjson.loads(result.stdout)["report"]["sinks"]
    assert (sink["acknowledged"], sink["pending"], sink["never_offered"]) == (0, 8, 5)


def test_it_may_run_while_the_store_is_in_use(run: Run, books: Books, url: str) -> None:
    """Calls, bills and deliveries go on in this process while the command runs in threads of its own."""

    async def both() -> list[tuple[int, dict[str, Any]]]:
        store = await open_store(url)
        relay = Relay(store, {"hooks": made.Hooks()}, now_ms=now_ms, sleep=asyncio.sleep)
        done = asyncio.Event()

        async def use() -> None:
            at = 0
            while not done.is_set():
                at += 1
                workspace = (OLD, NEW)[at % 2]
                await made.call(store, f"busy-{at}", workspace, now_ms(), tokens=at)
                await store.run([Emit(event=made.event(f"plain-{at}", workspace, 13, now_ms()))])
                await relay._bring("hooks", shard_of(workspace))

        using = asyncio.create_task(use())
        found = [await asyncio.to_thread(report_of, run, books) for _ in range(5)]
        done.set()
        await using
        await store.close()
        return found

    found = asyncio.run(both())
    assert [(code, report["differences"]) for code, report in found] == [(0, [])] * 5
    assert found[-1][1]["events"] > found[0][1]["events"] > 13


def test_a_store_that_is_not_there_cannot_be_audited(run: Run, sqlite_url: str, tmp_path: Path) -> None:
    result = run("ledger", "audit", "--store", sqlite_url)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "There is no store" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("--sink", "files=jsonl:/nowhere"), ("--sink", "=x"), ("--blobs", "/nowhere")])
def test_what_is_not_there_cannot_be_compared(run: Run, books: Books, words: tuple[str, str]) -> None:
    result = run("ledger", "audit", "--store", books.url, *words)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def file_of(books: Books, shard: int) -> Path:
    (path,) = books.files.glob(f"usage-{shard}-*.jsonl")
    return path


def now_ms() -> int:
    return time.time_ns() // 1_000_000
