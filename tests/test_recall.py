"""Texts that need no second forward: equal ones in one request always, what came before only where it is kept."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from serve_app import recall as recall_module
from serve_app.core.errors import AtCapacity
from serve_app.core.packing import ALONE, Packed, Share
from serve_app.core.vectors import Vectors
from serve_app.dispatch import Encoded
from serve_app.recall import ENTRY_BYTES, ON_THE_LOOP_TOKENS, Answered, Recall
from tests.service.fakes import made_up

ROW_BYTES = 4 * 384 + ENTRY_BYTES
ACME, OTHER = Share(workspace="ws_acme"), Share(workspace="ws_other")


class Watched:
    """A recall, and what it had encoded."""

    def __init__(self, cache_bytes: int = 0) -> None:
        self.encoded: list[list[int]] = []
        self.firsts: list[list[int]] = []
        self.counted: Counter[Answered] = Counter()
        self.recall = Recall(self._encode, cache_bytes=cache_bytes, count=self._count)

    async def ask(self, *texts: Sequence[int], share: Share = ACME, no_store: bool = False) -> Vectors:
        return (await self.recall.encode(packed(texts), share, no_store=no_store)).vectors

    async def _encode(self, packed: Packed, share: Share) -> Encoded:
        self.encoded += [rows.tolist() for rows in np.split(packed.ids, np.cumsum(packed.lengths)[:-1])]
        if packed.firsts is not None:
            self.firsts.append(packed.firsts.tolist())
        return Encoded(vectors=made_up(packed), queue_s=0.25, compute_s=0.5)

    def _count(self, how: Answered, texts: int) -> None:
        assert texts > 0
        self.counted[how] += texts


def packed(texts: Sequence[Sequence[int]], firsts: Sequence[int] | None = None) -> Packed:
    return Packed(
        ids=np.array([id for text in texts for id in text], np.int32),
        lengths=np.array([len(text) for text in texts], np.int32),
        firsts=None if firsts is None else np.array(firsts, np.int32),
    )


def right(*texts: Sequence[int]) -> Vectors:
    return made_up(packed(texts))


@pytest.mark.parametrize("cache_bytes", [0, 1_000_000])
async def test_equal_texts_of_a_request_are_encoded_once_and_each_gets_its_row(cache_bytes: int) -> None:
    watched = Watched(cache_bytes)
    texts = ([1, 2], [3], [1, 2], [3, 1], [3], [1, 2])
    assert np.array_equal(await watched.ask(*texts), right(*texts))
    assert watched.encoded == [[1, 2], [3], [3, 1]]
    assert watched.counted == {Answered.ENCODED: 3, Answered.DUPLICATE: 3}


async def test_nothing_is_kept_unless_the_entry_says_so() -> None:
    watched = Watched()
    for _ in range(2):
        await watched.ask([1], [2])
    assert watched.encoded == [[1], [2]] * 2
    assert watched.recall.bytes == 0


async def test_what_came_before_is_not_encoded_again_alone_or_in_other_company() -> None:
    watched = Watched(1_000_000)
    first = await watched.ask([1], [2, 3])
    assert np.array_equal(await watched.ask([2, 3]), first[1:])
    texts = ([4], [2, 3], [1], [4])
    assert np.array_equal(await watched.ask(*texts), right(*texts))
    assert watched.encoded == [[1], [2, 3], [4]]
    assert watched.counted == {Answered.ENCODED: 3, Answered.CACHED: 3, Answered.DUPLICATE: 1}


async def test_what_was_found_took_no_time_and_what_was_encoded_tells_its_own() -> None:
    watched = Watched(1_000_000)
    await watched.ask([1])
    found = await watched.recall.encode(packed([[1]]), ACME, no_store=False)
    mixed = await watched.recall.encode(packed([[1], [2]]), ACME, no_store=False)
    assert (found.queue_s, found.compute_s) == (0, 0)
    assert (mixed.queue_s, mixed.compute_s) == (0.25, 0.5)


async def test_one_workspace_finds_nothing_of_another() -> None:
    watched = Watched(1_000_000)
    await watched.ask([1])
    await watched.ask([1], share=OTHER)
    await watched.ask([1], share=ALONE)
    assert watched.encoded == [[1]] * 3


async def test_no_store_neither_finds_nor_keeps() -> None:
    watched = Watched(1_000_000)
    await watched.ask([1], [1], no_store=True)
    assert watched.recall.bytes == 0
    await watched.ask([1])
    await watched.ask([1], no_store=True)
    assert watched.encoded == [[1]] * 3


async def test_it_stays_within_its_bytes_and_forgets_what_was_used_longest_ago() -> None:
    watched = Watched(3 * ROW_BYTES)
    await watched.ask([1], [2], [3])
    assert watched.recall.bytes == 3 * ROW_BYTES
    await watched.ask([1])
    await watched.ask([4])
    assert watched.recall.bytes == 3 * ROW_BYTES
    await watched.ask([1], [3], [4])
    assert watched.encoded == [[1], [2], [3], [4]]
    await watched.ask([2])
    assert watched.encoded[4:] == [[2]]


async def test_a_cache_without_room_for_one_row_keeps_none() -> None:
    watched = Watched(ROW_BYTES - 1)
    assert np.array_equal(await watched.ask([1], [2]), right([1], [2]))
    assert watched.recall.bytes == 0


async def test_requests_that_cross_keep_one_row() -> None:
    watched = Watched(1_000_000)
    await watched.ask([1], no_store=False)
    rows = watched.recall._rows
    assert rows is not None
    rows.put(next(iter(rows._rows)), right([9])[0])
    assert watched.recall.bytes == ROW_BYTES
    assert np.array_equal(await watched.ask([1]), right([1]))


async def test_the_rows_of_a_request_are_its_callers_to_change() -> None:
    watched = Watched(1_000_000)
    first = await watched.ask([1], [2])
    expected = first.copy()
    first[:] = 0
    assert np.array_equal(await watched.ask([1], [2]), expected)


async def test_of_pairs_equal_ones_are_encoded_once_and_none_is_kept() -> None:
    watched = Watched(1_000_000)
    pairs = packed([[1, 2], [1, 2], [1, 2], [3]], firsts=[1, 2, 1, 1])
    for _ in range(2):
        found = await watched.recall.encode(pairs, ACME, no_store=False)
        assert np.array_equal(found.vectors, made_up(pairs))
    assert watched.encoded == [[1, 2], [1, 2], [3]] * 2
    assert watched.firsts == [[1, 2, 1]] * 2
    assert watched.recall.bytes == 0


async def test_what_fails_is_not_counted() -> None:
    async def fails(packed: Packed, share: Share) -> Encoded:
        raise AtCapacity("full")

    watched = Watched()
    recall = Recall(fails, cache_bytes=1_000, count=watched._count)
    for texts in ([[1]], [[1], [1], [2]]):
        with pytest.raises(AtCapacity):
            await recall.encode(packed(texts), ACME, no_store=False)
    assert not watched.counted
    assert recall.bytes == 0


@pytest.mark.parametrize("cache_bytes", [0, 10_000_000])
async def test_the_loop_goes_on_while_a_large_request_is_sorted(cache_bytes: int) -> None:
    watched = Watched(cache_bytes)
    texts = [[number % 50] * 20 for number in range(ON_THE_LOOP_TOKENS // 10)]
    threads: set[str] = set()
    names = recall_module._names

    def seen(packed: Packed, workspace: str | None) -> list[bytes]:
        threads.add(threading.current_thread().name)
        return names(packed, workspace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall_module, "_names", seen)
        assert np.array_equal(await watched.ask(*texts), right(*texts))
        await watched.ask([1], [2])
    assert len(threads) == 2
    assert threading.main_thread().name in threads
