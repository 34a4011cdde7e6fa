"""The models whose facts are known beforehand: an entry that names one need say no more than where its files lie.

From each model's own card. The files have the last word: what they contradict is refused at start, by `encoders/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from serve_app.core.prompts import Prompts


class Task(StrEnum):
    """What a model is for."""

    EMBED = "embed"
    """A text becomes a vector."""
    RERANK = "rerank"
    """A query and a document together become a score."""


class Pooling(StrEnum):
    """How token vectors become one: sentence-transformers' names."""

    CLS = "cls"
    MEAN = "mean"
    LAST_TOKEN = "lasttoken"


@dataclass(frozen=True, slots=True)  # by position: one line a model, below
class KnownModel:
    """context: tokens per input; parameters: in millions; matryoshka: sizes besides the native one.

    A reranker has no pooling, and one dimension: its score.
    """

    id: str
    name: str
    size_class: str
    dimensions: int
    context: int
    parameters: int
    pooling: Pooling | None
    matryoshka: tuple[int, ...] = ()
    prompts: Prompts | None = None
    task: Task = Task.EMBED

    @property
    def facts(self) -> dict[str, object]:
        """What an entry may leave out, in the entry's own words."""
        return {
            "name": self.name,
            "class": self.size_class,
            "native_dimensions": self.dimensions,
            "dimensions": self.matryoshka,
            "pooling": self.pooling,
            "task": self.task,
        }


_CLS, _MEAN, _LAST = Pooling.CLS, Pooling.MEAN, Pooling.LAST_TOKEN
_SEARCHING = Prompts(query="Represent this sentence for searching relevant passages: ")
_INSTRUCT = Prompts(
    query="Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
)
_E5 = Prompts(query="query: ", document="passage: ")
_NOMIC = Prompts(query="search_query: ", document="search_document: ")
_MODELS = (
    KnownModel("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2", "small", 384, 256, 23, _MEAN),
    KnownModel("bge-small-en", "BAAI/bge-small-en", "small", 384, 512, 33, _CLS, prompts=_SEARCHING),
    KnownModel("bge-small-en-v1.5", "BAAI/bge-small-en-v1.5", "small", 384, 512, 33, _CLS, prompts=_SEARCHING),
    KnownModel("bge-base-en-v1.5", "BAAI/bge-base-en-v1.5", "base", 768, 512, 109, _CLS, prompts=_SEARCHING),
    KnownModel("bge-large-en-v1.5", "BAAI/bge-large-en-v1.5", "large", 1024, 512, 335, _CLS, prompts=_SEARCHING),
    KnownModel("bge-m3", "BAAI/bge-m3", "large", 1024, 8192, 568, _CLS),
    KnownModel("e5-large-v2", "intfloat/e5-large-v2", "large", 1024, 512, 335, _MEAN, prompts=_E5),
    KnownModel("e5-mistral-7b", "intfloat/e5-mistral-7b-instruct", "7b", 4096, 4096, 7111, _LAST, prompts=_INSTRUCT),
    KnownModel("gte-large", "thenlper/gte-large", "large", 1024, 512, 335, _MEAN),
    KnownModel("gte-Qwen2-7B", "Alibaba-NLP/gte-Qwen2-7B-instruct", "7b", 3584, 32_768, 7613, _LAST, prompts=_INSTRUCT),
    KnownModel(
        "mxbai-embed-large", "mixedbread-ai/mxbai-embed-large-v1", "large", 1024, 512, 335, _CLS, (512,), _SEARCHING
    ),
    # Its card centres a vector before it is cut to a Matryoshka size, which is not done here: no sizes, then.
    KnownModel(
        "nomic-embed-text-v1.5", "nomic-ai/nomic-embed-text-v1.5", "base", 768, 8192, 137, _MEAN, prompts=_NOMIC
    ),
    KnownModel("bge-reranker-large", "BAAI/bge-reranker-large", "large", 1, 512, 560, None, task=Task.RERANK),
    KnownModel("bge-reranker-v2-m3", "BAAI/bge-reranker-v2-m3", "large", 1, 8192, 568, None, task=Task.RERANK),
)
KNOWN = {model.name.lower(): model for model in _MODELS}
_BY_ID = {model.id.lower(): model for model in _MODELS} | {
    model.name.rpartition("/")[2].lower(): model for model in _MODELS
}


def known(id: str, name: str | None) -> KnownModel | None:
    """By canonical name, or by id where no name is given; in any case of letters."""
    return _BY_ID.get(id.lower()) if name is None else KNOWN.get(name.lower())
