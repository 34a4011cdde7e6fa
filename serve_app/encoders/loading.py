"""Opens a model, with sentence-transformers or as a reranker, checks it, warms it up, and says what it is.

Its modules decide what the model computes: the packed forward is used where it agrees with that on a few probes, and
otherwise the padded one is, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers.utils import logging as transformers_logging

from serve_app.core.catalog import ModelCard, ModelSpec, Source
from serve_app.core.known import Task
from serve_app.core.packing import Packed, TokenIds
from serve_app.core.vectors import Vectors
from serve_app.encoders import SAME_LOGIT, GpuMemory, bert, logits_apart, manifest
from serve_app.encoders.linear import can_prepack, prepack
from serve_app.encoders.packed import ATTENTION, PackedForward, first_position, rows_for
from serve_app.encoders.padded import PaddedForward
from serve_app.encoders.reranking import open_reranker
from serve_app.encoders.sources import fetch
from serve_app.encoders.tokenizer import PairTokenizer

logger = logging.getLogger(__name__)

UNIT_TOKENS = {"cpu": 1024, "cuda": 16_384}  # on a CPU: as fast as 4,096, where each core has a unit of its own
ONE_THREAD_TOKENS = 256  # up to here a second thread costs more CPU than it saves time
PROBE_LENGTHS = (4, 19, 150, 5, 500, 33)  # tokens
AGREES = 0.999  # cosine of packed to padded in the model's own dtype; bfloat16 alone makes them differ by about 1e-4

Model: TypeAlias = Any  # a SentenceTransformer or a Reranker: modules, the first of them the transformer


class Forward(Protocol):
    def __call__(self, packed: Packed) -> Vectors: ...

    def computed_tokens(self, lengths: TokenIds) -> int: ...


class LoadedEncoder:
    """An open model: see the Encoder protocol."""

    def __init__(
        self,
        *,
        card: ModelCard,
        tokenizer_json: str,
        weights: dict[str, str],
        forward: Forward,
        threads: int,
        alone: bool = False,
    ) -> None:
        """threads: of all calls together. alone: one each, whatever is free, for they may decide how a sum is split."""
        self.card = card
        self.tokenizer_json = tokenizer_json
        self.weights = weights
        self._forward = forward
        self.threads = threads
        self._alone = alone
        self._calls = 0  # under way
        self._counting = threading.Lock()

    def computed_tokens(self, lengths: TokenIds) -> int:
        return self._forward.computed_tokens(lengths)

    def gpu_memory(self) -> GpuMemory | None:
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return None
        return GpuMemory(allocated=torch.cuda.memory_allocated(), reserved=torch.cuda.memory_reserved())

    def encode(self, packed: Packed) -> Vectors:
        with self._counting:
            self._calls += 1
            share = max(1, self.threads // self._calls)
        try:
            torch.get_num_threads()  # a thread's first look at it undoes what was set before
            # OpenMP keeps the number of threads per calling thread: it is said at each call, not once at start. A core
            # for each unit is a fifth to two fifths more throughput than all cores for one unit after the other.
            torch.set_num_threads(1 if self._alone or packed.tokens <= ONE_THREAD_TOKENS else share)
            return self._encode(packed)
        finally:
            with self._counting:
                self._calls -= 1

    def _encode(self, packed: Packed) -> Vectors:
        try:
            with torch.inference_mode():
                vectors = self._forward(packed)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise MemoryError(f"{packed.tokens} tokens in {len(packed.lengths)} sequences are too many") from error
        if not np.isfinite(vectors).all():
            raise RuntimeError("the model returned numbers that are not finite")
        return vectors


def load(spec: ModelSpec) -> LoadedEncoder:
    """See `open_encoder`."""
    started_s = time.perf_counter()
    folder, device = fetch(spec), spec.resolved_device
    dtype = choose_dtype(spec.dtype, device)
    threads = spec.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(1 if spec.deterministic else threads)
    model = _open(spec, folder, device, dtype)
    tokenizer_json = model.tokenizer.backend_tokenizer.to_str()
    weights = manifest.hashes(folder)
    read_s = time.perf_counter()
    card = _card(spec, folder, weights, model, tokenizer_json)
    if spec.task is Task.EMBED:
        model.append(Normalize())
    with torch.inference_mode():
        forward = _forward(spec, model, card, tokenizer_json, fixed_rows=device == "cpu")
    encoder = LoadedEncoder(
        card=card,
        tokenizer_json=tokenizer_json,
        weights=weights,
        forward=forward,
        threads=threads,
        alone=spec.deterministic,
    )
    _warm_up(encoder, fixed_rows=device == "cpu")
    logger.info(
        "%s: files read in %.2f s, checked and warm in %.2f s, %s on %s",
        spec.id,
        read_s - started_s,
        time.perf_counter() - read_s,
        card.dtype,
        device,
    )
    return encoder


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    """`auto`: bfloat16 where the hardware multiplies it (Ampere and later, AVX512-BF16 or AMX), else float32."""
    if wanted != "auto":
        return cast(torch.dtype, getattr(torch, wanted))
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def _open(spec: ModelSpec, folder: Path, device: str, dtype: torch.dtype) -> Model:
    transformers_logging.disable_progress_bar()
    if spec.task is Task.RERANK:
        try:
            model: Model = open_reranker(folder, device, dtype, trust_remote_code=spec.trust_remote_code)
        except ValueError as error:
            raise ValueError(f"model {spec.id}: {error}") from error
    elif _is_classifier(folder):
        raise ValueError(f"model {spec.id}: its files are a classifier's. If it ranks documents, say `task: rerank`")
    else:
        model = SentenceTransformer(
            str(folder),
            device=device,
            local_files_only=True,
            trust_remote_code=spec.trust_remote_code,
            model_kwargs={"use_safetensors": True, "dtype": dtype},
        )
    model[0].auto_model.config.use_cache = False  # a decoder would keep keys and values that nobody reads
    for head in list(model)[1:]:
        head.float()
    return model.eval()


def _is_classifier(folder: Path) -> bool:
    """sentence-transformers would put mean pooling on it, and vectors of that mean nothing."""
    if (folder / "modules.json").exists() or not (folder / "config.json").exists():
        return False
    architectures = json.loads((folder / "config.json").read_bytes()).get("architectures") or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def _card(spec: ModelSpec, folder: Path, weights: dict[str, str], model: Model, tokenizer_json: str) -> ModelCard:
    """The facts, where the entry does not contradict them."""
    native, context = model.get_embedding_dimension(), _context(model)
    if native is None:
        raise ValueError(f"model {spec.id}: its files do not say how many dimensions its vectors have")
    if spec.native_dimensions and spec.native_dimensions != native:
        raise ValueError(
            f"model {spec.id}: its vectors should have {spec.native_dimensions:,} dimensions, its files say {native:,}"
        )
    if spec.pooling and (found := _pooling(model)) != spec.pooling:
        raise ValueError(f"model {spec.id}: its pooling should be {spec.pooling}, its files say {found}")
    if spec.prompts and not all(module.include_prompt for module in model if isinstance(module, Pooling)):
        raise ValueError(f"model {spec.id}: its files leave prompts out of pooling, which is not done here: set none")
    if spec.max_tokens and spec.max_tokens > context:
        raise ValueError(f"model {spec.id}: the entry says max_tokens {spec.max_tokens}, its files allow {context}")
    if too_large := [size for size in spec.dimensions if size > native]:
        raise ValueError(f"model {spec.id}: the entry lists dimensions {too_large}, its files have {native}")
    steady = _steady_tokens(model)
    if steady and (spec.max_tokens or context) > steady:
        raise ValueError(
            f"model {spec.id}: beyond {steady:,} tokens its rotary positions depend on the longest text of a batch "
            f"(longrope), so vectors would, too: set max_tokens to {steady} or less"
        )
    max_tokens, dtype = spec.max_tokens or context, str(model.dtype).removeprefix("torch.")
    modules = [[type(module).__name__, module.get_config_dict()] for module in list(model)[1:]]
    facts = [_files(spec, folder, weights), dtype, max_tokens, modules, tokenizer_json]
    facts += ["deterministic, a thread a unit"] * spec.deterministic
    facts += [spec.prompts.model_dump()] if spec.prompts else []
    return ModelCard(
        id=spec.id,
        name=spec.name,
        size_class=spec.size_class,
        native_dimensions=native,
        other_dimensions=spec.dimensions,
        max_tokens=max_tokens,
        unit_tokens=spec.unit_tokens or UNIT_TOKENS[spec.resolved_device],
        dtype=dtype,
        created=int(time.time()),
        fingerprint=hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12],
        reserved_by=spec.reserved_by,
        reserved_milli_gpus=spec.reserved_milli_gpus,
        prompts=spec.prompts,
        cache_bytes=spec.cache_bytes,
        task=spec.task,
        units_at_once=spec.units_at_once(len(os.sched_getaffinity(0))),
    )


def _pooling(model: Model) -> str:
    """By sentence-transformers' name; of several that are joined, all."""
    modes = [module.pooling_mode for module in model if isinstance(module, Pooling)]
    return " + ".join(mode if isinstance(mode, str) else "/".join(mode) for mode in modes) or "none"


def _context(model: Model) -> int:
    """Tokens that one input may have: what sentence-transformers truncates to, as far as there are positions."""
    transformer = model[0].auto_model
    positions = getattr(transformer.config, "max_position_embeddings", None)
    if positions is None:
        return int(model.max_seq_length or 512)
    return min(int(model.max_seq_length or positions), int(positions) - first_position(transformer))


def _steady_tokens(model: Model) -> int | None:
    """Up to where positions mean the same in any company. `dynamic` ones change beyond all positions there are only."""
    rope = getattr(model[0].auto_model.config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    limits = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(limits, default=None)


def _files(spec: ModelSpec, folder: Path, weights: dict[str, str]) -> str:
    """Which files these are: the hub's commit, or a hash over weights and configurations."""
    revision = Source.parse(spec.source).revision
    if revision:
        return revision
    configurations = {path: manifest.sha256(path) for path in folder.rglob("*config.json")}
    files = configurations | {folder / name: digest for name, digest in weights.items()}
    return hashlib.sha256(b"".join(bytes.fromhex(files[path]) for path in sorted(files))).hexdigest()


def _forward(spec: ModelSpec, model: Model, card: ModelCard, tokenizer_json: str, *, fixed_rows: bool) -> Forward:
    """The fused or the packed forward if it says what the padded one says, else the padded one."""
    transformer, deterministic = model[0].auto_model, spec.deterministic
    padded, probe = PaddedForward(model, alone=deterministic), _probe(card, tokenizer_json)
    expected, own_attention = padded(probe), transformer.config._attn_implementation
    if not deterministic and bert.fits(model):
        try:
            fused = bert.BertForward(model)
            reason = _difference(card, fused(probe), expected)
            if reason is None:
                fused.release()
                return fused
        except Exception as error:
            reason = type(error).__name__
        logger.warning("%s: the fused forward does not fit this model (%s)", spec.id, reason)
    try:
        transformer.set_attn_implementation(ATTENTION)
        packed = PackedForward(model, fixed_rows=fixed_rows, deterministic=deterministic)
        vectors = packed(probe)
        reason = _difference(card, vectors, expected)
        if reason is None:
            if not deterministic:
                _lay_out(spec, model, card, packed, expected, probe)
                return packed
            if _is_the_same_alone(packed, probe, vectors):
                return packed
            reason = "a vector's last bits depend on what shares its unit"
    except Exception as error:  # whatever a foreign architecture raises: the padded forward is known to work
        reason = type(error).__name__
    logger.warning("%s: the packed forward does not fit this model (%s); serving padded batches", spec.id, reason)
    transformer.set_attn_implementation(own_attention)
    return padded


def _lay_out(spec: ModelSpec, model: Model, card: ModelCard, packed: Forward, expected: Vectors, probe: Packed) -> None:
    """The weights, for a CPU's kernels, unless the model minds."""
    if model.device.type != "cpu" or not can_prepack(model.dtype):
        return
    undo = prepack(model[0])
    try:
        reason = _difference(card, packed(probe), expected)
        if reason is None:
            return
    except Exception as error:  # code of its own may read the weights
        reason = type(error).__name__
    undo()
    logger.info("%s: its weights stay as they are (%s)", spec.id, reason)


def _difference(card: ModelCard, found: Vectors, expected: Vectors) -> str | None:
    """In words; None if they say the same."""
    if card.task is Task.RERANK:
        apart = logits_apart(found, expected)
        return None if apart <= SAME_LOGIT else f"logits {apart:.3f} from the padded one's"
    agreement = float((found * expected).sum(axis=1).min())
    return None if agreement >= AGREES else f"cosine {agreement:.4f} to the padded one"


def _is_the_same_alone(forward: Forward, packed: Packed, vectors: Vectors) -> bool:
    return all(
        np.array_equal(forward(packed.slice(index, 1))[0], vectors[index]) for index in range(len(packed.lengths))
    )


def _probe(card: ModelCard, tokenizer_json: str) -> Packed:
    """A few sequences of different lengths, the same ids at every start."""
    lengths = np.array([min(length, card.max_tokens) for length in PROBE_LENGTHS], np.int32)
    firsts = None
    if card.task is Task.RERANK:
        pair = PairTokenizer(tokenizer_json, card.max_tokens).query("a")(["a"]).packed
        typed = pair.types().any()  # RoBERTa and its kin tell the two texts apart by what stands between them
        firsts = lengths // 2 if typed else lengths
    return Packed(ids=_PROBE_IDS[: int(lengths.sum())], lengths=lengths, firsts=firsts)


_PROBE_IDS = np.arange(sum(PROBE_LENGTHS), dtype=np.int32) % 89 + 5  # small ids: every vocabulary has them


def _warm_up(encoder: LoadedEncoder, *, fixed_rows: bool) -> None:
    """A forward of each row count that a few short requests have, where rows are fixed; and of the largest unit."""
    most = encoder.card.unit_tokens
    short = sorted({rows_for(tokens) for tokens in range(1, min(most, ONE_THREAD_TOKENS) + 1)}) if fixed_rows else [16]
    for tokens in (most, *short):
        length = min(tokens, encoder.card.max_tokens, 128)
        whole, rest = divmod(tokens, length)
        lengths = np.array([length] * whole + [rest] * bool(rest), np.int32)
        encoder.encode(Packed(ids=np.resize(_PROBE_IDS, tokens), lengths=lengths))
