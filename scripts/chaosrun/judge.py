"""Holds what was left in the books against what the clients saw, once everything has come to rest.

The product's audit is asked first, through the code of `serve-app ledger audit`; what follows needs nothing of the
product's but its lists of events and records.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from chaosrun import ChaosError
from chaosrun.history import History
from chaosrun.installation import SINK
from serve_app.cli.audit import audit
from serve_app.core.audit.report import Report
from serve_app.core.ledger import SHARDS, UsageEvent
from serve_app.stores import Store
from serve_app.stores.blobs import Blobs

REST_S = 120.0  # what the sink may need for the last events
PAGE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    report: Report
    invariants: dict[str, int]  # all 0, or the run failed
    facts: dict[str, int | str]
    shown: list[str]

    @property
    def holds(self) -> bool:
        return not any(self.invariants.values())


async def rest(store: Store) -> None:
    """Until the sink has acknowledged every event. Raises ChaosError."""
    until_s = time.monotonic() + REST_S
    while time.monotonic() < until_s:
        behind = [
            shard
            for shard in range(SHARDS)
            if (await store.cursor(SINK, shard)).sequence < (await store.shard_state(shard)).last
        ]
        if not behind:
            return
        await asyncio.sleep(0.5)
    raise ChaosError(f"the sink does not have every event {REST_S:g} s after the last call")


async def judge(store: Store, history: History, *, sink: Path, blobs: Path, journal: Path) -> Verdict:
    """After the service has ended."""
    report = await audit(store, sinks={SINK: sink}, blobs=Blobs(blobs), now_ms=time.time_ns() // 1_000_000)
    bench = _Bench(history)
    bench.hear(await _events(store), {record.claim async for record in store.records() if record.reply is not None})
    bench.read(journal, blobs)
    return Verdict(
        report=report,
        invariants={f"audit: {fault}": count for fault, count in report.faults.items()} | bench.invariants(),
        facts=bench.facts,
        shown=[f"audit: {it.fault.value}: {it.what}" for it in report.differences[:20]] + history.shown,
    )


KINDS = (
    *("double bills", "lost bills", "unequal bills", "bills of nobody", "runs after the first success"),
    *("answers without a run", "replay differs", "replay of another call", "not replayed", "mismatch not refused"),
    "never answered",
)


class _Bench:
    """Faults go into the history, beside those that its clients found."""

    def __init__(self, history: History) -> None:
        self._history = history
        self.facts: dict[str, int | str] = {}

    def invariants(self) -> dict[str, int]:
        return {kind: self._history.faults[kind] for kind in KINDS}

    def hear(self, events: list[UsageEvent], done: set[str]) -> None:
        keyed, unkeyed = defaultdict[str, list[UsageEvent]](list), defaultdict[str, list[UsageEvent]](list)
        for event in events:
            claim = event.details.get("idempotency")
            (keyed[claim] if claim else unkeyed[event.details["request_id"]]).append(event)
        succeeded = {claim: call for claim, call in self._history.keyed.items() if call.first_ns is not None}
        for claim, call in succeeded.items():
            self._compare(call.name, call.workspace, call.tokens if call.digest else None, keyed[claim])
        for id, (workspace, tokens) in self._history.unkeyed.items():
            self._compare(id, workspace, tokens, unkeyed[id])
        unseen = [claim for claim, bills in keyed.items() if bills and claim not in succeeded]
        for claim in unseen:
            if claim not in self._history.keyed or claim not in done or len(keyed[claim]) > 1:
                self._history.fault("bills of nobody", f"record {claim}")
        extra = [id for id, bills in unkeyed.items() if bills and id not in self._history.unkeyed]
        self.facts |= {
            "keyed successes": len(succeeded),
            "unkeyed successes": len(self._history.unkeyed),
            "events": len(events),
            "keyed tokens, clients": sum(call.tokens for call in succeeded.values()),
            "keyed tokens, ledger": _tokens(keyed, succeeded),
            "unkeyed tokens, clients": sum(tokens or 0 for _, tokens in self._history.unkeyed.values()),
            "unkeyed tokens, ledger": _tokens(
                unkeyed, (id for id, (_, tokens) in self._history.unkeyed.items() if tokens is not None)
            ),
            "billed, no client saw it, keyed": len(unseen),
            "billed, no client saw it, unkeyed": len(extra),
        }
        for kind in ("keyed", "unkeyed"):
            if self.facts[f"{kind} tokens, clients"] != self.facts[f"{kind} tokens, ledger"]:
                self._history.fault("unequal bills", f"the sums of {kind} calls")

    def read(self, journal: Path, blobs: Path) -> None:
        """The computations that were begun, and the files that they left."""
        runs = Counter[str]()
        for line in journal.read_text().splitlines():
            claim, at_ns = line.split()
            runs[claim] += 1
            call = self._history.keyed.get(claim)
            if call is not None and call.first_ns is not None and int(at_ns) > call.first_ns:
                self._history.fault(
                    "runs after the first success", f"{call.name}, {(int(at_ns) - call.first_ns) / 1e6:.1f} ms"
                )
        for claim, call in self._history.keyed.items():
            if call.first_ns is not None and not runs[claim]:
                self._history.fault("answers without a run", call.name)
        self.facts |= {
            "computations begun": runs.total(),
            "keys computed more than once before": sum(count > 1 for count in runs.values()),
            "replies kept as files": sum(1 for _ in blobs.glob("*/*")),
        }

    def _compare(self, name: str, workspace: str, tokens: int | None, bills: list[UsageEvent]) -> None:
        if not bills:
            self._history.fault("lost bills", name)
        elif len(bills) > 1:
            self._history.fault("double bills", f"{name}: {len(bills)}")
        elif bills[0].workspace != workspace or tokens not in (None, bills[0].quantity):
            self._history.fault("unequal bills", f"{name}: {tokens} of {workspace}")


def _tokens(events: dict[str, list[UsageEvent]], whose: Iterable[str]) -> int:
    return sum(event.quantity for one in whose for event in events.get(one, ()))


async def _events(store: Store) -> list[UsageEvent]:
    found: list[UsageEvent] = []
    for shard in range(SHARDS):
        after = 0
        while page := await store.events(shard, after, PAGE):
            found += [recorded.event for recorded in page]
            after = page[-1].sequence
    return found
