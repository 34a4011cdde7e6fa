"""The memory of the server's processes, by what each of them is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ENCODER = "encoder replica"
KINDS = {"ingress": "ingress", "idempotency": "idempotency actor", "usage": "usage actor"}  # by application
SERVE, RAY, HAPROXY, COMMAND = "Serve's controller and proxies", "Ray's own", "HAProxy", "serve run"
ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of all processes of one kind, in MiB."""

    processes: int = 0
    pss: float = 0.0
    uss: float = 0.0

    def __add__(self, other: Memory) -> Memory:
        return Memory(processes=self.processes + other.processes, pss=self.pss + other.pss, uss=self.uss + other.uss)


State = dict[str, Memory]  # by kind, and of all together


def kind_of(words: Sequence[str]) -> str:
    """words: the command line; a worker of Ray's has written what it is over its own."""
    if words[0].startswith("ray::ServeReplica:"):
        return KINDS.get(words[0].split(":")[3], ENCODER)
    if words[0].startswith(("ray::Serve", "ray::Proxy", "ray::HAProxy")):
        return SERVE
    names = [Path(word).name for word in words[:2]]
    return HAPROXY if names[0] == "haproxy" else COMMAND if names[1:] == ["serve"] else RAY


def memory_of(processes: Iterable[psutil.Process]) -> State:
    """Now. PSS and USS are read from /proc/PID/smaps_rollup; a process that ends meanwhile is left out."""
    state: State = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if words := process.cmdline():  # none: it has ended, and was not waited for yet
                found = process.memory_full_info()
                one = Memory(processes=1, pss=found.pss / 2**20, uss=found.uss / 2**20)
                for kind in (kind_of(words), ALL):
                    state[kind] = state.get(kind, Memory()) + one
    return state
