"""The command line: one run from the first process to the verdict, with everything ended whatever happens."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import orjson
from benchmark import BenchError

from chaosrun import ChaosError, faults, judge
from chaosrun.callers import Callers, Tenant
from chaosrun.faults import Fault
from chaosrun.history import History
from chaosrun.installation import Installation, disk_of, installed, open_accounts, small_disk
from chaosrun.judge import Verdict
from chaosrun.kills import Killer, Kills, Pace, at_random, in_turn
from chaosrun.operator import operate
from chaosrun.report import Spent, progress, tell, tolls_of
from serve_app import stores
from serve_app.stores import Store
from tests.redis_server import RedisServer

DESCRIPTION = """\
Starts a service of its own, makes calls as clients do (retries, hang-ups, duplicates, half of them through the OpenAI
SDK), kills its processes with SIGKILL and runs an operator's commands meanwhile, and then holds the ledger against what
the clients saw. With --nodes it is a cluster of so many nodes, and workers are killed whole. With --others processes
are stopped, too, for longer than a lease lasts, the store is slow, its disk is full (where this user may mount a
tmpfs), and clocks are stepped.

Exit status 0: every success was billed once, and nothing was computed again after it. 1: not so. With --control, which
runs a build that stores reply and bill one after the other: 0 if the audit noticed.
"""
PROGRESS_S = 5.0
PATIENCE_HELP = "then another kind has its turn, though the one before is not over (default: 15 s)"

T = TypeVar("T")


def run(arguments: Sequence[str], root: Path) -> int:
    options = _parse(arguments)
    # Said anew: background jobs of a script ignore SIGINT, and what this starts would, too. SIGTERM is as Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    status = 1
    try:
        status = _run(options, root)
    except* (ChaosError, BenchError) as errors:
        print(f"scripts/chaos: {'; '.join(map(str, _leaves(errors)))}", file=sys.stderr)
    except* KeyboardInterrupt:
        status = 130
    return status


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "scripts/chaos", None, DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--store", choices=("sqlite", "redis"), default="sqlite", help="redis: a redis-server of its own, killed, too")
    add("--calls", type=int, default=10_000, help="logical calls (default: 10,000)")
    add("--kills", type=int, default=150, help="spread over the calls (default: 150)")
    add("--others", type=int, default=0, help="faults that kill nothing, spread likewise (default: 0)")
    add("--each", type=int, metavar="N", help="N faults of each kind, in turn, in place of --kills and --others")
    add("--only", metavar="KINDS", help="of the kinds in --each, these: ingress,node")
    add("--nodes", type=int, default=1, help="two or more: a Ray cluster, of a head and workers (--store redis)")
    add("--patience", type=float, default=15.0, metavar="S", help=PATIENCE_HELP)
    add("--seed", type=int, default=1, help="of the calls and of the kills (default: 1)")
    add("--in-flight", type=int, default=32, metavar="N", help="logical calls at a time (default: 32)")
    add("--control", action="store_true", help="a build that is not atomic: the audit must fail")
    add("--json", type=Path, metavar="FILE", help="write all counts there")
    options = parser.parse_args(arguments)
    if min(options.kills, options.others, options.nodes - 1) < 0 or options.in_flight < 1:
        parser.error("these are counts")
    if options.calls < max(1, 4 * (options.kills + options.others) if options.each is None else 0):
        parser.error("there must be at least four calls for each fault")
    if options.nodes > 1 and options.store != "redis":
        parser.error("a cluster of several nodes needs --store redis")
    return options


def _run(options: argparse.Namespace, root: Path) -> int:
    version = _version(root)
    history, spent = History(), Spent()
    begun_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True)))
        mounted = stack.enter_context(small_disk(folder))
        redis = stack.enter_context(_redis(disk_of(folder))) if options.store == "redis" else None
        store_url = redis.url if redis else f"sqlite:{disk_of(folder) / 'store.db'}"
        tenants = asyncio.run(open_accounts(store_url))
        with installed(
            root, folder, store_url, workers=options.nodes - 1, small_disk=mounted, torn=options.control
        ) as installation:
            spent.server = installation.server
            kinds = faults.kinds(installation, redis)
            order = _order(options, kinds)
            kills = Kills(wanted=len(order))
            killer = Killer(
                kinds,
                order,
                kills,
                history,
                calls=options.calls,
                seed=options.seed,
                patience_s=options.patience,
                look=spent.look,
            )
            asyncio.run(_calls_and_kills(root, options, installation, tenants, killer, kills, history, spent))
        verdict = asyncio.run(_verdict(installation, history))
    head: dict[str, object] = {
        "seed": options.seed,
        "git": version,
        "store": options.store,
        "nodes": options.nodes,
        "disk": "can be full" if mounted else "never full: no tmpfs may be mounted here",
        "build": "not atomic" if options.control else "as shipped",
        "wall_s": round(time.monotonic() - begun_s, 1),
    }
    tell(head, kills, history, spent, verdict)
    if options.json:
        result = {**head, **asdict(verdict), "faults": dict(kills.by_kind), "over_s": kills.over_s}
        result["tolls"] = {kind: asdict(toll) for kind, toll in tolls_of(kills, history).items()}
        result |= {"tries": history.tries, "clients": dict(history.counts), "answers": dict(history.statuses)}
        options.json.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2))
    if options.control:
        noticed = verdict.report.faults["lost"] + verdict.report.faults["double"]
        print(
            f"\ncontrol: the audit found {verdict.report.faults['lost']} lost, {verdict.report.faults['double']} double"
        )
        return 0 if noticed else 1
    print(f"\nverdict: {'every invariant holds' if verdict.holds else 'NOT as promised'}")
    return 0 if verdict.holds else 1


def _order(options: argparse.Namespace, found: dict[str, Fault]) -> list[str]:
    if options.control:
        return in_turn(["idempotency"], options.kills)
    if options.each is None:
        return at_random(found, options.kills, options.others, options.seed)
    wanted = options.only.split(",") if options.only else list(found)
    if unknown := [kind for kind in wanted if kind not in found]:
        raise ChaosError(f"there is no {', '.join(unknown)} here; there is {', '.join(found)}")
    return in_turn(wanted, options.each)


async def _calls_and_kills(
    root: Path,
    options: argparse.Namespace,
    installation: Installation,
    tenants: tuple[Tenant, Tenant],
    killer: Killer,
    kills: Kills,
    history: History,
    spent: Spent,
) -> None:
    pace = Pace(options.calls, history, kills)
    async with Callers(installation.port, tenants, history, pace.turn) as callers, asyncio.TaskGroup() as tasks:
        beside = [
            tasks.create_task(_tell_progress(options, kills, history, spent)),
            tasks.create_task(operate(root, installation.store_url, history)),
        ]
        async with asyncio.TaskGroup() as work:
            work.create_task(killer.run())
            work.create_task(
                callers.make(options.calls, seed=options.seed, model=installation.model, in_flight=options.in_flight)
            )
        for task in beside:
            task.cancel()
    await _with_store(installation.store_url, judge.rest)
    spent.look()


async def _verdict(installation: Installation, history: History) -> Verdict:
    async def hear(store: Store) -> Verdict:
        return await judge.judge(
            store, history, sink=installation.sink, blobs=installation.blobs, journal=installation.journal
        )

    return await _with_store(installation.store_url, hear)


async def _tell_progress(options: argparse.Namespace, kills: Kills, history: History, spent: Spent) -> None:
    begun_s = time.monotonic()
    while True:
        await asyncio.sleep(PROGRESS_S)
        await asyncio.to_thread(spent.look)
        line = progress(time.monotonic() - begun_s, kills, history, calls=options.calls)
        print(line, file=sys.stderr, flush=True)


async def _with_store(url: str, work: Callable[[Store], Awaitable[T]]) -> T:
    store = await stores.open_store(url)
    try:
        return await work(store)
    finally:
        await store.close()


@contextlib.contextmanager
def _redis(folder: Path) -> Iterator[RedisServer]:
    server = RedisServer(folder / "redis")
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _version(root: Path) -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "serve_app")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (", with changes" if changed else "")


def _leaves(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
