"""CPU time of this client, of the server and of everything else, between two moments; and what the machine is.

Wall time says what a caller waits; CPU time per text stays comparable when something else is running, and the cores
that others used say whether the wall time may be believed at all.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

BUSY = ("user", "nice", "system", "irq", "softirq", "steal")  # guest time is in user already

Processes = Callable[[], Iterable[psutil.Process]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """CPU seconds within `wall_s`. None = not known: nobody said which processes the server is."""

    wall_s: float
    client_s: float
    server_s: float | None
    foreign_cores: float | None

    @property
    def client_share(self) -> float:
        """Of the whole machine."""
        return self.client_s / self.wall_s / cores()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    at_s: float
    client_s: float
    machine_s: float
    server_s: dict[int, float]


class Meter:
    def __init__(self, server: Processes | None) -> None:
        self._server = server

    def read(self) -> Reading:
        """The start of a measurement."""
        server_s = self._server_s()
        return self._reading(server_s)

    def since(self, start: Reading, *, ceiling_s: float = 0.0) -> Usage:
        """ceiling_s: CPU that the in-process ceiling used meanwhile: neither the client's nor foreign."""
        end = self._reading({})  # the clocks first: looking for processes costs milliseconds
        wall_s, client_s = end.at_s - start.at_s, end.client_s - start.client_s
        if self._server is None:
            return Usage(wall_s=wall_s, client_s=client_s, server_s=None, foreign_cores=None)
        # What started in between counts from zero; what ended in between is lost, and shows up as foreign.
        server_s = sum(spent - start.server_s.get(pid, 0.0) for pid, spent in self._server_s().items())
        foreign_s = end.machine_s - start.machine_s - client_s - server_s - ceiling_s
        return Usage(wall_s=wall_s, client_s=client_s, server_s=server_s, foreign_cores=foreign_s / wall_s)

    def _reading(self, server_s: dict[int, float]) -> Reading:
        cpu = psutil.cpu_times()
        return Reading(
            at_s=time.perf_counter(),
            client_s=time.process_time(),
            machine_s=sum(getattr(cpu, kind, 0.0) for kind in BUSY),
            server_s=server_s,
        )

    def _server_s(self) -> dict[int, float]:
        spent = {}
        for process in self._server() if self._server else ():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                spent[process.pid] = times.user + times.system
        return spent


def trees(pids: Iterable[int]) -> list[psutil.Process]:
    """These processes and all their descendants that live now."""
    found: dict[int, psutil.Process] = {}
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(pid)
            found |= {process.pid: process for process in (root, *root.children(recursive=True))}
    return list(found.values())


def cores() -> int:
    return os.cpu_count() or 1


def description() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "transformers"))
    gib = psutil.virtual_memory().total / 2**30
    return f"{_cpu_model()}, {cores()} cores, {gib:.0f} GiB; Python {platform.python_version()}, {packages}"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
