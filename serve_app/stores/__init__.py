"""Where truth is kept: idempotency records, the ledger's events, workspaces and keys. One port, a driver a scheme.

`run` is the only way to change a record or to add an event: a batch of steps, each atomic, all durable when it returns.
Everything else here may be asked by anybody at any time. What a driver adds is one file that passes `tests/stores`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from serve_app.core.idempotency import Holdings, Outcome, Record, Step
from serve_app.core.keys import ApiKey, Workspace
from serve_app.core.ledger import Recorded, UsageEvent, UsageLine
from serve_app.core.limits import Charge, Verdict
from serve_app.core.reservations import Reservation

DEFAULT_URL = "sqlite:data/serve-app.db"

Clock = Callable[[], int]  # Unix milliseconds


class StoreDown(Exception):
    """The store did not answer, or not in time. A write may have been done: every step may be tried again."""


class StoreUnfit(Exception):
    """This store cannot keep the promise, and the service must not start on it. The message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """How far a sink has acknowledged a shard, and how much that was."""

    sequence: int = 0
    events: int = 0
    quantity: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """An event that a sink's receiver refuses for good. It is kept until somebody sends it again."""

    shard: int
    recorded: Recorded
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardState:
    """last: sequence of the newest event. trimmed: how many of the oldest were removed, and what they counted."""

    last: int = 0
    trimmed: Cursor = Cursor()


class Store(Protocol):
    """Methods raise StoreDown. Times are Unix milliseconds, by the store's own clock."""

    async def run(self, steps: Sequence[Step]) -> list[Outcome]:
        """Apply the steps in order; each is atomic, and all are durable when this returns. May be repeated whole."""
        ...

    # Workspaces and keys

    async def add_workspace(self, workspace: Workspace, *, only_if_first: bool = False) -> bool:
        """False, and nothing is added: the id exists, or `only_if_first` and there is any workspace."""
        ...

    async def put_workspace(self, workspace: Workspace) -> None:
        """Replace the one with its id."""
        ...

    async def workspaces(self) -> list[Workspace]:
        """All, oldest first."""
        ...

    async def put_key(self, key: ApiKey) -> None:
        """Add or replace, by its digest."""
        ...

    async def find_key(self, digest: str) -> tuple[ApiKey, Workspace] | None:
        """Valid or not: see `ApiKey.valid_at`."""
        ...

    async def keys(self, workspace: str) -> list[ApiKey]:
        """All of a workspace, oldest first."""
        ...

    async def touch(self, used: Mapping[str, int]) -> None:
        """These keys, by id, were used at those times. Never moves one back. Not synced, as rates are not."""
        ...

    async def last_used(self, key_ids: Sequence[str]) -> dict[str, int]:
        """When each was last used, of those that were."""
        ...

    # Rate limits

    async def charge(self, charges: Sequence[Charge]) -> list[Verdict]:
        """Decide each in turn, as `core.limits.decide` says. Not synced: a crash may forget the last moments."""
        ...

    # The ledger, read

    async def events(self, shard: int, after: int, limit: int) -> list[Recorded]:
        """In order, from the first with a sequence above `after`."""
        ...

    async def shard_state(self, shard: int) -> ShardState: ...

    async def usage(self, workspace: str | None, first_day: str, last_day: str) -> list[UsageLine]:
        """Sums by day (both inclusive, ISO), model, key and price; of every workspace if None. Kept when events go."""
        ...

    async def spent(self, workspace: str, month: str) -> int:
        """Pico-dollars: what its bills of that month (2026-11, UTC) add up to. See `core/caps.py`."""
        ...

    async def holdings(self, workspace: str) -> Holdings:
        """What counts against the workspace's quota now."""
        ...

    def records(self) -> AsyncIterator[Record]:
        """All that are not expired, in no order. `reply.body` may be left out: None where it lies in the record."""
        ...

    # Sinks

    async def cursor(self, sink: str, shard: int) -> Cursor: ...

    async def advance(
        self, sink: str, shard: int, before: Cursor, after: Cursor, dead: Sequence[DeadLetter] = ()
    ) -> None:
        """Acknowledge from there to there, unless somebody else has. Counts are added; dead letters go with it."""
        ...

    async def dead_letters(self, sink: str) -> list[DeadLetter]: ...

    async def bury(self, sink: str, shard: int, sequence: int) -> None:
        """The dead letter was delivered after all: forget it, and count it as acknowledged."""
        ...

    async def trim(self, shard: int, through: int) -> None:
        """Remove events up to that sequence; the sums of `usage` stay, and `shard_state` counts what went."""
        ...

    # Reserved GPUs

    async def reservations(self) -> list[Reservation]:
        """Those that are not settled."""
        ...

    async def put_reservation(
        self, reservation: Reservation, events: Sequence[UsageEvent] = (), *, cap_micros: int | None = None
    ) -> None:
        """Record and events in one atomic write; an event that is in the ledger is not added again.

        cap_micros: as of `Complete`. It stops nothing here, but the warnings that are due go with the events.
        """
        ...

    # Upkeep

    async def purge(self, limit: int) -> int:
        """Forget up to so many expired records. How many it were: more may be left if that is `limit`."""
        ...

    async def close(self) -> None: ...


async def open_store(url: str, *, clock: Clock | None = None) -> Store:
    """`sqlite:PATH` or `redis://HOST:PORT/DB`. clock: for tests; else the store's own. Raises StoreUnfit, StoreDown."""
    scheme = url.partition(":")[0]
    if scheme not in ("sqlite", "redis"):
        raise StoreUnfit("A store is sqlite:PATH or redis://HOST:PORT/DB.")
    driver = import_module(f"serve_app.stores.{scheme}")
    store: Store = await driver.open(url, clock=clock)
    return store


def is_local(url: str) -> bool:
    """Whether only processes of one machine can share it."""
    return url.startswith("sqlite:")
