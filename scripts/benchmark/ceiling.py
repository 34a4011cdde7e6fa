"""The same texts in-process: tokenized, sorted by length, in a replica's units, a core each. No HTTP, no queue.

It runs in a child process with the environment that the encoder replicas get, so that the allocator is the same and
the client's own CPU time stays apart. It is the best rate that a server around the same encoder could reach.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from serve_app.core.catalog import ModelSpec
from serve_app.core.packing import Packed
from serve_app.core.vectors import Vectors
from serve_app.encoders import Encoder, open_encoder
from serve_app.encoders.tokenizer import Tokenizer

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    wall_s: float
    cpu_s: float
    texts: int
    tokens: int


class Ceiling:
    """The encoder of one model entry, in a process of its own. Idle while nothing is asked of it."""

    def __init__(self, entry: dict[str, Any], environment: dict[str, str]) -> None:
        """entry: the `args` of the model's application. environment: what its replicas get."""
        self._entry = entry
        # One OpenMP pool spins long at its barriers: two to three times the CPU as soon as anything else wants a core.
        # Replicas are spared that (they have two pools: one loads, one encodes), so this process is, too.
        self._environment = {"GOMP_SPINCOUNT": "1000", **environment, "TOKENIZERS_PARALLELISM": "true"}
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def open(self) -> str:
        """Loads the model, and says which dtype `auto` became."""
        before = dict(os.environ)
        os.environ.update(self._environment)  # the allocator reads it when the process starts, which is now
        try:
            return self._ask(_open, self._entry)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def hold(self, name: str, texts: list[str]) -> None:
        """Texts to measure later, so that handing them over is not part of it."""
        self._ask(_hold, name, texts)

    def measure(self, name: str) -> Timing:
        return self._ask(_measure, name)

    def vectors(self, texts: list[str]) -> Vectors:
        return self._ask(_vectors, texts)

    def _ask(self, function: Callable[..., Answer], *arguments: Any) -> Answer:
        return self._pool.submit(function, *arguments).result()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    encoder: Encoder
    tokenizer: Tokenizer


_opened: list[_Opened] = []  # the child's
_held: dict[str, list[str]] = {}


def _open(entry: dict[str, Any]) -> str:
    encoder = open_encoder(ModelSpec.model_validate(entry))
    tokenizer = Tokenizer(encoder.tokenizer_json, encoder.card.max_tokens)
    _opened.append(_Opened(encoder=encoder, tokenizer=tokenizer))
    return encoder.card.dtype


def _hold(name: str, texts: list[str]) -> None:
    _held[name] = texts


def _measure(name: str) -> Timing:
    texts = _held[name]
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    packed = _opened[0].tokenizer(texts).packed
    with ThreadPoolExecutor(_opened[0].encoder.card.units_at_once) as cores:
        for _ in cores.map(_opened[0].encoder.encode, (unit for _, unit in _units(packed))):
            pass
    return Timing(
        wall_s=time.perf_counter() - wall_s,
        cpu_s=time.process_time() - cpu_s,
        texts=len(texts),
        tokens=packed.tokens,
    )


def _vectors(texts: list[str]) -> Vectors:
    encoder = _opened[0].encoder
    vectors = np.empty((len(texts), encoder.card.native_dimensions), np.float32)
    for members, unit in _units(_opened[0].tokenizer(texts).packed):
        vectors[members] = encoder.encode(unit)
    return vectors


def _units(packed: Packed) -> Iterator[tuple[list[int], Packed]]:
    """Sequences in order of length, as many at a time as fit: (which ones, their ids)."""
    sequences = np.split(packed.ids, np.cumsum(packed.lengths)[:-1])
    most = _opened[0].encoder.card.unit_tokens
    members, room = list[int](), most
    for index in np.argsort(packed.lengths, kind="stable").tolist():
        if members and len(sequences[index]) > room:
            yield members, _joined(sequences, members)
            members, room = [], most
        members.append(index)
        room -= len(sequences[index])
    yield members, _joined(sequences, members)


def _joined(sequences: list[np.ndarray[Any, np.dtype[np.int32]]], members: list[int]) -> Packed:
    chosen = [sequences[index] for index in members]
    return Packed(ids=np.concatenate(chosen), lengths=np.array([len(each) for each in chosen], np.int32))
