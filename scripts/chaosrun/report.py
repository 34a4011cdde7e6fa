"""What a run says of itself: a line now and then, and the figures at its end."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping

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


def progress(passed_s: float, kills: Kills, history: History, *, calls: int) -> str:
    faults = f", faults {dict(history.faults)}" if history.faults else ""
    return (
        f"{passed_s:5.0f} s  {history.finished:,} of {calls:,} calls, {history.finished / passed_s:.1f} a second,"
        f" {history.tries:,} tries; {kills.by_kind.total()} of {kills.wanted} kills{faults}"
    )


def tell(head: dict[str, object], kills: Kills, history: History, spent: Spent, verdict: Verdict) -> None:
    _lines("run", head | {"cpu_s": f"service {spent.service_s:.0f}, clients {time.process_time():.0f}"})
    back = {
        kind: f"{kills.by_kind[kind]:4}, back after {statistics.median(seconds):.1f} s (most {max(seconds):.1f} s)"
        for kind, seconds in sorted(kills.back_s.items())
    }
    _lines("kills", {"total": f"{kills.by_kind.total():4}"} | back)
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
