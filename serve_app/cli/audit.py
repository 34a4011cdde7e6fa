"""How the audit is brought the store, the sinks' files and the stored replies, while all of them may be in use.

What is read first is contained in what is read later: replies and cursors before the shards' states, and events no
further than those. `core/audit.py` compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from serve_app.cli.events import PAGE
from serve_app.core import caps
from serve_app.core.audit import Audit
from serve_app.core.audit.report import Report
from serve_app.core.idempotency import Complete, Record, Replay, Stored
from serve_app.core.ledger import FIRST_DAY, LAST_DAY, SHARDS, UsageLine
from serve_app.core.replies import Reply
from serve_app.sinks import jsonl
from serve_app.stores import Cursor, DeadLetter, Store
from serve_app.stores.blobs import Blobs

ATTEMPTS = 3
REPLIES = 50  # read at once: up to 64 KiB each


class Unsettled(Exception):
    """It changed faster than it could be read."""


async def audit(store: Store, *, sinks: Mapping[str, Path | None], blobs: Blobs | None, now_ms: int) -> Report:
    """sinks: by name, the folder of one that writes files. Raises StoreDown, Unsettled."""
    for _ in range(ATTEMPTS):
        found = Audit(now_ms=now_ms)
        if await _read(store, found, sinks, blobs):
            return found.report()
    raise Unsettled("The ledger was trimmed each time it was read; try again.")


async def _read(store: Store, found: Audit, sinks: Mapping[str, Path | None], blobs: Blobs | None) -> bool:
    """False: events were removed meanwhile."""
    await _replies(store, found, blobs)
    for name, folder in sinks.items():
        cursors, dead = await _progress(store, name)
        for shard in range(SHARDS):
            letters = [letter.recorded for letter in dead if letter.shard == shard]
            found.sink(name, shard, cursors[shard], letters, lines=folder is not None)
    sure = [(await store.shard_state(shard)).last for shard in range(SHARDS)]
    lines = await store.usage(None, FIRST_DAY, LAST_DAY)
    states = [await store.shard_state(shard) for shard in range(SHARDS)]
    for shard, state in enumerate(states):
        found.shard(shard, last=state.last, trimmed=state.trimmed, sure=sure[shard])
        await _events(store, found, shard, after=state.trimmed.sequence, last=state.last)
    if [(await store.shard_state(shard)).trimmed for shard in range(SHARDS)] != [state.trimmed for state in states]:
        return False
    found.usage(lines)
    await _spending(store, found, lines)
    for name, folder in sinks.items():
        if folder is not None:
            _lines(found, name, folder)
    if doubtful := set(found.doubtful()):  # done since replies were read?
        async for record in store.records():
            if record.claim in doubtful:
                found.reply_again(record)
    return True


async def _spending(store: Store, found: Audit, lines: Sequence[UsageLine]) -> None:
    before = caps.by_month(lines)
    spent = {which: await store.spent(*which) for which in before}
    after = caps.by_month(await store.usage(None, FIRST_DAY, LAST_DAY))
    for (workspace, month), picos in spent.items():
        which = (workspace, month)
        found.spending(workspace, month, picos, before=before[which], after=after.get(which, ()))


async def _replies(store: Store, found: Audit, blobs: Blobs | None) -> None:
    batch: list[Record] = []
    async for record in store.records():
        if record.reply is not None:
            batch.append(record)
        if len(batch) == REPLIES:
            await _reply_batch(store, found, blobs, batch)
            batch = []
    await _reply_batch(store, found, blobs, batch)


async def _reply_batch(store: Store, found: Audit, blobs: Blobs | None, batch: Sequence[Record]) -> None:
    # A completion that comes again is answered with the stored reply, and changes nothing. `records` leaves it out.
    steps = [
        Complete(claim=it.claim, workspace=it.workspace, op=it.op, reply=Stored(body=b""), bytes=0, event=None)
        for it in batch
    ]
    for record, outcome in zip(batch, await store.run(steps), strict=True):
        packed = None
        if isinstance(outcome, Replay):
            packed = outcome.reply.body
            if outcome.reply.blob is not None:
                packed = blobs.read(outcome.reply.blob) if blobs else None  # one that is gone is computed again
        try:
            found.reply(record, None if packed is None else int(Reply.unpack(packed).usage["total_tokens"]))
        except (ValueError, KeyError, TypeError):
            found.reply(record)
            found.unreadable(record)


async def _progress(store: Store, name: str) -> tuple[list[Cursor], list[DeadLetter]]:
    """Cursors, and the dead letters that belong to them. Raises Unsettled."""
    before = await store.dead_letters(name)
    for _ in range(ATTEMPTS):
        cursors = [await store.cursor(name, shard) for shard in range(SHARDS)]
        after = await store.dead_letters(name)
        if {_place(letter) for letter in before} <= {_place(letter) for letter in after}:
            return cursors, after  # none was delivered after all: that would have moved the counts
        before = after
    raise Unsettled(f"Dead letters of {name} are being sent again; try again later.")


def _place(letter: DeadLetter) -> tuple[int, int]:
    return letter.shard, letter.recorded.sequence


async def _events(store: Store, found: Audit, shard: int, *, after: int, last: int) -> None:
    while page := await store.events(shard, after, PAGE):
        for recorded in page:
            if recorded.sequence <= last:
                found.event(shard, recorded)
        after = page[-1].sequence
        if after >= last:
            break
    above = await store.events(shard, last, 1)
    state = await store.shard_state(shard)
    found.shard_end(shard, above=above[0].sequence if above else None, last=state.last)


def _lines(found: Audit, name: str, folder: Path) -> None:
    try:
        for line in jsonl.read(folder):
            found.line(name, line)
    except ValueError as error:
        found.broken(name, str(error))
