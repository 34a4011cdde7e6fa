"""`serve-app doctor`: what would keep the service from starting or serving here, and the cure of each.

It changes nothing, starts nothing, and asks nobody but the store and this machine. `checks.py` holds the rules that
need only facts, `machine.py` finds the facts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from serve_app.cli import checks, machine
from serve_app.cli import config as configs
from serve_app.cli.checks import Finding, Level, Model, fail, ok, warn
from serve_app.cli.config import Config, ConfigPath
from serve_app.cli.machine import Machine
from serve_app.cli.terminal import Failed, Json, show_json
from serve_app.core.catalog import ModelSpec
from serve_app.stores import DEFAULT_URL, StoreDown, StoreUnfit, is_local
from serve_app.stores.sqlite import path_of
from serve_app.stores.sqlite_schema import SCHEMA

LOW_DISK, NO_DISK = 2**30, 100 * 2**20  # bytes
MOST_SKEW_MS = 1000
REMOTE = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p")  # where SQLite's write-ahead log does not hold
MOUNTS = Path("/proc/mounts")
DASHBOARD, HEAD = 8265, 6379  # Ray's
ANSWER_S = 2.0


def doctor(
    config: ConfigPath = configs.DEFAULT,
    store: Annotated[
        str | None, typer.Option("--store", help="Else what the config says, then SERVE_APP_STORE, then the default.")
    ] = None,
    json: Json = False,
) -> None:
    """Check this machine, the store and the config, and say what to do. Exit code 0: fit, or warnings; 1: not fit."""
    findings = examine(config, store, machine.look())
    if json:
        show_json({"verdict": checks.worst(findings), "findings": findings})
    else:
        _show(findings)
    raise typer.Exit(1 if checks.worst(findings) is Level.FAIL else 0)


def examine(path: Path, store: str | None, here: Machine) -> list[Finding]:
    """Everything that is found. A check that breaks is a finding, too."""
    findings: list[Finding] = []
    try:
        found = configs.read(path)
    except (Failed, OSError) as error:
        findings.append(fail("config", str(error), "Name the file that the service is started with: --config."))
        found = Config(path=path)
    else:
        findings += _checked("config", lambda: checks.config(found))
    url = store or found.store or here.environment.get("SERVE_APP_STORE") or DEFAULT_URL
    models = [_model(spec) for spec in found.models]
    rest: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("store", lambda: _sqlite(path_of(url)) if is_local(url) else _redis(url)),
        ("sinks", lambda: checks.sinks(found, here)),
        ("versions", lambda: checks.versions(here)),
        ("ray", lambda: checks.ray(here)),
        ("ports", lambda: _ports(found, url)),
        ("open files", lambda: checks.limits(here)),
        ("models", lambda: checks.models(models)),
        ("memory", lambda: checks.memory(models, here)),
        ("cpus", lambda: checks.cpus(found, here)),
        ("gpus", lambda: checks.gpus(found, models, here, _gpus(found))),
    ]
    for name, check in rest:
        findings += _checked(name, check)
    return findings


def _checked(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:
        return [fail(name, f"could not be checked: {type(error).__name__}", "Look at it by hand.")]


def _sqlite(path: Path) -> Iterator[Finding]:
    """As the driver looks at it at start, but without making or changing it."""
    folder = path.parent
    if not checks.writable(folder) or (path.exists() and not os.access(path, os.R_OK | os.W_OK)):
        yield fail("store", f"{path} cannot be written", "Let this user write the file and its folder.")
        return
    at = folder
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    if free < LOW_DISK:
        cure = "Make room: when the disk is full, requests with a key and all bills are refused."
        yield (fail if free < NO_DISK else warn)("store", f"{free // 2**20:,} MiB free at {at}", cure)
    if (kind := _file_system(at)) in REMOTE:
        yield warn("store", f"{path} is on {kind}", "Put it on a local disk: a network's locks may not hold.")
    if not path.exists():
        yield ok("store", f"{path} will be made at the first start")
    elif reason := _unfit(path):
        yield fail("store", f"{path} {reason}", "Name another file, or serve with the release that wrote this one.")
    else:
        yield ok("store", f"{path}, {path.stat().st_size / 2**20:.1f} MiB, {free / 2**30:.1f} GiB free")
    yield ok("clock", "the store goes by this machine's")


def _unfit(path: Path) -> str | None:
    in_use = path.with_name(f"{path.name}-wal").exists()
    how = "mode=ro" if in_use else "mode=ro&immutable=1"  # else a log is made, and stays, with this user as its owner
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?{how}", uri=True, timeout=ANSWER_S)) as db:
            (version,) = db.execute("pragma user_version").fetchone()
            tables = db.execute("select count(*) from sqlite_master where name in ('records', 'events')").fetchone()[0]
    except sqlite3.DatabaseError as error:
        return f"cannot be read: {error}"
    if version > len(SCHEMA):
        return f"is of version {version}, and this program writes {len(SCHEMA)}"
    return None if tables == 2 or not version else "is the database of another program"


def _file_system(folder: Path) -> str | None:
    """Of the longest mount point above it."""
    try:
        mounts = [line.split()[1:3] for line in MOUNTS.read_text().splitlines()]
    except OSError:
        return None
    above = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(above, key=lambda it: len(it[0]), default=("", None))[1]


def _redis(url: str) -> Iterator[Finding]:
    try:
        skew_ms = asyncio.run(_skew_ms(url))
    except StoreUnfit as error:
        yield fail("store", str(error), "Change redis.conf (or the url) as this says, and restart Redis.")
        return
    except StoreDown as error:
        cure = "Start Redis, and check host, port, database and password of the store's url."
        yield fail("store", str(error), cure)
        return
    yield ok("store", "Redis answers, and its settings keep every write")
    if abs(skew_ms) > MOST_SKEW_MS:
        cure = "Run an NTP client on both: leases and expiries go by Redis's clock, bills by this machine's."
        yield warn("clock", f"this machine is {skew_ms / 1000:+.1f} s from Redis", cure)
    else:
        yield ok("clock", f"this machine is {skew_ms / 1000:+.3f} s from Redis")


async def _skew_ms(url: str) -> float:
    """This clock minus the server's, at the middle of the question."""
    from serve_app.stores import redis as redis_store  # its client takes a moment

    store = await redis_store.open(url)
    try:
        assert isinstance(store, redis_store.RedisStore)
        before = _now_ms()
        theirs = await store.clock_ms()
        return (before + _now_ms()) / 2 - theirs
    finally:
        await store.close()


def _ports(config: Config, url: str) -> Iterator[Finding]:
    reason = machine.taken(config.host, config.port)
    if reason is None:
        yield ok("ports", f"{config.port} is free")
    elif _is_ours(config.port):
        yield ok("ports", f"{config.port}: this service runs there already")
    else:
        cure = "End that process, or choose another port: PORT=8001 scripts/serve, or http_options.port."
        yield fail("ports", f"{config.port} is {reason}", cure)
    if reason := machine.taken("127.0.0.1", DASHBOARD):
        yield ok("ports", f"{DASHBOARD} is {reason}; Ray's dashboard will take the next one")
    if (reason := machine.taken("127.0.0.1", HEAD)) and not url.startswith("redis:"):
        yield ok("ports", f"{HEAD} is {reason}; `ray start --head` would need --port")


def _is_ours(port: int) -> bool:
    """Whether what listens there answers as this service does."""
    import httpx2

    try:
        with httpx2.Client(timeout=ANSWER_S, trust_env=False) as client:
            answer = client.get(f"http://127.0.0.1:{port}/ready").json()
    except (httpx2.HTTPError, ValueError):
        return False
    return isinstance(answer, dict) and "models" in answer


def _gpus(config: Config) -> list[int]:
    """Asked only if the config wants some: torch takes seconds."""
    return machine.gpus() if any(spec.num_gpus for spec in config.models) else []


def _model(spec: ModelSpec) -> Model:
    from serve_app.encoders import sources  # the hub's client takes a moment

    try:
        folder = sources.locate(spec)
        return Model(spec=spec, weights=sum(path.stat().st_size for path in folder.rglob("*.safetensors")))
    except OSError as error:
        return Model(spec=spec, missing=str(error))


def _show(findings: list[Finding]) -> None:
    for finding in findings:
        typer.echo(f"{finding.level.value:<5}{finding.check:<14}{finding.found}")
        if finding.cure:
            typer.echo(f"{'':<5}{'cure:':<14}{finding.cure}")
    counts = [sum(it.level is level for it in findings) for level in (Level.WARN, Level.FAIL)]
    typer.echo(f"verdict: {checks.worst(findings).value}, {counts[0]} warnings, {counts[1]} failures")


def _now_ms() -> float:
    return time.time_ns() / 1_000_000
