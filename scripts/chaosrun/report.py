"""What a run says of itself: a line now and then, and the figures at its end."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
from benchmark.server import Server

from chaosrun.history import History
from chaosrun.judge import Verdict
from chaosrun.kills import Kills


class Spent:
    """CPU time of the service, of those of its processes too that were killed: as it was when they were looked at."""

    def __init__(self) -> None:
        self.server: Server | None = None
        self._seen: dict[tuple[int, float], float] = {}

    def look(self) -> None:
        for process in self.server.processes() if self.server else ():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = times.user + times.system

    @property
    def service_s(self) -> float:
        return sum(self._seen.values())


@dataclass(slots=True)
class Toll:
    """Of all faults of a kind: what callers noticed until the next fault."""

    pause_s: float = 0.0  # the longest without a success anywhere
    gave_up: int = 0


def tolls_of(kills: Kills, history: History) -> dict[str, Toll]:
    tolls: dict[str, Toll] = {}
    answered_s = sorted(history.answered_s)
    ends_s = [strike.at_s for strike in kills.strikes[1:]] + answered_s[-1:]
    for strike, end_s in zip(kills.strikes, ends_s, strict=False):  # there may be no answer at all
        toll = tolls.setdefault(strike.kind, Toll())
        between = answered_s[bisect.bisect(answered_s, strike.at_s) : bisect.bisect(answered_s, end_s)]
        seen_s = [strike.at_s, *between, end_s]
        toll.pause_s = max(toll.pause_s, *(after - before for before, after in itertools.pairwise(seen_s)))
        toll.gave_up += sum(strike.at_s <= at_s < end_s for at_s in history.gave_up_s)
    return tolls


def progress(passed_s: float, kills: Kills, history: History, *, calls: int) -> str:
    faults = f", faults {dict(history.faults)}" if history.faults else ""
    return (
        f"{passed_s:5.0f} s  {history.finished:,} of {calls:,} calls, {history.finished / passed_s:.1f} a second,"
        f" {history.tries:,} tries; {len(kills.strikes)} of {kills.wanted} faults{faults}"
    )


def tell(head: dict[str, object], kills: Kills, history: History, spent: Spent, verdict: Verdict) -> None:
    _lines("run", head | {"cpu_s": f"service {spent.service_s:.0f}, clients {time.process_time():.0f}"})
    tolls, by_kind = tolls_of(kills, history), kills.by_kind
    over = {
        kind: f"{by_kind[kind]:4}, over after {statistics.median(seconds):.1f} s (most {max(seconds):.1f} s),"
        f" longest pause {tolls[kind].pause_s:.1f} s, the SDK gave up {tolls[kind].gave_up} times"
        for kind, seconds in sorted(kills.over_s.items())
    }
    _lines("faults", {"total": f"{by_kind.total():4}"} | over)
    sinks = {"redelivered events": sum(sink.redelivered for sink in verdict.report.sinks)}
    calls = {"logical calls": history.finished, "tries": history.tries}
    _lines("clients", calls | dict(sorted(history.counts.items())))
    _lines("answers", dict(history.statuses.most_common()))
    _lines("books", {**verdict.facts, "replies that the audit read": verdict.report.checked, **sinks})
    _lines("must be 0", verdict.invariants)
    for what in verdict.shown:
        print(f"  ! {what}")


def _lines(title: str, rows: Mapping[str, object]) -> None:
    width = max(map(len, rows), default=0)
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"  {name:{width}}  {f'{value:,}' if isinstance(value, int) else value}")
