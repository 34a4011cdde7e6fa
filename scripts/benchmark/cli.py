"""The command line: what to measure and where, in order, with the server and the ceiling ended whatever happens."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import orjson
import yaml

from benchmark import (
    BenchError,
    books,
    bulk,
    curves,
    growth,
    machine,
    memory,
    neighbours,
    overload,
    render,
    revocation,
    scaling,
    soak,
)
from benchmark.ceiling import Ceiling
from benchmark.client import Route
from benchmark.machine import Meter, trees
from benchmark.report import tables
from benchmark.runs import Bench, Run
from benchmark.server import serving, settings
from benchmark.workloads import Workload, from_file, mixed, passages, short_queries
from serve_app.app import ENCODER_ENV

DESCRIPTION = """\
Measures the embeddings server over HTTP, next to what this machine's cores can do in-process with the same texts.

Starts the server itself on a free port, checks that it answers with the model's vectors, then measures in rounds:
bulk imports (server and in-process ceiling in turn), single queries, and single queries beside a bulk import.
Ends what it started. Leave the machine alone meanwhile: it says so if somebody did not.

`scripts/bench books` measures what keys and bills cost instead, `scripts/bench neighbours` what a flood of one
workspace does to the others, `scripts/bench bulk` kills `serve-app embed` and measures it, `scripts/bench revocation`
how long a revoked key goes on working, `scripts/bench curves` what texts and tokens cost against requests in flight,
texts a request and tokens a text, `scripts/bench memory` what each kind of process takes and where a start's time goes,
`scripts/bench render` what JSON costs beside the model, `scripts/bench growth` how replicas and nodes come and go with
the load, `scripts/bench overload` what is answered and refused when three times as much comes as fits, `scripts/bench
scaling` how throughput grows with simulated replicas, `scripts/bench soak` what grows in hours at a part of the most,
`scripts/bench encoder` measures the encoder alone, without Ray.
"""
OTHERS: dict[str, Any] = {
    "books": books,
    "bulk": bulk,
    "curves": curves,
    "growth": growth,
    "memory": memory,
    "neighbours": neighbours,
    "overload": overload,
    "render": render,
    "revocation": revocation,
    "scaling": scaling,
    "soak": soak,
}
FULL_ROUNDS, FULL_S = 3, 10.0
QUICK_ROUNDS, QUICK_S = 1, 2.5


def run(arguments: Sequence[str], root: Path) -> int:
    """The exit status: 0, or 1 when nothing could be measured or the answers were wrong."""
    other = OTHERS.get(arguments[0]) if arguments else None
    options = other.parse(arguments[1:]) if other else _parse(arguments, root)
    # Said anew: background jobs of a script ignore SIGINT, the server would inherit that, and SIGINT is what ends it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        if other:
            other.measure(options, root)
        else:
            _measure(options, root)
    except BenchError as error:
        print(f"scripts/bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _measure(options: argparse.Namespace, root: Path) -> None:
    entry = _entry(options.config, options.model)
    workloads = _workloads(options)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        if options.url:
            url, server = options.url, (lambda: trees(options.server_pid)) if options.server_pid else None
            api_key = options.api_key
            how = f"{url}, which was running"
        else:
            print("starting the server", file=sys.stderr)
            started = stack.enter_context(serving(options.config, root, folder))
            url, server, api_key = started.url, started.processes, started.api_key
            how = "serve run, " + " ".join(f"{name}={value}" for name, value in settings().items())
        ceiling = stack.enter_context(Ceiling(entry, ENCODER_ENV))
        dtype = ceiling.open()
        route = Route.parse(url, model=options.model, format=options.format, api_key=api_key)
        bench = Bench(route, ceiling, Meter(server), workloads=workloads, seconds=options.seconds, seed=options.seed)
        cosine, compared = bench.check()
        head = {
            "machine": machine.description(),
            "model": f"{options.model}, {dtype}",
            "server": how,
            "client": f"encoding_format {options.format}, seed {options.seed}, {options.seconds:g} s a measurement",
            "answers": f"lowest cosine to the in-process vectors {cosine:.6f}, over {compared} texts",
        }
        print("\n".join(f"{name:8} {value}" for name, value in head.items()), end="\n\n", flush=True)
        bench.prepare()
        runs = list(bench.rounds(options.rounds))
    print(tables(runs))
    if options.json:
        options.json.write_bytes(_json(head, runs))


def _parse(arguments: Sequence[str], root: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "scripts/bench", None, DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, help=f"of everything; medians are printed (default: {FULL_ROUNDS})")
    add("--seconds", type=float, help=f"about how long one measurement takes (default: {FULL_S:g})")
    add("--quick", action="store_true", help=f"a smoke run of about a minute: {QUICK_ROUNDS} round of {QUICK_S:g} s")
    add("--seed", type=int, default=1, help="of the texts and of the arrivals (default: 1)")
    add("--workload", type=Path, action="append", default=[], metavar="FILE.jsonl", help=WORKLOAD_HELP)
    add("--format", choices=("base64", "float"), default="base64", help="encoding_format (default: base64)")
    add("--config", type=Path, default=root / "deployments.yaml", help="what to serve (default: deployments.yaml)")
    add("--model", default="all-MiniLM-L6-v2", help="id of the entry to measure (default: all-MiniLM-L6-v2)")
    add("--url", help="measure a server that runs already on this machine, instead of starting one")
    add("--api-key", default="", help="with --url: a key of that server")
    add("--server-pid", type=int, action="append", default=[], metavar="PID", help=PID_HELP)
    add("--json", type=Path, metavar="FILE", help="write the raw figures of every measurement there")
    options = parser.parse_args(arguments)
    if options.server_pid and not options.url:
        parser.error("--server-pid goes with --url")
    if options.rounds is None:
        options.rounds = QUICK_ROUNDS if options.quick else FULL_ROUNDS
    if options.seconds is None:
        options.seconds = QUICK_S if options.quick else FULL_S
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be positive")
    return options


WORKLOAD_HELP = "one JSON string per line, instead of the generated bulk texts; repeatable"
PID_HELP = "with --url: the root of a process tree of the server, for the CPU columns; repeatable (HAProxy, raylet)"


def _entry(config: Path, model: str) -> dict[str, Any]:
    """The `args` of the application that serves this model."""
    try:
        applications = yaml.safe_load(config.read_text())["applications"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise BenchError(f"{config} cannot be read: {error}") from error
    entries = {application["args"].get("id"): application["args"] for application in applications}
    if model not in entries:
        raise BenchError(f"{config} has no model {model!r}; it has: {', '.join(filter(None, entries))}")
    found: dict[str, Any] = entries[model]
    return found


def _workloads(options: argparse.Namespace) -> list[Workload]:
    if options.workload:
        workloads = [from_file(path) for path in options.workload]
        if len({workload.name for workload in workloads}) < len(workloads):
            raise BenchError("two --workload files have the same name")
        return workloads
    return [short_queries(options.seed), passages(options.seed), mixed(options.seed)]


def _json(head: dict[str, str], runs: list[Run]) -> bytes:
    return orjson.dumps({**head, "runs": [asdict(each) for each in runs]}, option=orjson.OPT_INDENT_2)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM ends the server too, instead of leaving it behind."""
    sys.exit(128 + number)
