"""The embedded store: one SQLite file, which any number of processes of one machine may open.

A batch of steps is one transaction, synced to disk before `run` returns (WAL, synchronous=FULL); records change only as
`core/idempotency.decide` says. Writes, reads and rate limits have a connection and a thread each, so a look-up never
waits for a sync. The tables are in `sqlite_schema.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from serve_app.core.caps import notices, picos
from serve_app.core.idempotency import (
    Begin,
    Capped,
    Complete,
    Emit,
    Emitted,
    Holdings,
    Outcome,
    OverQuota,
    Record,
    Step,
    Stored,
    decide,
    is_capped,
)
from serve_app.core.keys import ApiKey, Workspace
from serve_app.core.ledger import Kind, Recorded, UsageEvent, UsageLine, month_of
from serve_app.core.limits import FULL, Buckets, Charge, Verdict
from serve_app.core.limits import decide as decide_charge
from serve_app.core.reservations import Reservation
from serve_app.stores import Clock, Cursor, DeadLetter, ShardState, Store, StoreDown, StoreUnfit
from serve_app.stores.sqlite_schema import SCHEMA

BUSY_S = 5.0  # what a writer waits for another process's transaction: each is a few milliseconds
FORGET = 64  # expired records of a workspace that a new one sweeps out
PAGE = 500

T = TypeVar("T")

_creating = threading.Lock()  # until a new file is closed, no thread of this process may connect to it


async def open(url: str, *, clock: Clock | None = None) -> Store:
    """`sqlite:PATH`; the file and its folder are made if they are missing."""
    store = SqliteStore(path_of(url), clock or _now_ms)
    await store.prepare()
    return store


def path_of(url: str) -> Path:
    """The file that `sqlite:PATH` names, absolute; `sqlite:///PATH` is understood, too."""
    path = url.removeprefix("sqlite:")
    return Path(path[2:] if path.startswith("///") else path).expanduser().absolute()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class SqliteStore:
    """See `stores.Store`."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._now_ms = clock
        self._writer = _Connection(path, "store-write")
        self._reader = _Connection(path, "store-read")
        self._limiter = _Connection(path, "store-limit", synced=False)

    async def prepare(self) -> None:
        """Make the file and its tables, or check that they are ours. Raises StoreUnfit."""
        await self._writer.call(self._prepare)

    async def run(self, steps: Sequence[Step]) -> list[Outcome]:
        return await self._writer.transact(lambda db: [self._step(db, step) for step in steps])

    async def add_workspace(self, workspace: Workspace, *, only_if_first: bool = False) -> bool:
        def add(db: sqlite3.Connection) -> bool:
            if only_if_first and db.execute("select 1 from workspaces limit 1").fetchone():
                return False
            row = (workspace.id, workspace.created_ms, workspace.to_json())
            return db.execute("insert or ignore into workspaces values (?, ?, ?)", row).rowcount == 1

        return await self._writer.transact(add)

    async def put_workspace(self, workspace: Workspace) -> None:
        await self._writer.write("update workspaces set body = ? where id = ?", workspace.to_json(), workspace.id)

    async def workspaces(self) -> list[Workspace]:
        rows = await self._reader.rows("select body from workspaces order by created_ms, id")
        return [Workspace.from_json(body) for (body,) in rows]

    async def put_key(self, key: ApiKey) -> None:
        row = (key.digest, key.workspace, key.created_ms, key.to_json())
        await self._writer.write("insert or replace into keys values (?, ?, ?, ?)", *row)

    async def find_key(self, digest: str) -> tuple[ApiKey, Workspace] | None:
        rows = await self._reader.rows(
            "select keys.body, workspaces.body from keys join workspaces on workspaces.id = keys.workspace"
            " where digest = ?",
            digest,
        )
        return (ApiKey.from_json(rows[0][0]), Workspace.from_json(rows[0][1])) if rows else None

    async def keys(self, workspace: str) -> list[ApiKey]:
        rows = await self._reader.rows("select body from keys where workspace = ? order by created_ms, body", workspace)
        return [ApiKey.from_json(body) for (body,) in rows]

    async def touch(self, used: Mapping[str, int]) -> None:
        sql = "insert into key_uses values (?, ?) on conflict do update set used_ms = max(used_ms, excluded.used_ms)"
        await self._limiter.transact(lambda db: db.executemany(sql, used.items()).rowcount)

    async def last_used(self, key_ids: Sequence[str]) -> dict[str, int]:
        marks = ", ".join("?" * len(key_ids))
        return dict(await self._reader.rows(f"select key, used_ms from key_uses where key in ({marks})", *key_ids))

    async def charge(self, charges: Sequence[Charge]) -> list[Verdict]:
        return await self._limiter.transact(
            lambda db: [_charge(db, charge, 1000 * self._now_ms()) for charge in charges]
        )

    async def events(self, shard: int, after: int, limit: int) -> list[Recorded]:
        rows = await self._reader.rows(
            "select sequence, body from events where shard = ? and sequence > ? order by sequence limit ?",
            shard,
            after,
            limit,
        )
        return [Recorded(sequence=sequence, event=UsageEvent.from_json(body)) for sequence, body in rows]

    async def shard_state(self, shard: int) -> ShardState:
        rows = await self._reader.rows(
            "select last, trimmed, trimmed_events, trimmed_quantity from shards where shard = ?", shard
        )
        if not rows:
            return ShardState()
        last, sequence, events, quantity = rows[0]
        return ShardState(last=last, trimmed=Cursor(sequence=sequence, events=events, quantity=quantity))

    async def usage(self, workspace: str | None, first_day: str, last_day: str) -> list[UsageLine]:
        rows = await self._reader.rows(
            "select workspace, day, kind, model, api_key, tier, unit_price, events, quantity from usage_days"
            " where (?1 is null or workspace = ?1) and day between ?2 and ?3 order by 1, 2, 3, 4, 5, 6, 7",
            workspace,
            first_day,
            last_day,
        )
        names = ("workspace", "day", "kind", "model", "api_key", "tier", "unit_price", "events", "quantity")
        return [UsageLine(**dict(zip(names, row, strict=True)) | {"kind": Kind(row[2])}) for row in rows]

    async def spent(self, workspace: str, month: str) -> int:
        rows = await self._reader.rows("select picos from spent where workspace = ? and month = ?", workspace, month)
        return int(rows[0][0]) if rows else 0

    async def holdings(self, workspace: str) -> Holdings:
        rows = await self._reader.rows(
            "select count(*), coalesce(sum(bytes), 0) from records where workspace = ? and expires_ms > ?",
            workspace,
            self._now_ms(),
        )
        return Holdings(records=rows[0][0], bytes=rows[0][1])

    async def records(self) -> AsyncIterator[Record]:
        last = ""
        while rows := await self._reader.rows(
            f"select {_COLUMNS}, null, blob from records where claim > ? and expires_ms > ? order by claim limit ?",
            last,
            self._now_ms(),
            PAGE,
        ):
            for row in rows:
                yield _record(row)
            last = rows[-1][0]

    async def cursor(self, sink: str, shard: int) -> Cursor:
        rows = await self._reader.rows(
            "select sequence, events, quantity from cursors where sink = ? and shard = ?", sink, shard
        )
        return Cursor(sequence=rows[0][0], events=rows[0][1], quantity=rows[0][2]) if rows else Cursor()

    async def advance(
        self, sink: str, shard: int, before: Cursor, after: Cursor, dead: Sequence[DeadLetter] = ()
    ) -> None:
        events, quantity = after.events - before.events, after.quantity - before.quantity

        def write(db: sqlite3.Connection) -> None:
            db.execute("insert or ignore into cursors values (?, ?, 0, 0, 0)", (sink, shard))
            moved = db.execute(
                "update cursors set sequence = ?, events = events + ?, quantity = quantity + ?"
                " where sink = ? and shard = ? and sequence = ?",
                (after.sequence, events, quantity, sink, shard, before.sequence),
            ).rowcount
            if moved:
                db.executemany(
                    "insert or ignore into dead_letters values (?, ?, ?, ?, ?)",
                    [(sink, shard, d.recorded.sequence, d.recorded.event.to_json(), d.reason) for d in dead],
                )

        await self._writer.transact(write)

    async def dead_letters(self, sink: str) -> list[DeadLetter]:
        rows = await self._reader.rows(
            "select shard, sequence, body, reason from dead_letters where sink = ? order by shard, sequence", sink
        )
        return [
            DeadLetter(
                shard=shard, recorded=Recorded(sequence=sequence, event=UsageEvent.from_json(body)), reason=reason
            )
            for shard, sequence, body, reason in rows
        ]

    async def bury(self, sink: str, shard: int, sequence: int) -> None:
        def write(db: sqlite3.Connection) -> None:
            gone = db.execute(
                "delete from dead_letters where sink = ? and shard = ? and sequence = ? returning body",
                (sink, shard, sequence),
            ).fetchall()
            for (body,) in gone:
                db.execute(
                    "update cursors set events = events + 1, quantity = quantity + ? where sink = ? and shard = ?",
                    (UsageEvent.from_json(body).quantity, sink, shard),
                )

        await self._writer.transact(write)

    async def trim(self, shard: int, through: int) -> None:
        def write(db: sqlite3.Connection) -> None:
            gone = db.execute(
                "delete from events where shard = ? and sequence <= ? returning sequence, body", (shard, through)
            ).fetchall()
            db.execute(
                "update shards set trimmed = max(trimmed, ?), trimmed_events = trimmed_events + ?,"
                " trimmed_quantity = trimmed_quantity + ? where shard = ?",
                (
                    max((sequence for sequence, _ in gone), default=0),
                    len(gone),
                    sum(UsageEvent.from_json(body).quantity for _, body in gone),
                    shard,
                ),
            )

        await self._writer.transact(write)

    async def reservations(self) -> list[Reservation]:
        rows = await self._reader.rows("select body from reservations where not settled order by id")
        return [Reservation.from_json(body) for (body,) in rows]

    async def put_reservation(
        self, reservation: Reservation, events: Sequence[UsageEvent] = (), *, cap_micros: int | None = None
    ) -> None:
        def write(db: sqlite3.Connection) -> None:
            row = (reservation.id, reservation.settled, reservation.to_json())
            db.execute("insert or replace into reservations values (?, ?, ?)", row)
            for event in events:
                _append(db, event, cap_micros)

        await self._writer.transact(write)

    async def purge(self, limit: int) -> int:
        now_ms = self._now_ms()
        sql = "delete from records where claim in (select claim from records where expires_ms <= ? limit ?)"
        full = "delete from buckets where max(requests_us, tokens_us) <= ?"
        await self._limiter.write(full, 1000 * now_ms)
        return await self._writer.write(sql, now_ms, limit)

    async def close(self) -> None:
        await self._limiter.close()
        await self._reader.close()
        await self._writer.close()

    def _prepare(self, db: sqlite3.Connection) -> None:
        (mode,) = db.execute("pragma journal_mode=wal").fetchone()
        if mode != "wal":
            raise StoreUnfit(f"{self._path} cannot be written ahead (journal_mode is {mode}): put it on a local disk.")
        db.execute("begin immediate")
        (version,) = db.execute("pragma user_version").fetchone()
        for step in SCHEMA[version:]:
            for statement in step:
                db.execute(statement)
        if version < len(SCHEMA):
            db.execute(f"pragma user_version={len(SCHEMA)}")
        db.execute("commit")
        if version > len(SCHEMA):
            raise StoreUnfit(f"{self._path} is of version {version}, and this program writes {len(SCHEMA)}.")

    def _step(self, db: sqlite3.Connection, step: Step) -> Outcome:
        if isinstance(step, Emit):
            return _emit(db, step)
        now_ms = self._now_ms()
        more = isinstance(step, Begin) and _forget(db, step.workspace, now_ms) == FORGET
        row = db.execute(f"select {_COLUMNS}, body, blob from records where claim = ?", (step.claim,)).fetchone()
        before = _record(row) if row else None
        holdings = _holdings(db, step.workspace, expired=before, now_ms=now_ms)
        event, cap_micros = (step.event, step.cap_micros) if isinstance(step, Complete) else (None, None)
        spent = _spent(db, event) if event is not None and cap_micros is not None else 0
        decision = decide(before, step, now_ms, holdings, spent)
        if more and isinstance(decision.outcome, OverQuota):
            return self._step(db, step)  # what has expired must not count against anybody
        if decision.record is None:
            db.execute("delete from records where claim = ?", (step.claim,))
        elif decision.record is not before:
            _write(db, decision.record)
        if decision.event is not None:
            _append(db, decision.event, cap_micros)
        return decision.outcome


class _Connection:
    """One connection in one thread. synced: what it wrote survives a crash of the machine, once it says so."""

    def __init__(self, path: Path, name: str, *, synced: bool = True) -> None:
        self._path = path
        self._synced = synced
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._db: sqlite3.Connection | None = None

    async def call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Raises StoreDown if SQLite cannot do it now."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._call, work)

    async def transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """All of it, synced, or nothing."""
        return await self.call(lambda db: _in_transaction(db, work))

    async def write(self, sql: str, *values: object) -> int:
        """One statement: how many rows it changed."""
        return await self.transact(lambda db: db.execute(sql, values).rowcount)

    async def rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        return await self.call(lambda db: db.execute(sql, values).fetchall())

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown()

    def _call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            if self._db is None:
                self._db = _connect(self._path, synced=self._synced)
            return work(self._db)
        except (sqlite3.OperationalError, sqlite3.DatabaseError, OSError) as error:
            if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
                raise
            raise StoreDown(f"SQLite: {error}") from None

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


def _connect(path: Path, *, synced: bool) -> sqlite3.Connection:
    _create(path)
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    db.execute(f"pragma synchronous={'full' if synced else 'normal'}")
    return db


def _create(path: Path) -> None:
    """The file, if it is missing: SQLite itself would let everybody read it.

    A file that is there is never opened but by SQLite: to close it drops every lock that this process has on it, and
    then another process, closing it, takes itself for the last, and deletes the log that this one goes on writing to.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _creating, contextlib.suppress(FileExistsError):
        path.touch(mode=0o600, exist_ok=False)


def _in_transaction(db: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    db.execute("begin immediate")
    try:
        result = work(db)
        assert not isinstance(result, sqlite3.Cursor), "it would be freed in another thread, while this one goes on"
        db.execute("commit")
    except BaseException:
        if db.in_transaction:
            db.execute("rollback")
        raise
    return result


def _emit(db: sqlite3.Connection, step: Emit) -> Outcome:
    if step.cap_micros is not None and is_capped(step.cap_micros, _spent(db, step.event)):
        return Capped() if not _is_there(db, step.event.id) else Emitted(new=False)
    return Emitted(new=_append(db, step.event, step.cap_micros))


def _is_there(db: sqlite3.Connection, event_id: str) -> bool:
    return db.execute("select 1 from events where id = ?", (event_id,)).fetchone() is not None


def _spent(db: sqlite3.Connection, event: UsageEvent) -> int:
    """In the event's month, by its workspace."""
    month = (event.workspace, month_of(event.day))
    row = db.execute("select picos from spent where workspace = ? and month = ?", month).fetchone()
    return int(row[0]) if row else 0


def _append(db: sqlite3.Connection, event: UsageEvent, cap_micros: int | None = None) -> bool:
    """The event in the next place of its shard, and in the sums; False if its id is in the ledger."""
    if _is_there(db, event.id):
        return False
    (sequence,) = db.execute(
        "insert into shards (shard, last) values (?, 1) on conflict do update set last = last + 1 returning last",
        (event.shard,),
    ).fetchone()
    db.execute("insert into events values (?, ?, ?, ?)", (event.shard, sequence, event.id, event.to_json()))
    price = (event.workspace, event.day, event.kind, event.model, event.api_key, event.tier, event.unit_price)
    db.execute(
        "insert into usage_days values (?, ?, ?, ?, ?, ?, ?, 1, ?)"
        " on conflict do update set events = events + 1, quantity = quantity + excluded.quantity",
        (*price, event.quantity),
    )
    spent = (event.workspace, month_of(event.day), str(_spent(db, event) + picos(event)))
    db.execute("insert or replace into spent values (?, ?, ?)", spent)
    if cap_micros is not None:
        _notify(db, event, cap_micros)
    return True


def _notify(db: sqlite3.Connection, event: UsageEvent, cap_micros: int) -> None:
    """Add the warnings that are due, each once."""
    spent = _spent(db, event)
    for notice in notices(event, cap_micros):
        if spent >= notice.at_picos:
            row = (event.workspace, month_of(event.day), cap_micros, notice.at_picos)
            if db.execute("insert or ignore into notices values (?, ?, ?, ?)", row).rowcount:
                _append(db, notice.event)


def _charge(db: sqlite3.Connection, charge: Charge, now_us: int) -> Verdict:
    row = db.execute("select requests_us, tokens_us from buckets where key = ?", (charge.key,)).fetchone()
    before = Buckets(*(max(0.0, full_us - now_us) for full_us in row)) if row else FULL
    verdict = decide_charge(before, charge)
    if verdict.buckets != before:
        full_us = (now_us + left_us for left_us in verdict.buckets)
        db.execute("insert or replace into buckets values (?, ?, ?)", (charge.key, *full_us))
    return verdict


def _forget(db: sqlite3.Connection, workspace: str, now_ms: int) -> int:
    """Expired records of the workspace, a few at a time: how many."""
    return db.execute(
        "delete from records where claim in"
        f" (select claim from records where workspace = ? and expires_ms <= ? limit {FORGET})",
        (workspace, now_ms),
    ).rowcount


def _holdings(db: sqlite3.Connection, workspace: str, *, expired: Record | None, now_ms: int) -> Holdings:
    """Of the counters that the triggers keep; without the record at hand, if it has expired and is still there."""
    row = db.execute("select records, bytes from holdings where workspace = ?", (workspace,)).fetchone()
    records, size = row or (0, 0)
    if expired is not None and expired.expires_ms <= now_ms:
        records, size = records - 1, size - expired.bytes
    return Holdings(records=records, bytes=size)


_COLUMNS = "claim, workspace, fingerprint, op, attempt, attempts, lease_ms, expires_ms, bytes, tokens, done"


def _record(row: Sequence[Any]) -> Record:
    *fields, done, body, blob = row
    names = _COLUMNS.split(", ")[:-1]
    return Record(**dict(zip(names, fields, strict=True)), reply=Stored(body=body, blob=blob) if done else None)


def _write(db: sqlite3.Connection, record: Record) -> None:
    reply = record.reply or Stored()
    fields = [getattr(record, name) for name in _COLUMNS.split(", ")[:-1]]
    db.execute(
        f"insert into records ({_COLUMNS}, body, blob) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        " on conflict do update set fingerprint = excluded.fingerprint, op = excluded.op, attempt = excluded.attempt,"
        " attempts = excluded.attempts, lease_ms = excluded.lease_ms, expires_ms = excluded.expires_ms,"
        " bytes = excluded.bytes, tokens = excluded.tokens, done = excluded.done, body = excluded.body,"
        " blob = excluded.blob",
        (*fields, record.reply is not None, reply.body, reply.blob),
    )
