"""Steps and values as Redis gets them, and its replies as values again: the other half of `redis_scripts.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from serve_app.core import ledger
from serve_app.core.caps import PICOS_PER_MICRO, notices, picos
from serve_app.core.idempotency import (
    Abandon,
    Busy,
    Capped,
    Complete,
    Emit,
    Emitted,
    Fenced,
    Freed,
    Holdings,
    Ignored,
    Mismatch,
    Outcome,
    OverQuota,
    Proceed,
    Record,
    Renew,
    Renewed,
    Replay,
    Settled,
    Step,
    Stored,
)
from serve_app.core.ledger import Kind, Recorded, UsageEvent, UsageLine
from serve_app.core.limits import Buckets, Charge, Verdict
from serve_app.stores import Cursor, DeadLetter
from serve_app.stores import redis_scripts as scripts
from serve_app.stores.redis_client import Command, call


def prefix(shard: int) -> str:
    """What all keys of a shard begin with. The braces are a cluster's hash tag."""
    return f"serve-app:{{s{shard}}}:"


def command(step: Step, now: str) -> Command:
    """The script of a step, and its arguments in the order of `redis_scripts.py`."""
    if isinstance(step, Emit):
        return call(
            scripts.EMIT, prefix(step.event.shard), now, step.event.workspace, *bill_args(step.event, step.cap_micros)
        )
    shard, record = prefix(ledger.shard_of(step.workspace)), (now, step.workspace, step.claim)
    if isinstance(step, Renew):
        return call(scripts.RENEW, shard, *record, step.attempt, step.lease_ms)
    if isinstance(step, Abandon):
        return call(scripts.ABANDON, shard, *record, step.attempt)
    if isinstance(step, Complete):
        reply = ("blob", step.reply.blob) if step.reply.blob is not None else ("body", step.reply.body or b"")
        bill = (step.event.quantity, *bill_args(step.event, step.cap_micros)) if step.event else (0,)
        return call(scripts.COMPLETE, shard, *record, step.op, step.bytes, *reply, *bill)
    limits = (step.lease_ms, step.reserve_bytes, step.max_bytes, step.max_records)
    return call(scripts.BEGIN, shard, *record, step.attempt, step.op, step.fingerprint, *limits)


def charge(charge: Charge, now: str) -> Command:
    limit, cost, owed = charge.limit, charge.cost, charge.owed
    args: list[str | int] = [now, repr(limit.requests.each_us), limit.requests.at_once, cost.requests, owed.requests]
    if limit.tokens is not None:
        args += [repr(limit.tokens.each_us), limit.tokens.at_once, cost.tokens, owed.tokens]
    return call(scripts.CHARGE, f"serve-app:{{limits}}:{charge.key}", *args)


def verdict(row: Sequence[bytes]) -> Verdict:
    waits_and_lefts = [float(number) for number in row]
    return Verdict(wait=Buckets(*waits_and_lefts[:2]), buckets=Buckets(*waits_and_lefts[2:]))


def outcome(name: bytes, *row: Any) -> Outcome:
    match name:
        case b"proceed":
            return Proceed(op=row[0].decode(), attempts=row[1])
        case b"replay":
            return Replay(op=row[0].decode(), reply=Stored(body=row[1], blob=_text(row[2])))
        case b"busy":
            return Busy(lease_left_ms=row[0])
        case b"over_quota":
            return OverQuota(holdings=Holdings(records=row[0], bytes=row[1]))
        case b"emitted":
            return Emitted(new=bool(row[0]))
    return _PLAIN[name]


_PLAIN: dict[bytes, Outcome] = {
    b"mismatch": Mismatch(),
    b"settled": Settled(),
    b"capped": Capped(),
    b"fenced": Fenced(),
    b"renewed": Renewed(),
    b"freed": Freed(),
    b"ignored": Ignored(),
}


def event_args(event: UsageEvent) -> tuple[str, bytes, int, str, bytes, int, int]:
    line = orjson.dumps([event.kind, event.model, event.api_key, event.tier, event.unit_price])
    return event.id, event.to_json(), event.quantity, event.day, line, *amount_args(picos(event))


def amount_args(picos: int) -> tuple[int, int]:
    """Micro-dollars, and the pico-dollars beside them."""
    return divmod(picos, PICOS_PER_MICRO)


def bill_args(event: UsageEvent, cap_micros: int | None) -> Iterator[str | bytes | int]:
    """The event, and of a workspace with a cap that and the warnings."""
    yield from event_args(event)
    if cap_micros is not None:
        yield cap_micros
        for notice in notices(event, cap_micros):
            yield from amount_args(notice.at_picos)
            yield from event_args(notice.event)


def lines(workspace: str, day: str, sums: dict[bytes, bytes]) -> list[UsageLine]:
    lines = []
    for name in sorted(sums):
        what, _, line = name.partition(b":")
        if what == b"events":
            kind, model, api_key, tier, unit_price = orjson.loads(line)
            lines.append(
                UsageLine(
                    workspace=workspace,
                    day=day,
                    kind=Kind(kind),
                    model=model,
                    api_key=api_key,
                    tier=tier,
                    unit_price=unit_price,
                    events=int(sums[name]),
                    quantity=int(sums[b"quantity:" + line]),
                )
            )
    return lines


RECORD_FIELDS = (
    *("state", "workspace", "fingerprint", "op", "attempt"),
    *("attempts", "lease_ms", "expires_ms", "bytes", "tokens", "blob"),
)


def record(claim: str, row: Sequence[bytes | None]) -> Record:
    state, workspace, fingerprint, op, attempt, *numbers, blob = (_text(part) for part in row)
    attempts, lease_ms, expires_ms, size, tokens = (int(number or 0) for number in numbers)
    return Record(
        claim=claim,
        workspace=workspace or "",
        fingerprint=fingerprint or "",
        op=op or "",
        attempt=attempt or "",
        attempts=attempts,
        lease_ms=lease_ms,
        expires_ms=expires_ms,
        bytes=size,
        reply=Stored(blob=blob) if state == "done" else None,
        tokens=tokens,
    )


def cursor(row: Sequence[bytes | None]) -> Cursor:
    sequence, events, quantity = (int(number or 0) for number in row)
    return Cursor(sequence=sequence, events=events, quantity=quantity)


def letter(letter: DeadLetter) -> bytes:
    """The event, a line of JSON, then the reason."""
    return letter.recorded.event.to_json() + b"\n" + letter.reason.encode()


def dead_letter(shard: int, sequence: int | bytes, kept: bytes) -> DeadLetter:
    event, _, reason = kept.partition(b"\n")
    recorded = Recorded(sequence=int(sequence), event=UsageEvent.from_json(event))
    return DeadLetter(shard=shard, recorded=recorded, reason=reason.decode())


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()
