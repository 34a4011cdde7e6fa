"""The encoder replica: one model on one device, fed with units of packed tokens.

The forward passes of each lane have threads of their own, on a CPU one for each core: a short request is computed
beside bulk work, not behind it, and health checks wait for neither. A batch that fails is taken apart and retried once;
only what fails alone, fails. A batch loop that is dead or stuck makes the replica unhealthy, and Serve replaces it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from ray import serve

from serve_app import tracing
from serve_app.core.catalog import ModelCard, ModelSpec
from serve_app.core.metrics import EncoderMetrics, lane_name
from serve_app.core.packing import Packed, TokenIds
from serve_app.core.vectors import Vectors
from serve_app.deployments.gate import Gate, Run
from serve_app.deployments.load import Load
from serve_app.deployments.logs import join_serve
from serve_app.deployments.metrics import Exporter
from serve_app.dispatch import TracedUnit, Unit, UnitReply
from serve_app.encoders import Encoder, open_encoder, self_test

STUCK_S = 600.0  # far beyond any batch that callers still wait for: their deadline is two minutes
MAX_UNITS_AT_A_REPLICA = 256  # nine units a lane from each of 14 ingress replicas; Serve's default of 5 would be one

# A forward asks for the interpreter's lock at each of some hundred operators. By default the event loop may keep it for
# 5 ms once it has it: up to a fifth of the time of a unit of ten short requests went into that.
SWITCH_S = 0.0002
BULK_NICENESS = 10  # a tenth of a core that short requests, the ingress or the proxy want at the same time

Encode = Callable[[Packed], Vectors]  # see the Encoder protocol

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a replica tells the ingress about its model."""

    card: ModelCard
    tokenizer_json: str


class OtherFingerprint(Exception):
    """The unit's ids are from another model's tokenizer: the ingress has not heard yet that this one took its place."""


class EncoderReplica:
    """See `app.model` for the deployment. Ready when constructed: the model is loaded, checked and warm."""

    def __init__(self, spec: ModelSpec) -> None:
        join_serve()
        sys.setswitchinterval(SWITCH_S)
        started_s = time.perf_counter()
        self._encoder: Encoder = open_encoder(spec)
        opened_s = time.perf_counter()
        self_test.hold(spec, self._encoder)
        held_s = time.perf_counter() - opened_s
        logger.info("%s: opened in %.2f s, self-test held in %.2f s", spec.id, opened_s - started_s, held_s)
        self._metrics = EncoderMetrics()
        self._exporter = Exporter(self._metrics, self._measure)
        self._telling: asyncio.Task[None] | None = None
        # By lane, as in dispatch.py: express or not.
        card = self._encoder.card
        at_once = {express: card.at_once(express=express) for express in (True, False)}
        self._load = Load(at_once)
        self._threads = {
            True: ThreadPoolExecutor(at_once[True], thread_name_prefix="express"),
            False: ThreadPoolExecutor(at_once[False], thread_name_prefix="bulk", initializer=_give_way),
        }
        self._gates = {
            express: Gate([self._batched(express) for _ in range(at_once[express])], max_tokens=card.unit_tokens)
            for express in (True, False)
        }

    async def describe(self) -> Description:
        return Description(card=self._encoder.card, tokenizer_json=self._encoder.tokenizer_json)

    async def card(self) -> ModelCard:
        return self._encoder.card

    async def encode(self, unit: Unit) -> UnitReply:
        """One unit's rows. Raises OtherFingerprint, or whatever the unit does to the model even when alone."""
        if unit.fingerprint != self._encoder.card.fingerprint:
            raise OtherFingerprint(self._encoder.card.fingerprint)
        self._load.heard(unit)
        gate = self._gates[unit.express]
        if not isinstance(unit, TracedUnit):
            return await gate.submit(unit)
        with tracing.spans("unit", unit.traces, model=self._encoder.card.name, lane=lane_name(unit.express)) as traces:
            return await gate.submit(replace(unit, traces=traces))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for it, and hands it to `core/scaling.py`."""
        return self._load.report()

    async def check_health(self) -> None:
        if self._telling is None:  # Serve asks before the first unit comes
            self._telling = asyncio.create_task(self._exporter.run())
        for gate in self._gates.values():
            if gate.busy_s() > STUCK_S:
                raise RuntimeError(f"a batch has been running for more than {STUCK_S:g} s")
            for batched in [*gate.busy]:
                if not await batched._is_batching_task_alive():  # type: ignore[attr-defined]
                    raise RuntimeError("the batch loop is dead")

    def _batched(self, express: bool) -> Run:
        """`@serve.batch` keeps one queue a function: batches that run beside each other have functions of their own."""

        async def batch(units: list[Unit]) -> list[UnitReply | Exception]:
            with self._load.computing(express, sum(unit.packed.tokens for unit in units)):
                return await self._forward(express, units)

        batch.__name__ = "express_batch" if express else "bulk_batch"  # Serve's metrics go by it
        run: Run = serve.batch(max_batch_size=MAX_UNITS_AT_A_REPLICA, batch_wait_timeout_s=0)(batch)
        return run

    async def _forward(self, express: bool, units: list[Unit]) -> list[UnitReply | Exception]:
        """One batch. Exceptions are returned, not raised: a raised one would fail every unit of the batch."""
        started_s, thread = time.perf_counter(), self._threads[express]
        loop, tokens = asyncio.get_running_loop(), sum(unit.packed.tokens for unit in units)
        traces = [trace for unit in units if isinstance(unit, TracedUnit) for trace in unit.traces]
        with tracing.spans("forward", traces, units=len(units), tokens=tokens):
            replies = await loop.run_in_executor(thread, encode_units, self._encoder.encode, units)
        self._count(express, np.concatenate([unit.packed.lengths for unit in units]), time.perf_counter() - started_s)
        return replies

    def _count(self, express: bool, lengths: TokenIds, seconds: float) -> None:
        metrics, card = self._metrics, self._encoder.card
        labels = card.name, lane_name(express)
        texts, computed = len(lengths), self._encoder.computed_tokens(lengths)
        metrics.batch_seconds.observe(seconds, *labels)
        metrics.batch_fill_ratio.observe(int(lengths.sum()) / card.unit_tokens, *labels)
        metrics.batch_texts.observe(texts, *labels)
        metrics.computed_tokens.add(*labels, by=computed)
        metrics.padding_saved_tokens.add(*labels, by=max(0, texts * int(lengths.max()) - computed))

    def _measure(self) -> None:
        if memory := self._encoder.gpu_memory():
            labels = (self._encoder.card.name,)
            self._metrics.gpu_memory_allocated_bytes.show({labels: memory.allocated})
            self._metrics.gpu_memory_reserved_bytes.show({labels: memory.reserved})


def _give_way() -> None:
    """This thread, and those of OpenMP that it will start, mostly get a core when nobody else wants one."""
    with contextlib.suppress(OSError):  # a sandbox may forbid it: then the lanes share as equals
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + BULK_NICENESS)


def encode_units(encode: Encode, units: list[Unit]) -> list[UnitReply | Exception]:
    """All units in one forward; if that fails, each alone; if that fails too, each in halves. One reply a unit."""
    started_s = time.perf_counter()
    try:
        vectors = encode(Packed.join([unit.packed for unit in units]))
    except Exception as error:
        logger.warning("a batch of %d units failed (%s): taking it apart", len(units), type(error).__name__)
        if len(units) > 1:
            return [reply for unit in units for reply in encode_units(encode, [unit])]
        return [_in_halves(encode, units[0], error)]
    compute_s = time.perf_counter() - started_s
    ends = np.cumsum([len(unit.packed.lengths) for unit in units])
    return [UnitReply(vectors=rows, compute_s=compute_s) for rows in np.split(vectors, ends[:-1])]


def _in_halves(encode: Encode, unit: Unit, error: Exception) -> UnitReply | Exception:
    if len(unit.packed.lengths) == 1:
        return error
    started_s = time.perf_counter()
    halves: list[Vectors] = []
    for half in unit.packed.halves():
        try:
            halves.append(encode(half))
        except Exception as again:
            return again
    return UnitReply(vectors=np.concatenate(halves), compute_s=time.perf_counter() - started_s)
