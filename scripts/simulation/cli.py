"""The command line: a load and a fleet in, what saturates first and what it costs out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

from simulation import report
from simulation.capacity import REDIS_CLUSTER_PRIMARIES, Fleet, cells_for, cost, demands
from simulation.constants import Constants
from simulation.load import Mix
from simulation.sizing import Sized, sized, sweep, two_cores, visible

DESCRIPTION = """\
Sizes a cluster: simulates a slice of it (some ingresses, their part of the replicas, the service's own packing queue),
and does the arithmetic of the rest. Every figure rests on the constants that `--constants` lists, each measured,
published, derived or assumed; set your own with --set NAME=VALUE.
"""
ANSWER_KEEP_DAYS = 1 / 24  # events leave the store an hour after every sink has them
ANSWER_INLINE_BYTES = 0  # replies are files
ANSWER_REPLICAS = 8  # a cell is at most so many
FULL_CALLS = 1 / 16_384  # a token: as if every call held a full unit


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
    load = {"burst": options.burst, "seconds": options.seconds, "seed": options.seed}
    yield (
        f"{fleet.requests_per_s:,.0f} requests/s of {mix.tokens:,.0f} tokens and {mix.vectors:g} texts, "
        f"bursts of {options.burst:g}; {fleet.gpus:,} GPUs; seed {options.seed}. Constants: scripts/simulate --constants\n"
    )
    yield report.sanity(two_cores(costs, seconds=5 * options.seconds, seed=options.seed)) + "\n"
    rows = list[Sized](sweep(fleet, mix, costs, **load))
    yield from report.slices(rows, mix, costs)
    yield "\n" + report.hurts(rows) + "\n"
    present = rows[-1].fleet
    limits = list(demands(present, mix, costs))
    yield from report.table(limits, "the present design, one cluster and one Redis")
    yield ""
    yield from report.verdict(limits, fleet.requests_per_s)
    answer = _answer(fleet, mix, costs, load)
    yield (
        f"\nThe answer: {answer.fleet.cells:,} cells, each a cluster of its own with {visible(answer.fleet):,} GPUs and a "
        f"Redis, workspaces divided among them; events trimmed an hour after delivery; replies in files. As Redis Cluster "
        f"a cell could use {REDIS_CLUSTER_PRIMARIES} primaries at most, once the driver speaks to several.\n"
    )
    yield from report.table(list(demands(answer.fleet, mix, costs)), "in cells")
    yield ""
    yield from report.slices([answer], mix, costs)
    full = replace(answer.fleet, calls=mix.tokens * FULL_CALLS)
    named = [("one cluster", present), ("in cells", answer.fleet), ("in cells, every unit full", full)]
    yield ""
    yield from report.costs_of([(name, cost(it, mix, costs)) for name, it in named])


def _answer(fleet: Fleet, mix: Mix, costs: Constants, load: dict[str, float]) -> Sized:
    """Cells so small that packing works and one Redis each is enough."""
    small = replace(fleet, keep_days=ANSWER_KEEP_DAYS, inline_bytes=ANSWER_INLINE_BYTES)
    small = replace(small, cells=max(1, -(-fleet.gpus // ANSWER_REPLICAS)), calls=0.5)
    return sized(cells_for(small, mix, costs), mix, costs, **load)  # type: ignore[arg-type]


def _made(kind: type, options: argparse.Namespace) -> object:
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
