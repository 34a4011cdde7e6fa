"""What a crash leaves of a store's log is whole, wherever it ends. `scripts/prove cuts` tries more places."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stores.cuts import LOGS, survive

OFFSETS = 12


@pytest.mark.parametrize("driver", LOGS)
def test_a_log_that_is_cut_is_the_beginning_of_what_was_asked(driver: str, tmp_path: Path) -> None:
    assert survive(LOGS[driver](tmp_path), offsets=OFFSETS, seed=1) > OFFSETS
