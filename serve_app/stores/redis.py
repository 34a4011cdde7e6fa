"""The shared store: one Redis, which the processes of any number of machines may use.

A step is one Lua script, a batch of steps one round trip; `appendfsync always` makes each durable before its answer.
The scripts are in `redis_scripts.py`, their arguments in `redis_wire.py`, the connection in `redis_client.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from serve_app.core import caps, ledger
from serve_app.core.idempotency import Holdings, Outcome, Record, Step
from serve_app.core.keys import ApiKey, Workspace
from serve_app.core.ledger import SHARDS, Recorded, UsageEvent, UsageLine
from serve_app.core.limits import Charge, Verdict
from serve_app.core.reservations import Reservation
from serve_app.stores import Clock, Cursor, DeadLetter, ShardState, Store
from serve_app.stores import redis_scripts as scripts
from serve_app.stores import redis_wire as wire
from serve_app.stores.redis_client import Client, call
from serve_app.stores.redis_wire import prefix

WORKSPACES = "serve-app:{accounts}:workspaces"
KEYS = "serve-app:{accounts}:keys"
USES = "serve-app:{accounts}:uses"
PAGE = 500
TRIM_PAGE = 1000  # events that one script removes: some milliseconds, in which Redis does nothing else


async def open(url: str, *, clock: Clock | None = None) -> Store:
    """`redis://HOST:PORT/DB`. Services that share a Redis have a DB each. Raises StoreUnfit, StoreDown."""
    client = Client(url)
    store = RedisStore(client, clock)
    try:
        await client.check()
        await store.upgrade()
    except BaseException:
        await client.close()
        raise
    return store


class RedisStore:
    """See `stores.Store`. clock: None for the server's."""

    def __init__(self, client: Client, clock: Clock | None) -> None:
        self._client = client
        self._clock = clock

    async def upgrade(self) -> None:
        """Make, once, what an older version did not keep yet from what it did. Raises StoreDown."""
        names = [prefix(shard) + "counted" for shard in range(SHARDS)]
        if all(await self._client.ask(*(("EXISTS", name) for name in names))):
            return
        sums: dict[int, list[str | int]] = {shard: [] for shard in range(SHARDS)}
        for (workspace, month), lines in caps.by_month(await self.usage(None, "", "9")).items():
            sums[ledger.shard_of(workspace)] += [workspace, month, *wire.amount_args(caps.picos_of_lines(lines))]
        await self._client.ask(*(call(scripts.COUNT, prefix(shard), *sums[shard]) for shard in sums))

    async def run(self, steps: Sequence[Step]) -> list[Outcome]:
        now = self._now()
        replies = await self._client.ask(*(wire.command(step, now) for step in steps)) if steps else []
        return [wire.outcome(*reply) for reply in replies]

    async def add_workspace(self, workspace: Workspace, *, only_if_first: bool = False) -> bool:
        row = (workspace.id, workspace.to_json(), int(only_if_first))
        (added,) = await self._client.ask(call(scripts.ADD_WORKSPACE, WORKSPACES, *row))
        return bool(added)

    async def put_workspace(self, workspace: Workspace) -> None:
        await self._client.ask(("HSET", WORKSPACES, workspace.id, workspace.to_json()))

    async def workspaces(self) -> list[Workspace]:
        (bodies,) = await self._client.ask(("HVALS", WORKSPACES))
        return sorted(map(Workspace.from_json, bodies), key=lambda workspace: (workspace.created_ms, workspace.id))

    async def put_key(self, key: ApiKey) -> None:
        await self._client.ask(
            ("SADD", f"{KEYS}:{key.workspace}", key.digest),  # first: a name without a key is passed over
            ("HSET", KEYS, key.digest, key.to_json()),
        )

    async def find_key(self, digest: str) -> tuple[ApiKey, Workspace] | None:
        (body,) = await self._client.ask(("HGET", KEYS, digest))
        if body is None:
            return None
        key = ApiKey.from_json(body)
        (body,) = await self._client.ask(("HGET", WORKSPACES, key.workspace))
        return None if body is None else (key, Workspace.from_json(body))

    async def keys(self, workspace: str) -> list[ApiKey]:
        (digests,) = await self._client.ask(("SMEMBERS", f"{KEYS}:{workspace}"))
        if not digests:
            return []
        (bodies,) = await self._client.ask(("HMGET", KEYS, *digests))
        keys = [key for key in map(ApiKey.from_json, filter(None, bodies)) if key.workspace == workspace]
        return sorted(keys, key=lambda key: (key.created_ms, key.id))

    async def touch(self, used: Mapping[str, int]) -> None:
        await self._client.ask(call(scripts.TOUCH, USES, *(part for use in used.items() for part in use)))

    async def last_used(self, key_ids: Sequence[str]) -> dict[str, int]:
        if not key_ids:
            return {}
        (times,) = await self._client.ask(("HMGET", USES, *key_ids))
        return {key: int(time_ms) for key, time_ms in zip(key_ids, times, strict=True) if time_ms is not None}

    async def charge(self, charges: Sequence[Charge]) -> list[Verdict]:
        now = self._now()
        replies = await self._client.ask(*(wire.charge(charge, now) for charge in charges)) if charges else []
        return [wire.verdict(reply) for reply in replies]

    async def events(self, shard: int, after: int, limit: int) -> list[Recorded]:
        (entries,) = await self._client.ask(("XRANGE", prefix(shard) + "events", f"{after + 1}-0", "+", "COUNT", limit))
        return [
            Recorded(sequence=int(entry.partition(b"-")[0]), event=UsageEvent.from_json(fields[b"event"]))
            for entry, fields in entries
        ]

    async def shard_state(self, shard: int) -> ShardState:
        trimmed, last = await self._client.ask(
            ("HMGET", prefix(shard) + "trimmed", "sequence", "events", "quantity"), ("GET", prefix(shard) + "last")
        )  # in this order: what was trimmed never reaches beyond the last
        return ShardState(last=int(last or 0), trimmed=wire.cursor(trimmed))

    async def usage(self, workspace: str | None, first_day: str, last_day: str) -> list[UsageLine]:
        lines: list[UsageLine] = []
        for shard in range(SHARDS) if workspace is None else [ledger.shard_of(workspace)]:
            lowest, highest = ("-", "+") if workspace is None else (f"[{workspace} ", f"[{workspace} \xff")
            (members,) = await self._client.ask(("ZRANGEBYLEX", prefix(shard) + "days", lowest, highest))
            wanted = [
                (holder, day)
                for holder, _, day in (member.decode().rpartition(" ") for member in members)
                if workspace in (None, holder) and first_day <= day <= last_day
            ]
            sums = await self._client.ask(*(("HGETALL", f"{prefix(shard)}usage:{who} {day}") for who, day in wanted))
            for (holder, day), sum_of in zip(wanted, sums, strict=True):
                lines += wire.lines(holder, day, sum_of)
        return lines

    async def spent(self, workspace: str, month: str) -> int:
        name = f"{prefix(ledger.shard_of(workspace))}spent:{workspace}"
        ((micros, picos),) = await self._client.ask(("HMGET", name, month, f"{month}:picos"))
        return int(micros or 0) * caps.PICOS_PER_MICRO + int(picos or 0)

    async def holdings(self, workspace: str) -> Holdings:
        command = call(scripts.HOLDINGS, prefix(ledger.shard_of(workspace)), self._now(), workspace)
        ((records, size),) = await self._client.ask(command)
        return Holdings(records=records, bytes=size)

    async def records(self) -> AsyncIterator[Record]:
        for shard in range(SHARDS):
            (holders,) = await self._client.ask(("SMEMBERS", prefix(shard) + "holders"))
            for workspace in holders:
                async for page in self._claims(f"{prefix(shard)}held:{workspace.decode()}"):
                    now_ms = await self._now_ms()
                    names = [f"{prefix(shard)}record:{claim}" for claim in page]
                    rows = await self._client.ask(*(("HMGET", name, *wire.RECORD_FIELDS) for name in names))
                    for claim, row in zip(page, rows, strict=True):
                        if row[0] is not None and (record := wire.record(claim, row)).expires_ms > now_ms:
                            yield record

    async def cursor(self, sink: str, shard: int) -> Cursor:
        (row,) = await self._client.ask(("HMGET", f"{prefix(shard)}cursor:{sink}", "sequence", "events", "quantity"))
        return wire.cursor(row)

    async def advance(
        self, sink: str, shard: int, before: Cursor, after: Cursor, dead: Sequence[DeadLetter] = ()
    ) -> None:
        letters = [part for letter in dead for part in (letter.recorded.sequence, wire.letter(letter))]
        more = (after.events - before.events, after.quantity - before.quantity)
        await self._client.ask(
            call(scripts.ADVANCE, prefix(shard), sink, before.sequence, after.sequence, *more, *letters)
        )

    async def dead_letters(self, sink: str) -> list[DeadLetter]:
        shards = await self._client.ask(*(("HGETALL", f"{prefix(shard)}dead:{sink}") for shard in range(SHARDS)))
        return [
            wire.dead_letter(shard, sequence, letters[sequence])
            for shard, letters in enumerate(shards)
            for sequence in sorted(letters, key=int)
        ]

    async def bury(self, sink: str, shard: int, sequence: int) -> None:
        (letter,) = await self._client.ask(("HGET", f"{prefix(shard)}dead:{sink}", sequence))
        if letter is not None:
            quantity = wire.dead_letter(shard, sequence, letter).recorded.event.quantity
            await self._client.ask(call(scripts.BURY, prefix(shard), sink, sequence, quantity))

    async def trim(self, shard: int, through: int) -> None:
        gone = TRIM_PAGE
        while gone == TRIM_PAGE:
            (gone,) = await self._client.ask(call(scripts.TRIM, prefix(shard), through, TRIM_PAGE))

    async def reservations(self) -> list[Reservation]:
        shards = await self._client.ask(*(("HVALS", prefix(shard) + "reservations") for shard in range(SHARDS)))
        found = [Reservation.from_json(body) for bodies in shards for body in bodies]
        return sorted(found, key=lambda reservation: reservation.id)

    async def put_reservation(
        self, reservation: Reservation, events: Sequence[UsageEvent] = (), *, cap_micros: int | None = None
    ) -> None:
        if any(event.workspace != reservation.workspace for event in events):
            raise ValueError("a reservation bills its own workspace")
        kept = b"" if reservation.settled else reservation.to_json()
        bills = [list(wire.bill_args(event, cap_micros)) for event in events]
        shard, row = prefix(ledger.shard_of(reservation.workspace)), (reservation.workspace, reservation.id, kept)
        sizes, parts = {len(bill) for bill in bills}, [part for bill in bills for part in bill]
        await self._client.ask(call(scripts.PUT_RESERVATION, shard, "", *row, *sizes, *parts))

    async def purge(self, limit: int) -> int:
        gone = 0
        for shard in range(SHARDS):
            (here,) = await self._client.ask(call(scripts.PURGE, prefix(shard), self._now(), limit - gone))
            gone += here
        return gone

    async def close(self) -> None:
        await self._client.close()

    async def _claims(self, held: str) -> AsyncIterator[list[str]]:
        """Claims of a workspace, in pages; each once, and all that are there from the first page to the last."""
        seen: set[bytes] = set()
        cursor, page = 0, []
        while True:
            ((cursor, page),) = await self._client.ask(("ZSCAN", held, cursor, "COUNT", PAGE))
            fresh = {claim for claim, _ in page} - seen
            seen |= fresh
            if fresh:
                yield [claim.decode() for claim in fresh]
            if not cursor:
                return

    def _now(self) -> str:
        """For a script: empty, to let it ask the server."""
        return "" if self._clock is None else str(self._clock())

    async def clock_ms(self) -> int:
        """Now, as the server has it: what every lease and expiry goes by."""
        return await self._now_ms()

    async def _now_ms(self) -> int:
        if self._clock is not None:
            return self._clock()
        ((seconds, micros),) = await self._client.ask(("TIME",))
        return int(seconds * 1000 + micros // 1000)
