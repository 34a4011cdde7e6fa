"""Cost curves of the bundled model: pace, latency and CPU against requests in flight, texts a request, tokens a text.

Each round measures every point of a curve once, in an order of its own, so that a noisy minute or a clock that drifts
bends no curve. The model is served from a copy of its folder whose context is all that its positions allow.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml

from benchmark import BenchError, machine
from benchmark.client import Client, Route, closed_loop
from benchmark.curve_report import plot, report
from benchmark.machine import Meter
from benchmark.runs import Run
from benchmark.server import serving, settings
from benchmark.workloads import WORDS, short_queries
from serve_app.core.catalog import ModelSpec
from serve_app.encoders.sources import fetch
from serve_app.encoders.tokenizer import Tokenizer

MODEL, CONTEXT = "all-MiniLM-L6-v2", 512  # its files say 256, and have 512 positions
POOL = 2048  # different short texts; then they come again
IN_FLIGHT = 2  # of the curves that are not about it
TEXTS = 8  # a request of the curve over lengths: what a request costs is small beside them
EXACT_POOL = 32 * TEXTS  # different texts of each length
SPECIAL = 2  # tokens around every text
CURVES = {
    "in flight": "requests in flight, one short text each",
    "texts": f"short texts a request, {IN_FLIGHT} in flight",
    "tokens": f"tokens a text, {TEXTS} texts a request, {IN_FLIGHT} in flight",
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench curves", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, help="of every point; medians are printed (default: 3)")
    add("--seconds", type=float, help="of each measurement (default: 5)")
    add("--quick", action="store_true", help="a smoke run: 1 round of 1 s")
    add("--seed", type=int, default=1, help="of the texts and of each round's order (default: 1)")
    add("--plot", type=Path, metavar="FILE.svg", help="draw the curves there; .png and .pdf, too")
    add("--json", type=Path, metavar="FILE", help="write the raw figures of every measurement there")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.seconds = options.seconds or (1.0 if options.quick else 5.0)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be positive")
    return options


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One place of a curve. requests: sent over and over; tokens: of each of them."""

    curve: str
    value: int
    in_flight: int
    texts: int  # a request
    requests: list[bytes]
    tokens: list[int]


def measure(options: argparse.Namespace, root: Path) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        config, tokenizer = _with_all_positions(root, folder)
        print("starting the server", file=sys.stderr)
        server = stack.enter_context(serving(config, root, folder))
        route = Route.parse(server.url, model=MODEL, format="base64", api_key=server.api_key)
        points = list(_points(route, tokenizer, options.seed))
        asyncio.run(_check(route, points))
        head = {
            "machine": machine.description(),
            "server": "serve run, " + " ".join(f"{name}={value}" for name, value in settings().items()),
            "client": f"base64, seed {options.seed}, {options.seconds:g} s a measurement, on the same cores",
            "tokens": f"as counted here: the same in `usage`, for a request of each of {len(points)} points",
        }
        print("\n".join(f"{name:8} {value}" for name, value in head.items()), flush=True)
        runs = list(_rounds(options, points, route, Meter(server.processes)))
    print(report(runs, CURVES))
    if options.json:
        options.json.write_bytes(orjson.dumps({**head, "runs": [asdict(run) for run in runs]}))
    if options.plot:
        plot(runs, CURVES, options.plot, title=f"{MODEL}; {head['machine']}")


def _with_all_positions(root: Path, folder: Path) -> tuple[Path, Tokenizer]:
    """A config that serves the model with its longest context, and its tokenizer."""
    config = yaml.safe_load((root / "deployments.yaml").read_text())
    entry = next(it["args"] for it in config["applications"] if it["args"].get("id") == MODEL)
    model = folder / "model"
    shutil.copytree(fetch(ModelSpec.model_validate(entry)), model)
    settings_of_model = model / "sentence_bert_config.json"
    settings_of_model.write_text(json.dumps({**json.loads(settings_of_model.read_text()), "max_seq_length": CONTEXT}))
    entry["source"] = str(model)
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, Tokenizer((model / "tokenizer.json").read_text(), CONTEXT)


def _points(route: Route, tokenizer: Tokenizer, seed: int) -> Iterator[Point]:
    def point(curve: str, value: int, in_flight: int, texts: int, pool: list[str]) -> Point:
        counts = tokenizer(pool).packed.lengths
        starts = range(0, len(pool), texts)
        return Point(
            curve=curve,
            value=value,
            in_flight=in_flight,
            texts=texts,
            requests=[route.request(pool[start : start + texts]) for start in starts],
            tokens=[int(counts[start : start + texts].sum()) for start in starts],
        )

    short = short_queries(seed).take(POOL)
    for value in (2**power for power in range(9)):
        yield point("in flight", value, value, 1, short)
    for value in (2**power for power in range(11)):
        yield point("texts", value, IN_FLIGHT, value, short)
    rng = random.Random(f"lengths {seed}")
    whole = [word for word, count in zip(WORDS, tokenizer(WORDS).packed.lengths, strict=True) if count == 1 + SPECIAL]
    for value in (2**power for power in range(3, 10)):
        texts = [" ".join(rng.choices(whole, k=value - SPECIAL)) for _ in range(EXACT_POOL)]
        yield point("tokens", value, IN_FLIGHT, TEXTS, texts)


async def _check(route: Route, points: Sequence[Point]) -> None:
    """The server counts the tokens that are counted here. Raises BenchError."""
    client = Client(route)
    for point in points:
        told = orjson.loads(await client.post(point.requests[0]))
        _hold(point, told, {point.tokens[0]})
    client.close()


def _hold(point: Point, told: dict[str, Any], tokens: set[int]) -> None:
    found = told["usage"]["prompt_tokens"]
    if len(told["data"]) != point.texts or found not in tokens:
        where = f"{point.value} {point.curve}"
        raise BenchError(f"{where}: {len(told['data'])} vectors and {found} tokens came for {point.texts} texts")
    if point.curve == "tokens" and found != point.value * point.texts:
        raise BenchError(f"a text of {point.value} tokens has {found / point.texts:g}")


def _rounds(options: argparse.Namespace, points: list[Point], route: Route, meter: Meter) -> Iterator[Run]:
    rng = random.Random(f"order {options.seed}")
    for number in range(1, options.rounds + 1):
        for curve in CURVES:
            print(f"round {number}/{options.rounds}: {curve}", file=sys.stderr)
            mine = [point for point in points if point.curve == curve]
            for point in rng.sample(mine, len(mine)):
                yield asyncio.run(_run(point, number, options.seconds, route, meter))


async def _run(point: Point, number: int, seconds: float, route: Route, meter: Meter) -> Run:
    client, requests = Client(route), itertools.cycle(point.requests)
    # Untimed: connections are open, and what idled is awake.
    await closed_loop(client, iter(point.requests[: point.in_flight]), point.in_flight)
    start, until_s = meter.read(), time.perf_counter() + seconds
    replies = await closed_loop(client, requests, point.in_flight, stop=lambda: time.perf_counter() > until_s)
    usage = meter.since(start)
    client.close()
    _hold(point, orjson.loads(replies.last), set(point.tokens))
    done = len(replies.latencies_s)
    return Run(
        what=point.curve,
        workload=str(point.value),
        round=number,
        texts=done * point.texts,
        wall_s=replies.wall_s,
        usage=usage,
        tokens=sum(itertools.islice(itertools.cycle(point.tokens), done)),
        latencies_s=replies.latencies_s,
    )
