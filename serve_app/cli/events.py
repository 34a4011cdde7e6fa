"""Events out of the ledger, a page at a time: filtered, and written as CloudEvents, CSV or text."""

from __future__ import annotations

import asyncio
import csv
import io
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import orjson
import typer

from serve_app.core import pricing
from serve_app.core.ledger import SHARDS, Recorded, cloud_event, shard_of
from serve_app.stores import Store

PAGE = 500
POLL_S = 1.0
CSV_COLUMNS = (
    *("id", "time", "workspace", "kind", "quantity", "unit_price", "amount", "currency", "rate_card"),
    *("plan", "tier", "model", "size_class", "api_key", "shard", "sequence"),
)

Writer = Callable[[Recorded], str]


def as_json(source: str) -> Writer:
    return lambda recorded: orjson.dumps(cloud_event(recorded, source)).decode()


def as_csv(recorded: Recorded) -> str:
    event, told = recorded.event, cloud_event(recorded, "")
    fields = told["data"] | {"id": event.id, "time": told["time"], "kind": event.kind.value}
    fields |= {"shard": event.shard, "sequence": recorded.sequence}
    return _csv([fields[column] for column in CSV_COLUMNS])


def as_text(recorded: Recorded) -> str:
    event = recorded.event
    what = f"{event.quantity:>12} {event.kind.value:<8} ${pricing.plain(event.amount)}"
    return f"{cloud_event(recorded, '')['time']}  {event.workspace}  {what}  {event.model}  {event.api_key}".rstrip()


async def between(store: Store, workspace: str | None, first_day: str, last_day: str) -> AsyncIterator[Recorded]:
    """Shard by shard, in order; what comes meanwhile is left out."""
    for shard in _shards(workspace):
        after, last = 0, (await store.shard_state(shard)).last
        while after < last and (page := await store.events(shard, after, PAGE)):
            for recorded in page:
                if (
                    recorded.sequence <= last
                    and _of(recorded, workspace)
                    and first_day <= recorded.event.day <= last_day
                ):
                    yield recorded
            after = page[-1].sequence


async def newest(store: Store, workspace: str | None, count: int, *, follow: bool) -> AsyncIterator[Recorded]:
    """The last so many, oldest first. follow: then those that come, for ever."""
    ends = {shard: (await store.shard_state(shard)).last for shard in _shards(workspace)}
    found = [recorded for shard, end in ends.items() for recorded in await _last(store, workspace, shard, end, count)]
    found.sort(key=lambda recorded: recorded.event.time_ms)
    for recorded in found[max(0, len(found) - count) :]:
        yield recorded
    while follow:
        for shard, end in ends.items():
            for recorded in await store.events(shard, end, PAGE):
                ends[shard] = recorded.sequence
                if _of(recorded, workspace):
                    yield recorded
        await asyncio.sleep(POLL_S)


async def trimmed(store: Store, workspace: str | None) -> int:
    """How many events are gone from the shards that a workspace's could be in."""
    return sum([(await store.shard_state(shard)).trimmed.events for shard in _shards(workspace)])


async def export(rows: AsyncIterator[Recorded], write: Writer, format: str, out: Path | None) -> None:
    """To stdout, or to a draft that gets its name when all is in it. Raises OSError."""
    if out is None:
        await _write(rows, write, format, typer.echo)
        return
    with _draft(out) as file:
        await _write(rows, write, format, lambda line: file.write(line + "\n"))


@contextmanager
def _draft(out: Path) -> Iterator[TextIO]:
    draft = out.with_name(f"{out.name}.part")
    try:
        with open(draft, "w", encoding="utf-8", opener=_private) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


async def _write(rows: AsyncIterator[Recorded], write: Writer, format: str, put: Callable[[str], object]) -> None:
    if format == "csv":
        put(_csv(CSV_COLUMNS))
    async for recorded in rows:
        put(write(recorded))


async def _last(store: Store, workspace: str | None, shard: int, end: int, count: int) -> list[Recorded]:
    """Backwards, a page at a time, for as long as some are wanted and some are left."""
    found: list[Recorded] = []
    oldest = (await store.shard_state(shard)).trimmed.sequence
    while end > oldest and len(found) < count:
        after = max(oldest, end - PAGE)
        page = [it for it in await store.events(shard, after, end - after) if it.sequence <= end]
        found = [it for it in page if _of(it, workspace)] + found
        end = after
    return found[max(0, len(found) - count) :]


def _of(recorded: Recorded, workspace: str | None) -> bool:
    return workspace is None or recorded.event.workspace == workspace


def _shards(workspace: str | None) -> range | list[int]:
    return range(SHARDS) if workspace is None else [shard_of(workspace)]


def _csv(fields: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(fields)
    return line.getvalue()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
