"""The command line: a load and a fleet in, what saturates first and what it costs out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, TypedDict

from simulation import report
from simulation.capacity import REDIS_CLUSTER_PRIMARIES, Fleet, cells_for, cost
from simulation.constants import Constants
from simulation.load import Mix
from simulation.sizing import Sized, sized, sweep, two_cores

DESCRIPTION = """\
Sizes a cluster: simulates a slice of it (some ingresses, their part of the replicas, the service's own packing queue),
and does the arithmetic of the rest. Every figure rests on the constants that `--constants` lists, each measured,
published, derived or assumed; set your own with --set NAME=VALUE.
"""
ANSWER_KEEP_DAYS = 1 / 24  # events leave the store an hour after every sink has them
ANSWER_INLINE_BYTES = 0  # replies are files
ANSWER_GPUS = 8  # a cell has at most so many
ANSWER_PER_GPU = 2  # replicas: an event loop of its own each
FULL_CALLS = 1 / 16_384  # a token: as if every call held a full unit


class Load(TypedDict):
    burst: float
    seconds: float
    seed: int


def run(arguments: Sequence[str]) -> int:
    """The exit status: 0, or 2 for arguments that make no sense."""
    options = _parser().parse_args(arguments)
    try:
        costs = Constants().given(dict(_setting(text) for text in options.set))
        mix = _made(Mix, options)
        fleet = _made(Fleet, options)
    except ValueError as error:
        print(f"scripts/simulate: {error}", file=sys.stderr)
        return 2
    if options.measure:
        from simulation.measure import measured  # loads a model

        for name, value, unit in measured():
            print(f"{name or '-':14} {value:10.2f} {unit}")
        return 0
    if options.constants:
        print("| constant | value | unit | | from |\n|---|---|---|---|---|", *report.constants(costs), sep="\n")
        return 0
    for line in _report(fleet, mix, costs, options):
        print(line, flush=True)
    return 0


def _report(fleet: Fleet, mix: Mix, costs: Constants, options: argparse.Namespace) -> Iterator[str]:
    load: Load = {"burst": options.burst, "seconds": options.seconds, "seed": options.seed}
    yield (
        f"{fleet.requests_per_s:,.0f} requests/s of {mix.tokens:,.0f} tokens and {mix.vectors:g} texts, "
        f"bursts of {options.burst:g}; {fleet.gpus:,} GPUs; seed {options.seed}. "
        f"What the figures rest on: scripts/simulate --constants\n"
    )
    yield report.sanity(two_cores(costs, seconds=5 * options.seconds, seed=options.seed)) + "\n"
    rows = list[Sized](sweep(fleet, mix, costs, **load))
    yield from report.slices(rows, mix, costs)
    yield "\n" + report.hurts(rows) + "\n"
    present = rows[-1].fleet
    yield from report.table(present, mix, costs, "the present design, one cluster and one Redis")
    yield "\nRedis's memory is that of events kept so long and a day of replies; all else is of the moment.\n"
    yield from report.verdict(present, mix, costs)
    answer = _answer(fleet, mix, costs, load)
    yield (
        f"\nThe answer: {answer.fleet.cells:,} cells, each a cluster of its own with {answer.fleet.replicas:,} "
        f"replicas, {answer.fleet.replicas_per_gpu} a GPU, and a Redis, workspaces divided among them; an "
        f"ingress counts with its share of the replicas, not with all; events trimmed an hour after delivery; "
        f"replies in files. The driver speaks to one primary; if it spoke Redis Cluster, a cell could use "
        f"{REDIS_CLUSTER_PRIMARIES}, one a shard of the ledger.\n"
    )
    yield from report.table(answer.fleet, mix, costs, "in cells")
    yield ""
    yield from report.verdict(answer.fleet, mix, costs)
    yield ""
    yield from report.slices([answer], mix, costs)
    full = replace(answer.fleet, calls=mix.tokens * FULL_CALLS)
    named = [("one cluster", present), ("in cells", answer.fleet), ("in cells, every unit full", full)]
    yield ""
    yield from report.costs_of([(name, cost(it, mix, costs)) for name, it in named])


def _answer(fleet: Fleet, mix: Mix, costs: Constants, load: Load) -> Sized:
    """Cells so small that one Redis each is enough, and ingresses that count with their share of the replicas."""
    small = replace(fleet, keep_days=ANSWER_KEEP_DAYS, inline_bytes=ANSWER_INLINE_BYTES)
    small = replace(small, cells=-(-fleet.gpus // ANSWER_GPUS), calls=0.5, replicas_per_gpu=ANSWER_PER_GPU, counted=1)
    first = sized(cells_for(small, mix, costs), mix, costs, **load)
    return sized(cells_for(first.fleet, mix, costs), mix, costs, **load)  # again, with the ingresses that it takes


def _made(kind: Any, options: argparse.Namespace) -> Any:
    return kind(**{it.name: getattr(options, it.name) for it in fields(kind) if hasattr(options, it.name)})


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"--set {text}: NAME=NUMBER is wanted") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts/simulate", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--requests", dest="requests_per_s", type=float, default=1e6, help="a second (default: 1,000,000)")
    add("--gpus", type=int, default=1000, help="a replica each (default: 1,000)")
    add("--keys", type=int, default=10_000, help="API keys in use at once (default: 10,000)")
    add("--short", dest="short_part", type=float, default=0.5, help="part of the requests, one short text each (0.5)")
    add("--short-tokens", type=int, default=14, help="of such a text (14)")
    add("--texts", type=int, default=16, help="of any other request (16)")
    add("--tokens", dest="text_tokens", type=int, default=120, help="of such a text, on average (120)")
    add("--keyed", dest="keyed_part", type=float, default=0.1, help="part with an Idempotency-Key (0.1)")
    add("--burst", type=float, default=1.5, help="rate of a tenth of the time, to the mean (1.5)")
    add("--target", type=float, default=0.7, help="how busy anything may be (0.7)")
    add("--keep-days", type=float, default=35.0, help="of events in the store, now (35, the usage actor's default)")
    add("--seconds", type=float, default=1.0, help="of each simulated slice (1)")
    add("--seed", type=int, default=1, help="the same seed, the same figures (1)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="another value of a constant; repeatable")
    add("--constants", action="store_true", help="list the constants, and where each is from, and end")
    add("--measure", action="store_true", help="measure this machine's cheap constants in process, and end")
    return parser
