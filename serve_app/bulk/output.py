"""The output while it grows, and how it gets its name.

JSON Lines grow as they will be. Parquet cannot be appended to: its part file holds one Arrow stream a chunk, of which
the Parquet file is made at the end, some row groups' worth in memory at a time.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from serve_app.bulk import BulkError, Job
from serve_app.bulk.client import Vectors
from serve_app.bulk.journal import Journal, sync_folder, write_all
from serve_app.bulk.rows import PARQUET_NEEDS, Bad, Row

ROW_GROUP = 8192


class Output:
    """Part file and rejected rows, cut back to what the journal knows. Raises BulkError."""

    def __init__(self, job: Job, journal: Journal, *, integer_ids: bool) -> None:
        self._job = job
        self._journal = journal
        self._integer_ids = integer_ids
        self._parquet = is_parquet(job.out)
        self._part = _cut(job.part, journal.end)
        try:
            self._rejected = _cut(job.rejected, journal.rejected_end)
        except BaseException:
            os.close(self._part)
            raise

    def write(self, rows: tuple[Row, ...], vectors: Vectors | None, bad: tuple[Bad, ...]) -> tuple[int, int]:
        """Durable when it returns: how long the two files are then."""
        end, rejected_end = self._journal.end, self._journal.rejected_end
        if vectors is not None:
            content = self._arrow(rows, vectors) if self._parquet else self._lines(rows, vectors)
            write_all(self._part, content)
            os.fsync(self._part)
            end += len(content)
        if bad:
            content = b"".join(_rejected(it) for it in bad)
            write_all(self._rejected, content)
            os.fsync(self._rejected)
            rejected_end += len(content)
        return end, rejected_end

    def publish(self) -> None:
        """The whole output under its own name, at once."""
        if self._parquet:
            made = self._job.out.with_name(f"{self._job.out.name}.making")
            self._make_parquet(made)
            made.replace(self._job.out)
            self._job.part.unlink()
        else:
            self._job.part.replace(self._job.out)
        if not self._journal.totals.bad:
            self._job.rejected.unlink(missing_ok=True)
        sync_folder(self._job.out.parent)

    def close(self) -> None:
        os.close(self._part)
        os.close(self._rejected)

    def _lines(self, rows: tuple[Row, ...], vectors: Vectors) -> bytes:
        name = "index" if self._job.id_field is None else "id"
        option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
        told = [base64.b64encode(it.tobytes()).decode() for it in vectors] if self._job.base64 else vectors
        return b"".join(
            orjson.dumps({name: row.id, "embedding": it}, option=option) for row, it in zip(rows, told, strict=True)
        )

    def _arrow(self, rows: tuple[Row, ...], vectors: Vectors) -> bytes:
        import pyarrow as pa

        name = "index" if self._job.id_field is None else "id"
        ids: Any = [row.id if self._integer_ids else str(row.id) for row in rows]
        flat = pa.array(vectors.reshape(-1), pa.float32())
        columns = {
            name: pa.array(ids, pa.int64() if self._integer_ids else pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        }
        batch = pa.record_batch(list(columns.values()), names=list(columns))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        return bytes(sink.getvalue())

    def _make_parquet(self, path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        writer: Any = None
        held: list[Any] = []
        try:
            for table in self._tables():
                writer = writer or parquet.ParquetWriter(path, table.schema)
                held.append(table)
                if sum(it.num_rows for it in held) >= ROW_GROUP:
                    writer.write_table(pa.concat_tables(held))
                    held = []
            if writer is None:
                raise BulkError(f"{self._job.source} holds no row that can be embedded, and Parquet needs one.")
            if held:
                writer.write_table(pa.concat_tables(held))
        finally:
            if writer is not None:
                writer.close()
        with open(path, "rb+") as file:
            os.fsync(file.fileno())

    def _tables(self) -> Iterator[Any]:
        import pyarrow as pa

        start = 0
        with open(self._job.part, "rb") as file:
            for _, end in self._journal.entries:
                if end > start:
                    yield pa.ipc.open_stream(file.read(end - start)).read_all()
                start = end


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def check(job: Job) -> None:
    """Whether this output can be written. Raises BulkError."""
    if job.out.suffix.lower() not in (".jsonl", ".ndjson", ".parquet"):
        raise BulkError(f"{job.out} is neither .jsonl nor .parquet: the suffix says what is written.")
    if is_parquet(job.out):
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise BulkError(PARQUET_NEEDS) from None
        if job.base64:
            raise BulkError("--base64 is for JSON Lines: Parquet holds float32 as it is.")


def _cut(path: Path, end: int) -> int:
    """Opened to append, at that length. What is beyond it was not journaled."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    if os.fstat(fd).st_size < end:
        os.close(fd)
        raise BulkError(f"{path} is shorter than its journal says. --restart starts over.")
    os.ftruncate(fd, end)
    return fd


def _rejected(bad: Bad) -> bytes:
    fields = {"line": bad.line, "reason": bad.reason, "row": bad.row}
    return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)
