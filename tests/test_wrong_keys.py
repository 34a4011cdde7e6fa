"""Whatever is wrong with a key, its refusal tells no more than that. `scripts/prove keys` does it at full size."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serve_app.core import keys
from serve_app.stores import Store, open_store
from tests.wrong_keys import SHARED, WORKSPACE, add_key, answers, near_miss, rank_test, wrong_headers

RIGHT = keys.mint(bytes([5] * keys.SECRET_BYTES))


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(f"sqlite:{tmp_path / 'store.db'}")
    await store.add_workspace(WORKSPACE)
    await add_key(store, RIGHT)
    yield store
    await store.close()


async def test_a_hundred_wrong_keys_have_one_answer_and_the_right_one_another(store: Store) -> None:
    headers = await wrong_headers(store, RIGHT, 100, random.Random(1))
    ((status, body),) = await answers(store, headers)
    assert status == 401
    assert b"invalid_api_key" in body
    ((status, _),) = await answers(store, [f"Bearer {RIGHT}"])
    assert status == 200


def test_a_near_miss_is_well_formed_and_near() -> None:
    near = near_miss(RIGHT, random.Random(1))
    assert keys.well_formed(near)
    assert near != RIGHT
    assert near[: len(keys.PREFIX) + SHARED] == RIGHT[: len(keys.PREFIX) + SHARED]


def test_the_rank_test_sees_what_is_larger_and_nothing_else() -> None:
    chance = random.Random(1)
    one, same = ([chance.random() for _ in range(2000)] for _ in range(2))
    assert abs(rank_test(one, same)) < 3.9
    assert rank_test([value + 0.1 for value in one], same) > 3.9
    assert rank_test([1.0] * 10, [1.0] * 10) == 0
