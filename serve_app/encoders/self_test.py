"""Holds a model to what it said when it was first loaded: the tokens and vectors of a few texts, kept in a file.

A replica whose weights, dtype, tokens or vectors are not those recorded refuses to serve: a damaged file, a tokenizer
that was exchanged, or a CPU for which `auto` chose another dtype would fill an index with vectors that do not fit. What
the entry itself says is the operator's to change: another source or dtype there makes a new record.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve_app.core.catalog import ModelSpec
from serve_app.core.known import Task
from serve_app.core.packing import Packed
from serve_app.core.vectors import Vectors
from serve_app.encoders import SAME_LOGIT, Encoder, logits_apart
from serve_app.encoders.tokenizer import PairTokenizer, Tokenizer

SAME = 0.9999  # cosine: what the same text may differ by from batch to batch, and a damaged model does not reach
QUERY = "Who jumps over a dog?"
TEXTS = (
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "Grüße aus Zürich, 東京からこんにちは, привет из Москвы 🙂",
    "def add(a: int, b: int) -> int:\n\treturn a + b  # 1,234.5 <b>&amp;</b> [SEP] </s>",
    "Invoices are rounded once, where a line is made; retries are neither computed nor billed again. " * 12,
)

ENTRY = {"source", "dtype", "max_tokens", "deterministic"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a model said. entry: what its entry said then; tokens: ids of each text; vectors: float32, in base64.

    Of one that ranks: of each text as a document to one query, and vectors of one number, the score.
    """

    entry: dict[str, Any]
    weights: dict[str, str]  # SHA-256 of each file
    dtype: str
    tokens: list[list[int]]
    vectors: list[str]

    @classmethod
    def of(cls, spec: ModelSpec, encoder: Encoder) -> Record:
        packed, entry = _tokens(encoder), spec.model_dump(mode="json", include=ENTRY)
        if spec.task is not Task.EMBED:  # came later than records that are kept
            entry["task"] = spec.task.value
        ids = np.split(packed.ids, np.cumsum(packed.lengths)[:-1])
        return cls(
            entry=entry,
            weights=encoder.weights,
            dtype=encoder.card.dtype,
            tokens=[row.tolist() for row in ids],
            vectors=[base64.b64encode(row.astype("<f4").tobytes()).decode() for row in encoder.encode(packed)],
        )

    def rows(self) -> Vectors:
        return np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in self.vectors]).astype(np.float32)

    def difference(self, now: Record) -> str | None:
        """In words, what `now` says otherwise; None if it is the same model."""
        if now.weights != self.weights:
            return "reads weight files that are not those recorded"
        if now.dtype != self.dtype:
            return f"computes in {now.dtype}, recorded was {self.dtype}"
        if now.tokens != self.tokens:
            return "makes other tokens of the same texts than were recorded"
        before, rows = self.rows(), now.rows()
        if rows.shape != before.shape:
            return f"gives {rows.shape[1]:,} dimensions, recorded were {before.shape[1]:,}"
        if self.entry["deterministic"] and not np.array_equal(rows, before):
            return "gives vectors that are not the recorded ones to the bit, which `deterministic` promises"
        if self.entry.get("task") == Task.RERANK:
            apart = logits_apart(rows, before)
            return None if apart <= SAME_LOGIT else f"gives scores whose logits are {apart:.3f} from those recorded"
        cosine = float((rows.astype(np.float64) * before).sum(axis=1).min())
        return None if cosine >= SAME else f"gives vectors with a cosine of {cosine:.6f} to those recorded"


def _tokens(encoder: Encoder) -> Packed:
    if encoder.card.task is Task.RERANK:
        return PairTokenizer(encoder.tokenizer_json, encoder.card.max_tokens).query(QUERY)(TEXTS).packed
    return Tokenizer(encoder.tokenizer_json, encoder.card.max_tokens)(TEXTS).packed


def hold(spec: ModelSpec, encoder: Encoder) -> None:
    """Compare with the record, or make it. Raises ValueError where they differ, OSError where it cannot be kept."""
    if spec.self_tests is None:
        return
    now, path = Record.of(spec, encoder), Path(spec.self_tests) / f"{spec.id}.json"
    before = _read(path)
    if before is None or before.entry != now.entry:
        before = _keep(path, now, new=before is None)
    if difference := before.difference(now):
        raise ValueError(
            f"model {spec.id} failed its self-test: it {difference}. Vectors of the two do not mix. "
            f"If this model is what you want, remove {path}, and embed again what the former one embedded."
        )


def _read(path: Path) -> Record | None:
    try:
        record = Record(**json.loads(path.read_bytes()))
        record.rows()
        return record
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise ValueError(f"{path} is no record of a self-test. Remove it to make a new one.") from None


def _keep(path: Path, record: Record, *, new: bool) -> Record:
    """The record that stands there now: of several replicas that start at once, the first one's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(asdict(record), file)
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o644)  # replicas of other users read it, too
    try:
        if new:
            os.link(file.name, path)
        else:
            os.replace(file.name, path)
    except FileExistsError:
        return _read(path) or record
    except OSError:  # a shared folder that knows no hard links
        os.replace(file.name, path)
    finally:
        Path(file.name).unlink(missing_ok=True)
    logger.info("%s: recorded its self-test in %s", path.stem, path)
    return record
