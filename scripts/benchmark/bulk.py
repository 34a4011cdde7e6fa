"""`serve-app embed` on a large file: killed and resumed, then judged by its output and the ledger; and its pace.

The pace is that of a run without interrupts, next to a plain loop over OpenAI's SDK with as many texts in a request, in
turn, on other texts than the killed run's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from benchmark import BenchError
from benchmark.server import Server, serving
from benchmark.workloads import short_queries
from serve_app.core.ledger import SHARDS, Kind
from serve_app.stores import open_store

MODEL = "all-MiniLM-L6-v2"
KILL_S = 600.0  # until a run is as far as it is to be killed


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench bulk", description=__doc__)
    add = parser.add_argument
    add("--texts", type=int, default=20_000, help="short ones (default: 20,000)")
    add("--kills", type=int, default=3, help="with SIGKILL (default: 3)")
    add("--chunk", type=int, default=64, help="texts in one request (default: 64)")
    add("--concurrency", type=int, default=4, help="of serve-app embed (default: 4)")
    add("--rounds", type=int, default=3, help="of the pace; medians are printed (default: 3)")
    add("--seed", type=int, default=1, help="of texts and kills (default: 1)")
    options = parser.parse_args(arguments)
    if options.texts < options.chunk * (options.kills + 1) or min(options.chunk, options.concurrency) < 1:
        parser.error("there must be a chunk to be done before, between and after the kills")
    return options


def measure(options: argparse.Namespace, root: Path) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        print("starting the server", file=sys.stderr)
        server = stack.enter_context(serving(root / "deployments.yaml", root, folder))
        bench = _Bench(options, server, root, folder)
        print("\n".join(bench.killed()), flush=True)
        plain, bulk = [], []
        for number in range(options.rounds):
            print(f"round {number + 1}/{options.rounds}", file=sys.stderr)
            plain.append(bench.loop_per_s(number))
            bulk.append(bench.bulk_per_s(number))
    print(f"pace, {options.texts:,} texts, {options.chunk} in a request, median (lowest-highest) of {options.rounds}:")
    print(f"  plain loop over OpenAI's SDK, one at a time  {_spread(plain)} texts/s")
    print(f"  serve-app embed, {options.concurrency} at once  {_spread(bulk)} texts/s")


class _Bench:
    def __init__(self, options: argparse.Namespace, server: Server, root: Path, folder: Path) -> None:
        self._options = options
        self._server = server
        self._root = root
        self._folder = folder

    def killed(self) -> list[str]:
        """What was found, a line each. Raises BenchError if anything is not as it must be."""
        count, kills, rng = self._options.texts, self._options.kills, random.Random(self._options.seed)
        texts = self._texts("killed")
        out, before = self._folder / "killed.out.jsonl", self._billed()
        chunks = -(-count // self._options.chunk)
        places = sorted(rng.sample(range(1, chunks - 1), kills))
        for place in places:
            self._kill_at(out, self._command("killed", out), place)
        told = self._embed("killed", out)
        billed = self._billed()
        events, quantity, inputs = (billed[at] - before[at] for at in range(3))
        ids = [orjson.loads(line)["id"] for line in out.open("rb")]
        if ids != [f"t{number}" for number in range(count)]:
            raise BenchError(f"the output is not each of {count} rows once and in order: it has {len(ids)}")
        if (inputs, quantity) != (count, told["tokens"]) or events != told["requests"]:
            raise BenchError(f"billed {inputs} texts, {quantity} tokens, {events} events; the run counts {told}")
        alone = self._alone(texts)
        if alone != quantity:
            raise BenchError(f"billed {quantity} tokens; /v1/tokenize counts {alone}")
        return [
            f"killed with SIGKILL after {', '.join(map(str, places))} of {chunks} chunks, and resumed",
            f"  output: {len(ids):,} rows, each once, in order; {told['replayed']} requests were replays",
            f"  ledger: {events} events, {inputs:,} texts, {quantity:,} tokens; /v1/tokenize counts {alone:,}",
        ]

    def bulk_per_s(self, number: int) -> float:
        name = f"bulk-{number}"
        self._texts(name)
        start_s = time.perf_counter()
        self._embed(name, self._folder / f"{name}.out.jsonl")
        return float(self._options.texts / (time.perf_counter() - start_s))  # the program's start is part of it

    def loop_per_s(self, number: int) -> float:
        import httpx2
        import openai

        texts, size = self._texts(f"loop-{number}"), self._options.chunk
        with (
            httpx2.Client(trust_env=False) as http,
            openai.OpenAI(api_key=self._server.api_key, base_url=f"{self._server.url}/v1", http_client=http) as client,
            (self._folder / "loop.out.jsonl").open("wb") as out,
        ):
            start_s = time.perf_counter()
            for at in range(0, len(texts), size):
                reply = client.embeddings.create(model=MODEL, input=texts[at : at + size])
                for offset, item in enumerate(reply.data):
                    out.write(orjson.dumps({"id": f"t{at + offset}", "embedding": item.embedding}) + b"\n")
            return len(texts) / (time.perf_counter() - start_s)

    def _texts(self, name: str) -> list[str]:
        seed = random.Random(f"{self._options.seed} {name}").getrandbits(32)
        texts = short_queries(seed).take(self._options.texts)
        lines = (orjson.dumps({"id": f"t{number}", "text": text}) for number, text in enumerate(texts))
        (self._folder / f"{name}.jsonl").write_bytes(b"\n".join(lines))
        return texts

    def _command(self, name: str, out: Path) -> list[str]:
        words = [sys.executable, "-m", "serve_app.cli", "embed", self._folder / f"{name}.jsonl", "--out", out]
        words += ["--model", MODEL, "--url", self._server.url, "--id-field", "id", "--json"]
        words += ["--chunk", self._options.chunk, "--concurrency", self._options.concurrency]
        return [str(word) for word in words]

    def _environment(self) -> dict[str, str]:
        return os.environ | {"SERVE_APP_API_KEY": self._server.api_key, "PYTHONPATH": str(self._root)}

    def _embed(self, name: str, out: Path) -> dict[str, Any]:
        done = subprocess.run(self._command(name, out), env=self._environment(), capture_output=True, check=False)
        if done.returncode:
            raise BenchError(f"serve-app embed ended with {done.returncode}: {done.stderr.decode(errors='replace')}")
        told: dict[str, Any] = orjson.loads(done.stdout)
        return told

    def _kill_at(self, out: Path, command: list[str], place: int) -> None:
        """As soon as so many chunks are done."""
        journal, until_s = out.with_name(f"{out.name}.journal"), time.monotonic() + KILL_S
        with subprocess.Popen(command, env=self._environment(), stdout=subprocess.DEVNULL) as process:
            try:
                while not journal.exists() or journal.read_bytes().count(b"\n") <= place:
                    if process.poll() is not None or time.monotonic() > until_s:
                        raise BenchError(f"serve-app embed did not come to {place} chunks ({process.returncode})")
                    time.sleep(0.005)
            finally:
                process.send_signal(signal.SIGKILL)

    def _billed(self) -> tuple[int, int, int]:
        """Events, tokens and texts in the ledger."""

        async def read() -> tuple[int, int, int]:
            store = await open_store(f"sqlite:{self._folder}/data/serve-app.db")
            events = quantity = inputs = 0
            for shard in range(SHARDS):
                after = 0
                while page := await store.events(shard, after, 500):
                    after = page[-1].sequence
                    tokens = [it.event for it in page if it.event.kind is Kind.TOKENS]
                    events += len(tokens)
                    quantity += sum(event.quantity for event in tokens)
                    inputs += sum(int(event.details["inputs"]) for event in tokens)
            await store.close()
            return events, quantity, inputs

        return asyncio.run(read())

    def _alone(self, texts: list[str]) -> int:
        """Tokens of all texts, as the service counts them without billing."""
        import httpx2

        headers = {"Authorization": f"Bearer {self._server.api_key}"}
        total = 0
        with httpx2.Client(trust_env=False, headers=headers, timeout=60.0) as http:
            for at in range(0, len(texts), 1000):
                fields = {"model": MODEL, "input": texts[at : at + 1000]}
                total += int(http.post(f"{self._server.url}/v1/tokenize", json=fields).json()["usage"]["total_tokens"])
        return total


def _spread(values: list[float]) -> str:
    return f"{median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"
