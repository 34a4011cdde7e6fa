from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from serve_app.core.ledger import SHARDS, Recorded
from serve_app.sinks import MAX_BATCH, SinkDown, SinkSettings, SinkUnfit, jsonl, open_sink
from serve_app.sinks.jsonl import JsonlSink, read
from tests.sinks.events import DAY_MS, NOON_MS, as_cloud_event, batch, recorded, usage_event


def sink_at(folder: Path, *, max_file_bytes: int = jsonl.MAX_FILE_BYTES) -> JsonlSink:
    return JsonlSink(folder, source="/test", max_file_bytes=max_file_bytes)


def sequences(folder: Path, shard: int = 0) -> list[int]:
    return [int(event["sequence"]) for event in read(folder) if event["source"] == f"/test/{shard}"]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


async def write(folder: Path, *numbers: int) -> None:
    """As a writer that starts, writes and stops."""
    sink = sink_at(folder)
    await sink.deliver(0, batch(numbers))
    await sink.close()


async def test_each_line_is_a_cloud_event(tmp_path: Path) -> None:
    await write(tmp_path, 1, 2)
    events = [as_cloud_event(line) for line in files(tmp_path)[0].read_bytes().splitlines()]
    assert [event.get_id() for event in events] == ["0-1", "0-2"]
    assert events[0].get_source() == "/test/0"
    data = events[0].get_data()
    assert isinstance(data, dict)
    assert data["amount"] == "0.00000007"


async def test_a_settings_url_names_the_folder(tmp_path: Path) -> None:
    sink = open_sink(SinkSettings(name="files", url=f"jsonl:{tmp_path}/usage"), source="/test")
    assert await sink.deliver(3, batch([1], shard=3)) == []
    await sink.close()
    assert sequences(tmp_path / "usage", 3) == [1]


def test_a_url_without_a_folder_is_unfit() -> None:
    with pytest.raises(SinkUnfit, match="name a folder"):
        open_sink(SinkSettings(name="files", url="jsonl:"), source="/test")


async def test_only_the_owner_may_read(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    await write(folder, 1)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


async def test_a_line_is_synced_before_it_is_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, int]] = []

    def fsync(descriptor: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    sink = sink_at(tmp_path)
    await sink.deliver(0, batch([1]))
    (path,) = files(tmp_path)
    assert (str(path), path.stat().st_size) in synced
    assert synced[-1][0] == str(tmp_path), "and the name of a new file with its folder"
    synced.clear()
    await sink.deliver(0, batch([2]))
    assert synced == [(str(path), path.stat().st_size)]
    await sink.close()


async def test_shards_have_files_of_their_own(tmp_path: Path) -> None:
    sink = sink_at(tmp_path)
    for shard in reversed(range(SHARDS)):
        await sink.deliver(shard, batch([1, 2], shard=shard))
    await sink.close()
    assert len(files(tmp_path)) == SHARDS
    assert [event["id"] for event in read(tmp_path)] == [f"{shard}-{n}" for shard in range(SHARDS) for n in (1, 2)]


async def test_a_full_file_is_followed_by_a_new_one(tmp_path: Path) -> None:
    sink = sink_at(tmp_path, max_file_bytes=2000)
    await sink.deliver(0, batch(range(1, 11)))
    await sink.deliver(0, batch(range(11, 21)))
    await sink.close()
    assert len(files(tmp_path)) == 4
    assert all(path.stat().st_size < 3000 for path in files(tmp_path))
    assert sequences(tmp_path) == list(range(1, 21))


async def test_a_day_begins_a_new_file_and_late_lines_do_not_alternate(tmp_path: Path) -> None:
    sink = sink_at(tmp_path)
    days = [NOON_MS, NOON_MS + DAY_MS, NOON_MS, NOON_MS + DAY_MS, NOON_MS + 2 * DAY_MS]
    await sink.deliver(0, [recorded(number, time_ms=time_ms) for number, time_ms in enumerate(days, 1)])
    await sink.close()
    assert [path.name for path in files(tmp_path)] == [f"usage-0-{first:020d}.jsonl" for first in (1, 2, 5)]
    assert sequences(tmp_path) == [1, 2, 3, 4, 5]


async def test_a_new_writer_goes_on_in_the_newest_file(tmp_path: Path) -> None:
    await write(tmp_path, 1, 2)
    await write(tmp_path, 3)
    assert len(files(tmp_path)) == 1
    assert sequences(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("cut", [1, 50, 10_000])
async def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    await write(tmp_path, 1, 2)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    line = orjson.dumps({"id": "0-3", "sequence": "3", "time": "2026"}) + b"\n"
    path.write_bytes(whole + line[: min(cut, len(line) - 1)])
    assert sequences(tmp_path) == [1, 2], "a reader does not see it"
    await write(tmp_path, 3)
    assert path.read_bytes().startswith(whole)
    assert sequences(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("rubbish", [b"\0" * 4096, b"\0" * 10 + b"\n", b"{}\n", b"17\n"])
async def test_what_a_power_failure_left_is_cut_off(tmp_path: Path, rubbish: bytes) -> None:
    await write(tmp_path, 1, 2)
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes() + rubbish)
    await write(tmp_path, 2, 3)
    assert sequences(tmp_path) == [1, 2, 3]


async def test_every_place_a_crash_may_cut_leaves_each_event_once(tmp_path: Path) -> None:
    await write(tmp_path / "whole", *range(1, 5))
    (whole,) = files(tmp_path / "whole")
    content = whole.read_bytes()
    for size in range(0, len(content) + 1, 7):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / whole.name).write_bytes(content[:size])
        await write(folder, *range(1, 7))
        assert sequences(folder) == [1, 2, 3, 4, 5, 6]
        assert len(files(folder)) == 1


async def test_events_that_come_again_after_a_crash_are_skipped(tmp_path: Path) -> None:
    await write(tmp_path, *range(1, 301))  # and the cursor was not moved
    await write(tmp_path, *range(1, 501))
    assert sequences(tmp_path) == list(range(1, 501))


async def test_events_that_come_again_are_known_across_files(tmp_path: Path) -> None:
    sink = sink_at(tmp_path, max_file_bytes=2000)
    await sink.deliver(0, batch(range(1, MAX_BATCH + 1)))
    await sink.close()
    sink = sink_at(tmp_path, max_file_bytes=2000)
    await sink.deliver(0, batch(range(1, MAX_BATCH + 1)))
    await sink.deliver(0, batch(range(2, MAX_BATCH + 2)))
    await sink.close()
    assert sequences(tmp_path) == list(range(1, MAX_BATCH + 2))


async def test_events_of_another_ledger_are_not_taken_for_known_ones(tmp_path: Path) -> None:
    await write(tmp_path, 1, 2)
    sink = sink_at(tmp_path)
    with pytest.raises(SinkDown, match="its own folder"):
        await sink.deliver(0, [recorded(1), Recorded(sequence=2, event=usage_event(99))])
    await sink.close()
    assert sequences(tmp_path) == [1, 2]


async def test_what_a_dead_writer_left_is_synced_before_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(tmp_path, 1)
    (path,) = files(tmp_path)
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    await write(tmp_path, 1)
    assert str(path) in synced


async def test_a_second_writer_is_kept_out(tmp_path: Path) -> None:
    first, second = sink_at(tmp_path), sink_at(tmp_path)
    await first.deliver(0, batch([1]))
    with pytest.raises(SinkDown, match="another process"):
        await second.deliver(0, batch([1]))
    await first.close()
    await second.deliver(0, batch([1, 2]))
    await second.close()
    assert sequences(tmp_path) == [1, 2]


@pytest.mark.parametrize("new_file", [True, False])
async def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_file: bool
) -> None:
    sink = sink_at(tmp_path)
    if not new_file:
        await sink.deliver(0, batch([1]))
    pwrite, left = os.pwrite, 1000

    def pwrite_until_full(descriptor: int, chunk: memoryview, offset: int) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = pwrite(descriptor, chunk[:left], offset)
        left -= written
        return written

    monkeypatch.setattr(os, "pwrite", pwrite_until_full)
    with pytest.raises(SinkDown, match="No space left"):
        await sink.deliver(0, batch(range(2 - new_file, 10)))
    before = [path.read_bytes() for path in files(tmp_path)]
    assert all(content.endswith(b"\n") or not content for content in before)
    assert sequences(tmp_path) == ([] if new_file else [1])
    left = 10**6
    await sink.deliver(0, batch(range(2 - new_file, 10)))
    await sink.close()
    assert sequences(tmp_path) == list(range(1, 10))


async def test_a_failed_sync_is_not_trusted_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync the kernel calls the pages clean: they must be written again."""
    sink = sink_at(tmp_path)
    await sink.deliver(0, batch([1]))
    (path,) = files(tmp_path)
    size = path.stat().st_size
    with monkeypatch.context() as patch:

        def fsync(descriptor: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr(os, "fsync", fsync)
        with pytest.raises(SinkDown, match="Input/output"):
            await sink.deliver(0, batch([2]))
    assert path.stat().st_size == size
    await sink.deliver(0, batch([2]))
    await sink.close()
    assert sequences(tmp_path) == [1, 2]


async def test_files_that_are_moved_away_while_it_runs_do_not_swallow_events(tmp_path: Path) -> None:
    folder = tmp_path / "usage"
    sink = sink_at(folder)
    await sink.deliver(0, batch([1]))
    files(folder)[0].rename(tmp_path / "archive.jsonl")
    with pytest.raises(SinkDown, match="somebody else"):
        await sink.deliver(0, batch([2]))
    await sink.deliver(0, batch([2]))
    assert sequences(folder) == [2]
    folder.rename(tmp_path / "gone")
    with pytest.raises(SinkDown, match="was removed"):
        await sink.deliver(0, batch([3]))
    await sink.deliver(0, batch([3]))
    await sink.close()
    assert sequences(folder) == [3]


async def test_a_line_that_no_writer_made_is_named_by_the_reader(tmp_path: Path) -> None:
    await write(tmp_path, 1, 2)
    (path,) = files(tmp_path)
    path.write_bytes(b"a caller's text\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"usage-0-0+1\.jsonl, line 1: not a usage event"):
        list(read(tmp_path))
    sink = sink_at(tmp_path)
    with pytest.raises(SinkDown, match="not a usage event"):
        await sink.deliver(0, batch([3]))
    await sink.close()


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert list(read(tmp_path / "nowhere")) == []


async def test_a_cancelled_delivery_does_not_disturb_the_next(tmp_path: Path) -> None:
    sink = sink_at(tmp_path)
    for _ in range(20):
        delivery = asyncio.create_task(sink.deliver(0, batch(range(1, 200))))
        await asyncio.sleep(0.001)
        delivery.cancel()
        await asyncio.gather(delivery, return_exceptions=True)
    await sink.deliver(0, batch(range(1, 201)))
    await sink.close()
    assert sequences(tmp_path) == list(range(1, 201))


WRITER = """
import asyncio, sys
from pathlib import Path
from serve_app.sinks.jsonl import JsonlSink
from tests.sinks.events import batch

async def write():
    sink, first, batches = JsonlSink(Path(sys.argv[1]), source="/test", max_file_bytes=20_000), *map(int, sys.argv[2:])
    for start in range(first, first + 50 * batches, 50):
        await sink.deliver(0, batch(range(start, start + 50)))
        print(start + 49, flush=True)

asyncio.run(write())
"""


def test_killed_writers_leave_every_event_once_and_in_order(tmp_path: Path) -> None:
    acknowledged = 0
    for batches_before_the_kill in (3, 7, 1, 5):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(acknowledged + 1), str(batches_before_the_kill + 8)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        for _ in range(batches_before_the_kill):
            acknowledged = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()  # what it acknowledged beyond that is lost with the cursor, and comes again
        assert sequences(tmp_path)[:acknowledged] == list(range(1, acknowledged + 1))
    asyncio.run(write(tmp_path, *range(acknowledged + 1, acknowledged + MAX_BATCH)))
    found = sequences(tmp_path)
    assert found == list(range(1, len(found) + 1))
