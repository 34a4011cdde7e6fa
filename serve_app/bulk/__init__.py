"""Bulk embedding through a running service: a file of texts in, a file of vectors out, in order.

`rows` reads, `client` sends, `journal` remembers what is done and durable, `output` writes, and `run` leads. Invariant:
after a crash at any instant the same command goes on where the journal ends, and what was already answered is asked for
again under the same Idempotency-Key, so that it is not billed twice. Never is more than a window of chunks in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class BulkError(Exception):
    """It cannot go on. The message is one line, for a person; what is done so far is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is asked. dimensions: None for the model's own."""

    source: Path
    out: Path
    model: str
    field: str = "text"
    id_field: str | None = None
    chunk: int = 64  # texts in one request
    dimensions: int | None = None
    base64: bool = False
    skip_bad: bool = False
    concurrency: int = 4
    restart: bool = False

    @property
    def part(self) -> Path:
        return self.out.with_name(f"{self.out.name}.part")

    @property
    def journal(self) -> Path:
        return self.out.with_name(f"{self.out.name}.journal")

    @property
    def rejected(self) -> Path:
        return self.out.with_name(f"{self.out.name}.rejected.jsonl")

    @property
    def window(self) -> int:
        """Chunks that may be read and not yet written: one slow reply does not let the others wait."""
        return 2 * self.concurrency

    def bound(self) -> dict[str, str | int | bool | None]:
        """What a resumed run must have in common with the one it goes on with: it decides what is in the chunks."""
        return {
            "input size": self.source.stat().st_size,
            "--model": self.model,
            "--field": self.field,
            "--id-field": self.id_field,
            "--chunk": self.chunk,
            "--dimensions": self.dimensions,
            "--base64": self.base64,
        }
