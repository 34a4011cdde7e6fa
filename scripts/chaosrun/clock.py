"""A wall clock that can be stepped: of one process, from outside, as an operator or NTP would step a machine's.

The process reads, with the time, a file of its own that holds how far it is off. No file, no step.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

CLOCKS = "CHAOS_CLOCKS"  # in the environment of everything that the run starts: the folder
BYTES = 8


def can_be_stepped() -> None:
    """This process's clock, from now on: `time.time` and `time.time_ns`, for Ray's code as for the service's."""
    file = os.open(Path(os.environ[CLOCKS]) / str(os.getpid()), os.O_RDONLY | os.O_CREAT, 0o600)
    true_ns = time.time_ns

    def now_ns() -> int:
        return true_ns() + int.from_bytes(os.pread(file, BYTES, 0), "little", signed=True)

    time.time_ns = now_ns
    time.time = lambda: now_ns() / 1e9


def step(folder: Path, pid: int, by_s: float) -> None:
    """Off by so much from the true time; 0: right again."""
    (folder / str(pid)).write_bytes(round(by_s * 1e9).to_bytes(BYTES, "little", signed=True))
