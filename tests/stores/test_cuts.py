"""What a crash leaves of a store's log is whole, wherever it ends. `scripts/prove cuts` tries more places."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stores.cuts import Log, RedisLog, SqliteLog, survive

OFFSETS = 12


@pytest.mark.parametrize("log", [SqliteLog, RedisLog])
def test_a_log_that_is_cut_is_the_beginning_of_what_was_asked(log: type[Log], tmp_path: Path) -> None:
    assert survive(log(tmp_path), offsets=OFFSETS, seed=1) > OFFSETS
