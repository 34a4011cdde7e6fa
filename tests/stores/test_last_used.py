"""When a key was last used, in both stores."""

from __future__ import annotations

from serve_app.stores import Store


async def test_the_latest_use_counts_whatever_came_last(store: Store) -> None:
    await store.touch({"key_1": 2_000, "key_2": 5})
    await store.touch({"key_1": 1_000, "key_2": 6})
    assert await store.last_used(["key_1", "key_2", "key_3"]) == {"key_1": 2_000, "key_2": 6}


async def test_of_no_keys_nothing_is_known(store: Store) -> None:
    assert await store.last_used([]) == {}
