"""Where the time of a start goes: moments that Ray, Serve and the encoder replica write into their logs themselves.

`memory.py` starts the service and asks.
"""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path

from benchmark import BenchError
from benchmark.server import Server

STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}")
READ = re.compile(r"files read in ([\d.]+) s, checked and warm in ([\d.]+) s")
OPENED = re.compile(r"opened in ([\d.]+) s, self-test held in ([\d.]+) s")


def logs_of(server: Server) -> Path:
    """Of Serve. Raises BenchError if no process of Ray's names its session."""
    for process in server.processes():
        for word in process.cmdline():
            if word.startswith("--session-dir="):
                return Path(word.partition("=")[2]) / "logs" / "serve"
    raise BenchError("Ray's session is not known")


def moments(driver: str, controller: str, encoder: str, *, model: str) -> dict[str, float]:
    """Unix seconds by what was done then, in the order of a start.

    driver: what `serve run` printed; controller, encoder: the logs of Serve's controller and of the model's replica.
    Raises BenchError if a line is missing: another version of Ray may say it otherwise.
    """
    others = [line for line in _with(controller, "started successfully") if f"app='{model}'" not in line]
    opened, read = _with(encoder, "self-test held in")[-1], _with(encoder, "checked and warm in")[-1]
    (open_s, test_s), (read_s, warm_s) = _seconds(OPENED, opened), _seconds(READ, read)
    warm_at = _at(read)
    return {
        "serve run is imported": _at(_with(driver, "Running config file")[0]),
        "Ray is up": _at(_with(driver, "Started a local Ray instance")[0]),
        "Serve is up": _at(_with(driver, "Started Serve in namespace")[0]),
        "applications are built": max(map(_at, _with(controller, "Imported and built app"))),
        "ingress and both actors run": max(map(_at, others)),
        "encoder's process runs": _at(opened) - open_s - test_s,
        "torch is imported": warm_at - warm_s - read_s,
        "model files are read": warm_at - warm_s,
        "forward is checked and warm": warm_at,
        "self-test is held": _at(opened),
    }


def _with(log: str, words: str) -> list[str]:
    """The lines that say so: at least one."""
    if found := [line for line in log.splitlines() if words in line and STAMP.search(line)]:
        return found
    raise BenchError(f"no log says {words!r}")


def _at(line: str) -> float:
    stamp = STAMP.search(line)
    assert stamp is not None
    return dt.datetime.strptime(stamp[0], "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp()


def _seconds(pattern: re.Pattern[str], line: str) -> tuple[float, float]:
    found = pattern.search(line)
    if found is None:
        raise BenchError(f"not understood: {line}")
    return float(found[1]), float(found[2])
