"""The input, a row at a time, and its division into chunks: the same file always yields the same chunks.

JSON Lines (one object a line), Parquet, or plain text (a line is a text), by the name's suffix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from serve_app.bulk import BulkError, Job

MAX_LINE = 16 * 2**20  # no request may be longer
CHUNK_BYTES = 96 * 2**10  # of text: about the tokens that one request of the strictest model class may hold
BATCH = 1024  # rows of Parquet that are decoded at once
PARQUET_NEEDS = "Parquet files need pyarrow: pip install 'serve-app[bulk]'."

Id = str | int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """id: the id field's value, else the index, which counts from 0."""

    id: Id
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """A row that cannot be sent. line: from 1. row: as it stands in the file, where that is a line."""

    line: int
    reason: str
    row: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One request's rows, and the bad ones among them. position: how far the input was read, in its own unit."""

    number: int
    rows: tuple[Row, ...]
    bad: tuple[Bad, ...]
    position: int

    @property
    def digest(self) -> str:
        return digest(self.rows, self.bad)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    item: Row | Bad
    bytes: int
    position: int


class Source:
    """An input file. total: of what positions count, bytes or rows."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._parquet: Any = None
        self.integer_ids = job.id_field is None  # else what the input's schema says
        suffix = job.source.suffix.lower()
        if suffix == ".parquet":
            self._read = self._parquet_rows
            self._parquet = _open_parquet(job)
            self.total = int(self._parquet.metadata.num_rows)
            if job.id_field is not None:
                import pyarrow

                self.integer_ids = pyarrow.types.is_integer(self._parquet.schema_arrow.field(job.id_field).type)
        elif suffix in (".jsonl", ".ndjson", ".txt"):
            self._read = self._text_rows if suffix == ".txt" else self._json_rows
            if suffix == ".txt" and job.id_field is not None:
                raise BulkError("A .txt file has no fields: leave --id-field out.")
            self.total = job.source.stat().st_size
        else:
            raise BulkError(f"{job.source} is neither .jsonl, .parquet nor .txt: the suffix says how it is read.")

    def chunks(self) -> Iterator[Chunk]:
        """In order. Without skip_bad raises BulkError at the first bad row."""
        rows: list[Row] = []
        bad: list[Bad] = []
        number = size = position = 0
        for read in self._read():
            if isinstance(read.item, Bad) and not self._job.skip_bad:
                raise BulkError(f"{self._job.source}, line {read.item.line}: {read.item.reason} (--skip-bad goes on).")
            full = len(rows) + len(bad) >= self._job.chunk or size + read.bytes > CHUNK_BYTES
            if full and (rows or bad):
                yield Chunk(number=number, rows=tuple(rows), bad=tuple(bad), position=position)
                rows, bad, size, number = [], [], 0, number + 1
            if isinstance(read.item, Bad):
                bad.append(read.item)
            else:
                rows.append(read.item)
            size, position = size + read.bytes, read.position
        if rows or bad:
            yield Chunk(number=number, rows=tuple(rows), bad=tuple(bad), position=position)

    def _json_rows(self) -> Iterator[_Read]:
        index = 0
        for line, raw, position in _lines(self._job.source):
            if raw is not None and not raw.strip():
                continue
            item = self._json_row(index, line, raw)
            yield _Read(item=item, bytes=len(raw or b""), position=position)
            index += 1

    def _json_row(self, index: int, line: int, raw: bytes | None) -> Row | Bad:
        if raw is None:
            return Bad(line=line, reason=f"longer than {MAX_LINE:,} bytes")
        shown = raw.decode(errors="replace").rstrip("\r\n")
        try:
            fields = orjson.loads(raw)
        except orjson.JSONDecodeError:
            return Bad(line=line, reason="no valid JSON", row=shown)
        if not isinstance(fields, dict):
            return Bad(line=line, reason="no JSON object", row=shown)
        return self._row(index, line, fields, shown)

    def _text_rows(self) -> Iterator[_Read]:
        for line, raw, position in _lines(self._job.source):
            item: Row | Bad
            if raw is None:
                item = Bad(line=line, reason=f"longer than {MAX_LINE:,} bytes")
            else:
                try:
                    text = raw.rstrip(b"\r\n").decode()
                    item = self._row(line - 1, line, {self._job.field: text}, text)
                except UnicodeDecodeError:
                    item = Bad(line=line, reason="no UTF-8")
            yield _Read(item=item, bytes=len(raw or b""), position=position)

    def _parquet_rows(self) -> Iterator[_Read]:
        columns = list(dict.fromkeys(filter(None, (self._job.field, self._job.id_field))))
        index = 0
        for batch in self._parquet.iter_batches(batch_size=BATCH, columns=columns):
            for fields in batch.to_pylist():
                item = self._row(index, index + 1, fields, None)
                index += 1
                size = len(item.text.encode()) if isinstance(item, Row) else 0
                yield _Read(item=item, bytes=size, position=index)

    def _row(self, index: int, line: int, fields: dict[str, Any], shown: str | None) -> Row | Bad:
        text, id_field = fields.get(self._job.field), self._job.id_field
        id = index if id_field is None else fields.get(id_field)
        if self._job.field not in fields:
            reason = f"has no field {self._job.field!r}"
        elif not isinstance(text, str):
            reason = f"its {self._job.field!r} is no string"
        elif not text:
            reason = f"its {self._job.field!r} is empty"
        elif "\0" in text:
            reason = f"its {self._job.field!r} holds a NUL character"
        elif isinstance(id, bool) or not isinstance(id, str | int):
            reason = f"its {id_field!r} is neither a string nor an integer"
        else:
            return Row(id=id, text=text)
        return Bad(line=line, reason=reason, row=shown)


def digest(rows: tuple[Row, ...], bad: tuple[Bad, ...] = ()) -> str:
    """Of what is in them: equal for equal rows."""
    content = [[(row.id, row.text) for row in rows], [(it.line, it.reason) for it in bad]]
    return hashlib.sha256(orjson.dumps(content)).hexdigest()


def _lines(path: Path) -> Iterator[tuple[int, bytes | None, int]]:
    """(line, its bytes or None if it is too long, position behind it)."""
    with open(path, "rb") as file:
        line = position = 0
        while raw := file.readline(MAX_LINE + 1):
            line, position = line + 1, position + len(raw)
            if len(raw) > MAX_LINE:
                if not raw.endswith(b"\n"):
                    position += _skip_line(file)
                yield line, None, position
            else:
                yield line, raw, position


def _skip_line(file: BinaryIO) -> int:
    skipped = 0
    while raw := file.readline(2**20):
        skipped += len(raw)
        if raw.endswith(b"\n"):
            break
    return skipped


def _open_parquet(job: Job) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise BulkError(PARQUET_NEEDS) from None
    try:
        file = parquet.ParquetFile(job.source)
    except pyarrow.ArrowInvalid:
        raise BulkError(f"{job.source} is no Parquet file.") from None
    for name in filter(None, (job.field, job.id_field)):
        if name not in file.schema_arrow.names:
            raise BulkError(f"{job.source} has no column {name!r}; it has: {', '.join(file.schema_arrow.names)}.")
    return file
