"""What an ingress writes into the books: claims on idempotency keys, replies, and bills.

A request without a key is billed straight into the store. One with a key goes through the clerk of its claim (the
idempotency actor), which answers once claim, or reply and bill together, are durable. Nothing here fails because an
actor or the store is briefly gone: it waits, and repeats the same step.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from serve_app import tracing
from serve_app.accounts import Caller
from serve_app.apart import apart
from serve_app.core import idempotency, pricing
from serve_app.core.errors import (
    IdempotencyConflict,
    IdempotencyInProgress,
    PlanLimitExceeded,
    RateLimitExceeded,
    StoreUnavailable,
)
from serve_app.core.idempotency import (
    Abandon,
    Begin,
    Busy,
    Capped,
    ClaimStep,
    Complete,
    Emit,
    Mismatch,
    Outcome,
    OverQuota,
    Proceed,
    Renew,
    Replay,
    Settled,
    Step,
    Stored,
)
from serve_app.core.keys import Workspace
from serve_app.core.ledger import UsageEvent, UsageLine, month_of
from serve_app.core.metrics import IngressMetrics
from serve_app.core.replies import Reply
from serve_app.core.settings import IngressSettings
from serve_app.gather import Gather
from serve_app.stores import Store
from serve_app.stores.blobs import Blobs
from serve_app.stores.patience import patiently

INLINE_BYTES = 64 * 1024  # larger replies are files: in Redis they would hold up everybody else
BATCH = 64  # bills in one write to the store
SPENT_S = 2.0  # how long a workspace's spending is remembered
MOST_SPENT = 10_000
RELEASE_S = 5.0  # what a failed call tries to free its key; after that its lease lapses

logger = logging.getLogger(__name__)


class Clerk(Protocol):
    """The way to the desk of a claim: see `desk.Desk`. Both raise StoreDown, and may be repeated."""

    async def run(self, step: ClaimStep) -> Outcome: ...

    async def wait(self, step: Begin, wait_s: float) -> Outcome: ...


@dataclass(slots=True, kw_only=True)
class Claim:
    """The right to run a call. op: its operation's id, and its bill's."""

    id: str
    workspace: str
    op: str
    attempt: str
    lost_blob: str | None = None  # it ran before and is billed, but this file of its reply is gone
    keeper: asyncio.Task[None] | None = None


class Books:
    def __init__(
        self, store: Store, clerk: Clerk, blobs: Blobs, settings: IngressSettings, metrics: IngressMetrics
    ) -> None:
        self._store = store
        self._clerk = clerk
        self._blobs = blobs
        self._settings = settings
        self._metrics = metrics
        self._write: Gather[Step, Outcome] = Gather(store.run, max_items=BATCH)
        self._spent: dict[tuple[str, str], tuple[float, int]] = {}  # by workspace and month: until when, and how much

    async def check_cap(self, workspace: Workspace, month: str) -> None:
        """Before anything is computed: raises PlanLimitExceeded if the month's spending has reached the cap.

        By what was known within `SPENT_S`; `bill` and `settle` go by the moment. Raises StoreUnavailable.
        """
        if workspace.monthly_cap_micros is None:
            return
        until_s, spent = self._spent.get((workspace.id, month), (0.0, 0))
        if time.monotonic() >= until_s:
            until_s = time.monotonic() + SPENT_S
            spent = await patiently(lambda: self._store.spent(workspace.id, month), for_s=self._settings.patience_s)
            self._spent[workspace.id, month] = (until_s, spent)
            while len(self._spent) > MOST_SPENT:
                del self._spent[next(iter(self._spent))]
        if idempotency.is_capped(workspace.monthly_cap_micros, spent):
            raise _capped(workspace)

    async def bill(self, workspace: Workspace, event: UsageEvent) -> None:
        """Durable when this returns. Raises PlanLimitExceeded (nothing is billed), StoreUnavailable."""
        step = Emit(event=event, cap_micros=workspace.monthly_cap_micros)
        with tracing.span("store"):
            outcome = await patiently(lambda: self._write(step), for_s=self._settings.patience_s)
        if isinstance(outcome, Capped):
            raise self._now_capped(workspace, event)

    async def usage(self, workspace: Workspace, first_day: str, last_day: str) -> list[UsageLine]:
        """Both days inclusive. Raises StoreUnavailable."""
        return await patiently(
            lambda: self._store.usage(workspace.id, first_day, last_day), for_s=self._settings.patience_s
        )

    async def begin(self, caller: Caller, route: str, key: str, canonical: bytes, reply_bytes: int) -> Claim | Reply:
        """The right to run this call, or the reply of the time that it ran. A duplicate waits for the first.

        canonical: the parsed request; reply_bytes: how long its reply will be. Raises IdempotencyConflict,
        IdempotencyInProgress, RateLimitExceeded (too much is kept already), StoreUnavailable.
        """
        claim, attempt = idempotency.claim_id(caller.workspace.id, route, key), uuid.uuid4().hex
        step = Begin(
            claim=claim,
            workspace=caller.workspace.id,
            fingerprint=idempotency.fingerprint(key, canonical),
            attempt=attempt,
            op=idempotency.op_id(claim, attempt),
            lease_ms=int(1000 * self._settings.lease_s),
            reserve_bytes=reply_bytes,
            max_bytes=self._settings.replay_bytes,
            max_records=self._settings.replay_records,
        )
        try:
            outcome = await self._ask(step)
            if isinstance(outcome, Busy) and self._settings.duplicate_wait_s:
                outcome = await self._ask(step, wait_s=self._settings.duplicate_wait_s)
        except asyncio.CancelledError:  # nobody waits any more, but the claim may have been granted
            apart(self._abandon(step))
            raise
        self._metrics.claims.add(type(outcome).__name__.lower())
        match outcome:
            case Proceed(op=op):
                return self._granted(step, op)
            case Replay(reply=stored, op=op):
                return await self._read(stored) or self._lost(step, op, stored)
            case Busy(lease_left_ms=left_ms):
                raise IdempotencyInProgress("The first call with this key still runs.", retry_after_s=left_ms / 1000)
            case Mismatch():
                raise IdempotencyConflict(
                    "This Idempotency-Key was used for another request. If it is a default of your client, "
                    "send one for each request instead."
                )
            case OverQuota(holdings=holdings):
                raise RateLimitExceeded(
                    f"{holdings.records:,} replies of {holdings.bytes:,} bytes are kept for this workspace's replays; "
                    f"{self._settings.replay_records:,} of {self._settings.replay_bytes:,} bytes may be, in 24 hours.",
                    budget="replays",
                    retry_after_s=60,
                )
        raise AssertionError(f"{outcome} is no answer to Begin. This is a bug")

    async def settle(self, workspace: Workspace, claim: Claim, reply: Reply, event: UsageEvent) -> Reply:
        """Reply and bill in one atomic write, durable when this returns: the reply to send, if another was first.

        Raises IdempotencyInProgress (the claim was lost, and nothing is billed by this attempt), PlanLimitExceeded
        (the key is free, and nothing is billed), StoreUnavailable.
        """
        packed = reply.pack()
        if claim.lost_blob:  # billed the first time
            await self._keep(claim.lost_blob, packed)
            return reply
        stored = Stored(body=packed)
        if len(packed) > INLINE_BYTES:
            stored = Stored(blob=f"{claim.op}-{claim.attempt}")
            await self._keep(f"{claim.op}-{claim.attempt}", packed)
        outcome = await self._ask(
            Complete(
                claim=claim.id,
                workspace=claim.workspace,
                op=claim.op,
                reply=stored,
                bytes=len(packed),
                event=event,
                cap_micros=workspace.monthly_cap_micros,
            )
        )
        _stop(claim)
        if isinstance(outcome, Capped):
            raise self._now_capped(workspace, event)
        if isinstance(outcome, Settled):
            return reply
        if isinstance(outcome, Replay):
            return reply if outcome.reply == stored else await self._read(outcome.reply) or reply
        raise IdempotencyInProgress("Another call with this key took over from this one.", retry_after_s=1.0)

    def release(self, claim: Claim) -> None:
        """The call failed: its key is free again, at once if the books can be reached."""
        _stop(claim)
        if not claim.lost_blob:
            apart(self._abandon(Abandon(claim=claim.id, workspace=claim.workspace, attempt=claim.attempt)))

    def _now_capped(self, workspace: Workspace, event: UsageEvent) -> PlanLimitExceeded:
        """For the next calls to hear before they are computed."""
        self._spent.pop((workspace.id, month_of(event.day)), None)
        return _capped(workspace)

    def _granted(self, step: Begin, op: str) -> Claim:
        claim = Claim(id=step.claim, workspace=step.workspace, op=op, attempt=step.attempt)
        claim.keeper = apart(self._keep_alive(claim))
        return claim

    def _lost(self, step: Begin, op: str, stored: Stored) -> Claim:
        logger.warning("the file of a stored reply is gone: it is computed again, and not billed")
        return Claim(id=step.claim, workspace=step.workspace, op=op, attempt=step.attempt, lost_blob=stored.blob)

    async def _keep_alive(self, claim: Claim) -> None:
        """For as long as the call runs: else a retry would take it for dead."""
        lease_ms = int(1000 * self._settings.lease_s)
        step = Renew(claim=claim.id, workspace=claim.workspace, attempt=claim.attempt, lease_ms=lease_ms)
        while True:
            await asyncio.sleep(self._settings.lease_s / 3)
            try:
                await self._ask(step)
            except StoreUnavailable:
                continue  # if it does not come back in time, a retry may run the call once more; it is billed once

    async def _abandon(self, step: Begin | Abandon) -> None:
        abandon = Abandon(claim=step.claim, workspace=step.workspace, attempt=step.attempt)
        try:
            await patiently(lambda: self._clerk.run(abandon), for_s=RELEASE_S)
        except StoreUnavailable:
            logger.warning("a key could not be freed: its lease lapses in %g s", self._settings.lease_s)

    async def _ask(self, step: ClaimStep, *, wait_s: float = 0.0) -> Outcome:
        async def attempt() -> Outcome:
            if wait_s and isinstance(step, Begin):
                return await self._clerk.wait(step, wait_s)
            return await self._clerk.run(step)

        return await patiently(attempt, for_s=self._settings.patience_s + wait_s)

    async def _keep(self, blob: str, packed: bytes) -> None:
        """Raises StoreUnavailable: a reply that cannot be kept cannot be promised."""
        try:
            await asyncio.to_thread(self._blobs.write, blob, packed)
        except OSError as error:
            logger.error("a reply cannot be kept: %s", error.strerror)
            raise StoreUnavailable("The reply cannot be kept now.", retry_after_s=5.0) from None

    async def _read(self, stored: Stored) -> Reply | None:
        packed = stored.body
        if stored.blob:
            packed = await asyncio.to_thread(self._blobs.read, stored.blob)
        try:
            return Reply.unpack(packed) if packed else None
        except ValueError:
            return None


def _capped(workspace: Workspace) -> PlanLimitExceeded:
    cap = pricing.plain(Decimal(workspace.monthly_cap_micros or 0) / 1_000_000)
    spent = f"This workspace has spent the {cap} US dollars that it may in a month (UTC)."
    return PlanLimitExceeded(spent, budget="spend")


def _stop(claim: Claim) -> None:
    if claim.keeper is not None:
        claim.keeper.cancel()
        claim.keeper = None
