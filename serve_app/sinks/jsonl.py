"""Usage events as files: a CloudEvent a line, a run of files for each shard, a new one when it is full or a day begins.

The files hold every event once and in order: a line is on disk before it is acknowledged, what a crash left behind the
last whole line is cut off, and events that come again are known by sequence and id. `read` gives them to the audit.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from serve_app.core.ledger import Recorded, cloud_event
from serve_app.sinks import MAX_BATCH, Refused, Sink, SinkDown, SinkSettings, SinkUnfit

MAX_FILE_BYTES = 16 * 2**20  # some twenty thousand events; the newest file is read whole once, when a writer starts
REMEMBERED = 2 * MAX_BATCH  # lines of a shard that may come again: one batch, and as many to spare


def open(settings: SinkSettings, *, source: str) -> Sink:
    folder = settings.url.removeprefix("jsonl:")
    if not folder:
        raise SinkUnfit(f"sink {settings.name}: name a folder, as in jsonl:data/usage")
    return JsonlSink(Path(folder), source=source)


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """All events, shard by shard, in order. Raises ValueError for a line that no writer made."""
    for path in _files(folder):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):  # else its writer is in the middle of it, or died there
                    yield _parse(line, f"{path.name}, line {number}")


@dataclass(slots=True, kw_only=True)
class _End:
    """Where a shard's newest file ends. Whatever lies behind `size` was never acknowledged."""

    path: Path | None = None
    size: int = 0
    day: str = ""
    recent: dict[int, str] = field(default_factory=dict)  # sequence -> id of the last lines, in order

    @property
    def sequence(self) -> int:
        return next(reversed(self.recent), 0)


class JsonlSink:
    """One writer a folder: a lock keeps a second process out."""

    def __init__(self, folder: Path, *, source: str, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self._folder = folder
        self._source = source
        self._max_file_bytes = max_file_bytes
        self._ends: dict[int, _End] = {}
        self._lock: int | None = None
        self._writing = threading.Lock()  # a cancelled `deliver` leaves its thread at work

    async def deliver(self, shard: int, batch: Sequence[Recorded]) -> list[Refused]:
        try:
            await asyncio.to_thread(self._append, shard, batch)
        except FileNotFoundError:
            await self.close()
            raise SinkDown("the folder was removed; it is made again") from None
        except OSError as error:
            raise SinkDown(f"cannot write: {error.strerror or type(error).__name__}") from None
        except ValueError as error:
            raise SinkDown(str(error)) from None
        return []

    async def close(self) -> None:
        await asyncio.to_thread(self._release)

    def _append(self, shard: int, batch: Sequence[Recorded]) -> None:
        with self._writing:
            self._hold()
            if shard not in self._ends:
                self._ends[shard] = self._recover(shard)
            end = self._ends[shard]
            chunk, written = bytearray(), dict[int, str]()
            for recorded in _unwritten(end, batch):
                if self._is_full(end, len(chunk), recorded.event.day):
                    self._write(shard, end, chunk, written)
                    chunk, written = bytearray(), {}
                    end.path = self._folder / f"usage-{shard}-{recorded.sequence:020d}.jsonl"
                    end.size, end.day = 0, recorded.event.day
                chunk += orjson.dumps(cloud_event(recorded, self._source)) + b"\n"
                written[recorded.sequence] = recorded.event.id
            self._write(shard, end, chunk, written)

    def _is_full(self, end: _End, more: int, day: str) -> bool:
        # A day that is over may still get a few late lines: clocks differ, and files must not alternate.
        return end.path is None or day > end.day or end.size + more >= self._max_file_bytes

    def _write(self, shard: int, end: _End, chunk: bytearray, written: dict[int, str]) -> None:
        """All of it is on disk when this returns, or nothing is left of it."""
        if not chunk:
            return
        assert end.path is not None
        descriptor = os.open(end.path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            if os.fstat(descriptor).st_size < end.size:
                del self._ends[shard]
                raise SinkDown("somebody else changed or removed the newest file; it is read again")
            os.ftruncate(descriptor, end.size)
            try:
                _write_all(descriptor, chunk, end.size)
                os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):  # else the next write cuts it off
                    os.ftruncate(descriptor, end.size)
                raise
        finally:
            os.close(descriptor)
        if end.size == 0:
            _sync_folder(self._folder)
        end.size += len(chunk)
        end.recent |= written
        for sequence in list(end.recent)[:-REMEMBERED]:
            del end.recent[sequence]

    def _recover(self, shard: int) -> _End:
        """Where the last writer stopped. A torn line goes; what is whole is made safe, for it may be only in memory."""
        end = _End()
        for path in reversed(_files(self._folder, shard)):
            lines = path.read_bytes().splitlines(keepends=True)
            if end.path is None:
                while lines and not _is_whole(lines[-1]):
                    lines.pop()
                if not lines:
                    path.unlink()
                    continue
                end.path, end.size = path, sum(map(len, lines))
                end.day = _parse(lines[-1], path.name)["time"][:10]
                _cut(path, end.size)
            events = [_parse(line, path.name) for line in lines[-REMEMBERED:]]
            end.recent = {int(event["sequence"]): event["id"] for event in events} | end.recent
            if len(end.recent) >= REMEMBERED:
                break
        _sync_folder(self._folder)
        return end

    def _hold(self) -> None:
        if self._lock is not None:
            return
        if not self._folder.is_dir():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sync_folder(self._folder.parent)
        descriptor = os.open(self._folder / "writer.lock", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise SinkDown("another process writes to this folder") from None
        except OSError:
            os.close(descriptor)
            raise
        self._lock = descriptor

    def _release(self) -> None:
        with self._writing:
            if self._lock is not None:
                os.close(self._lock)
            self._lock = None
            self._ends.clear()  # the next writer may be another


def _unwritten(end: _End, batch: Sequence[Recorded]) -> list[Recorded]:
    last = end.sequence
    for recorded in batch:
        if recorded.sequence <= last and end.recent.get(recorded.sequence) != recorded.event.id:
            raise SinkDown("the folder holds other events under these sequence numbers: give this sink its own folder")
    return [recorded for recorded in batch if recorded.sequence > last]


def _files(folder: Path, shard: int | None = None) -> list[Path]:
    """Oldest first, shard by shard."""
    return sorted(folder.glob(f"usage-{'*' if shard is None else shard}-*.jsonl"))


def _parse(line: bytes, place: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        event = orjson.loads(line)
        if isinstance(event, dict) and {"id", "time", "sequence"} <= event.keys():
            return event
    raise ValueError(f"{place}: not a usage event")


def _is_whole(line: bytes) -> bool:
    """Power may fail when a file has grown already, but holds zeros."""
    try:
        _parse(line, "")
    except ValueError:
        return False
    return line.endswith(b"\n")


def _write_all(descriptor: int, chunk: bytearray, offset: int) -> None:
    view = memoryview(chunk)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _cut(path: Path, size: int) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Else a file's name may be lost with the power, though its bytes are not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
