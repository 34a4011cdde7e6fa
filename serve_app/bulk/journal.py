"""What is done and durable: one line of JSON a chunk, appended and synced after the chunk's bytes in the part file.

A line that a crash cut short does not count; nor do bytes of the part file beyond what the last whole line says. So at
any instant the two files together say exactly which chunks are done.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from serve_app.bulk import BulkError, Job

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A chunk that is done. end, rejected_end: of the part file and of the rejected rows', in bytes, behind it."""

    chunk: int
    digest: str
    rows: int
    bad: int
    tokens: int
    requests: int
    replayed: int
    fingerprint: str | None
    width: int | None  # dimensions; None: nothing was asked
    end: int
    rejected_end: int


@dataclass(slots=True)
class Totals:
    rows: int = 0
    bad: int = 0
    tokens: int = 0
    chunks: int = 0
    requests: int = 0
    replayed: int = 0

    def add(self, entry: Entry) -> None:
        self.rows += entry.rows
        self.bad += entry.bad
        self.tokens += entry.tokens
        self.chunks += 1
        self.requests += entry.requests
        self.replayed += entry.replayed


class Journal:
    """Holds the lock on the run from when it is made until `close`. Raises BulkError if it is another run's."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._fd = os.open(job.journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise BulkError(f"Another process is writing {job.out}.") from None
        try:
            self._open()
        except BaseException:
            os.close(self._fd)
            raise

    def _open(self) -> None:
        self.space: tuple[str | None, int] | None = None  # whose vectors: the model's fingerprint, and how wide
        self.totals = Totals()
        self.end = self.rejected_end = 0
        self.finished = False
        self.entries: list[tuple[str, int]] = []  # of each chunk: its digest, and where its bytes end
        lines = [] if self._job.restart else self._whole_lines()
        header = _parsed(lines[0], self._job.journal) if lines else {}
        if not lines or (len(lines) == 1 and header.get("bound") != self._job.bound()):  # nothing is done yet
            self._begin()
            return
        if header.get("version") != VERSION:
            raise BulkError(f"{self._job.journal} is of another version. --restart starts over.")
        self.run = str(header["run"])
        _check_bound(header["bound"], self._job.bound())
        for line in lines[1:]:
            fields = _parsed(line, self._job.journal)
            if fields.get("finished"):
                self.finished = True
                continue
            self._count(Entry(**fields))

    def _begin(self) -> None:
        os.ftruncate(self._fd, 0)
        self.run = secrets.token_hex(16)
        self._append({"version": VERSION, "run": self.run, "bound": self._job.bound()})
        sync_folder(self._job.journal.parent)

    def _whole_lines(self) -> list[bytes]:
        with open(self._job.journal, "rb") as file:
            content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._fd, whole)
        return content[:whole].splitlines()

    def check_space(self, fingerprint: str | None, width: int) -> None:
        """Raises BulkError rather than let vectors of two models be mixed."""
        if self.space is not None and self.space != (fingerprint, width):
            raise BulkError(
                f"The model has changed since this run began (fingerprint {self.space[0]}, now {fingerprint}): "
                "its vectors do not mix. --restart starts over."
            )

    def add(self, entry: Entry) -> None:
        """Durable when it returns. The bytes it speaks of must be already."""
        self._append(asdict(entry))
        self._count(entry)

    def finish(self) -> None:
        """All chunks are done; what is left is to give the output its name."""
        if not self.finished:
            self._append({"finished": True})
            self.finished = True

    def close(self) -> None:
        os.close(self._fd)

    def _count(self, entry: Entry) -> None:
        if entry.chunk != len(self.entries):
            raise BulkError(f"{self._job.journal} is damaged. --restart starts over.")
        if entry.width is not None:
            self.space = (entry.fingerprint, entry.width)
        self.entries.append((entry.digest, entry.end))
        self.end, self.rejected_end = entry.end, entry.rejected_end
        self.totals.add(entry)

    def _append(self, fields: Mapping[str, Any]) -> None:
        write_all(self._fd, orjson.dumps(fields) + b"\n")
        os.fsync(self._fd)


def write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: Path) -> None:
    """So that a name in it survives a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _parsed(line: bytes, path: Path) -> dict[str, Any]:
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict):
        raise BulkError(f"{path} is damaged. --restart starts over.")
    return fields


def _check_bound(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            raise BulkError(
                f"This run began with another {name} ({before.get(name)}, now {value}). "
                "Use the same again, or start over with --restart."
            )
