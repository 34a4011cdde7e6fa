"""A bulk run from its first chunk, or from where the last one ended, to the file's name.

Chunks are sent side by side and written in order. What is not yet journaled when the run ends, in whatever way, is read
and asked for again by the next one.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from serve_app.bulk import BulkError, Job, output
from serve_app.bulk.client import Answer, Client
from serve_app.bulk.journal import Entry, Journal, Totals, sync_folder
from serve_app.bulk.output import Output
from serve_app.bulk.rows import Chunk, Source

Connect = Callable[[str], Client]  # with the run's id


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """totals: of the whole file. now: of this run alone. resumed: chunks that were done before it."""

    totals: Totals
    now: Totals
    resumed: int
    seconds: float
    fingerprint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """position, total: of the input, in its own unit."""

    position: int
    total: int
    rows: int


Tell = Callable[[Progress], None]


async def embed(job: Job, connect: Connect, tell: Tell = lambda _: None) -> Summary:
    """Raises BulkError, OSError."""
    output.check(job)
    if job.source.absolute() == job.out.absolute():
        raise BulkError("--out is the input itself.")
    if job.out.exists() and not job.journal.exists() and not job.restart:
        raise BulkError(f"{job.out} is there already. --restart makes it anew.")
    source = Source(job)
    started_s = time.monotonic()
    journal = Journal(job)
    try:
        resumed, now = len(journal.entries), Totals()
        if not (journal.finished and job.out.exists() and not job.part.exists()):  # else only the journal was left
            written = Output(job, journal, integer_ids=source.integer_ids)
            try:
                await _Run(job, source, journal, written, now, tell).through(connect)
                journal.finish()
                written.publish()
            finally:
                written.close()
        job.journal.unlink()
        sync_folder(job.out.parent)
    finally:
        journal.close()
    return Summary(
        totals=journal.totals,
        now=now,
        resumed=resumed,
        seconds=time.monotonic() - started_s,
        fingerprint=journal.space[0] if journal.space else None,
    )


class _Run:
    def __init__(
        self,
        job: Job,
        source: Source,
        journal: Journal,
        written: Output,
        now: Totals,
        tell: Tell,
    ) -> None:
        self._job = job
        self._source = source
        self._journal = journal
        self._output = written
        self._now = now
        self._tell = tell
        self._done = [digest for digest, _ in journal.entries]
        self._verified = 0
        self._slots = asyncio.Semaphore(job.concurrency)

    async def through(self, connect: Connect) -> None:
        client = connect(self._journal.run)
        asked: deque[tuple[Chunk, asyncio.Task[Answer | None]]] = deque()
        try:
            chunks = self._source.chunks()
            while (chunk := self._next_new(chunks)) is not None:
                asked.append((chunk, asyncio.create_task(self._ask(client, chunk))))
                if len(asked) == self._job.window:
                    await self._settle(*asked.popleft())
            while asked:
                await self._settle(*asked.popleft())
        finally:
            for _, task in asked:
                task.cancel()
            await asyncio.gather(*(task for _, task in asked), return_exceptions=True)
            await client.close()

    def _next_new(self, chunks: Iterator[Chunk]) -> Chunk | None:
        """The next that is not done. Those that are must be what they were. Raises BulkError."""
        for chunk in chunks:
            if chunk.number >= len(self._done):
                return chunk
            if chunk.digest != self._done[chunk.number]:
                break
            self._verified += 1
        if self._verified < len(self._done):
            raise BulkError(f"{self._job.source} is not what it was when this run began. --restart starts over.")
        return None

    async def _ask(self, client: Client, chunk: Chunk) -> Answer | None:
        async with self._slots:
            return await client.embed(chunk)

    async def _settle(self, chunk: Chunk, task: asyncio.Task[Answer | None]) -> None:
        answer = await task
        if answer is not None:
            self._journal.check_space(answer.fingerprint, answer.vectors.shape[1])
        entry = self._write(chunk, answer)  # here, not in a thread: an interrupt finds it done or not begun
        self._now.add(entry)
        self._tell(Progress(position=chunk.position, total=self._source.total, rows=self._journal.totals.rows))

    def _write(self, chunk: Chunk, answer: Answer | None) -> Entry:
        end, rejected_end = self._output.write(chunk.rows, None if answer is None else answer.vectors, chunk.bad)
        entry = Entry(
            chunk=chunk.number,
            digest=chunk.digest,
            rows=len(chunk.rows),
            bad=len(chunk.bad),
            tokens=answer.tokens if answer else 0,
            requests=answer.requests if answer else 0,
            replayed=answer.replayed if answer else 0,
            fingerprint=answer.fingerprint if answer else None,
            width=answer.vectors.shape[1] if answer else None,
            end=end,
            rejected_end=rejected_end,
        )
        self._journal.add(entry)
        return entry
