"""The share of rendering in the CPU of a request: `Reply.render` of a large model's vectors, beside encoding the texts.

Who encodes here is the bundled model, in process, which is far cheaper than the large one whose vectors are rendered:
the shares are upper bounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import yaml

from benchmark import BenchError
from benchmark.ceiling import Ceiling
from benchmark.client import Format
from benchmark.workloads import short_queries
from serve_app.app import ENCODER_ENV
from serve_app.core.replies import Reply

TEXTS, DIMENSIONS = 1024, 1024  # of XLM-R-large, and of what is trained from it
TARGETS: dict[Format, float] = {"float": 0.15, "base64": 0.02}  # of the CPU of a request


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench render", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of everything; medians are printed (default: 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each format's rendering (default: 2)")
    parser.add_argument("--seed", type=int, default=1, help="of the texts and of the vectors (default: 1)")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be positive")
    return options


def measure(options: argparse.Namespace, root: Path) -> None:
    replies = {encoding_format: _reply(encoding_format, options.seed) for encoding_format in TARGETS}
    render_ms: dict[Format, list[float]] = {encoding_format: [] for encoding_format in TARGETS}
    encode_ms, tokens = list[float](), 0
    entry = yaml.safe_load((root / "deployments.yaml").read_text())["applications"][-1]["args"]
    with Ceiling(entry, ENCODER_ENV) as ceiling:
        dtype = ceiling.open()
        ceiling.hold("short", short_queries(options.seed).take(TEXTS))
        ceiling.measure("short")
        for number in range(options.rounds):
            print(f"round {number + 1}/{options.rounds}", file=sys.stderr)
            timing = ceiling.measure("short")
            encode_ms.append(1000 * timing.cpu_s)
            tokens = timing.tokens
            for encoding_format, reply in replies.items():
                render_ms[encoding_format].append(_cpu_ms(reply.render, options.seconds))
    encoding = median(encode_ms)
    if not encoding:
        raise BenchError("encoding took no CPU that could be measured")
    print(f"CPU of one request of {TEXTS:,} short texts ({tokens:,} tokens), medians of {options.rounds} rounds.")
    print(f"Encoding: {encoding:,.0f} ms, by {entry['id']} ({dtype}) in process, without HTTP and queue: a lower bound")
    print(f"for a model of XLM-R-large's size. Rendering: {TEXTS:,} x {DIMENSIONS:,} float32.\n")
    print("| encoding_format | body MB | rendering, CPU ms | share at most | target |\n|---|---|---|---|---|")
    for encoding_format, target in TARGETS.items():
        rendering = median(render_ms[encoding_format])
        share, size = rendering / (rendering + encoding), len(replies[encoding_format].render()) / 1e6
        held = "held" if share <= target else "not shown to hold"
        print(f"| {encoding_format} | {size:.1f} | {rendering:.1f} | {share:.1%} | {target:.0%}: {held} |")


def _reply(encoding_format: Format, seed: int) -> Reply:
    rows = np.random.default_rng(seed).standard_normal((TEXTS, DIMENSIONS), np.float32)
    return Reply(
        vectors=rows / np.linalg.norm(rows, axis=1, keepdims=True),
        model="render",
        usage={"prompt_tokens": 0, "total_tokens": 0},
        encoding_format=encoding_format,
        fingerprint="",
        request_id="",
    )


def _cpu_ms(render: Callable[[], bytes], seconds: float) -> float:
    """Of one call, on this thread."""
    calls, until_s, start_s = 0, time.perf_counter() + seconds, time.thread_time()
    while not calls or time.perf_counter() < until_s:
        render()
        calls += 1
    return 1000 * (time.thread_time() - start_s) / calls
