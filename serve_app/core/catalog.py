"""The model entry of `deployments.yaml`, the limits of each size class, and how a model is named.

An entry that contradicts itself never reaches a replica. `encoders/` opens what an entry names; the facts it finds come
back as a `ModelCard`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from serve_app.core.errors import TooManyInputs, TooManyTokens, UnsupportedParameter
from serve_app.core.known import Pooling, Task, known
from serve_app.core.prompts import Prompts
from serve_app.core.strict import StrictModel

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ROLE, _SEPARATOR, _SLASH = "encoder", ":", "--"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassLimits:
    """What one request to a model of this class may hold."""

    strings: int
    tokens: int


class SizeClass(StrEnum):
    SMALL = "small"
    BASE = "base"
    LARGE = "large"
    XL = "7b"

    @property
    def limits(self) -> ClassLimits:
        return _LIMITS[self]


_LIMITS = {
    SizeClass.SMALL: ClassLimits(strings=2048, tokens=262_144),
    SizeClass.BASE: ClassLimits(strings=1024, tokens=131_072),
    SizeClass.LARGE: ClassLimits(strings=1024, tokens=131_072),
    SizeClass.XL: ClassLimits(strings=256, tokens=32_768),
}
MOST_STRINGS = max(limits.strings for limits in _LIMITS.values())
LEAST_PAIR = 64  # tokens
MOST_AT_ONCE = 8  # units of a replica: beyond that, each has several threads
MOST_DOCUMENTS = 500  # of one request to rank them, whatever the model's class


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where weights come from: `package:NAME/FOLDER`, `hub:OWNER/NAME@COMMIT`, or a directory."""

    kind: Literal["package", "hub", "directory"]
    location: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Source:
        """Raises ValueError that says what would be right."""
        scheme, colon, rest = text.partition(":")
        if colon and scheme == "package" and rest:
            return cls(kind="package", location=rest)
        if colon and scheme == "hub":
            repository, _, revision = rest.partition("@")
            if not repository or not _COMMIT.fullmatch(revision):
                raise ValueError(
                    "a hub source needs its revision, as a full commit hash: hub:OWNER/NAME@<40 hex digits> "
                    "(a branch or tag may move, and vectors of two revisions do not mix)"
                )
            return cls(kind="hub", location=repository, revision=revision)
        if text.startswith(("/", "./", "../", "~/")):
            return cls(kind="directory", location=text)
        raise ValueError(
            f"source {text!r} is none of package:NAME/FOLDER, hub:OWNER/NAME@COMMIT, "
            "or a directory that starts with /, ./, ../ or ~/"
        )


class Scaling(StrictModel):
    """How many replicas a group may have. Which of them are wanted, `core/scaling.py` says."""

    min: Annotated[int, Field(ge=0)] = 1
    max: Annotated[int, Field(ge=1)] = 1
    target_busy: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Of its time, what a replica computes: above it there are more, below it fewer."""
    target_queue_s: Annotated[float, Field(gt=0)] = 2.0
    """Replicas are added to empty in this time what waits now, at the measured tokens per second."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0

    @model_validator(mode="after")
    def _ordered(self) -> Scaling:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


class ModelSpec(StrictModel):
    """One model = one entry: the `args` of its application."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._]*(-[A-Za-z0-9._]+)*$", max_length=64)]
    """The short name that requests use: `bge-m3`. Of a model in `core/known.py`, `name` and `class` follow from it."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._]+(-[A-Za-z0-9._]+)*(/[A-Za-z0-9._]+(-[A-Za-z0-9._]+)*)?$")]
    """The canonical name that responses carry: `BAAI/bge-m3`."""
    source: str
    task: Task = Task.EMBED
    """embed, or rerank: a cross-encoder, which reads a query and a document together."""
    size_class: Annotated[SizeClass, Field(alias="class")]
    """Which request limits apply: small, base, large or 7b."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto = bfloat16 where the hardware multiplies it, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = the GPU if the entry reserves one, else the CPU."""
    max_tokens: Annotated[int, Field(ge=8)] | None = None
    """Context per input, special tokens included. Unset = what the model's own files say; never more."""
    dimensions: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Sizes besides the native one that a request may ask for. Only for models trained for it (Matryoshka)."""
    prompts: Prompts | None = None
    """What may go before a text: `query`, `document`. `recommended` = what the card of a known model says."""
    deterministic: bool = False
    """The same vector to the last bit, whatever shares the batch and whichever replica, on equal hardware, answers."""
    self_tests: Annotated[str, Field(min_length=1)] | None = "data/self-tests"
    """Folder that keeps what the model said when it was first loaded; a replica that says otherwise does not serve."""
    cache_bytes: Annotated[int, Field(ge=0)] = 0
    """Memory of each ingress for vectors of texts that a workspace sent before: 0 = none are kept."""
    trust_remote_code: bool = False
    """Run Python code that ships with the weights. Off unless you have read that code."""
    replicas: Scaling = Scaling()
    num_cpus: Annotated[float, Field(ge=0)] = 0.25
    """What Ray reserves per replica. It limits nothing; `threads` does."""
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPU share per replica: 0.5 puts two on one GPU."""
    max_replicas_per_node: Annotated[int, Field(ge=1, le=100)] | None = None  # Serve takes no more than 100
    """Unset = as many as fit. 1, on nodes of one GPU: its share of a GPU is beside another model, not beside itself."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads per replica on the CPU: so many units are computed at once, at most 8. 0 = every core of the node."""
    unit_tokens: Annotated[int, Field(ge=64)] | None = None
    """Tokens in one unit of work. Unset = 1,024 on a CPU, 16,384 on a GPU."""
    native_dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Pooling | None = None
    """Both are what the files must say. Unset = whatever they say."""

    reserved_by: str | None = None
    """Workspace that keeps this model warm: it pays the active rate for tokens, and for `replicas.min` x `num_gpus`."""

    @model_validator(mode="before")
    @classmethod
    def _known_facts(cls, entry: Any) -> Any:
        """What is known of the model, where the entry does not say it. Raises ValueError where it says otherwise."""
        if not isinstance(entry, dict):
            return entry
        id, name = entry.get("id"), entry.get("name")
        if not isinstance(id, str) or not isinstance(name, str | None):
            return entry  # which the fields' own checks refuse
        model = known(id, name)
        if entry.get("prompts") == "recommended":
            if model is None or model.prompts is None:
                raise ValueError("no prompts are known to be recommended for this model: write them out, or none")
            entry = {**entry, "prompts": model.prompts}
        if model is None:
            return entry
        facts = model.facts
        for key in ("task", "class", "native_dimensions", "pooling"):
            if entry.get(key) not in (None, facts[key]):
                raise ValueError(f"{model.name} has {key} {facts[key]}, the entry says {entry[key]}")
        return {**entry, **{key: fact for key, fact in facts.items() if entry.get(key) is None}}

    @field_validator("source")
    @classmethod
    def _source_parses(cls, text: str) -> str:
        Source.parse(text)
        return text

    @model_validator(mode="after")
    def _device_matches(self) -> ModelSpec:
        if self.device == "cuda" and not self.num_gpus:
            raise ValueError("device is cuda, but num_gpus is 0: say which share of a GPU each replica gets")
        return self

    @model_validator(mode="after")
    def _fits_its_task(self) -> ModelSpec:
        if self.task is Task.RERANK:
            if self.max_tokens is not None and self.max_tokens < LEAST_PAIR:
                raise ValueError(f"max_tokens is {self.max_tokens}: a query and a document need {LEAST_PAIR} together")
            for name in ("dimensions", "prompts", "pooling", "cache_bytes"):
                if getattr(self, name):
                    raise ValueError(f"task is rerank: {name} is for models that embed")
        return self

    @model_validator(mode="after")
    def _reserved_is_warm(self) -> ModelSpec:
        if self.reserved_by is not None and not self.replicas.min:
            raise ValueError("reserved_by keeps replicas warm, but replicas.min is 0: say how many")
        return self

    @property
    def reserved_milli_gpus(self) -> int:
        """GPUs that are always kept, in thousandths: of a reserved model only."""
        return round(1000 * self.num_gpus) * self.replicas.min if self.reserved_by else 0

    def units_at_once(self, cores: int) -> int:
        """That a replica computes of bulk work. cores: of its node."""
        return 1 if self.resolved_device == "cuda" else min(MOST_AT_ONCE, self.threads or cores)

    @property
    def resolved_device(self) -> Literal["cpu", "cuda"]:
        if self.device == "auto":
            return "cuda" if self.num_gpus else "cpu"
        return self.device


def express_units(units_at_once: int) -> int:
    """Of short requests fewer are computed at once: while they wait, they become one unit."""
    return max(1, units_at_once // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a replica found in the model's files: everything the ingress needs, and the tokenizer comes beside it."""

    id: str
    name: str
    size_class: SizeClass
    native_dimensions: int
    other_dimensions: tuple[int, ...]
    max_tokens: int  # per input, special tokens included
    unit_tokens: int
    dtype: str
    created: int  # Unix seconds: when the replica that told loaded it
    fingerprint: str  # of weights, dtype, pooling and tokenizer: equal fingerprints, one vector space
    reserved_by: str | None = None  # workspace
    reserved_milli_gpus: int = 0
    prompts: Prompts | None = None
    cache_bytes: int = 0
    task: Task = Task.EMBED
    units_at_once: int = 1  # that a replica computes of bulk work

    def at_once(self, *, express: bool) -> int:
        """Units that a replica computes in this lane."""
        return express_units(self.units_at_once) if express else self.units_at_once

    @property
    def unit_sequences(self) -> int:
        """Most sequences in one unit: its reply stays within 2 MiB, half of gRPC's default message limit."""
        return max(1, 2**21 // (4 * self.native_dimensions))


def deployment_name(spec: ModelSpec) -> str:
    """The Serve deployment's name: it tells the ingress both names of a model that is still loading."""
    return _SEPARATOR.join((_ROLE, spec.id, spec.name.replace("/", _SLASH)))


def names_in(deployment: str) -> tuple[str, str] | None:
    """(id, canonical name) of an encoder deployment, None for any other."""
    parts = deployment.split(_SEPARATOR)
    if len(parts) != 3 or parts[0] != _ROLE:
        return None
    return parts[1], parts[2].replace(_SLASH, "/")


def check_strings(card: ModelCard, count: int) -> None:
    limit = card.size_class.limits.strings
    if count > limit:
        raise TooManyInputs(f"{count:,} inputs; {card.name} takes at most {limit:,} a request.", param="input")


def check_tokens(card: ModelCard, count: int, *, param: str = "input") -> None:
    limit = card.size_class.limits.tokens
    if count > limit:
        raise TooManyTokens(f"{count:,} tokens; {card.name} takes at most {limit:,} a request.", param=param)


def check_documents(card: ModelCard, count: int, *, param: str) -> None:
    if count > MOST_DOCUMENTS:
        limit = f"{card.name} ranks at most {MOST_DOCUMENTS:,} a request"
        raise TooManyInputs(f"{count:,} documents; {limit}.", param=param)


def check_task(card: ModelCard, wanted: Task) -> None:
    """Raises UnsupportedParameter where the request is not what the model is for."""
    if card.task is wanted:
        return
    if card.task is Task.EMBED:
        raise UnsupportedParameter(f"{card.name} embeds texts: send them to POST /v1/embeddings.", param="model")
    message = f"{card.name} ranks documents: send them, and a query, to POST /v1/rerank."
    raise UnsupportedParameter(message, param="model")


def check_dimensions(card: ModelCard, asked: int | None) -> int:
    """The size to answer with. Raises UnsupportedParameter for one that the model does not have."""
    legal = sorted({card.native_dimensions, *card.other_dimensions})
    if asked is not None and asked not in legal:
        sizes = ", ".join(map(str, legal))
        raise UnsupportedParameter(f"{card.name} has no {asked:,} dimensions; it has: {sizes}.", param="dimensions")
    return asked or card.native_dimensions
