"""Changes to a store behind its driver's back, as a mistake or a crash would leave it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import orjson
import redis

from serve_app.core.ledger import UsageEvent, shard_of
from serve_app.stores.redis_wire import prefix
from serve_app.stores.sqlite import path_of


class Tamper(Protocol):
    def change_event(self, shard: int, sequence: int, **fields: Any) -> None: ...

    def remove_events(self, shard: int, *sequences: int) -> None: ...

    def add_event(self, shard: int, sequence: int, event: UsageEvent) -> None:
        """Beyond the others; state and sums stay as they are."""
        ...

    def change_record(self, claim: str, workspace: str, **fields: object) -> None: ...

    def remove_record(self, claim: str, workspace: str) -> None: ...

    def change_usage(self, workspace: str, *, events: int = 0, quantity: int = 0) -> None:
        """Add to all of its lines."""
        ...

    def change_cursor(self, sink: str, shard: int, **more: int) -> None: ...

    def change_last(self, shard: int, more: int) -> None: ...

    def change_trimmed(self, shard: int, *, quantity: int) -> None: ...


@contextmanager
def tamper_with(url: str) -> Iterator[Tamper]:
    if url.startswith("sqlite:"):
        yield SqliteTamper(url)
        return
    with closing(redis.Redis.from_url(url)) as client:
        yield RedisTamper(client)


class SqliteTamper:
    def __init__(self, url: str) -> None:
        self._path = path_of(url)

    def change_event(self, shard: int, sequence: int, **fields: Any) -> None:
        ((body,),) = self._run("select body from events where shard = ? and sequence = ?", shard, sequence)
        event = replace(UsageEvent.from_json(body), **fields)
        self._run("update events set body = ? where shard = ? and sequence = ?", event.to_json(), shard, sequence)

    def remove_events(self, shard: int, *sequences: int) -> None:
        for sequence in sequences:
            self._run("delete from events where shard = ? and sequence = ?", shard, sequence)

    def add_event(self, shard: int, sequence: int, event: UsageEvent) -> None:
        self._run("insert into events values (?, ?, ?, ?)", shard, sequence, event.id, event.to_json())

    def change_record(self, claim: str, workspace: str, **fields: object) -> None:
        sets = ", ".join(f"{name} = ?" for name in fields)
        self._run(f"update records set {sets} where claim = ?", *fields.values(), claim)

    def remove_record(self, claim: str, workspace: str) -> None:
        self._run("delete from records where claim = ?", claim)

    def change_usage(self, workspace: str, *, events: int = 0, quantity: int = 0) -> None:
        sql = "update usage_days set events = events + ?, quantity = quantity + ? where workspace = ?"
        self._run(sql, events, quantity, workspace)

    def change_cursor(self, sink: str, shard: int, **more: int) -> None:
        sets = ", ".join(f"{name} = {name} + ?" for name in more)
        self._run(f"update cursors set {sets} where sink = ? and shard = ?", *more.values(), sink, shard)

    def change_last(self, shard: int, more: int) -> None:
        self._run("update shards set last = last + ? where shard = ?", more, shard)

    def change_trimmed(self, shard: int, *, quantity: int) -> None:
        self._run("update shards set trimmed_quantity = trimmed_quantity + ? where shard = ?", quantity, shard)

    def _run(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self._path)) as db, db:
            return db.execute(sql, values).fetchall()


class RedisTamper:
    def __init__(self, client: redis.Redis) -> None:
        self._redis: Any = client

    def change_event(self, shard: int, sequence: int, **fields: Any) -> None:
        """A stream takes nothing between: all of it is written again."""
        stream = prefix(shard) + "events"
        entries = self._redis.xrange(stream)
        self._redis.delete(stream)
        for entry, parts in entries:
            if int(entry.partition(b"-")[0]) == sequence:
                event = replace(UsageEvent.from_json(parts[b"event"]), **fields)
                parts = {"event": event.to_json(), "quantity": event.quantity}
            self._redis.xadd(stream, parts, id=entry)

    def remove_events(self, shard: int, *sequences: int) -> None:
        names = [f"{sequence}-0" for sequence in sequences]
        assert self._redis.xdel(prefix(shard) + "events", *names) == len(names)

    def add_event(self, shard: int, sequence: int, event: UsageEvent) -> None:
        parts = {"event": event.to_json(), "quantity": event.quantity}
        self._redis.xadd(prefix(shard) + "events", parts, id=f"{sequence}-0")

    def change_record(self, claim: str, workspace: str, **fields: Any) -> None:
        self._redis.hset(f"{prefix(shard_of(workspace))}record:{claim}", mapping=fields)

    def remove_record(self, claim: str, workspace: str) -> None:
        assert self._redis.delete(f"{prefix(shard_of(workspace))}record:{claim}") == 1

    def change_usage(self, workspace: str, *, events: int = 0, quantity: int = 0) -> None:
        for name in self._redis.keys(f"{prefix(shard_of(workspace))}usage:{workspace} *"):
            for field in self._redis.hkeys(name):
                what = field.partition(b":")[0].decode()
                self._redis.hincrby(name, field, {"events": events, "quantity": quantity}[what])

    def change_cursor(self, sink: str, shard: int, **more: int) -> None:
        for name, by in more.items():
            self._redis.hincrby(f"{prefix(shard)}cursor:{sink}", name, by)

    def change_last(self, shard: int, more: int) -> None:
        self._redis.incrby(prefix(shard) + "last", more)

    def change_trimmed(self, shard: int, *, quantity: int) -> None:
        self._redis.hincrby(prefix(shard) + "trimmed", "quantity", quantity)


def change_line(path: Path, index: int, **data: object) -> None:
    """Other data in one line of a sink's file."""
    lines = path.read_bytes().splitlines()
    event = orjson.loads(lines[index])
    lines[index] = orjson.dumps(event | {"data": event["data"] | data})
    path.write_bytes(b"\n".join(lines) + b"\n")
